"""One rule per primitive that can use a weight linearly."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from peftjax.engine.linear import Linear
from peftjax.engine.rules import conv, dot, lookup, ragged
from peftjax.engine.views import Kind, Role, View, Window


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a primitive uses a weight.

    Attributes:
      kind: the kind of site that such a use makes of a weight.
      usage: from the equation's parameters, the weight's position among the operands and its
        shape: the role this use gives to each axis, or why it is no linear use.
      linear: from the oriented view, whether it is used transposed, its position, the operands,
        the parameters and the type of the result: the linear map, and the x it applies to; or why
        the factors cannot be applied.
      taps: the axes of the weight along which a kernel's taps lie, from the parameters.
      groups: the feature groups of the use, from the parameters.
      window: how a kernel moves over an image, from the parameters.
      tapped: from the parameters, the weight's position and the operands: what the weight is
        applied to, in the layout of the result, and which axis its features are.
    """

    kind: Kind
    usage: Callable[[dict[str, Any], int, tuple[int, ...]], tuple[Role, ...] | str]
    linear: Callable[
        [View, bool, int, list[jax.Array], dict[str, Any], Any], tuple[Linear, Any] | str
    ]
    taps: Callable[[dict[str, Any]], tuple[int, ...]] = lambda params: ()
    groups: Callable[[dict[str, Any]], int] = lambda params: 1
    window: Callable[[dict[str, Any]], Window] = lambda params: Window()
    tapped: Callable[[dict[str, Any], int, list[jax.Array]], tuple[jax.Array, int] | None] = (
        lambda params, position, operands: None
    )


RULES: dict[str, Rule] = {
    "dot_general": Rule("dense", dot.usage, dot.linear, tapped=dot.tapped),
    "conv_general_dilated": Rule(
        "conv",
        conv.usage,
        conv.linear,
        taps=lambda params: tuple(params["dimension_numbers"].rhs_spec[2:]),
        groups=lambda params: params["feature_group_count"],
        window=conv.window,
    ),
    "gather": Rule("lookup", lookup.usage, lookup.linear),
    "ragged_dot_general": Rule("dense", ragged.usage, ragged.linear),
}
