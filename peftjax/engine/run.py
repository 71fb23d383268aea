"""From a function and marked leaves to its results: trace, prune, replay."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.engine import compat
from peftjax.engine.packed import Base, Packed, abstract
from peftjax.engine.replay import replay
from peftjax.engine.trace import Trace, plain
from peftjax.engine.views import Layer, Result, Role, View


def mark(
    array: Base,
    leaf: int,
    roles: tuple[Role, ...] | None,
    layers: tuple[Layer, ...] = (),
    tapped: bool = False,
) -> View:
    """A leaf of the params tree as a marked weight."""
    axes = tuple((axis,) for axis in range(array.ndim))
    return View(array, layers, leaf, axes, roles, tapped=tapped)


def run(
    trace: Trace, function: Callable[..., Any], arrays: Sequence[Any], marked: Sequence[Any]
) -> tuple[Any, dict[int, jax.Array | None]]:
    """Runs a function of a list of arrays with some of them marked.

    Returns its result, and the leaves whose use reaches it through views, bias and scalars alone:
    those that are tapped with what they were applied to, its features on the last axis.
    """
    shapes = [abstract(array) for array in arrays]
    closed, shape = jax.make_jaxpr(function, return_shape=True)(shapes)
    jaxpr, consts = compat.prune(closed)
    # A quantised weight is unpacked where it is used, adapted or not.
    marked = [mark(x, i, None) if isinstance(x, Packed) else x for i, x in enumerate(marked)]
    outs = replay(trace, jaxpr, consts, marked)
    heads = {out.leaf: _x(out) for out in outs if isinstance(out, Result)}
    outs = [plain(trace, out, None, "the function returns the weight") for out in outs]
    return jax.tree.unflatten(jax.tree.structure(shape), outs), heads


def _x(result: Result) -> jax.Array | None:
    """What a tapped weight was applied to, its features on the last axis."""
    if result.x is None or result.features is None:
        return result.x
    return jnp.moveaxis(result.x, result.features, -1)
