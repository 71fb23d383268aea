"""Adapters put onto the leaves of a params tree: the common ground of running and merging."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.adapter import Adapter, check_leaves
from peftjax.changes import bias_change, changed_weight
from peftjax.engine import compat
from peftjax.engine.packed import Packed
from peftjax.engine.run import mark
from peftjax.engine.views import View
from peftjax.factors import accumulation_dtype
from peftjax.routes import Mix
from peftjax.sites import Leaf, Site
from peftjax.targeting import trained_layers
from peftjax.trees import dotted_paths, is_array, is_quantised


def as_sequence(adapter: Adapter | Sequence[Adapter] | None) -> tuple[Adapter, ...]:
    """The adapters an argument stands for, in the order in which they are applied.

    Raises:
      TypeError: something in it is no Adapter.
    """
    adapters = () if adapter is None else adapter
    adapters = (adapters,) if isinstance(adapters, Adapter | Mapping) else tuple(adapters)
    for each in adapters:
        if isinstance(each, str):
            raise TypeError(
                "a bank is no adapter: say which of its adapters serve which rows, with "
                "bank.rows([...]), or mix them, with bank.mix(weights)"
            )
        if not isinstance(each, Adapter):
            raise TypeError(
                f"expected an Adapter, a sequence of Adapters or None, got {type(each).__name__}; "
                f"to pass other trainable arrays use adapter.replace(params=...)"
            )
    return adapters


def check_fits(leaves: Mapping[str, jax.Array], adapters: Sequence[Adapter]) -> None:
    """Raises a ValueError unless the adapters belong to these leaves, and their arrays to them."""
    for adapter in adapters:
        check_leaves(leaves, adapter.sites, adapter.saved)
        _check_params(adapter)


def attach(
    leaves: Mapping[str, jax.Array],
    adapters: Sequence[Adapter],
    tokens: Mapping[str, int] | None = None,
    undo: bool = False,
) -> tuple[dict[str, jax.Array], dict[str, View]]:
    """Puts adapters onto the leaves of a params tree, in order.

    Args:
      leaves: the arrays of the params tree, by path.
      adapters: the adapters.
      tokens: how many vectors the call sends through each weight that a method asks about; None
        where the changed weights themselves are wanted.
      undo: take the adapters out of params that have them.

    Returns:
      The leaves, where whole leaves and biases are replaced by those of the adapters; and, for
      each adapted weight, the leaf with its layers.

    Raises:
      ValueError: an adapter trains a leaf whole that one before it has changed.
    """
    leaves = dict(leaves)
    positions = {path: i for i, path in enumerate(leaves)}
    views: dict[str, View] = {}
    before = dict(leaves)
    for adapter in adapters:
        for leaf in adapter.saved:
            if leaf.path in views or leaves[leaf.path] is not before[leaf.path]:
                raise ValueError(
                    f"{leaf.path}: an adapter trains it whole (`modules_to_save`, `bias`), which "
                    f"would drop what one before it makes of it: put the adapter that trains it "
                    f"first, and let no other train it"
                )
            leaves[leaf.path] = _trained_leaf(leaves[leaf.path], adapter, leaf)
        for site in adapter.sites.values():
            view = views.get(site.path)
            if view is None:
                view = mark(leaves[site.path], positions[site.path], site.roles)
            elif view.roles != site.roles:
                raise ValueError(
                    f"{site.path}: two adapters disagree on its axes, {view.roles} and "
                    f"{site.roles}; make both from one find_sites"
                )
            count = None if tokens is None else tokens.get(site.path, 0)
            shift = None
            if site.bias is not None:
                bias = leaves[site.bias]
                if adapter.route is None:
                    leaves[site.bias] = _changed_bias(bias, adapter, site, undo)
                else:
                    shift = _bias_shift(bias, adapter, site)
            views[site.path] = changed_weight(
                view, adapter, site, tokens=count, undo=undo, shift=shift
            )
    return leaves, views


def _check_params(adapter: Adapter) -> None:
    """Raises a ValueError unless the adapter's arrays are those of its own modules."""
    for site in adapter.sites.values() if adapter.route is None else ():
        present = adapter.buffers[site.name].get("present")
        if present is not None and present.ndim != len(site.stack_axes):
            raise ValueError(
                "these are the arrays of a whole bank: say who serves which row, with "
                "bank.rows(index), or mix them, with bank.mix(weights)"
            )
    modules = {*adapter.sites, *(leaf.module for leaf in adapter.saved)}
    if gating := adapter.config.method.gating:
        frozen = not modules.intersection(adapter.params)
        modules = {gating.module} | (set() if frozen else modules)
    wrong = sorted(modules.symmetric_difference(adapter.params))
    if wrong:
        raise ValueError(
            f"adapter.params does not fit the adapter: {', '.join(wrong[:5])} is on one side only; "
            f"keep the structure that init_adapter gave"
        )


def _trained_leaf(base: jax.Array, adapter: Adapter, leaf: Leaf) -> jax.Array:
    """A whole leaf of an adapter, and the base's own in layers that it does not train."""
    own = adapter.params[leaf.module][leaf.leaf_name].astype(base.dtype)
    layers = trained_layers(adapter.config, adapter.sites, leaf)
    if layers is None:
        return own
    axis = next(s.bias_stack_axes[0] for s in adapter.sites.values() if s.bias == leaf.path)
    shape = [n if i == axis else 1 for i, n in enumerate(base.shape)]
    some = jnp.isin(jnp.arange(base.shape[axis]), jnp.asarray(sorted(layers))).reshape(shape)
    spec = compat.explicit_spec(base)
    trains = compat.place_like(jnp.broadcast_to(some, base.shape), spec, base)
    return jnp.where(trains, compat.place_like(own, spec, base), base)


def _changed_bias(bias: jax.Array, adapter: Adapter, site: Site, undo: bool) -> jax.Array:
    """The bias of a site with what an adapter changes about it, in its own layout."""
    change = bias_change(adapter, site)
    if change.scale is None and change.shift is None:
        return bias
    stack = site.bias_stack_axes
    own = [n for axis, n in enumerate(bias.shape) if axis not in stack]
    dtype = accumulation_dtype(bias.dtype)

    def laid(part: jax.Array) -> jax.Array:
        shaped = jnp.reshape(part, (*part.shape[: len(stack)], *own))
        return jnp.moveaxis(shaped, range(len(stack)), stack).astype(dtype)

    after = bias.astype(dtype)
    if undo and change.shift is not None:
        after = after - laid(change.shift)
    if change.scale is not None:
        after = after / laid(change.scale) if undo else after * laid(change.scale)
    if not undo and change.shift is not None:
        after = after + laid(change.shift)
    return after.astype(bias.dtype)


def _bias_shift(bias: jax.Array, adapter: Adapter, site: Site) -> jax.Array | None:
    """What each expert adds to the bias of a site, laid out (stack, out, experts)."""
    change = bias_change(adapter, site)
    if change.scale is None and change.shift is None:
        return None
    if isinstance(adapter.route, Mix):
        raise ValueError(f"{site.name}: experts that change the bias can be chosen by row only")
    if change.scale is None:
        return change.shift
    stack = site.bias_stack_axes
    laid = jnp.moveaxis(bias, stack, range(len(stack)))
    laid = laid.reshape(*site.full_stack_shape, *site.out_shape, 1)
    scaled = (change.scale - 1) * laid.astype(change.scale.dtype)
    return scaled if change.shift is None else scaled + change.shift


def refill(params: Any, leaves: Mapping[str, Any]) -> Any:
    """A params tree with other arrays at its leaves; what is no array stays."""

    def filled(path: str, leaf: Any) -> Any:
        if not is_quantised(leaf) and not is_array(leaf):
            return leaf
        own = leaves[path]
        return leaf if isinstance(own, Packed) else own

    flat, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantised)
    every = (filled(path, leaf) for path, (_, leaf) in zip(dotted_paths(flat), flat, strict=True))
    return jax.tree.unflatten(structure, every)
