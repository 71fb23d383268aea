"""The adapter: a pytree of a few small arrays, and what they belong to."""

import dataclasses
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from peftjax.config import AdapterConfig
from peftjax.engine.views import Layer
from peftjax.factors import Arrays, Factors, WeightSpec
from peftjax.sites import Leaf, Site, Sites
from peftjax.targeting import bias_leaves, saved_leaves, select_sites, unmatched_patterns
from peftjax.trees import leaf_paths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Adapter:
    """An adapter of a frozen model: a pytree whose arrays are all it adds.

    Attributes:
      params: the trainable arrays, ``{module: {name: array}}``, under PEFT's names. Take
        gradients with respect to these alone.
      buffers: the frozen arrays: scales, masks, initial factors. New values never recompile.
      key: None, or the PRNG key of a training step, which turns dropout on.
      config: the config. Static.
      sites: the adapted weights. Static.
      saved: whole leaves of the base that are trained too: ``modules_to_save``, ``bias``. Static.
    """

    params: dict[str, Arrays]
    buffers: dict[str, Arrays]
    key: PRNGKeyArray | None
    config: AdapterConfig = dataclasses.field(metadata={"static": True})
    sites: Sites = dataclasses.field(metadata={"static": True})
    saved: tuple[Leaf, ...] = dataclasses.field(default=(), metadata={"static": True})

    def replace(self, **changes: Any) -> Self:
        """This adapter with other values in some of its fields.

        Example:
          >>> doubled = adapter.replace(params=jax.tree.map(lambda x: 2 * x, adapter.params))
        """
        return dataclasses.replace(self, **changes)

    def train(self, key: PRNGKeyArray) -> Self:
        """This adapter with dropout on, drawn from ``key``; pass a new key every step."""
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        return dataclasses.replace(self, key=key)

    def __repr__(self) -> str:
        size = sum(x.size for x in jax.tree.leaves(self.params))
        kind = type(self.config).__name__.removesuffix("Config")
        mode = "inference" if self.key is None else "training"
        return f"Adapter({kind}, {len(self.sites)} modules, {size:,} parameters, {mode})"


def init_adapter(
    key: PRNGKeyArray,
    config: AdapterConfig,
    sites: Sites,
    params: Any = None,
    *,
    dtype: DTypeLike | None = None,
) -> Adapter:
    """Makes a new adapter for the sites that a config selects.

    Args:
      key: a PRNG key. The numbers of one module depend on its path and this key alone.
      config: the config, such as a ``LoraConfig``.
      sites: what ``find_sites`` found.
      params: the base's params. Needed by ``modules_to_save``, a trained ``bias`` and initial
        values taken from the weights (PiSSA, OLoRA); otherwise only checked.
      dtype: dtype of the adapter's arrays; by default the weight's own, and float32 for weights
        of half precision.

    Returns:
      The adapter, which starts as the identity unless the config says otherwise.

    Raises:
      NoMatchingModuleError: a target or a module to save is not there.
      ValueError: the params are missing or not those of ``sites``, or the dtype is not floating.
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"an adapter's dtype must be floating, got {jnp.dtype(dtype).name}")
    chosen = select_sites(config, sites)
    if callable(config.target_modules):
        config = dataclasses.replace(config, target_modules=tuple(chosen))
    saved = {leaf.path: leaf for leaf in saved_leaves(config, sites)}
    saved |= {
        leaf.path: leaf for leaf in bias_leaves(getattr(config, "bias", "none"), sites, chosen)
    }
    method = config.method
    leaves = None if params is None else leaf_paths(params)
    if leaves is None and (saved or method.needs_weight(config)):
        what = f"copies of {', '.join(saved)}" if saved else "initial factors out of the weights"
        raise ValueError(f"this config starts from {what}: pass params to init_adapter")
    if leaves is not None:
        check_leaves(leaves, chosen, tuple(saved.values()))

    trainable: dict[str, Arrays] = {}
    frozen: dict[str, Arrays] = {}
    for site in chosen.values():
        weight = leaves[site.path] if leaves is not None and method.needs_weight(config) else None
        made = _init_site(_path_key(key, site.path), config, site, weight, dtype)
        trainable[site.name], frozen[site.name] = made
    for path, leaf in saved.items():
        trainable.setdefault(leaf.module, {})[leaf.leaf_name] = jnp.array(leaves[path])
    adapter = Adapter(trainable, frozen, None, config, Sites(chosen.sites), tuple(saved.values()))
    for site in chosen.values():
        jax.eval_shape(lambda a, site=site: bias_shift(a, site), adapter)
    _warn_unmatched(config, chosen)
    return adapter


def _warn_unmatched(config: AdapterConfig, chosen: Sites) -> None:
    """Warns of patterns that no adapted module matches, so that they do nothing."""
    for field in ("rank_pattern", "alpha_pattern"):
        idle = unmatched_patterns(getattr(config, field, {}), chosen)
        if idle:
            warnings.warn(
                f"{field}: {', '.join(map(repr, idle))} matches no adapted module",
                UserWarning,
                stacklevel=3,
            )


def check_leaves(leaves: Mapping[str, Any], sites: Sites, saved: Sequence[Leaf] = ()) -> None:
    """Raises a ValueError unless every adapted leaf is there, in the shape the adapter knows."""
    wanted = [(s.path, s.shape, s.name) for s in sites.values()]
    wanted += [(leaf.path, leaf.shape, leaf.path) for leaf in saved]
    problems = []
    for path, shape, name in wanted:
        if path not in leaves:
            problems.append(f"{name}: there is no {path}")
        elif tuple(leaves[path].shape) != shape:
            problems.append(f"{path}: {tuple(leaves[path].shape)} instead of {shape}")
    if problems:
        shown = "\n  ".join(problems[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"this adapter was made for other params; make one with find_sites and init_adapter "
            f"on these, or pass the params it was made for:\n  {shown}{more}"
        )


def _path_key(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """A key of its own for every path, the same in every process and with any other targets."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def _init_site(
    key: PRNGKeyArray,
    config: AdapterConfig,
    site: Site,
    weight: Array | None,
    dtype: DTypeLike | None,
) -> tuple[Arrays, Arrays]:
    """The arrays of one site: layers of equal settings together, ranks padded to the largest."""
    method, full = config.method, tuple(site.shape[axis] for axis in site.stack_axes)
    if not jnp.issubdtype(site.dtype, jnp.floating):
        raise ValueError(f"{site.path} holds {site.dtype} values: only floating weights adapt")
    own = jnp.float32 if jnp.finfo(site.dtype).bits < 32 else site.dtype
    spec = WeightSpec(site.kind, site.in_shape, site.out_shape, jnp.dtype(dtype or own))

    def one(key: Array, weight: Array | None, settings: Any) -> tuple[Arrays, Arrays]:
        return method.init(key, config, spec, settings, weight)

    if weight is not None:
        weight = jnp.transpose(weight, (*site.stack_axes, *site.in_axes, *site.out_axes))
    if not site.stack_axes:
        return one(key, weight, method.settings(config, site, None))

    keys = jax.random.split(key, full)
    layers = site.layers if site.layers is not None else tuple(range(full[0]))
    groups: dict[Any, list[int]] = {}
    for place, layer in enumerate(layers):
        groups.setdefault(method.settings(config, site, layer), []).append(place)
    order = [place for places in groups.values() for place in places]
    parts = []
    for settings, places in groups.items():
        index = jnp.asarray([layers[place] for place in places])
        make = lambda key, weight, settings=settings: one(key, weight, settings)  # noqa: E731
        for _ in full:
            make = jax.vmap(make, in_axes=(0, None if weight is None else 0))
        parts.append(make(keys[index], None if weight is None else weight[index]))
    if len(parts) == 1:
        return parts[0]
    params = _stacked([p for p, _ in parts], method.rank_axes, len(full), order)
    buffers = _stacked([b for _, b in parts], method.rank_axes, len(full), order)
    ranked = next((name for name in method.rank_axes if name in params), None)
    if ranked is not None:
        axis = method.rank_axes[ranked]
        sizes = [p[ranked].shape[_stacked_axis(axis, len(full))] for p, _ in parts]
        masks = [
            (jnp.arange(max(sizes)) < size).astype(spec.dtype)
            for size, places in zip(sizes, groups.values(), strict=True)
            for _ in places
        ]
        by_layer = jnp.stack([masks[order.index(place)] for place in range(len(order))])
        shape = (len(layers), *full[1:], max(sizes))
        inner = by_layer.reshape(len(layers), *[1] * len(full[1:]), max(sizes))
        if len(set(sizes)) > 1:
            buffers["rank_mask"] = jnp.broadcast_to(inner, shape)
    return params, buffers


def _stacked_axis(axis: int, stack: int) -> int:
    return axis if axis < 0 else axis + stack


def _stacked(
    parts: list[Arrays], rank_axes: Mapping[str, int], stack: int, order: list[int]
) -> Arrays:
    """Groups of layers put back into one stack, padded with zeros along the rank."""
    inverse = jnp.asarray([order.index(place) for place in range(len(order))])
    joined = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        if name in rank_axes:
            axis = _stacked_axis(rank_axes[name], stack) % arrays[0].ndim
            rank = max(array.shape[axis] for array in arrays)
            arrays = [
                jnp.pad(
                    array,
                    [(0, rank - n if i == axis else 0) for i, n in enumerate(array.shape)],
                )
                for array in arrays
            ]
        joined[name] = jnp.concatenate(arrays)[inverse]
    return joined


def site_layer(adapter: Adapter, site: Site) -> Layer:
    """What an adapter does to one weight, all its stacked layers at once."""
    config, method = adapter.config, adapter.config.method
    own = set(adapter.params[site.name]) - {
        leaf.leaf_name for leaf in adapter.saved if leaf.module == site.name
    }
    params = {name: adapter.params[site.name][name] for name in sorted(own)}

    def factors(params: Arrays, buffers: Arrays) -> Factors:
        return method.factors(config, params, buffers)

    for _ in site.stack_axes:
        factors = jax.vmap(factors)
    full = tuple(site.shape[axis] for axis in site.stack_axes)
    made = factors(params, adapter.buffers[site.name])
    if site.layers is not None:
        made = Factors(
            A=_spread(made.A, site, 0),
            B=_spread(made.B, site, 0),
            in_scale=_spread(made.in_scale, site, 1),
            out_scale=_spread(made.out_scale, site, 1),
            dropout=made.dropout,
        )
    if adapter.key is None:
        return Layer(made)
    key = _path_key(adapter.key, site.path)
    return Layer(made, jax.random.split(key, full) if full else key)


def _spread(array: Array | None, site: Site, fill: int) -> Array | None:
    """The arrays of the selected layers among those of all layers, which change nothing."""
    if array is None:
        return None
    whole = jnp.full((site.shape[site.stack_axes[0]], *array.shape[1:]), fill, array.dtype)
    return whole.at[jnp.asarray(site.layers)].set(array)


def bias_shift(adapter: Adapter, site: Site) -> Array | None:
    """What an adapter adds to the bias of one site, in the layout of that bias; None if nothing.

    Raises:
      ValueError: there is no bias to add it to.
    """
    config, method = adapter.config, adapter.config.method

    def shift(params: Arrays, buffers: Arrays) -> Array | None:
        return method.bias(config, params, buffers)

    for _ in site.stack_axes:
        shift = jax.vmap(shift)
    made = shift(adapter.params[site.name], adapter.buffers[site.name])
    if made is None:
        return None
    if site.bias is None:
        raise ValueError(
            f"{site.name} has no bias, so the adapter cannot have one there: exclude the module or "
            f"leave the adapter's own bias off"
        )
    if site.layers is not None:
        made = _spread(made, site, 0)
    stack = len(site.stack_axes)
    return jnp.moveaxis(made, range(stack), site.bias_stack_axes)
