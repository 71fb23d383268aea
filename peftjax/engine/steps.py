"""Primitives that leave a marked weight marked: transposes, casts, reshapes, slices and so on.

A rule gets the view and the rest of the equation, and returns the views of the results, or None
where the step cannot be followed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from peftjax.engine import packed, views
from peftjax.engine.views import Dims, View


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation as a step sees it.

    Attributes:
      params: the equation's parameters.
      position: which operand the view is.
      others: the other operands, in order.
      rerun: the equation itself, as a function of the array at the view's position.
    """

    params: dict[str, Any]
    position: int
    others: tuple[Any, ...]
    rerun: Callable[[Any], Any]


Step = Callable[[View, Equation], View | list[View] | None]


def _transpose(view: View, equation: Equation) -> View:
    return views.transpose(view, tuple(equation.params["permutation"]), equation.rerun(view.base))


def _reshape(view: View, equation: Equation) -> View | None:
    base = equation.rerun(view.base)
    if equation.params["dimensions"] is not None:
        permutation = tuple(equation.params["dimensions"])
        view = views.transpose(view, permutation, packed.transposed(view.base, permutation))
    return views.reshape(view, tuple(equation.params["new_sizes"]), base)


def _squeeze(view: View, equation: Equation) -> View | None:
    gone = {axis % view.base.ndim for axis in equation.params["dimensions"]}
    axes = tuple(axes for axis, axes in enumerate(view.axes) if axis not in gone)
    after = dataclasses.replace(view, base=equation.rerun(view.base), axes=axes)
    # By name, not by size: among several axes of size 1 the right one must go.
    left = [axis for axis in range(view.base.ndim) if axis not in gone]

    def change(array: jax.Array, before: Dims, target: Dims) -> jax.Array:
        kept = {left[dim] if dim is not None else None for dim in target}
        return lax.squeeze(array, [i for i, dim in enumerate(before) if dim not in kept])

    return views.remap(view, after, change)


def _broadcast_in_dim(view: View, equation: Equation) -> View | None:
    shape, kept = equation.params["shape"], equation.params["broadcast_dimensions"]
    grows = shape != tuple(1 if axis not in kept else n for axis, n in enumerate(shape)) or any(
        shape[new] != n for new, n in zip(kept, view.base.shape, strict=True)
    )
    if equation.others or (grows and view.roles is not None):
        return None
    axes: list[tuple[int, ...]] = [()] * len(shape)
    for old, new in enumerate(kept):
        axes[new] = view.axes[old]
    after = dataclasses.replace(view, base=equation.rerun(view.base), axes=tuple(axes))
    return views.remap(view, after, lambda array, before, target: array)


def _convert(view: View, equation: Equation) -> View | None:
    if not jnp.issubdtype(equation.params["new_dtype"], jnp.inexact):
        return None
    return _on_base(view, equation)


def _slice(view: View, equation: Equation) -> View:
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * view.base.ndim

    def change(array: jax.Array, dims: Dims) -> jax.Array:
        return lax.slice(
            array,
            [0 if dim is None else starts[dim] for dim in dims],
            [n if dim is None else limits[dim] for n, dim in zip(array.shape, dims, strict=True)],
            [1 if dim is None else strides[dim] for dim in dims],
        )

    taken = zip(starts, limits, strides, view.base.shape, strict=True)
    axes = [axis for axis, (start, *rest, n) in enumerate(taken) if (start, *rest) != (0, n, 1)]
    return views.cut(view, axes, change)


def _dynamic_slice(view: View, equation: Equation) -> View:
    starts, sizes = equation.others, equation.params["slice_sizes"]

    def change(array: jax.Array, dims: Dims) -> jax.Array:
        return lax.dynamic_slice(
            array,
            [jnp.zeros_like(starts[0]) if dim is None else starts[dim] for dim in dims],
            [n if dim is None else sizes[dim] for n, dim in zip(array.shape, dims, strict=True)],
        )

    axes = [axis for axis, n in enumerate(view.base.shape) if sizes[axis] != n]
    return views.cut(view, axes, change)


def _split(view: View, equation: Equation) -> list[View]:
    axis, start, pieces = equation.params["axis"], 0, []
    for size in equation.params["sizes"]:

        def piece(
            array: jax.Array, dims: Dims, start: int = start, stop: int = start + size
        ) -> jax.Array:
            return (
                lax.slice_in_dim(array, start, stop, axis=dims.index(axis))
                if axis in dims
                else array
            )

        pieces.append(views.cut(view, (axis,), piece))
        start += size
    return pieces


def _rev(view: View, equation: Equation) -> View:
    flipped = set(equation.params["dimensions"])

    def change(array: jax.Array, dims: Dims) -> jax.Array:
        return lax.rev(array, [i for i, dim in enumerate(dims) if dim in flipped])

    return views.cut(view, flipped, change)


def _scale(divide: bool) -> Step:
    def step(view: View, equation: Equation) -> View | None:
        (other,) = equation.others
        if jnp.ndim(other) != 0 or (divide and equation.position == 1):
            return None
        return views.scale(view, other, divide)

    return step


def _negative(view: View, equation: Equation) -> View:
    return views.scale(view, -1.0)


def _on_base(view: View, equation: Equation) -> View:
    return dataclasses.replace(view, base=equation.rerun(view.base))


def _on_all(view: View, equation: Equation) -> View:
    layers = jax.tree.map(
        lambda array: array if _is_key(array) else equation.rerun(array), view.layers
    )
    return dataclasses.replace(view, base=equation.rerun(view.base), layers=layers)


def _is_key(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


STEPS: dict[str, Step] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "convert_element_type": _convert,
    "copy": _on_base,
    "copy_p": _on_base,
    "div": _scale(divide=True),
    "dynamic_slice": _dynamic_slice,
    "mul": _scale(divide=False),
    "name": _on_base,
    "neg": _negative,
    "pcast": _on_all,
    "pvary": _on_all,
    "reshape": _reshape,
    "reshard": _on_base,
    "rev": _rev,
    "sharding_constraint": _on_base,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stop_gradient": _on_all,
    "transpose": _transpose,
}

# Steps after which an in-scale for the channels of all groups would no longer fit the weight.
RESHAPING = {
    "broadcast_in_dim",
    "dynamic_slice",
    "reshape",
    "rev",
    "slice",
    "split",
    "squeeze",
}
