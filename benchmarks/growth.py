"""Whether cost grows as it should: with layers, with experts, and with adapters in a batch.

Layers ought to be a straight line, and no line at all where they are scanned; experts the rank they
have together; adapters nothing but what their numbers take to read and write.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import growth_adapters, growth_layers, growth_shown
from benchmarks.growth_shown import where

TITLE = "Growth"

# Layers, and how many rounds make programs of so many: the unrolled ones of many layers take long.
UNROLLED = {2: 5, 6: 5, 12: 3, 24: 2, 48: 1, 96: 1}
SCANNED = {2: 3, 6: 3, 12: 3, 24: 3, 48: 3, 96: 3}
EXPERTS = (1, 2, 4, 8, 16, 32, 64)
ADAPTERS = (1, 4, 16, 64, 256)
TOKENS = (1, 16, 64)

# What equations and FLOPs of each layer more may differ by, the largest over the least; FLOPs of
# rows of many adapters over those of one. Ratios of what the compiler counts, exact but for sums.
STRAIGHT = 1.001
ROWS = 1.03
# Operations on each number of each row's own adapter, beside those of its products: it is scaled,
# and where ranks, modules or rows are missing it is zero.
OPERATIONS = {"forward": 5, "step": 12}
# Operations on each number of the adapters of a bank that no row wants.
IDLE = 0
# Where rows have fewer tokens, an adapter's own numbers tell.
MANY_TOKENS = 16


def measure(quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Records of the three, told apart by ``what``."""
    unrolled, scanned = ({2: 1, 3: 1, 6: 1}, {2: 1, 6: 1}) if quick else (UNROLLED, SCANNED)
    rows = growth_layers.measure(unrolled, growth_layers.FORMS[:1], say)
    # What is rematerialised as well has as much to compile, and no bound of its own but equations.
    forms = growth_layers.FORMS[1:2] if quick else growth_layers.FORMS[1:]
    rows += growth_layers.measure(scanned, forms, say)
    if quick:
        rows += growth_adapters.experts((1, 4), 512, 128, 1, say)
        rows += growth_adapters.adapters((1, 8), (1, 16), 128, 1, say)
        rows += growth_adapters.room((2, 8), 2, 128, 1, say)
    else:
        rows += growth_adapters.experts(EXPERTS, 2048, 512, 7, say)
        rows += growth_adapters.adapters(ADAPTERS, TOKENS, 512, 9, say)
        rows += growth_adapters.room((4, 16, 64, 256), 4, 512, 15, say)
    return [*rows, growth_adapters.programs_of_a_growing_bank(4 if quick else 16, 4, 64)]


def per_layer(rows: list[dict[str, Any]], what: str) -> list[float]:
    """By how much a figure grows with every layer, from one number of layers to the next."""
    own = sorted((row["layers"], row[what]) for row in rows)
    layers, figures = np.array(own, dtype=float).T
    return list(np.diff(figures) / np.diff(layers))


def broken(rows: list[dict[str, Any]]) -> list[str]:
    """Where a cost grows faster than it should."""
    return [*_layers(where(rows, what="layers")), *_experts(rows), *_adapters(rows)]


def _layers(rows: list[dict[str, Any]]) -> list[str]:
    out = []
    for way in growth_layers.WAYS:
        unrolled = where(rows, way=way, form="unrolled")
        flops = per_layer(unrolled, "flops")
        for what in ("equations", "flops"):
            each = per_layer(unrolled, what)
            if max(each) > STRAIGHT * min(each):
                out.append(f"unrolled, {way}: {max(each):.6g} {what} a layer, and {min(each):.6g}")
        for form in growth_layers.FORMS[1:]:
            counts = {row["equations"] for row in where(rows, way=way, form=form)}
            if len(counts) > 1:
                out.append(f"{form}, {way}: equations grow with layers: {sorted(counts)}")
        for more in per_layer(where(rows, way=way, form="scanned"), "flops"):
            if not 1 / STRAIGHT <= more / flops[0] <= STRAIGHT:
                out.append(f"scanned, {way}: {more / flops[0]:.4f} x the FLOPs of a layer unrolled")
    return out


def _experts(rows: list[dict[str, Any]]) -> list[str]:
    out = []
    for row in where(rows, what="experts"):
        most = row["least_flops_ratio"] + row["spare_flops_ratio"]
        if row["flops_ratio"] > most:
            out.append(
                f"{row['experts']} experts: {row['flops_ratio']:.4f} x the floor's FLOPs, "
                f"at most {most:.4f}"
            )
    return out


def _adapters(rows: list[dict[str, Any]]) -> list[str]:
    out = []
    for row in where(rows, what="adapters"):
        who = f"{row['adapters']} adapters, {row['tokens']} tokens a row, {row['pass']}"
        if row["tokens"] < MANY_TOKENS:
            out += _operations(who, row, OPERATIONS[row["pass"]])
        elif row["flops_ratio"] > ROWS:
            out.append(f"{who}: {row['flops_ratio']:.4f} x one adapter's FLOPs, at most {ROWS}")
    for row in where(rows, what="room"):
        out += _operations(f"{row['rows']} rows of a bank of {row['capacity']}", row, IDLE)
    for row in where(rows, what="bank"):
        if row["more_traces"]:
            out.append(
                f"a bank that fills up to {row['capacity']}: {row['more_traces']} traces more"
            )
    return out


def _operations(who: str, row: dict[str, Any], most: float) -> list[str]:
    found = row["operations_per_number"]
    if found <= most:
        return []
    return [f"{who}: {found:.2f} operations on each number of the adapters, at most {most}"]


tables, plots = growth_shown.tables, growth_shown.plots
