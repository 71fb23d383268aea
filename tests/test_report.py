"""Tables and plots."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from peftjax import report


def test_running_mean_covers_what_there_is() -> None:
    assert report.running_mean([2.0, 4.0, 6.0, 8.0], 3) == [2.0, 3.0, 4.0, 6.0]
    assert report.running_mean([], 3) == []


def test_facts_show_all_rows() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(report.facts("sizes", {"one": "1 kB", "two": "2 kB"}, last={"all": "3 kB"}))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for word in ("sizes", "one", "2 kB", "all", "3 kB"):
        assert word in shown


@pytest.mark.parametrize("steps", [1, 40])
def test_training_curves_are_a_png(tmp_path: Path, steps: int) -> None:
    pytest.importorskip("matplotlib")
    path = report.training_curves(
        tmp_path / "deep" / "curves.png",
        loss=[1 / step for step in range(1, steps + 1)],
        accuracy=[0.5] * steps,
        held_out=[(0, 0.4), (steps, 0.6)],
        baselines={"probe": 0.4},
        phases={"first": 0, "second": 1},
        title="a run",
    )
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("out", b"\x89PNG"),
        ("v1.2", b"\x89PNG"),
        ("x.PNG", b"\x89PNG"),
        ("x.pdf", b"%PDF"),
        ("x.svg", b"<?xml"),
    ],
)
def test_a_figure_is_what_its_suffix_says(tmp_path: Path, name: str, start: bytes) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    path = report.save_figure(figure, tmp_path / "deep" / name)
    assert path == tmp_path / "deep" / name
    assert path.read_bytes().startswith(start)
    assert list(path.parent.iterdir()) == [path]


def test_ranks_are_laid_out_by_layer_and_module() -> None:
    layers, modules, grid = report.rank_grid(
        {"stack.up": np.array([3, 1]), "encoder.10.q": 4, "encoder.2.q": 0, "head": 5}
    )
    assert layers == ["0", "1", "2", "10"]
    assert modules == ["stack.up", "q", "head"]
    nan = np.nan
    want = [[3, nan, 5], [1, nan, nan], [nan, 0, nan], [nan, 4, nan]]
    np.testing.assert_array_equal(grid, want)


@pytest.mark.parametrize("budget", [(), (12, 9, 6)])
def test_rank_allocation_is_a_png(tmp_path: Path, budget: tuple[int, ...]) -> None:
    pytest.importorskip("matplotlib")
    ranks = {"layer.0.query": 3, "layer.1.query": 5, "layer.1.value": 2}
    path = tmp_path / "deep" / "ranks.png"
    assert report.rank_allocation(path, ranks=ranks, budget=budget, title="a run") == path
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plots_leave_pyplot_alone(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.rcParams._get("backend")
    report.training_curves(tmp_path / "curves.png", loss=[1.0], accuracy=[0.5])
    assert matplotlib.rcParams._get("backend") is before
