"""PEFT's low-level API on plain values: inject an adapter, get and set its state dict."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from peftjax.adapt import adapt
from peftjax.adapter import Adapter, init_adapter
from peftjax.config import AdapterConfig
from peftjax.interop.exporting import export, usual_scale
from peftjax.interop.importing import without_prefix
from peftjax.interop.layouts import Layout, layouts
from peftjax.interop.mixture import classifier_tensors, with_classifier
from peftjax.interop.modules import known_sites, leaf_tensors
from peftjax.interop.names import ModuleNames
from peftjax.interop.stored import refuse
from peftjax.methods import AdaLoraConfig, HRAConfig, XLoraConfig
from peftjax.sites import find_sites
from peftjax.unstacking import Part, Single, refill, unstack


def inject_adapter_in_model(
    config: AdapterConfig,
    apply_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    key: PRNGKeyArray,
    **kwargs: Any,
) -> tuple[Callable[..., Any], Adapter]:
    """Finds the sites of a model, makes an adapter for them and adapts the model, all in one.

    Args:
      config: the config, such as a ``LoraConfig``.
      apply_fn: a pure function of a params tree and whatever else.
      params: the params tree, which is left as it is.
      *args: further arguments of ``apply_fn``, or ShapeDtypeStructs of their shapes.
      key: a PRNG key for the adapter's arrays.
      **kwargs: as ``args``.

    Returns:
      The adapted function of ``(params, adapter, *args, **kwargs)``, and the adapter.

    Raises:
      NoMatchingModuleError: a target is not there.
      ValueError: the config cannot be used on the model.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params, x = {"dense": {"kernel": jnp.ones((4, 3))}}, jnp.ones((2, 4))
      >>> config = peftjax.LoraConfig(r=2, target_modules=["dense"])
      >>> adapted, adapter = peftjax.inject_adapter_in_model(
      ...     config, apply_fn, params, x, key=jax.random.key(0)
      ... )
      >>> adapted(params, adapter, x).shape
      (2, 3)
    """
    sites = find_sites(apply_fn, params, *args, **kwargs)
    return adapt(apply_fn), init_adapter(key, config, sites, params)


def get_peft_model_state_dict(
    adapter: Adapter, names: ModuleNames | None = None
) -> dict[str, np.ndarray]:
    """The trainable arrays of an adapter under PEFT's keys and in PEFT's layouts, as in its files.

    Scales are no part of it: like PEFT's they follow from the config, which ``save_pretrained``
    writes beside it. Of X-LoRA it is the classifier, all of it, with scalings of single layers in
    torch's order as far as ``names`` tell it.

    Args:
      adapter: the adapter.
      names: the rules between the model's names and torch's; None if they are the same.

    Returns:
      The tensors by key, each beginning with ``base_model.model.``, in host memory.

    Raises:
      ValueError: a module has no torch name, or the adapter is an X-LoRA that trains its experts.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 4)))
      >>> config = peftjax.LoraConfig(r=2, target_modules=["dense"])
      >>> adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
      >>> state_dict = peftjax.get_peft_model_state_dict(adapter)
      >>> state_dict["base_model.model.dense.lora_A.weight"].shape
      (2, 4)
      >>> adapter = peftjax.set_peft_model_state_dict(adapter, state_dict)
    """
    if isinstance(adapter.config, XLoraConfig):
        _check_frozen(adapter.config)
        return classifier_tensors(adapter, names or ModuleNames())
    return export(adapter, names).tensors


def set_peft_model_state_dict(
    adapter: Adapter,
    state_dict: Mapping[str, Any],
    names: ModuleNames | None = None,
    *,
    strict: bool = True,
) -> Adapter:
    """An adapter with the arrays of a state dict in PEFT's keys and layouts.

    Args:
      adapter: an adapter of the same config for the same model.
      state_dict: the tensors by key, with or without ``base_model.model.`` in front: arrays of
        NumPy or JAX, or what torch's ``get_peft_model_state_dict`` returns.
      names: the rules between the model's names and torch's; None if they are the same.
      strict: raise for tensors that the state dict lacks; otherwise the adapter keeps its own.

    Returns:
      The adapter with other ``params``; dtypes and devices stay as they are.

    Raises:
      ValueError: keys that do not belong here, shapes that do not fit, and missing keys, all of
        them listed; an HRA adapter whose state dict is no longer its own arrays, or an X-LoRA that
        trains its experts.

    Example:
      See ``get_peft_model_state_dict``.
    """
    names = names or ModuleNames()
    config = adapter.config
    if isinstance(config, XLoraConfig):
        _check_frozen(config)
        classifier = {key: _in_host(value) for key, value in state_dict.items()}
        there = classifier_tensors(adapter, names)
        _check(classifier, {key: tensor.shape for key, tensor in there.items()}, strict)
        return with_classifier(adapter, names, classifier)
    if isinstance(config, HRAConfig) and (config.apply_GS or config.rank_pattern):
        raise ValueError(
            "PEFT's HRA has neither orthonormal halves nor ranks of single modules, so this "
            "adapter's state dict is not its arrays: use save_pretrained and load_pretrained"
        )
    given = {key: _in_host(value) for key, value in without_prefix(state_dict).items()}
    singles = unstack(adapter)
    slots = [
        (f"{names.to_torch(*part)}.{layout.suffix}", part, name, layout)
        for part, single in singles.items()
        for name, layout in layouts(config, single.spec).items()
        if name in single.params
    ]
    tensors = {
        tensor: tensor.key_among(singles)
        for tensor in leaf_tensors(adapter.saved, known_sites(adapter), names)
    }
    wanted = {
        key: layout.there(singles[part].params[name], singles[part].spec).shape
        for key, part, name, layout in slots
    }
    wanted |= {key: tensor.shape for tensor, key in tensors.items()}
    _check(given, wanted, strict)

    params: dict[Part, dict[str, np.ndarray]] = {}
    for key, part, name, layout in slots:
        if key in given:
            own = params.setdefault(part, {})
            own[name] = _here(config, singles[part], name, layout, given[key])
    whole = {leaf: np.array(adapter.params[leaf.module][leaf.leaf_name]) for leaf in adapter.saved}
    for tensor, key in tensors.items():
        if key in given:
            tensor.put(whole[tensor.leaf], given[key])
    return refill(adapter, params, whole)


def _in_host(value: Any) -> np.ndarray:
    """An array in host memory, out of a tensor of torch's too, which is not imported for that."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16 of its own, and float32 holds all its values.
        value = value.float() if value.is_floating_point() and value.itemsize < 4 else value
    return np.asarray(value)


def _check_frozen(config: XLoraConfig) -> None:
    """Raises a ValueError if an X-LoRA adapter trains more than its classifier."""
    if config.use_trainable_adapters:
        raise ValueError(
            "this X-LoRA adapter trains its experts too, and PEFT has no one state dict of all: "
            "take the experts apart, with xlora_experts, or use save_pretrained and load_pretrained"
        )


def _check(
    given: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], strict: bool
) -> None:
    """Raises a ValueError that lists all tensors that are not those of the adapter."""
    problems = [
        f"{key}: there is no such tensor in the adapter" for key in given if key not in wanted
    ]
    problems += [
        f"{key}: shape {given[key].shape} instead of {shape}"
        for key, shape in wanted.items()
        if key in given and given[key].shape != shape
    ]
    problems += [f"{key}: it is missing" for key in wanted if strict and key not in given]
    refuse(
        "this state dict does not fit the adapter",
        problems,
        "pass one of the same config and model, or mend names=",
    )


def _here(
    config: AdapterConfig, single: Single, name: str, layout: Layout, tensor: np.ndarray
) -> np.ndarray:
    """An array of a weight out of PEFT's tensor for it."""
    old = single.params[name]
    array = layout.back(tensor, single.spec, old.shape).astype(old.dtype)
    if isinstance(config, AdaLoraConfig) and name == "lora_E":
        scale = single.buffers["scaling"]
        array = array * (usual_scale(config, scale.dtype) / scale)
    return array
