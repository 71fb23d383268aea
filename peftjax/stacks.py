"""Stacked weights, such as scanned layers and experts, of which a method sees one at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from peftjax.config import AdapterConfig
from peftjax.factors import Arrays, WeightSpec
from peftjax.sites import Site


def over_stack(function: Callable[..., Any], site: Site) -> Callable[..., Any]:
    """The function of one weight as a function of all of a site's, mapped over the stack axes."""
    for _ in site.stack_axes:
        function = jax.vmap(function)
    return function


def spread(array: Array | None, site: Site, fill: int) -> Array | None:
    """The arrays of the selected layers among those of all layers, which hold ``fill``."""
    if array is None or site.layers is None:
        return array
    whole = jnp.full((site.full_stack_shape[0], *array.shape[1:]), fill, array.dtype)
    return whole.at[jnp.asarray(site.layers)].set(array)


def init_site(
    key: PRNGKeyArray,
    config: AdapterConfig,
    site: Site,
    spec: WeightSpec,
    weight: Array | None,
) -> tuple[Arrays, Arrays]:
    """The trainable and the frozen arrays of one site, with its stack axes in front.

    Layers of equal settings are made together. Where ranks differ, the arrays are padded to the
    largest, and a 0/1 ``rank_mask`` among the frozen arrays tells rank from padding. The numbers
    of a layer do not depend on which other layers are selected.
    """
    method = config.method
    if weight is not None:
        weight = jnp.transpose(weight, (*site.stack_axes, *site.in_axes, *site.out_axes))
    if not site.stack_axes:
        return method.init(key, config, spec, method.settings(config, site, None), weight)

    keys = jax.random.split(key, site.full_stack_shape)
    layers = site.layers or range(site.full_stack_shape[0])
    groups: dict[Any, list[int]] = {}
    for layer in layers:
        groups.setdefault(method.settings(config, site, layer), []).append(layer)

    def init(settings: Any, chosen: list[int]) -> tuple[Arrays, Arrays]:
        def one(key: PRNGKeyArray, *weight: Array) -> tuple[Arrays, Arrays]:
            return method.init(key, config, spec, settings, *(weight or (None,)))

        index = jnp.asarray(chosen)
        inputs = [keys[index]] if weight is None else [keys[index], weight[index]]
        return over_stack(one, site)(*inputs)

    parts = _padded([init(*group) for group in groups.items()], config, site)
    made = [layer for chosen in groups.values() for layer in chosen]
    order = jnp.asarray([made.index(layer) for layer in layers])
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays)[order], *parts)


def _padded(
    parts: list[tuple[Arrays, Arrays]], config: AdapterConfig, site: Site
) -> list[tuple[Arrays, Arrays]]:
    """Groups of layers with their arrays padded to one rank; as they are if they have one."""
    # A rank axis counted from the front stands behind the stack axes.
    stack = len(site.stack_axes)
    axes = {n: axis + stack if axis >= 0 else axis for n, axis in config.method.rank_axes.items()}
    ranks = [next((p[n].shape[axes[n]] for n in axes if n in p), 0) for p, _ in parts]
    if len(set(ranks)) == 1:
        return parts

    def pad(name: str, array: Array) -> Array:
        if name not in axes:
            return array
        width = [(0, 0)] * array.ndim
        width[axes[name]] = (0, max(ranks) - array.shape[axes[name]])
        return jnp.pad(array, width)

    def part(params: Arrays, buffers: Arrays, rank: int) -> tuple[Arrays, Arrays]:
        array = next(iter(params.values()))
        mask = (jnp.arange(max(ranks)) < rank).astype(array.dtype)
        leading = array.shape[:stack]
        padded = {name: pad(name, buffer) for name, buffer in buffers.items()}
        padded["rank_mask"] = jnp.tile(mask, (*leading, 1))
        return {name: pad(name, param) for name, param in params.items()}, padded

    return [part(*arrays, rank) for arrays, rank in zip(parts, ranks, strict=True)]
