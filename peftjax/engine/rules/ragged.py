"""Ragged dot products: the rows of x are sorted by group, and each group has its own weight."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from peftjax.engine.linear import Linear, along, product_dtype
from peftjax.engine.packed import dense
from peftjax.engine.routes import Route, RouteError
from peftjax.engine.views import Role, View, layout


def usage(params: dict[str, Any], position: int, shape: tuple[int, ...]) -> tuple[Role, ...] | str:
    """The role a ragged dot product gives to each axis of the grouped weight."""
    numbers = params["ragged_dot_dimension_numbers"]
    (contract_x, contract_w), (batch_x, _) = numbers.dot_dimension_numbers
    if position != 1 or len(numbers.rhs_group_dimensions) != 1:
        return "the weight is not the grouped side of the ragged product"
    if batch_x or set(numbers.lhs_ragged_dimensions) & set(contract_x):
        return "the ragged product has batch axes or a ragged sum"
    return tuple(
        "stack" if axis in numbers.rhs_group_dimensions else "in" if axis in contract_w else "out"
        for axis in range(len(shape))
    )


def linear(
    view: View,
    transposed: bool,
    position: int,
    operands: list[jax.Array],
    params: dict[str, Any],
    out: Any,
) -> tuple[Linear, jax.Array] | str:
    """The weight as the grouped side of a ragged dot product."""
    x, _, group_sizes, *offset = operands
    if offset:
        return "the ragged product starts at an offset"
    numbers = params["ragged_dot_dimension_numbers"]
    (contract_x, contract_w), _ = numbers.dot_dimension_numbers
    (ragged_x,), (group_w,) = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    parts = layout(view)
    first_dims, second_dims = (parts["B"], parts["A"]) if transposed else (parts["A"], parts["B"])
    free_x = [axis for axis in range(x.ndim) if axis not in contract_x]
    row, dtype = free_x.index(ragged_x), product_dtype(x, view)

    def grouped(
        x: jax.Array, w: jax.Array, cx: list[int], cw: list[int], ragged: int, group: int
    ) -> jax.Array:
        return lax.ragged_dot_general(
            x,
            w,
            group_sizes,
            lax.RaggedDotDimensionNumbers(((cx, cw), ((), ())), [ragged], [group]),
            precision=params["precision"],
        )

    def base(x: jax.Array) -> jax.Array:
        return lax.ragged_dot_general(x, dense(view.base), group_sizes, **params)

    def product(
        x: jax.Array, first: jax.Array, second: jax.Array, route: Route | None
    ) -> jax.Array:
        if route is not None:
            raise RouteError("its x is sorted by group, which mixes up rows and tokens")
        inner = grouped(
            x.astype(dtype),
            first.astype(dtype),
            list(contract_x),
            [first_dims.index(axis) for axis in contract_w],
            ragged_x,
            first_dims.index(group_w),
        )
        rank = second_dims.index(None)
        return grouped(
            inner,
            second.astype(dtype),
            [inner.ndim - 1],
            [rank],
            row,
            second_dims.index(group_w),
        )

    def by_row(scale: jax.Array) -> jax.Array:
        """The scale of each row's group; rows beyond the last group take any."""
        total = x.shape[ragged_x]
        return jnp.repeat(scale, group_sizes, axis=0, total_repeat_length=total)

    x_axis = dict(zip(contract_w, contract_x, strict=True))
    free_w = [a for a in range(view.base.ndim) if a != group_w and a not in contract_w]
    ins, outs = view.dims("in"), view.dims("out")
    if transposed:
        ins, outs = outs, ins

    def scale_x(x: jax.Array, scale: jax.Array) -> jax.Array:
        x = x.astype(dtype)
        return x * along(by_row(scale), (ragged_x, *(x_axis[axis] for axis in ins)), x)

    def along_y(y: jax.Array, part: jax.Array) -> jax.Array:
        axes = (row, *(len(free_x) + free_w.index(axis) for axis in outs))
        return along(by_row(part), axes, y)

    use = Linear(
        base,
        product,
        scale_x,
        scale_y=lambda y, s: y * along_y(y, s),
        shift_y=lambda y, s: y + along_y(y, s),
        tokens=x.shape[ragged_x] // max(1, group_sizes.shape[0]),
        transposed=transposed,
    )
    return use, x
