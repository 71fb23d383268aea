"""What an adapter can attach to: the weights a function uses linearly, and how it uses them."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

Kind = Literal["dense", "conv", "lookup"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a params tree: its dotted path, shape and dtype.

    The path joins the keys from the root: ``encoder.layer.0.query.kernel``.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def module(self) -> str:
        """The dotted path without the array's own name."""
        return self.path.rpartition(".")[0]

    @property
    def leaf_name(self) -> str:
        """The array's own name: ``kernel``, ``bias``, ``embedding``."""
        return self.path.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class Site:
    """One frozen weight and how the model uses it, as its trace showed it.

    Attributes:
      name: dotted path of the weight's module; where one module holds several weights, the
        weight's own name stays on (``layers.attn.wq``).
      path: dotted path of the weight itself in the params tree.
      shape: shape of the weight.
      dtype: dtype of the weight.
      kind: ``dense`` (a dot product of any shape), ``conv`` or ``lookup`` (an embedding).
      in_axes: axes summed over; the row axis of a lookup.
      out_axes: axes that appear in the result.
      stack_axes: axes along which independent weights are stacked: scanned layers, experts,
        vmapped members. The first is the one that layer indices count.
      bias: dotted path of the bias added to the result, or None.
      groups: feature groups of a convolution.
      is_head: whether the result reaches an output of the function through views, its bias and
        scalar operations alone.
      layers: indices selected along the first stack axis; None means all of them.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    kind: Kind
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...] = ()
    bias: str | None = None
    groups: int = 1
    is_head: bool = False
    layers: tuple[int, ...] | None = None

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of the in-axes, in the weight's own order."""
        return tuple(self.shape[axis] for axis in self.in_axes)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the out-axes, in the weight's own order."""
        return tuple(self.shape[axis] for axis in self.out_axes)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Shape of the stack axes with only the selected layers counted."""
        full = tuple(self.shape[axis] for axis in self.stack_axes)
        return full if self.layers is None else (len(self.layers), *full[1:])

    @property
    def in_size(self) -> int:
        """Number of inputs: the product of ``in_shape``."""
        return math.prod(self.in_shape)

    @property
    def out_size(self) -> int:
        """Number of outputs: the product of ``out_shape``."""
        return math.prod(self.out_shape)


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight, as one trace saw it.

    Attributes:
      primitive: the JAX primitive that consumed the weight.
      transposed: whether the use maps the out-space to the in-space (a tied head).
      fallback: why the merged weight had to be built for this use; empty on the fast path.
    """

    primitive: str
    transposed: bool = False
    fallback: str = ""


@dataclasses.dataclass(frozen=True)
class Sites(Mapping[str, Site]):
    """The linear weights of a function, by module path; what ``find_sites`` returns.

    Attributes:
      sites: the sites, in the order of the params tree.
      leaves: every array of the params tree, linear or not.
      uses: what the trace saw of each site, by name.
    """

    sites: tuple[Site, ...]
    leaves: tuple[Leaf, ...] = dataclasses.field(default=(), repr=False)
    uses: tuple[tuple[str, tuple[Use, ...]], ...] = dataclasses.field(
        default=(), repr=False, compare=False
    )

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (site.name for site in self.sites)

    def __len__(self) -> int:
        return len(self.sites)
