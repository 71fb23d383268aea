"""A gradient step of every method here and in torch PEFT: the same model, adapter and batch.

Each is held against its own framework's frozen floor, the gradient with respect to one vector that
is added to all embeddings, so that the frameworks cancel; and against the other in seconds. Before
anything is timed the two are shown to compute the same: loss and adapter gradients agree.
"""

import copy
import functools
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import peft
import torch

import peftjax
from benchmarks import steps, timing, twins
from benchmarks.pictures import bars
from benchmarks.steps import chosen, drawn
from benchmarks.tables import markdown

TITLE = "Against torch PEFT"

R = 8
CONFIGS: dict[str, Callable[..., Any]] = {
    "lora": functools.partial(peftjax.LoraConfig, r=R, lora_alpha=16),
    "ia3": functools.partial(peftjax.IA3Config, feedforward_modules=[]),
    "adalora": functools.partial(peftjax.AdaLoraConfig, init_r=12, target_r=R, lora_alpha=16),
    "hra": functools.partial(peftjax.HRAConfig, r=R),
    "loha": functools.partial(peftjax.LoHaConfig, r=R // 2, alpha=8),
    "dora": functools.partial(peftjax.LoraConfig, r=R, lora_alpha=16, use_dora=True),
}
METHODS = [*CONFIGS, "xlora"]
EXPERTS = 4
# What a step may compute more than the floor: the thin products of a method, and for X-LoRA another
# forward pass. It saves the way from the first adapted layer down to the embeddings.
MOST_FLOPS = {**dict.fromkeys(CONFIGS, 1.02), "xlora": 1.45}


def floor_in_torch(twin: twins.Twin) -> Callable[[], Any]:
    embed, ids = twin.torch.get_input_embeddings(), torch.from_numpy(twin.ids)
    shift = torch.zeros(twin.torch.config.hidden_size, requires_grad=True)

    def step():
        shift.grad = None
        loss = twin.torch_loss(twin.torch, inputs_embeds=embed(ids) + shift)
        loss.backward()
        return loss

    return step


def adapter_of(twin: twins.Twin, method: str, targets: str) -> peftjax.Adapter:
    """An adapter here, with its numbers drawn."""
    key, modules = jax.random.key(0), chosen(twin, targets)
    if method != "xlora":
        adapter = peftjax.init_adapter(
            key, CONFIGS[method](target_modules=modules), twin.sites, twin.params
        )
        return adapter.replace(params=drawn(adapter.params, 0))
    experts = {}
    for i in range(EXPERTS):
        own = CONFIGS["lora"](target_modules=modules)
        expert = peftjax.init_adapter(key, own, twin.sites)
        experts[f"expert{i}"] = expert.replace(params=drawn(expert.params, i))
    config = peftjax.XLoraConfig(xlora_dropout_p=0.0)
    adapter = peftjax.init_xlora(key, config, experts, twin.sites, names=twin.names)
    return adapter.replace(params=drawn(adapter.params, EXPERTS))


def step_in_torch(twin: twins.Twin, adapter: peftjax.Adapter) -> tuple[Callable[[], Any], Any]:
    """The same step in torch, of the adapter's own files, and PEFT's model."""
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peftjax.save_pretrained(directory, adapter, names=twin.names)
        model = peft.PeftModel.from_pretrained(
            copy.deepcopy(twin.torch), directory, is_trainable=True
        )
    for name, parameter in model.named_parameters():
        if "internal_xlora" in name:
            parameter.requires_grad_(True)
        elif isinstance(adapter.config, peftjax.XLoraConfig):
            parameter.requires_grad_(False)
    model.eval()  # nothing is dropped out in either
    learn = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.from_numpy(twin.ids)

    def step():
        for parameter in learn:
            parameter.grad = None
        loss = twin.torch_loss(model, input_ids=ids)
        loss.backward()
        return loss

    return step, model


def measure(quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One record for each model, choice of modules and method."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows: list[dict[str, Any]] = []
    for make in (twins.bert, twins.llama):
        twin = make(quick)
        for targets in twin.targets:
            rows += pairs(twin, targets, 1 if quick else 9, say)
    return rows


def pairs(twin: twins.Twin, targets: str, rounds: int, say: Callable[[str], None]) -> list[dict]:
    """All methods on one choice of modules, each once a round in both frameworks."""
    floor = steps.floor(twin)
    made = {}
    functions = {("here", "floor"): floor.run, ("torch", "floor"): floor_in_torch(twin)}
    counts: dict[str, int] = {}
    # PEFT's X-LoRA reads experts for modules under one called `model` alone, as Llama's are.
    methods = METHODS if twin.name == "Llama" else list(CONFIGS)
    for method in methods:
        say(f"{twin.name}, {targets}: compiling {method}")
        adapter = adapter_of(twin, method, targets)
        made[method] = steps.adapted(twin, adapter)
        functions["here", method] = made[method].run
        functions["torch", method], _ = step_in_torch(twin, adapter)
        counts[method] = sum(x.size for x in jax.tree.leaves(adapter.params))
        ours, theirs = (float(_first(functions[where, method]())) for where in ("here", "torch"))
        if abs(ours - theirs) > 1e-3 * abs(theirs):
            raise AssertionError(f"{twin.name} {method}: a loss of {ours} here, {theirs} in torch")
    say(f"{twin.name}, {targets}: {rounds} rounds")
    # HRA of torch PEFT takes the better part of a minute where it builds matrices of 5632 x 5632.
    seconds = timing.interleaved(functions, rounds, patience=40)
    rows = []
    for method in methods:
        step = made[method]
        rows.append(
            {
                "model": twin.name,
                "targets": targets,
                "method": method,
                "params": counts[method],
                "flops_ratio": step.flops / floor.flops,
                "bytes_ratio": step.bytes / floor.bytes,
                "trace_s": step.trace,
                "compile_s": step.compile,
                "here_s": statistics.median(seconds["here", method]),
                "torch_s": statistics.median(seconds["torch", method]),
                "here_floor_s": statistics.median(seconds["here", "floor"]),
                "torch_floor_s": statistics.median(seconds["torch", "floor"]),
                "here_ratio": timing.ratio(seconds["here", method], seconds["here", "floor"]),
                "torch_ratio": timing.ratio(seconds["torch", method], seconds["torch", "floor"]),
                "speedup": timing.ratio(seconds["torch", method], seconds["here", method]),
            }
        )
    return rows


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out.detach()


def tables(rows: list[dict[str, Any]]) -> str:
    heads = {
        "model": "model",
        "targets": "adapted",
        "method": "method",
        "flops": "FLOPs / floor",
        "here": "here / floor",
        "torch": "torch PEFT / its floor",
        "seconds": "here, ms",
        "torch_seconds": "torch PEFT, ms",
        "speedup": "torch / here",
    }
    lines = [
        [
            row["model"],
            row["targets"],
            f"`{row['method']}`",
            f"{row['flops_ratio']:.3f}",
            f"{row['here_ratio']:.2f}",
            f"{row['torch_ratio']:.2f}",
            f"{1e3 * row['here_s']:.0f}",
            f"{1e3 * row['torch_s']:.0f}",
            f"{row['speedup']:.2f}",
        ]
        for row in rows
    ]
    return markdown(list(heads.values()), lines)


def plots(rows: list[dict[str, Any]], directory: Path) -> list[Path]:
    """Time over the floor, here and in torch."""
    made = []
    for model in dict.fromkeys(row["model"] for row in rows):
        panels: dict[str, dict[str, tuple[float, float]]] = {}
        for row in rows:
            if row["model"] == model:
                ratios = (row["here_ratio"], row["torch_ratio"])
                panels.setdefault(row["targets"], {})[row["method"]] = ratios
        path = directory / f"against_torch_{model.lower()}.png"
        labels = ("peftjax", "torch PEFT")
        quantity = "time of a step / of its own floor"
        made.append(bars(path, panels, labels, quantity, f"{model}: what adapting costs"))
    return made


def broken(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['model']} {row['method']} on {row['targets']}: {row['flops_ratio']:.4f} x the "
        f"floor's FLOPs, at most {most}"
        for row in rows
        for most in [MOST_FLOPS[row["method"]]]
        if row["flops_ratio"] > most
    ]
