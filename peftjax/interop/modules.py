"""Which tensors of a torch model the arrays of a params tree are."""

import dataclasses
import difflib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import numpy as np

from peftjax.adapter import Adapter, weight_spec
from peftjax.factors import WeightSpec
from peftjax.interop.layouts import weight_back, weight_there
from peftjax.interop.names import ModuleNames
from peftjax.sites import Leaf, Site, Sites
from peftjax.unstacking import Index, Part, indices

# What torch calls the arrays of a module; others go by their own names.
_WEIGHTS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "offset": "bias"}


@dataclasses.dataclass(frozen=True)
class Module:
    """A torch module, and the weight of a site that it holds.

    Attributes:
      name: torch's name.
      site: the site.
      index: where in its stack the weight lies.
      spec: what a method is told about the weight.
      inputs_first: whether the module keeps its weight as (in, out).
    """

    name: str
    site: Site
    index: Index
    spec: WeightSpec
    inputs_first: bool

    @property
    def part(self) -> Part:
        """The name of the site, and where in its stack the weight lies."""
        return self.site.name, self.index


def torch_modules(sites: Sites, names: ModuleNames, unnamed: list[str]) -> dict[str, Module]:
    """The torch modules of all weights of the sites, by torch's names.

    Args:
      sites: the sites.
      names: the rules.
      unnamed: gets the reason why a site has no torch name; such a site is left out.

    Raises:
      ValueError: two sites have the same torch name.
    """
    modules: dict[str, Module] = {}
    for site in sites.values():
        spec = weight_spec(site, site.dtype)
        for index in indices(site):
            try:
                name = names.to_torch(site.name, index)
            except ValueError as error:
                unnamed.append(str(error))
                break
            if name in modules:
                raise ValueError(
                    f"{modules[name].site.name!r} and {site.name!r} have the same torch name "
                    f"{name!r}: give them rules of their own in names="
                )
            first = names.keeps_inputs_first(name)
            modules[name] = Module(name, site, index, spec, first)
    return modules


@dataclasses.dataclass(frozen=True)
class LeafTensor:
    """One tensor of a torch model that an array of the params tree, or a layer of it, is.

    Attributes:
      module: torch's name of the module.
      name: the tensor's own name there.
      leaf: the array.
      stack_axes: the axes of the array along which layers are stacked.
      index: where along these the tensor lies.
      part: the site that the tensor is the weight or the bias of, and where in its stack.
      inputs_first: whether the module keeps its weight as (in, out).
    """

    module: str
    name: str
    leaf: Leaf
    stack_axes: tuple[int, ...]
    index: Index
    part: Part | None
    inputs_first: bool

    @property
    def key(self) -> str:
        """The tensor's name in a torch model."""
        return f"{self.module}.{self.name}" if self.module else self.name

    @property
    def wrapped_key(self) -> str:
        """The tensor's name in a torch model whose module PEFT has put into one of its own."""
        return f"{self.module}.base_layer.{self.name}"

    def key_among(self, adapted: Container[Part]) -> str:
        """The tensor's name in a torch model in which PEFT has adapted some weights."""
        return self.wrapped_key if self.part in adapted else self.key

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.there(np.broadcast_to(np.zeros((), bool), self.leaf.shape)).shape

    def there(self, array: np.ndarray) -> np.ndarray:
        """The tensor out of the whole array."""
        own = np.moveaxis(array, self.stack_axes, range(len(self.stack_axes)))[self.index]
        site = self.leaf.site
        if site is None:
            return own
        if self.leaf.path != site.path:
            # What lies apart from its weight has a shape of its own there.
            return own if self.part is None else own.reshape(site.out_size)
        return weight_there(own, site, weight_spec(site, site.dtype), self.inputs_first)

    def put(self, array: np.ndarray, tensor: np.ndarray) -> None:
        """Writes the tensor into the whole array."""
        own = np.moveaxis(array, self.stack_axes, range(len(self.stack_axes)))
        site = self.leaf.site
        if site is not None and self.leaf.path == site.path:
            spec = weight_spec(site, site.dtype)
            tensor = weight_back(tensor, site, spec, self.inputs_first)
        own[self.index] = tensor.reshape(own[self.index].shape)


def known_sites(adapter: Adapter) -> tuple[Site, ...]:
    """What an adapter knows of its model: its own sites, and those of the leaves it saves."""
    return (*adapter.sites.sites, *(leaf.site for leaf in adapter.saved if leaf.site))


def leaf_tensors(
    leaves: Iterable[Leaf],
    sites: Iterable[Site],
    names: ModuleNames,
    unnamed: list[str] | None = None,
) -> Iterator[LeafTensor]:
    """The tensors of a torch model that whole arrays of the params tree are.

    An array that is no weight and no bias, such as a norm between scanned layers, counts as stacked
    where torch would number it as it does the layers of a known site.

    Args:
      leaves: the arrays.
      sites: what is known of the model.
      names: the rules.
      unnamed: gets the reason why an array has no torch name; such an array is left out.

    Raises:
      ValueError: without ``unnamed``, an array has no torch name, or is not stacked as its
        neighbours are.
    """
    stacked = _stacks(sites, names)
    for leaf in leaves:
        try:
            owner = leaf.site
            own = _unowned(leaf, names, stacked) if owner is None else _owned(leaf, owner, names)
        except ValueError as error:
            if unnamed is None:
                raise
            unnamed.append(str(error))
        else:
            yield from own


def _owned(leaf: Leaf, owner: Site, names: ModuleNames) -> list[LeafTensor]:
    """The tensors of an array that is the weight or the bias of a site."""
    weight = leaf.path == owner.path
    axes = owner.stack_axes if weight else owner.bias_stack_axes
    # A bias may lie elsewhere: that of an output head beside the model, for example.
    apart = leaf.module != owner.path.rpartition(".")[0]
    tensors = []
    for index in np.ndindex(owner.full_stack_shape):
        if apart:
            module = names.to_torch(leaf.module, index) if leaf.module else ""
            name = _WEIGHTS.get(leaf.leaf_name, leaf.leaf_name)
        else:
            module = names.to_torch(owner.name, index)
            name = "weight" if weight else "bias"
        part = None if apart else (owner.name, index)
        first = names.keeps_inputs_first(module)
        tensors.append(LeafTensor(module, name, leaf, axes, index, part, first))
    return tensors


Stack = tuple[tuple[int, ...], tuple[int, ...]]  # axes, and their sizes


def _stacks(sites: Iterable[Site], names: ModuleNames) -> dict[str | None, set[Stack]]:
    """What torch puts before the number of a layer, and how the layers there are stacked."""
    stacks: dict[str | None, set[Stack]] = {}
    for site in sites:
        before = names.before_number(site.name, len(site.stack_axes))
        for depth in range(1, len(site.stack_axes) + 1) if before is not None else ():
            stack = site.stack_axes[:depth], site.full_stack_shape[:depth]
            stacks.setdefault(before, set()).add(stack)
    return stacks


def _unowned(
    leaf: Leaf, names: ModuleNames, stacked: Mapping[str | None, set[Stack]]
) -> list[LeafTensor]:
    """The tensors of an array that belongs to no site."""
    name = _WEIGHTS.get(leaf.leaf_name, leaf.leaf_name)
    for depth in range(1, len(leaf.shape) + 1):
        near = stacked.get(names.before_number(leaf.module, depth), set())
        stacks = [stack for stack in near if len(stack[0]) == depth]
        fits = [
            (axes, sizes)
            for axes, sizes in stacks
            if max(axes) < len(leaf.shape) and tuple(leaf.shape[axis] for axis in axes) == sizes
        ]
        if not stacks:
            continue
        if len(fits) != 1:
            raise ValueError(
                f"{leaf.path}: its module is stacked, but which axes of {leaf.shape} count the "
                f"layers cannot be told from the sites around it: {sorted(stacks)}"
            )
        axes, sizes = fits[0]
        return [
            LeafTensor(names.to_torch(leaf.module, index), name, leaf, axes, index, None, False)
            for index in np.ndindex(sizes)
        ]
    module = names.to_torch(leaf.module) if leaf.module else ""
    return [LeafTensor(module, name, leaf, (), (), None, False)]


def nearest(name: str, modules: Mapping[str, Module]) -> str:
    """The torch modules whose names come near one, with what they are here."""
    close: Sequence[str] = difflib.get_close_matches(name, list(modules), n=3, cutoff=0.5)
    if not close:
        ending = name.rpartition(".")[2]
        close = [other for other in modules if other.endswith(f".{ending}")][:3]
    shown = (f"{n!r} (here {modules[n].site.name!r})" for n in close or list(modules)[:3])
    return "nearest: " + ", ".join(shown)
