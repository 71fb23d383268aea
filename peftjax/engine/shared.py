"""What weights that meet one x share: a copy of it, and one product with all their first factors.

q, k and v are made of one x, and so are gate and up. Their first factors lie side by side in one
product, which reads x once, and whose backward pass writes one cotangent of x instead of several.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from peftjax.engine import compat
from peftjax.engine.linear import orient, placed
from peftjax.engine.routes import Rows
from peftjax.engine.rules import dot
from peftjax.engine.steps import STEPS
from peftjax.engine.views import Layer, View, layout

Use = tuple[compat.Eqn, int]


@dataclasses.dataclass
class Shared:
    """What the uses in one jaxpr share.

    Attributes:
      marked: the marked variables of the replay so far.
      uses: dot products by the x they take and by how they take it, each with the position of the
        other operand; of one x with several.
      copies: of each x that was met, itself and the copy.
      features: of each key of ``uses``, the rank features of every layer, by equation.
    """

    marked: Mapping[compat.Var, Any]
    uses: dict[Any, list[Use]]
    copies: dict[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    features: dict[Any, dict[int, list[jax.Array]]] = dataclasses.field(default_factory=dict)

    def copy(self, x: Any) -> Any:
        """A copy of what meets a weight, for the factors: one for all weights that it meets.

        It costs nothing, and parts the cotangents. On a mesh those of the weights are partial sums,
        which are sent once, as their sum, unless cotangents of factors are added in between.
        """
        if not isinstance(x, jax.Array):
            return x
        if id(x) not in self.copies:
            self.copies[id(x)] = x, jnp.copy(x)
        return self.copies[id(x)][1]

    def with_features(
        self, eqn: compat.Eqn, position: int, layers: tuple[Layer, ...], x: Any
    ) -> tuple[Layer, ...]:
        """Layers with x through their first factors, where other weights meet this x too."""
        key = _key(eqn, position)
        if key not in self.uses or not jnp.issubdtype(x.dtype, jnp.inexact):
            return layers
        if key not in self.features:
            self.features[key] = self._product(self.uses[key], x)
        own = iter(self.features[key].get(id(eqn), ()))
        return tuple(
            layer
            if layer.factors.A is None
            else dataclasses.replace(layer, features=next(own, None))
            for layer in layers
        )

    def _product(self, uses: list[Use], x: jax.Array) -> dict[int, list[jax.Array]]:
        firsts = {}
        for eqn, position in uses:
            w = eqn.invars[position]
            view = None if isinstance(w, compat.Literal) else self.marked.get(w)
            if isinstance(view, View) and (own := _firsts(eqn, position, view)):
                firsts[id(eqn)] = [first.astype(x.dtype) for first in own]
        every = [first for own in firsts.values() for first in own]
        if len(firsts) < 2 or len({repr(compat.explicit_spec(first)) for first in every}) > 1:
            return {}
        eqn, position = uses[0]
        ((contract_x, _), _) = dot.numbers(eqn.params, position)
        free = [axis for axis in range(x.ndim) if axis not in contract_x]
        spec = compat.explicit_spec(x)
        features = lax.dot_general(
            x,
            jnp.concatenate(every, axis=-1),
            ((contract_x, tuple(range(len(contract_x)))), ((), ())),
            out_sharding=compat.explicit_sharding(x, spec and [*(spec[a] for a in free), None]),
            **dot.product_options(eqn.params, x.dtype),
        )
        ranks = [first.shape[-1] for first in every]
        parts = iter(lax.split(features, ranks, axis=features.ndim - 1))
        return {name: [next(parts) for _ in own] for name, own in firsts.items()}


def shared(jaxpr: compat.Jaxpr, marked: Mapping[compat.Var, Any]) -> Shared:
    """What can be shared in a jaxpr."""
    uses = defaultdict(list)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            for position in (0, 1):
                if (key := _key(eqn, position)) is not None:
                    uses[key].append((eqn, position))
    return Shared(marked, {key: own for key, own in uses.items() if len(own) > 1})


def weights_first(jaxpr: compat.Jaxpr, marked: Mapping[compat.Var, Any]) -> list[compat.Eqn]:
    """The equations of a jaxpr, those that lead from weights to their uses before all others.

    So every weight that meets an x is there when the first of them does.
    """
    weights = {var for var, value in marked.items() if isinstance(value, View)}
    known = {*weights, *jaxpr.constvars, *jaxpr.invars}
    first: list[compat.Eqn] = []
    rest: list[compat.Eqn] = []
    for eqn in jaxpr.eqns:
        inputs = {v for v in eqn.invars if not isinstance(v, compat.Literal)}
        leads = eqn.primitive.name in STEPS and inputs <= known and inputs & weights
        (first if leads else rest).append(eqn)
        if leads:
            weights.update(eqn.outvars)
            known.update(eqn.outvars)
    return [*first, *rest]


def _key(eqn: compat.Eqn, position: int) -> Any:
    """What uses have in common that can share a product; None if this one never can."""
    if eqn.primitive.name != "dot_general":
        return None
    x = eqn.invars[1 - position]
    ((contract_x, _), (batch_x, _)) = dot.numbers(eqn.params, position)
    if batch_x or isinstance(x, compat.Literal):
        return None
    options = [repr(eqn.params[name]) for name in ("precision", "preferred_element_type")]
    return (x, contract_x, *options)


def _firsts(eqn: compat.Eqn, position: int, view: View) -> list[jax.Array]:
    """The first factors that meet x as it is, one for each layer, in the order of its axes."""
    if view.roles is None or view.drops:
        return []
    if any(own.factors.in_scale is not None or isinstance(own.route, Rows) for own in view.layers):
        return []
    oriented = orient(view, dot.usage(eqn.params, position, view.base.shape))
    if isinstance(oriented, str) or oriented[1]:
        return []
    view = placed(oriented[0])
    dims = layout(view)["A"]
    ((_, contract_w), _) = dot.numbers(eqn.params, position)
    order = [*(dims.index(axis) for axis in contract_w), dims.index(None)]
    return [
        jnp.transpose(first, order)
        for layer in view.layers
        if (first := layer.factors.A) is not None
    ]
