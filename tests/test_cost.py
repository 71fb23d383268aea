"""What adapters cost on a block of real size, as XLA counts it. Nothing is run here."""

import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
from models import equations, scanned, scanned_params

from peftjax import LoraConfig, adapt, find_sites, init_adapter

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def block():
    params, x = llama.params(), llama.tokens()
    return params, x, find_sites(llama.block, params, x)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def gradient(function):
    """The gradient as a training step has it: the cotangent of the block comes from above."""

    def pullback(trainable, cotangent, *args):
        return jax.vjp(lambda t: function(t, *args), trainable)[1](cotangent)

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


def lora(block):
    _, _, sites = block
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return jax.eval_shape(lambda: init_adapter(KEY, config, sites))


def adapted_gradient(trainable, cotangent, params, adapter, x):
    adapted = adapt(llama.block, on_fallback="error")
    return gradient(lambda t: adapted(params, adapter.replace(params=t), x))(trainable, cotangent)


def test_gradient_flops(block, floor):
    params, x, _ = block
    adapter = lora(block)
    own = flops(adapted_gradient, adapter.params, x, params, adapter, x)
    assert 1.0 < own / floor <= 1.01


def test_no_dense_product_of_the_adapter(block):
    """Of an adapter's arrays nothing may come that is as large as a weight."""
    params, x, _ = block
    adapter = lora(block)
    jaxpr = jax.make_jaxpr(adapted_gradient)(adapter.params, x, params, adapter, x)
    weights = {site.shape for site in block[2].values()}
    weights |= {shape[::-1] for shape in weights}
    made = [
        (eqn.primitive.name, var.aval.shape)
        for eqn in equations(jaxpr)
        for var in eqn.outvars
        if getattr(var.aval, "shape", ()) in weights
    ]
    # The base's own transposes, for the gradient of x, are all there is.
    assert {name for name, _ in made} <= {"transpose", "jit"}


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
