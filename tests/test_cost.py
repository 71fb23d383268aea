"""What adapters cost on a block of real size, as XLA counts it. Nothing is run here."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import pytest
from models import equations, scanned, scanned_params

from peftjax import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    XLoraConfig,
    adapt,
    find_sites,
    init_adapter,
    init_xlora,
    rank_allocator,
    stack_adapters,
)
from peftjax.routes import Rows

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def block():
    params, x = llama.params(), llama.tokens()
    return params, x, find_sites(llama.block, params, x)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def gradient(function):
    """Output and gradient of a block inside a model.

    The output goes on to the next block, and the cotangent comes back from there.
    """

    def pullback(trainable, cotangent, *args):
        out, vjp = jax.vjp(lambda t: function(t, *args), trainable)
        return out, vjp(cotangent)

    return pullback


@pytest.fixture(scope="module")
def floor(block):
    """The same block with a trainable bias where the adapter would be."""
    params, x, sites = block
    biases = {s.name: jax.ShapeDtypeStruct(s.out_shape, jnp.float32) for s in sites.values()}
    return flops(
        gradient(lambda biases, params, x: llama.block(params, x, biases)), biases, x, params, x
    )


def test_every_linear_layer_is_found(block):
    names = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert set(block[2]) == names


def adapter_of(config, block):
    """The shapes of an adapter of every linear layer."""
    params, _, sites = block
    config = dataclasses.replace(config, target_modules="all-linear")
    return jax.eval_shape(lambda params: init_adapter(KEY, config, sites, params), params)


def adapted_gradient(trainable, cotangent, params, adapter, x):
    adapted = adapt(llama.block, on_fallback="error")
    return gradient(lambda t: adapted(params, adapter.replace(params=t), x))(trainable, cotangent)


LORA = LoraConfig(r=8, lora_alpha=16)
DORA = LoraConfig(r=8, lora_alpha=16, use_dora=True)
LOHA = LoHaConfig(r=8, alpha=16)
IA3 = IA3Config(feedforward_modules=".*down_proj")


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        (LORA, 1.01),
        (DORA, 1.015),
        (LOHA, 1.045),
        (HRAConfig(r=8), 1.01),
        (IA3, 1.005),
        (AdaLoraConfig(init_r=12), 1.01),
    ],
    ids=["lora", "dora", "loha", "hra", "ia3", "adalora"],
)
def test_gradient_flops(config, bound, block, floor):
    params, x, _ = block
    adapter = adapter_of(config, block)
    own = flops(adapted_gradient, adapter.params, x, params, adapter, x)
    assert 1.0 < own / floor <= bound


@pytest.mark.parametrize(
    "config",
    [LORA, DORA, LOHA, HRAConfig(r=8), HRAConfig(r=64), HRAConfig(r=8, apply_GS=True), IA3],
    ids=["lora", "dora", "loha", "hra", "hra_64", "hra_gs", "ia3"],
)
def test_nothing_as_large_as_a_weight_is_made(config, block):
    """Not of any shape: of that size there may only be activations, which have the tokens' axis."""
    params, x, _ = block
    adapter = adapter_of(config, block)
    jaxpr = jax.make_jaxpr(adapted_gradient)(adapter.params, x, params, adapter, x)
    sizes = {math.prod(site.shape) for site in block[2].values()}
    made = [
        (eqn.primitive.name, var.aval.shape)
        for eqn in equations(jaxpr)
        for var in eqn.outvars
        if math.prod(shape := getattr(var.aval, "shape", ())) in sizes and llama.TOKENS not in shape
    ]
    # The base's own transposes, for the gradient of x, are all there is.
    assert {name for name, _ in made} <= {"transpose"}


def test_a_high_rank_of_loha_is_fused(block, floor):
    """Rank 60 would be rank 3,600 as factors; built, it is one product more in the backward."""
    params, x, _ = block
    adapter = adapter_of(LoHaConfig(r=60, alpha=16), block)
    jaxpr = jax.make_jaxpr(adapted_gradient)(adapter.params, x, params, adapter, x)
    ranked = [v for eqn in equations(jaxpr) for v in eqn.outvars if 60**2 in v.aval.shape]
    assert not ranked
    own = flops(adapted_gradient, adapter.params, x, params, adapter, x)
    assert own / floor <= 1.6


def test_the_rank_allocator_adds_little_to_a_step(block):
    """At most 2% of its FLOPs, and three more copies of the adapter in memory."""
    params, x, _ = block
    adapter = adapter_of(AdaLoraConfig(init_r=12, target_r=8, total_step=1000), block)
    steps = {}
    for name in ("plain", "allocated"):
        sgd = optax.sgd(1e-2)
        optimizer = rank_allocator(sgd, adapter) if name == "allocated" else sgd

        def step(trainable, state, cotangent, params, adapter, x, optimizer=optimizer):
            _, (grads,) = adapted_gradient(trainable, cotangent, params, adapter, x)
            return optimizer.update(grads, state, trainable)

        state = jax.eval_shape(optimizer.init, adapter.params)
        args = (adapter.params, state, x, params, adapter, x)
        compiled = jax.jit(step).lower(*args).compile()
        steps[name] = compiled.cost_analysis()["flops"], state
    (plain, _), (allocated, state) = steps["plain"], steps["allocated"]
    assert allocated / plain <= 1.02
    own = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(adapter.params))
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert kept <= 3 * own


def test_scanned_costs_what_unrolled_costs():
    """XLA counts the body of a loop once: one body is one layer's share, adapter included."""

    def unrolled(params, x):
        for i in range(4):
            layer = jax.tree.map(lambda w, i=i: w[i : i + 1], params["layers"])
            x = scanned({"layers": layer}, x)
        return x

    params = jax.eval_shape(scanned_params)
    x = jax.ShapeDtypeStruct((64, 6), jnp.float32)
    config = LoraConfig(r=2, target_modules=["up", "down"])
    counts = []
    for function in (scanned, unrolled):
        sites = find_sites(scanned, params, x)
        adapter = jax.eval_shape(lambda sites=sites: init_adapter(KEY, config, sites))
        base = flops(lambda params, x, f=function: f(params, x), params, x)
        own = flops(
            lambda params, adapter, x, f=function: adapt(f)(params, adapter, x), params, adapter, x
        )
        counts.append(own - base)
    np.testing.assert_allclose(4 * counts[0], counts[1], rtol=0.05)


def decoder(params, ids, biases=None):
    """Four of the blocks, scanned, between a table and a head."""

    def layer(x, own):
        return llama.block(*own[:1], x, *own[1:]), None

    layers = (params["layers"],) if biases is None else (params["layers"], biases)
    # Unrolled only to count: XLA takes a loop's body once, and a body is what is scanned.
    x, _ = jax.lax.scan(layer, params["embed"][ids], layers, unroll=4)
    return x @ params["head"]


@pytest.mark.parametrize(("experts", "bound"), [(4, 1.03), (16, 1.08)])
def test_xlora_costs_two_forwards_and_one_backward(experts, bound):
    def stacked(shape):
        return jax.ShapeDtypeStruct((4, *shape.shape), shape.dtype)

    params = {
        "embed": jax.ShapeDtypeStruct((1000, llama.WIDTH), jnp.bfloat16),
        "layers": jax.tree.map(stacked, llama.params()),
        "head": jax.ShapeDtypeStruct((llama.WIDTH, 1000), jnp.bfloat16),
    }
    ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    sites = find_sites(decoder, params, ids)

    def make():
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        adapter = init_adapter(KEY, config, sites)
        many = {str(i): adapter for i in range(experts)}
        return init_xlora(KEY, XLoraConfig(), many, sites)

    adapter = jax.eval_shape(make)
    cotangent = jax.ShapeDtypeStruct((1, 1024, 1000), jnp.bfloat16)
    biases = {
        site.name.removeprefix("layers."): stacked(jax.ShapeDtypeStruct(site.out_shape, "float32"))
        for site in sites.values()
        if site.stack_axes
    }

    def base_gradient(biases, cotangent, params, ids):
        return gradient(lambda biases: decoder(params, ids, biases))(biases, cotangent)

    def own_gradient(trainable, cotangent, params, adapter, ids):
        adapted = adapt(decoder, on_fallback="error")
        run = gradient(lambda t: adapted(params, adapter.replace(params=t), ids))
        return run(trainable, cotangent)

    floor = flops(decoder, params, ids) + flops(base_gradient, biases, cotangent, params, ids)
    own = flops(own_gradient, adapter.params, cotangent, params, adapter, ids)
    assert 1.0 < own / floor <= bound


def test_a_row_with_its_own_adapter_costs_what_one_adapter_costs():
    """64 rows of 16 tokens over 64 adapters."""
    params, x = llama.params(), jax.ShapeDtypeStruct((64, 16, llama.WIDTH), jnp.bfloat16)
    sites = find_sites(llama.block, params, x)

    def make():
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        adapter = init_adapter(KEY, config, sites)
        return adapter, stack_adapters({str(i): adapter for i in range(64)}).adapter

    one, many = jax.eval_shape(make)
    adapted = adapt(llama.block, on_fallback="error")
    counts = [
        flops(lambda params, own, x: adapted(params, own, x), params, one, x),
        flops(
            lambda params, own, index, x: adapted(params, own.replace(route=Rows(index)), x),
            params,
            many,
            jax.ShapeDtypeStruct((64,), jnp.int32),
            x,
        ),
    ]
    assert 1.0 <= counts[1] / counts[0] <= 1.005


def test_no_cotangent_is_laid_out_anew():
    """The gradient of a second factor sums over rows and positions; XLA copies nothing large."""
    rows, length, width, hidden = 4, 6, 24, 56
    params = {
        "up": jax.ShapeDtypeStruct((width, hidden), jnp.float32),
        "down": jax.ShapeDtypeStruct((hidden, width), jnp.float32),
    }
    x = jax.ShapeDtypeStruct((rows, length, width), jnp.float32)

    def model(params, x):
        return jax.nn.gelu(x @ params["up"]) @ params["down"]

    sites = find_sites(model, params, x)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"])
    adapter = jax.eval_shape(lambda: init_adapter(KEY, config, sites))

    def loss(trainable, adapter, params, x):
        return jnp.sin(adapt(model)(params, adapter.replace(params=trainable), x)).sum()

    program = jax.jit(jax.grad(loss)).lower(adapter.params, adapter, params, x).compile()
    moved = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", program.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in moved]
    assert all(size < rows * length * width for size in sizes), moved
