"""Tables and pictures of how far each method is from the least it could cost."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.ticker
import numpy as np

from benchmarks import limit_least as least
from benchmarks.pictures import COLORS, STYLE, plt, saved
from benchmarks.tables import markdown

Rows = Sequence[dict[str, Any]]

NAMES = {
    "lora": "LoRA",
    "adalora": "AdaLoRA",
    "dora": "DoRA",
    "hra": "HRA",
    "loha": "LoHa",
    "ia3": "IA3",
    "xlora": "X-LoRA",
}
COLOR = dict(zip(NAMES, COLORS, strict=True))
MARK = dict(zip(NAMES, "osD^vPX", strict=True))


def where(rows: Rows, **wanted: Any) -> list[dict[str, Any]]:
    """The records that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def values(rows: Rows, name: str) -> list[Any]:
    """All that a field is, in order."""
    return sorted({row[name] for row in rows})


def tables(rows: Rows) -> str:
    grid = where(rows, what="grid")
    tokens, width = largest(grid, "tokens", 8192), largest(grid, "width", 4096)
    return "\n\n".join(
        [
            "FLOPs of a step over its floor, rank 16, as XLA counts them (and by the closed form):",
            by_width(grid),
            f"By rank, {tokens:,} tokens, width {width:,}:",
            by_rank(grid, tokens, width),
            "The rank at which LoHa's change costs as much built as through factors (and the one "
            "from which on it is built):",
            loha(rows),
            "Tokens below which products with the weight itself cost more than LoRA's products:",
            reading(grid),
            "From which rank on, up to half the width, merging in every step is cheaper, and what "
            "factors cost over merging at that rank:",
            merging(rows),
            "From which rank on a step is 10% over its floor, and what it is at that rank:",
            dear(rows),
        ]
    )


def largest(rows: Rows, name: str, most: int) -> int:
    """The largest value of a field up to some."""
    return max(value for value in values(rows, name) if value <= most)


def ends(rows: Rows) -> list[int]:
    """The fewest tokens, and 8,192 or as many as there are."""
    return sorted({min(values(rows, "tokens")), largest(rows, "tokens", 8192)})


def both(row: dict[str, Any], what: str = "flops") -> str:
    return f"{row[f'{what}_ratio']:.4f} ({row[f'least_{what}_ratio']:.4f})"


def by_width(grid: Rows) -> str:
    lines = []
    for method, name in NAMES.items():
        for tokens in ends(grid):
            own = where(grid, method=method, tokens=tokens)
            rank = 16 if where(own, rank=16) else own[0]["rank"]
            line = [both(row) for row in where(own, rank=rank)]
            lines.append([name, own[0]["floor"], f"{tokens:,}", *line])
    widths = [f"width {width:,}" for width in values(grid, "width")]
    return markdown(["method", "floor", "tokens", *widths], lines)


def by_rank(grid: Rows, tokens: int, width: int) -> str:
    ranks, lines = values(grid, "rank"), []
    for method, name in NAMES.items():
        own = where(grid, method=method, tokens=tokens, width=width)
        for what, head in (("flops", "FLOPs"), ("bytes", "bytes")):
            # What has no rank costs the same at every one.
            line = [both((where(own, rank=rank) or own)[0], what) for rank in ranks]
            lines.append([name, head, *line])
    return markdown(["method", "over the floor", *(f"rank {rank}" for rank in ranks)], lines)


def loha_cross(own: Rows) -> float:
    """The rank at which LoHa's two ways cost the same, on the line through two ranks."""
    (r, before), (s, after) = (
        (row["rank"], row["factors_flops"] - row["built_flops"]) for row in own
    )
    return r - before * (s - r) / (after - before)


def loha(rows: Rows) -> str:
    """By tokens and weight, from which rank on the change is built, and where lines cross."""
    every, lines = where(rows, what="loha"), []
    widths = values(every, "in")
    for tokens in values(every, "tokens"):
        for wide in (False, True):
            line = []
            for width in widths:
                own = [
                    row
                    for row in where(every, tokens=tokens, **{"in": width})
                    if (row["out"] > row["in"]) is wide
                ]
                line.append(f"{loha_cross(own):.1f} ({own[-1]['rank']})" if own else "never")
            lines.append(["d x 2.75 d" if wide else "d x d", f"{tokens:,}", *line])
    return markdown(["weight", "tokens", *(f"d = {width:,}" for width in widths)], lines)


def reading_cross(grid: Rows, method: str, width: int) -> float:
    """Tokens at which products with the weight cost what LoRA's do, from lines over the tokens."""
    # A larger one would show its square.
    rank = largest(grid, "rank", 16)

    def extra(method: str) -> np.ndarray:
        own = where(grid, method=method, width=width, rank=rank)
        return np.array([(row["flops_ratio"] - 1) * row["floor_flops"] for row in own])

    tokens = np.array([row["tokens"] for row in where(grid, method="lora", width=width, rank=rank)])
    lora = np.polyfit(tokens, extra("lora"), 1)[0]
    return float(np.polyfit(tokens, extra(method) - extra("lora"), 1)[1] / lora)


def reading(grid: Rows) -> str:
    widths, lines = values(grid, "width"), []
    for method in ("dora", "hra"):
        line = []
        for width in widths:
            found = reading_cross(grid, method, width)
            line.append(f"{found:,.0f} ({least.reading_tokens(method, width):,.0f})")
        lines.append([NAMES[method], *line])
    return markdown(["method", *(f"width {width:,}" for width in widths)], lines)


def merging(rows: Rows) -> str:
    lines, grid = [], where(rows, what="grid")
    for method in least.MERGED:
        for tokens in ends(grid):
            line = []
            for width in values(grid, "width"):
                own = where(rows, what="merging", method=method, tokens=tokens, width=width)
                if own:
                    adapted, merged = (row["flops_ratio"] for row in own)
                    line.append(f"{own[0]['rank']:,}: {adapted / merged:.4f}")
                else:
                    line.append("never")
            lines.append([NAMES[method], f"{tokens:,}", *line])
    widths = [f"width {width:,}" for width in values(grid, "width")]
    return markdown(["method", "tokens", *widths], lines)


def dear(rows: Rows) -> str:
    lines, grid = [], where(rows, what="grid")
    for method, name in NAMES.items():
        if not where(rows, what="dear", method=method):
            continue
        for tokens in ends(grid):
            line = []
            for width in values(grid, "width"):
                own = where(rows, what="dear", method=method, tokens=tokens, width=width)
                line.append(f"{own[0]['rank']:,}: {own[0]['flops_ratio']:.4f}" if own else "never")
            lines.append([name, f"{tokens:,}", *line])
    widths = [f"width {width:,}" for width in values(grid, "width")]
    return markdown(["method", "tokens", *widths], lines)


def plots(rows: Rows, directory: Path) -> list[Path]:
    """FLOPs and bytes over the floor against the rank, and where lines cross."""
    grid = where(rows, what="grid")
    width = largest(grid, "width", 4096)
    with plt.rc_context(STYLE):
        return [
            against_rank(grid, width, "flops", "FLOPs", directory / "limit_flops.png"),
            against_rank(grid, width, "bytes", "bytes", directory / "limit_bytes.png"),
            crossing(rows, directory / "limit_crossings.png"),
        ]


def panels(size: tuple[float, float], count: int, sharey: bool) -> tuple[Any, Iterator[Any]]:
    """A figure of so many panels, two in a row."""
    figure, every = plt.subplots(
        -(-count // 2), 2, figsize=size, squeeze=False, sharey=sharey, layout="constrained"
    )
    for axes in every.flat[count:]:
        axes.set_axis_off()
    return figure, iter(every.flat)


def logarithmic(axes: Any, places: Sequence[float], subs: Sequence[int]) -> None:
    """Logarithmic axes with plain numbers, at these places and at these parts of a decade."""
    axes.set(xscale="log", yscale="log")
    plain = matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(list(places)))
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs, numticks=30))
    axes.set_xlim(places[0] / 1.15, places[-1] * 1.15)


def mark(method: str) -> dict[str, Any]:
    """How a method is marked; LoRA in a ring, for AdaLoRA lies on it."""
    ring = {"markersize": 10, "markerfacecolor": "none", "markeredgewidth": 1.6}
    look = ring if method == "lora" else {"markersize": 5}
    return {"marker": MARK[method], "color": COLOR[method], "linestyle": "none", **look}


def closed(what: str, forms: Any, row: dict[str, Any], rank: int) -> float:
    """Percent over the floor, by the closed form."""
    added = least.added(forms, row["tokens"], row["width"], rank)
    more = added.flops if what == "flops" else 4 * added.moved
    return 100 * more / row[f"floor_{what}"]


def against_rank(grid: Rows, width: int, what: str, name: str, path: Path) -> Path:
    """A panel for each number of tokens: closed forms as lines, what XLA counts as marks."""
    ranks, every = values(grid, "rank"), values(grid, "tokens")
    line = np.unique(np.geomspace(ranks[0], ranks[-1], 60).astype(int)).tolist()
    figure, axes_of = panels((9, 1.4 + 2.7 * -(-len(every) // 2)), len(every), sharey=True)
    for tokens, axes in zip(every, axes_of, strict=False):
        here = where(grid, tokens=tokens, width=width)
        for method in NAMES:
            own = where(here, method=method)
            forms = least.ADAPTED[method]
            drawn = [closed(what, forms, own[0], rank) for rank in line]
            axes.plot(line, drawn, color=COLOR[method], linewidth=1.4)
            # What has no rank costs the same at every one.
            shown = own * len(ranks) if method == "ia3" else own
            percent = [100 * (row[f"{what}_ratio"] - 1) for row in shown]
            axes.plot(ranks, percent, label=NAMES[method], **mark(method))
        (lora, *_) = where(here, method="lora")
        merged = [closed(what, least.MERGED["lora"], lora, rank) for rank in line]
        axes.plot(line, merged, "--", color="#777777", linewidth=1.4, label="LoRA merged")
        logarithmic(axes, ranks, (1,) if what == "flops" else (1, 2, 5))
        axes.set(xlabel="rank", title=f"{tokens:,} tokens")
        axes.set_ylabel(
            f"{name} over the floor (%)" if axes.get_subplotspec().is_first_col() else ""
        )
    forms = "the closed forms" if what == "flops" else "the closed forms, nothing fused"
    figure.suptitle(f"Width {width:,}: lines are {forms}, marks what XLA on a CPU counts")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return saved(figure, path)


def crossing(rows: Rows, path: Path) -> Path:
    """Four panels: LoHa built, products with the weight, merging, and a tenth more."""
    grid = where(rows, what="grid")
    tokens, widths = values(grid, "tokens"), values(grid, "width")
    figure, axes_of = panels((9, 7.4), 4, sharey=False)
    loha_panel(next(axes_of), rows, tokens, widths)
    reading_panel(next(axes_of), grid, widths)
    merging_panel(next(axes_of), rows, tokens, widths)
    dear_panel(next(axes_of), rows, largest(grid, "tokens", 8192), widths)
    figure.suptitle("Where costs cross: closed forms as lines, XLA's counts as marks")
    return saved(figure, path)


def _line(function: Callable[[int], float | None], places: Sequence[int]) -> tuple[list, list]:
    """A function on many places between the first and the last, where it has a value."""
    every = np.unique(np.geomspace(places[0], places[-1], 80).astype(int) // 4 * 4).tolist()
    found = [(place, value) for place in every if (value := function(place)) is not None]
    return [place for place, _ in found], [value for _, value in found]


def _axes(axes: Any, places: Sequence[int], x: str, y: str, title: str) -> None:
    logarithmic(axes, places, (1, 2, 5))
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=True, framealpha=0.85, edgecolor="none")


def loha_panel(axes: Any, rows: Rows, tokens: Sequence[int], widths: Sequence[int]) -> None:
    for color, width in zip(COLORS, widths, strict=False):
        axes.plot(*_line(partial(least.fused_rank, i=width, o=width), tokens), color=color)
        own = where(rows, what="loha", **{"in": width, "out": width})
        found = {n: where(own, tokens=n) for n in values(own, "tokens")}
        # The first whole rank beyond.
        marks = [math.floor(loha_cross(pair)) + 1 for pair in found.values()]
        axes.plot(list(found), marks, "o", color=color)
        if marks:
            above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "right"}
            at = max(found), marks[-1]
            axes.annotate(f"d = {width:,}", at, color=color, fontsize=8, **above)
    _axes(axes, tokens, "tokens", "rank", "LoHa on d x d: from here on its change is built")


def reading_panel(axes: Any, grid: Rows, widths: Sequence[int]) -> None:
    for method in ("hra", "dora"):
        axes.plot(*_line(partial(least.reading_tokens, method), widths), color=COLOR[method])
        marks = [reading_cross(grid, method, width) for width in widths]
        axes.plot(widths, marks, label=NAMES[method], **mark(method))
    title = "Below these tokens, products with W cost more than LoRA's"
    _axes(axes, widths, "width", "tokens", title)


def merging_panel(axes: Any, rows: Rows, tokens: Sequence[int], widths: Sequence[int]) -> None:
    own = where(rows, what="merging", way="adapted", method="lora")
    for color, width in zip(COLORS, widths, strict=False):
        axes.plot(*_line(partial(least.merged_rank, "lora", width=width), tokens), color=color)
        marks = where(own, width=width)
        at, ranks = [row["tokens"] for row in marks], [row["rank"] for row in marks]
        axes.plot(at, ranks, "o", color=color, label=f"width {width:,}")
    _axes(axes, tokens, "tokens", "rank", "LoRA: from here on merging every step is cheaper")


def dear_panel(axes: Any, rows: Rows, tokens: int, widths: Sequence[int]) -> None:
    for method in NAMES:
        own = where(rows, what="dear", method=method, tokens=tokens)
        if not own:
            continue
        axes.plot(*_line(partial(least.dear_rank, method, tokens), widths), color=COLOR[method])
        at, ranks = [row["width"] for row in own], [row["rank"] for row in own]
        axes.plot(at, ranks, label=NAMES[method], **mark(method))
    _axes(axes, widths, "width", "rank", f"Rank at which {tokens:,} tokens cost 10% over the floor")
