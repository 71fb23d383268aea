"""What an adapter changes about one site: its weight, and the bias that goes with it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from peftjax.adapter import Adapter, path_key, site_arrays, weight_spec
from peftjax.engine import compat
from peftjax.engine.linear import fused, split_as
from peftjax.engine.views import Layer, View, layout
from peftjax.factors import Arrays, BiasChange, Change, Dense, Weight, WeightSpec, inverse
from peftjax.sites import Site
from peftjax.stacks import over_stack, spread, stacked_weight


def changed_weight(
    view: View, adapter: Adapter, site: Site, *, tokens: int | None = None, undo: bool = False
) -> View:
    """The weight of a site with what an adapter changes about it, all its layers at once.

    Args:
      view: the weight as earlier adapters left it.
      adapter: the adapter.
      site: one of its sites.
      tokens: how many vectors the call sends through the weight; None where the changed weight
        itself is wanted.
      undo: take the change out of a weight that has it.
    """
    config, method = adapter.config, adapter.config.method
    # Dropout of x and what a method drops itself must not fall on the same numbers.
    key, own_key = None, None
    if adapter.key is not None:
        key, own_key = jax.random.split(path_key(adapter.key, site.path))

    def one(params: Arrays, buffers: Arrays, weight: Weight, key: PRNGKeyArray | None) -> Change:
        if undo and method.inverse is not None:
            return method.inverse(config, params, buffers, weight, key)
        change = method.factors(config, params, buffers, weight, key)
        return inverse(change) if undo else change

    def every(params: Arrays, buffers: Arrays, view: View, key: PRNGKeyArray | None) -> Change:
        keys = _keys(key, site)
        if keys is not None and site.layers is not None:
            keys = keys[jnp.asarray(site.layers)]
        weight = _as_left(view, adapter, site, tokens)
        return _spread(over_stack(one, site)(params, buffers, weight, keys), site)

    make = compat.automatic(every, view.base, lambda shapes: _specs(shapes, view))
    change = make(*site_arrays(adapter, site), view, own_key)
    if isinstance(change, Dense):
        return fused(view, change.change)
    return dataclasses.replace(view, layers=(*view.layers, Layer(change, _keys(key, site))))


def _keys(key: PRNGKeyArray | None, site: Site) -> PRNGKeyArray | None:
    """A key for every layer of a site."""
    stack = site.full_stack_shape
    return jax.random.split(key, stack) if key is not None and stack else key


def _as_left(view: View, adapter: Adapter, site: Site, tokens: int | None) -> Weight:
    """The selected layers of a weight as earlier adapters left them, for a method to ask about."""
    method = adapter.config.method
    reads = method.reads_weight(adapter.config)
    if reads and view.grouped:
        raise ValueError(
            f"{site.name}: {type(adapter.config).__name__} reads the weight as the adapters before "
            f"it left it, and cannot after a feedforward IA3 of a grouped convolution: put it first"
        )
    earlier = tuple(layer.factors for layer in view.layers) if reads else ()
    if site.layers is not None:
        earlier = jax.tree.map(lambda array: array[jnp.asarray(site.layers)], earlier)
    base = view.base if reads else None
    rest = {"earlier": earlier, "tokens": tokens, "fusible": not view.drops}
    return stacked_weight(site, _spec(adapter, site), base, site.layers, **rest)


def _spread(change: Change, site: Site) -> Change:
    """The change of the selected layers among those of all layers, which stay as they are."""
    if isinstance(change, Dense):
        return Dense(spread(change.change, site, 0))
    return dataclasses.replace(
        change,
        A=_whole(change.A, site, 0),
        B=_whole(change.B, site, 0),
        in_scale=_whole(change.in_scale, site, 1),
        out_scale=_whole(change.out_scale, site, 1),
    )


def _whole(array: Array | None, site: Site, fill: int) -> Array | None:
    return None if array is None else spread(array, site, fill)


def _specs(change: Change, view: View) -> Change:
    """The partition spec of each part: every axis is split as the weight's is."""
    spec = compat.explicit_spec(view.base)
    parts = layout(view)

    def of(part: str, array: Any) -> Any:
        if array is None or spec is None:
            return None
        return split_as(spec, parts[part], array, view.base)

    if isinstance(change, Dense):
        return Dense(of("change", change.change))
    names = ("A", "B", "in_scale", "out_scale")
    return dataclasses.replace(change, **{name: of(name, getattr(change, name)) for name in names})


def bias_change(adapter: Adapter, site: Site) -> BiasChange:
    """What an adapter changes about the bias of one site, laid out (stack, out)."""
    config = adapter.config
    weight = stacked_weight(site, _spec(adapter, site), None)

    def one(params: Arrays, buffers: Arrays) -> BiasChange:
        return config.method.bias(config, params, buffers, weight)

    made = over_stack(one, site)(*site_arrays(adapter, site))
    return BiasChange(_whole(made.scale, site, 1), _whole(made.shift, site, 0))


def wants_tokens(adapter: Adapter, site: Site) -> bool:
    """Whether the method wants to know how many tokens pass through a weight of this site."""
    own, _ = site_arrays(adapter, site)
    return adapter.config.method.wants_tokens(adapter.config, _spec(adapter, site), own)


def _spec(adapter: Adapter, site: Site) -> WeightSpec:
    """What the method is told about the weights of a site."""
    own, _ = site_arrays(adapter, site)
    return weight_spec(site, next(iter(own.values())).dtype)
