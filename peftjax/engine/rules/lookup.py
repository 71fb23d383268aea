"""Lookups: the weight as a table, each index taking one row."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from peftjax.engine.linear import Linear, along
from peftjax.engine.packed import dense
from peftjax.engine.routes import Route, gated
from peftjax.engine.views import Dims, Role, View, layout
from peftjax.factors import accumulation_dtype


def usage(params: dict[str, Any], position: int, shape: tuple[int, ...]) -> tuple[Role, ...] | str:
    """The role a lookup gives to each axis of its table."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if position != 0:
        return "the weight is an index"
    picked = _picked_axes(params, shape)
    roles: list[Role] = ["in" if axis in picked else "out" for axis in range(len(shape))]
    for axis in numbers.operand_batching_dims:
        roles[axis] = "stack"
    taken = {"in": [1] * len(shape), "out": shape, "stack": sizes}
    rows = all(sizes[axis] == taken[role][axis] for axis, role in enumerate(roles))
    if not rows or not {*numbers.collapsed_slice_dims} <= {*picked}:
        return "the lookup takes slices, not rows"
    return tuple(roles)


def _picked_axes(params: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a table along which indices pick entries, in the order of the indices.

    A slice under ``vmap`` has a start for every axis: that of a whole axis is clipped to nothing.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    clips = params["mode"] is lax.GatherScatterMode.CLIP
    return tuple(
        axis
        for axis in numbers.start_index_map
        if axis in numbers.collapsed_slice_dims or not (clips and sizes[axis] == shape[axis])
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Picked:
    """The x of a lookup: which rows of the table, and what scales them."""

    indices: jax.Array
    scale: jax.Array | None = None


def linear(
    view: View,
    transposed: bool,
    position: int,
    operands: list[jax.Array],
    params: dict[str, Any],
    out: Any,
) -> tuple[Linear, _Picked] | str:
    """The weight as a table of rows."""
    if transposed:
        return "the lookup takes columns of this weight"
    if view.drops:
        return "a lookup has no input to drop from"
    scaled = any(layer.factors.out_scale is not None for layer in view.layers)
    if scaled and params["fill_value"] and not np.isnan(params["fill_value"]):
        return "an out-scale would scale what the lookup fills in"
    indices = operands[1]
    numbers = params["dimension_numbers"]
    batch_dims = indices.ndim - 1
    parts = layout(view)
    picked = _picked_axes(params, view.base.shape)
    columns = np.array([numbers.start_index_map.index(axis) for axis in picked])
    # A slice keeps the axes along which it picks one entry, as axes of size 1 of the result.
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in range(view.base.ndim) if axis not in gone]
    place_of = dict(zip(kept, numbers.offset_dims, strict=True))
    offset = [place for axis, place in place_of.items() if axis not in picked]
    ones = [place for axis, place in place_of.items() if axis in picked]
    index_place = [p for p in range(batch_dims + len(kept)) if p not in numbers.offset_dims]
    stacked = list(numbers.start_indices_batching_dims)

    def rows(table: jax.Array, dims: Dims, index: jax.Array, outside: int) -> jax.Array:
        """The rows of a factor: the index dims, then its rank if it has one.

        Indices out of range give ``outside``, which leaves what the lookup fills in.
        """
        ranked = None in dims
        return lax.gather(
            table,
            index[..., columns],
            lax.GatherDimensionNumbers(
                offset_dims=(batch_dims,) if ranked else (),
                collapsed_slice_dims=tuple(sorted(dims.index(a) for a in picked)),
                start_index_map=tuple(dims.index(a) for a in picked),
                operand_batching_dims=tuple(dims.index(a) for a in numbers.operand_batching_dims),
                start_indices_batching_dims=numbers.start_indices_batching_dims,
            ),
            tuple(n if dim is None else 1 for n, dim in zip(table.shape, dims, strict=True)),
            unique_indices=params["unique_indices"],
            indices_are_sorted=params["indices_are_sorted"],
            mode=params["mode"],
            fill_value=outside,
        )

    def in_order(y: jax.Array) -> jax.Array:
        """From (stacked index dims, other index dims, out) to the order of the lookup."""
        now = [*stacked, *(d for d in range(batch_dims) if d not in stacked)]
        places = [*(index_place[dim] for dim in now), *offset]
        y = jnp.transpose(y, sorted(range(y.ndim), key=places.__getitem__))
        return lax.expand_dims(y, ones)

    def base(x: _Picked) -> jax.Array:
        y = lax.gather(dense(view.base), x.indices, **params)
        return y if x.scale is None else y * along(x.scale, tuple(index_place), y)

    def product(x: _Picked, first: jax.Array, second: jax.Array, route: Route | None) -> jax.Array:
        inner = rows(first, parts["A"], x.indices, 0)
        if x.scale is not None:
            inner = inner * x.scale[..., None].astype(inner.dtype)
        dims = dict(zip(numbers.operand_batching_dims, stacked, strict=True))
        free = [dim for dim in range(batch_dims) if dim not in stacked]
        inner = gated(inner, route, free, stack=[dims[axis] for axis in view.dims("stack")])
        stack = [parts["B"].index(axis) for axis in numbers.operand_batching_dims]
        y = lax.dot_general(
            inner,
            second,
            (([batch_dims], [parts["B"].index(None)]), (stacked, stack)),
            preferred_element_type=accumulation_dtype(second.dtype),
        )
        return in_order(y)

    def scale_x(x: _Picked, scale: jax.Array) -> _Picked:
        dims = parts["in_scale"]
        full = [view.base.shape[axis] for axis in dims if axis is not None]
        picked = rows(jnp.broadcast_to(scale, full), dims, x.indices, 1)
        return _Picked(x.indices, picked if x.scale is None else picked * x.scale)

    def along_y(y: jax.Array, part: jax.Array) -> jax.Array:
        return along(part, (*(index_place[dim] for dim in stacked), *offset), y)

    free = [dim for dim in range(batch_dims) if dim not in stacked]
    use = Linear(
        base,
        product,
        scale_x,
        scale_y=lambda y, s: y * along_y(y, s),
        shift_y=lambda y, s: y + along_y(y, s),
        tokens=0,
        row_x=free[0] if free else None,
        row_y=index_place[free[0]] if free else None,
    )
    return use, _Picked(indices)
