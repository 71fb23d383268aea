"""Quantised weights: small integers and their scales, unpacked where a product needs the weight.

Whatever moves the weight moves both parts, so that its scales are sliced with it in a scan. Where a
step would tear blocks of one scale apart, the scale is spread over them first.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from peftjax.engine import compat
from peftjax.engine.blocks import reshape_blocks

# QLoRA's 4-bit NormalFloat: quantiles of the normal distribution, zero among them. Dettmers et
# al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, https://arxiv.org/abs/2305.14314,
# appendix E.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantised weight, ``(level(codes) - zero) * scale``.

    Attributes:
      codes: integers, or floats of few bits, in the shape of the weight.
      scale: an array with the weight's axes, each as long as the weight's or a divisor of it: one
        number serves a block of them.
      zero: likewise, what stands for zero; None where that is zero.
      levels: ``"nf4"`` where codes number the levels of a 4-bit NormalFloat; empty where they are
        the levels themselves.
      dtype: the dtype of the weight.
    """

    codes: Shaped[Array, "..."]
    scale: Shaped[Array, "..."]
    zero: Shaped[Array, "..."] | None = None
    levels: str = dataclasses.field(default="", metadata={"static": True})
    dtype: Any = dataclasses.field(default=np.dtype(np.float32), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.codes.shape)

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of its entries."""
        return math.prod(self.shape)

    def each(self, change: Callable[[Array], Array]) -> "Packed":
        """This with something done to each of its arrays."""
        zero = None if self.zero is None else change(self.zero)
        return dataclasses.replace(
            self, codes=change(self.codes), scale=change(self.scale), zero=zero
        )

    def each_scale(self, change: Callable[[Array], Array]) -> "Packed":
        """This with something done to its scales and zeros."""
        zero = None if self.zero is None else change(self.zero)
        return dataclasses.replace(self, scale=change(self.scale), zero=zero)


Base = Array | Packed


def dense(base: Base) -> Array:
    """The weight itself."""
    if not isinstance(base, Packed):
        return base
    values = _nf4(base.codes, base.scale.dtype) if base.levels else base.codes
    values = values.astype(base.scale.dtype)
    if base.zero is not None:
        values = _blockwise(jnp.subtract, values, base.zero.astype(values.dtype))
    return _blockwise(jnp.multiply, values, base.scale).astype(base.dtype)


def like(base: Base) -> Array:
    """An array of the shape of the weight that lies where it does."""
    return base.codes if isinstance(base, Packed) else base


def abstract(base: Any) -> Any:
    """What a function that takes the weight is traced with."""
    if not isinstance(base, Packed):
        return base
    sharding = getattr(jax.typeof(base.codes), "sharding", None)
    if compat.explicit_spec(base.codes) is None:
        sharding = None
    return jax.ShapeDtypeStruct(base.shape, base.dtype, sharding=sharding)


def _nf4(codes: Array, dtype: Any) -> Array:
    """The levels that codes number, chosen bit by bit: no gather, which is slow on a TPU."""
    codes = codes.astype(jnp.int8)
    values = [jnp.asarray(level, dtype) for level in _NF4]
    for bit in range(4):
        is_set = (codes >> jnp.int8(bit)) & jnp.int8(1) == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, high, low) for low, high in pairs]
    return values[0]


def _blockwise(operation: Callable[[Array, Array], Array], values: Array, part: Array) -> Array:
    """An operation on a weight and what has one number for each block of it."""
    if all(n in (1, size) for n, size in zip(part.shape, values.shape, strict=True)):
        return operation(values, part)
    shape, own, spec, own_spec = [], [], [], []
    splits = tuple(compat.explicit_spec(values) or [None] * values.ndim)
    for n, size, split in zip(part.shape, values.shape, splits, strict=True):
        blocks = n not in (1, size)
        shape += [n, size // n] if blocks else [size]
        own += [n, 1] if blocks else [n]
        spec += [split, None] if blocks else [split]
        own_spec += [split, None] if blocks else [None if n == 1 else split]
    made = operation(_reshaped(values, shape, spec), _reshaped(part, own, own_spec))
    return _reshaped(made, values.shape, splits)


def _reshaped(array: Array, shape: Sequence[int], spec: Sequence[Any]) -> Array:
    """An array reshaped, its axes split as said where the mesh has Explicit axes."""
    own = None if compat.explicit_spec(array) is None else spec
    return jnp.reshape(array, tuple(shape), out_sharding=compat.explicit_sharding(array, own))


def spread_along(base: Base, axes: Sequence[int]) -> Base:
    """The weight with a number of its own for every entry along some axes."""
    if not isinstance(base, Packed):
        return base

    def spread(part: Array) -> Array:
        for axis in axes:
            times = base.shape[axis] // part.shape[axis]
            part = part if times == 1 else jnp.repeat(part, times, axis)
        return part

    return base.each_scale(spread)


def split_like(base: Base, spec: PartitionSpec) -> list[PartitionSpec]:
    """The spec of each of its arrays, where the weight has this one."""
    arrays = jax.tree.leaves(base)
    return [
        PartitionSpec(
            *[None if n == 1 else split for n, split in zip(array.shape, spec, strict=True)]
        )
        if array is not like(base)
        else spec
        for array in arrays
    ]


def taken(base: Base, index: Any, axis: int) -> Base:
    """Some of the weights along an axis."""
    if not isinstance(base, Packed):
        return jnp.take(base, index, axis=axis)
    spread = spread_along(base, (axis,))
    assert isinstance(spread, Packed)
    return spread.each(lambda array: jnp.take(array, index, axis=axis))


def transposed(base: Any, permutation: Sequence[int]) -> Any:
    """The weight with its axes permuted."""
    if isinstance(base, Packed):
        return base.each(lambda array: lax.transpose(array, permutation))
    return lax.transpose(base, permutation)


def multiplied(base: Base, by: Callable[[Array], Array]) -> Base:
    """The weight times a number, which ``by`` multiplies an array with."""
    if isinstance(base, Packed):
        return dataclasses.replace(base, scale=by(base.scale))
    return by(base)


def laid_out(base: Base, where: Any, move: Callable[[Array, Any], Array]) -> Base:
    """The weight moved on a mesh; its scales lie as it does, along the axes that they have."""
    if not isinstance(base, Packed):
        return move(base, where)

    def part(array: Array) -> Array:
        if not isinstance(where, NamedSharding):
            return array
        sizes = zip(where.spec, array.shape, base.shape, strict=False)
        spec = [_fitting(split, n, whole, where.mesh.shape) for split, n, whole in sizes]
        return move(array, where.update(spec=PartitionSpec(*spec)))

    return dataclasses.replace(base.each_scale(part), codes=move(base.codes, where))


def _fitting(split: Any, n: int, whole: int, mesh: Mapping[str, int]) -> Any:
    """The split of an axis for an array that has as many or fewer entries along it."""
    if n == whole or split is None or split is PartitionSpec.UNCONSTRAINED:
        return split
    names = split if isinstance(split, tuple) else (split,)
    return None if n % math.prod(mesh[name] for name in names) else split


def cut(
    base: Base,
    axes: Collection[int],
    change: Callable[[Array, tuple[int | None, ...]], Array],
) -> Base:
    """The weight sliced or reversed along some axes.

    ``change`` gets an array and the axis of each dimension, None where there is nothing to cut.
    """
    if not isinstance(base, Packed):
        return change(base, tuple(range(base.ndim)))
    own = [axis for axis in axes if base.scale.shape[axis] != 1]
    whole = spread_along(base, own)
    assert isinstance(whole, Packed)

    def part(array: Array) -> Array:
        return change(array, tuple(axis if axis in own else None for axis in range(base.ndim)))

    codes = change(base.codes, tuple(range(base.ndim)))
    return dataclasses.replace(whole.each_scale(part), codes=codes)


def step(base: Packed, name: str, params: dict[str, Any], rerun: Callable[[Array], Array]) -> Base:
    """The weight after a primitive that moves it; unpacked before one that does more."""
    match name:
        case "transpose":
            return transposed(base, params["permutation"])
        case "squeeze" | "reshape" | "broadcast_in_dim":
            codes = rerun(base.codes)
            if codes.size == base.size:
                if params.get("dimensions") and name == "reshape":
                    base = transposed(base, params["dimensions"])
                after = _reshape(base, tuple(codes.shape))
                return dataclasses.replace(after, codes=codes)
        # A second cast would have to round as the first did.
        case "convert_element_type" if base.dtype == base.scale.dtype:
            return dataclasses.replace(base, dtype=np.dtype(params["new_dtype"]))
        case "copy" | "copy_p" | "name" | "stop_gradient":
            return base
        case "pcast" | "pvary":
            return base.each(rerun)
        case "reshard":
            return laid_out(base, params["dst_sharding"], jax.reshard)
        case "sharding_constraint" if not params["unconstrained_dims"]:
            return laid_out(base, params["sharding"], lax.with_sharding_constraint)
        case "sharding_constraint":
            return dataclasses.replace(base, codes=rerun(base.codes))
    return rerun(dense(base))


def _reshape(base: Packed, shape: tuple[int, ...]) -> Packed:
    """The weight with its scales reshaped; the codes are as they were."""
    blocks = reshape_blocks(base.shape, shape) or []
    torn: list[int] = []
    target = [1] * len(shape)
    kept: dict[int, int] = {}
    for old, new in blocks:
        sizes = [base.scale.shape[axis] for axis in old]
        if all(n == 1 for n in sizes):
            continue
        long = [
            [axis for axis in axes if of[axis] != 1]
            for axes, of in ((old, base.shape), (new, shape))
        ]
        if len(long[0]) == len(long[1]) == 1:
            kept[long[1][0]] = long[0][0]
            continue
        torn += old
        for axis in new:
            target[axis] = shape[axis]
    whole = spread_along(base, torn)
    assert isinstance(whole, Packed)

    def part(array: Array) -> Array:
        own = list(target)
        for new, old in kept.items():
            own[new] = array.shape[old]
        return jnp.reshape(array, own)

    return whole.each_scale(part)
