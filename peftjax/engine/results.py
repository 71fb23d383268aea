"""Results of linear uses, followed to the bias that is added to them and on to the outputs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.engine.blocks import reshape_blocks
from peftjax.engine.compat import Eqn
from peftjax.engine.trace import Biased, Trace
from peftjax.engine.views import Result, View

_VIEWS = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "dynamic_slice",
    "name",
    "pcast",
    "psum",
    "psum_invariant",
    "pvary",
    "reshape",
    "reshard",
    "sharding_constraint",
    "slice",
    "squeeze",
    "transpose",
}
_SCALAR = {"add", "add_any", "div", "mul", "neg", "sub"}


def follow(eqn: Eqn, operands: list[Any], values: list[Any], trace: Trace) -> list[Any]:
    """Marks the value of an equation that a result flows through, and notes a bias it meets."""
    results = [operand for operand in operands if isinstance(operand, Result)]
    if len(results) != 1 or len(values) != 1:
        return values
    (result,), name = results, eqn.primitive.name
    if name in _VIEWS and operands[0] is result:
        return [_viewed(result, eqn, values[0])]
    if name not in _SCALAR:
        return values
    others = [operand for operand in operands if operand is not result]
    if name in ("add", "add_any") and isinstance(others[0], View):
        if result.bare:
            kept = tuple(label for labels in others[0].axes for label in labels)
            trace.note(eqn, Biased(result.leaf, others[0].leaf, kept))
    # Of a tapped weight the bias is not marked, and what is added matters not.
    elif result.x is None and any(jnp.ndim(getattr(other, "base", other)) for other in others):
        return values
    return [dataclasses.replace(result, value=values[0], bare=False)]


def _viewed(result: Result, eqn: Eqn, value: jax.Array) -> Result:
    """The result after a view, its x in the same layout."""
    after = dataclasses.replace(result, value=value)
    x, features, old, new = result.x, result.features, result.value.shape, value.shape
    if x is None or features is None or (old == new and eqn.primitive.name != "transpose"):
        return after
    if eqn.primitive.name == "transpose":
        order = eqn.params["permutation"]
        return dataclasses.replace(after, x=jnp.transpose(x, order), features=order.index(features))
    blocks = reshape_blocks(old, new) if value.size == result.value.size else None
    kept = [n for o, n in blocks or () if o == range(features, features + 1) and len(n) == 1]
    if not kept:  # a slice, perhaps, of which x keeps the whole
        return dataclasses.replace(after, x=jnp.moveaxis(x, features, -1), features=None)
    axis = kept[0].start
    shape = (*new[:axis], x.shape[features], *new[axis + 1 :])
    return dataclasses.replace(after, x=x.reshape(shape), features=axis)
