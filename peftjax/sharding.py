"""Where an adapter lies on a mesh: along the axes of the weights it adapts."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from peftjax.adapter import Adapter
from peftjax.config import AdapterConfig
from peftjax.engine.packed import Packed
from peftjax.experts import PRESENT
from peftjax.sites import Site
from peftjax.trees import dotted_paths, is_quantised

Tree = TypeVar("Tree")
_Key = tuple[str, str]


def adapter_shardings(tree: Tree, params: Any) -> Tree:
    """Says for every array of an adapter where it lies, given where the base's weights lie.

    In-, out- and stack axes are split as those of the weight are; ranks and all axes that the
    weight has not are whole on every device, and so is whatever belongs to no weight.

    Args:
      tree: an adapter, or a tree that holds one, such as a ``TrainState``, or an adapter and the
        state of its optimizer: what an optimizer keeps for an array of the adapter under its name
        lies as the array does. Its leaves may be ``jax.ShapeDtypeStruct``s.
      params: the base's params, of arrays or ``jax.ShapeDtypeStruct``s with a NamedSharding, of
        shardings, or of PartitionSpecs; linen's ``nn.Partitioned`` boxes and NNX variables, whose
        metadata say it, are understood, logical names under ``nn.logical_axis_rules``, and so are
        quantised weights; None is on every device. Where only names of axes are given, the mesh
        is that of ``jax.set_mesh``.

    Returns:
      The tree with a NamedSharding for every leaf, as ``jax.jit`` takes it for ``out_shardings``
      and ``jax.device_put`` for ``device``.

    Raises:
      ValueError: the tree does not hold exactly one adapter; an adapted weight is not in the
        params; they lie on several meshes, or on none.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
      >>> kernel = jax.device_put(jnp.ones((4, 3)), NamedSharding(mesh, P(None, "model")))
      >>> params = {"dense": {"kernel": kernel}}
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 4)))
      >>> config = peftjax.LoraConfig(r=2, target_modules=["dense"])
      >>> make = lambda key: peftjax.init_adapter(key, config, sites)
      >>> shapes = jax.eval_shape(make, jax.random.key(0))
      >>> shardings = peftjax.adapter_shardings(shapes, params)
      >>> shardings.params["dense"]["lora_B"].spec == P(None, "model")
      True
      >>> adapter = jax.jit(make, out_shardings=shardings)(jax.random.key(0))
    """
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Adapter))
    adapters = [leaf for leaf in leaves if isinstance(leaf, Adapter)]
    if len(adapters) != 1:
        raise ValueError(f"expected a tree that holds one adapter, found {len(adapters)}")
    mesh, specs = _base(params)
    own = _own_specs(adapters[0], specs)

    def place(keys: Any, leaf: Any) -> NamedSharding:
        module, name = ["", "", *(str(getattr(key, "key", "")) for key in keys)][-2:]
        shape, spec = own.get((module, name), ((), PartitionSpec()))
        return NamedSharding(mesh, spec if shape == tuple(leaf.shape) else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def _own_specs(
    adapter: Adapter, specs: dict[str, PartitionSpec]
) -> dict[_Key, tuple[tuple[int, ...], PartitionSpec]]:
    """The shape and the spec of each array that belongs to a weight, by module and name."""
    own = {}
    for site in adapter.sites.values():
        spec = _spec_of(site.path, len(site.shape), specs)
        # Experts lie along an axis before all others.
        ahead = int(PRESENT in adapter.buffers.get(site.name, {}))
        for part in (adapter.params, adapter.buffers):
            for name, array in part.get(site.name, {}).items():
                shape = tuple(array.shape)
                placed = _spec(adapter.config, site, name, shape[ahead:], spec)
                placed = PartitionSpec(*[None] * ahead, *placed) if placed else placed
                own[site.name, name] = shape, placed
    for leaf in adapter.saved:
        spec = _spec_of(leaf.path, len(leaf.shape), specs)
        own[leaf.module, leaf.leaf_name] = leaf.shape, PartitionSpec(*spec)
    return own


def _spec_of(path: str, ndim: int, specs: dict[str, PartitionSpec]) -> tuple[Any, ...]:
    """The axes of the mesh along each axis of a leaf."""
    if path not in specs:
        raise ValueError(
            f"{path}: the adapter adapts it, and it is not among these params: pass those that the "
            f"adapter was made for"
        )
    return (*specs[path], *[None] * (ndim - len(specs[path])))


def _spec(
    config: AdapterConfig, site: Site, name: str, shape: tuple[int, ...], base: tuple[Any, ...]
) -> PartitionSpec:
    """How one array of a site is split, given how its weight is."""
    experts = getattr(config, "experts", ())
    words = (experts[0] if experts else config).method.axes.get(name, ())
    if not words:
        return PartitionSpec()
    axes = [*_stack(site, base), *_behind(words, site, base)]
    if len(axes) != len(shape):
        # Beside a core of their own, the factors of a kernel have no taps.
        channels = tuple(axis for axis in site.in_axes if axis not in site.tap_axes)
        axes = [*_stack(site, base), *_behind(words, replace(site, in_axes=channels), base)]
    sizes = zip(axes, shape, strict=True)
    return PartitionSpec(*[split if n == size else None for (n, split), size in sizes])


def _stack(site: Site, base: tuple[Any, ...]) -> Iterator[tuple[int, Any]]:
    """Size and split of each axis of the stack; some of the layers alone may not be divisible."""
    for i, (size, axis) in enumerate(zip(site.stack_shape, site.stack_axes, strict=True)):
        yield size, None if i == 0 and site.layers is not None else base[axis]


def _behind(words: tuple[str, ...], site: Site, base: tuple[Any, ...]) -> Iterator[tuple[int, Any]]:
    """Size and split of each axis behind the stack; 0 for one that the weight has not."""
    for word in words:
        match word:
            case "in" | "out":
                own = site.in_axes if word == "in" else site.out_axes
                yield from ((site.shape[axis], base[axis]) for axis in own)
            case "rank":
                yield 0, None
            case "taps":
                yield from [(0, None)] * len(site.tap_axes)


def _base(params: Any) -> tuple[Mesh, dict[str, PartitionSpec]]:
    """The mesh that params lie on, and how each of them is split, by path."""
    meshes: dict[Any, str] = {}
    specs: dict[str, PartitionSpec] = {}
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=_says_where)[0]
    for path, (_, leaf) in zip(dotted_paths(flat), flat, strict=True):
        where = _where(leaf)
        if isinstance(where, NamedSharding):
            # Under Explicit axes, shapes that were only traced know no devices.
            if isinstance(where.mesh, Mesh):
                meshes.setdefault(where.mesh, path)
            where = where.spec
        specs[path] = where if isinstance(where, PartitionSpec) else PartitionSpec()
    if len(meshes) > 1:
        (one, first), (other, second) = list(meshes.items())[:2]
        raise ValueError(
            f"the params lie on several meshes, {first} on {one} and {second} on {other}: put them "
            f"on one"
        )
    mesh = next(iter(meshes), None) or jax.sharding.get_mesh()
    if mesh.empty:
        raise ValueError(
            "these params lie on no mesh: pass arrays or ShapeDtypeStructs that have a "
            "NamedSharding, or name axes under jax.set_mesh(mesh)"
        )
    return mesh, specs


def _says_where(leaf: Any) -> bool:
    """Whether a node of a params tree says where its array lies; None says nowhere special."""
    said = isinstance(leaf, PartitionSpec | Sharding | nn.Partitioned | nnx.Variable)
    return said or leaf is None or is_quantised(leaf)


def _where(leaf: Any) -> NamedSharding | PartitionSpec | None:
    """The sharding of a leaf, or its spec alone; None if it has neither."""
    value = leaf
    if is_quantised(leaf):
        # The integers are laid out like the weight.
        value = leaf.codes if isinstance(leaf, Packed) else leaf.qvalue
    elif isinstance(leaf, nn.Partitioned):
        value = leaf.value
    elif isinstance(leaf, nnx.Variable):
        value = leaf.get_value()
    for where in (value, getattr(value, "sharding", None)):
        if isinstance(where, PartitionSpec | NamedSharding):
            return where
    if isinstance(leaf, nn.LogicallyPartitioned):
        return nn.logical_to_mesh_axes(leaf.names, leaf.rules)
    if isinstance(leaf, nn.Partitioned):
        return leaf.get_partition_spec()
    if isinstance(leaf, nnx.Variable):
        return nnx.get_partition_spec(leaf).get_value()
    return None
