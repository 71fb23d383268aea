"""Pictures of the learning-quality benchmark."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_tables import (
    SIDES,
    Estimate,
    chosen,
    claims,
    estimate,
    name,
    settings,
    trained,
)

STYLES = {"peftjax": ("#0072B2", "o"), "torch": ("#D55E00", "D")}


def plots(rows: Sequence[dict], directory: Path) -> list[Path]:
    """Draws accuracies and claims as PNG files; nothing where nothing was trained."""
    own = trained(rows)
    if not own:
        return []
    directory.mkdir(parents=True, exist_ok=True)
    pictures = [accuracy(own, directory / "quality.png")]
    if claims(own):
        pictures.append(differences(own, directory / "quality_claims.png"))
    return pictures


def _points(
    axes: Any, places: Iterable[float], estimates: Iterable[Estimate], side: str, shift: float
) -> None:
    """Means with one standard error to each side."""
    (color, marker), estimates = STYLES[side], list(estimates)
    axes.errorbar(
        [each.mean for each in estimates],
        [place + shift for place in places],
        xerr=[each.error if math.isfinite(each.error) else 0 for each in estimates],
        color=color,
        marker=marker,
        markersize=5,
        linestyle="none",
        elinewidth=1.6,
        markerfacecolor=color if side == "peftjax" else "white",
        label=f"{SIDES[side]} (± one standard error)",
    )


def _legend(figure: Any, panels: Iterable[Any]) -> None:
    """One legend for all panels."""
    unique: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        unique |= dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique.keys(), loc="outside upper center", ncols=3, frameon=False
    )


def accuracy(rows: Sequence[dict], path: Path) -> Path:
    """Held-out accuracy of every method and budget, a panel for each number of texts."""
    from matplotlib.figure import Figure

    counts = sorted({row["texts"] for row in rows})
    kinds = list(dict.fromkeys((method, budget) for _, method, budget in settings(rows)))
    places, place = {}, 0.0
    for before, kind in zip([None, *kinds], kinds, strict=False):
        place += 1.5 if before and before[0] != kind[0] else 1.0
        places[kind] = place
    figure = Figure(figsize=(8.5, 1.6 + 0.29 * place), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axes, texts in zip(panels, counts, strict=True):
        for shift, side in ((-0.17, "peftjax"), (0.17, "torch")):
            found = {
                kind: estimate([row["accuracy"] for row in seeds.values()])
                for kind in kinds
                if (
                    seeds := chosen(
                        rows, framework=side, texts=texts, method=kind[0], budget=kind[1]
                    )
                )
            }
            if found:
                _points(axes, [places[kind] for kind in found], found.values(), side, shift)
        probes = {row["seed"]: row["probe"] for row in rows if row["texts"] == texts}
        axes.axvline(
            estimate(list(probes.values())).mean,
            color="#555555",
            linestyle="--",
            linewidth=1,
            label="linear probe, where all start",
        )
        axes.set_title(f"{texts:,} texts to train on")
        axes.set_xlabel("right on held-out texts (%)")
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(list(places.values()), [name(*kind) for kind in kinds])
    panels[0].invert_yaxis()
    _legend(figure, panels)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def differences(rows: Sequence[dict], path: Path) -> Path:
    """What each paper claims, as differences in points; zero is no difference."""
    from matplotlib.figure import Figure

    every = claims(rows)
    places, place = [], 0.0
    heads = {}
    for before, claim in zip([None, *every], every, strict=False):
        if before is None or before.text != claim.text:
            place += 1.2
            heads[place] = claim.text
        place += 1.0
        places.append(place)
    figure = Figure(figsize=(8.5, 1.4 + 0.27 * place), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for shift, side in ((-0.17, "peftjax"), (0.17, "torch")):
        own = [
            (place, claim.sides[side])
            for place, claim in zip(places, every, strict=True)
            if side in claim.sides
        ]
        if own:
            _points(axes, [each for each, _ in own], [each for _, each in own], side, shift)
    axes.axvline(0, color="#555555", linewidth=1)
    for where, text in heads.items():
        axes.annotate(
            text,
            (0.01, where),
            xycoords=("axes fraction", "data"),
            va="center",
            weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axes.set_yticks(places, [claim.where for claim in every])
    axes.set_ylim(place + 0.7, 0.4)
    axes.set_xlabel("difference of accuracies on held-out texts (percentage points)")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, [axes])
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path
