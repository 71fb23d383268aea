"""Tables for the terminal and plots as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ADAPTED = "#1f6f8b"
_BASELINES = ("#c44536", "#b07d2b")
_MUTED = "#8a8f98"


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it, ``window`` at most.

    Example:
      >>> running_mean([1.0, 3.0, 5.0], 2)
      [1.0, 2.0, 4.0]
    """
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(values, np.float64)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return list(((sums[ends] - sums[starts]) / (ends - starts)).tolist())


def facts(title: str, rows: Mapping[str, str], *, last: Mapping[str, str] | None = None) -> Table:
    """A table of names and values.

    Args:
      title: what the table is about.
      rows: value by name.
      last: more rows, below a line.
    """
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    table.add_section()
    for name, value in (last or {}).items():
        table.add_row(name, value)
    return table


def training_curves(
    path: str | Path,
    *,
    loss: Sequence[float],
    accuracy: Sequence[float],
    held_out: Sequence[tuple[int, float]] = (),
    baselines: Mapping[str, float] = MappingProxyType({}),
    phases: Mapping[str, int] = MappingProxyType({}),
    title: str = "",
    window: int = 20,
) -> Path:
    """Draws a training run: the loss beside the accuracy.

    Args:
      path: the file to write, as ``save_figure`` does.
      loss: training loss of each step.
      accuracy: accuracy on each step's own batch, between 0 and 1.
      held_out: (step, accuracy on held-out data) wherever it was measured.
      baselines: held-out accuracies to compare with, dashed lines.
      phases: the step before each part of a run that has several.
      title: heading of the figure.
      window: steps in the running means.

    Returns:
      The path of the picture.
    """
    # A Figure of its own, without pyplot: no backend is chosen and no global state is touched.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    steps = np.arange(1, len(loss) + 1)
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)

    losses.plot(steps, loss, color=_MUTED, alpha=0.45, linewidth=1, label="each step")
    smooth = running_mean(loss, window)
    losses.plot(steps, smooth, color=_ADAPTED, linewidth=2, label=f"mean of {window} steps")
    losses.set_ylabel("training loss (cross-entropy)")
    losses.set_ylim(bottom=0)

    smooth = running_mean(accuracy, window)
    label = f"training, mean of {window} steps"
    accuracies.plot(steps, smooth, color=_MUTED, alpha=0.7, linewidth=1.2, label=label)
    if held_out:
        places, values = zip(*held_out, strict=True)
        accuracies.plot(places, values, "o-", color=_ADAPTED, linewidth=2, label="held-out")
        last = f"{values[-1]:.1%}"
        accuracies.annotate(
            last, (places[-1], values[-1]), xytext=(0, 8), textcoords="offset points", ha="right"
        )
    for number, (name, value) in enumerate(baselines.items()):
        style = {
            "color": _BASELINES[number % len(_BASELINES)],
            "linestyle": ("--", "-.")[number % 2],
        }
        accuracies.axhline(value, **style, label=f"{name}, held-out ({value:.1%})")
    accuracies.set_ylabel("accuracy")
    accuracies.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    for axes in (losses, accuracies):
        for name, first in phases.items():
            axes.axvline(first, color=_MUTED, linestyle=":", linewidth=1)
            place = (first, 1.0)
            axes.annotate(
                name,
                place,
                xycoords=("data", "axes fraction"),
                xytext=(4, 2),
                textcoords="offset points",
                color=_MUTED,
            )
        axes.set_xlabel("step")
        axes.set_xlim(0, max(len(loss), 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(framealpha=0.85, edgecolor="none", fontsize=9)
    figure.suptitle(title)
    return save_figure(figure, path)


def rank_allocation(
    path: str | Path,
    *,
    ranks: Mapping[str, int | np.ndarray],
    budget: Sequence[int] = (),
    title: str = "",
) -> Path:
    """Draws where a budget of ranks went: a heat map, layer by module.

    Args:
      path: the file to write, as ``save_figure`` does.
      ranks: rank by module path, as ``peftjax.ranks`` gives it. The first number among the segments
        of a path is its layer; of a stacked module the first axis of the array is.
      budget: number of triplets left after each step, drawn beside the map.
      title: heading of the figure.

    Returns:
      The path of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, modules, grid = rank_grid(ranks)
    width = 2.5 + 0.9 * len(modules)
    figure = Figure(
        figsize=(width + (5 if budget else 0), 1.5 + 0.4 * max(len(layers), 5)),
        layout="constrained",
    )
    widths = [width, 5] if budget else [width]
    heat, *beside = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    image = _heat_map(heat, grid, layers, modules, "{:g}", vmin=0)
    heat.set_ylabel("layer")
    figure.colorbar(image, ax=heat, label="rank")
    for axes in beside:
        axes.plot(np.arange(1, len(budget) + 1), budget, color=_ADAPTED, linewidth=2)
        axes.set_xlabel("step")
        axes.set_ylabel("triplets in the budget")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return save_figure(figure, path)


def routing(
    path: str | Path,
    *,
    slices: Sequence[str],
    experts: Sequence[str],
    scalings: Sequence[Sequence[float]],
    accuracy: Mapping[str, Sequence[float]],
    title: str = "",
) -> Path:
    """Draws what a gate gives which expert, and beside it how good each expert is.

    Args:
      path: the file to write, as ``save_figure`` does.
      slices: names of the slices of the texts.
      experts: names of the experts.
      scalings: for each slice the mean share of each expert in it.
      accuracy: by what answered, its accuracy in each slice, between 0 and 1.
      title: heading of the figure.

    Returns:
      The path of the picture.
    """
    from matplotlib.figure import Figure

    widths = [2 + len(experts), 2 + len(accuracy)]
    figure = Figure(
        figsize=(max(9, 0.7 * sum(widths)), 2.2 + 0.45 * max(len(slices), 4)), layout="constrained"
    )
    shares, answers = figure.subplots(1, 2, width_ratios=widths)
    _heat_map(shares, np.asarray(scalings, float), slices, experts, "{:.0%}", vmin=0, vmax=1)
    shares.set_title("what the gate gives each expert", fontsize=11)
    shares.set_ylabel("held-out texts about")
    shares.set_xlabel("expert")
    grid = np.asarray(list(accuracy.values()), float).T
    _heat_map(answers, grid, [""] * len(slices), list(accuracy), "{:.0%}", vmin=0, vmax=1)
    answers.set_title("how often each answers right", fontsize=11)
    answers.set_xlabel("expert alone, or what else answers")
    answers.axvline(len(experts) - 0.5, color="white", linewidth=4)
    figure.suptitle(title)
    return save_figure(figure, path)


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Writes a matplotlib figure under this name exactly; its directory is made if there is none.

    The format is that of the suffix, such as ``.pdf`` or ``.svg``, and PNG where that names none.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.removeprefix(".").lower()
    known = kind in figure.canvas.get_supported_filetypes()
    figure.savefig(path, dpi=150, format=kind if known else "png")
    return path


def _heat_map(
    axes: Any,
    grid: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    form: str,
    **limits: float,
) -> Any:
    """A heat map with its numbers written into it, as ``form`` says; NaN stays empty."""
    image = axes.imshow(grid, cmap="viridis", aspect="auto", **limits)
    middle = limits.get("vmax", np.nanmax(grid)) / 2
    for row, column in zip(*np.nonzero(~np.isnan(grid)), strict=True):
        value = grid[row, column]
        colour = "white" if value < middle else "black"
        axes.text(column, row, form.format(value), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    return image


def rank_grid(
    ranks: Mapping[str, int | np.ndarray],
) -> tuple[list[str], list[str], np.ndarray]:
    """Ranks by layer and module: the layers, the modules, and a grid with NaN where there is none.

    Example:
      >>> rank_grid({"layer.0.query": 3, "layer.1.query": 5, "layer.1.value": 2})
      (['0', '1'], ['query', 'value'], array([[ 3., nan],
             [ 5.,  2.]]))
    """
    cells: dict[tuple[int, str], float] = {}
    for name, rank in ranks.items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        values = np.asarray(rank, float)
        if values.ndim:
            # Experts of one layer count together.
            sums = values.reshape(len(values), -1).sum(axis=1)
            cells |= {(layer, name): value for layer, value in enumerate(sums)}
        elif number is None:
            cells[0, name] = float(values)
        else:
            rest = ".".join(parts[number + 1 :]) or name
            cells[int(parts[number]), rest] = float(values)
    layers = sorted({layer for layer, _ in cells})
    modules = list(dict.fromkeys(module for _, module in cells))
    grid = np.full((len(layers), len(modules)), np.nan)
    for (layer, module), value in cells.items():
        grid[layers.index(layer), modules.index(module)] = value
    return [str(layer) for layer in layers], modules, grid
