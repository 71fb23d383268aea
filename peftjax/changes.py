"""What an adapter changes about one site: its weight, and the bias that goes with it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from peftjax.adapter import Adapter, path_key, site_arrays, weight_spec
from peftjax.engine import compat, packed
from peftjax.engine import routes as engine_routes
from peftjax.engine.linear import fused, split_as
from peftjax.engine.views import Layer, View, layout
from peftjax.factors import Arrays, BiasChange, Change, Dense, Factors, Weight, WeightSpec, inverse
from peftjax.routes import Mix, Route, Rows
from peftjax.sites import Site
from peftjax.stacks import over_stack, spread, stacked_weight


def changed_weight(
    view: View,
    adapter: Adapter,
    site: Site,
    *,
    tokens: int | None = None,
    undo: bool = False,
    shift: Array | None = None,
) -> View:
    """The weight of a site with what an adapter changes about it, all its layers at once.

    Args:
      view: the weight as earlier adapters left it.
      adapter: the adapter.
      site: one of its sites.
      tokens: how many vectors the call sends through the weight; None where the changed weight
        itself is wanted.
      undo: take the change out of a weight that has it.
      shift: the change of each expert's bias, laid out (stack, out, experts), if it is not made to
        the bias itself.
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
        change = inverse(change) if undo else change
        return _only_if(buffers["present"], change) if "present" in buffers else change

    def every(
        params: Arrays,
        buffers: Arrays,
        view: View,
        key: PRNGKeyArray | None,
        route: Route | None,
    ) -> Change:
        keys = _keys(key, site)
        if keys is not None and site.layers is not None:
            keys = keys[jnp.asarray(site.layers)]
        weight = _as_left(view, adapter, site, tokens)

        def whole(params: Arrays, buffers: Arrays) -> Change:
            return _spread(over_stack(one, site)(params, buffers, weight, keys), site)

        if route is None:
            return whole(params, buffers)
        change = jax.vmap(whole, out_axes=-1)(params, buffers)
        return _side_by_side(change, route, site) if isinstance(route, Mix) else change

    make = compat.automatic(every, packed.like(view.base), lambda shapes: _specs(shapes, view))
    change = make(*site_arrays(adapter, site), view, own_key, adapter.route)
    if isinstance(change, Dense):
        return fused(view, change.change)
    layer = Layer(change, _keys(key, site), _route(adapter, site), shift)
    return dataclasses.replace(view, layers=(*view.layers, layer))


def _only_if(present: Array, change: Change) -> Change:
    """The change of an expert that adapts this weight, and none of one that does not."""
    if isinstance(change, Dense):
        return Dense(jnp.where(present, change.change, 0))

    def part(array: Array | None, otherwise: int) -> Array | None:
        return None if array is None else jnp.where(present, array, otherwise)

    return dataclasses.replace(
        change,
        B=part(change.B, 0),
        in_scale=part(change.in_scale, 1),
        out_scale=part(change.out_scale, 1),
    )


def _side_by_side(change: Change, route: Mix, site: Site) -> Factors:
    """Experts' factors, the last axis of which are the experts, as those of one larger rank."""
    assert isinstance(change, Factors)
    a, b, stack = change.A, change.B, len(site.stack_axes)
    assert a is not None
    assert b is not None
    weights = route.weights
    if weights.ndim == 1:
        b = b * weights.astype(b.dtype).reshape(*[1] * (b.ndim - 1), -1)
    a, b = jnp.moveaxis(a, -1, -2), jnp.moveaxis(b, -1, stack)
    rank = a.shape[-1] * a.shape[-2]
    return Factors(
        A=a.reshape(*a.shape[:-2], rank),
        B=b.reshape(*b.shape[:stack], rank, *b.shape[stack + 2 :]),
        dropout=change.dropout,
    )


def _route(adapter: Adapter, site: Site) -> engine_routes.Route | None:
    """How the experts serve one site, with the site's stack axes in front."""
    route, stack = adapter.route, site.full_stack_shape
    if route is None or (isinstance(route, Mix) and route.weights.ndim == 1):
        return None
    if isinstance(route, Rows):
        index = jnp.broadcast_to(route.index, (*stack, *route.index.shape))
        return engine_routes.Rows(index, route.lengths, route.in_order)
    weights = route.weights
    if weights.ndim < 4:
        laid = jnp.broadcast_to(weights, (*stack, *weights.shape))
        return engine_routes.Gates(laid, route.lengths, weights.ndim - 1)
    if weights.shape[2] == 1:
        laid = jnp.broadcast_to(weights[:, :, 0], (*stack, *weights[:, :, 0].shape))
        return engine_routes.Gates(laid, route.lengths)
    places = adapter.buffers[site.name]["place"]
    laid = jnp.moveaxis(jnp.take(weights, places.ravel(), axis=2), 2, 0)
    laid = spread(laid.reshape(*places.shape, *laid.shape[1:]), site, 0)
    return engine_routes.Gates(laid, route.lengths)


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
    if reads and view.routed:
        raise ValueError(
            f"{site.name}: {type(adapter.config).__name__} reads the weight as the adapters before "
            f"it left it, and one of them leaves each row another: put it first"
        )
    earlier = tuple(layer.factors for layer in view.layers) if reads else ()
    if site.layers is not None:
        earlier = jax.tree.map(lambda array: array[jnp.asarray(site.layers)], earlier)
    base = view.base if reads else None
    fusible = not view.drops and not view.routed and adapter.route is None
    rest = {"earlier": earlier, "tokens": tokens, "fusible": fusible}
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
    spec = compat.explicit_spec(packed.like(view.base))
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
    """What an adapter changes about the bias of one site, laid out (stack, out).

    Of several experts, they are the last axis.
    """
    config = adapter.config
    weight = stacked_weight(site, _spec(adapter, site), None)

    def one(params: Arrays, buffers: Arrays) -> BiasChange:
        change = config.method.bias(config, params, buffers, weight)
        present = buffers.get("present")
        if present is None:
            return change
        return BiasChange(
            None if change.scale is None else jnp.where(present, change.scale, 1),
            None if change.shift is None else jnp.where(present, change.shift, 0),
        )

    def every(params: Arrays, buffers: Arrays) -> BiasChange:
        made = over_stack(one, site)(params, buffers)
        return BiasChange(_whole(made.scale, site, 1), _whole(made.shift, site, 0))

    make = every if adapter.route is None else jax.vmap(every, out_axes=-1)
    return make(*site_arrays(adapter, site))


def wants_tokens(adapter: Adapter, site: Site) -> bool:
    """Whether the method wants to know how many tokens pass through a weight of this site."""
    if adapter.route is not None:
        return False
    own, _ = site_arrays(adapter, site)
    return adapter.config.method.wants_tokens(adapter.config, _spec(adapter, site), own)


def _spec(adapter: Adapter, site: Site) -> WeightSpec:
    """What the method is told about the weights of a site."""
    arrays = (x for own in site_arrays(adapter, site) for x in own.values())
    return weight_spec(site, next(x.dtype for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)))
