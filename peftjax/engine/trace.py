"""The state of one replay, and what it notes about the leaves it marked."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from peftjax.engine.compat import Eqn
from peftjax.engine.linear import merged
from peftjax.engine.packed import dense
from peftjax.engine.views import Kind, Result, Role, View, Window


class FallbackError(ValueError):
    """A use of an adapted weight to which its factors cannot be applied."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """A linear use, found while roles are unknown.

    Attributes:
      leaf: the leaf used.
      kind: the kind of use.
      roles: the original axes that are still there, each with the role of the use; None where
        parts of one axis are both summed over and kept.
      taps: of those axes, the ones along which the taps of a convolution's kernel lie, in the
        order of the image's axes.
      groups: feature groups of a convolution.
      window: how a convolution moves its kernel.
    """

    leaf: int
    kind: Kind
    roles: tuple[tuple[int, Role | None], ...]
    taps: tuple[int, ...]
    groups: int
    window: Window


@dataclasses.dataclass(frozen=True)
class Used:
    """A use of a weight whose roles are known.

    Attributes:
      leaf: the leaf used.
      primitive: what used it.
      transposed: whether the use maps the out-space to the in-space.
      fallback: why it was materialised; empty where it was not.
      tokens: how many vectors one call sends through the weight here.
      rows: the size of the axis of x on which the rows of a batch may lie; None without one.
    """

    leaf: int
    primitive: str
    transposed: bool
    fallback: str
    tokens: int = 0
    rows: int | None = None


@dataclasses.dataclass(frozen=True)
class Biased:
    """A leaf added to the result of a use; ``kept`` are its axes that were not sliced away."""

    leaf: int
    bias: int
    kept: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stray:
    """Where a leaf met what no rule follows, found while roles are unknown.

    Attributes:
      leaf: the leaf.
      primitive: what it met.
      axes: how many of its axes are longer than 1 there.
    """

    leaf: int
    primitive: str
    axes: int


Record = Seen | Used | Biased | Stray


@dataclasses.dataclass
class Trace:
    """The state of one replay.

    Attributes:
      names: what each marked leaf is called in messages.
      strict: whether to raise rather than build a merged weight.
      records: what was seen, by where it was seen: JAX may trace one loop body twice.
      bodies: jitted functions replayed so far, by their jaxpr and what was marked.
      numbers: the number of each use and call, by equation; dropout folds it into its key.
    """

    names: Sequence[str]
    strict: bool = False
    records: dict[tuple, Record] = dataclasses.field(default_factory=dict)
    bodies: dict[tuple, tuple[Callable[..., list[Any]], "Trace"]] = dataclasses.field(
        default_factory=dict
    )
    numbers: dict[int, int] = dataclasses.field(default_factory=dict)

    def note(self, eqn: Eqn | None, record: Record) -> None:
        """Keeps a record."""
        self.records[(id(eqn), type(record), record.leaf)] = record

    def number(self, eqn: Eqn) -> int:
        """A number of its own for every use and call, the same if its equation is traced again."""
        return self.numbers.setdefault(id(eqn), len(self.numbers))

    def inner(self, leaves: Sequence[int]) -> "Trace":
        """The trace of a body that several calls share, in which leaves are numbered anew."""
        return Trace([self.names[leaf] for leaf in leaves], self.strict, bodies=self.bodies)

    def absorb(self, eqn: Eqn, inner: "Trace", leaves: Sequence[int]) -> None:
        """Keeps the records of a shared body under the leaves of this call."""
        for key, record in inner.records.items():
            renamed = dataclasses.replace(record, leaf=leaves[record.leaf])
            if isinstance(renamed, Biased):
                renamed = dataclasses.replace(renamed, bias=leaves[renamed.bias])
            self.records[(id(eqn), *key, renamed.leaf)] = renamed


def plain(trace: Trace, value: Any, eqn: Eqn | None, reason: str) -> Any:
    """The array behind a mark; for an adapted weight that is the merged weight.

    ``eqn`` is the equation that needs it; None for an output of the function.
    """
    if isinstance(value, Result):
        return value.value
    if not isinstance(value, View):
        return value
    primitive = eqn.primitive.name if eqn else "return"
    if value.roles is None:
        trace.note(eqn, Stray(value.leaf, primitive, sum(n > 1 for n in value.base.shape)))
        return dense(value.base)
    trace.note(eqn, Used(value.leaf, primitive, False, reason))
    where = f"{trace.names[value.leaf]} meets {primitive} as {met(value)}: {reason}."
    if trace.strict:
        raise FallbackError(
            f"{where} Only the merged weight can go on from here, and on_fallback='error' forbids "
            f"building it; on_fallback='materialize' allows it."
        )
    if value.drops:
        raise FallbackError(
            f"{where} Only the merged weight can go on from here, but dropout acts on the input of "
            f"a weight and cannot be merged: set the dropout to 0, exclude this module, or call "
            f"the adapter without a key."
        )
    if value.routed:
        raise FallbackError(
            f"{where} Only one merged weight can go on from here, but rows or tokens have weights "
            f"of their own: exclude this module, or let every row run by itself with "
            f"adapt(..., batch_axes=)."
        )
    return merged(value)


def met(view: View) -> str:
    """What a weight is where it is used, for a message."""
    return f"{jnp.dtype(view.base.dtype).name}[{','.join(map(str, view.base.shape))}]"
