"""Dot products: the weight on either side, of any number of axes, batched or not."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from peftjax.engine import compat
from peftjax.engine.linear import Linear, along, product_dtype
from peftjax.engine.packed import dense
from peftjax.engine.routes import Route, gated
from peftjax.engine.views import Role, View, layout
from peftjax.factors import accumulation_dtype


def usage(params: dict[str, Any], position: int, shape: tuple[int, ...]) -> tuple[Role, ...]:
    """The role a dot product gives to each axis of the weight."""
    contract, batch = params["dimension_numbers"]
    return tuple(
        "in" if axis in contract[position] else "stack" if axis in batch[position] else "out"
        for axis in range(len(shape))
    )


def numbers(
    params: dict[str, Any], position: int
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]:
    """The axes that are summed over, of x and of the weight, and those that are batched."""
    contract, batch = params["dimension_numbers"]
    other = 1 - position
    return (contract[other], contract[position]), (batch[other], batch[position])


def linear(
    view: View,
    transposed: bool,
    position: int,
    operands: list[jax.Array],
    params: dict[str, Any],
    out: Any,
) -> tuple[Linear, jax.Array]:
    """The weight as one side of a ``dot_general``."""
    (contract_x, contract_w), (batch_x, batch_w) = numbers(params, position)
    parts = layout(view)
    first_dims, second_dims = (parts["B"], parts["A"]) if transposed else (parts["A"], parts["B"])
    free_w = [axis for axis in range(view.base.ndim) if axis not in (*contract_w, *batch_w)]
    out_sharding = compat.explicit_sharding(out, compat.explicit_spec(out))
    n_batch = len(batch_w)

    def multiply(x: jax.Array, w: jax.Array, axes: Any, **kwargs: Any) -> jax.Array:
        if position == 1:
            return lax.dot_general(x, w, axes, **kwargs)
        (cx, cw), (bx, bw) = axes
        return lax.dot_general(w, x, ((cw, cx), (bw, bx)), **kwargs)

    def base(x: jax.Array) -> jax.Array:
        axes = ((contract_x, contract_w), (batch_x, batch_w))
        own = {key: value for key, value in params.items() if key != "dimension_numbers"}
        return multiply(x, dense(view.base), axes, **own)

    x = operands[1 - position]
    dtype = product_dtype(x, view)
    options = product_options(params, dtype)

    def features(x: jax.Array, first: jax.Array) -> jax.Array:
        free_x = [axis for axis in range(x.ndim) if axis not in (*contract_x, *batch_x)]
        spec = compat.explicit_spec(x)
        inner_spec = spec and [*(spec[a] for a in (*batch_x, *free_x)), None]
        return lax.dot_general(
            x.astype(dtype),
            first.astype(dtype),
            (
                (contract_x, [first_dims.index(axis) for axis in contract_w]),
                (batch_x, [first_dims.index(axis) for axis in batch_w]),
            ),
            out_sharding=compat.explicit_sharding(x, inner_spec),
            **options,
        )

    def expand(inner: jax.Array, second: jax.Array, route: Route | None) -> jax.Array:
        second = second.astype(dtype)
        # The stack of the route in the order of the batch.
        along_stack = [list(batch_w).index(axis) for axis in view.dims("stack")]
        free = range(n_batch, inner.ndim - 1)
        inner = gated(inner, route, free, stack=along_stack).astype(dtype)
        stack, tokens = inner.shape[:n_batch], inner.shape[n_batch:-1]
        # The gradient of the second factor is a sum over the tokens. One over several axes makes
        # XLA lay out all that it sums anew on a CPU; axes that a mesh may split stay as they are.
        joined = len(tokens) > 1 and not compat.on_mesh(inner)
        if joined:
            inner = inner.reshape(*stack, math.prod(tokens), inner.shape[-1])
        axes = (
            ([inner.ndim - 1], [second_dims.index(None)]),
            (list(range(n_batch)), [second_dims.index(axis) for axis in batch_w]),
        )
        explicit = compat.explicit_spec(inner) is not None
        own = out_sharding if explicit else None
        y = multiply(inner, second, axes, out_sharding=own, **options)
        if not joined:
            return y
        kept = [n for n, axis in zip(second.shape, second_dims, strict=True) if axis in free_w]
        return y.reshape(*stack, *((*tokens, *kept) if position == 1 else (*kept, *tokens)))

    def axis_of_y(axis: int, y_ndim: int) -> int:
        if axis in batch_w:
            return list(batch_w).index(axis)
        start = n_batch if position == 0 else y_ndim - len(free_w)
        return start + free_w.index(axis)

    x_axis = dict(zip((*contract_w, *batch_w), (*contract_x, *batch_x), strict=True))
    stack, ins, outs = view.dims("stack"), view.dims("in"), view.dims("out")
    x_dims, y_dims = (
        (*stack, *(outs if transposed else ins)),
        (*stack, *(ins if transposed else outs)),
    )

    def along_y(y: jax.Array, part: jax.Array) -> jax.Array:
        return along(part, tuple(axis_of_y(axis, y.ndim) for axis in y_dims), y)

    def scale_x(x: jax.Array, scale: jax.Array) -> jax.Array:
        x = x.astype(dtype)
        return x * along(scale, tuple(x_axis[axis] for axis in x_dims), x)

    free_x = [axis for axis in range(x.ndim) if axis not in x_axis.values()]
    use = Linear(
        base,
        product=lambda x, first, second, route: expand(features(x, first), second, route),
        expand=expand,
        scale_x=scale_x,
        scale_y=lambda y, s: y * along_y(y, s),
        shift_y=lambda y, s: y + along_y(y, s),
        tokens=math.prod(x.shape[axis] for axis in free_x),
        transposed=transposed,
        row_x=free_x[0] if free_x else None,
        row_y=n_batch + (len(free_w) if position == 0 else 0) if free_x else None,
    )
    return use, x


def tapped(
    params: dict[str, Any], position: int, operands: list[jax.Array]
) -> tuple[jax.Array, int] | None:
    """What the weight is applied to, with its features where the result has those of the weight.

    Returns it and the axis of its features; None if the weight keeps more axes than one.
    """
    contract, batch = params["dimension_numbers"]
    x, w = operands[1 - position], operands[position]
    if w.ndim - len(contract[position]) - len(batch[position]) != 1:
        return None
    contract_x, batch_x = contract[1 - position], batch[1 - position]
    free_x = [axis for axis in range(x.ndim) if axis not in (*contract_x, *batch_x)]
    x = jnp.transpose(x, (*batch_x, *free_x, *contract_x))
    x = x.reshape(*x.shape[: x.ndim - len(contract_x)], -1)
    axis = len(batch_x) if position == 0 else x.ndim - 1
    return jnp.moveaxis(x, -1, axis), axis


def product_options(params: dict, dtype: jnp.dtype) -> dict[str, Any]:
    """Precision as the model asks for it; accumulation in float32 at least."""
    precision = params["precision"]
    plain = precision is None or isinstance(precision, tuple | lax.Precision)
    accumulate = accumulation_dtype(dtype) if plain else params["preferred_element_type"]
    return {"precision": precision, "preferred_element_type": accumulate}
