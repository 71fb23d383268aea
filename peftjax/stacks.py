"""Stacked weights, such as scanned layers and experts, of which a method sees one at a time."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from peftjax.config import AdapterConfig
from peftjax.engine.packed import Base, Packed, dense, spread_along, taken
from peftjax.factors import Arrays, Weight, WeightSpec
from peftjax.sites import Site

# What a method makes of an unpacked weight is small and kept; the weight is not.
_UNPACKED_AGAIN = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)


def over_stack(function: Callable[..., Any], site: Site) -> Callable[..., Any]:
    """The function of one weight as a function of all of a site's, mapped over the stack axes.

    Every array has them in front, but for the base of a ``Weight``, which has them where it has
    them. A quantised base is unpacked one weight after the other, and again for gradients.
    """

    def mapped(depth: int, *args: Any) -> Any:
        quantised = any(isinstance(arg, Weight) and isinstance(arg.base, Packed) for arg in args)
        if depth == len(site.stack_axes):
            return _UNPACKED_AGAIN(unpacked)(*args) if quantised else function(*args)
        # The axes before this one are mapped over already, and so are gone.
        own = site.stack_axes[depth] - depth
        axes = tuple(_mapped_axes(arg, own) for arg in args)
        inner = functools.partial(mapped, depth + 1)
        if not quantised:
            return jax.vmap(inner, in_axes=axes)(*args)
        in_front = jax.tree.map(lambda array, axis: jnp.moveaxis(array, axis, 0), args, axes)
        return lax.map(lambda each: inner(*each), in_front)

    def unpacked(*args: Any) -> Any:
        return function(*(_unpacked(arg) if isinstance(arg, Weight) else arg for arg in args))

    return functools.partial(mapped, 0)


def _unpacked(weight: Weight) -> Weight:
    """The weight, of which the base is an array."""
    assert weight.base is not None
    return dataclasses.replace(weight, base=dense(weight.base))


def _mapped_axes(arg: Any, own: int) -> Any:
    """The axis of each array of an argument to map over."""
    axes = jax.tree.map(lambda _: 0, arg)
    if isinstance(arg, Weight) and arg.base is not None:
        axes = dataclasses.replace(axes, base=jax.tree.map(lambda _: own, arg.base))
    return axes


def stacked_weight(
    site: Site, spec: WeightSpec, base: Base | None, layers: Any = None, **rest: Any
) -> Weight:
    """All of a site's weights as one ``Weight``, whose axes are those of a single one.

    ``layers`` are indices along the first stack axis; None takes the base as it is.
    """
    if base is not None and layers is not None:
        base = taken(base, jnp.asarray(layers), site.stack_axes[0])
    # A quantised weight is one until a single weight of the stack is asked about.
    whole: Any = None if base is None else spread_along(base, site.stack_axes)

    def of_one(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axis - sum(stack < axis for stack in site.stack_axes) for axis in axes)

    in_axes, out_axes = of_one(site.in_axes), of_one(site.out_axes)
    return Weight(spec=spec, base=whole, in_axes=in_axes, out_axes=out_axes, **rest)


def spread(array: Array, site: Site, fill: int) -> Array:
    """The arrays of the selected layers among those of all layers, which hold ``fill``."""
    if site.layers is None:
        return array
    whole = jnp.full((site.full_stack_shape[0], *array.shape[1:]), fill, array.dtype)
    return whole.at[jnp.asarray(site.layers)].set(array)


def init_site(
    key: PRNGKeyArray,
    config: AdapterConfig,
    site: Site,
    spec: WeightSpec,
    base: Base | None,
) -> tuple[Arrays, Arrays]:
    """The trainable and the frozen arrays of one site, with its stack axes in front.

    Layers of equal settings are made together. Where ranks differ, the arrays are padded to the
    largest, and a 0/1 ``rank_mask`` among the frozen arrays tells rank from padding. The numbers
    of a layer do not depend on which other layers are selected.
    """
    method = config.method

    def init(settings: Any, key: PRNGKeyArray, weight: Weight) -> tuple[Arrays, Arrays]:
        buffers = method.buffers(key, config, settings, weight)
        return method.init(key, config, settings, weight, buffers), buffers

    if not site.stack_axes:
        settings = method.settings(config, site, None)
        return over_stack(functools.partial(init, settings), site)(
            key, stacked_weight(site, spec, base)
        )

    keys = jax.random.split(key, site.full_stack_shape)
    layers = site.layers or range(site.full_stack_shape[0])
    groups: dict[Any, list[int]] = {}
    for layer in layers:
        groups.setdefault(method.settings(config, site, layer), []).append(layer)

    def group(settings: Any, chosen: list[int]) -> tuple[Arrays, Arrays]:
        weight = stacked_weight(site, spec, base, chosen)
        one = functools.partial(init, settings)
        return over_stack(one, site)(keys[jnp.asarray(chosen)], weight)

    parts = _padded([group(*each) for each in groups.items()], config, site)
    made = [layer for chosen in groups.values() for layer in chosen]
    order = jnp.asarray([made.index(layer) for layer in layers])
    params, buffers = jax.tree.map(lambda *arrays: jnp.concatenate(arrays)[order], *parts)
    mask = method.rank_mask(config, site)
    if mask is not None:
        buffers["rank_mask"] = jnp.asarray(mask, next(iter(params.values())).dtype)
    return params, buffers


def _padded(
    parts: list[tuple[Arrays, Arrays]], config: AdapterConfig, site: Site
) -> list[tuple[Arrays, Arrays]]:
    """Groups of layers with their arrays padded to one rank; as they are if they have one."""
    # A rank axis counted from the front stands behind the stack axes.
    stack = len(site.stack_axes)
    axes = {
        name: tuple(axis + stack if axis >= 0 else axis for axis in own)
        for name, own in config.method.rank_axes.items()
    }
    ranks = [next((p[n].shape[axes[n][0]] for n in axes if n in p), 0) for p, _ in parts]
    if len(set(ranks)) == 1:
        return parts

    def pad(name: str, array: Array) -> Array:
        width = [(0, 0)] * array.ndim
        for axis in axes.get(name, ()):
            width[axis] = (0, max(ranks) - array.shape[axis])
        return jnp.pad(array, width)

    def part(params: Arrays, buffers: Arrays, rank: int) -> tuple[Arrays, Arrays]:
        array = next(iter(params.values()))
        mask = (jnp.arange(max(ranks)) < rank).astype(array.dtype)
        leading = array.shape[:stack]
        padded = {name: pad(name, buffer) for name, buffer in buffers.items()}
        padded["rank_mask"] = jnp.tile(mask, (*leading, 1))
        return {name: pad(name, param) for name, param in params.items()}, padded

    return [part(*arrays, rank) for arrays, rank in zip(parts, ranks, strict=True)]
