"""Flax NNX models of the zoo."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from zoo_case import Draw, Model, case, conv, dense, lookup

from peftjax import from_nnx


def functional(make: Callable[[nnx.Rngs], nnx.Module], draw: Draw, *inputs: jax.Array) -> Model:
    apply_fn, params = from_nnx(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return apply_fn, draw.like(params), inputs


def typed(draw: Draw, rngs: nnx.Rngs) -> dict[str, Any]:
    return {"dtype": draw.dtype, "param_dtype": draw.dtype, "rngs": rngs}


class Block(nnx.Module):
    """A residual feed-forward block, to be stacked."""

    def __init__(self, draw: Draw, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(6, **typed(draw, rngs))
        self.up = nnx.Linear(6, 9, **typed(draw, rngs))
        self.down = nnx.Linear(9, 6, use_bias=False, **typed(draw, rngs))

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


@case(
    {
        "embed": lookup(0, 1),
        "blocks.0.up": dense(0, 1, bias="blocks.0.up.bias"),
        "blocks.0.down": dense(0, 1),
        "blocks.1.up": dense(0, 1, bias="blocks.1.up.bias"),
        "blocks.1.down": dense(0, 1),
    },
    contains=["gather"],
    promotion="standard",
)
def nnx_linear(draw):
    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 6, **typed(draw, rngs))
            self.blocks = nnx.List([Block(draw, rngs) for _ in range(2)])

        def __call__(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return x

    return functional(Stack, draw, draw.ids(11, 3, 5))


@case(
    {
        "query": dense(0, (1, 2), bias="query.bias"),
        "key": dense(0, (1, 2), bias="key.bias"),
        "value": dense(0, (1, 2), bias="value.bias"),
        "out": dense((0, 1), 2, bias="out.bias"),
    },
    targets=r"query|value|out",
    contains=["dot_general"],
    promotion="standard",
)
def nnx_attention(draw):
    def attend(query, key, value, **_):
        # Flax's default is JAX's own attention, whose softmax is in single precision always.
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)

    def make(rngs):
        return nnx.MultiHeadAttention(
            num_heads=2,
            in_features=6,
            qkv_features=8,
            out_features=7,
            decode=False,
            attention_fn=attend,
            **typed(draw, rngs),
        )

    return functional(make, draw, draw.input(3, 5, 6))


@case(
    {
        "layers.up": dense(1, 2, stack=0, bias="layers.up.bias"),
        "layers.down": dense(1, 2, stack=0),
    },
    contains=["scan", "remat2"],
    promotion="standard",
)
def nnx_scan_remat(draw):
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=0)
            def make(rngs):
                return Block(draw, rngs)

            self.layers = make(rngs)

        def __call__(self, x):
            # NNX hands the layers back out of the scan, although nobody asks for them.
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            @nnx.remat
            def run(layer, x):
                return layer(x)

            return run(self.layers, x)

    return functional(Stack, draw, draw.input(2, 5, 6))


@case({"kernel": conv((0, 1, 2), 3, bias="bias")}, contains=["conv_general_dilated"])
def nnx_conv(draw):
    def make(rngs):
        return nnx.Conv(4, 6, kernel_size=(3, 2), strides=(1, 2), **typed(draw, rngs))

    return functional(make, draw, draw.input(2, 7, 8, 4))


CASES = [nnx_linear, nnx_attention, nnx_scan_remat, nnx_conv]
