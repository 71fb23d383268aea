"""An adapter as torch PEFT keeps it: its tensors and its config."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from peftjax.adapter import Adapter
from peftjax.interop.configs import config_to
from peftjax.interop.layouts import layouts
from peftjax.interop.limits import unknown_layout, unsupported
from peftjax.interop.modules import known_sites, leaf_tensors
from peftjax.interop.names import ModuleNames
from peftjax.methods import AdaLoraConfig, HRAConfig
from peftjax.methods.hra import reflections
from peftjax.unstacking import Part, Single, unstack

PREFIX = "base_model.model."  # what PEFT puts before the names of the model it wraps


class Export(NamedTuple):
    """An adapter in torch PEFT's terms.

    Attributes:
      config: the contents of its ``adapter_config.json``.
      tensors: its tensors by key, in PEFT's layouts.
      foreign: why PEFT cannot run some of its modules, by torch's names.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    foreign: dict[str, str]


def export(
    adapter: Adapter, names: ModuleNames | None, base_model_name_or_path: str | None = None
) -> Export:
    """An adapter in torch PEFT's terms."""
    names = names or ModuleNames()
    singles = _as_in_torch(adapter)
    tensors: dict[str, np.ndarray] = {}
    foreign: dict[str, str] = {}
    for part, single in singles.items():
        module = names.to_torch(*part)
        first = names.keeps_inputs_first(module)
        if reason := unsupported(adapter.config, single.site, single.spec, first):
            foreign[module] = reason
        laid = layouts(adapter.config, single.spec)
        for name, array in single.params.items():
            if name not in laid:
                raise ValueError(
                    f"{part[0]}: a file of {type(adapter.config).__name__} has no place for its "
                    f"{name!r} of shape {array.shape}: leave that out of the adapter"
                )
            key = f"{PREFIX}{module}.{laid[name].suffix}"
            if key in tensors:
                raise ValueError(f"two sites have the torch name {module!r}: change names=")
            tensors[key] = np.ascontiguousarray(laid[name].there(array, single.spec))
    for tensor in leaf_tensors(adapter.saved, known_sites(adapter), names):
        leaf = tensor.leaf
        if reason := unknown_layout(leaf):
            foreign[tensor.module] = reason
        whole = np.asarray(adapter.params[leaf.module][leaf.leaf_name])
        key = tensor.key_among(singles)
        if PREFIX + key in tensors:
            raise ValueError(f"two arrays have the torch name {key!r}: change names=")
        tensors[PREFIX + key] = np.array(tensor.there(whole), order="C")
    config = config_to(adapter, singles, names, base_model_name_or_path)
    return Export(config, tensors, foreign)


def _as_in_torch(adapter: Adapter) -> dict[Part, Single]:
    """The weights of an adapter, with arrays that do the same in torch PEFT."""
    singles = unstack(adapter)
    config = adapter.config
    if isinstance(config, HRAConfig):
        return _one_chain(config, singles)
    if isinstance(config, AdaLoraConfig):
        return {part: _one_scale(config, single) for part, single in singles.items()}
    return singles


def _one_chain(config: HRAConfig, singles: Mapping[Part, Single]) -> dict[Part, Single]:
    """Plain chains of one length, which is all that PEFT has.

    A pair of equal reflections is none, so the shorter chains are continued with such pairs; and so
    are padded ones, whose columns of zeros reflect nothing here and give PEFT NaN.
    """
    longest = max(single.params["hra_u"].shape[-1] for single in singles.values())
    chains = {}
    for part, single in singles.items():
        u = single.params["hra_u"]
        if config.apply_GS:
            u = np.asarray(reflections(config, {"hra_u": jnp.asarray(u)}, {})).astype(u.dtype)
        u = u[..., (u != 0).any(axis=tuple(range(u.ndim - 1)))]
        short = longest - u.shape[-1]
        if short % 2:
            raise ValueError(
                f"{part[0]}: PEFT's HRA has one number of reflections for all modules, and "
                f"{u.shape[-1]} cannot become {longest}, which pairs that cancel do not lead to: "
                f"let all ranks, those that are padded too, be even, or all odd"
            )
        pairs = np.zeros((*u.shape[:-1], short), u.dtype)
        pairs[(0,) * (u.ndim - 1)] = 1
        params = {"hra_u": np.concatenate([u, pairs], axis=-1)}
        chains[part] = dataclasses.replace(single, params=params)
    return chains


def _one_scale(config: AdaLoraConfig, single: Single) -> Single:
    """PEFT's scale is the same for all modules: what is different goes into the triplets."""
    scale = single.buffers["scaling"]
    usual = usual_scale(config, scale.dtype)
    if scale == usual:
        return single
    values = (single.params["lora_E"] * (scale / usual)).astype(scale.dtype)
    return dataclasses.replace(single, params={**single.params, "lora_E": values})


def usual_scale(config: AdaLoraConfig, dtype: np.dtype) -> np.ndarray:
    """The scale that PEFT gives to all modules of an AdaLoRA adapter."""
    alpha = config.lora_alpha if config.lora_alpha > 0 else config.init_r
    return np.asarray(alpha / (config.init_r + 1e-5), dtype)
