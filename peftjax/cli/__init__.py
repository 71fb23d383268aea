"""The ``peftjax`` command.

A subcommand is a frozen dataclass in a module of its own: its fields are the flags, its docstring
the help, and ``run(console)`` the work. Listing it in ``_commands`` is all it takes to add one.
Those modules import JAX only when they run, so that help is quick.
"""

import inspect
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Protocol, Union, cast

from peftjax.cli.errors import CommandError

INTERRUPTED = 130  # what a shell expects of a program ended by Ctrl-C


class Command(Protocol):
    """What a subcommand can do."""

    def run(self, console: Any) -> None:
        """Does the work; raises ``CommandError`` for what the user can put right."""


def _commands() -> dict[str, type]:
    """The subcommands by name."""
    from peftjax.cli.convert import Convert
    from peftjax.cli.options import Quickstart

    return {"quickstart": Quickstart, "convert": Convert}


def _parse(arguments: Sequence[str]) -> Command:
    """The subcommand that the command line asks for, with its flags filled in."""
    import tyro

    def described(name: str, command: type) -> Any:
        text = inspect.getdoc(command) or ""
        # The list of commands gets a line each, a command's own help all there is to say.
        text = text if name in arguments[:1] else text.partition("\n")[0]
        shown = tyro.conf.subcommand(name, prefix_name=False, description=text)
        return Annotated[command, shown]

    choices = tuple(described(name, command) for name, command in _commands().items())
    # tyro makes subcommands of a union alone, and a union needs two members.
    union: Any = Union[(*choices, Annotated[None, tyro.conf.Suppress])]
    description = (
        "Adapt frozen JAX models with small trainable adapters.\n\n"
        "Start here:\n"
        "  peftjax quickstart          fine-tunes a real model on real text in minutes\n"
        "  peftjax convert             brings an adapter to torch PEFT or back, or merges it\n"
        "  peftjax COMMAND --help      explains the flags of a command"
    )
    parsed = tyro.cli(union, prog="peftjax", description=description, args=list(arguments))
    return cast(Command, parsed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: the words after the program's name; None takes those of the process.

    Returns:
      The exit code: 0, 2 for something asked wrongly, 1 for something that failed.
    """
    if arguments is None:
        arguments = sys.argv[1:]
        # The process is ours alone. transformers would import torch wherever it is installed,
        # for seconds and for nothing.
        os.environ.setdefault("USE_TORCH", "0")
    from rich.console import Console

    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        _parse(arguments or ["--help"]).run(Console(highlight=False))
    except CommandError as error:
        errors.print("[bold red]peftjax:[/] ", end="")
        errors.print(str(error), markup=False)
        return error.exit_code
    except KeyboardInterrupt:
        errors.print("\ninterrupted")
        return INTERRUPTED
    return 0
