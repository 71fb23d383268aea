"""Results of linear uses, followed to the bias that is added to them and on to the outputs."""

import dataclasses
from typing import Any

import jax.numpy as jnp

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
        return [dataclasses.replace(result, value=values[0])]
    if name not in _SCALAR:
        return values
    others = [operand for operand in operands if operand is not result]
    if name in ("add", "add_any") and isinstance(others[0], View):
        if result.bare:
            kept = tuple(label for labels in others[0].axes for label in labels)
            trace.note(eqn, Biased(result.leaf, others[0].leaf, kept))
    elif any(jnp.ndim(getattr(other, "base", other)) for other in others):
        return values
    return [Result(values[0], result.leaf, bare=False)]
