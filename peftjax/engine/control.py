"""Nested jaxprs that marked weights enter: entered, and written out again through public JAX.

Every function here gets the trace, the equation, its operands and ``replay``, and returns the
results, or a reason why the weight has to be materialised before it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, Sharding

from peftjax.engine import compat, packed
from peftjax.engine.linear import placed, split_as
from peftjax.engine.trace import Trace, plain
from peftjax.engine.views import Dims, Result, Role, View, fold_in, give_roles, remap

Replay = Callable[[Trace, compat.Jaxpr, Sequence[Any], Sequence[Any]], list[Any]]
Control = Callable[[Trace, compat.Eqn, list[Any], Replay], list[Any] | str]


def _jit(trace: Trace, eqn: compat.Eqn, operands: list[Any], replay: Replay) -> list[Any]:
    """A jitted function, replayed once for all calls in which the same operands are marked."""
    jaxpr, consts = compat.open_jaxpr(eqn.params["jaxpr"])
    operands = _constrain(operands, eqn.params["in_shardings"])
    leaves = list(dict.fromkeys(x.leaf for x in operands if _marked(x)))
    shared = [_relabel(x, leaves.index) for x in operands]
    arrays, structure = jax.tree.flatten(shared)
    key = (id(jaxpr), structure, tuple(map(jax.typeof, arrays)))
    if key not in trace.bodies:
        inner = trace.inner(leaves)

        def body(*args: Any) -> list[Any]:
            return replay(inner, jaxpr, consts, args)

        body.__name__ = body.__qualname__ = eqn.params["name"]
        trace.bodies[key] = jax.jit(body), inner
    call, inner = trace.bodies[key]
    number = trace.number(eqn)
    outs = call(*[fold_in(x, number) if isinstance(x, View) else x for x in shared])
    trace.absorb(eqn, inner, leaves)
    outs = [_relabel(x, leaves.__getitem__) for x in outs]
    return _constrain(outs, eqn.params["out_shardings"])


def _marked(x: Any) -> bool:
    return isinstance(x, View | Result)


def _relabel(x: Any, rename: Callable[[int], int]) -> Any:
    return dataclasses.replace(x, leaf=rename(x.leaf)) if _marked(x) else x


def _constrain(values: list[Any], shardings: Sequence[Any]) -> list[Any]:
    """The shardings a nested jit asks for, which inside a jit are constraints."""

    def moved(base: Any, sharding: Any) -> Any:
        return packed.laid_out(base, sharding, lax.with_sharding_constraint)

    def constrained(x: Any, sharding: Any) -> Any:
        if not isinstance(sharding, Sharding):
            return x
        if isinstance(x, View):
            return dataclasses.replace(x, base=moved(x.base, sharding))
        if isinstance(x, Result):
            return dataclasses.replace(x, value=moved(x.value, sharding))
        return moved(x, sharding)

    return [constrained(x, sharding) for x, sharding in zip(values, shardings, strict=True)]


def _inline(trace: Trace, eqn: compat.Eqn, operands: list[Any], replay: Replay) -> list[Any]:
    jaxpr, consts = compat.open_jaxpr(eqn.params["call_jaxpr"])
    return replay(trace, jaxpr, consts, operands)


def _remat(trace: Trace, eqn: compat.Eqn, operands: list[Any], replay: Replay) -> list[Any]:
    jaxpr, consts = compat.open_jaxpr(eqn.params["jaxpr"])

    def body(*args: Any) -> list[Any]:
        return replay(trace, jaxpr, consts, args)

    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)(*operands)


def _custom(trace: Trace, eqn: compat.Eqn, operands: list[Any], replay: Replay) -> str:
    """A function with its own derivative keeps it, so it gets the merged weight."""
    if any(isinstance(x, View) and x.roles is None for x in operands):
        jaxpr, consts = compat.open_jaxpr(eqn.params["call_jaxpr"])
        replay(trace, jaxpr, consts, operands)
    return "it has a derivative rule of its own"


def _barrier(trace: Trace, eqn: compat.Eqn, operands: list[Any], replay: Replay) -> list[Any]:
    return list(lax.optimization_barrier(tuple(operands)))


def _cond(trace: Trace, eqn: compat.Eqn, operands: list[Any], replay: Replay) -> list[Any] | str:
    if eqn.params.get("branches_platforms"):
        return "the branches differ by platform"
    index, *rest = operands

    def branch(closed: Any) -> Callable[..., list[Any]]:
        jaxpr, consts = compat.open_jaxpr(closed)

        def run(*args: Any) -> list[Any]:
            outs = replay(trace, jaxpr, consts, args)
            return [plain(trace, out, eqn, "a branch returns the weight") for out in outs]

        return run

    return lax.switch(index, [branch(closed) for closed in eqn.params["branches"]], *rest)


def _scan(trace: Trace, eqn: compat.Eqn, operands: list[Any], replay: Replay) -> list[Any]:
    params = eqn.params
    jaxpr, closed = compat.open_jaxpr(params["jaxpr"])
    n_consts, n_carry = compat.scan_split(params)
    consts, carry = operands[:n_consts], operands[n_consts : n_consts + n_carry]
    xs = [_scannable(trace, x, eqn) for x in operands[n_consts + n_carry :]]
    fixed = _unchanged(carry, jaxpr.invars[n_consts:], jaxpr.outvars)
    # A slice that the body hands back unchanged makes up the stack it came from.
    handed = {
        i: jaxpr.invars.index(out) - n_consts - n_carry
        for i, out in enumerate(jaxpr.outvars[n_carry:])
        if out in jaxpr.invars[n_consts + n_carry :]
        and _marked(xs[jaxpr.invars.index(out) - n_consts - n_carry])
    }
    init = [
        plain(trace, x, eqn, "the loop changes the weight")
        for i, x in enumerate(carry)
        if i not in fixed
    ]
    # The result of a weight that serves every step may go on; that of a layer's own may not.
    sliced = {x.leaf for x in xs if isinstance(x, View)}
    drops = any(isinstance(x, View) and x.drops for x in [*consts, *carry])
    steps = jnp.arange(params["length"]) if drops else None

    def body(moving: list[Any], slices: Any) -> tuple[list[Any], list[Any]]:
        xs, step = slices
        still = iter(moving)
        state = [carry[i] if i in fixed else next(still) for i in range(n_carry)]
        args = _repeated([*consts, *state], params["length"])
        if step is not None:
            args = [fold_in(x, step) if isinstance(x, View) else x for x in args]
        layers = [dataclasses.replace(x, axes=x.axes[1:]) if isinstance(x, View) else x for x in xs]
        outs = replay(trace, jaxpr, closed, [*args, *layers])
        outs = [
            None
            if i in fixed or i - n_carry in handed
            else out
            if i >= n_carry and isinstance(out, Result) and out.leaf not in sliced
            else plain(trace, out, eqn, "the loop returns the weight")
            for i, out in enumerate(outs)
        ]
        return [x for i, x in enumerate(outs[:n_carry]) if i not in fixed], outs[n_carry:]

    moved, ys = lax.scan(
        body,
        init,
        (xs, steps),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    ys = [_stacked(y) if isinstance(y, Result) else y for y in ys]
    moved_on = iter(moved)
    final = [carry[i] if i in fixed else next(moved_on) for i in range(n_carry)]
    return [*final, *(xs[handed[i]] if i in handed else y for i, y in enumerate(ys))]


def _stacked(result: Result) -> Result:
    """The results of all steps, which lie along a new first axis."""
    features = None if result.features is None else result.features + 1
    return dataclasses.replace(result, features=features)


def _repeated(values: Sequence[Any], times: int) -> list[Any]:
    """The values, where each weight is used so many times as often."""
    return [
        dataclasses.replace(x, times=x.times * times) if isinstance(x, View) else x for x in values
    ]


def _scannable(trace: Trace, x: Any, eqn: compat.Eqn) -> Any:
    """An operand that a scan can slice along its first axis."""
    if isinstance(x, Result):
        return x.value
    if not isinstance(x, View):
        return x
    x = dataclasses.replace(x, base=packed.spread_along(x.base, (0,)))
    if x.roles is None:
        return x
    if x.role(0) is None:
        roles: list[Role] = ["out"] * x.base.ndim
        x = give_roles(x, ["stack", *roles[1:]])
    if x.role(0) != "stack":
        return plain(trace, x, eqn, f"the loop runs over an {x.role(0)}-axis of the weight")
    return x


def _unchanged(carry: Sequence[Any], invars: Sequence[Any], outvars: Sequence[Any]) -> set[int]:
    """The carried weights that a loop hands on as they are."""
    pairs = enumerate(zip(carry, invars, outvars, strict=False))
    return {i for i, (x, before, after) in pairs if isinstance(x, View) and before is after}


def _while(trace: Trace, eqn: compat.Eqn, operands: list[Any], replay: Replay) -> list[Any]:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]
    carry = operands[n_cond + n_body :]
    cond_jaxpr, cond_closed = compat.open_jaxpr(params["cond_jaxpr"])
    body_jaxpr, body_closed = compat.open_jaxpr(params["body_jaxpr"])
    fixed = _unchanged(carry, body_jaxpr.invars[n_body:], body_jaxpr.outvars)
    drops = any(isinstance(x, View) and x.drops for x in operands)

    def state(moving: Sequence[Any]) -> list[Any]:
        still = iter(moving)
        return [carry[i] if i in fixed else next(still) for i in range(len(carry))]

    def cond(loop: tuple[Any, list[Any]]) -> jax.Array:
        (done,) = replay(trace, cond_jaxpr, cond_closed, [*cond_consts, *state(loop[1])])
        return plain(trace, done, eqn, "")

    def body(loop: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        step, moving = loop
        args = [*body_consts, *state(moving)]
        if step is not None:
            args = [fold_in(x, step) if isinstance(x, View) else x for x in args]
        outs = replay(trace, body_jaxpr, body_closed, args)
        outs = [
            plain(trace, x, eqn, "the loop returns the weight")
            for i, x in enumerate(outs)
            if i not in fixed
        ]
        return None if step is None else step + 1, outs

    init = [
        plain(trace, x, eqn, "the loop changes the weight")
        for i, x in enumerate(carry)
        if i not in fixed
    ]
    _, moved = lax.while_loop(cond, body, (jnp.int32(0) if drops else None, init))
    return state(moved)


def _shard_map(trace: Trace, eqn: compat.Eqn, operands: list[Any], replay: Replay) -> list[Any]:
    jaxpr, consts = compat.open_jaxpr(eqn.params["jaxpr"])
    operands_placed: list[Any] = []
    specs: list[PartitionSpec] = []
    for x, spec in zip(operands, eqn.params["in_specs"], strict=True):
        x = x.value if isinstance(x, Result) else x
        operands_placed.append(placed(x) if isinstance(x, View) else x)
        specs += _part_specs(x, spec) if isinstance(x, View) else [spec]
    arrays, structure = jax.tree.flatten(operands_placed)
    results: list[Any] = []

    def body(*shards: Any) -> tuple[Any, ...]:
        outs = replay(trace, jaxpr, consts, jax.tree.unflatten(structure, shards))
        results[:] = [out if isinstance(out, Result) else None for out in outs]
        return tuple(plain(trace, out, eqn, "the map returns the weight") for out in outs)

    outs = compat.shard_map(body, eqn.params, tuple(specs))(*arrays)
    return [
        out if result is None else dataclasses.replace(result, value=out, x=None)
        for out, result in zip(outs, results, strict=True)
    ]


def _part_specs(view: View, spec: PartitionSpec) -> list[PartitionSpec]:
    """The spec of the base and of each factor: every axis is split as the base's is."""
    full = PartitionSpec(*spec, *[None] * (view.base.ndim - len(spec)))
    specs = packed.split_like(view.base, full)

    def part(array: jax.Array, dims: Dims, _: Dims) -> jax.Array:
        specs.append(split_as(full, dims, array, view.base))
        return array

    remap(view, view, part)
    return specs


CONTROL: dict[str, Control] = {
    "checkpoint": _remat,
    "closed_call": _inline,
    "cond": _cond,
    "core_call": _inline,
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
    "jit": _jit,
    "optimization_barrier": _barrier,
    "remat2": _remat,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
