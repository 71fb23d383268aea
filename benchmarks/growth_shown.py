"""Tables and pictures of how costs grow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.ticker
import numpy as np

from benchmarks.growth_layers import FORMS, WAYS
from benchmarks.pictures import COLORS, STYLE, plt, saved
from benchmarks.tables import markdown

Rows = Sequence[dict[str, Any]]


def where(rows: Rows, **wanted: Any) -> list[dict[str, Any]]:
    """The records that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def values(rows: Rows, name: str) -> list[Any]:
    """All that a field is, in order."""
    return sorted({row[name] for row in rows})


def tables(rows: Rows) -> str:
    layers = where(rows, what="layers")
    experts = where(rows, what="experts")
    adapters = where(rows, what="adapters")
    room = where(rows, what="room")
    (bank,) = where(rows, what="bank")
    return "\n\n".join(
        [
            "A training gradient of linen blocks of width 128 with LoRA of rank 8 on every linear "
            "layer: the time to trace and to compile it, and what it computes. The base's gradient "
            "is that of all its params; the floor's, of a vector added to the input. FLOPs and "
            "bytes count loop bodies times their turns.",
            by_layers(layers),
            "The exponent with which they grow, a straight line in both logarithms through the "
            "upper half of the layers (1 is linear):",
            exponents(layers),
            f"X-LoRA on one block of width {experts[0]['width']}, rank 4 an expert, "
            f"{experts[0]['tokens']:,} tokens; the floor is two passes forward and one backward:",
            by_experts(experts),
            f"Rows of one batch with an adapter each (LoRA of rank 4 on every linear layer of a "
            f"block of width {adapters[0]['width']}), over the same rows with one adapter:",
            by_adapters(adapters),
            f"A forward pass of {room[0]['rows']} rows of one token, by the room of their bank (a "
            f"block of width {room[0]['width']}), over the smallest bank:",
            by_room(room),
            "FLOPs and bytes are XLA's count, which takes a bank that is scaled and then looked up "
            "in one fusion as read and scaled whole.",
            f"Filling a bank of {bank['capacity']} one adapter after another compiles "
            f"{bank['more_traces']} programs more.",
        ]
    )


def by_layers(rows: Rows) -> str:
    heads = ["layers", "", "equations, base", "equations, adapted"]
    for what in ("trace", "compile"):
        heads += [f"{what}, s", f"{what} / base", f"{what} / floor"]
    heads += ["FLOPs / floor", "bytes / floor"]
    heads += ["`find_sites`, s", "`init_adapter`, s"]
    lines = []
    for form in FORMS:
        for count in values(rows, "layers"):
            three = {row["way"]: row for row in where(rows, form=form, layers=count)}
            if not three:
                continue
            floor, base, own = (three[way] for way in WAYS)
            line = [count, form, f"{base['equations']:,}", f"{own['equations']:,}"]
            for what in ("trace", "compile"):
                line.append(f"{own[f'{what}_s']:.2f}")
                line += [f"{own[f'{what}_over_{under}']:.2f}" for under in ("base", "floor")]
            line += [f"{own[what] / floor[what]:.3f}" for what in ("flops", "bytes")]
            line += [f"{own[f'{what}_s']:.2f}" for what in ("find_sites", "init_adapter")]
            lines.append(line)
    return markdown(heads, lines)


def exponent(rows: Rows, what: str) -> float:
    """The slope of a figure over layers, both as logarithms, in the upper half of the layers."""
    own = sorted((row["layers"], row[what]) for row in rows)
    x, y = np.log(np.array(own[len(own) // 2 :] if len(own) > 3 else own, dtype=float)).T
    # No minus before a zero.
    return round(float(np.polyfit(x, y, 1)[0]), 6) + 0.0


def exponents(rows: Rows) -> str:
    lines = []
    for form in FORMS:
        for way in WAYS:
            own = where(rows, form=form, way=way)
            if not own:
                continue
            grown = [exponent(own, what) for what in ("equations", "trace_s", "compile_s")]
            once = ("find_sites_s", "init_adapter_s") if way == "adapted" else ()
            line = [f"{value:.2f}" for value in [*grown, *(exponent(own, what) for what in once)]]
            lines.append([form, way, *line, *[""] * (5 - len(line))])
    heads = ["", "", "equations", "trace", "compile", "`find_sites`", "`init_adapter`"]
    return markdown(heads, lines)


def by_experts(rows: Rows) -> str:
    heads = ["experts", "step, ms", "step / floor", "FLOPs / floor", "closed form"]
    heads += ["bytes / floor", "trace, s", "compile, s", "trace + compile / floor"]
    return markdown(
        heads,
        [
            [
                row["experts"],
                f"{1e3 * row['step_s']:.0f}",
                f"{row['step_ratio']:.2f}",
                f"{row['flops_ratio']:.4f}",
                f"{row['least_flops_ratio']:.4f}",
                f"{row['bytes_ratio']:.3f}",
                f"{row['trace_s']:.2f}",
                f"{row['compile_s']:.2f}",
                f"{row['made_over_floor']:.2f}",
            ]
            for row in rows
        ],
    )


def by_adapters(rows: Rows) -> str:
    heads = ["tokens a row", "adapters", "their size / the block's"]
    for name in ("forward", "step"):
        heads += [f"{name}, ms", "time / one", "FLOPs / one", "bytes / one"]
    lines = []
    for tokens in values(rows, "tokens"):
        for count in values(rows, "adapters"):
            two = where(rows, tokens=tokens, adapters=count)
            line = [tokens, count, f"{two[0]['adapters_over_block']:.3f}"]
            for row in two:
                line.append(f"{1e3 * row['seconds']:.1f}")
                line += [f"{row['time_ratio']:.2f}", f"{row['flops_ratio']:.4f}"]
                line.append(f"{row['bytes_ratio']:.2f}")
            lines.append(line)
    return markdown(heads, lines)


def by_room(rows: Rows) -> str:
    lines = [
        [row["capacity"], f"{1e3 * row['seconds']:.2f}"]
        + [f"{row[f'{what}_ratio']:.2f}" for what in QUANTITIES]
        for row in rows
    ]
    heads = ["room for", "forward, ms", *(f"{name} / smallest" for name in QUANTITIES.values())]
    return markdown(heads, lines)


def plots(rows: Rows, directory: Path) -> list[Path]:
    """Time to make a program against layers; what experts and adapters cost over their floors."""
    with plt.rc_context(STYLE):
        return [
            layers(where(rows, what="layers"), directory / "growth_layers.png"),
            experts(where(rows, what="experts"), directory / "growth_experts.png"),
            adapters(where(rows, what="adapters"), directory / "growth_adapters.png"),
        ]


def layers(rows: Rows, path: Path) -> Path:
    """Trace and compile time in seconds, both as logarithms; a panel for each form."""
    figure, every = plt.subplots(
        2, len(FORMS), figsize=(9, 5.6), sharex=True, sharey="row", layout="constrained"
    )
    for column, form in zip(every.T, FORMS, strict=True):
        for axes, what in zip(column, ("trace", "compile"), strict=True):
            for way, color, mark in zip(WAYS, COLORS, "so^", strict=False):
                own = where(rows, form=form, way=way)
                x, y = ([row[name] for row in own] for name in ("layers", f"{what}_s"))
                axes.plot(x, y, color=color, marker=mark, markersize=5, label=way)
            axes.set(xscale="log", yscale="log")
            ticks(axes, values(rows, "layers"))
        column[0].set_title(form)
        column[1].set_xlabel("layers")
    for axes, what in zip(every[:, 0], ("trace and lower", "compile"), strict=True):
        axes.set_ylabel(f"{what}, seconds")
    figure.legend(*every[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Making a training gradient: LoRA of rank 8 on every linear layer")
    return saved(figure, path)


def ticks(axes: Any, at: Sequence[int], subs: Sequence[float] = (1, 2, 5)) -> None:
    """Ticks of a logarithmic axis where something was measured, and plain numbers beside it."""
    axes.set_xticks(at, [str(each) for each in at])
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))


QUANTITIES = {"time": "time", "flops": "FLOPs", "bytes": "bytes"}


def experts(rows: Rows, path: Path) -> Path:
    """Time, FLOPs and bytes over the floor against the number of experts."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    count = [row["experts"] for row in rows]
    fields = ("step_ratio", "flops_ratio", "bytes_ratio")
    for field, name, mark in zip(fields, QUANTITIES.values(), "osD", strict=True):
        axes.plot(count, [row[field] for row in rows], marker=mark, label=name)
    form = [row["least_flops_ratio"] for row in rows]
    axes.plot(count, form, color="black", linestyle=":", label="FLOPs, closed form")
    axes.set(xscale="log", xlabel="experts, of rank 4 each", ylabel="a training step / its floor")
    axes.set_title("X-LoRA over two passes forward and one backward")
    ticks(axes, count)
    axes.legend()
    return saved(figure, path)


def adapters(rows: Rows, path: Path) -> Path:
    """Time and bytes over one adapter against the number of adapters, by tokens a row.

    FLOPs, of which each row has as many either way, are in the table.
    """
    quantities = {what: name for what, name in QUANTITIES.items() if what != "flops"}
    figure, every = plt.subplots(
        2, len(quantities), figsize=(8, 5.6), sharex=True, sharey=True, layout="constrained"
    )
    for line, (name, shown) in zip(
        every, {"forward": "forward", "step": "training step"}.items(), strict=True
    ):
        for axes, (what, quantity) in zip(line, quantities.items(), strict=True):
            for tokens, mark in zip(values(rows, "tokens"), "osD", strict=False):
                own = where(rows, tokens=tokens, **{"pass": name})
                count = [row["adapters"] for row in own]
                label = f"{tokens} token{'s' if tokens > 1 else ''} a row"
                axes.plot(count, [row[f"{what}_ratio"] for row in own], marker=mark, label=label)
            axes.set(xscale="log", yscale="log", title=f"{shown}: {quantity}")
            ticks(axes, values(rows, "adapters"), subs=(1, 1.5, 2, 3, 4, 5))
        line[0].set_ylabel("own adapters / one for all")
    for axes in every[1]:
        axes.set_xlabel("rows, an adapter each")
    figure.legend(*every[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Rows with a LoRA adapter each, over the same rows with one for all")
    return saved(figure, path)
