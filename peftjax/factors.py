"""The language methods and the engine share: a weight, and its change as factors."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

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
      in_scale: array of shape ``(*in,)``; an axis may have size 1, then it broadcasts. For a
        grouped convolution the channels may also be those of x, all groups' together.
      out_scale: array of shape ``(*out,)``; an axis may have size 1, then it broadcasts.
      dropout: probability to drop an entry of x before A while an adapter trains. Static.
    """

    A: Float[Array, "..."] | None = None
    B: Float[Array, "..."] | None = None
    in_scale: Float[Array, "..."] | None = None
    out_scale: Float[Array, "..."] | None = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """A change of a weight that is cheaper to build than to apply as factors.

    The engine adds it to the weight once, before the model runs.

    Attributes:
      change: array of shape ``(*in, *out)``.
    """

    change: Float[Array, "..."]


class BiasChange(NamedTuple):
    """A change of the bias b of a weight: ``scale * b + shift``; None leaves a part out.

    Attributes:
      scale: array of the shape of the weight's out-axes.
      shift: likewise.
    """

    scale: Float[Array, "*out"] | None = None
    shift: Float[Array, "*out"] | None = None


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """What a method is told about one weight; it never sees stacked axes.

    Attributes:
      kind: ``dense``, ``conv`` or ``lookup``.
      in_shape: shape of the axes that are summed over.
      out_shape: shape of the axes that stay.
      dtype: dtype of the adapter's arrays.
      taps: which of the in-axes are the taps of a convolution's kernel.
      groups: feature groups of a convolution, each of which sees ``in_shape`` of its own.
    """

    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: jnp.dtype
    taps: tuple[int, ...] = ()
    groups: int = 1

    @property
    def in_size(self) -> int:
        """Number of inputs of one output: the product of ``in_shape``."""
        return math.prod(self.in_shape)

    @property
    def out_size(self) -> int:
        """Number of outputs: the product of ``out_shape``."""
        return math.prod(self.out_shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight as the adapters before left it, to be asked about and never to be built.

    Attributes:
      spec: what is known of it without reading it. Static.
      base: the frozen weight in its own layout; None for a method that does not read it.
      earlier: what the adapters before change about it, first applied first.
      in_axes: the axes of ``base`` that are summed over. Static.
      out_axes: the axes of ``base`` that stay. Static.
      tokens: how many vectors the whole call sends through the weight; None where the changed
        weight itself is wanted, as in merging. Static.
      fusible: whether a dense change may be added to the weight: nothing before it, such as
        dropout, acts on x alone. Static.
    """

    spec: WeightSpec = dataclasses.field(metadata={"static": True})
    base: Float[Array, "..."] | None = None
    earlier: tuple[Factors, ...] = ()
    in_axes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    out_axes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    tokens: int | None = dataclasses.field(default=None, metadata={"static": True})
    fusible: bool = dataclasses.field(default=True, metadata={"static": True})

    def project(self, a: Float[Array, "*in rank"]) -> Float[Array, "rank ..."]:
        """``a`` transposed times the weight: every column of ``a`` sent through it."""
        return _project(self, self._earlier(a.dtype), a)

    def matrix(self) -> Float[Array, "in out"]:
        """The frozen weight itself as a matrix, for a start that is taken out of it.

        In the dtype sums run in: of half precision nothing can be decomposed.
        """
        assert self.base is not None, "a method that reads the weight has to say so"
        laid = jnp.transpose(self.base, (*self.in_axes, *self.out_axes))
        dtype = accumulation_dtype(self.spec.dtype)
        return laid.astype(dtype).reshape(self.spec.in_size, self.spec.out_size)

    def squared_norms(self) -> Float[Array, "*out"]:
        """For every output the sum of the squares of its weights.

        Of factors A B before it nothing is built either: ||W + A B||^2 = ||W||^2 + 2 (W^T A) . B
        + B . (A^T A) B, column by column.
        """
        assert self.base is not None, "a method that reads the weight has to say so"
        return _squared_norms(self, self._earlier(accumulation_dtype(self.base.dtype)), None)

    def _earlier(self, dtype: jnp.dtype) -> tuple[Factors, ...]:
        return jax.tree.map(lambda array: array.astype(dtype), self.earlier)


def _project(weight: Weight, earlier: Sequence[Factors], a: Array) -> Array:
    if not earlier:
        assert weight.base is not None, "a method that reads the weight has to say so"
        dims = ((tuple(range(a.ndim - 1)), weight.in_axes), ((), ()))
        return dot(a, weight.base, dims).astype(a.dtype)
    *inner, f = earlier
    y = _project(weight, inner, _scaled(a, f.in_scale))
    if f.A is not None and f.B is not None:
        y = y + _through(a, f.A, f.B)
    return y if f.out_scale is None else y * f.out_scale[None]


def _squared_norms(weight: Weight, earlier: Sequence[Factors], scale: Array | None) -> Array:
    """The squared norms of the weight with its inputs scaled."""
    if not earlier:
        assert weight.base is not None, "a method that reads the weight has to say so"
        base = weight.base if scale is None else _scaled_inputs(weight, scale)
        dims = ((weight.in_axes, weight.in_axes), (weight.out_axes, weight.out_axes))
        return dot(base, base, dims)
    *inner, f = earlier
    inner_scale = f.in_scale if scale is None else _scaled(scale, f.in_scale, rank=False)
    total = _squared_norms(weight, inner, inner_scale)
    if f.A is not None and f.B is not None:
        a = _scaled(f.A, scale)
        crossed = _project(weight, inner, _scaled(a, inner_scale))
        total = total + jnp.sum((2 * crossed + _through(a, a, f.B)) * f.B, axis=0)
    return total if f.out_scale is None else total * jnp.square(f.out_scale)


def _scaled(array: Array, scale: Array | None, rank: bool = True) -> Array:
    """An array of the in-axes, and the rank behind them, times a scale of the in-axes."""
    if scale is None:
        return array
    return array * (scale[..., None] if rank else scale)


def _scaled_inputs(weight: Weight, scale: Array) -> Array:
    """The frozen weight with its inputs scaled, in its own layout: this one is built."""
    base = weight.base
    assert base is not None
    full = jnp.broadcast_to(scale, [base.shape[axis] for axis in weight.in_axes])
    shape = [n if axis in weight.in_axes else 1 for axis, n in enumerate(base.shape)]
    return base.astype(scale.dtype) * full.reshape(shape)


def _through(a: Array, other: Array, b: Array) -> Array:
    """``(a^T other) b``, from the small side."""
    return dot(gram(a, other).astype(b.dtype), b, (((1,), (0,)), ((), ()))).astype(b.dtype)


def gram(a: Array, b: Array) -> Array:
    """``a^T b`` of two arrays of shape (*in, rank), at the best precision."""
    ins = tuple(range(a.ndim - 1))
    return dot(a, b, ((ins, ins), ((), ())))


def dot(a: Array, b: Array, dims: Any) -> Array:
    """A product at the best precision of two arrays, of perhaps different dtypes, uncast.

    Args:
      a: one array.
      b: the other.
      dims: the dimension numbers of ``jax.lax.dot_general``.
    """
    accumulate = max(map(accumulation_dtype, (a.dtype, b.dtype)), key=lambda d: d.itemsize)
    return lax.dot_general(
        a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=accumulate
    )


def inverse(change: Factors | Dense) -> Factors | Dense:
    r"""The change that undoes one that does not depend on the weight.

    .. math::
      W = s_{out}^{-1} \odot (s_{in}^{-1} \odot W' - (s_{in}^{-1} \odot A) (s_{out} \odot B))
    """
    if isinstance(change, Dense):
        return Dense(-change.change)
    a, b, in_scale, out_scale = change.A, change.B, change.in_scale, change.out_scale
    in_scale = None if in_scale is None else 1 / in_scale
    if a is not None and b is not None:
        a, b = _scaled(a, in_scale), -b if out_scale is None else -b * out_scale[None]
    out_scale = None if out_scale is None else 1 / out_scale
    return Factors(A=a, B=b, in_scale=in_scale, out_scale=out_scale)


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype sums run in: float32 for half precision, the dtype itself otherwise."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def widened(array: Array) -> Array:
    """The array in the dtype sums run in, for products of small ones: half precision shows."""
    return array.astype(accumulation_dtype(array.dtype))


def times(scaling: Array, array: Array) -> Array:
    """The array times a scale of its weight, in the dtype sums run in."""
    array = widened(array)
    return scaling.astype(array.dtype) * array


@dataclasses.dataclass(frozen=True)
class Gating:
    """How a family of experts mixes them by what the model makes of its input.

    Attributes:
      module: the name under which an adapter keeps the arrays of its classifier.
      head: from the config, the path of the weight whose input are the hidden states; None if the
        model has no such weight.
      first_pass: from the adapter, the weight of each expert in the pass that feeds the classifier.
      scalings: from the adapter and the hidden states, the scalings of every token; the axis of
        layers may have size 1.
      gates: from the adapter and such scalings, the weights of the experts.
    """

    module: str
    head: Callable[[Any], str | None]
    first_pass: Callable[[Any], Float[Array, " experts"]]
    scalings: Callable[[Any, Array], Float[Array, "batch sequence layers experts"]]
    gates: Callable[[Any, Array], Float[Array, "batch sequence layers experts"]]


Axes = Literal["in", "out", "rank", "taps"]
Change = Factors | Dense
Make = Callable[[Any, Arrays, Arrays, Weight, PRNGKeyArray | None], Change]


@dataclasses.dataclass(frozen=True)
class Method:
    """The pure functions that define one family of adapters, each about one weight.

    Attributes:
      settings: from the config, a site and a layer index (None for a weight that is not stacked):
        the hyper-parameters of one weight, such as its rank and scale. Raises where the config
        cannot be used on that site.
      init: from a key, the config, those settings, the weight and its frozen arrays: its
        trainable arrays.
      buffers: from the first four of these: its frozen arrays. By default none.
      factors: from the config, those arrays, the weight and a key while training (None
        otherwise): the change of the weight.
      inverse: from the same, the weight being the changed one: the change that undoes it. By
        default ``inverse`` of ``factors``, which is right where they do not read the weight.
      bias: from the config, the arrays and the weight, which it cannot read: the change of the
        weight's bias.
      axes: for each array that has any, the axes behind the stack's: all those that go ``in`` or
        ``out``, as the weight has them or of size 1, a ``rank``, or all ``taps`` of a kernel.
        Layers of one stack whose ranks differ are padded along the rank axes, and told apart by a
        0/1 ``rank_mask`` among the frozen arrays.
      rank_mask: from the config and a site, that mask of all its weights, where the config itself
        says which ranks are padding.
      init_reads_weight: whether ``init`` reads the weight.
      buffers_read_weight: whether ``buffers`` does.
      reads_weight: whether ``factors`` does.
      wants_tokens: from the config, the weight's spec and its trainable arrays, perhaps stacked:
        whether ``factors`` wants to know how many tokens pass through the weight.
      params: the names of all trainable arrays there can be.
      program: the fields of the config, beside those that shapes and arrays hold, that
        ``factors`` and ``bias`` read: adapters that agree on them can run as one.
      mixes: from the config, whether changes add up, so that several can be mixed.
      gating: how the experts are mixed, for a family of several.
    """

    settings: Callable[[Any, Any, int | None], Hashable]
    init: Callable[[PRNGKeyArray, Any, Any, Weight, Arrays], Arrays]
    factors: Make
    buffers: Callable[[PRNGKeyArray, Any, Any, Weight], Arrays] = lambda *_: {}
    inverse: Make | None = None
    bias: Callable[[Any, Arrays, Arrays, Weight], BiasChange] = lambda *_: BiasChange()
    axes: Mapping[str, tuple[Axes, ...]] = dataclasses.field(default_factory=dict)
    rank_mask: Callable[[Any, Any], Any] = lambda config, site: None
    init_reads_weight: Callable[[Any], bool] = lambda config: False
    buffers_read_weight: Callable[[Any], bool] = lambda config: False
    reads_weight: Callable[[Any], bool] = lambda config: False
    wants_tokens: Callable[[Any, WeightSpec, Arrays], bool] = lambda config, spec, params: False
    params: tuple[str, ...] = ()
    program: tuple[str, ...] = ()
    mixes: Callable[[Any], bool] = lambda config: False
    gating: Gating | None = None

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        """For each array that has rank axes, which they are; from behind where in-axes precede."""
        return {
            name: tuple(
                i if set(axes[:i]) <= {"rank"} else i - len(axes)
                for i, axis in enumerate(axes)
                if axis == "rank"
            )
            for name, axes in self.axes.items()
            if "rank" in axes
        }
