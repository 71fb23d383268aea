"""How every picture of the benchmarks looks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE = {
    "figure.figsize": (8, 4),
    "figure.dpi": 120,
    "figure.facecolor": "white",
    "axes.prop_cycle": mpl.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "legend.frameon": False,
}


def saved(figure: plt.Figure, path: Path) -> Path:
    """Writes a figure where it belongs, and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return path


def bars(
    path: Path,
    groups: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    quantity: str,
    title: str,
    line: float | None = None,
) -> Path:
    """Bars side by side for each group, with their numbers on top."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots()
        width, at = 0.8 / len(labels), np.arange(len(groups))
        for i, label in enumerate(labels):
            values = [group[i] for group in groups.values()]
            drawn = axes.bar(at + (i - (len(labels) - 1) / 2) * width, values, width, label=label)
            axes.bar_label(drawn, fmt="%.2f", fontsize=7)
        if line is not None:
            axes.axhline(line, color="black", linewidth=0.8)
        axes.set_xticks(at, list(groups))
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", visible=False)
        axes.set(ylabel=quantity, title=title)
        axes.legend()
        return saved(figure, path)
