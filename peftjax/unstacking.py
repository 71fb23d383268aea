"""Adapters taken apart into the arrays of single weights, and put together again.

Files and the algebra of adapters know single weights alone: no stacked layers, no padding.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.adapter import Adapter, check_single, path_key, site_arrays, weight_spec
from peftjax.config import AdapterConfig
from peftjax.engine.packed import dense
from peftjax.factors import Arrays, WeightSpec
from peftjax.sites import Leaf, Site, Sites
from peftjax.stacks import stacked_weight

Index = tuple[int, ...]
Part = tuple[str, Index]  # the name of a site, and where in its stack


@dataclasses.dataclass(frozen=True)
class Single:
    """One weight of a site with its own arrays, free of stack axes and padding.

    Attributes:
      site: the site.
      index: where the weight lies along the stack axes of the model's array; empty without any.
      spec: what a method is told about the weight.
      params: its trainable arrays, in host memory.
      buffers: its frozen arrays, likewise.
    """

    site: Site
    index: Index
    spec: WeightSpec
    params: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]


def indices(site: Site) -> Iterator[Index]:
    """Where the weights of a site lie along its stack axes, the layers of the model counted."""
    for index in np.ndindex(site.stack_shape):
        yield index if site.layers is None else (site.layers[index[0]], *index[1:])


def unstack(adapter: Adapter) -> dict[Part, Single]:
    """Takes an adapter apart into the weights that it adapts.

    Raises:
      ValueError: it holds several experts.
    """
    check_single(adapter)
    singles = {}
    for site in adapter.sites.values():
        own, frozen = jax.tree.map(np.asarray, site_arrays(adapter, site))
        mask = frozen.pop("rank_mask", None)
        spec = weight_spec(site, next(iter(own.values())).dtype)
        for position, index in zip(np.ndindex(site.stack_shape), indices(site), strict=True):
            params = {name: array[position] for name, array in own.items()}
            buffers = {name: array[position] for name, array in frozen.items()}
            if mask is not None:
                params = _trimmed(params, mask[position] > 0, adapter.config)
                buffers = _trimmed(buffers, mask[position] > 0, adapter.config)
            singles[site.name, index] = Single(site, index, spec, params, buffers)
    return singles


def _trimmed(
    arrays: dict[str, np.ndarray], kept: np.ndarray, config: AdapterConfig
) -> dict[str, np.ndarray]:
    """The arrays of one weight without the padding of their rank axes."""
    trimmed = dict(arrays)
    for name, axes in config.method.rank_axes.items():
        for axis in axes if name in trimmed else ():
            trimmed[name] = np.compress(kept, trimmed[name], axis=axis)
    return trimmed


def refill(
    adapter: Adapter,
    params: Mapping[Part, Mapping[str, np.ndarray]],
    saved: Mapping[Leaf, np.ndarray],
) -> Adapter:
    """An adapter with other trainable arrays for some of its weights, where the old ones lie.

    Args:
      adapter: the adapter.
      params: the arrays by weight, in the shapes that ``unstack`` gives.
      saved: the values of whole leaves that are trained too.
    """
    trainable = {module: dict(own) for module, own in adapter.params.items()}
    for site in adapter.sites.values():
        for name, old in site_arrays(adapter, site)[0].items():
            new = np.array(old)
            for position, index in zip(np.ndindex(site.stack_shape), indices(site), strict=True):
                own = params.get((site.name, index), {}).get(name)
                if own is not None:
                    new[position] = 0  # padding
                    new[(*position, *map(slice, own.shape))] = own
            trainable[site.name][name] = _placed(new, old)
    for leaf, value in saved.items():
        arrays = trainable[leaf.module]
        arrays[leaf.leaf_name] = _placed(value, arrays[leaf.leaf_name])
    return adapter.replace(params=trainable)


def _placed(array: np.ndarray, like: Any) -> Any:
    """An array where another one lies."""
    return jax.device_put(array, getattr(like, "sharding", None))


def restack(
    config: AdapterConfig,
    sites: Sites,
    params: Mapping[Part, Mapping[str, np.ndarray]],
    *,
    scaling: Mapping[Part, float] | None = None,
    saved: Mapping[Leaf, np.ndarray] | None = None,
    leaves: Mapping[str, Any] | None = None,
) -> Adapter:
    """Puts an adapter together out of the arrays of single weights.

    Args:
      config: the config, whose method makes the frozen arrays.
      sites: the adapted sites.
      params: the trainable arrays of each weight of each site.
      scaling: the scales of the weights, where the config does not tell them.
      saved: the values of whole leaves that are trained too.
      leaves: the base's arrays by path, if the frozen arrays are taken out of them.
    """
    trainable: dict[str, Arrays] = {}
    frozen: dict[str, Arrays] = {}
    for site in sites.values():
        trainable[site.name], frozen[site.name] = _site_arrays(config, site, params, leaves)
        if scaling is not None:
            scales = [scaling[site.name, index] for index in indices(site)]
            like = frozen[site.name]["scaling"]
            frozen[site.name]["scaling"] = jnp.asarray(scales, like.dtype).reshape(like.shape)
    for leaf, value in (saved or {}).items():
        trainable.setdefault(leaf.module, {})[leaf.leaf_name] = jnp.asarray(value)
    return Adapter(trainable, frozen, None, config, sites, tuple(saved or ()))


def _site_arrays(
    config: AdapterConfig,
    site: Site,
    params: Mapping[Part, Mapping[str, np.ndarray]],
    leaves: Mapping[str, Any] | None,
) -> tuple[Arrays, Arrays]:
    """The trainable and the frozen arrays of a site, stack axes in front.

    All but what a method computes itself is done in host memory: device arrays of many shapes
    would be many programs to compile.
    """
    method = config.method
    own = [params[site.name, index] for index in indices(site)]
    spec = weight_spec(site, np.result_type(*(x.dtype for each in own for x in each.values())))
    # A key of zero: where frozen arrays are drawn, a file does not say what was drawn.
    key = path_key(jax.random.key(0), site.path)
    base = dense(leaves[site.path]) if leaves and method.buffers_read_weight(config) else None
    frozen = []
    for index in indices(site):
        settings = method.settings(config, site, index[0] if index else None)
        one = (
            base if base is None else jnp.moveaxis(base, site.stack_axes, range(len(index)))[index]
        )
        made = method.buffers(key, config, settings, stacked_weight(site, spec, one))
        frozen.append({name: np.asarray(x) for name, x in made.items()})

    axes = method.rank_axes
    ranks = [next((x[n].shape[axes[n][0]] for n in axes if n in x), 0) for x in own]
    mask = method.rank_mask(config, site)
    if mask is None and len(set(ranks)) > 1:
        mask = np.arange(max(ranks)) < np.reshape(ranks, (*site.stack_shape, 1))
    trainable, buffers = (_stacked(arrays, site, axes, max(ranks)) for arrays in (own, frozen))
    if mask is not None:
        buffers["rank_mask"] = jnp.asarray(mask, spec.dtype)
    return trainable, buffers


def _stacked(
    singles: Sequence[Mapping[str, np.ndarray]],
    site: Site,
    rank_axes: Mapping[str, tuple[int, ...]],
    rank: int,
) -> Arrays:
    """The arrays of single weights as those of a stack, padded with zeros to one rank."""
    stacked = {}
    for name in singles[0]:
        arrays = [single[name] for single in singles]
        for axis in rank_axes.get(name, ()):
            arrays = [_widened(array, axis, rank) for array in arrays]
        whole = np.stack(arrays)
        stacked[name] = jnp.asarray(whole.reshape((*site.stack_shape, *whole.shape[1:])))
    return stacked


def _widened(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """An array padded with zeros behind an axis."""
    width = [(0, 0)] * array.ndim
    width[axis] = (0, size - array.shape[axis])
    return np.pad(array, width)
