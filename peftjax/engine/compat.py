"""Every branch on a JAX version, and every name that is not in JAX's stable API."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import jax
import jax.extend.core as jex_core
from jax.extend import source_info_util
from jax.interpreters import partial_eval
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Jaxpr = jex_core.Jaxpr
Literal = jex_core.Literal
Var = jex_core.Var
DropVar = jex_core.DropVar
Eqn = jex_core.JaxprEqn


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, list]:
    """A jaxpr as an equation holds it, open or closed, and the values of its constvars."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def prune(closed: Any) -> tuple[Jaxpr, list]:
    """The jaxpr without equations whose results nothing needs; inputs and outputs unchanged."""
    jaxpr, consts = open_jaxpr(closed)
    count = len(jaxpr.constvars)
    unconstrained = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    pruned, _ = partial_eval.dce_jaxpr(unconstrained, True, instantiate=True)
    return pruned.replace(constvars=pruned.invars[:count], invars=pruned.invars[count:]), consts


def evaluate_plain(
    jaxpr: Jaxpr, eqns: Sequence[Eqn], invars: Iterable[Var], outvars: Iterable[Var], values: list
) -> list:
    """Runs equations that no adapted weight enters, exactly as JAX would."""
    segment = jaxpr.replace(
        constvars=[], invars=list(invars), outvars=list(outvars), eqns=list(eqns)
    )
    return jax.core.eval_jaxpr(segment, (), *values)


def evaluate_one(eqn: Eqn, values: list) -> list:
    """Runs one equation on other values of the same types."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def equation_context(eqn: Eqn) -> AbstractContextManager:
    """The scope names, source line and settings under which the equation was traced."""
    stack = ExitStack()
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    stack.enter_context(source_info_util.user_context(eqn.source_info.traceback, name_stack=names))
    stack.enter_context(eqn.ctx.manager)
    return stack


def scan_split(params: dict) -> tuple[int, int]:
    """Number of constants and of carries among the operands of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def shard_map(f: Callable, params: dict, in_specs: tuple) -> Callable:
    """A shard_map of ``f`` like the equation's, with the in-specs of its new operands."""
    axes = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]
    return jax.shard_map(
        f,
        mesh=params["mesh"],
        in_specs=in_specs,
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=axes,
    )


def explicit_spec(x: Any) -> PartitionSpec | None:
    """The partition spec in a type or the type of a value; None without Explicit mesh axes."""
    sharding = _sharding(x)
    if not isinstance(sharding, NamedSharding):
        return None
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return PartitionSpec(*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))


def explicit_sharding(like: Any, spec: Iterable[Any] | None) -> NamedSharding | None:
    """A spec on the mesh of ``like``, which need not be set; None without a spec."""
    return None if spec is None else NamedSharding(mesh_of(like), PartitionSpec(*spec))


def replicate(x: jax.Array) -> jax.Array:
    """``x`` with every Explicit mesh axis taken off its type."""
    spec = explicit_spec(x)
    if spec is None or all(part is None for part in spec):
        return x
    return jax.reshard(x, explicit_sharding(x, [None] * x.ndim))


def place_like(x: jax.Array, spec: PartitionSpec | None, other: jax.Array) -> jax.Array:
    """``x`` on the mesh of ``other``, with this spec where that mesh has Explicit axes."""
    mesh = mesh_of(other)
    if mesh is None or mesh.empty or (spec is None and mesh == mesh_of(x)):
        return x
    return jax.reshard(x, NamedSharding(mesh, spec or PartitionSpec(*[None] * x.ndim)))


def mesh_of(x: Any) -> Any:
    """The mesh in a type or the type of a value; None where it has none."""
    return getattr(_sharding(x), "mesh", None)


def _sharding(x: Any) -> Any:
    kind = x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)
    return getattr(kind, "sharding", None)


def on_mesh(x: Any) -> bool:
    """Whether ``x`` may be split: its type has a mesh, or one is set."""
    mesh = mesh_of(x)
    return not ((mesh is None or mesh.empty) and jax.sharding.get_abstract_mesh().empty)


def automatic(function: Callable, like: jax.Array, specs: Callable[[Any], Any]) -> Callable:
    """``function`` with the Explicit axes of the mesh of ``like`` left to the compiler inside.

    ``specs`` gives the partition specs of the results from their shapes.
    """
    if explicit_spec(like) is None:
        return function
    mesh = mesh_of(like)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind is AxisType.Explicit)

    def call(*args: Any) -> Any:
        def inside(out: Any) -> Callable:
            own = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out, is_leaf=_is_spec)
            return jax.sharding.auto_axes(function, axes=axes, out_sharding=own)

        return inside(specs(jax.eval_shape(inside(PartitionSpec()), *args)))(*args)

    return call


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def varying_axes(x: Any) -> tuple[str, ...]:
    """The shard_map axes over which the value of ``x`` is known to differ."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return tuple(sorted(getattr(kind, "vma", ()) if manual is None else manual.varying))
