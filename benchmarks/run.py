"""Runs the benchmarks: JSON, a table and pictures of each, into ``benchmarks/results``.

    python -m benchmarks.run [--only NAME ...] [--quick] [--output DIRECTORY]

A full run also puts its tables into ``benchmarks/README.md``, which has places of their own for
directories in ``benchmarks/results``, such as one for another processor. It wants an idle machine:
times are ratios within the run, of functions called in turns, but two programs on one core disturb
any ratio.
``--quick`` computes the same on small models, for what does not depend on the machine: it fails
where a ratio of FLOPs or bytes leaves its bound. No bound is ever on a time.
"""

import importlib
import json
import os
import platform
import re
import sys
import time
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

import tyro
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import memory

HERE = Path(__file__).resolve().parent
Name = Literal["torch", "qwix", "limit", "growth"]
MODULES = {
    "torch": "against_torch",
    "qwix": "against_qwix",
    "limit": "limit",
    "growth": "growth",
}
PACKAGES = ("jax", "flax", "torch", "peft", "qwix", "transformers")


def run(
    only: Annotated[tuple[Name, ...], tyro.conf.arg(help="which ones; all unless told")] = (),
    quick: Annotated[
        bool, tyro.conf.arg(help="small models, and bounds on FLOPs and bytes")
    ] = False,
    output: Annotated[Path, tyro.conf.arg(help="where results go")] = HERE / "results",
) -> int:
    """Runs benchmarks side by side in one process, and writes what they measured."""
    console = Console()
    places = {name: None if quick else place_of(name, output) for name in only or get_args(Name)}
    for place in filter(None, places.values()):
        around(place)  # says before the work if the README has no place for it
    kept = memory.keep_freed()  # before a group imports JAX or torch
    broken: list[str] = []
    for name, place in places.items():
        group = importlib.import_module(f"benchmarks.{MODULES[name]}")
        console.rule(group.TITLE)
        start = time.perf_counter()
        rows = group.measure(quick, console.log)
        result = {"versions": versions(), "machine": machine(), "quick": quick, "rows": rows}
        result["freed_memory_kept"] = kept
        result["seconds"] = round(time.perf_counter() - start)
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        table = group.tables(rows)
        pictures = group.plots(rows, output)
        console.print(Markdown(table))
        console.print(f"{output / name}.json", *map(str, pictures), sep="\n")
        if place:
            into_readme(place, section(place, result, table, pictures))
        broken += group.broken(rows)
    for each in broken:
        console.print(f"[red]out of bounds[/red] {each}")
    return bool(broken)


def versions() -> dict[str, str]:
    """Of everything that is measured, where it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """What this ran on, in a few words."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {named[1] if named else platform.processor()}"


def place_of(name: str, output: Path) -> str | None:
    """Where the README shows a benchmark: ``torch`` or, of a directory in results, ``b/torch``."""
    results, output = HERE / "results", output.resolve()
    if not output.is_relative_to(results):
        return None
    return (output.relative_to(results) / name).as_posix()


def section(place: str, result: dict[str, Any], table: str, pictures: list[Path]) -> str:
    """What the README says of a benchmark: the command, the versions, the figures."""
    packages = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    folder = PurePosixPath("results", place).parent
    shown = [f"![{path.stem}]({folder / path.name})" for path in pictures]
    command = f"python -m benchmarks.run --only {PurePosixPath(place).name}"
    if folder != PurePosixPath("results"):
        command += f" --output benchmarks/{folder}"
    ran = f"{packages}; {result['machine']}; {result['seconds']} s."
    return "\n\n".join([f"```sh\n{command}\n```", ran, table, *shown])


def into_readme(place: str, text: str) -> None:
    """Puts a section between its two marks."""
    before, after = around(place)
    (HERE / "README.md").write_text(before + text + after)


def around(place: str) -> tuple[str, str]:
    """What the README says before and after a section; a ValueError if it has no place for it."""
    readme, start, end = HERE / "README.md", f"<!-- {place} -->\n", f"\n<!-- end of {place} -->"
    before, opened, rest = readme.read_text().partition(start)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"{readme} has no place for it: {start.strip()} ... {end.strip()}")
    return before + opened, closed + after


if __name__ == "__main__":
    sys.exit(tyro.cli(run, description=__doc__))
