"""Whole arrays of the base that a file of PEFT's holds: biases, ``modules_to_save``, embeddings."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from peftjax.config import AdapterConfig
from peftjax.interop.modules import LeafTensor, Module
from peftjax.interop.stored import Stored, misfits, two_halves
from peftjax.sites import Leaf, Sites
from peftjax.targeting import bias_leaves, is_within
from peftjax.unstacking import Part


def is_saved(config: AdapterConfig, tensor: LeafTensor) -> bool:
    """Whether ``modules_to_save``, by torch's names, means a tensor."""
    return any(is_within(entry, tensor.module) for entry in config.modules_to_save or ())


def find_whole(
    tensors: Sequence[LeafTensor],
    sites: Sites,
    config: AdapterConfig,
    selected: Sites,
    saved: Iterable[LeafTensor],
    chosen: Mapping[str, Module],
    found: Mapping[str, Stored],
    params: Any,
) -> tuple[dict[Leaf, list[LeafTensor]], list[str]]:
    """The whole arrays that a file has, each with all its tensors, and what is wrong.

    Args:
      tensors: the tensors that all arrays of the params tree are.
      sites: the sites of the model.
      config: the config under our names.
      selected: the sites that are adapted.
      saved: the tensors that ``modules_to_save`` means.
      chosen: the torch modules that are adapted.
      found: the tensors of the file.
      params: the base's params, or None.
    """
    parts = {module.part for module in chosen.values()}
    bias = getattr(config, "bias", "none")
    biases = {leaf.path for leaf in bias_leaves(bias, sites, selected)}
    needed = {tensor.key for tensor in saved} | {
        tensor.key
        for tensor in tensors
        if tensor.leaf.path in biases and (bias == "all" or tensor.part in parts)
    }
    there: dict[Leaf, list[LeafTensor]] = {}
    dtypes: dict[str, set[str]] = {}
    problems = []
    for tensor in tensors:
        key = _key(tensor, found)
        if key is not None and not _is_rest(config, tensor, parts):
            there.setdefault(tensor.leaf, [])
            dtypes.setdefault(tensor.leaf.path, set()).add(found[key].dtype)
            problems += misfits(key, found[key], tensor.shape)
        elif tensor.key in needed:
            problems.append(f"{tensor.key_among(parts)}: it is missing")
    for tensor in tensors:
        if tensor.leaf in there:
            there[tensor.leaf].append(tensor)
            if _key(tensor, found) is not None or tensor.key in needed:
                continue
            if params is not None:
                dtypes[tensor.leaf.path].add(tensor.leaf.dtype.name)
            else:
                problems.append(
                    f"{tensor.key}: the file has other layers of {tensor.leaf.path} alone: pass "
                    f"params, for the rest"
                )
    return there, [*problems, *two_halves(dtypes)]


def _is_rest(config: AdapterConfig, tensor: LeafTensor, parts: Container[Part]) -> bool:
    """Whether a tensor is what a start taken out of a weight left of it, which params tell too.

    PEFT writes the weight of an adapted embedding or output head along with its adapter.
    """
    site = tensor.leaf.site
    weight = site is not None and site.path == tensor.leaf.path and tensor.part in parts
    return weight and config.method.buffers_read_weight(config)


def _key(tensor: LeafTensor, found: Mapping[str, Stored]) -> str | None:
    """The key that a tensor has in a file, if it is there."""
    return next((key for key in (tensor.wrapped_key, tensor.key) if key in found), None)


def filled(
    leaf: Leaf,
    tensors: Sequence[LeafTensor],
    found: Mapping[str, Stored],
    base: Mapping[str, Any] | None,
) -> np.ndarray:
    """A whole array out of its tensors, and out of the base where there are none."""
    read = {tensor: found[key].read() for tensor in tensors if (key := _key(tensor, found))}
    dtypes = [each.dtype for each in read.values()]
    if base is not None and len(read) < len(tensors):
        dtypes.append(base[leaf.path].dtype)
    dtype = np.result_type(*dtypes)
    array = np.empty(leaf.shape, dtype) if base is None else np.array(base[leaf.path], dtype)
    for tensor, value in read.items():
        tensor.put(array, value)
    return array
