"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table, a line each."""
    lines = [f"| {' | '.join(map(str, heads))} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, each))} |" for each in rows)])
