"""Flax Linen models of the zoo."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from zoo_case import Draw, Model, case, conv, dense, lookup

from peftjax import from_linen


class Compact(nn.Module):
    """A module whose layers are created by a function as it runs."""

    body: Callable[..., Any]

    @nn.compact
    def __call__(self, *inputs):
        return self.body(*inputs)


def linen(body: Callable[..., Any], draw: Draw, *inputs: jax.Array) -> Model:
    module = body if isinstance(body, nn.Module) else Compact(body)
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    params = draw.like(variables["params"])
    return from_linen(module), params, inputs


def typed(dtype: Any) -> dict[str, Any]:
    """The two settings that make a Linen layer hold and compute in one dtype."""
    return {"dtype": dtype, "param_dtype": dtype}


class Block(nn.Module):
    """A residual feed-forward block, to be stacked."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(name="norm", **typed(self.dtype))(x)
        h = nn.gelu(nn.Dense(9, name="up", **typed(self.dtype))(h))
        return x + nn.Dense(x.shape[-1], use_bias=False, name="down", **typed(self.dtype))(h)


@case(
    {"up": dense(0, 1, bias="up.bias"), "down": dense(0, 1)},
    contains=["dot_general"],
    promotion="standard",
)
def linen_dense(draw):
    return linen(Block(draw.dtype), draw, draw.input(3, 5, 6))


@case(
    {
        "attention.query": dense(0, (1, 2), bias="attention.query.bias"),
        "attention.key": dense(0, (1, 2), bias="attention.key.bias"),
        "attention.value": dense(0, (1, 2), bias="attention.value.bias"),
        "attention.out": dense((0, 1), 2, bias="attention.out.bias"),
        "head": dense(0, 1, bias="head.bias"),
    },
    targets=["query", "value", "attention.out"],
    contains=["dot_general"],
)
def linen_attention(draw):
    def body(x):
        attention = nn.MultiHeadDotProductAttention(
            num_heads=2, qkv_features=8, out_features=7, name="attention", **typed(draw.dtype)
        )
        return nn.Dense(9, name="head", **typed(draw.dtype))(attention(x))

    return linen(body, draw, draw.input(3, 5, 6))


@case(
    {
        "joint": dense((0, 1), (2, 3), bias="joint.bias"),
        "batched": dense(1, 2, stack=0, bias="batched.bias"),
    },
    contains=["dot_general"],
)
def linen_dense_general(draw):
    def body(x):
        h = nn.DenseGeneral((3, 5), axis=(-2, -1), name="joint", **typed(draw.dtype))(x)
        # One weight for each of the three rows: a batched axis is a stack.
        h = nn.gelu(h).transpose(1, 0, 2)
        return nn.DenseGeneral(8, batch_dims=(0,), name="batched", **typed(draw.dtype))(h)

    return linen(body, draw, draw.input(2, 4, 6))


@case(
    {
        "strided": conv((0, 1), 2, bias="strided.bias"),
        "dilated": conv((0, 1), 2, bias="dilated.bias"),
        "pointwise": conv((0, 1), 2),
    },
    contains=["conv_general_dilated"],
)
def linen_conv1d(draw):
    def body(x):
        options = typed(draw.dtype)
        x = nn.Conv(6, (3,), strides=2, padding="CAUSAL", name="strided", **options)(x)
        x = nn.Conv(7, (4,), kernel_dilation=2, name="dilated", **options)(nn.gelu(x))
        return nn.Conv(8, (1,), use_bias=False, name="pointwise", **options)(nn.gelu(x))

    return linen(body, draw, draw.input(2, 11, 5))


@case(
    {
        "patch": conv((0, 1, 2), 3, bias="patch.bias"),
        "mixed": conv((0, 1, 2), 3, bias="mixed.bias"),
    },
    targets=r"patch|mix.*",
    contains=["conv_general_dilated"],
)
def linen_conv2d(draw):
    def body(x):
        options = typed(draw.dtype)
        x = nn.Conv(6, (3, 2), strides=(2, 1), padding="VALID", name="patch", **options)(x)
        uneven = {"kernel_dilation": (1, 2), "padding": ((1, 0), (2, 3))}
        return nn.Conv(5, (2, 3), name="mixed", **uneven, **options)(nn.gelu(x))

    return linen(body, draw, draw.input(2, 9, 7, 4))


@case({"volume": conv((0, 1, 2, 3), 4, bias="volume.bias")}, contains=["conv_general_dilated"])
def linen_conv3d(draw):
    def body(x):
        return nn.Conv(5, (2, 1, 3), strides=(1, 1, 2), name="volume", **typed(draw.dtype))(x)

    return linen(body, draw, draw.input(2, 3, 4, 6, 7))


@case(
    {
        "grouped": conv((0, 1), 2, bias="grouped.bias", groups=2),
        "depthwise": conv((0, 1), 2, bias="depthwise.bias", groups=10),
        "multiplied": conv((0, 1), 2, groups=10),
    },
    contains=["conv_general_dilated"],
)
def linen_grouped_conv(draw):
    def body(x):
        options = typed(draw.dtype)
        x = nn.Conv(10, (3,), feature_group_count=2, name="grouped", **options)(x)
        x = nn.Conv(10, (4,), feature_group_count=10, name="depthwise", **options)(nn.gelu(x))
        options |= {"feature_group_count": 10, "kernel_dilation": 2, "use_bias": False}
        return nn.Conv(20, (5,), name="multiplied", **options)(nn.gelu(x))

    return linen(body, draw, draw.input(2, 9, 6))


@case({"widen": conv((0, 1, 2), 3, bias="widen.bias")}, contains=["conv_general_dilated"])
def linen_conv_transpose(draw):
    def body(x):
        return nn.ConvTranspose(5, (3, 2), strides=(2, 1), name="widen", **typed(draw.dtype))(x)

    return linen(body, draw, draw.input(2, 4, 6, 7))


@case({"embed": lookup(0, 1), "up": dense(0, 1, bias="up.bias")}, contains=["gather"])
def linen_tied_embedding(draw):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(11, 6, name="embed", **typed(draw.dtype))
            # Added to a lookup, and yet no bias: it differs from token to token.
            position = self.param("position", nn.initializers.normal(), (5, 6), draw.dtype)
            h = embed(ids) * 6**0.5 + position[None]
            return embed.attend(nn.gelu(nn.Dense(6, name="up", **typed(draw.dtype))(h)))

    return linen(Model(), draw, draw.ids(11, 3, 5))


def stacked(draw: Draw, axis: int, policy: Callable[..., bool] | None = None) -> Model:
    """Three blocks whose weights are scanned along one axis."""
    block = nn.remat(Block, policy=policy, prevent_cse=False) if policy else Block

    def body(x):
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": axis},
            split_rngs={"params": True},
            length=3,
        )
        return scan(block(draw.dtype, name="layers"), x, None)[0]

    return linen(body, draw, draw.input(2, 5, 6))


DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
ON_AXIS_0 = {
    "layers.up": dense(1, 2, stack=0, bias="layers.up.bias"),
    "layers.down": dense(1, 2, stack=0),
}
ON_AXIS_1 = {
    "layers.up": dense(0, 2, stack=1, bias="layers.up.bias"),
    "layers.down": dense(0, 2, stack=1),
}


@case(
    ON_AXIS_0,
    contains=["scan"],
    promotion="standard",
)
def linen_scan(draw):
    return stacked(draw, axis=0)


@case(
    ON_AXIS_1,
    targets=r"layers\.(up|down)",
    contains=["scan"],
    promotion="standard",
)
def linen_scan_axis1(draw):
    return stacked(draw, axis=1)


@case(
    ON_AXIS_0,
    contains=["scan", "remat2"],
    promotion="standard",
)
def linen_scan_remat(draw):
    return stacked(draw, axis=0, policy=DOTS)


@case(
    ON_AXIS_1,
    contains=["scan", "remat2"],
    promotion="standard",
)
def linen_scan_axis1_remat(draw):
    return stacked(draw, axis=1, policy=DOTS)


@case(
    {"block.up": dense(0, 1, bias="block.up.bias"), "block.down": dense(0, 1)},
    contains=["remat2"],
    promotion="standard",
)
def linen_remat(draw):
    block = nn.remat(Block)
    return linen(lambda x: block(draw.dtype, name="block")(x), draw, draw.input(2, 5, 6))


@case(
    {
        "members.up": dense(1, 2, stack=0, bias="members.up.bias"),
        "members.down": dense(1, 2, stack=0),
    },
    contains=["dot_general"],
    promotion="standard",
)
def linen_vmap(draw):
    members = nn.vmap(Block, variable_axes={"params": 0}, split_rngs={"params": True})
    return linen(lambda x: members(draw.dtype, name="members")(x), draw, draw.input(4, 5, 6))


@case(
    {"conv": conv((0, 1), 2), "head": dense(0, 1, bias="head.bias")},
    contains=["rsqrt"],
    promotion="standard",
)
def linen_batchnorm(draw):
    def body(x):
        x = nn.Conv(6, (3,), use_bias=False, name="conv", **typed(draw.dtype))(x)
        norm = nn.BatchNorm(use_running_average=False, name="norm", **typed(draw.dtype))
        return nn.Dense(8, name="head", **typed(draw.dtype))(nn.gelu(norm(x)))

    model, x = Compact(body), draw.input(4, 7, 5)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params = draw.like(variables["params"])
    statistics = draw.like(variables["batch_stats"], dtype=draw.kept_dtype)

    def apply_fn(params, statistics, x):
        training = from_linen(model, mutable=["batch_stats"])
        return training(params, x, variables={"batch_stats": statistics})

    return apply_fn, params, (statistics, x)


def recurrent(cell: type[nn.Module], draw: Draw) -> Model:
    # The default init, a QR decomposition, has no half-precision kernel.
    options = {"recurrent_kernel_init": nn.initializers.normal(), **typed(draw.dtype)}
    return linen(nn.RNN(cell(7, **options)), draw, draw.input(2, 5, 6))


@case(
    {f"cell.i{gate}": dense(0, 1) for gate in "ifgo"}
    | {f"cell.h{gate}": dense(0, 1, bias=f"cell.h{gate}.bias") for gate in "ifgo"},
    contains=["scan"],
)
def linen_lstm(draw):
    return recurrent(nn.LSTMCell, draw)


@case(
    {f"cell.i{gate}": dense(0, 1, bias=f"cell.i{gate}.bias") for gate in "rzn"}
    | {f"cell.h{gate}": dense(0, 1) for gate in "rz"}
    | {"cell.hn": dense(0, 1, bias="cell.hn.bias")},
    targets=["ir", "iz", "in", "hr", "hz", "hn"],
    contains=["scan"],
)
def linen_gru(draw):
    return recurrent(nn.GRUCell, draw)


CASES = [
    linen_dense,
    linen_attention,
    linen_dense_general,
    linen_conv1d,
    linen_conv2d,
    linen_conv3d,
    linen_grouped_conv,
    linen_conv_transpose,
    linen_tied_embedding,
    linen_scan,
    linen_scan_axis1,
    linen_scan_remat,
    linen_scan_axis1_remat,
    linen_remat,
    linen_vmap,
    linen_batchnorm,
    linen_lstm,
    linen_gru,
]
