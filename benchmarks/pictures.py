"""How every picture of the benchmarks looks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.ticker

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
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    labels: Sequence[str],
    quantity: str,
    title: str,
) -> Path:
    """Ratios as bars from a line at 1, with their numbers: a panel for each name, side by side.

    Args:
      path: the file to write.
      panels: by panel and by group, one ratio for each label.
      labels: what the bars of a group are.
      quantity: what the ratios are of.
      title: over all panels.
    """
    groups = max(len(panel) for panel in panels.values())
    with plt.rc_context(STYLE):
        size = (9, 1.4 + 0.22 * groups * (len(labels) + 0.8))
        figure, every = plt.subplots(
            1, len(panels), figsize=size, sharex=True, squeeze=False, layout="constrained"
        )
        for axes, (name, panel) in zip(every[0], panels.items(), strict=True):
            height, at = 0.8 / len(labels), np.arange(len(panel))
            for i, label in enumerate(labels):
                values = np.array([group[i] for group in panel.values()])
                place = at + (i - (len(labels) - 1) / 2) * height
                drawn = axes.barh(place, values - 1, height, left=1, label=label)
                shown = [f"{value:.2f}" for value in values]
                axes.bar_label(drawn, shown, fontsize=8, padding=2)
            axes.axvline(1, color="black", linewidth=0.8)
            axes.set_yticks(at, list(panel))
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5)))
            axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
            axes.margins(x=0.15)
            axes.set(xlabel=quantity, title=name)
        figure.suptitle(title)
        figure.legend(*every[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return saved(figure, path)
