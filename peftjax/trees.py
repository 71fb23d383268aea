"""Paths of the arrays in a tree, and the split of arguments into arrays and everything else."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from peftjax.engine.packed import Packed


def leaf_paths(tree: Any) -> dict[str, Any]:
    """Every array of a tree by its dotted path, in the order in which JAX flattens it.

    Boxes around an array (``flax.linen.Partitioned``) leave no trace in its path. A quantised
    weight (``qwix.QArray``) is one array, ``Packed``.

    Raises:
      ValueError: two arrays have the same dotted path.
    """
    paths: dict[str, Any] = {}
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantised)[0]
    for path, (_, leaf) in zip(dotted_paths(flat), flat, strict=True):
        leaf = as_packed(leaf)
        if not is_array(leaf):
            continue
        if path in paths:
            raise ValueError(
                f"two arrays of the params have the path {path!r}: rename a key that holds a dot "
                f"or a slash"
            )
        paths[path] = leaf
    return paths


def dotted_paths(flat: Sequence[tuple[tuple[Any, ...], Any]]) -> list[str]:
    """The dotted path of every leaf of a tree; slashes, as in Haiku's names, count as dots.

    Args:
      flat: the key paths and leaves, as JAX flattens the tree.
    """
    named = [tuple(map(_name, keys)) for keys, _ in flat]
    within = Counter(names[:depth] for names in named for depth in range(len(names)))
    paths = []
    for (keys, _), names in zip(flat, named, strict=True):
        # A box around an array has nothing beside it; the value of an attention has a query.
        boxed = len(keys) > 1 and keys[-1] == GetAttrKey("value") and within[names[:-1]] == 1
        paths.append(".".join(names[:-1] if boxed else names).replace("/", "."))
    return paths


def _name(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case GetAttrKey(name=name):
            return name
    return str(key)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced: arrays, quantised ones, keys, NumPy scalars, ShapeDtypeStructs."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | Packed)


def leaves_of(tree: Any) -> list[Any]:
    """The leaves of a tree, each quantised weight as one."""
    return [as_packed(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_quantised)]


def leaf_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree; of four bits, two share a byte."""
    return sum(_bits(x.dtype) * x.size for x in jax.tree.leaves(tree) if is_array(x)) // 8


def _bits(dtype: Any) -> int:
    try:
        return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize
    except ValueError:
        return 8 * dtype.itemsize


def is_quantised(node: Any) -> bool:
    """Whether a node of a tree is a quantised weight."""
    # Without qwix imported there is none of its arrays.
    qwix = sys.modules.get("qwix")
    return isinstance(node, Packed) or (qwix is not None and isinstance(node, qwix.QArray))


def as_packed(leaf: Any) -> Any:
    """A quantised weight as the engine knows it; any other leaf as it is."""
    if not is_quantised(leaf) or isinstance(leaf, Packed):
        return leaf
    # Of all that qwix knows, this alone keeps no plain numbers.
    levels = "nf4" if isinstance(leaf.qtype, str) and leaf.qtype == "nf4" else ""
    return Packed(leaf.qvalue, leaf.scale, leaf.zero_point, levels, np.dtype(leaf.scale.dtype))


@dataclasses.dataclass(frozen=True)
class Static:
    """A tree without its arrays: its structure and the leaves that are part of the program.

    Attributes:
      structure: structure of the tree.
      leaves: for each leaf, its type and value; None where an array belongs. The type keeps 1,
        1.0 and True apart.
    """

    structure: Any
    leaves: tuple[tuple[type, Any] | None, ...]

    def fill(self, arrays: list[Any]) -> Any:
        """The tree with these arrays in their places."""
        rest = iter(arrays)
        leaves = [next(rest) if leaf is None else leaf[1] for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)


def split(tree: Any) -> tuple[list[Any], Static]:
    """The arrays of a tree, and the tree without them.

    Raises:
      TypeError: a leaf is neither an array nor hashable.
    """
    nodes, structure = jax.tree.flatten(tree, is_leaf=is_quantised)
    leaves = [as_packed(node) for node in nodes]
    static: list[tuple[type, Any] | None] = []
    for leaf in leaves:
        if not is_array(leaf):
            try:
                hash(leaf)
            except TypeError:
                raise TypeError(
                    f"an argument holds a {type(leaf).__name__}, which is neither an array nor "
                    f"hashable: pass an array, or a hashable value to be part of the program"
                ) from None
        static.append(None if is_array(leaf) else (type(leaf), leaf))
    return [leaf for leaf in leaves if is_array(leaf)], Static(structure, tuple(static))
