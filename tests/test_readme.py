"""The README's tables of what works, held against the code by trying every cell."""

import functools
import math
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import near, normal, redraw

import peftjax
from peftjax.engine.routes import RouteError

README = Path(__file__).parents[1] / "README.md"
REFUSED = (ValueError, TypeError, NotImplementedError, RouteError)
IDS = jnp.arange(6).reshape(2, 3)


class Kind(NamedTuple):
    """One way to use a weight, as a model of a single weight."""

    apply_fn: Callable[..., Any]
    weight: tuple[int, ...]
    x: Any


def scan(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])[0]


def convolution(x_shape: tuple[int, ...], weight: tuple[int, ...], groups: int = 1) -> Kind:
    def apply_fn(params, x):
        rank = x.ndim - 2
        letters = "DHW"[3 - rank :]
        numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
        kernel = params["layers"]["kernel"]
        return lax.conv_general_dilated(
            x, kernel, (1,) * rank, "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    return Kind(apply_fn, weight, normal(*x_shape, std=1))


KINDS = {
    "dense": Kind(lambda params, x: x @ params["layers"]["kernel"], (4, 5), normal(2, 3, 4, std=1)),
    "dense, several axes": Kind(
        lambda params, x: jnp.einsum("bti,ihd->bthd", x, params["layers"]["kernel"]),
        (4, 2, 3),
        normal(2, 3, 4, std=1),
    ),
    "conv 1d": convolution((2, 6, 4), (3, 4, 5)),
    "conv 2d": convolution((2, 5, 5, 4), (3, 3, 4, 5)),
    "conv 3d": convolution((2, 3, 4, 4, 4), (3, 3, 3, 4, 5)),
    "conv, grouped": convolution((2, 5, 5, 4), (3, 3, 2, 6), groups=2),
    "lookup": Kind(lambda params, ids: params["layers"]["kernel"][ids], (9, 5), IDS),
    "tied head": Kind(
        lambda params, ids: (
            jnp.tanh(params["layers"]["kernel"][ids]) @ params["layers"]["kernel"].T
        ),
        (9, 5),
        IDS,
    ),
    "experts": Kind(
        lambda params, x: jnp.einsum("bti,eio->beto", x, params["layers"]["kernel"]),
        (3, 4, 5),
        normal(2, 3, 4, std=1),
    ),
    "scanned layers": Kind(scan, (3, 4, 4), normal(2, 3, 4, std=1)),
}

# alpha never equals r.
METHODS: dict[str, Callable[..., Any]] = {
    "LoRA": functools.partial(peftjax.LoraConfig, r=2, lora_alpha=5),
    "PiSSA, OLoRA": functools.partial(
        peftjax.LoraConfig, r=2, lora_alpha=5, init_lora_weights="olora"
    ),
    "DoRA": functools.partial(peftjax.LoraConfig, r=2, lora_alpha=5, use_dora=True),
    "LoHa": functools.partial(peftjax.LoHaConfig, r=2, alpha=5),
    "AdaLoRA": functools.partial(peftjax.AdaLoraConfig, init_r=3, target_r=2, lora_alpha=5),
    "HRA": functools.partial(peftjax.HRAConfig, r=2),
    "IA3": functools.partial(peftjax.IA3Config, feedforward_modules=[]),
    "X-LoRA": functools.partial(peftjax.LoraConfig, r=2, lora_alpha=5),
}
# Of X-LoRA's experts PEFT reads those for modules under one called `model` alone.
NAMES = peftjax.ModuleNames((("layers", "model.layers"),))
STACKED = peftjax.ModuleNames((("layers", "model.layers.{i}"),))

BIASED = Kind(
    lambda params, x: x @ params["layers"]["kernel"] + params["layers"]["bias"][None, None],
    (4, 5),
    normal(2, 3, 4, std=1),
)


def parameters(kind: Kind) -> Any:
    return {"layers": {"kernel": normal(*kind.weight), "bias": normal(kind.weight[-1], seed=1)}}


def made(method: str, kind: Kind, params: Any, seed: int = 7, **fields: Any) -> peftjax.Adapter:
    """An adapter with all its numbers drawn."""
    sites = peftjax.find_sites(kind.apply_fn, params, kind.x)
    config = METHODS[method](target_modules=["layers"], **fields)
    key = jax.random.key(0)
    if method != "X-LoRA":
        adapter = peftjax.init_adapter(key, config, sites, params)
        return adapter.replace(params=redraw(adapter.params, seed))
    experts = {}
    for i in range(2):
        expert = peftjax.init_adapter(key, config, sites)
        experts[str(i)] = expert.replace(params=redraw(expert.params, seed + 10 * i))
    gate = peftjax.XLoraConfig(hidden_size=4, xlora_depth=1)
    return peftjax.init_xlora(key, gate, experts, sites)


def run(method: str, kind: Kind, adapter: peftjax.Adapter, params: Any) -> Any:
    positions = math.prod(kind.x.shape[1 : max(2, kind.x.ndim - 1)])
    states = (lambda out: normal(2, positions, 4, std=1)) if method == "X-LoRA" else None
    adapted = peftjax.adapt(kind.apply_fn, hidden_states=states)
    return jax.jit(adapted)(params, adapter, kind.x)


def cell(method: str, name: str) -> str:
    """What is true of a method on a kind of site: of nobody, of peftjax, of both."""
    kind = KINDS[name]
    params = parameters(kind)
    try:
        adapter = made(method, kind, params)
        out = run(method, kind, adapter, params)
    except REFUSED:
        return "no"
    base = kind.apply_fn(params, kind.x)
    assert jnp.abs(out - base).max() > 1e-3, "nothing was adapted"
    if method != "X-LoRA":
        merged = kind.apply_fn(peftjax.merge(params, adapter), kind.x)
        np.testing.assert_allclose(out, merged, atol=1e-5 * float(jnp.abs(merged).max()))
    try:
        names = STACKED if adapter.sites["layers"].stack_axes else NAMES
        with tempfile.TemporaryDirectory() as directory:
            peftjax.save_pretrained(directory, adapter, names=names)
    except REFUSED:
        return "here"
    return "both"


def answers(try_it: Callable[[], Any]) -> str:
    try:
        try_it()
    except REFUSED:
        return "no"
    return "yes"


def features(method: str) -> dict[str, str]:
    """Which of the toolkit's functions take an adapter of a method."""
    kind, params = BIASED, parameters(BIASED)
    adapter, other = (made(method, kind, params, seed) for seed in (7, 8))
    sites = adapter.sites

    def unmerge():
        merged = peftjax.merge(params, adapter)
        back = peftjax.unmerge(merged, adapter)
        near(back, params, 1e-5)

    def rows():
        bank = peftjax.stack_adapters({"a": adapter, "b": other})
        out = run(method, kind, bank.rows(["b", None]), params)
        np.testing.assert_allclose(out[0], run(method, kind, other, params)[0], atol=1e-5)

    def mixed():
        bank = peftjax.stack_adapters({"a": adapter, "b": other})
        out = run(method, kind, bank.mix([0.25, 0.5]), params)
        base, *each = (run(method, kind, one, params) for one in (None, adapter, other))
        sums = base + 0.25 * (each[0] - base) + 0.5 * (each[1] - base)
        np.testing.assert_allclose(out, sums, atol=1e-5)

    def combined():
        peftjax.combine_adapters([adapter, other], [0.5, 0.5], combination_type="linear")

    def to_lora():
        lora = peftjax.convert_to_lora(adapter, 1.0, params)
        outs = [run(method, kind, one, params) for one in (lora, adapter)]
        np.testing.assert_allclose(*outs, atol=1e-4)

    def quantised():
        small = peftjax.quantize_base(params, sites, "int8")
        outs = [run(method, kind, adapter, base) for base in (small, params)]
        assert 0 < jnp.abs(outs[0] - outs[1]).max() < 0.05

    def trains_biases():
        own = made(method, kind, params, bias="all")
        assert any("bias" in leaf for leaf in own.params["layers"]), own.params

    tried = {
        "`merge`": lambda: peftjax.merge(params, adapter),
        "`unmerge`": unmerge,
        "`bank.rows`": rows,
        "`bank.mix`, X-LoRA's experts": mixed,
        "`combine_adapters`": combined,
        "`convert_to_lora`": to_lora,
        "`quantize_base`": quantised,
        "`bias=`": trains_biases,
    }
    return {name: answers(each) for name, each in tried.items()}


def row(method: str, cells: dict[str, str]) -> str:
    return f"| {method} | {' | '.join(cells.values())} |"


def head(cells: Iterable[str]) -> str:
    return f"| | {' | '.join(cells)} |"


@pytest.mark.parametrize("method", METHODS)
def test_where_a_method_works_is_what_the_readme_says(method):
    text = README.read_text("utf-8")
    cells = {name: cell(method, name) for name in KINDS}
    assert head(cells) in text
    assert row(method, cells) in text


@pytest.mark.parametrize("method", METHODS)
def test_what_takes_a_method_is_what_the_readme_says(method):
    text = README.read_text("utf-8")
    cells = features(method)
    assert head(cells) in text
    assert row(method, cells) in text


def test_every_name_of_the_package_is_there():
    used = set(re.findall(r"peftjax\.(\w+)", README.read_text("utf-8")))
    assert used <= set(peftjax.__all__)
    assert all(hasattr(peftjax, name) for name in peftjax.__all__)
    assert dir(peftjax) == sorted(peftjax.__all__)
