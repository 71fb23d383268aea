"""Adapters on an axis of experts: stacked, and taken out of the stack again."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peftjax.adapter import Adapter, site_arrays
from peftjax.config import AdapterConfig
from peftjax.factors import Arrays
from peftjax.sites import Site, Sites

# Masks that tell what of an expert is there, besides the arrays of its method.
PRESENT, RANK_MASK = "present", "rank_mask"

Template = tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]


def expert(stacked: Adapter, place: int, config: AdapterConfig) -> Adapter:
    """One expert out of a stacked adapter, as it was before.

    Args:
      stacked: the stacked adapter, not traced: the shapes depend on what is there.
      place: the place of the expert.
      config: its own config.
    """
    chosen: list[Site] = []
    params: dict[str, Arrays] = {}
    buffers: dict[str, Arrays] = {}
    for site in stacked.sites.values():
        own, frozen = (
            {name: np.asarray(x)[place] for name, x in arrays.items()}
            for arrays in site_arrays(stacked, site)
        )
        there = frozen.pop(PRESENT)
        if not there.any():
            continue
        depth, layers = len(site.stack_axes), None
        if depth:
            kept = np.flatnonzero(there.reshape(there.shape[0], -1).any(axis=1))
            own, frozen = ({n: x[kept] for n, x in each.items()} for each in (own, frozen))
            numbers = site.layers or range(there.shape[0])
            layers = _some_of(site, (numbers[i] for i in kept))
        mask = frozen.pop(RANK_MASK, None)
        if mask is not None:
            rank = int(mask.sum(axis=-1).max())
            axes = _rank_axes(config, depth)
            own, frozen = (
                {n: _cut(x, axes.get(n, ()), rank) for n, x in each.items()}
                for each in (own, frozen)
            )
            if not mask[..., :rank].all():
                frozen[RANK_MASK] = mask[..., :rank]
        chosen.append(dataclasses.replace(site, layers=layers))
        params[site.name], buffers[site.name] = jax.tree.map(jnp.asarray, (own, frozen))
    # What another expert adapts, this one leaves alone: its files must not name it.
    known = (*stacked.sites.others, *stacked.sites.values())
    sites = _only(
        tuple(chosen), {site.name: dataclasses.replace(site, layers=None) for site in known}
    )
    return Adapter(params, buffers, None, config, sites)


def on_an_axis(*arrays: Any) -> Array:
    """Arrays on a new first axis; in host memory if they lie there."""
    return jnp.stack(arrays) if _traced(*arrays) else jnp.asarray(np.stack(arrays))


def _traced(*arrays: Any) -> bool:
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def _rank_axes(config: AdapterConfig, depth: int) -> dict[str, tuple[int, ...]]:
    """The rank axes of each array behind that many stack axes."""
    return {
        name: tuple(axis + depth if axis >= 0 else axis for axis in axes)
        for name, axes in config.method.rank_axes.items()
    }


def _cut(array: np.ndarray, axes: Sequence[int], rank: int) -> np.ndarray:
    """An array with the first entries alone along its rank axes."""
    for axis in axes:
        array = np.take(array, range(rank), axis=axis)
    return array


def check_alike(adapters: Mapping[str, Adapter]) -> None:
    """Raises a ValueError unless one program can run each of the adapters."""
    (first, like), *rest = adapters.items()
    for name, each in adapters.items():
        if each.route is not None or each.config.method.gating is not None:
            raise ValueError(f"{name} is a mixture of experts itself, and cannot be one of them")
        if each.saved:
            paths = ", ".join(leaf.path for leaf in each.saved[:5])
            raise ValueError(
                f"{name} trains whole leaves ({paths}), and rows share those of the model: stack "
                f"adapters without `modules_to_save` and `bias`"
            )
    for name, each in rest:
        if type(each.config) is not type(like.config):
            raise ValueError(
                f"a bank holds one family: {first} has a {type(like.config).__name__} and {name} a "
                f"{type(each.config).__name__}; convert_to_lora makes each a LoRA"
            )
        for field in each.config.method.program:
            ours, theirs = (getattr(config, field) for config in (like.config, each.config))
            if ours != theirs:
                raise ValueError(
                    f"`{field}` is part of the program and has to be the same: {first} has "
                    f"{ours!r} and {name} {theirs!r}"
                )
    found: dict[str, Site] = {}
    for name, each in adapters.items():
        for site in each.sites.values():
            before = found.setdefault(site.name, site)
            if dataclasses.replace(before, layers=site.layers) != site:
                raise ValueError(
                    f"{site.name}: {name} was made for another model than the adapters before it: "
                    f"make all of them from one find_sites"
                )


def union(adapters: Mapping[str, Adapter]) -> Sites:
    """Every site that one of the adapters, made for one model, adapts, with every layer."""
    found: dict[str, Site] = {}
    others: dict[str, Site] = {}
    for adapter in adapters.values():
        for site in adapter.sites.values():
            before = found.setdefault(site.name, site)
            layers: tuple[int, ...] | None = None
            if before.layers is not None and site.layers is not None:
                layers = _some_of(site, {*before.layers, *site.layers})
            found[site.name] = dataclasses.replace(site, layers=layers)
        others |= {site.name: site for site in adapter.sites.others}
    chosen = sorted(found.values(), key=lambda site: _in_tree(site.path))
    return _only(tuple(chosen), others)


def _in_tree(path: str) -> list[tuple[int, int, str]]:
    """Where a path stands in the order of a params tree: lists count, dicts are sorted."""
    return [(0, int(n), "") if n.isdigit() else (1, 0, n) for n in path.split(".")]


def _some_of(site: Site, layers: Iterable[int]) -> tuple[int, ...] | None:
    """The layers of a stacked site in order; None if these are all."""
    some = tuple(sorted(int(layer) for layer in layers))
    return None if len(some) == site.full_stack_shape[0] else some


def _only(chosen: tuple[Site, ...], others: Mapping[str, Site]) -> Sites:
    """These sites, which know what else there is in the model."""
    adapted = {site.name for site in chosen}
    rest = tuple(site for name, site in others.items() if name not in adapted)
    return Sites((*chosen, *rest)).only(chosen)


def template(site: Site, adapters: Mapping[str, Adapter], r: int | None) -> Template:
    """The shapes of one expert's arrays at a site, with room for every adapter's."""
    having = {name: each for name, each in adapters.items() if site.name in each.sites}
    parts: list[dict[str, jax.ShapeDtypeStruct]] = [{}, {}]
    rank = 0
    for name, adapter in having.items():
        axes = _rank_axes(adapter.config, len(site.stack_axes))
        for known, arrays in zip(parts, site_arrays(adapter, site), strict=True):
            own = {n: x for n, x in arrays.items() if n != RANK_MASK}
            _check_arrays(site, name, own, known or own)
            for n, x in own.items():
                rank = max(rank, *(x.shape[axis] for axis in axes.get(n, ())), 0)
                dtype = jnp.result_type(known.get(n, x), x)
                known[n] = jax.ShapeDtypeStruct(x.shape, dtype)
    if r is not None and rank > r:
        raise ValueError(f"{site.name}: an adapter of rank {rank} does not fit into r={r}")
    rank = rank if r is None else r
    for known in parts:
        for n, like in known.items():
            sizes = [*site.stack_shape, *like.shape[len(site.stack_axes) :]]
            for axis in axes.get(n, ()):
                sizes[axis] = rank
            known[n] = jax.ShapeDtypeStruct(tuple(sizes), like.dtype)
    if axes:
        dtype = next(iter(parts[0].values())).dtype
        parts[1][RANK_MASK] = jax.ShapeDtypeStruct((*site.stack_shape, rank), dtype)
    parts[1][PRESENT] = jax.ShapeDtypeStruct(site.stack_shape, bool)
    return parts[0], parts[1]


def _check_arrays(site: Site, name: str, own: Iterable[str], known: Iterable[str]) -> None:
    """Raises a ValueError unless an adapter has the arrays of the others at a site."""
    mine, theirs = (sorted(set(names) - {PRESENT, RANK_MASK}) for names in (own, known))
    if mine != theirs:
        raise ValueError(
            f"{site.name}: {name} has the arrays {mine} and another adapter {theirs}: adapters "
            f"that keep their start (PiSSA, OLoRA) are stacked among themselves, or after "
            f"convert_to_lora"
        )


def as_expert(
    adapter: Adapter | None, sites: Sites, shapes: Mapping[str, Template], name: str
) -> tuple[dict[str, Arrays], dict[str, Arrays]]:
    """The arrays of one expert as a bank holds them; those of none without an adapter."""
    unknown = [] if adapter is None else [each for each in adapter.sites if each not in sites]
    if unknown:
        raise ValueError(
            f"{name} adapts {', '.join(unknown[:5])}, for which the bank has no room: make it with "
            f"an adapter that adapts them too"
        )
    made = {site.name: _at(adapter, site, shapes[site.name], name) for site in sites.values()}
    params, buffers = ({module: own[part] for module, own in made.items()} for part in (0, 1))
    return params, buffers


def _at(
    adapter: Adapter | None, site: Site, template: Template, name: str
) -> tuple[Arrays, Arrays]:
    """The arrays of one expert at one site: zeros, and not there, where it has none."""
    if adapter is None or site.name not in adapter.sites:
        return jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), template)
    own = adapter.sites[site.name]
    axes = _rank_axes(adapter.config, len(site.stack_axes)) | {RANK_MASK: (-1,)}
    arrays, kept = site_arrays(adapter, own)
    frozen: dict[str, Any] = dict(kept)
    for mine, theirs in zip((arrays, frozen), template, strict=True):
        _check_arrays(site, name, mine, theirs)
    if RANK_MASK in template[1] and RANK_MASK not in frozen:
        n, x = next((n, x) for n, x in (arrays | frozen).items() if axes.get(n))
        frozen[RANK_MASK] = np.ones((*own.stack_shape, x.shape[axes[n][0]]))
    frozen[PRESENT] = np.ones(own.stack_shape, bool)

    def fitted(n: str, like: jax.ShapeDtypeStruct, array: Any) -> Any:
        xp = jnp if _traced(array) else np
        width = []
        for axis, (have, room) in enumerate(zip(array.shape, like.shape, strict=True)):
            stacked = axis == 0 and bool(site.stack_axes)
            ranked = axis in axes.get(n, ()) or axis - array.ndim in axes.get(n, ())
            if not stacked and (have > room or (have < room and not ranked)):
                raise ValueError(
                    f"{site.name}: {n} of {name} has shape {array.shape}, for which the others "
                    f"have {like.shape}" + ("; make room with a larger r" if ranked else "")
                )
            width.append((0, 0 if stacked else room - have))
        if n != RANK_MASK and not np.can_cast(array.dtype, like.dtype):
            raise ValueError(
                f"{site.name}: {n} of {name} is {array.dtype}, and {like.dtype} in the bank would "
                f"round it: cast the adapter first, or make a bank with it in it"
            )
        array = xp.asarray(array, like.dtype)
        array = xp.pad(array, width) if any(more for _, more in width) else array
        if not site.stack_axes or own.layers == site.layers:
            return array
        full = range(site.full_stack_shape[0])
        ours, theirs = list(own.layers or full), site.layers or full
        if beyond := [layer for layer in ours if layer not in theirs]:
            raise ValueError(f"{site.name}: the bank has no room for the layers {beyond} of {name}")
        none = xp.zeros((1, *array.shape[1:]), array.dtype)
        order = [ours.index(layer) if layer in ours else len(ours) for layer in theirs]
        return xp.concatenate([array, none])[np.asarray(order)]

    return (
        {n: fitted(n, like, arrays[n]) for n, like in template[0].items()},
        {n: fitted(n, like, frozen[n]) for n, like in template[1].items()},
    )


def templates(stacked: Adapter) -> dict[str, Template]:
    """The shapes of one expert's arrays in a stacked adapter."""

    def one(array: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)

    both = jax.tree.map(one, (stacked.params, stacked.buffers))
    return {name: (both[0][name], both[1][name]) for name in stacked.sites}
