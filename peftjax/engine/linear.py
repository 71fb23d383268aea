"""Linear uses of a marked weight, and what its factors add to each.

``Linear`` says how one primitive applies the frozen weight, a product of two factors, and the
scales. ``apply`` puts them together for any number of adapters, the last one outermost:

    forward      y = s_out * (W(s_in * x) + B(A(x)))
    transposed   y = s_in * W'(s_out * x) + A'(B'(s_out * x))
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from peftjax.engine import compat
from peftjax.engine.views import Dims, Layer, Role, View, give_roles, layout
from peftjax.factors import accumulation_dtype

_SWAPPED: dict[Role, Role] = {"in": "out", "out": "in", "stack": "stack"}


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear use of a weight.

    Attributes:
      base: the frozen use, a function of x.
      product: x through two factors: the one that meets x, then the other.
      scale_x: x times a scale over the stack axes and the axes that are summed over.
      scale_y: the result times a scale over the stack axes and the axes that stay.
      transposed: whether the use maps the out-space to the in-space.
    """

    base: Callable[[Any], jax.Array]
    product: Callable[[Any, jax.Array, jax.Array], jax.Array]
    scale_x: Callable[[Any, jax.Array], Any]
    scale_y: Callable[[jax.Array, jax.Array], jax.Array]
    transposed: bool = False


def apply(linear: Linear, layers: Sequence[Layer], x: Any) -> jax.Array:
    """The use of the weight as all layers change it, in the dtype sums run in."""
    if not layers:
        y = linear.base(x)
        return y.astype(accumulation_dtype(y.dtype))
    *inner, layer = layers
    f = layer.factors
    if linear.transposed:
        if f.out_scale is not None:
            x = linear.scale_x(x, f.out_scale)
        y = apply(linear, inner, x)
        if f.in_scale is not None:
            y = linear.scale_y(y, f.in_scale)
        if f.A is None or f.B is None:
            return y
        return _add(y, linear.product(_dropped(x, layer), f.B, f.A))
    y = apply(linear, inner, x if f.in_scale is None else linear.scale_x(x, f.in_scale))
    if f.A is not None and f.B is not None:
        y = _add(y, linear.product(_dropped(x, layer), f.A, f.B))
    return y if f.out_scale is None else linear.scale_y(y, f.out_scale)


def _add(y: jax.Array, delta: jax.Array) -> jax.Array:
    return y + delta.astype(y.dtype)


def _dropped(x: jax.Array, layer: Layer) -> jax.Array:
    """X with entries dropped and the rest scaled up, where the layer asks for it."""
    if layer.key is None or not layer.drops:
        return x
    key = jnp.ravel(layer.key)[0]
    for axis in compat.varying_axes(x):
        key = jax.random.fold_in(key, lax.axis_index(axis))
    keep = 1.0 - layer.factors.dropout
    mask = jax.random.bernoulli(key, keep, x.shape)
    mask = compat.place_like(mask, compat.explicit_spec(x), x)
    return jnp.where(mask, x / jnp.asarray(keep, x.dtype), jnp.zeros_like(x))


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
    view = give_roles(view, ["out"] * view.base.ndim)
    parts = layout(view)
    weight = view.base.astype(accumulation_dtype(view.base.dtype))
    for factors in (layer.factors for layer in view.layers):
        if factors.in_scale is not None:
            weight = weight * along(factors.in_scale, parts["in_scale"], weight)
        if factors.A is not None and factors.B is not None:
            weight = weight + _change(factors.A, factors.B, view, weight.dtype)
        if factors.out_scale is not None:
            weight = weight * along(factors.out_scale, parts["out_scale"], weight)
    return weight.astype(view.base.dtype)


def unmerged(view: View) -> jax.Array:
    """The weight that ``merged`` turns into this base."""
    parts = layout(view)
    weight = view.base.astype(accumulation_dtype(view.base.dtype))
    for factors in (layer.factors for layer in reversed(view.layers)):
        if factors.out_scale is not None:
            weight = weight / along(factors.out_scale, parts["out_scale"], weight)
        if factors.A is not None and factors.B is not None:
            weight = weight - _change(factors.A, factors.B, view, weight.dtype)
        if factors.in_scale is not None:
            weight = weight / along(factors.in_scale, parts["in_scale"], weight)
    return weight.astype(view.base.dtype)


def _change(a: jax.Array, b: jax.Array, view: View, dtype: jnp.dtype) -> jax.Array:
    """A B in the layout of the view, every axis of which has a role."""
    parts = layout(view)
    a, b = place(a, parts["A"], view), place(b, parts["B"], view)
    order = [*view.dims("stack"), *view.dims("in"), *view.dims("out")]
    stack = list(range(len(view.dims("stack"))))
    spec = compat.explicit_spec(view.base)
    change = lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (([a.ndim - 1], [len(stack)]), (stack, stack)),
        precision=lax.Precision.HIGHEST,
        out_sharding=spec and PartitionSpec(*[spec[axis] for axis in order]),
    )
    return jnp.transpose(change, [order.index(axis) for axis in range(len(order))])


def place(array: jax.Array, dims: Dims, view: View) -> jax.Array:
    """A factor on the mesh of the weight, sharded along the weight's own axes."""
    spec = compat.explicit_spec(view.base)
    if spec is not None:
        spec = PartitionSpec(*[None if dim is None else spec[dim] for dim in dims])
    return compat.place_like(array, spec, view.base)


def along(scale: jax.Array, dims: Dims, like: jax.Array) -> jax.Array:
    """A scale laid along these axes of ``like``, of size 1 on all others."""
    axes = [axis for axis in dims if axis is not None]
    shape = [1] * like.ndim
    for axis, size in zip(axes, scale.shape, strict=True):
        shape[axis] = size
    order = sorted(range(len(axes)), key=axes.__getitem__)
    return jnp.transpose(scale, order).reshape(shape).astype(like.dtype)
