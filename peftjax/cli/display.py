"""What the terminal shows while a command works: phases, bars and, without a terminal, lines."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Display:
    """Shows phases on a console and keeps the seconds each one took.

    Attributes:
      console: where everything is printed.
      seconds: seconds by phase, in order; a phase that is entered again adds up.
    """

    console: Console
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Counts the time of the block under the name of a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    @contextlib.contextmanager
    def phase(self, phase: str, doing: str) -> Iterator[None]:
        """A timed block under a spinner."""
        with self.timed(phase), self.console.status(f"{doing} ..."):
            yield

    def done(self, phase: str, outcome: str) -> None:
        """One line: what a phase came to and how long it took."""
        seconds = f"{self.seconds[phase]:6.1f} s"
        line = f"[cyan]{seconds}[/]  [bold]{phase:<9}[/] {escape(outcome)}"
        self.console.print(line, soft_wrap=True)

    def note(self, text: str) -> None:
        """One line that belongs to the phase above it."""
        self.console.print(f"{'':20}{escape(text)}", style="dim", soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, doing: str, total: int, *, every: int = 1) -> Iterator[Advance]:
        """A progress bar with the time that remains; plain lines where there is no terminal.

        Args:
          doing: what is going on.
          total: number of steps.
          every: without a terminal, a line is printed each time this many steps are done.

        Yields:
          ``advance(done, detail)``: the steps done so far, and words to show beside them.
        """
        if not self.console.is_terminal:
            start = time.perf_counter()

            def line(done: int, detail: str = "") -> None:
                if detail and (done % every == 0 or done == total):
                    left = (time.perf_counter() - start) / done * (total - done)
                    self.note(f"{done}/{total}  {detail}  ETA {left:.0f} s")

            yield line
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[detail]}", style="dim"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(doing, total=total, detail="")
            yield lambda done, detail="": progress.update(task, completed=done, detail=detail)
