"""Runs a jaxpr again, with the factors of its marked weights applied at every linear use."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.engine import compat, packed, results
from peftjax.engine.control import CONTROL
from peftjax.engine.linear import apply, orient, placed, unpacked
from peftjax.engine.packed import Base, Packed
from peftjax.engine.routes import RouteError
from peftjax.engine.rules import RULES, Rule
from peftjax.engine.shared import Shared, shared, weights_first
from peftjax.engine.steps import RESHAPING, STEPS, Equation
from peftjax.engine.trace import Seen, Trace, Used, met, plain
from peftjax.engine.views import Axes, Result, Role, View, fold_in


def replay(
    trace: Trace, jaxpr: compat.Jaxpr, consts: Sequence[Any], args: Sequence[Any]
) -> list[Any]:
    """Runs a jaxpr on values and marked weights; returns values, views and results."""
    marked: dict[compat.Var, View | Result] = {}
    values: dict[compat.Var, Any] = {}
    waiting: list[compat.Eqn] = []
    together = shared(jaxpr, marked)

    def write(var: compat.Var, value: Any) -> None:
        if isinstance(value, View | Result):
            marked[var] = value
        else:
            values[var] = value

    def read(atom: Any) -> Any:
        if isinstance(atom, compat.Literal):
            return atom.val
        return marked[atom] if atom in marked else values[atom]

    def run_waiting() -> None:
        """Runs, as one piece, the equations that no marked weight enters."""
        if not waiting:
            return
        made = [v for eqn in waiting for v in eqn.outvars if not isinstance(v, compat.DropVar)]
        known = set(made)
        needed = {
            v: None
            for eqn in waiting
            for v in eqn.invars
            if not isinstance(v, compat.Literal) and v not in known
        }
        inputs = [values[v] for v in needed]
        values.update(
            zip(made, compat.evaluate_plain(jaxpr, waiting, needed, made, inputs), strict=True)
        )
        waiting.clear()

    for var, value in zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True):
        write(var, value)
    for eqn in weights_first(jaxpr, marked):
        if not any(not isinstance(v, compat.Literal) and v in marked for v in eqn.invars):
            waiting.append(eqn)
            continue
        run_waiting()
        with compat.equation_context(eqn):
            outs = _equation(trace, eqn, [read(atom) for atom in eqn.invars], together)
        for var, out in zip(eqn.outvars, outs, strict=True):
            write(var, out)
    run_waiting()
    return [read(atom) for atom in jaxpr.outvars]


def _equation(
    trace: Trace, eqn: compat.Eqn, operands: list[Any], together: Shared
) -> Sequence[Any]:
    """One equation that marks enter: nested, a step, a linear use, or none of these."""
    name = eqn.primitive.name
    reason = "no rule follows a weight through it"
    if name in CONTROL:
        outs = CONTROL[name](trace, eqn, operands, replay)
        if not isinstance(outs, str):
            return outs
        reason = outs
    positions = [i for i, operand in enumerate(operands) if isinstance(operand, View)]
    if positions and name in STEPS:
        stepped = _step(eqn, operands, positions[0])
        if stepped is not None:
            return stepped
    if positions and name in RULES:
        used = _use(trace, eqn, operands, positions, together)
        if not isinstance(used, str):
            return used
        reason = used
    inputs = [plain(trace, operand, eqn, reason) for operand in operands]
    values = compat.evaluate_one(eqn, inputs)
    if positions:
        values = _join(operands, values)
    return results.follow(eqn, operands, values, trace)


def _step(eqn: compat.Eqn, operands: list[Any], position: int) -> list[View] | None:
    """The views after a step, where the primitive and its other operands allow one."""
    others = [operand for i, operand in enumerate(operands) if i != position]
    if any(isinstance(other, View) for other in others):
        return None
    if operands[position].grouped and eqn.primitive.name in RESHAPING:
        return None
    others = [other.value if isinstance(other, Result) else other for other in others]

    def evaluate(array: jax.Array) -> jax.Array:
        return compat.evaluate_one(eqn, [*others[:position], array, *others[position:]])[0]

    def rerun(base: Base) -> Base:
        if isinstance(base, Packed):
            return packed.step(base, eqn.primitive.name, eqn.params, evaluate)
        return evaluate(base)

    made = STEPS[eqn.primitive.name](
        operands[position], Equation(eqn.params, position, tuple(others), rerun)
    )
    return [made] if isinstance(made, View) else made


def _use(
    trace: Trace,
    eqn: compat.Eqn,
    operands: list[Any],
    positions: list[int],
    together: Shared,
) -> list[Any] | str:
    """The result of a linear use, or why the factors cannot be applied to it."""
    rule = RULES[eqn.primitive.name]
    position = positions[-1]
    view = operands[position]
    usage = rule.usage(eqn.params, position, view.base.shape)
    if isinstance(usage, str):
        return usage
    if view.roles is None:
        for position in positions:
            usage = rule.usage(eqn.params, position, operands[position].base.shape)
            if not isinstance(usage, str):
                for leaf in (operands[position].leaf, *operands[position].joined):
                    trace.note(eqn, _seen(leaf, operands[position].axes, usage, rule, eqn))
        bases = [x.base if isinstance(x, View) else plain(trace, x, eqn, "") for x in operands]
        inputs = list(map(packed.dense, bases))
        return [_result(eqn, view, rule, position, inputs, _evaluated(eqn, bases))]
    oriented = orient(view, usage)
    if isinstance(oriented, str):
        return oriented
    view, transposed = placed(oriented[0]), oriented[1]
    inputs = [
        operand if i == position else plain(trace, operand, eqn, "both sides are adapted")
        for i, operand in enumerate(operands)
    ]
    out: Any = eqn.outvars[0].aval

    def planned(view: View) -> Any:
        return rule.linear(view, transposed, position, inputs, eqn.params, out)

    plan = planned(view)
    if isinstance(plan, str):
        return plan
    use, x = unpacked(plan[0], view, planned), plan[1]
    tokens = use.tokens * view.times
    rows = None if use.row_x is None else jax.tree.leaves(x)[0].shape[use.row_x]
    trace.note(eqn, Used(view.leaf, eqn.primitive.name, transposed, "", tokens, rows))
    try:
        layers = fold_in(view, trace.number(eqn)).layers
        beside = together.copy(x) if layers else x
        layers = together.with_features(eqn, position, layers, beside)
        y = apply(use, layers, x, beside).astype(out.dtype)
    except RouteError as error:
        raise RouteError(
            f"{trace.names[view.leaf]} meets {eqn.primitive.name} as {met(view)}: "
            f"{error}. Leave the module out, or let every row run by itself with "
            f"adapt(..., batch_axes=)."
        ) from error
    if not view.tapped:
        return [y]
    inputs[position] = packed.dense(view.base)
    return [_result(eqn, view, rule, position, inputs, y)]


def _evaluated(eqn: compat.Eqn, bases: list[Any]) -> jax.Array:
    """The result of a use, whose quantised weights are unpacked once more in the backward pass."""

    def evaluate(bases: list[Any]) -> jax.Array:
        return compat.evaluate_one(eqn, list(map(packed.dense, bases)))[0]

    quantised = any(isinstance(base, Packed) for base in bases)
    return jax.checkpoint(evaluate)(bases) if quantised else evaluate(bases)


def _result(
    eqn: compat.Eqn, view: View, rule: Rule, position: int, inputs: list[Any], value: jax.Array
) -> Result:
    """The result of a use, with what the weight was applied to if that is wanted."""
    met = rule.tapped(eqn.params, position, inputs) if view.tapped else None
    x, features = met or (None, None)
    return Result(value, view.leaf, x=x, features=features)


def _seen(leaf: int, axes: Axes, usage: Sequence[Role], rule: Rule, eqn: compat.Eqn) -> Seen:
    """A use in terms of the original axes of the weight."""
    met: dict[int, set[Role]] = {}
    for labels, role in zip(axes, usage, strict=True):
        for label in labels:
            met.setdefault(label, set()).add(role)

    def role_of(roles: set[Role]) -> Role | None:
        # A part of an axis that serves as a batch does not make the axis a stack.
        rest = roles - {"stack"} or roles
        return next(iter(rest)) if len(rest) == 1 else None

    roles = tuple((label, role_of(roles)) for label, roles in sorted(met.items()))
    along = rule.taps(eqn.params)
    others = {label for axis, own in enumerate(axes) if axis not in along for label in own}
    taps = tuple(label for axis in along for label in axes[axis] if label not in others)
    own = (taps, rule.groups(eqn.params), rule.window(eqn.params))
    return Seen(leaf, rule.kind, roles, *own)


def _join(operands: list[Any], values: list[Any]) -> list[Any]:
    """While roles are being found: what is made of weights alone, axis by axis, is a weight."""
    views = [operand for operand in operands if isinstance(operand, View)]
    if len(values) != 1 or len(views) != len(operands) or views[0].roles is not None:
        return values
    (value,), first = values, max(views, key=lambda view: view.base.ndim)
    if value.ndim != first.base.ndim or not jnp.issubdtype(value.dtype, jnp.inexact):
        return values
    alike = [view for view in views if view.axes == first.axes]
    leaves = dict.fromkeys(leaf for view in alike for leaf in (view.leaf, *view.joined))
    del leaves[first.leaf]
    return [dataclasses.replace(first, base=value, joined=tuple(leaves))]
