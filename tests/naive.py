"""A model of every kind of weight, and what a formula makes of it, weight by weight."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from models import mlp, mlp_params, normal, scanned, scanned_params
from zoo_jax import dilated_both_ways, einsum_attention, lookups
from zoo_linen import linen_conv2d, linen_grouped_conv

from peftjax import LoraConfig, find_sites, init_adapter

KEY = jax.random.key(0)
CASES = [einsum_attention, lookups, linen_conv2d, linen_grouped_conv, dilated_both_ways]


def convolutions(params, x):
    """Two scanned convolutions: a stack of kernels."""
    dims = ("NWC", "WIO", "NWC")

    def layer(x, kernel):
        h = lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=dims)
        return x + jnp.tanh(h), None

    return lax.scan(layer, x, params["kernel"])[0]


@functools.cache
def house():
    """Every kind of weight in one model, in double precision."""
    built = {case.name: case.build(KEY, jnp.float64) for case in CASES}
    params = {name: params for name, (_, params, _) in built.items()}
    params |= {"mlp": mlp_params(jnp.float64), **scanned_params(dtype=jnp.float64)}
    params["kernels"] = {"kernel": normal(2, 3, 6, 6, dtype=jnp.float64)}
    x = normal(4, 6, seed=9, std=1, dtype=jnp.float64)

    def apply_fn(params):
        outputs = {name: apply(params[name], *args) for name, (apply, _, args) in built.items()}
        outputs["kernels"] = convolutions(params["kernels"], x[None])
        return outputs | {"mlp": mlp(params["mlp"], x), "scanned": scanned(params, x)}

    return apply_fn, params, find_sites(apply_fn, params)


def drawn(config, sites, params=None, std=1.0, dtype=None):
    """An adapter with all its arrays drawn; the product of many small numbers would vanish.

    Its own start is never computed: compiling that takes longer than all the rest.
    """

    def make(params):
        return init_adapter(KEY, config, sites, params, dtype=dtype)

    adapter, rng = jax.eval_shape(make, params), np.random.default_rng(3)

    def draw(x):
        return jnp.asarray(std * rng.normal(size=x.shape), x.dtype)

    buffers = jax.jit(lambda params: make(params).buffers)(params)
    return adapter.replace(params=jax.tree.map(draw, adapter.params), buffers=buffers)


def empty(config, sites, params):
    """An adapter of zeros: errors ask for shapes alone."""
    adapter = jax.eval_shape(lambda params: init_adapter(KEY, config, sites, params), params)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), adapter)


def check_plain(adapter, sites, params=None):
    """Plain LoRA of scale 1, which its config describes."""
    config = adapter.config
    assert config == LoraConfig(
        r=config.r,
        lora_alpha=config.r,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.rank_pattern,
        target_modules=config.target_modules,
        modules_to_save=config.modules_to_save,
        lora_bias=config.lora_bias,
        bias=config.bias,
    )
    fresh = jax.eval_shape(lambda params: init_adapter(KEY, config, sites, params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        (fresh.params, fresh.buffers), (adapter.params, adapter.buffers)
    )
    assert fresh.sites.sites == adapter.sites.sites
    assert set(fresh.saved) == set(adapter.saved)
    assert all((own["scaling"] == 1).all() for own in adapter.buffers.values())


def rebuilt(params, adapter, formula):
    """The params with every weight, or layer of one, replaced by ``formula(name, weight, own)``.

    The weight is laid out (*in, *out).
    """
    params = jax.tree.map(np.array, params)
    for site in adapter.sites.values():
        *modules, leaf = site.path.split(".")
        weight = functools.reduce(operator.getitem, modules, params)[leaf]
        laid = weight.transpose(*site.stack_axes, *site.in_axes, *site.out_axes)
        own = jax.tree.map(np.asarray, adapter.params[site.name])
        if not site.stack_axes:
            laid[...] = formula(site.name, laid, own)
            continue
        for i, layer in enumerate(site.layers or range(len(laid))):
            layers_own = {name: array[i] for name, array in own.items()}
            laid[layer] = formula(f"{site.name}.{layer}", laid[layer], layers_own)
    return jax.tree.map(jnp.asarray, params)


def finite_differences(loss, params, step=1e-5):
    """The central differences of a function in every trainable number."""
    flat, unravel = ravel_pytree(params)

    def slope(direction):
        ahead, behind = (loss(unravel(flat + sign * step * direction)) for sign in (1, -1))
        return (ahead - behind) / (2 * step)

    return unravel(lax.map(slope, jnp.eye(flat.size)))
