"""How an adapter of many experts serves a batch: as a value that an adapter carries."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Each row of a batch is served by one expert.

    Attributes:
      index: the expert of each row, -1 for none.
      lengths: by how many positions in a row an axis of batch x sequence may count more. Static.
      in_order: whether each row's expert is that of its own number, if it has one. Static.
    """

    index: Int[Array, " batch"]
    lengths: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    in_order: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mix:
    """All experts are mixed.

    Attributes:
      weights: of each expert; of each row and expert; of each row, token and expert; or, for every
        layer another mix, of shape (batch, sequence, layers, experts).
      lengths: as of ``Rows``. Static.
    """

    weights: (
        Float[Array, " experts"]
        | Float[Array, "batch experts"]
        | Float[Array, "batch sequence experts"]
        | Float[Array, "batch sequence layers experts"]
    )
    lengths: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})


Route = Rows | Mix
