"""LoRA here, LoRA of qwix, merging in every step, and full fine-tuning of the same model.

Each over the frozen floor. All but full fine-tuning compute the same loss, which is shown first.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import qwix

import peftjax
from benchmarks import steps, timing, twins
from benchmarks.pictures import bars
from benchmarks.steps import Step, chosen, compiled, drawn
from benchmarks.tables import markdown

TITLE = "Against qwix, merging and full fine-tuning"

CONFIG = {"r": 8, "lora_alpha": 16}
# What a step here may cost over one of qwix.
MOST = {"flops": 1.0, "bytes": 1.0}


def in_qwix(twin: twins.Twin, targets: str, adapter: peftjax.Adapter) -> Step:
    """The same LoRA by qwix, which changes the module's products as they run."""
    names = "|".join(twin.targets[targets])
    provider = qwix.LoraProvider(
        module_path=rf".*/layers?/.*({names})", rank=CONFIG["r"], alpha=CONFIG["lora_alpha"]
    )
    module = qwix.apply_lora_to_model(twin.module, provider)
    ids = jnp.asarray(twin.ids)
    learn = {}
    for name, arrays in adapter.params.items():
        path = adapter.sites[name].path
        learn |= {f"{path}_lora_a": arrays["lora_A"], f"{path}_lora_b": arrays["lora_B"]}
    base = flax.traverse_util.flatten_dict(twin.params, sep=".")

    def loss(learn: Any, base: Any, ids: Any) -> Any:
        params = flax.traverse_util.unflatten_dict({**base, **learn}, sep=".")
        return twin.loss(module.apply({"params": params}, *twin.inputs(ids)).logits)

    return compiled(jax.value_and_grad(loss), learn, base, ids)


def merging(twin: twins.Twin, adapter: peftjax.Adapter) -> Step:
    """The same LoRA by building every changed weight."""

    def loss(trainable: Any, adapter: Any, params: Any, ids: Any) -> Any:
        merged = peftjax.merge(params, adapter.replace(params=trainable))
        return twin.loss(twin.apply_fn(merged, ids))

    args = (adapter.params, adapter, twin.params, jnp.asarray(twin.ids))
    return compiled(jax.value_and_grad(loss), *args)


def full(twin: twins.Twin) -> Step:
    """The gradient in every weight."""

    def loss(params: Any, ids: Any) -> Any:
        return twin.loss(twin.apply_fn(params, ids))

    return compiled(jax.value_and_grad(loss), twin.params, jnp.asarray(twin.ids))


def measure(quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One record for each model, choice of modules and way."""
    rows: list[dict[str, Any]] = []
    for make in (twins.bert, twins.llama):
        twin = make(quick)
        for targets in twin.targets:
            rows += ways(twin, targets, *((1, 1) if quick else (11, 3)), say)
    return rows


def ways(
    twin: twins.Twin, targets: str, rounds: int, compiles: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All ways on one choice of modules."""
    config = peftjax.LoraConfig(**CONFIG, target_modules=chosen(twin, targets))
    adapter = peftjax.init_adapter(jax.random.key(0), config, twin.sites)
    adapter = adapter.replace(params=drawn(adapter.params, 0))
    makes: dict[str, Callable[[], Step]] = {
        "floor": lambda: steps.floor(twin),
        "peftjax": lambda: steps.adapted(twin, adapter),
        "qwix": lambda: in_qwix(twin, targets, adapter),
        "merging": lambda: merging(twin, adapter),
        "full": lambda: full(twin),
    }
    made: dict[str, list[Step]] = {way: [] for way in makes}
    for i in range(compiles):
        say(f"{twin.name}, {targets}: compiling, {i + 1} of {compiles}")
        for way, make in makes.items():
            jax.clear_caches()
            made[way].append(make())
    losses = {way: float(made[way][0].run()[0]) for way in ("peftjax", "qwix", "merging")}
    if max(losses.values()) - min(losses.values()) > 1e-5 * max(losses.values()):
        raise AssertionError(f"{twin.name}: the losses differ: {losses}")
    say(f"{twin.name}, {targets}: {rounds} rounds")
    seconds = timing.interleaved({way: own[0].run for way, own in made.items()}, rounds)
    floor = made["floor"]
    return [
        {
            "model": twin.name,
            "targets": targets,
            "way": way,
            "step_s": statistics.median(seconds[way]),
            "step_ratio": timing.ratio(seconds[way], seconds["floor"]),
            "over_qwix": timing.ratio(seconds[way], seconds["qwix"]),
            "trace_s": statistics.median(step.trace for step in own),
            "compile_s": statistics.median(step.compile for step in own),
            "made_over_qwix": timing.ratio(
                *([s.trace + s.compile for s in made[w]] for w in (way, "qwix"))
            ),
            "flops_ratio": own[0].flops / floor[0].flops,
            "bytes_ratio": own[0].bytes / floor[0].bytes,
        }
        for way, own in made.items()
        if way != "floor"
    ]


def tables(rows: list[dict[str, Any]]) -> str:
    heads = ["model", "adapted", "way", "step, ms", "step / floor", "step / qwix", "trace, s"]
    heads += ["compile, s", "trace + compile / qwix", "FLOPs / floor", "bytes / floor"]
    return markdown(
        heads,
        [
            [
                row["model"],
                row["targets"],
                row["way"],
                f"{1e3 * row['step_s']:.0f}",
                f"{row['step_ratio']:.3f}",
                f"{row['over_qwix']:.3f}",
                f"{row['trace_s']:.2f}",
                f"{row['compile_s']:.2f}",
                f"{row['made_over_qwix']:.2f}",
                f"{row['flops_ratio']:.4f}",
                f"{row['bytes_ratio']:.3f}",
            ]
            for row in rows
        ],
    )


def plots(rows: list[dict[str, Any]], directory: Path) -> list[Path]:
    """Step time over the floor, by way."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    panels: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        groups = panels.setdefault(row["model"], {})
        groups.setdefault(row["targets"], []).append(row["step_ratio"])
    path, title = directory / "against_qwix.png", "LoRA of rank 8, and full fine-tuning"
    return [bars(path, panels, ways, "time of a step / of the frozen floor", title)]


def broken(rows: list[dict[str, Any]]) -> list[str]:
    """Where a step here costs more than one of qwix."""
    out = []
    by_way = {(row["model"], row["targets"], row["way"]): row for row in rows}
    for (model, targets, way), row in by_way.items():
        if way != "peftjax":
            continue
        for what, most in MOST.items():
            here = row[f"{what}_ratio"] / by_way[model, targets, "qwix"][f"{what}_ratio"]
            if here > most:
                out.append(f"{model}, {targets}: {here:.4f} x qwix's {what}, at most {most}")
    return out
