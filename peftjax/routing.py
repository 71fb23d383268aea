"""Banks: many adapters of one family in one program, by row or mixed."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from peftjax.adapter import Adapter
from peftjax.config import AdapterConfig
from peftjax.experts import (
    PRESENT,
    as_expert,
    check_alike,
    expert,
    on_an_axis,
    template,
    templates,
    union,
)
from peftjax.routes import Mix, Rows


@dataclasses.dataclass(frozen=True, repr=False)
class AdapterBank:
    """Adapters of one family, their arrays stacked, to be chosen by row or mixed.

    ``rows`` and ``mix`` give an adapter, which is a pytree, for ``adapted`` and for jitted
    functions; the bank itself has names and is none.

    Attributes:
      adapter: the stacked adapter; every array has the experts on its first axis, and
        ``adapter.params`` can be trained like any other.
      names: the name of each expert; None where there is room for one more.
      configs: the config of each, likewise.
    """

    adapter: Adapter
    names: tuple[str | None, ...]
    configs: tuple[AdapterConfig | None, ...]

    def rows(self, index: Int[Array, " batch"] | Sequence[int | str | None]) -> Adapter:
        """The bank with one expert for each row of a batch; any other choice is no new program.

        Args:
          index: the place of each row's expert in the bank, -1 for the model without any; of a
            list also its name, None for the model without any.

        Raises:
          KeyError: there is no expert of that name.
          ValueError: the index is no vector of integers, or is beyond the bank; of a traced one
            that cannot be seen, and such rows are NaN.

        Where a model lays the rows along one axis with their positions, each row's positions have
        to follow one another: (batch x sequence), not (sequence x batch). Nothing in the shapes
        tells these apart, so it is not checked; a model of the other kind needs ``batch_axes`` of
        ``adapt``.
        """
        if isinstance(index, Sequence):
            places = (
                -1 if i is None else self.place(i) if isinstance(i, str) else i for i in index
            )
            index = jnp.asarray(list(places))
        if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(
                f"rows take a vector of integers, one for each row of the batch; got "
                f"{index.dtype}{list(index.shape)}"
            )
        if not isinstance(index, jax.core.Tracer):
            there = [-1, *(i for i, name in enumerate(self.names) if name is not None)]
            wrong = sorted(set(np.asarray(index).tolist()).difference(there))
            if wrong:
                raise ValueError(
                    f"there is no expert at {wrong}: the bank has {len(self)}, {self.experts}, and "
                    f"-1 is the model without any"
                )
        # Unsigned ones have no -1 to compare with.
        return self.adapter.replace(route=Rows(index.astype(jnp.int32)))

    def mix(
        self,
        weights: Float[ArrayLike, " experts"]
        | Float[ArrayLike, "batch experts"]
        | Float[ArrayLike, "batch sequence experts"],
    ) -> Adapter:
        """The bank with all its experts at once, each with a weight, for each row or token.

        Args:
          weights: the weight of each expert; of each row and expert; or of each row, token and
            expert. They may be traced, and others are no new program. With one weight for each
            expert the result can also be merged.

        Raises:
          ValueError: the family scales its inputs or outputs, so that it can be chosen by row
            alone; or the weights are of another number of experts.
        """
        weights = jnp.asarray(weights)
        if not 1 <= weights.ndim <= 3 or weights.shape[-1] != len(self.names):
            raise ValueError(
                f"weights of a bank of {len(self.names)} experts have shape (experts,), (batch, "
                f"experts) or (batch, sequence, experts), got {weights.shape}"
            )
        config = self.adapter.config
        if not config.method.mixes(config):
            raise ValueError(
                f"a mix of experts is a sum of their changes, and those of "
                f"{type(config).__name__} with these fields are no sums: choose them by row"
            )
        return self.adapter.replace(route=Mix(weights))

    def add(self, name: str, adapter: Adapter) -> "AdapterBank":
        """The bank with one more expert, or another one of that name; no new program.

        Args:
          name: its name.
          adapter: the expert.

        Raises:
          ValueError: there is no room for another expert, for its rank or for its modules; it is
            of another family or model, as for ``stack_adapters``; or its numbers are of a dtype
            that the bank would round.
        """
        free = [i for i, own in enumerate(self.names) if own is None]
        if name not in self.names and not free:
            raise ValueError(
                f"the bank is full with {len(self.names)} experts: make one with more room, "
                f"stack_adapters(..., capacity={2 * len(self.names)})"
            )
        place = self.names.index(name) if name in self.names else free[0]
        check_alike({"the bank": self.adapter, name: adapter})
        own = as_expert(adapter, self.adapter.sites, templates(self.adapter), name)
        params, buffers = (
            jax.tree.map(lambda whole, one: whole.at[place].set(one), stacked, part)
            for stacked, part in zip((self.adapter.params, self.adapter.buffers), own, strict=True)
        )
        return AdapterBank(
            self.adapter.replace(params=params, buffers=buffers),
            _with(self.names, place, name),
            _with(self.configs, place, adapter.config),
        )

    def remove(self, name: str) -> "AdapterBank":
        """The bank without one expert, whose place is free then; no new program.

        Raises:
          KeyError: there is no expert of that name.
        """
        place = self.place(name)
        buffers = {
            module: own | {PRESENT: own[PRESENT].at[place].set(False)}
            for module, own in self.adapter.buffers.items()
        }
        return AdapterBank(
            self.adapter.replace(buffers=buffers),
            _with(self.names, place, None),
            _with(self.configs, place, None),
        )

    def place(self, name: str) -> int:
        """The place of an expert in the bank.

        Raises:
          KeyError: there is no expert of that name.
        """
        if name not in self.names:
            raise KeyError(f"there is no expert {name!r} in the bank, only {self.experts}")
        return self.names.index(name)

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the experts, without free places."""
        return tuple(name for name in self.names if name is not None)

    def __getitem__(self, name: str) -> Adapter:
        place = self.place(name)
        config = self.configs[place]
        assert config is not None
        return expert(self.adapter, place, config)

    def __iter__(self) -> Iterator[str]:
        return iter(self.experts)

    def __len__(self) -> int:
        return len(self.experts)

    def __repr__(self) -> str:
        kind = type(self.adapter.config).__name__.removesuffix("Config")
        room = f", room for {len(self.names) - len(self)} more" if None in self.names else ""
        return f"AdapterBank({kind}, {len(self)} experts{room}: {', '.join(self.experts)})"


def stack_adapters(
    adapters: Mapping[str, Adapter], *, capacity: int | None = None, r: int | None = None
) -> AdapterBank:
    """Stacks adapters of one family, so that one program serves a batch with any of them.

    Their ranks, scales and modules may differ: smaller ranks are padded, exactly, and an expert
    leaves a module alone that it does not adapt.

    Args:
      adapters: the adapters by name, made for one model.
      capacity: how many the bank has room for; by default it is full.
      r: the rank it has room for at every module; by default the largest there is.

    Returns:
      The bank.

    Raises:
      ValueError: the adapters are of different families or models, differ in a field that is part
        of the program (such as ``lora_dropout``), or train whole leaves, which have no rows.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params, x = {"dense": {"kernel": jnp.ones((4, 3))}}, jnp.ones((2, 5, 4))
      >>> sites = peftjax.find_sites(apply_fn, params, x)
      >>> a, b = (
      ...     peftjax.init_adapter(
      ...         jax.random.key(r),
      ...         peftjax.LoraConfig(r=r, target_modules=["dense"], init_lora_weights=False),
      ...         sites,
      ...     )
      ...     for r in (2, 3)
      ... )
      >>> bank = peftjax.stack_adapters({"a": a, "b": b}, capacity=8)
      >>> bank
      AdapterBank(Lora, 2 experts, room for 6 more: a, b)
      >>> adapted = peftjax.adapt(apply_fn)
      >>> out = adapted(params, bank.rows(["b", None]), x)
      >>> bool(jnp.allclose(out[0], adapted(params, b, x)[0]))
      True
    """
    if not adapters:
        raise ValueError("there are no adapters to stack")
    room = len(adapters) if capacity is None else capacity
    if room < len(adapters):
        raise ValueError(f"{len(adapters)} adapters do not fit into a capacity of {room}")
    check_alike(adapters)
    sites = union(adapters)
    shapes = {site.name: template(site, adapters, r) for site in sites.values()}
    free = [None] * (room - len(adapters))
    places = [*adapters.items(), *(("", none) for none in free)]
    experts = [as_expert(each, sites, shapes, name) for name, each in places]
    params, buffers = jax.tree.map(on_an_axis, *experts)
    config = next(iter(adapters.values())).config
    return AdapterBank(
        Adapter(params, buffers, None, config, sites),
        (*adapters, *free),
        (*(each.config for each in adapters.values()), *free),
    )


def _with(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])
