"""Tables and plots of the learning-quality benchmark, and the papers' claims held against it."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

TOLERANCE = 1e-4  # of a first loss, and of a gradient over the largest of its array
LABELS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "loha": "LoHa",
    "hra": "HRA",
    "ia3": "IA3",
    "adalora": "AdaLoRA",
    "xlora": "X-LoRA",
}
SIDES = {"peftjax": "peftjax", "torch": "torch PEFT"}
NOTES = """\
Both sides get the same texts, batches, padding, first adapter and classifier (the linear probe),
learning rates, AdamW, and clipping; nothing drops out. Accuracies are means over seeds, ± their
standard error; a seed draws the texts, their order and the first weights. Adapters are on query and
value layers; those of IA3 where PEFT has them for BERT: key, value and output. HRA has twice the r
of the others, because its reflections start in pairs. Learning rates and scales are those of the
quickstart for all budgets: none was tuned for a budget, or for a side.

What torch PEFT needed: its AdaLoRA is called below the `PeftModel`, which leaves the regulariser
out for a model without a task type, and `update_and_allocate` after every step, which nothing
calls; the gate of X-LoRA gets its first numbers through its module's parameters, since PEFT's state
dict of it lacks layers. X-LoRA's three experts learn half of a run's steps each, each on the texts
of its own topic, and its gate another half, on all texts; the classifier stays the probe."""


class Estimate(NamedTuple):
    """A mean over seeds and its standard error, which one seed does not have."""

    mean: float
    error: float
    seeds: int

    def __str__(self) -> str:
        spread = f" ± {self.error:.1f}" if math.isfinite(self.error) else ""
        return f"{self.mean:.1f}{spread}"


class Claim(NamedTuple):
    """One method against another, in percentage points."""

    text: str
    where: str
    sides: dict[str, Estimate]


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of some accuracies or differences of them, in percentage points."""
    error = math.nan
    if len(values) > 1:
        error = 100 * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(100 * statistics.fmean(values), error, len(values))


def trained(rows: Iterable[dict]) -> list[dict]:
    """The rows of runs that trained."""
    return [row for row in rows if row["framework"] in SIDES]


def chosen(rows: Iterable[dict], **fields: Any) -> dict[int, dict]:
    """Rows by seed, those that have the given fields."""
    return {
        row["seed"]: row for row in rows if all(row[name] == own for name, own in fields.items())
    }


def settings(rows: Iterable[dict]) -> list[tuple[int, str, int]]:
    """The number of texts, method and budget of all rows, in the order of tables."""
    found = {(row["texts"], row["method"], row["budget"]) for row in rows}
    return sorted(found, key=lambda each: (each[0], list(LABELS).index(each[1]), each[2]))


def name(method: str, budget: int) -> str:
    """A method with its own rank."""
    rank = 2 * budget if method == "hra" else budget
    return f"{LABELS[method]}, r {rank}" if rank else LABELS[method]


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, marks, *lines])


def paired(one: dict[int, dict], other: dict[int, dict]) -> dict[int, float]:
    """The differences of accuracies, by the seeds that both have."""
    both = sorted(one.keys() & other.keys())
    return {seed: one[seed]["accuracy"] - other[seed]["accuracy"] for seed in both}


def accuracies(rows: Sequence[dict], texts: int) -> str:
    """Every method and budget, here and in torch."""
    lines = []
    for _, method, budget in settings(row for row in rows if row["texts"] == texts):
        here = {"texts": texts, "method": method, "budget": budget}
        own = {side: chosen(rows, framework=side, **here) for side in SIDES}
        means = {
            side: estimate([row["accuracy"] for row in seeds.values()])
            for side, seeds in own.items()
            if seeds
        }
        some = next(row for seeds in own.values() for row in seeds.values())
        kept = f", {some['kept']:,} kept" if some["kept"] != some["parameters"] else ""
        differences = paired(own["peftjax"], own["torch"])
        lines.append(
            [
                name(method, budget),
                f"{some['parameters']:,}{kept}",
                *(f"{means[side]} %" if side in means else "" for side in SIDES),
                f"{estimate(list(differences.values()))}" if differences else "",
                _standing(means),
                " / ".join(sorted({str(mean.seeds) for mean in means.values()})),
            ]
        )
    titles = ["trained parameters", *SIDES.values(), "difference, points", "peftjax is", "seeds"]
    return table([f"{texts:,} texts", *titles], lines)


def _standing(means: dict[str, Estimate]) -> str:
    """Where ours is: at most one standard error below torch's, above it, or lower."""
    if len(means) < 2 or not math.isfinite(means["torch"].error):
        return ""
    ours, theirs = means["peftjax"], means["torch"]
    if ours.mean >= theirs.mean:
        return "level or above"
    within = theirs.mean - ours.mean <= theirs.error
    return "within one error" if within else "below by more than one error"


def by_method(rows: Sequence[dict]) -> str:
    """Every method over all budgets and numbers of texts: the mean of each seed, then of seeds.

    Of seeds and numbers of texts that all methods have on both sides.
    """
    rows = whole(rows)
    lines = []
    for method in LABELS:
        means = {}
        for side in SIDES:
            seeds: dict[int, list[float]] = {}
            for row in rows:
                if row["framework"] == side and row["method"] == method:
                    seeds.setdefault(row["seed"], []).append(row["accuracy"])
            if seeds:
                means[side] = estimate([statistics.fmean(each) for each in seeds.values()])
        if means:
            lines.append(
                [LABELS[method], *(f"{means[side]} %" for side in SIDES), _standing(means)]
            )
    return table(["all settings", *SIDES.values(), ""], lines)


def whole(rows: Sequence[dict]) -> list[dict]:
    """The rows of those seeds and numbers of texts that have every method and budget, twice."""
    kinds = {(row["framework"], row["method"], row["budget"]) for row in rows}
    kinds |= {(side, method, budget) for _, method, budget in kinds for side in SIDES}
    have: dict[tuple, set] = {}
    for row in rows:
        kind = (row["framework"], row["method"], row["budget"])
        have.setdefault((row["seed"], row["texts"]), set()).add(kind)
    return [row for row in rows if have[row["seed"], row["texts"]] == kinds]


def agreement(rows: Sequence[dict]) -> str:
    """How far the frameworks are apart: after one step, ten, and in the end."""
    lines = []
    for method, label in LABELS.items():
        own = [row for row in rows if row["method"] == method]
        once = [row for row in own if row["framework"] == "both"]
        first, last = [], []
        for texts, _, budget in settings(trained(own)):
            ours, theirs = (
                chosen(own, framework=side, texts=texts, budget=budget) for side in SIDES
            )
            for seed in ours.keys() & theirs.keys():
                one, other = ours[seed], theirs[seed]
                pairs = zip(one["first_losses"], other["first_losses"], strict=True)
                first.append(max(abs(here - there) for here, there in pairs))
                last.append(abs(one["last_loss"] - other["last_loss"]))
        apart = [[row["loss"] for row in once], [row["gradient"] for row in once], first, last]
        if any(apart):
            lines.append([label, *(f"{max(each):.0e}" if each else "" for each in apart)])
    header = [
        "peftjax and torch PEFT, largest difference",
        "loss of a batch",
        "gradients, over the largest entry of an array",
        "losses of the first ten steps",
        "mean loss of the last twenty",
    ]
    return table(header, lines)


# What a paper says, of which method and against what at how many times its budget; X-LoRA's own
# experts have no row of their own.
PAPERS = (
    ("AdaLoRA (2023) beats LoRA of the same final budget", "adalora", "lora", 1),
    ("HRA (2024) is as good as LoRA with half of its parameters", "hra", "lora", 2),
    ("LoHa (FedPara, 2022) beats LoRA of as many parameters", "loha", "lora", 2),
    ("X-LoRA (2024) beats its best single expert", "xlora", None, 1),
)


def claims(rows: Sequence[dict]) -> list[Claim]:
    """What the papers say, on these runs: in every setting, and in the mean of all of them."""
    rows, found = trained(rows), []
    for text, method, other, times in PAPERS:
        pooled: dict[str, dict[int, list[float]]] = {}
        single = []
        for texts, _, budget in settings(row for row in rows if row["method"] == method):
            sides = {}
            for side in SIDES:
                here = {"framework": side, "texts": texts}
                one = chosen(rows, method=method, budget=budget, **here)
                two = chosen(rows, method=other, budget=times * budget, **here)
                if other is None:
                    two = {seed: {"accuracy": max(row["experts"])} for seed, row in one.items()}
                if differences := paired(one, two):
                    sides[side] = estimate(list(differences.values()))
                for seed, value in differences.items():
                    pooled.setdefault(side, {}).setdefault(seed, []).append(value)
            against = name(other, times * budget) if other else "best expert"
            if sides:
                where = f"{texts:,} texts: {name(method, budget)} − {against}"
                single.append(Claim(text, where, sides))
        means = {
            side: estimate([statistics.fmean(values) for values in seeds.values()])
            for side, seeds in pooled.items()
        }
        found += single
        if len(single) > 1:
            found.append(Claim(text, "mean of these", means))
    return found


def verdict(claim: Claim, difference: Estimate) -> str:
    """What two standard errors say of it."""
    mean, error = difference.mean, difference.error
    if not math.isfinite(error):
        return "one seed says nothing"
    level = "as good as" in claim.text
    if mean > 2 * error:
        return "holds"
    if mean < -2 * error:
        return "does not hold"
    return "not refuted" if level else "not shown"


def claims_table(rows: Sequence[dict]) -> str:
    """Every claim, the difference in points and what two standard errors say."""
    lines, last = [], ""
    for claim in claims(rows):
        shown = [
            f"{claim.sides[side]}: {verdict(claim, claim.sides[side])}"
            if side in claim.sides
            else ""
            for side in SIDES
        ]
        lines.append([claim.text if claim.text != last else "", claim.where, *shown])
        last = claim.text
    return table(["claim", "difference in points", *SIDES.values()], lines)


def costs(rows: Sequence[dict]) -> str:
    """CPU seconds of a step and of a run; of X-LoRA a step of its gate."""
    lines = []
    for method, label in LABELS.items():
        cells = []
        for side in SIDES:
            own = [r for r in rows if r["framework"] == side and r["method"] == method]
            cells.append(
                f"{1000 * statistics.median(row['step_seconds'] for row in own):.0f} ms"
                if own
                else ""
            )
        for texts in sorted({row["texts"] for row in rows}):
            for side in SIDES:
                here = {"framework": side, "method": method, "texts": texts}
                own = [row for row in rows if all(row[key] == here[key] for key in here)]
                cells.append(
                    f"{statistics.median(row['cpu_seconds'] for row in own):.0f} s" if own else ""
                )
        if any(cells):
            lines.append([label, *cells])
    runs = [
        f"run, {texts:,} texts, {side}"
        for texts in sorted({row["texts"] for row in rows})
        for side in SIDES.values()
    ]
    return table(["CPU time", *(f"step, {side}" for side in SIDES.values()), *runs], lines)


def tables(rows: Sequence[dict]) -> str:
    """All tables, as Markdown."""
    own = trained(rows)
    blocks = []
    if own:
        probes = {(row["texts"], row["seed"]): row["probe"] for row in own}
        marks = [
            f"{estimate([v for (t, _), v in probes.items() if t == texts])} % with {texts:,} texts"
            for texts in sorted({texts for texts, _ in probes})
        ]
        blocks += [f"The linear probe, where all start: {', '.join(marks)}."]
        blocks += [by_method(own)] if whole(own) else []
        blocks += [accuracies(own, texts) for texts in sorted({row["texts"] for row in own})]
    if rows:
        blocks.append(agreement(rows))
    if own:
        blocks += ["What the papers claim (two standard errors decide):", claims_table(own)]
        blocks += ["What it costs:", costs(own)]
    return "\n\n".join([*blocks, NOTES])


def broken(rows: Sequence[dict]) -> list[str]:
    """Where the frameworks compute or train something else."""
    found = []
    for row in rows:
        if row["framework"] != "both":
            continue
        for what in ("loss", "gradient"):
            if not row[what] <= TOLERANCE:
                found.append(
                    f"{row['method']}, budget {row['budget']}: the first {what} is {row[what]:.1e} "
                    f"from torch PEFT's, and {TOLERANCE:.0e} is allowed ({row['tensor']})"
                )
    own = trained(rows)
    for texts, method, budget in settings(own):
        counts = {
            side: {row["parameters"] for row in each.values()}
            for side in SIDES
            if (each := chosen(own, framework=side, texts=texts, method=method, budget=budget))
        }
        if len(set().union(*counts.values())) > 1:
            found.append(f"{method}, budget {budget}: parameters differ: {counts}")
    return found
