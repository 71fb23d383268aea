"""Convolutions: one to three dimensions, strided, dilated, grouped."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from peftjax.engine.linear import Linear, along
from peftjax.engine.packed import dense
from peftjax.engine.routes import Route, gated
from peftjax.engine.views import Role, View, Window, layout


def usage(params: dict[str, Any], position: int, shape: tuple[int, ...]) -> tuple[Role, ...] | str:
    """The role a convolution gives to each axis of its kernel."""
    if position == 0:
        return "the weight is the image of a convolution, not its kernel"
    if params["batch_group_count"] != 1:
        return "the convolution groups its batch"
    out_axis = params["dimension_numbers"].rhs_spec[0]
    return tuple("out" if axis == out_axis else "in" for axis in range(len(shape)))


def window(params: dict[str, Any]) -> Window:
    """How a convolution moves its kernel over its image."""
    return Window(
        dilated=any(step != 1 for step in params["rhs_dilation"]),
        spread=any(step != 1 for step in params["lhs_dilation"]),
        uneven=any(len(set(params[name])) > 1 for name in ("window_strides", "padding")),
    )


def linear(
    view: View,
    transposed: bool,
    position: int,
    operands: list[jax.Array],
    params: dict[str, Any],
    out: Any,
) -> tuple[Linear, jax.Array] | str:
    """The weight as the kernel of a convolution."""
    if transposed or view.dims("stack"):
        return "a convolution applies one kernel, from its in-axes to its out-axis"
    numbers = params["dimension_numbers"]
    out_axis, in_axis, *spatial = numbers.rhs_spec
    groups = params["feature_group_count"]
    # JAX 0.10.0 has no out_sharding here yet.
    named = ("precision", "preferred_element_type", "out_sharding")
    options = {name: params[name] for name in named if name in params}
    parts = layout(view)
    channels = parts["in_scale"].index(in_axis)
    for layer in view.layers:
        scale = layer.factors.in_scale
        # A scale of its own for every channel of x, all groups' together, is x's own as well.
        if scale is not None and any(
            n != 1 for i, n in enumerate(scale.shape[: len(parts["in_scale"])]) if i != channels
        ):
            return "its in-scale differs between the taps of the kernel"

    def base(x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, dense(view.base), **params)

    def product(
        x: jax.Array, first: jax.Array, second: jax.Array, route: Route | None
    ) -> jax.Array:
        # The first kernel keeps the taps and gives each group its own copy of the rank features;
        # the second has one tap and, grouped alike, sees exactly those of its group.
        down = jnp.moveaxis(first.astype(x.dtype), -1, out_axis)
        down = jnp.concatenate([down] * groups, axis=out_axis) if groups > 1 else down
        inner = lax.conv_general_dilated(x, down, **params)
        batch, rank, *image = numbers.out_spec
        inner = gated(inner, route, (batch, *image), rank=rank, copies=groups)
        up = second.astype(x.dtype)
        up = up.T if in_axis > out_axis else up
        up = lax.expand_dims(up, sorted(spatial))
        return lax.conv_general_dilated(
            inner,
            up,
            window_strides=(1,) * len(spatial),
            padding="VALID",
            dimension_numbers=lax.ConvDimensionNumbers(
                numbers.out_spec, numbers.rhs_spec, numbers.out_spec
            ),
            feature_group_count=groups,
            **options,
        )

    def scale_x(x: jax.Array, scale: jax.Array) -> jax.Array:
        channels_of_x = x.shape[numbers.lhs_spec[1]]
        scale = jnp.tile(scale.ravel(), channels_of_x // scale.size)
        return x * along(scale, (numbers.lhs_spec[1],), x)

    def along_y(y: jax.Array, part: jax.Array) -> jax.Array:
        return along(part, (numbers.out_spec[1],), y)

    use = Linear(
        base,
        product,
        scale_x,
        scale_y=lambda y, s: y * along_y(y, s),
        shift_y=lambda y, s: y + along_y(y, s),
        tokens=out.size // max(1, out.shape[numbers.out_spec[1]]),
        row_x=numbers.lhs_spec[0],
        row_y=numbers.out_spec[0],
    )
    return use, operands[0]
