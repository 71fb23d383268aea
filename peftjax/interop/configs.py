"""``adapter_config.json``: a config under torch's names, as PEFT writes and reads it."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from peftjax.adapter import Adapter
from peftjax.config import AdapterConfig, thaw
from peftjax.interop.modules import (
    LeafTensor,
    Module,
    known_sites,
    leaf_tensors,
    torch_modules,
)
from peftjax.interop.names import ModuleNames
from peftjax.methods import AdaLoraConfig, HRAConfig, IA3Config, LoHaConfig, LoraConfig
from peftjax.methods.adalora import pattern_key
from peftjax.sites import Site, Sites
from peftjax.targeting import (
    exact_key,
    exact_names,
    is_within,
    layer_names,
    pattern_value,
    saved_leaves,
)
from peftjax.unstacking import Part, Single

PEFT_VERSION = "0.21.2"  # whose files these are


def config_to(
    adapter: Adapter,
    singles: Mapping[Part, Single],
    names: ModuleNames,
    base_model_name_or_path: str | None,
) -> dict[str, Any]:
    """The contents of an ``adapter_config.json`` for an adapter, JSON-ready.

    Modules are named in full, so that PEFT adapts exactly those that the adapter does.

    Args:
      adapter: the adapter.
      singles: its weights, as torch PEFT has them.
      names: the rules between the names.
      base_model_name_or_path: the base model, where the config does not name it.
    """
    config = adapter.config
    torch = {part: names.to_torch(*part) for part in singles}
    fields = config.to_dict() | {n: thaw(v) for n, v in config.unsupported_fields.items()}
    fields |= {
        "peft_version": PEFT_VERSION,
        "auto_mapping": None,
        "inference_mode": True,
        "base_model_name_or_path": base_model_name_or_path or config.base_model_name_or_path,
        "target_modules": _meaning(list(torch.values()), ".", _others(adapter, names)),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": _modules_to_save(adapter, names) or None,
    }
    fields |= _WRITERS[type(config)](config, singles, torch)
    if "fan_in_fan_out" in fields:
        fields["fan_in_fan_out"] = all(map(names.keeps_inputs_first, torch.values()))
    if isinstance(config, IA3Config):
        del fields["layers_to_transform"], fields["layers_pattern"]
    if isinstance(config, HRAConfig):
        del fields["rank_pattern"]
    return fields


def _rank(single: Single, name: str) -> int:
    return single.params[name].shape[-1]


def _write_low_rank(
    config: LoraConfig | LoHaConfig, singles: Mapping[Part, Single], torch: Mapping[Part, str]
) -> dict[str, Any]:
    """Ranks and alphas of single modules, so that the scales are those of the arrays."""
    array, own = (
        ("lora_A", "lora_alpha") if isinstance(config, LoraConfig) else ("hada_w1_b", "alpha")
    )
    default = getattr(config, own)
    ranks, alphas = {}, {}
    for part, single in singles.items():
        rank, key = _rank(single, array), exact_key(torch[part])
        layer = part[1][0] if part[1] else None
        alpha = pattern_value(config.alpha_pattern, single.site, default, layer)
        root = isinstance(config, LoraConfig) and config.use_rslora
        divisor = math.sqrt(rank) if root else rank
        scale = single.buffers["scaling"]
        if np.asarray(alpha / divisor, scale.dtype) != scale:
            _check_scale(config, torch[part], scale)
            alpha = float(scale) * divisor
        if rank != config.r:
            ranks[key] = rank
        if alpha != default:
            alphas[key] = alpha
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def _write_lora(
    config: LoraConfig, singles: Mapping[Part, Single], torch: Mapping[Part, str]
) -> dict[str, Any]:
    """Ranks and alphas, and a start that PEFT knows, which what is trained no longer tells."""
    fields = _write_low_rank(config, singles, torch)
    convolved = any(single.spec.kind == "conv" for single in singles.values())
    if convolved and config.init_lora_weights == "orthogonal":
        fields["init_lora_weights"] = True
    return fields


def _check_scale(config: LoraConfig | LoHaConfig, module: str, scale: np.ndarray) -> None:
    """Raises a ValueError if no alpha can stand for a scale that was changed."""
    if not np.isfinite(scale):
        raise ValueError(f"{module}: a scale of {scale} cannot be written")
    if isinstance(config, LoraConfig) and str(config.init_lora_weights).startswith("pissa"):
        raise ValueError(
            f"{module}: its scale was changed, and what PiSSA took out of the weight at first "
            f"follows from the scale: write what convert_to_lora makes of the adapter"
        )


def _write_adalora(
    config: AdaLoraConfig, singles: Mapping[Part, Single], torch: Mapping[Part, str]
) -> dict[str, Any]:
    """Which triplets of each module are left; and a number of steps, which PEFT insists on."""
    patterns: dict[str, list[bool]] | None = None
    if config.rank_pattern:
        patterns = {}
        for part, single in singles.items():
            kept = _kept(config, single.site, part[1])
            patterns[f"{torch[part]}.lora_E"] = kept.tolist()
    steps = config.total_step or config.tinit + config.tfinal + 1
    return {"rank_pattern": patterns, "total_step": steps}


def _kept(config: AdaLoraConfig, site: Site, index: tuple[int, ...]) -> np.ndarray:
    """Which of the first triplets one weight of a site still has."""
    own = config.rank_pattern.get(pattern_key(site))
    if own is None:
        return np.ones(config.init_r, bool)
    position = index
    if index and site.layers is not None:
        position = (site.layers.index(index[0]), *index[1:])
    return np.array(own, bool)[position]


def _write_hra(
    config: HRAConfig, singles: Mapping[Part, Single], torch: Mapping[Part, str]
) -> dict[str, Any]:
    """All modules have one number of reflections, which are made orthonormal already."""
    return {"r": _rank(next(iter(singles.values())), "hra_u"), "apply_GS": False}


def _write_ia3(
    config: IA3Config, singles: Mapping[Part, Single], torch: Mapping[Part, str]
) -> dict[str, Any]:
    inner = [
        torch[part]
        for part, single in singles.items()
        if max(single.params["ia3_l"].shape[: len(single.spec.in_shape)]) > 1
    ]
    return {"feedforward_modules": _meaning(inner, "", set(torch.values()).difference(inner))}


def _meaning(names: list[str], before: str, others: Iterable[str]) -> str | list[str]:
    """Names that mean no other module: as a regular expression if another ends with one.

    Args:
      names: the names in full.
      before: what has to stand before an end of a name for PEFT to take it for one of these.
      others: the names of other modules.
    """
    ends = tuple(before + name for name in names)
    ambiguous = any(other.endswith(ends) for other in others)
    return "|".join(map(re.escape, names)) if ambiguous else names


def _others(adapter: Adapter, names: ModuleNames) -> list[str]:
    """Torch's names of the modules that an adapter does not adapt, as far as they have some."""
    return list(torch_modules(Sites(adapter.sites.others), names, []))


_WRITERS: dict[type, Callable[[Any, Mapping[Part, Single], Mapping[Part, str]], dict[str, Any]]] = {
    LoraConfig: _write_lora,
    LoHaConfig: _write_low_rank,
    AdaLoraConfig: _write_adalora,
    HRAConfig: _write_hra,
    IA3Config: _write_ia3,
}


def _modules_to_save(adapter: Adapter, names: ModuleNames) -> list[str]:
    """Torch's names of the modules to save, one for a whole module where torch has that too."""
    known = known_sites(adapter)
    whole = saved_leaves(adapter.config, Sites(known, adapter.saved))
    tensors = leaf_tensors(whole, known, names)
    return list(dict.fromkeys(_container_there(adapter.config, t, names) for t in tensors))


def _container_there(config: AdapterConfig, tensor: LeafTensor, names: ModuleNames) -> str:
    """Torch's name of the module that an entry of ``modules_to_save`` names here.

    Where torch has a module of that name around the tensor's own; otherwise that of its own.
    """
    here, there = tensor.leaf.module, tensor.module
    entries = (e for e in config.modules_to_save or () if is_within(e, here))
    container = next((_container(entry, here) for entry in entries), here)
    named = there if names.rule(container, 0) is None else names.to_torch(container)
    return named if f"{there}.".startswith(f"{named}.") else there


def _container(entry: str, module: str) -> str:
    """The path of the module that an entry names, down from which a module lies."""
    return module[: f".{module}.".index(f".{entry}.") + len(entry)]


def config_here(
    config: AdapterConfig, chosen: Collection[Module], saved: Iterable[LeafTensor]
) -> AdapterConfig:
    """A config under our names, from one under torch's.

    Args:
      config: the config as a file says it.
      chosen: the torch modules that are adapted.
      saved: the tensors that ``modules_to_save`` means.
    """
    stacks: dict[str, list[Module]] = {}
    for module in chosen:
        stacks.setdefault(module.site.name, []).append(module)
    targets = [name for members in stacks.values() for name in _named(members)]
    modules = dict.fromkeys(_container_here(config, tensor) for tensor in saved)
    changes: dict[str, Any] = {
        "target_modules": targets,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(modules) or None,
    }
    reader = _READERS.get(type(config))
    return dataclasses.replace(config, **changes, **(reader(config, stacks) if reader else {}))


def _container_here(config: AdapterConfig, tensor: LeafTensor) -> str:
    """Our name of the module that an entry of ``modules_to_save`` names in torch.

    Where what lies in it goes by the same names here; otherwise that of the tensor's own module.
    """
    leaf, site = tensor.leaf, tensor.leaf.site
    here = site.name if site is not None and site.path == leaf.path else leaf.module
    entry = next(e for e in config.modules_to_save or () if is_within(e, tensor.module))
    inside = tensor.module.removeprefix(_container(entry, tensor.module))
    return here.removesuffix(inside)


Stacks = Mapping[str, list[Module]]


def _named(members: list[Module]) -> tuple[str, ...]:
    """The name of a site, or those of some of its layers."""
    site = members[0].site
    layers = sorted({member.index[0] for member in members if member.index})
    whole = not layers or len(layers) == site.full_stack_shape[0]
    return exact_names([site if whole else dataclasses.replace(site, layers=tuple(layers))])


def _read_low_rank(config: Any, stacks: Stacks) -> dict[str, Any]:
    alpha = "lora_alpha" if isinstance(config, LoraConfig) else "alpha"
    return {
        field: _by_module(config, field, default, stacks)
        for field, default in (("rank_pattern", "r"), ("alpha_pattern", alpha))
    }


def _by_module(config: Any, field: str, usual: str, stacks: Stacks) -> dict[str, Any]:
    """A pattern of torch's names as one of ours, with one key for each module that has a value."""
    pattern, default = getattr(config, field), getattr(config, usual)
    own = {}
    for name, members in stacks.items():
        values = {m.index: pattern_value(pattern, under_torch_name(m), default) for m in members}
        layers = {m.index[:1]: values[m.index] for m in members}
        # Scales are told apart all the same, but where a start depends on them.
        is_free = usual != "r" and not config.method.buffers_read_weight(config)
        if not is_free and any(values[index] != layers[index[:1]] for index in values):
            raise ValueError(
                f"`{field}` gives the modules of one layer that are stacked in {name!r} different "
                f"values, and here they share one"
            )
        if len(set(values.values())) == 1:
            values = {(): next(iter(values.values()))}
        for index, value in values.items():
            if value != default:
                site = members[0].site
                own[exact_key(layer_names(site, index[0])[0] if index else name)] = value
    return own


def under_torch_name(module: Module) -> Site:
    """A site as a model has it whose layers are modules of their own, by torch's name."""
    return dataclasses.replace(module.site, name=module.name, stack_axes=(), layers=None)


def _read_adalora(config: AdaLoraConfig, stacks: Stacks) -> dict[str, Any]:
    if not config.rank_pattern:
        return {}
    pattern: dict[str, Any] = {}
    for name, members in stacks.items():
        own = {m.index: config.rank_pattern.get(f"{m.name}.lora_E") for m in members}
        for member in members:
            kept = own[member.index]
            if kept is not None and (
                len(kept) != config.init_r or not all(isinstance(each, bool) for each in kept)
            ):
                raise ValueError(
                    f"`rank_pattern` of {member.name!r} has to be a list of {config.init_r} "
                    f"booleans, one for each of the `init_r` triplets"
                )
        stack = tuple(len({index[axis] for index in own}) for axis in range(len(members[0].index)))
        if not any(own.values()) or len(own) != math.prod(stack):
            continue
        # Only now that a list has this length: a mistaken one may be of any.
        every = (True,) * config.init_r
        rows = np.array([own[index] or every for index in sorted(own)], bool)
        pattern[f"{name}.lora_E"] = rows.reshape(*stack, config.init_r).tolist()
    return {"rank_pattern": pattern}


def _read_ia3(config: IA3Config, stacks: Stacks) -> dict[str, Any]:
    inner = config.feedforward_modules
    if inner is None:
        raise ValueError("`feedforward_modules` is missing: PEFT writes it in every file of IA3")
    feedforward: list[str] = []
    for name, members in stacks.items():
        # PEFT's own rule, which does not ask where in a name a match begins.
        flags = {
            bool(re.fullmatch(inner, member.name))
            if isinstance(inner, str)
            else member.name.endswith(tuple(inner))
            for member in members
        }
        if len(flags) > 1:
            raise ValueError(
                f"`feedforward_modules` names some of the layers that are stacked in {name!r}, "
                f"whose scales would differ in shape"
            )
        feedforward += _named(members) if flags == {True} else ()
    others = (each for members in stacks.values() for each in _named(members))
    return {"feedforward_modules": _meaning(feedforward, "", set(others).difference(feedforward))}


_READERS: dict[type, Callable[[Any, Stacks], dict[str, Any]]] = {
    LoraConfig: _read_low_rank,
    LoHaConfig: _read_low_rank,
    AdaLoraConfig: _read_adalora,
    IA3Config: _read_ia3,
}
