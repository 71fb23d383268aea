"""What a command raises to end with one clear line instead of a traceback."""


class CommandError(Exception):
    """Something outside the program went wrong: a download, a disk, a broken check."""

    exit_code = 1


class UsageError(CommandError):
    """The user asked for something that cannot be done as asked."""

    exit_code = 2
