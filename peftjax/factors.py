"""The language methods and the engine share: a weight change as factors."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Arrays = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
    r"""A change of a weight W, laid out (in, out), that never has to be built.

    .. math::
      W' = s_{out} \odot (s_{in} \odot W + A B), \qquad
      x W' = s_{out} \odot ((s_{in} \odot x) W + (x A) B)

    Every field may be absent, which leaves its part out. A method computes the factors of one
    weight; the engine stacks them for stacked weights, so that inside the engine every array has
    the stack axes in front.

    Attributes:
      A: array of shape ``(*in, rank)``.
      B: array of shape ``(rank, *out)``.
      in_scale: array of shape ``(*in,)``; an axis may have size 1, then it broadcasts.
      out_scale: array of shape ``(*out,)``; an axis may have size 1, then it broadcasts.
      dropout: probability to drop an entry of x before A while an adapter trains. Static.
    """

    A: Float[Array, "..."] | None = None
    B: Float[Array, "..."] | None = None
    in_scale: Float[Array, "..."] | None = None
    out_scale: Float[Array, "..."] | None = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype sums run in: float32 for half precision, the dtype itself otherwise."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """What a method is told about one weight; it never sees stacked axes.

    Attributes:
      kind: ``dense``, ``conv`` or ``lookup``.
      in_shape: shape of the axes that are summed over.
      out_shape: shape of the axes that stay.
      dtype: dtype of the adapter's arrays.
    """

    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: jnp.dtype


@dataclasses.dataclass(frozen=True)
class Method:
    """The pure functions that define one family of adapters.

    Attributes:
      settings: from the config, a site and a layer index (None for a weight that is not stacked):
        the hyper-parameters of one weight, such as its rank and scale.
      init: from a key, the config, the weight's spec, its settings and the weight laid out
        (in, out), or None: the trainable and the frozen arrays of one weight.
      factors: from the config and those arrays: the change of one weight.
      bias: from the config and those arrays: what is added to the bias of the weight, or None.
      rank_axes: for each array that has a rank axis, which one it is; layers of one stack whose
        ranks differ are padded along it, and told apart by a 0/1 ``rank_mask`` among the frozen
        arrays.
      needs_weight: whether ``init`` needs the weight.
    """

    settings: Callable[[Any, Any, int | None], Hashable]
    init: Callable[[Array, Any, WeightSpec, Any, Array | None], tuple[Arrays, Arrays]]
    factors: Callable[[Any, Arrays, Arrays], Factors]
    bias: Callable[[Any, Arrays, Arrays], Array | None] = lambda config, params, buffers: None
    rank_axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    needs_weight: Callable[[Any], bool] = lambda config: False
