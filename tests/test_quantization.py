"""Quantised bases: the same as the plain weights they stand for, and smaller."""

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import EverythingConfig, normal, redraw
from zoo import CASES

from peftjax import (
    AdaLoraConfig,
    FallbackError,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    adapt,
    find_sites,
    init_adapter,
    merge,
    quantize_base,
    stack_adapters,
    unmerge,
)
from peftjax.attach import refill
from peftjax.trees import leaf_bytes, leaf_paths

KEY = jax.random.key(0)
KINDS = {
    "linen_tied_embedding",
    "linen_scan_axis1_remat",
    "nnx_scan_remat",
    "einsum_attention",
    "moe_ragged_dot",
    "shard_map_columns",
    "while_loop",
    "custom_vjp_on_the_weight",
}


def quantized(params, sites, qtype, block):
    """Every site's weight quantised in blocks of few of the last in-axis, whatever it is."""
    leaves = leaf_paths(params)

    def one(site):
        *rest, last = site.in_axes
        size = site.shape[last]
        tile = {} if qtype == "int8" else {last: block if size % block == 0 else size}
        whole = (*site.stack_axes, *site.out_axes, *([] if qtype == "int8" else rest))
        return qwix.quantize(leaves[site.path], qtype, channelwise_axes=whole, tiled_axes=tile)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return refill(params, leaves | {site.path: one(site) for site in sites.values()})


def dense(params):
    return merge(params, None, dequantize=True)


def error(got, want):
    got, want = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)])
        for t in (got, want)
    )
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize(
    ("case", "qtype"),
    [
        pytest.param(case, ("int8", "nf4")[i % 2], id=case.name)
        for i, case in enumerate(CASES)
        if case.name in KINDS
    ],
)
def test_equals_the_plain_weights(case, qtype, x64):
    with case.rules():
        apply_fn, params, args = case.build(jax.random.key(1), jnp.float64)
        sites = find_sites(apply_fn, params, *args)
        packed = quantized(params, sites, qtype, 2)
        plain = dense(packed)
        assert dict(find_sites(apply_fn, packed, *args)) == dict(sites)
        adapter = init_adapter(KEY, EverythingConfig(target_modules=case.targets), sites, packed)
        adapter = adapter.replace(params=redraw(adapter.params))
        adapted = adapt(apply_fn)

        def both(params, function):
            def scalar(trainable):
                out = function(params, adapter.replace(params=trainable))
                leaves = jax.tree.leaves(out)
                return sum(jnp.sin(x).sum() for x in leaves if jnp.isrealobj(x))

            if case.autodiff == "forward":
                tangent = jax.tree.map(jnp.ones_like, adapter.params)
                return jax.jvp(scalar, (adapter.params,), (tangent,))
            return jax.value_and_grad(scalar)(adapter.params)

        got = jax.jit(lambda p: both(p, lambda p, a: adapted(p, a, *args)))(packed)
        want = jax.jit(lambda p: both(p, lambda p, a: apply_fn(merge(p, a), *args)))(plain)
        assert error(got, want) < 1e-10
        bare = jax.jit(lambda p: adapted(p, None, *args))(packed)
        assert error(bare, apply_fn(plain, *args)) < 1e-10


PARTS = {
    "reversed": lambda w, x: x @ lax.rev(w[1], (0,)),
    "sliced": lambda w, x: x[:, :5] @ w[2, 1:6],
    "strided": lambda w, x: x[:, ::2] @ w[2, ::2],
    "indexed": lambda w, x: x @ lax.dynamic_index_in_dim(w, len(x) - 2, 0, False),
    "split": lambda w, x: sum(x[:, :4] @ half for half in jnp.split(w[3], 2, axis=0)),
    "flattened": lambda w, x: jnp.concatenate([x] * 6, 1) @ w.reshape(48, 4),
    "cut_up": lambda w, x: jnp.einsum("bij,ijk->bk", x.reshape(5, 4, 2), w[0].reshape(4, 2, 4)),
    "scaled": lambda w, x: x @ (-2 * w[1]),
    "transposed": lambda w, x: x @ w.transpose(2, 1, 0)[1],
    "rounded": lambda w, x: x @ w[1].astype(jnp.bfloat16).astype(jnp.float32),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("whole", "tiles"), [((0, 2), {1: 2}), ((0, 1, 2), {}), ((), {}), ((0,), {1: 4, 2: 2})]
)
def test_scales_move_with_their_codes(part, whole, tiles):
    weight, x = normal(6, 8, 4, seed=1), normal(5, 8, seed=2)
    settings = {"channelwise_axes": whole, "tiled_axes": tiles}
    with jax.numpy_rank_promotion("allow"):
        symmetric = qwix.quantize(weight, "nf4", **settings)
        shifted = qwix.quantize(weight + 1, "int8", calibration_method="minmax", **settings)
        unpacked = [qwix.dequantize(each) for each in (symmetric, shifted)]
    adapted = adapt(PARTS[part])
    for packed, plain in zip((symmetric, shifted), unpacked, strict=True):
        np.testing.assert_array_equal(adapted(packed, None, x), jax.jit(PARTS[part])(plain, x))


STACK = {"a": normal(3, 16, 24, seed=1), "b": normal(3, 24, 16, seed=2)}
X = normal(5, 16, seed=3)


def layers(policy):
    """A scan over layers of two weights, with or without rematerialisation."""

    def layer(x, own):
        return jnp.tanh(jnp.tanh(x @ own["a"]) @ own["b"]), None

    body = layer if policy == "none" else jax.checkpoint(layer, policy=policy)
    return lambda params, x: lax.scan(body, x, params)[0]


def arrays_in(jaxpr, found):
    """Every array of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        found.update((v.aval.dtype.name, v.aval.shape) for v in eqn.outvars if hasattr(v, "aval"))
        for value in eqn.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    arrays_in(inner, found)
    return found


def multiplications(jaxpr):
    """Of all products, those of a loop once for each turn."""
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            count += eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
                count += times * multiplications(inner)
    return count


@pytest.mark.parametrize("policy", ["none", None, jax.checkpoint_policies.dots_saveable])
@pytest.mark.parametrize("config", [LoraConfig(r=2, lora_alpha=5), HRAConfig(r=2)])
def test_no_whole_weight_is_kept(policy, config):
    """Not for the backward pass, and not of more than one layer at once."""
    apply_fn = layers(policy)
    sites = find_sites(apply_fn, STACK, X)
    config = dataclasses.replace(config, target_modules=lambda site: True)
    adapter = init_adapter(KEY, config, sites)
    counts = []
    for base in (STACK, quantize_base(STACK, sites, "int8")):

        def loss(trainable, base=base):
            return adapt(apply_fn)(base, adapter.replace(params=trainable), X).sum()

        _, backward = jax.vjp(loss, adapter.params)
        kept = {(x.dtype.name, x.shape) for x in jax.tree.leaves(backward)}
        jaxpr = jax.make_jaxpr(jax.grad(loss))(adapter.params).jaxpr
        counts.append(multiplications(jaxpr))
    whole = {("float32", x.shape) for x in STACK.values()}
    assert not kept & whole
    assert not arrays_in(jaxpr, set()) & whole
    assert {("int8", x.shape) for x in STACK.values()} <= kept
    # No product runs twice that did not before.
    assert counts[1] == counts[0]


METHODS = [
    LoraConfig(r=3, lora_alpha=5, lora_bias=True),
    LoraConfig(r=3, lora_alpha=5, use_dora=True),
    LoraConfig(r=3, lora_alpha=5, init_lora_weights="pissa"),
    AdaLoraConfig(init_r=3, target_r=2),
    LoHaConfig(r=2, alpha=5),
    LoHaConfig(r=9, alpha=5),
    HRAConfig(r=4),
    IA3Config(feedforward_modules=["down"]),
]


def block(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return jnp.tanh(h @ params["down"]["kernel"] + params["down"]["bias"][None])


BLOCK = {
    "up": {"kernel": normal(16, 128, seed=4), "bias": normal(128, seed=5)},
    "down": {"kernel": normal(128, 16, seed=6), "bias": normal(16, seed=7)},
}


@pytest.mark.parametrize(
    ("config", "qtype"),
    [*((config, "nf4") for config in METHODS), (METHODS[0], "int8"), (METHODS[0], "int4")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_method(config, qtype):
    sites = find_sites(block, BLOCK, X)
    packed = quantize_base(BLOCK, sites, qtype)
    config = dataclasses.replace(config, target_modules=["up", "down"])
    adapter = init_adapter(KEY, config, sites, packed)
    adapter = adapter.replace(params=redraw(adapter.params))

    def total(trainable, function, base):
        return jnp.sin(function(base, adapter.replace(params=trainable))).sum()

    slope = functools.partial(jax.value_and_grad(total), adapter.params)
    got = slope(lambda p, a: adapt(block)(p, a, X), packed)
    want = slope(lambda p, a: block(merge(p, a), X), dense(packed))
    assert error(got, want) < 1e-5
    merged = merge(packed, adapter, dequantize=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, BLOCK)
    chex.assert_trees_all_close(
        block(merged, X), adapt(block)(packed, adapter, X), rtol=1e-5, atol=1e-5
    )


def test_what_the_base_becomes():
    sites = find_sites(block, BLOCK, X)
    steps = {"int8": 0.5 / 127, "int4": 0.5 / 7, "nf4": 0.153}
    for qtype, step in steps.items():
        packed = quantize_base(BLOCK, sites, qtype)
        for name in ("up", "down"):
            weight, small = BLOCK[name]["kernel"], packed[name]["kernel"]
            assert small.scale.shape == (
                (1, weight.shape[1])
                if qtype == "int8"
                else (-(-len(weight) // 64), weight.shape[1])
            )
            blocks = np.abs(weight).reshape(len(small.scale), -1, weight.shape[1])
            # No entry is further off than half the widest gap between two levels of its block.
            off = np.abs(dense(packed)[name]["kernel"] - weight).reshape(blocks.shape)
            assert (off <= step * 1.01 * blocks.max(1, keepdims=True)).all()
            np.testing.assert_array_equal(packed[name]["bias"], BLOCK[name]["bias"])
    # Half a byte an entry, and a number for every block of an output.
    assert leaf_bytes(packed) == 2 * 16 * 128 // 2 + 4 * (128 + 2 * 16) + 4 * (128 + 16)


def test_arguments_of_the_program_are_smaller():
    sites = find_sites(block, BLOCK, X)
    config = LoraConfig(r=2, target_modules=["up", "down"])
    adapter = init_adapter(KEY, config, sites)

    def reads(base):
        def loss(trainable, base):
            return adapt(block)(base, adapter.replace(params=trainable), X).sum()

        compiled = jax.jit(jax.grad(loss)).lower(adapter.params, base).compile()
        return compiled.memory_analysis().argument_size_in_bytes

    packed = quantize_base(BLOCK, sites, "nf4")
    assert reads(BLOCK) - reads(packed) == leaf_bytes(BLOCK) - leaf_bytes(packed)


def test_lookups_and_heads_stay_as_they_are():
    params = {"embed": normal(9, 8), "dense": normal(8, 8, seed=1), "head": normal(8, 9, seed=2)}

    def decode(params, ids):
        return jnp.tanh(params["embed"][ids] @ params["dense"]) @ params["head"]

    ids = jnp.arange(6).reshape(2, 3)
    packed = quantize_base(params, find_sites(decode, params, ids), "int8")
    assert isinstance(packed["dense"], qwix.QArray)
    assert packed["embed"] is params["embed"]
    assert packed["head"] is params["head"]


def test_rows_of_a_bank():
    sites = find_sites(block, BLOCK, X)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["up", "down"])
    each = {
        name: (a := init_adapter(KEY, config, sites)).replace(params=redraw(a.params, seed=i))
        for i, name in enumerate("ab")
    }
    packed = quantize_base(BLOCK, sites, "nf4")
    own = stack_adapters(each).rows(["a", None, "b", "b", "a"])
    adapted = adapt(block)
    want = adapted(dense(packed), own, X)
    np.testing.assert_allclose(adapted(packed, own, X), want, rtol=1e-5, atol=1e-6)
    one_by_one = adapt(block, batch_axes=0)(packed, own, X)
    np.testing.assert_allclose(one_by_one, want, rtol=1e-5, atol=1e-6)


def test_dropout_draws_the_same():
    sites = find_sites(block, BLOCK, X)
    config = LoraConfig(r=2, lora_alpha=5, lora_dropout=0.5, target_modules=["up", "down"])
    adapter = init_adapter(KEY, config, sites)
    adapter = adapter.replace(params=redraw(adapter.params)).train(KEY)
    packed = quantize_base(BLOCK, sites, "int8")
    got, want = (adapt(block)(base, adapter, X) for base in (packed, dense(packed)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_integers_are_sent_where_a_weight_is_gathered(qtype, kind):
    explicit = kind is AxisType.Explicit
    whole = jax.reshard if explicit else lax.with_sharding_constraint

    def model(params, x, mesh=True):
        def layer(x, own):
            up, down = (whole(own[n], P(None, None)) if mesh else own[n] for n in ("up", "down"))
            return x + jnp.tanh(x @ up) @ down, None

        return lax.scan(jax.checkpoint(layer), x, params)[0]

    # A block of either weight for each device, and more than one.
    params = {"up": normal(2, 512, 264, seed=1), "down": normal(2, 264, 512, seed=2)}
    x = normal(8, 512, seed=3)
    single = functools.partial(model, mesh=False)
    sites = find_sites(single, params, x)
    packed = quantize_base(params, sites, qtype)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=lambda site: True)
    adapter = init_adapter(KEY, config, sites)
    adapter = adapter.replace(params=jax.tree.map(lambda x: x / 8, redraw(adapter.params)))

    def slopes(apply_fn, trainable, base, x):
        def loss(trainable):
            return jnp.sin(adapt(apply_fn)(base, adapter.replace(params=trainable), x)).mean()

        return jax.value_and_grad(loss)(trainable)

    want = slopes(single, adapter.params, dense(packed), x)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(kind,))

    def split(array):
        spec = P(None, "fsdp", None) if array.shape[1] % 4 == 0 else P()
        return jax.device_put(array, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        rows = jax.device_put(x, NamedSharding(mesh, P("fsdp", None)))
        base = jax.tree.map(split, packed)
        run = jax.jit(slopes, static_argnums=0)
        text = run.lower(model, adapter.params, base, rows).compile().as_text()
        got = run(model, adapter.params, base, rows)
    assert error(got, want) < 1e-5
    sent = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text)
    sizes = [(dtype, math.prod(map(int, shape.split(",")))) for dtype, shape in sent]
    assert {dtype for dtype, size in sizes if size >= 512 * 264} <= {"s8", "u8", "s4", "u4"}
    assert sum(size >= 512 * 264 for _, size in sizes) >= 2


class TestMistakes:
    def test_merging_without_asking(self):
        sites = find_sites(block, BLOCK, X)
        adapter = init_adapter(KEY, LoraConfig(r=2, target_modules=["up"]), sites)
        packed = quantize_base(BLOCK, sites, "int8")
        with pytest.raises(ValueError, match=r"down\.kernel is quantised.*dequantize=True"):
            merge(packed, adapter)

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="`qtype` must be one of int8, int4, nf4, got 'int3'"):
            quantize_base(BLOCK, find_sites(block, BLOCK, X), "int3")

    def test_twice(self):
        sites = find_sites(block, BLOCK, X)
        with pytest.raises(ValueError, match=r"down\.kernel is quantised already"):
            quantize_base(quantize_base(BLOCK, sites, "int8"), sites, "int8")

    def test_other_params(self):
        sites = find_sites(block, BLOCK, X)
        with pytest.raises(ValueError, match=r"up: there is no up\.kernel"):
            quantize_base({"down": BLOCK["down"]}, sites, "int8")

    def test_no_merged_weight_where_that_is_forbidden(self):
        def squared(params, x):
            return x @ jnp.square(params["up"]["kernel"])

        params = {"up": {"kernel": BLOCK["up"]["kernel"]}}
        used = lambda params, x: squared(params, x) + x @ params["up"]["kernel"]  # noqa: E731
        sites = find_sites(used, params, X)
        adapter = init_adapter(KEY, LoraConfig(r=2, target_modules=["up"]), sites)
        packed = quantize_base(params, sites, "int8")
        with pytest.raises(FallbackError, match=r"up\.kernel meets \w+ as float32\[16,128\]"):
            adapt(used, on_fallback="error")(packed, adapter, X)
        got = adapt(used)(packed, adapter, X)
        np.testing.assert_allclose(got, used(dense(packed), X), rtol=1e-5, atol=1e-5)


def test_unmerging_gives_plain_weights_back():
    sites = find_sites(block, BLOCK, X)
    adapter = init_adapter(KEY, LoraConfig(r=2, lora_alpha=5, target_modules=["up"]), sites)
    adapter = adapter.replace(params=redraw(adapter.params))
    packed = quantize_base(BLOCK, sites, "nf4")
    back = unmerge(merge(packed, adapter, dequantize=True), adapter)
    chex.assert_trees_all_close(back, dense(packed), rtol=1e-5, atol=1e-6)
