"""Marked weights on their way from the params tree to their uses.

A weight seldom meets its matrix product as it lies in the params tree: it is transposed, cast,
reshaped, sliced by a scan. A ``View`` is the weight after such steps, together with the factors
of its adapters after the same steps.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from peftjax.engine import compat, packed
from peftjax.engine.blocks import reshape_blocks
from peftjax.engine.packed import Base
from peftjax.engine.routes import Route
from peftjax.factors import Factors

Kind = Literal["dense", "conv", "lookup"]
Role = Literal["in", "out", "stack"]
Axes = tuple[tuple[int, ...], ...]
Dims = tuple[int | None, ...]


class Window(NamedTuple):
    """How a convolution moves its kernel over an image, as far as it is out of the ordinary.

    Attributes:
      dilated: whether the kernel's taps lie apart.
      spread: whether the image's points do, which makes a transposed convolution.
      uneven: whether steps or padding differ between the axes of the image.
    """

    dilated: bool = False
    spread: bool = False
    uneven: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """What one adapter does to one weight.

    Attributes:
      factors: its factors.
      key: the key of its dropout, if any.
      route: which of several experts serves which row or token; None for a single one.
      shift: what is added to the result of a row, shape (*stack, *out, experts): the change of the
        bias, which has no rows.
      features: x through A at a use, where it was computed along with those of other weights.
    """

    factors: Factors
    key: jax.Array | None = None
    route: Route | None = None
    shift: jax.Array | None = None
    features: jax.Array | None = None

    @property
    def drops(self) -> bool:
        """Whether this layer drops entries of x."""
        return self.key is not None and self.factors.dropout > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A marked weight in its current layout.

    Attributes:
      base: the frozen weight as the unadapted model has it here; perhaps quantised.
      layers: the adapters, first applied first. Their factors' axes follow the order of the
        current axes: ``A (*stack, *in, rank)``, ``B (*stack, rank, *out)``, scales likewise; an
        axis of experts may follow.
      leaf: which leaf of the params tree this is.
      axes: for each current axis, the axes of the original weight it is made of; none for an axis
        of size 1 that was added on the way.
      roles: role of each axis of the original weight; None while roles are being found out.
      times: how often the loops around it use this one weight.
      joined: while roles are being found out, other leaves that went into this array along the
        same axes, as when weights are concatenated.
      tapped: whether the x of its uses is wanted too.
    """

    base: Base
    layers: tuple[Layer, ...] = ()
    leaf: int = dataclasses.field(default=0, metadata={"static": True})
    axes: Axes = dataclasses.field(default=(), metadata={"static": True})
    roles: tuple[Role, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    times: int = dataclasses.field(default=1, metadata={"static": True})
    joined: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    tapped: bool = dataclasses.field(default=False, metadata={"static": True})

    def role(self, axis: int) -> Role | None:
        """Role of a current axis; None if it was added on the way, or while nothing is known."""
        if self.roles is None or not self.axes[axis]:
            return None
        return self.roles[self.axes[axis][0]]

    @property
    def grouped(self) -> bool:
        """Whether an in-scale counts the channels of all groups of a convolution."""
        scales = (layer.factors.in_scale for layer in self.layers)
        return any(
            n not in (1, self.base.shape[axis])
            for scale in scales
            if scale is not None
            for axis, n in zip(layout(self)["in_scale"], scale.shape, strict=False)
            if axis is not None
        )

    @property
    def routed(self) -> bool:
        """Whether any adapter treats rows or tokens differently."""
        return any(layer.route is not None for layer in self.layers)

    def dims(self, role: Role) -> tuple[int, ...]:
        """The current axes that have this role, in order."""
        return tuple(axis for axis in range(len(self.axes)) if self.role(axis) == role)

    @property
    def drops(self) -> bool:
        """Whether any adapter drops entries of x."""
        return any(layer.drops for layer in self.layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a linear use, after views, its bias and scalar operations alone.

    Only while sites are being found, and of a weight that is tapped.

    Attributes:
      value: the result.
      leaf: the leaf that was used.
      bare: whether its bias may still follow: nothing but views has happened.
      x: what the weight was applied to, if that is wanted, in the layout of the value.
      features: the axis of x that the weight sums over, and of the value that it makes; None if x
        can be followed no further.
    """

    value: jax.Array
    leaf: int = dataclasses.field(metadata={"static": True})
    bare: bool = dataclasses.field(default=True, metadata={"static": True})
    x: jax.Array | None = None
    features: int | None = dataclasses.field(default=None, metadata={"static": True})


def layout(view: View) -> dict[str, Dims]:
    """For each part of a layer, the current axis of each of its dimensions; None is the rank."""
    stack, ins, outs = view.dims("stack"), view.dims("in"), view.dims("out")
    return {
        "A": (*stack, *ins, None),
        "B": (*stack, None, *outs),
        "in_scale": (*stack, *ins),
        "out_scale": (*stack, *outs),
        "change": (*stack, *ins, *outs),
        "stack": stack,
    }


def remap(view: View, after: View, change: Callable[[jax.Array, Dims, Dims], jax.Array]) -> View:
    """Applies one step to every factor; ``after`` is the view with its new base, axes and roles.

    ``change`` gets an array and the axis of each of its dimensions, before and after the step.
    Dimensions behind those, such as the experts', ride along.
    """
    before, target = layout(view), layout(after)

    def part(name: str, array: jax.Array | None) -> jax.Array | None:
        if array is None:
            return None

        def one(array: jax.Array) -> jax.Array:
            return change(array, before[name], target[name])

        for _ in range(array.ndim - len(before[name])):
            one = jax.vmap(one, in_axes=-1, out_axes=-1)
        return one(array)

    def step(layer: Layer) -> Layer:
        f = layer.factors
        factors = dataclasses.replace(
            f,
            A=part("A", f.A),
            B=part("B", f.B),
            in_scale=part("in_scale", f.in_scale),
            out_scale=part("out_scale", f.out_scale),
        )
        return Layer(
            factors,
            part("stack", layer.key),
            jax.tree.map(lambda array: part("stack", array), layer.route),
            part("out_scale", layer.shift),
        )

    return dataclasses.replace(after, layers=tuple(map(step, view.layers)))


def transpose(view: View, permutation: tuple[int, ...], base: Base) -> View:
    """The view with its axes permuted, as the base already is."""

    def change(array: jax.Array, before: Dims, target: Dims) -> jax.Array:
        order = [before.index(None if dim is None else permutation[dim]) for dim in target]
        return array if order == sorted(order) else lax.transpose(array, order)

    axes = tuple(view.axes[axis] for axis in permutation)
    return remap(view, dataclasses.replace(view, base=base, axes=axes), change)


def reshape(view: View, shape: tuple[int, ...], base: Base) -> View | None:
    """The view reshaped, as the base already is; None where axes of different roles would mix."""
    blocks = reshape_blocks(view.base.shape, shape)
    if blocks is None:
        return None
    axes: list[tuple[int, ...]] = [()] * len(shape)
    for old, new in blocks:
        if len({view.role(axis) for axis in old} - {None}) > 1:
            return None
        labels = tuple(dict.fromkeys(label for axis in old for label in view.axes[axis]))
        for axis in new:
            axes[axis] = labels

    def change(array: jax.Array, before: Dims, target: Dims) -> jax.Array:
        rank = array.shape[before.index(None)] if None in before else 0
        full = [rank if dim is None else view.base.shape[dim] for dim in before]
        new_shape = [rank if dim is None else shape[dim] for dim in target]
        if full == new_shape:
            return array
        return lax.reshape(compat.replicate(jnp.broadcast_to(array, full)), new_shape)

    return remap(view, dataclasses.replace(view, base=base, axes=tuple(axes)), change)


def cut(view: View, axes: Collection[int], change: Callable[[jax.Array, Dims], jax.Array]) -> View:
    """The view with some axes sliced or reversed in every array.

    ``change`` gets an array and the axis of each dimension; None where there is nothing to cut:
    the rank, or a dimension along which a scale broadcasts.
    """

    def whole(array: jax.Array, dims: Dims, _: Dims) -> jax.Array:
        sizes = zip(dims, array.shape, strict=True)
        return change(
            array,
            tuple(d if d is not None and size == view.base.shape[d] else None for d, size in sizes),
        )

    base = packed.cut(view.base, axes, change)
    return remap(view, dataclasses.replace(view, base=base), whole)


def give_roles(view: View, roles: Iterable[Role]) -> View:
    """The view in which axes added on the way have the role that their use gives them."""
    axes, known = list(view.axes), list(view.roles or ())
    for axis, role in enumerate(roles):
        if view.role(axis) is None:
            axes[axis] = (len(known),)
            known.append(role)
    after = dataclasses.replace(view, axes=tuple(axes), roles=tuple(known))

    def change(array: jax.Array, before: Dims, target: Dims) -> jax.Array:
        return lax.expand_dims(array, [i for i, dim in enumerate(target) if dim not in before])

    return view if axes == list(view.axes) else remap(view, after, change)


def scale(view: View, factor: jax.typing.ArrayLike, divide: bool = False) -> View:
    """The view multiplied (or divided) by a scalar."""

    def scaled(array: jax.Array) -> jax.Array:
        by = jnp.asarray(factor, array.dtype)
        return array / by if divide else array * by

    layers = tuple(
        layer
        if layer.factors.B is None
        else dataclasses.replace(
            layer, factors=dataclasses.replace(layer.factors, B=scaled(layer.factors.B))
        )
        for layer in view.layers
    )
    return dataclasses.replace(view, base=packed.multiplied(view.base, scaled), layers=layers)


def fold_in(view: View, data: jax.Array | int) -> View:
    """The view with fresh dropout keys; itself where nothing is dropped."""

    def fresh(layer: Layer) -> Layer:
        if layer.key is None or not layer.drops:
            return layer
        keys = jnp.ravel(layer.key)
        folded = jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)
        return dataclasses.replace(layer, key=jnp.reshape(folded, layer.key.shape))

    return dataclasses.replace(view, layers=tuple(map(fresh, view.layers))) if view.drops else view
