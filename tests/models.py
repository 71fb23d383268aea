"""Small models and helpers that several tests share."""

import dataclasses
from typing import ClassVar

import chex
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from peftjax.config import AdapterConfig
from peftjax.factors import BiasChange, Factors, Method


def normal(*shape, seed=0, std=0.3, dtype=jnp.float32):
    return jnp.asarray(std * np.random.default_rng(seed).normal(size=shape), dtype)


def near(got, want, tolerance=1e-10):
    chex.assert_trees_all_close(got, want, rtol=tolerance, atol=tolerance)


def redraw(tree, seed=7):
    """The tree's arrays, all drawn again with std 0.3: default inits hide errors."""
    leaves, structure = jax.tree.flatten(tree)
    drawn = [
        normal(*x.shape, seed=seed + i, dtype=x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else x
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


def mlp(params, x):
    """Two dense layers with biases: ``up`` and ``down``."""
    lead = tuple(range(x.ndim - 1))
    h = jnp.tanh(x @ params["up"]["kernel"] + jnp.expand_dims(params["up"]["bias"], lead))
    return h @ params["down"]["kernel"] + jnp.expand_dims(params["down"]["bias"], lead)


def mlp_params(dtype=jnp.float32):
    return {
        "up": {"kernel": normal(6, 9, dtype=dtype), "bias": normal(9, seed=1, dtype=dtype)},
        "down": {
            "kernel": normal(9, 5, seed=2, dtype=dtype),
            "bias": normal(5, seed=3, dtype=dtype),
        },
    }


def scanned(params, x):
    """Four scanned and rematerialised residual layers: ``layers.up`` and ``layers.down``."""

    def layer(x, own):
        lead = tuple(range(x.ndim - 1))
        h = jnp.tanh(x @ own["up"]["kernel"] + jnp.expand_dims(own["up"]["bias"], lead))
        return x + h @ own["down"]["kernel"], None

    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return lax.scan(jax.checkpoint(layer, policy=policy), x, params["layers"])[0]


def scanned_params(layers=4, dtype=jnp.float32):
    return {
        "layers": {
            "up": {
                "kernel": normal(layers, 6, 9, dtype=dtype),
                "bias": normal(layers, 9, seed=1, dtype=dtype),
            },
            "down": {"kernel": normal(layers, 9, 6, seed=2, dtype=dtype)},
        }
    }


def equations(jaxpr):
    """Every equation of a jaxpr, those of nested jaxprs included."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def named(jaxpr, *names):
    """The equations of these primitives."""
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name in names]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EverythingConfig(AdapterConfig):
    """A family that uses every part of the factors, and changes a bias in both ways."""

    peft_type: ClassVar[str] = "EVERYTHING"
    rank: int = 2
    dropout: float = 0.0


def _init(key, config, settings, weight, buffers):
    spec = weight.spec
    # A scale that differed between the taps of a kernel would be no scale of its input.
    in_scale = tuple(1 if i in spec.taps else n for i, n in enumerate(spec.in_shape))
    shapes = {
        "A": (*spec.in_shape, config.rank),
        "B": (config.rank, *spec.out_shape),
        "in_scale": in_scale,
        "out_scale": spec.out_shape,
        "bias_scale": spec.out_shape,
        "bias_shift": spec.out_shape,
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(key, shape, spec.dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _factors(config, params, buffers, weight, key):
    parts = {name: params[name] for name in ("A", "B", "in_scale", "out_scale")}
    return Factors(**parts, dropout=0.0 if weight.spec.kind == "lookup" else config.dropout)


EverythingConfig.method = Method(
    settings=lambda config, site, layer: None,
    init=_init,
    factors=_factors,
    bias=lambda config, params, buffers, weight: BiasChange(
        params["bias_scale"], params["bias_shift"]
    ),
)
