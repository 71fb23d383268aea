"""Explicit and Auto meshes, through lookups, scan and remat, and shard_map."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import EverythingConfig, named, normal, redraw

from peftjax import (
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    XLoraConfig,
    adapt,
    find_sites,
    init_adapter,
    init_xlora,
    merge,
    stack_adapters,
)

KEY = jax.random.key(0)
PARAMS = {
    "embed": normal(16, 8),
    "layers": {"q": normal(3, 8, 4, 2, seed=1), "o": normal(3, 4, 2, 8, seed=2)},
    "head": normal(8, 6, seed=3),
}
SPECS = {
    "embed": P("model", None),
    "layers": {"q": P(None, None, "model", None), "o": P(None, "model", None, None)},
    "head": P(None, "model"),
}
IDS = jnp.arange(20, dtype=jnp.int32).reshape(4, 5) % 16


def transformer(explicit_mesh=None):
    where = explicit_mesh and NamedSharding(explicit_mesh, P("data", None, None))
    placed = {"out_sharding": where} if where else {}

    def apply_fn(params, ids):
        x = params["embed"].at[ids].get(**placed) if where else params["embed"][ids]

        def layer(x, own):
            h = jnp.tanh(jnp.einsum("bsd,dhk->bshk", x, own["q"]))
            return x + jnp.einsum("bshk,hkd->bsd", h, own["o"], **placed), None

        x, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
        return jnp.tanh(x) @ params["head"]

    return apply_fn


def on_mesh(kind, shape):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))
    params = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), PARAMS, SPECS)
    return mesh, params, jax.device_put(IDS, NamedSharding(mesh, P("data", None)))


CONFIGS = {
    "everything": EverythingConfig(),
    "lora": LoraConfig(r=3, lora_alpha=5),
    "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True),
    "loha": LoHaConfig(r=1, alpha=5),
    "loha_fused": LoHaConfig(r=6, alpha=5),
    "hra": HRAConfig(r=4),
    "hra_gs": HRAConfig(r=4, apply_GS=True),
    "ia3": IA3Config(feedforward_modules=["o"]),
}


@pytest.mark.parametrize(
    ("kind", "shape", "method", "is_set"),
    [
        (AxisType.Auto, (2, 2), "everything", True),
        (AxisType.Explicit, (4, 1), "lora", True),
        (AxisType.Explicit, (1, 2), "lora", True),
        *((AxisType.Explicit, (2, 2), method, True) for method in CONFIGS),
        *((AxisType.Explicit, (2, 2), method, False) for method in ("everything", "dora", "hra")),
    ],
)
def test_sharded_equals_single_device(kind, shape, method, is_set):
    """On a mesh that is set, or that the arrays alone know of."""
    config = dataclasses.replace(CONFIGS[method], target_modules=lambda site: True)
    single = transformer()
    sites = find_sites(single, PARAMS, IDS)
    adapter = init_adapter(KEY, config, sites, PARAMS)
    adapter = adapter.replace(params=redraw(adapter.params))

    def loss(function, params, ids):
        def scalar(trainable):
            return jnp.sin(function(params, adapter.replace(params=trainable), ids)).sum()

        return jax.value_and_grad(scalar)(adapter.params)

    want, slope = jax.jit(loss, static_argnums=0)(
        lambda p, a, ids: single(merge(p, a), ids), PARAMS, IDS
    )
    mesh, params, ids = on_mesh(kind, shape)
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        model = transformer(mesh if kind is AxisType.Explicit else None)
        assert dict(find_sites(model, params, ids)) == dict(sites)

        @jax.jit
        def compare(params, ids):
            merged = model(merge(params, adapter), ids)
            return *loss(adapt(model, on_fallback="error"), params, ids), jnp.sin(merged).sum()

        got, own_slope, by_merging = compare(params, ids)
    assert abs(float(got - want)) < 1e-4
    assert abs(float(by_merging - want)) < 1e-4
    for a, b in zip(jax.tree.leaves(own_slope), jax.tree.leaves(slope), strict=True):
        assert float(jnp.abs(a - b).max()) < 1e-5 * max(1.0, float(jnp.abs(b).max()))


def experts_of(sites):
    targets = {"a": ["embed", "q", "o"], "b": ["q"], "c": ["q", "head"], "d": ["o"]}
    return {
        name: (
            adapter := init_adapter(KEY, LoraConfig(r=r, lora_alpha=5, target_modules=own), sites)
        ).replace(params=redraw(adapter.params, seed=30 * r))
        for r, (name, own) in enumerate(targets.items(), start=1)
    }


def routed(how, sites):
    """The same four experts, in each way of choosing among them."""
    experts = experts_of(sites)
    if how == "xlora":
        config = XLoraConfig(layerwise_scalings=True, top_k_lora=3, use_trainable_adapters=True)
        adapter = init_xlora(KEY, config, experts, sites)
        return adapter.replace(params=redraw(adapter.params, seed=50))
    bank = stack_adapters(experts)
    if how == "rows":
        return bank.rows(["b", None, "a", "d"])
    return bank.mix(jax.nn.softmax(normal(4, 5, 4, seed=3)))


@pytest.mark.parametrize(
    ("kind", "how", "sharded", "is_set"),
    [
        (AxisType.Auto, "xlora", "data", True),
        (AxisType.Explicit, "xlora", "model", True),
        (AxisType.Explicit, "rows", "data", True),
        (AxisType.Explicit, "rows", "data", False),
        (AxisType.Explicit, "mix", None, True),
    ],
)
def test_experts_on_a_mesh(kind, how, sharded, is_set):
    """Replicated, or with the axis of experts sharded over an axis of the mesh."""
    single = transformer()
    adapter = routed(how, find_sites(single, PARAMS, IDS))

    def loss(function, adapter, params, ids):
        def scalar(trainable):
            return jnp.sin(function(params, adapter.replace(params=trainable), ids)).sum()

        return jax.value_and_grad(scalar)(adapter.params)

    want, slope = jax.jit(loss, static_argnums=0)(adapt(single), adapter, PARAMS, IDS)
    mesh, params, ids = on_mesh(kind, (2, 2))

    def place(array):
        stacked = sharded and array.ndim and array.shape[0] == 4
        return jax.device_put(array, NamedSharding(mesh, P(sharded) if stacked else P()))

    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        parts = {part: dict(getattr(adapter, part)) for part in ("params", "buffers")}
        for arrays in parts.values():
            for module in adapter.sites:
                arrays[module] = jax.tree.map(place, arrays.get(module, {}))
        model = adapt(transformer(mesh if kind is AxisType.Explicit else None), on_fallback="error")
        got, own = jax.jit(loss, static_argnums=0)(model, adapter.replace(**parts), params, ids)
    assert abs(float(got - want)) < 1e-4
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(slope), strict=True):
        assert float(jnp.abs(a - b).max()) < 1e-5 * max(1.0, float(jnp.abs(b).max()))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_dropout_on_a_mesh(kind):
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.5, target_modules=lambda site: True)
    mesh, params, ids = on_mesh(kind, (2, 2))
    with jax.set_mesh(mesh):
        model = transformer(mesh if kind is AxisType.Explicit else None)
        adapter = init_adapter(KEY, config, find_sites(model, params, ids))
        adapter = adapter.replace(params=redraw(adapter.params))
        dry = jax.jit(adapt(model))(params, adapter, ids)
        wet = jax.jit(adapt(model))(params, adapter.train(KEY), ids)
    assert jnp.isfinite(wet).all()
    assert float(jnp.abs(wet - dry).max()) > 1e-2


def test_shard_map_drops_differently_on_every_shard_of_the_batch():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    @jax.jit
    def apply_fn(params, x):
        return jax.shard_map(
            lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
        )(params["w"], x)

    row = normal(1, 40, std=1)
    params, x = {"w": normal(40, 5)}, jnp.concatenate([row, row])
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.5, target_modules=["w"])
    adapter = init_adapter(KEY, config, find_sites(apply_fn, params, x))
    adapter = adapter.replace(params=redraw(adapter.params))
    dry = adapt(apply_fn)(params, adapter, x)
    assert float(jnp.abs(dry[0] - dry[1]).max()) < 1e-6
    wet = adapt(apply_fn)(params, adapter.train(KEY), x)
    assert float(jnp.abs(wet[0] - wet[1]).max()) > 1e-2


def test_shardings_of_a_nested_jit_become_constraints():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("model", None)), NamedSharding(mesh, P())

    def apply_fn(params, x):
        dense = jax.jit(lambda w, x: x @ w, in_shardings=(rows, None), out_shardings=whole)
        return dense(params["w"], x)

    params, x = {"w": normal(6, 5)}, normal(4, 6, std=1)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["w"])
    adapter = init_adapter(KEY, config, find_sites(apply_fn, params, x))
    adapter = adapter.replace(params=redraw(adapter.params))
    adapted = jax.jit(adapt(apply_fn))
    got, want = adapted(params, adapter, x), x @ merge(params, adapter)["w"]
    assert float(jnp.abs(got - want).max()) < 1e-5
    specs = [
        eqn.params["sharding"].spec
        for eqn in named(jax.make_jaxpr(adapted)(params, adapter, x), "sharding_constraint")
    ]
    assert specs == [rows.spec, whole.spec]
