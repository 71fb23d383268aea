"""How well every method learns, here and in torch PEFT, from the same numbers on the same batches.

MiniLM and the tweets of ``peftjax quickstart``; adapters on the query and value layers, and a
classifier that starts as the linear probe. Every finished run is one line of JSON in the file of
results, and a second start goes on with what is missing. Two processes may share the file:

    python -m benchmarks.quality --only peftjax
    python -m benchmarks.quality --only torch
    python -m benchmarks.quality --report

The tables of the whole grid, as far as it has got, go into ``benchmarks/README.md``.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import memory, quality_jax, quality_plots, quality_tables, quality_task
from benchmarks.quality_task import Run
from benchmarks.run import into_readme
from peftjax.cli import assets

TITLE = "Learning quality"
METHODS = ("lora", "dora", "loha", "hra", "ia3", "adalora", "xlora")
FRAMEWORKS = ("both", "peftjax", "torch")  # "both" is the comparison of loss and gradients
BUDGETS = (1, 2, 4)
STEPS = {500: 100, 4000: 250}  # by the number of texts
SEEDS = 5
HELD_OUT = 1000
RESULTS = Path(__file__).parent / "results" / "quality.jsonl"

tables, plots, broken = quality_tables.tables, quality_plots.plots, quality_tables.broken


def grid(
    only: Sequence[str] = (),
    seeds: int = SEEDS,
    budgets: Sequence[int] = BUDGETS,
    texts: Sequence[int] = tuple(STEPS),
    quick: bool = False,
) -> list[Run]:
    """The runs wanted, seed by seed, so that a grid that is cut off has whole seeds."""
    if quick:
        seeds, budgets, texts = 1, BUDGETS[:1], (60,)
    steps = {60: 6} if quick else STEPS
    held_out = 64 if quick else HELD_OUT
    frameworks = [each for each in FRAMEWORKS if each in only] or FRAMEWORKS
    methods = [each for each in METHODS if each in only] or METHODS
    runs = []
    for seed in range(seeds):
        for count in texts:
            for method in methods:
                for budget in (0,) if method == "ia3" else budgets:
                    for framework in frameworks:
                        # One comparison a method and budget says it: it is exact.
                        if framework != "both" or (seed == 0 and count == texts[0]):
                            steps_of = steps[count]
                            runs.append(
                                Run(framework, method, budget, count, seed, steps_of, held_out)
                            )
    return runs


def key(row: dict) -> tuple:
    """What tells a row from all others."""
    return tuple(row[field.name] for field in dataclasses.fields(Run))


def missing(runs: Iterable[Run], rows: Iterable[dict]) -> list[Run]:
    """The runs that no row is of."""
    done = {key(row) for row in rows}
    return [run for run in runs if key(dataclasses.asdict(run)) not in done]


def read(path: Path) -> list[dict]:
    """The rows of a file, without the half of a line that a killed process may have left."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append(path: Path, row: dict) -> None:
    """Adds a row in one write, on a line of its own even after half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and path.read_bytes()[-1:] not in (b"\n", b"")
    with path.open("ab") as file:
        file.write(("\n" * cut + json.dumps(row) + "\n").encode())


def perform(run: Run) -> dict:
    """A run and all that was seen of it, as one flat record."""
    start = time.perf_counter()
    quality_task.task_of(run)  # once for all runs of a seed, so it is no part of what one costs
    cpu = time.process_time()
    if run.framework == "peftjax":
        seen, versions = quality_jax.train(run), quality_jax.VERSIONS
    else:
        from benchmarks import quality_torch  # JAX's half of the grid needs no torch

        seen = quality_torch.compare(run) if run.framework == "both" else quality_torch.train(run)
        versions = quality_torch.VERSIONS
    if "losses" in seen:
        losses = seen.pop("losses")
        seen["first_losses"] = [float(loss) for loss in losses[: quality_task.FIRST]]
        seen["last_loss"] = float(losses[-20:].mean())
        seen["probe"] = quality_task.probe_accuracy(run)
    return {
        **dataclasses.asdict(run),
        **seen,
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "versions": versions,
    }


def seconds_left(runs: Sequence[Run], rows: Sequence[dict]) -> float | None:
    """How long the runs will take, after rows of the same kind, or else of the same framework."""
    kinds = (
        lambda row: (row["framework"], row["method"], row["texts"]),
        lambda row: (row["framework"], row["texts"]),
        lambda row: row["framework"],
        lambda row: None,
    )
    total = 0.0
    for run in runs:
        own = dataclasses.asdict(run)
        for kind in kinds:
            if spent := [row["seconds"] for row in rows if kind(row) == kind(own)]:
                total += statistics.fmean(spent)
                break
        else:
            return None
    return total


def work_through(runs: Sequence[Run], path: Path, say: Callable[[str], None]) -> list[dict]:
    """Does the runs that the file lacks, appends each, and gives all rows of the runs."""
    while left := missing(runs, rows := read(path)):
        run, estimate = left[0], seconds_left(left, rows)
        ahead = "" if estimate is None else f", about {_time(estimate)} left"
        name = f"{run.framework} {run.method}, budget {run.budget}, {run.texts} texts"
        say(f"{len(runs) - len(left)} of {len(runs)} runs{ahead}: {name}, seed {run.seed}")
        append(path, perform(run))
    wanted = {key(dataclasses.asdict(run)) for run in runs}
    return [row for row in rows if key(row) in wanted]


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def measure(quick: bool, say: Callable[[str], None]) -> list[dict]:
    """All rows; a quick run starts afresh."""
    if not quick:
        return work_through(grid(), RESULTS, say)
    with tempfile.TemporaryDirectory() as directory:
        return work_through(grid(quick=True), Path(directory) / "rows.jsonl", say)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__.splitlines()[0]
    )
    choices = (*FRAMEWORKS, *METHODS)
    parser.add_argument("--only", nargs="+", default=(), choices=choices, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, choices=BUDGETS)
    parser.add_argument("--texts", type=int, nargs="+", default=tuple(STEPS), choices=tuple(STEPS))
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed, for CI")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and plots")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/quality.jsonl")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    path = options.results or RESULTS
    runs = grid(options.only, options.seeds, options.budgets, options.texts, options.quick)
    with tempfile.TemporaryDirectory() as directory:
        if options.quick and options.results is None:
            path = Path(directory) / "rows.jsonl"
        if options.report:
            wanted = {key(dataclasses.asdict(run)) for run in runs}
            rows = [row for row in read(path) if key(row) in wanted]
        else:
            memory.keep_freed()
            # Runs that differ in their numbers alone are compiled once.
            jax.config.update("jax_compilation_cache_dir", str(assets.cache_directory() / "xla"))
            rows = _shown(runs, path, console)
    print(tables(rows))
    if not options.quick:
        pictures = plots(rows, path.parent)
        for picture in pictures:
            console.print(f"drawn: {picture}", highlight=False)
        if path == RESULTS and runs == grid():
            into_readme("quality", section(rows, pictures))
    found = broken(rows)
    for sentence in found:
        console.print(sentence, style="red")
    return 1 if found else 0


def section(rows: Sequence[dict], pictures: Sequence[Path]) -> str:
    """What the README says of the grid."""
    versions = "; ".join(sorted({row["versions"] for row in rows}))
    done = f"{len(rows)} of the grid's {len(grid())} runs: {versions}."
    shown = [f"![{path.stem}](results/{path.name})" for path in pictures]
    return "\n\n".join([done, *shown, tables(rows)])


def _shown(runs: Sequence[Run], path: Path, console: Console) -> list[dict]:
    """Works through the runs under a bar; line by line where there is no terminal."""
    if not console.is_terminal:
        return work_through(runs, path, lambda text: console.print(text, highlight=False))
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(runs))

        def say(text: str) -> None:
            done = len(runs) - len(missing(runs, read(path)))
            progress.update(bar, completed=done, description=text.partition("runs, ")[2] or text)

        rows = work_through(runs, path, say)
        progress.update(bar, completed=len(runs))
    return rows


if __name__ == "__main__":
    sys.exit(main())
