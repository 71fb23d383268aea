"""Many small arrays as few: those that are alike, on one new axis, for a checkpoint to hold."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array

# Arrays that are alike are written as one: Orbax spends some hundred bytes on each.
Groups = list[list[str]]


def alike(arrays: Mapping[str, Any]) -> Groups:
    """The paths of arrays of one shape, dtype and place; those without entries are left out."""
    groups: dict[Any, list[str]] = {}
    for path, x in arrays.items():
        if x.size:
            kind = (x.shape, x.dtype, getattr(x, "sharding", None))
            groups.setdefault(kind, []).append(path)
    return list(groups.values())


def stacked(arrays: Mapping[str, Any], groups: Groups) -> dict[str, Array]:
    """The arrays of each group on a new first axis, under its number; keys as their numbers."""

    def stack(paths: list[str]) -> Array:
        own = [_numbers(arrays[path]) for path in paths]
        where = _ahead(getattr(own[0], "sharding", None))
        with _mesh_of(where):
            return jax.jit(_stack, out_shardings=where)(*own)

    return {str(i): stack(paths) for i, paths in enumerate(groups)}


def _mesh_of(where: Any) -> AbstractContextManager[Any]:
    """A context in which a program may run on one device, whatever mesh is set outside of it."""
    if not isinstance(where, SingleDeviceSharding):
        return nullcontext()
    return jax.set_mesh(Mesh(list(where.device_set), ("alone",)))


def _stack(*arrays: Array) -> Array:
    # A function of the module, for every save but the first to find it compiled.
    return jnp.stack(arrays)


def as_stacked(
    shapes: Mapping[str, Any], like: Mapping[str, Any], groups: Groups
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the stacked arrays, each where the first of its group is wanted."""

    def shape(saved: Any, paths: list[str]) -> jax.ShapeDtypeStruct:
        places = [_place(like[path]) for path in paths]
        # Without one Orbax would take the sharding of the machine that saved.
        here = SingleDeviceSharding(jax.local_devices()[0])
        where = here if None in places else _ahead(places[0])
        return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=where)

    return {str(i): shape(shapes[str(i)], paths) for i, paths in enumerate(groups)}


def unstacked(
    stacked: Mapping[str, Array], like: Mapping[str, Any], groups: Groups
) -> dict[str, Array]:
    """The arrays of all groups, in the dtypes and where they are wanted."""
    arrays: dict[str, Array] = {
        path: jnp.zeros(x.shape, x.dtype) for path, x in like.items() if not x.size
    }
    for i, paths in enumerate(groups):
        wanted = [like[path] for path in paths]

        def split(whole: Any, wanted: list[Any] = wanted) -> list[Array]:
            return [_as_wanted(whole[n], x) for n, x in enumerate(wanted)]

        whole: Any = stacked[str(i)]
        if isinstance(whole.sharding, SingleDeviceSharding):
            # A program would bind them to that device, and refuse to run where a mesh is set.
            own = split(np.asarray(whole))
        else:
            own = jax.jit(split)(whole)
        for path, x, array in zip(paths, wanted, own, strict=True):
            where = _place(x)
            arrays[path] = jnp.asarray(array) if where is None else jax.device_put(array, where)
    return arrays


def _place(like: Any) -> Any:
    """Where an array is wanted; None for one that goes along with the others on any mesh."""
    return getattr(like, "sharding", None) if getattr(like, "committed", True) else None


def _as_wanted(array: Any, like: Any) -> Any:
    if not _is_key(like):
        return array.astype(like.dtype)
    # Inside a trace alone the shape of a key says what generator it is for.
    known: list[Any] = []
    jax.eval_shape(lambda key: known.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(array, impl=known[0])


def _ahead(where: Any) -> Any:
    """A sharding with an axis before all others that is not split."""
    if not isinstance(where, NamedSharding):
        return where
    return where.update(spec=PartitionSpec(None, *where.spec))


def _is_key(array: Any) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def key_types(arrays: Mapping[str, Any]) -> dict[str, str]:
    """The generators of the PRNG keys among some arrays; their numbers do not tell them."""
    return {path: str(x.dtype) for path, x in arrays.items() if _is_key(x)}


def _numbers(array: Any) -> Any:
    return jax.random.key_data(array) if _is_key(array) else array


def check_arrays(
    where: str, groups: Groups, shapes: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Raises a ValueError for the first array that is not on both sides alike."""
    saved = {path: shapes[str(i)] for i, paths in enumerate(groups) for path in paths}
    for path in dict.fromkeys([*wanted, *saved]):
        if path not in wanted or (path not in saved and wanted[path].size):
            side = "here" if path in wanted else "in it"
            raise ValueError(
                f"{where} does not fit: {path!r} is only {side}; restore with what the state was "
                f"made with, the optimizer too"
            )
        ours, theirs = wanted[path], saved.get(path)
        if theirs is None:
            continue
        ours = jax.eval_shape(_numbers, ours)
        if tuple(ours.shape) != tuple(theirs.shape[1:]):
            raise ValueError(
                f"{where} does not fit: {path!r} has shape {tuple(theirs.shape[1:])} in it and "
                f"{tuple(ours.shape)} here"
            )
        kinds = {np.dtype(x.dtype) for x in (ours, theirs)}
        if len(kinds) > 1 and not all(jnp.issubdtype(kind, np.floating) for kind in kinds):
            raise ValueError(
                f"{where} does not fit: {path!r} is {theirs.dtype} in it and {ours.dtype} here"
            )


def check_keys(where: str, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raises a ValueError for the first PRNG key of another generator."""
    for path in dict.fromkeys([*saved, *wanted]):
        theirs, ours = saved.get(path, "no typed key"), wanted.get(path, "no typed key")
        if theirs != ours:
            raise ValueError(
                f"{where} does not fit: {path!r} is {theirs} in it and {ours} here; make the key "
                f"with the `impl` that the saved one had"
            )
