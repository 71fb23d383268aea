"""Weights that meet one x: their first factors are one product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import equations, near, normal, redraw

import peftjax

KEY = jax.random.key(0)
SHAPES = {"q": (6, 2, 3), "k": (6, 4), "v": (5, 6)}


def heads(params, x):
    """q has heads of its own, v lies transposed; all are cast on the way."""
    q, k, v = (params[name]["kernel"].astype(x.dtype) for name in SHAPES)
    y = jnp.einsum("bti,ihd->bthd", x, q).reshape(*x.shape[:2], -1)
    return jnp.concatenate([y, x @ (2 * k), jnp.tanh(x @ v.T)], -1)


def made(config, dtype=jnp.float32):
    """Params, an adapter and x."""
    kernels = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    params = {name: {"kernel": kernel.astype(dtype)} for name, kernel in kernels.items()}
    x = normal(2, 5, 6, std=1).astype(dtype)
    sites = peftjax.find_sites(heads, params, x)
    adapter = peftjax.init_adapter(KEY, config(target_modules=list(SHAPES)), sites, params)
    return params, adapter.replace(params=redraw(adapter.params)), x


def products(adapters, params, x):
    """The matrix products of an adapted model."""
    jaxpr = jax.make_jaxpr(peftjax.adapt(heads))(params, adapters, x)
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]


lora = functools.partial(peftjax.LoraConfig, r=2, lora_alpha=5, rank_pattern={"v": 3})
adalora = functools.partial(peftjax.AdaLoraConfig, init_r=3, target_r=2, lora_alpha=5)
loha = functools.partial(peftjax.LoHaConfig, r=1, alpha=5)


@pytest.mark.parametrize("config", [lora, adalora, loha])
def test_they_are(config):
    params, adapter, x = made(config)
    assert len(products(adapter, params, x)) == 3 + 1 + 3
    assert len(products(adapter, params, x.astype(jnp.bfloat16))) == 3 + 1 + 3
    # Of two adapters, too.
    assert len(products([adapter, adapter], params, x)) == 3 + 1 + 6


def test_the_product_is_as_wide_as_all_ranks():
    params, adapter, x = made(lora)
    shapes = [eqn.outvars[0].aval.shape for eqn in products(adapter, params, x)]
    assert (2, 5, 2 + 2 + 3) in shapes


@pytest.mark.parametrize("config", [lora, adalora])
def test_values_and_gradients_are_those_of_merging(config):
    with jax.enable_x64(True):
        params, adapter, x = made(config, jnp.float64)

        def adapted(trainable, x):
            own = adapter.replace(params=trainable)
            return peftjax.adapt(heads)(params, [own, own], x)

        def merged(trainable, x):
            own = adapter.replace(params=trainable)
            return heads(peftjax.merge(params, [own, own]), x)

        near(adapted(adapter.params, x), merged(adapter.params, x))
        slope = lambda function: jax.grad(  # noqa: E731
            lambda *args: jnp.square(function(*args)).sum(), argnums=(0, 1)
        )(adapter.params, x)
        near(slope(adapted), slope(merged), 1e-9)


def test_not_where_each_weight_has_an_x_of_its_own():
    """Dropout draws a mask for each, and rows have factors of their own."""
    params, adapter, x = made(functools.partial(lora, lora_dropout=0.5))
    assert len(products(adapter, params, x)) == 3 + 1 + 3
    assert len(products(adapter.train(KEY), params, x)) == 3 + 3 + 3
    bank = peftjax.stack_adapters({"a": adapter})
    rows = bank.rows(["a", None])
    out = peftjax.adapt(heads)(params, rows, x)
    np.testing.assert_allclose(out[0], peftjax.adapt(heads)(params, adapter, x)[0], atol=1e-5)


def test_scales_of_the_input_part_them():
    """What IA3 does to x before one weight is nothing that the others see."""
    config = functools.partial(peftjax.IA3Config, feedforward_modules=["k"])
    params, ia3, x = made(config)
    _, own, _ = made(lora)
    with jax.default_matmul_precision("highest"):
        out = peftjax.adapt(heads)(params, [ia3, own], x)
        near(out, heads(peftjax.merge(params, [ia3, own]), x), 1e-5)
    # k is by itself, q and v are not.
    assert len(products([ia3, own], params, x)) == 3 + 2 + 3
