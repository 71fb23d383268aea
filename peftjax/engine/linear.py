"""Linear uses of a marked weight, and what its factors add to each.

``Linear`` says how one primitive applies the frozen weight, a product of two factors, and the
scales. ``apply`` puts them together for any number of adapters, the last one outermost:

    forward      y = s_out * (W(s_in * x) + B(A(x)))
    transposed   y = s_in * W'(s_out * x) + A'(B'(s_out * x))

Of several experts, each row or token has its own factors, or its own weights between A and B.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from peftjax.engine import compat, packed
from peftjax.engine.packed import Base, Packed
from peftjax.engine.routes import Route, RouteError, Rows, each_row
from peftjax.engine.views import Dims, Layer, Role, View, give_roles, layout, remap
from peftjax.factors import accumulation_dtype

_SWAPPED: dict[Role, Role] = {"in": "out", "out": "in", "stack": "stack"}


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear use of a weight.

    All but ``base`` also work on a single row of x, whose axis of rows then has that row alone.

    Attributes:
      base: the frozen use, a function of x.
      product: x through two factors: the one that meets x, then the other; the rank features
        between them are gated by a route.
      expand: the second half of it, from the rank features; None where it has no halves.
      scale_x: x times a scale over the stack axes and the axes that are summed over.
      scale_y: the result times a scale over the stack axes and the axes that stay.
      shift_y: the result and what is added to it, over the same axes.
      tokens: how many vectors go through the weight; of a stack, through each member.
      transposed: whether the use maps the out-space to the in-space.
      row_x: the axis of x along which the rows of a batch lie; None where they are in no order.
      row_y: that of the result.
    """

    base: Callable[[Any], jax.Array]
    product: Callable[[Any, jax.Array, jax.Array, Route | None], jax.Array]
    scale_x: Callable[[Any, jax.Array], Any]
    scale_y: Callable[[jax.Array, jax.Array], jax.Array]
    shift_y: Callable[[jax.Array, jax.Array], jax.Array]
    tokens: int
    expand: Callable[[jax.Array, jax.Array, Route | None], jax.Array] | None = None
    transposed: bool = False
    row_x: int | None = None
    row_y: int | None = None


def apply(linear: Linear, layers: Sequence[Layer], x: Any, beside: Any) -> jax.Array:
    """The use of the weight as all layers change it, in the dtype sums run in.

    ``beside`` is x once more, for the factors.
    """
    if not layers:
        y = linear.base(x)
        return y.astype(accumulation_dtype(y.dtype))
    *inner, layer = layers
    f, own = layer.factors, _routed(linear, layer.route)
    if linear.transposed:
        if f.out_scale is not None:
            x = beside = own.scale_x(x, f.out_scale)
        y = apply(linear, inner, x, beside)
        if f.in_scale is not None:
            y = own.scale_y(y, f.in_scale)
        if f.A is None or f.B is None:
            return y
        return _add(y, own.product(_dropped(beside, layer), f.B, f.A, layer.route))
    if f.in_scale is None:
        y = apply(linear, inner, x, beside)
    else:
        scaled = own.scale_x(x, f.in_scale)
        y = apply(linear, inner, scaled, scaled)
    if f.B is not None and own.expand is not None and layer.features is not None:
        y = _add(y, own.expand(layer.features, f.B, layer.route))
    elif f.A is not None and f.B is not None:
        y = _add(y, own.product(_dropped(beside, layer), f.A, f.B, layer.route))
    y = y if f.out_scale is None else own.scale_y(y, f.out_scale)
    return y if layer.shift is None else own.shift_y(y, layer.shift)


def _routed(linear: Linear, route: Route | None) -> Linear:
    """The use as one layer sees it: its factors may be those of each row's own expert."""
    if not isinstance(route, Rows):
        return linear
    if linear.row_x is None or linear.row_y is None:
        raise RouteError("its x has no rows: this product sorts them by group")
    each_x = functools.partial(each_row, route, axis=linear.row_x, to=linear.row_x)
    each_y = functools.partial(each_row, route, axis=linear.row_y, to=linear.row_y)
    each = functools.partial(each_row, route, axis=linear.row_x, to=linear.row_y)

    def product(x: Any, first: jax.Array, second: jax.Array, route: Route | None) -> jax.Array:
        return each(lambda x, a, b: linear.product(x, a, b, None), x, (first, second))

    # A row without an expert gets zeros, which leave a scale as it is.
    return dataclasses.replace(
        linear,
        product=product,
        scale_x=lambda x, s: each_x(lambda x, s: linear.scale_x(x, 1 + s), x, (s - 1,)),
        scale_y=lambda y, s: each_y(lambda y, s: linear.scale_y(y, 1 + s), y, (s - 1,)),
        shift_y=lambda y, s: each_y(linear.shift_y, y, (s,)),
    )


def _add(y: jax.Array, delta: jax.Array) -> jax.Array:
    return y + delta.astype(y.dtype)


def _dropped(x: jax.Array, layer: Layer) -> jax.Array:
    """X with entries dropped and the rest scaled up, where the layer asks for it."""
    if layer.key is None or not layer.drops:
        return x
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        assert layer.factors.A is not None, "what drops entries of x has factors"
        x = x.astype(layer.factors.A.dtype)
    key = jnp.ravel(layer.key)[0]
    for axis in compat.varying_axes(x):
        key = jax.random.fold_in(key, lax.axis_index(axis))
    keep = 1.0 - layer.factors.dropout
    mask = jax.random.bernoulli(key, keep, x.shape)
    mask = compat.place_like(mask, compat.explicit_spec(x), x)
    return jnp.where(mask, x / jnp.asarray(keep, x.dtype), jnp.zeros_like(x))


def unpacked(linear: Linear, view: View, planned: Callable[[View], Any]) -> Linear:
    """The use of a weight that is unpacked for it, and once more in the backward pass.

    So nothing keeps the whole weight in between. ``planned`` makes the use out of a view.
    """
    if not isinstance(view.base, Packed):
        return linear

    def base(own: Packed, x: Any) -> jax.Array:
        return planned(dataclasses.replace(view, base=own, layers=()))[0].base(x)

    return dataclasses.replace(linear, base=functools.partial(jax.checkpoint(base), view.base))


def orient(view: View, usage: Sequence[Role]) -> tuple[View, bool] | str:
    """Matches a use with the roles of the weight's axes.

    Returns the view, every axis with a role, and whether the use is transposed; or why the use is
    neither the weight's map nor its transpose.
    """
    known = [(have, role) for axis, role in enumerate(usage) if (have := view.role(axis))]
    if all(have == want for have, want in known):
        return give_roles(view, usage), False
    if all(_SWAPPED[have] == want for have, want in known):
        return give_roles(view, [_SWAPPED[role] for role in usage]), True
    pattern = ", ".join(f"{have} axis used as {want}" for have, want in known if have != want)
    return f"the use is neither this weight's map nor its transpose ({pattern})"


def merged(view: View) -> jax.Array:
    """The weight with its adapters built in, in the layout and dtype of the base."""
    return _built(give_roles(view, ["out"] * view.base.ndim)).astype(view.base.dtype)


def fused(view: View, change: jax.Array) -> View:
    """The weight with its adapters and then a change built in, as a weight of its own.

    The change is laid out (stack, in, out), as a method makes it.
    """
    assert not view.drops, "dropout acts on x and cannot be built in"
    weight = _built(view)
    change = jnp.transpose(change, _from_method(view)).astype(weight.dtype)
    base = (weight + compat.place_like(change, compat.explicit_spec(weight), weight)).astype(
        view.base.dtype
    )
    return dataclasses.replace(view, base=base, layers=())


def _built(view: View) -> jax.Array:
    """The weight with its adapters, in the dtype sums run in; every axis has a role."""
    view, parts = placed(view), layout(view)
    weight = packed.dense(view.base).astype(accumulation_dtype(view.base.dtype))
    for factors in (layer.factors for layer in view.layers):
        if factors.in_scale is not None:
            weight = _scaled_inputs(weight, factors.in_scale, view)
        if factors.A is not None and factors.B is not None:
            weight = weight + _change(factors.A, factors.B, view, weight.dtype)
        if factors.out_scale is not None:
            weight = weight * along(factors.out_scale, parts["out_scale"], weight)
    return weight


def _scaled_inputs(weight: jax.Array, scale: jax.Array, view: View) -> jax.Array:
    """The weight with its inputs scaled; each group of a convolution may have inputs of its own."""
    dims = layout(view)["in_scale"]
    grouped = grouped_axis(view, scale)
    if grouped is None:
        return weight * along(scale, dims, weight)
    # The outputs of a group lie side by side, so each group is a block of the out-axis.
    (out,) = view.dims("out")
    size = weight.shape[grouped]
    laid = along(scale, dims, weight)
    groups = laid.shape[grouped] // size
    laid = laid.reshape(*laid.shape[:grouped], groups, size, *laid.shape[grouped + 1 :])
    blocks = weight.reshape(*weight.shape[:out], groups, -1, *weight.shape[out + 1 :])
    return (blocks * jnp.moveaxis(laid, grouped, out)).reshape(weight.shape)


def grouped_axis(view: View, scale: jax.Array) -> int | None:
    """The axis along which an in-scale counts the channels of all groups, if there is one."""
    sizes = zip(layout(view)["in_scale"], scale.shape, strict=True)
    axes = [dim for dim, n in sizes if dim is not None and n not in (1, view.base.shape[dim])]
    return axes[0] if axes else None


def _change(a: jax.Array, b: jax.Array, view: View, dtype: jnp.dtype) -> jax.Array:
    """A B in the layout of the view, every axis of which has a role."""
    stack = list(range(len(view.dims("stack"))))
    where = packed.like(view.base)
    spec = compat.explicit_spec(where)
    order = [*view.dims("stack"), *view.dims("in"), *view.dims("out")]
    change = lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (([a.ndim - 1], [len(stack)]), (stack, stack)),
        precision=lax.Precision.HIGHEST,
        out_sharding=compat.explicit_sharding(where, spec and [spec[axis] for axis in order]),
    )
    return jnp.transpose(change, _from_method(view))


def _from_method(view: View) -> list[int]:
    """The permutation from the order (stack, in, out) to the view's own."""
    order = [*view.dims("stack"), *view.dims("in"), *view.dims("out")]
    return [order.index(axis) for axis in range(len(order))]


def placed(view: View) -> View:
    """The view with its factors on the mesh of the weight, split along its axes as it is."""
    where = packed.like(view.base)
    spec = compat.explicit_spec(where)

    def place(array: jax.Array, dims: Dims, _: Dims) -> jax.Array:
        own = None if spec is None else split_as(spec, dims, array, view.base)
        return compat.place_like(array, own, where)

    return remap(view, view, place)


def split_as(spec: PartitionSpec, dims: Dims, array: Any, base: Base) -> PartitionSpec:
    """The spec of an array along these axes of a weight; where it broadcasts it is whole.

    So it is along axes of experts, which follow those of the weight.
    """
    sizes = zip(dims, array.shape, strict=False)
    own = [None if dim is None or n != base.shape[dim] else spec[dim] for dim, n in sizes]
    return PartitionSpec(*own, *[None] * (array.ndim - len(dims)))


def product_dtype(x: jax.Array, view: View) -> jnp.dtype:
    """The dtype in which x meets factors and scales: its own, or the weight's.

    Whole numbers meet a weight as they are, but neither its factors nor its scales.
    """
    return x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else view.base.dtype


def along(scale: jax.Array, dims: Dims, like: jax.Array) -> jax.Array:
    """A scale laid along these axes of ``like``, of size 1 on all others."""
    axes = [axis for axis in dims if axis is not None]
    shape = [1] * like.ndim
    for axis, size in zip(axes, scale.shape, strict=True):
        shape[axis] = size
    order = sorted(range(len(axes)), key=axes.__getitem__)
    return jnp.transpose(scale, order).reshape(shape).astype(like.dtype)
