"""From a function and marked leaves to its results: trace, prune, replay."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from peftjax.engine import compat
from peftjax.engine.replay import replay
from peftjax.engine.trace import Trace, plain
from peftjax.engine.views import Layer, Result, Role, View


def mark(
    array: jax.Array, leaf: int, roles: tuple[Role, ...] | None, layers: tuple[Layer, ...] = ()
) -> View:
    """A leaf of the params tree as a marked weight."""
    return View(array, layers, leaf, tuple((axis,) for axis in range(array.ndim)), roles)


def run(
    trace: Trace, function: Callable[..., Any], arrays: Sequence[Any], marked: Sequence[Any]
) -> tuple[Any, set[int]]:
    """Runs a function of a list of arrays with some of them marked.

    Returns its result, and the leaves whose use reaches it through views, bias and scalars alone.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(list(arrays))
    jaxpr, consts = compat.prune(closed)
    outs = replay(trace, jaxpr, consts, marked)
    heads = {out.leaf for out in outs if isinstance(out, Result)}
    outs = [plain(trace, out, None, "the function returns the weight") for out in outs]
    return jax.tree.unflatten(jax.tree.structure(shape), outs), heads
