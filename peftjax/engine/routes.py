"""Several experts at one weight: which of them serves which row or token.

The factors of experts that serve rows have the experts on an axis behind all others. The factors of
experts that are mixed lie side by side along the rank, and the rank features are gated.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from peftjax.engine import compat


class RouteError(ValueError):
    """Rows or tokens that cannot be told apart where a weight is used."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Each row of the batch is served by one expert.

    Attributes:
      index: the expert of each row, -1 for none; shape (*stack, batch), the same along the stack.
      lengths: by how many positions in a row an axis of batch x sequence may count more.
      in_order: whether each row's expert is that of its own number, if it has one.
    """

    index: jax.Array
    lengths: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    in_order: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def rows(self) -> jax.Array:
        """The expert of each row."""
        return self.index.reshape(-1, self.index.shape[-1])[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gates:
    """Every row or token is served by all experts, each with a weight.

    Attributes:
      weights: shape (*stack, batch, experts) or (*stack, batch, sequence, experts).
      lengths: as of ``Rows``.
      tokens: number of axes between the stack and the experts.
    """

    weights: jax.Array
    lengths: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    tokens: int = dataclasses.field(default=2, metadata={"static": True})


Route = Rows | Gates


def gated(
    features: jax.Array,
    route: Route | None,
    free: Sequence[int],
    *,
    stack: Sequence[int] = (),
    rank: int = -1,
    copies: int = 1,
) -> jax.Array:
    """The rank features of mixed experts, each token's times its weights; others as they are.

    Args:
      features: the features of all experts side by side.
      route: how tokens are routed.
      free: the axes of the features that x keeps, in the order of x.
      stack: the axes that lie along the weight's stack axes, in their order.
      rank: the axis of the features.
      copies: how often all experts' features stand side by side.
    """
    if not isinstance(route, Gates):
        return features
    weights, rank = route.weights, rank % features.ndim
    leading = weights.shape[: len(stack)]
    sizes = [features.shape[axis] for axis in free]
    if route.tokens == 1 and (length := _positions(weights.shape[-2], sizes, route.lengths)) > 1:
        weights = jnp.repeat(weights, length, axis=-2)
    tokens = _along(weights.shape[len(stack) : -1], sizes, route.lengths)
    each = features.shape[rank] // (weights.shape[-1] * copies)
    laid = jnp.repeat(weights, each, axis=-1)
    if (*leading, *tokens) != laid.shape[:-1]:
        laid = compat.replicate(laid).reshape(*leading, *tokens, -1)
    laid = jnp.concatenate([laid] * copies, axis=-1)
    axes = [*stack, *free[: len(tokens)], rank]
    shape = [1] * features.ndim
    for axis, size in zip(axes, laid.shape, strict=True):
        shape[axis] = size
    laid = jnp.transpose(laid, sorted(range(len(axes)), key=axes.__getitem__))
    laid = jnp.expand_dims(laid, [axis for axis, size in enumerate(shape) if axis not in axes])
    spec = compat.explicit_spec(features)
    if spec is not None:
        sharded = zip(spec, shape, strict=True)
        spec = PartitionSpec(*[None if n == 1 else part for part, n in sharded])
    return features * compat.place_like(laid, spec, features).astype(features.dtype)


def _along(tokens: Sequence[int], sizes: Sequence[int], lengths: Sequence[int]) -> tuple[int, ...]:
    """The first of the axes that x keeps, along which tokens lie in order."""
    batch, length = tokens[0], math.prod(tokens[1:])
    if tuple(sizes[: len(tokens)]) == tuple(tokens):
        return tuple(tokens)
    if sizes and length > 1:
        # Positions may lie along several axes, as those of an image do, or along the batch's own.
        for end in range(2, len(sizes) + 1):
            if sizes[0] == batch and math.prod(sizes[1:end]) == length:
                return tuple(sizes[:end])
        if sizes[0] == batch * length and length in lengths:
            return (sizes[0],)
    if list(sizes) == [batch] and length == 1:
        return (batch,)
    raise RouteError(
        f"weights for tokens of shape {tuple(tokens)} do not fit what this use keeps of x, "
        f"{tuple(sizes)}: it has to be (batch, sequence, ...) or (batch x sequence, ...)"
    )


def _positions(batch: int, sizes: Sequence[int], lengths: Sequence[int]) -> int:
    """How many positions of each row lie side by side along the first axis that x keeps."""
    if sizes and sizes[0] == batch:
        return 1
    if sizes and sizes[0] in [batch * length for length in lengths]:
        return sizes[0] // batch
    raise RouteError(
        f"the first axis that this use keeps of x has size {sizes[0] if sizes else 'of none'}, and "
        f"{batch} rows are routed: it has to be that of the batch, or of batch x sequence"
    )


def each_row(
    route: Rows,
    function: Callable[..., Any],
    x: Any,
    parts: Sequence[jax.Array],
    *,
    axis: int,
    to: int,
) -> Any:
    """A function of x and of its row's own parts, row by row.

    Args:
      route: the expert of each row.
      function: of a row of x, that keeps the axis of its positions, and of the parts.
      x: one or more arrays.
      parts: arrays with experts on their last axis; of the last of them rows without one get zeros.
      axis: the axis of x that holds the rows.
      to: the axis of the result that holds them.
    """
    like = jax.tree.leaves(x)[0]
    index, spec = route.rows, compat.explicit_spec(like)
    length = _positions(index.shape[0], like.shape[axis : axis + 1], route.lengths)

    def every(x: Any, parts: Sequence[jax.Array], index: jax.Array) -> Any:
        rows = jax.tree.map(lambda array: _split(array, axis, length), x)
        if route.in_order:
            # What a method made of zeros may be something else: a scale of one, less one.
            *first, last = parts
            own = [*first, jnp.where(index == -1, jnp.zeros_like(last), last)]
        else:
            own = [taken(part, index, axis=-1) for part in parts]
        y = jax.vmap(function, in_axes=(0, *[-1] * len(own)))(rows, *own)
        return jax.tree.map(lambda array: _joined(array, to), y)

    def specs(shapes: Any) -> Any:
        rows = None if spec is None else spec[axis]
        return jax.tree.map(
            lambda out: PartitionSpec(*[rows if i == to else None for i in range(out.ndim)]), shapes
        )

    return compat.automatic(every, like, specs)(x, parts, index)


def _split(array: jax.Array, axis: int, length: int) -> jax.Array:
    """The rows of an array in front, each with the axis of its positions."""
    shape = (*array.shape[:axis], -1, length, *array.shape[axis + 1 :])
    return jnp.moveaxis(array.reshape(shape), axis, 0)


def _joined(array: jax.Array, axis: int) -> jax.Array:
    """Rows in front, each with the axis of its positions, along one axis again."""
    array = jnp.moveaxis(array, 0, axis)
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])


def taken(array: jax.Array, index: jax.Array, *, axis: int) -> jax.Array:
    """What experts have along an axis: zeros for -1, and NaN for an expert that is not there."""
    beyond = jnp.where(index < -1, array.shape[axis], index)
    fill = True if array.dtype == bool else jnp.nan
    found = jnp.take(array, jnp.maximum(beyond, 0), axis=axis, mode="fill", fill_value=fill)
    shape = [1] * found.ndim
    if index.ndim:
        shape[axis] = -1
    return jnp.where((index == -1).reshape(shape), jnp.zeros_like(found), found)
