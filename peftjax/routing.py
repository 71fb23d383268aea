"""Banks: many adapters of one family in one program, by row or mixed."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from peftjax.adapter import Adapter, site_arrays
from peftjax.config import AdapterConfig
from peftjax.factors import Arrays
from peftjax.routes import Mix, Rows
from peftjax.sites import Site, Sites

# Masks that tell what of an expert is there, besides the arrays of its method.
PRESENT, RANK_MASK = "present", "rank_mask"


@dataclasses.dataclass(frozen=True, repr=False)
class AdapterBank:
    """Adapters of one family, their arrays stacked, to be chosen by row or mixed.

    ``rows`` and ``mix`` give an adapter, which is a pytree, for ``adapted`` and for jitted
    functions; the bank itself has names and is none.

    Attributes:
      adapter: the stacked adapter; every array has the experts on its first axis, and
        ``adapter.params`` can be trained like any other.
      names: the name of each expert; None where there is room for one more.
      configs: the config of each, likewise.
    """

    adapter: Adapter
    names: tuple[str | None, ...]
    configs: tuple[AdapterConfig | None, ...]

    def rows(self, index: Int[Array, " batch"] | Sequence[int | str | None]) -> Adapter:
        """The bank with one expert for each row of a batch; any other choice is no new program.

        Args:
          index: the place of each row's expert in the bank, -1 for the model without any; of a
            list also its name, None for the model without any.

        Raises:
          KeyError: there is no expert of that name.
          ValueError: the index is no vector of integers, or is beyond the bank; of a traced one
            that cannot be seen, and such rows are NaN.
        """
        if isinstance(index, Sequence):
            places = (
                -1 if i is None else self.place(i) if isinstance(i, str) else i for i in index
            )
            index = jnp.asarray(list(places))
        if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(
                f"rows take a vector of integers, one for each row of the batch; got "
                f"{index.dtype}{list(index.shape)}"
            )
        if not isinstance(index, jax.core.Tracer):
            there = [-1, *(i for i, name in enumerate(self.names) if name is not None)]
            wrong = sorted(set(np.asarray(index).tolist()).difference(there))
            if wrong:
                raise ValueError(
                    f"there is no expert at {wrong}: the bank has {len(self)}, {self.experts}, and "
                    f"-1 is the model without any"
                )
        return self.adapter.replace(route=Rows(index))

    def mix(
        self,
        weights: Float[ArrayLike, " experts"]
        | Float[ArrayLike, "batch experts"]
        | Float[ArrayLike, "batch sequence experts"],
    ) -> Adapter:
        """The bank with all its experts at once, each with a weight, for each row or token.

        Args:
          weights: the weight of each expert; of each row and expert; or of each row, token and
            expert. They may be traced, and others are no new program. With one weight for each
            expert the result can also be merged.

        Raises:
          ValueError: the family scales its inputs or outputs, so that it can be chosen by row
            alone; or the weights are of another number of experts.
        """
        weights = jnp.asarray(weights)
        if not 1 <= weights.ndim <= 3 or weights.shape[-1] != len(self.names):
            raise ValueError(
                f"weights of a bank of {len(self.names)} experts have shape (experts,), (batch, "
                f"experts) or (batch, sequence, experts), got {weights.shape}"
            )
        config = self.adapter.config
        if not config.method.mixes(config):
            raise ValueError(
                f"a mix of experts is a sum of their changes, and those of "
                f"{type(config).__name__} with these fields are no sums: choose them by row"
            )
        return self.adapter.replace(route=Mix(weights))

    def add(self, name: str, adapter: Adapter) -> "AdapterBank":
        """The bank with one more expert, or another one of that name; no new program.

        Args:
          name: its name.
          adapter: the expert.

        Raises:
          ValueError: there is no room for another expert, for its rank or for its modules.
        """
        free = [i for i, own in enumerate(self.names) if own is None]
        if name not in self.names and not free:
            raise ValueError(
                f"the bank is full with {len(self.names)} experts: make one with more room, "
                f"stack_adapters(..., capacity={2 * len(self.names)})"
            )
        place = self.names.index(name) if name in self.names else free[0]
        _check_alike({"the bank": self.adapter, name: adapter})
        slots = _slots(adapter, self.adapter.sites, _templates(self.adapter), name)
        params, buffers = (
            jax.tree.map(lambda whole, own: whole.at[place].set(own), whole, own)
            for whole, own in zip((self.adapter.params, self.adapter.buffers), slots, strict=True)
        )
        return AdapterBank(
            self.adapter.replace(params=params, buffers=buffers),
            _with(self.names, place, name),
            _with(self.configs, place, adapter.config),
        )

    def remove(self, name: str) -> "AdapterBank":
        """The bank without one expert, whose place is free then; no new program.

        Raises:
          KeyError: there is no expert of that name.
        """
        place = self.place(name)
        buffers = {
            module: own | {PRESENT: own[PRESENT].at[place].set(False)}
            for module, own in self.adapter.buffers.items()
        }
        return AdapterBank(
            self.adapter.replace(buffers=buffers),
            _with(self.names, place, None),
            _with(self.configs, place, None),
        )

    def place(self, name: str) -> int:
        """The place of an expert in the bank.

        Raises:
          KeyError: there is no expert of that name.
        """
        if name not in self.names:
            raise KeyError(f"there is no expert {name!r} in the bank, only {self.experts}")
        return self.names.index(name)

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the experts, without free places."""
        return tuple(name for name in self.names if name is not None)

    def __getitem__(self, name: str) -> Adapter:
        place = self.place(name)
        config = self.configs[place]
        assert config is not None
        return expert(self.adapter, place, config)

    def __iter__(self) -> Iterator[str]:
        return iter(self.experts)

    def __len__(self) -> int:
        return len(self.experts)

    def __repr__(self) -> str:
        kind = type(self.adapter.config).__name__.removesuffix("Config")
        room = f", room for {len(self.names) - len(self)} more" if None in self.names else ""
        return f"AdapterBank({kind}, {len(self)} experts{room}: {', '.join(self.experts)})"


def stack_adapters(
    adapters: Mapping[str, Adapter], *, capacity: int | None = None, r: int | None = None
) -> AdapterBank:
    """Stacks adapters of one family, so that one program serves a batch with any of them.

    Their ranks, scales and modules may differ: smaller ranks are padded, exactly, and an expert
    leaves a module alone that it does not adapt.

    Args:
      adapters: the adapters by name, made for one model.
      capacity: how many the bank has room for; by default it is full.
      r: the rank it has room for at every module; by default the largest there is.

    Returns:
      The bank.

    Raises:
      ValueError: the adapters are of different families or models, differ in a field that is part
        of the program (such as ``lora_dropout``), or train whole leaves, which have no rows.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params, x = {"dense": {"kernel": jnp.ones((4, 3))}}, jnp.ones((2, 5, 4))
      >>> sites = peftjax.find_sites(apply_fn, params, x)
      >>> a, b = (
      ...     peftjax.init_adapter(
      ...         jax.random.key(r),
      ...         peftjax.LoraConfig(r=r, target_modules=["dense"], init_lora_weights=False),
      ...         sites,
      ...     )
      ...     for r in (2, 3)
      ... )
      >>> bank = peftjax.stack_adapters({"a": a, "b": b}, capacity=8)
      >>> bank
      AdapterBank(Lora, 2 experts, room for 6 more: a, b)
      >>> adapted = peftjax.adapt(apply_fn)
      >>> out = adapted(params, bank.rows(["b", None]), x)
      >>> bool(jnp.allclose(out[0], adapted(params, b, x)[0]))
      True
    """
    if not adapters:
        raise ValueError("there are no adapters to stack")
    room = len(adapters) if capacity is None else capacity
    if room < len(adapters):
        raise ValueError(f"{len(adapters)} adapters do not fit into a capacity of {room}")
    _check_alike(adapters)
    sites = _union(adapters)
    templates = {site.name: _template(site, adapters, r) for site in sites.values()}
    slots = [_slots(each, sites, templates, name) for name, each in adapters.items()]
    slots += [_slots(None, sites, templates, "")] * (room - len(adapters))
    params, buffers = jax.tree.map(_stacked, *slots)
    config = next(iter(adapters.values())).config
    free = [None] * (room - len(adapters))
    return AdapterBank(
        Adapter(params, buffers, None, config, sites),
        (*adapters, *free),
        (*(each.config for each in adapters.values()), *free),
    )


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


Template = tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]


def _with(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _stacked(*arrays: Any) -> Array:
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


def _check_alike(adapters: Mapping[str, Adapter]) -> None:
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


def _union(adapters: Mapping[str, Adapter]) -> Sites:
    """Every site that one of the adapters adapts, with every layer."""
    found: dict[str, Site] = {}
    others: dict[str, Site] = {}
    for name, adapter in adapters.items():
        for site in adapter.sites.values():
            before = found.setdefault(site.name, site)
            if dataclasses.replace(before, layers=site.layers) != site:
                raise ValueError(
                    f"{site.name}: {name} was made for another model than the adapters before it: "
                    f"make all of them from one find_sites"
                )
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


def _template(site: Site, adapters: Mapping[str, Adapter], r: int | None) -> Template:
    """The shapes of one expert's arrays at a site, with room for every adapter's."""
    having = {name: each for name, each in adapters.items() if site.name in each.sites}
    parts: list[dict[str, jax.ShapeDtypeStruct]] = [{}, {}]
    rank = 0
    for name, adapter in having.items():
        axes = _rank_axes(adapter.config, len(site.stack_axes))
        for known, arrays in zip(parts, site_arrays(adapter, site), strict=True):
            own = {n: x for n, x in arrays.items() if n != RANK_MASK}
            if known and set(known) != set(own):
                raise ValueError(
                    f"{site.name}: {name} has the arrays {sorted(own)} and another adapter "
                    f"{sorted(known)}: adapters that keep their start (PiSSA, OLoRA) are stacked "
                    f"among themselves, or after convert_to_lora"
                )
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


def _slots(
    adapter: Adapter | None, sites: Sites, templates: Mapping[str, Template], name: str
) -> tuple[dict[str, Arrays], dict[str, Arrays]]:
    """The arrays of one expert as a bank holds them; those of none without an adapter."""
    unknown = [] if adapter is None else [each for each in adapter.sites if each not in sites]
    if unknown:
        raise ValueError(
            f"{name} adapts {', '.join(unknown[:5])}, for which the bank has no room: make it with "
            f"an adapter that adapts them too"
        )
    slots = {site.name: _slot(adapter, site, templates[site.name], name) for site in sites.values()}
    params, buffers = ({module: own[part] for module, own in slots.items()} for part in (0, 1))
    return params, buffers


def _slot(
    adapter: Adapter | None, site: Site, template: Template, name: str
) -> tuple[Arrays, Arrays]:
    """The arrays of one expert at one site: zeros, and not there, where it has none."""
    if adapter is None or site.name not in adapter.sites:
        return jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), template)
    own = adapter.sites[site.name]
    axes = _rank_axes(adapter.config, len(site.stack_axes)) | {RANK_MASK: (-1,)}
    arrays, kept = site_arrays(adapter, own)
    frozen: dict[str, Any] = dict(kept)
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


def _templates(stacked: Adapter) -> dict[str, Template]:
    """The shapes of one expert's arrays in a stacked adapter."""

    def one(array: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)

    both = jax.tree.map(one, (stacked.params, stacked.buffers))
    return {name: (both[0][name], both[1][name]) for name in stacked.sites}
