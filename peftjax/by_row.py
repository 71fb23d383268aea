"""Rows of a batch run by themselves, under ``jax.vmap``, wherever a model lays them."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.adapter import Adapter
from peftjax.engine.routes import RouteError, taken
from peftjax.routes import Mix
from peftjax.running import Model, plain_call, rows, run_with
from peftjax.trees import Static, is_array, leaves_of


def run_by_row(
    model: Model,
    batch_axes: Any,
    static: Static,
    arrays: list[Any],
    adapters: Sequence[Adapter],
) -> Any:
    """What a model returns for a batch, every row of which runs with its own experts.

    Args:
      model: the model.
      batch_axes: where the rows lie in its arguments, as ``adapt`` takes it.
      static: its params and arguments, without their arrays.
      arrays: those arrays.
      adapters: the adapters, in order.

    Raises:
      ValueError: ``batch_axes`` does not fit the arguments, or they have other numbers of rows.
      RouteError: an output has no axis of rows.
    """
    axes = _axes(batch_axes, static, arrays)
    routes = jax.tree.leaves([each.route for each in adapters if rows(each)])
    sizes = {x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None}
    counts = {count for each in adapters if (count := rows(each))}
    if len(counts | sizes) != 1:
        raise ValueError(
            f"the adapters route {sorted(counts)} rows, and along "
            f"batch_axes={batch_axes} the arguments have {sorted(sizes)}"
        )
    places = _places_of_rows(model, axes, static, arrays)

    def one(arrays: list[Any], routes: list[jax.Array], number: jax.Array) -> list[Any]:
        own = [
            x if axis is None else jnp.expand_dims(x, axis)
            for x, axis in zip(arrays, axes, strict=True)
        ]
        left = iter(routes)
        single = [_of_one_row(_drawn_apart(each, number), left) for each in adapters]
        out = jax.tree.leaves(run_with(model, static, own, single)[0])
        return [jnp.squeeze(x, axis) for x, axis in zip(out, places[0], strict=True)]

    numbers = jnp.arange(counts.pop())
    out = jax.vmap(one, in_axes=(axes, 0, 0), out_axes=places[0])(arrays, routes, numbers)
    return jax.tree.unflatten(places[1], out)


def _drawn_apart(adapter: Adapter, number: jax.Array) -> Adapter:
    """The adapter with a dropout of its own for the row of this number."""
    if adapter.key is None:
        return adapter
    return adapter.replace(key=jax.random.fold_in(adapter.key, number))


def _of_one_row(adapter: Adapter, routes: Iterator[jax.Array]) -> Adapter:
    """The adapter as a single row sees it, out of what there is of each row."""
    if rows(adapter) is None:
        return adapter
    own = next(routes)
    if isinstance(adapter.route, Mix):
        if own.ndim == 1:
            return adapter.replace(route=Mix(own))
        # The tokens of a row alone lie in order wherever they lie.
        return adapter.replace(route=Mix(own[None], lengths=(own.shape[0],)))

    params, buffers = jax.tree.map(
        lambda array: taken(array, own, axis=0), (adapter.params, adapter.buffers)
    )
    return adapter.replace(params=params, buffers=buffers, route=None)


def _axes(batch_axes: Any, static: Static, arrays: list[Any]) -> list[int | None]:
    """For each array among params and arguments the axis of its rows, None for none."""
    params, args, kwargs = static.fill(arrays)
    try:
        of_args = jax.tree.broadcast(batch_axes, args, is_leaf=lambda x: x is None)
    except ValueError as error:
        raise ValueError(
            f"batch_axes={batch_axes} is no prefix of the arguments after params and adapter, as "
            f"jax.vmap takes it in in_axes: {error}"
        ) from error
    axes: list[int | None] = [None] * sum(map(is_array, leaves_of(params)))
    # As in jax.vmap, arguments by keyword have their rows in front.
    pairs = zip(
        jax.tree.leaves((args, kwargs)),
        [
            *jax.tree.leaves(of_args, is_leaf=lambda x: x is None),
            *[0] * len(jax.tree.leaves(kwargs)),
        ],
        strict=True,
    )
    for leaf, axis in pairs:
        if not is_array(leaf):
            continue
        if axis is not None and not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(f"batch_axes has {axis} for an argument of shape {leaf.shape}")
        axes.append(None if axis is None else axis % leaf.ndim)
    return axes


def _places_of_rows(
    model: Model, axes: Sequence[int | None], static: Static, arrays: list[Any]
) -> tuple[list[int], Any]:
    """Where the rows lie in each output, and the structure of the outputs."""

    def with_rows(count: int) -> list[jax.ShapeDtypeStruct]:
        shapes = []
        for x, axis in zip(arrays, axes, strict=True):
            shape = list(x.shape)
            if axis is not None:
                shape[axis] = count
            shapes.append(jax.ShapeDtypeStruct(tuple(shape), x.dtype))
        return shapes

    # An axis of rows is one that grows with them.
    call = plain_call(model, static)
    one, two = (jax.eval_shape(call, with_rows(count)) for count in (1, 2))
    places = []
    for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True):
        grown = [i for i, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)) if n != m]
        if len(grown) != 1 or a.shape[grown[0]] != 1:
            raise RouteError(
                f"an output of shape {a.shape} for one row has shape {b.shape} for two: each "
                f"output has to have an axis of rows"
            )
        places.append(grown[0])
    return places, jax.tree.structure(one)
