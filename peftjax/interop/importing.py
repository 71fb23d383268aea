"""Torch PEFT's tensors and config as an adapter, or one error that lists all that is wrong."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from peftjax.adapter import Adapter, check_leaves
from peftjax.config import AdapterConfig
from peftjax.factors import Weight, WeightSpec
from peftjax.interop.configs import config_here, under_torch_name
from peftjax.interop.exporting import PREFIX
from peftjax.interop.layouts import Layout, layouts
from peftjax.interop.limits import unknown_layout, unsupported
from peftjax.interop.modules import LeafTensor, Module, leaf_tensors, nearest, torch_modules
from peftjax.interop.names import ModuleNames
from peftjax.interop.stored import Stored, misfits, refuse, two_halves
from peftjax.interop.whole import filled, find_whole, is_saved
from peftjax.methods import HRAConfig, IA3Config, LoHaConfig, LoraConfig
from peftjax.sites import Leaf, Site, Sites
from peftjax.targeting import targeted
from peftjax.trees import leaf_paths
from peftjax.unstacking import Part, restack

V = TypeVar("V")

_COPIES = re.compile(r"(?<=\.)(?:original_module|modules_to_save)\.")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor belongs in an adapter: which array of which weight."""

    module: Module
    name: str
    layout: Layout


def read_adapter(
    config: AdapterConfig,
    stored: Mapping[str, Stored],
    sites: Sites,
    params: Any,
    names: ModuleNames | None,
    foreign: bool = False,
) -> Adapter:
    """The adapter that a config and tensors of torch PEFT's are.

    Args:
      config: the config, under torch's names.
      stored: the tensors by key.
      sites: what ``find_sites`` found.
      params: the base's params, or None.
      names: the rules between the names.
      foreign: whether the file says that torch PEFT cannot run it, so that peftjax wrote it.

    Raises:
      ValueError: something does not fit; all of it is listed.
    """
    model = _Model(config, sites, names or ModuleNames())
    found = without_prefix(stored)
    config = _as_loaded(config, params)
    slots = {key: model.slots[key] for key in found if key in model.slots}
    adapted = {slot.module.name for slot in slots.values()}
    chosen = {name: m for name, m in model.modules.items() if name in adapted}
    problems = [*_unknown(model, found), *_left_out(model, config, chosen)]
    if not foreign:
        problems += [
            f"{m.name}: it {reason}"
            for m in chosen.values()
            if (reason := unsupported(config, m.site, m.spec, m.inputs_first))
        ]

    here, selected = config, Sites(())
    shapes: dict[str, tuple[int, ...]] = {}
    tensors: dict[Leaf, list[LeafTensor]] = {}
    if chosen:
        saved = [t for t in model.tensors if is_saved(config, t)]
        here = config_here(config, chosen.values(), saved)
        selected = sites.only(_selected(chosen.values()))
        shapes, wrong = _expected(config, here, selected, chosen, found)
        problems += wrong
        tensors, wrong = find_whole(
            model.tensors, sites, here, selected, saved, chosen, found, params
        )
        problems += wrong
        if not foreign:
            problems += [
                f"{own[0].module}: it {reason}"
                for leaf, own in tensors.items()
                if (reason := unknown_layout(leaf))
            ]
    what = f"this {type(config).__name__.removesuffix('Config')} adapter does not fit the model"
    refuse(what, problems, "load it for the model it was made for, or mend names=")

    base = None if params is None else leaf_paths(params)
    if base is not None:
        check_leaves(base, selected, tuple(tensors))
    arrays: dict[Part, dict[str, np.ndarray]] = {}
    for key, slot in slots.items():
        shape = shapes[key]
        tensor = slot.layout.back(found[key].read(), slot.module.spec, shape)
        if isinstance(config, HRAConfig) and config.apply_GS:
            tensor = _orthonormal(slot.module.name, tensor)
        arrays.setdefault(slot.module.part, {})[slot.name] = tensor
    whole = {leaf: filled(leaf, own, found, base) for leaf, own in tensors.items()}
    scaling = _scales(config, here, selected, chosen.values())
    return restack(here, selected, arrays, scaling=scaling, saved=whole, leaves=base)


class _Model:
    """What a model can be given: by torch's keys, the slots of its modules and whole arrays.

    Attributes:
      modules: the torch modules of its sites.
      unnamed: why some sites have no torch name.
      slots: for every tensor that the method may have, where it belongs.
      tensors: the tensors that whole arrays are.
      by_key: these by key, as in a plain model and in one that PEFT has wrapped.
    """

    def __init__(self, config: AdapterConfig, sites: Sites, names: ModuleNames) -> None:
        self.sites = sites
        self.unnamed: list[str] = []
        self.modules = torch_modules(sites, names, self.unnamed)
        self.slots = {
            f"{module.name}.{layout.suffix}": Slot(module, name, layout)
            for module in self.modules.values()
            for name, layout in layouts(config, module.spec).items()
        }
        self.tensors = list(leaf_tensors(sites.leaves, sites.sites, names, self.unnamed))
        self.by_key = {tensor.key: tensor for tensor in self.tensors}
        self.by_key |= {tensor.wrapped_key: tensor for tensor in self.tensors}


def without_prefix(stored: Mapping[str, V]) -> dict[str, V]:
    """The tensors by the names that they have inside the model."""
    found = {key.removeprefix(PREFIX): tensor for key, tensor in stored.items()}
    if len(found) < len(stored):
        twice = next(
            key for key in stored if key.startswith(PREFIX) and key[len(PREFIX) :] in stored
        )
        raise ValueError(f"the tensor {twice!r} is there twice, with and without {PREFIX!r}")
    return {key: tensor for key, tensor in found.items() if _own(key) not in found}


def _own(key: str) -> str | None:
    """The key that counts, for one that PEFT writes beside it; None for others.

    With ``bias="all"`` it writes the biases of ``modules_to_save`` three times: as they count, as
    the copy that is trained and as the original, which is not used.
    """
    parts = _COPIES.split(key)
    return "".join(parts) if len(parts) > 1 else None


def _as_loaded(config: AdapterConfig, params: Any) -> AdapterConfig:
    """The config with a start that can be found again: files hold no initial factors."""
    if not config.method.buffers_read_weight(config):
        return config
    assert isinstance(config, LoraConfig)
    if params is None:
        raise ValueError(
            f"the adapter started with `init_lora_weights` = {config.init_lora_weights!r}, out of "
            f"the weights themselves, and its file holds only what became of that: pass params"
        )
    # Which directions a randomised SVD found is not written either; the exact one is its limit.
    if str(config.init_lora_weights).startswith("pissa"):
        return dataclasses.replace(config, init_lora_weights="pissa")
    return config


def _unknown(model: _Model, found: Mapping[str, Stored]) -> list[str]:
    """Tensors that belong to nothing in the model, by module."""
    suffixes = {slot.layout.suffix for slot in model.slots.values()} | {"weight", "bias"}
    problems = []
    for key in found:
        if key in model.slots or key in model.by_key:
            continue
        ends = sorted((s for s in suffixes if key.endswith(f".{s}")), key=len)
        module = key.removesuffix(f".{ends[-1]}") if ends else key
        module = module.removesuffix(".base_layer")
        if module in model.modules:
            problems.append(f"{key}: no tensor of this method for such a module")
        elif model.modules:
            problems.append(f"{module}: there is no such module; {nearest(module, model.modules)}")
        else:
            problems.append(f"{module}: there is no such module")
    return [*problems, *model.unnamed] if problems else []


def _left_out(model: _Model, config: AdapterConfig, chosen: Mapping[str, Module]) -> list[str]:
    """Modules that the config adapts and the file has nothing of."""
    view = Sites(tuple(under_torch_name(module) for module in model.modules.values()))
    meant = {site.name for site in targeted(config, view)}
    if not chosen and not meant:
        return ["no tensor is one of this method for a module of the model"]
    # Modules beside each other in a stack of two axes, the experts of a layer, go together.
    layers = {(m.site.name, m.index[:1]) for m in chosen.values()}
    return [
        f"{name}: "
        + ("`target_modules` names it" if name in meant else "others of its layer are adapted")
        + ", but no tensor is there for it"
        for name, m in model.modules.items()
        if name not in chosen and (name in meant or (m.site.name, m.index[:1]) in layers)
    ]


def _selected(chosen: Iterable[Module]) -> tuple[Site, ...]:
    """The sites that are adapted, with the layers that are."""
    layers: dict[str, set[int]] = {}
    sites: dict[str, Site] = {}
    for module in chosen:
        sites[module.site.name] = module.site
        layers.setdefault(module.site.name, set()).update(module.index[:1])
    selected = []
    for name, site in sites.items():
        own = tuple(sorted(layers[name]))
        whole = not own or len(own) == site.full_stack_shape[0]
        selected.append(site if whole else dataclasses.replace(site, layers=own))
    return tuple(selected)


def _expected(
    config: AdapterConfig,
    here: AdapterConfig,
    selected: Sites,
    chosen: Mapping[str, Module],
    found: Mapping[str, Stored],
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """For each tensor the shape of our array, and what is wrong with the tensors.

    Args:
      config: the config under torch's names.
      here: the config under ours.
      selected: the sites that are adapted, with the layers that are.
      chosen: the torch modules that are adapted.
      found: the tensors.
    """
    full = (tensor.shape for tensor in found.values() if math.prod(tensor.shape))
    largest = max((size for shape in full for size in shape), default=0)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, set[str]] = {}
    problems = []
    for module in chosen.values():
        try:
            settings = _settings(config, here, selected, module)
            # Nothing as large as a mistaken rank is ever made.
            rank = getattr(settings, "rank", settings)
            if rank > largest and not isinstance(rank, bool):
                raise ValueError(f"no tensor is large enough for its rank of {rank}")
            own = _shapes(config, settings, module.spec)
        except ValueError as error:
            problems.append(f"{module.name}: {error}")
            continue
        for name, layout in layouts(config, module.spec).items():
            key = f"{module.name}.{layout.suffix}"
            if name not in own:
                if key in found:
                    problems.append(f"{key}: the config says that there is none")
                continue
            if key not in found:
                problems.append(f"{key}: it is missing")
                continue
            shapes[key] = own[name]
            dtypes.setdefault(module.site.name, set()).add(found[key].dtype)
            wanted = _laid_shape(layout, own[name], module.spec, found[key].shape)
            problems += misfits(key, found[key], wanted)
    return shapes, [*problems, *two_halves(dtypes)]


@functools.lru_cache(maxsize=1024)
def _shapes(config: AdapterConfig, settings: Any, spec: WeightSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of a method's arrays for one weight."""
    method, ins = config.method, len(spec.in_shape)
    base = jax.ShapeDtypeStruct((*spec.in_shape, *spec.out_shape), spec.dtype)

    def init(key: jax.Array, base: jax.Array) -> dict[str, jax.Array]:
        axes = tuple(range(base.ndim))
        weight = Weight(spec=spec, base=base, in_axes=axes[:ins], out_axes=axes[ins:])
        buffers = method.buffers(key, config, settings, weight)
        return method.init(key, config, settings, weight, buffers)

    return {name: x.shape for name, x in jax.eval_shape(init, jax.random.key(0), base).items()}


def _laid_shape(
    layout: Layout, shape: tuple[int, ...], spec: WeightSpec, given: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of one of our arrays as PEFT lays it out."""
    if math.prod(shape) == math.prod(given):
        return layout.there(np.broadcast_to(np.zeros((), bool), shape), spec).shape
    # However large it would be: it is the shape alone that is computed.
    array = jax.ShapeDtypeStruct(shape, bool)
    return jax.eval_shape(lambda array: layout.there(array, spec), array).shape


def _settings(config: AdapterConfig, here: AdapterConfig, selected: Sites, module: Module) -> Any:
    """What a method is told about one torch module, the experts of a layer told apart."""
    if not isinstance(config, IA3Config):
        return config.method.settings(config, under_torch_name(module), None)
    # PEFT's own rule for its feedforward modules is followed where the config is made ours.
    site = selected[module.site.name]
    return here.method.settings(here, site, module.index[0] if module.index else None)


def _scales(
    config: AdapterConfig, here: AdapterConfig, selected: Sites, chosen: Iterable[Module]
) -> dict[Part, float] | None:
    """The scales of all modules, where experts of one layer may differ; None without experts."""
    chosen = list(chosen)
    if not isinstance(config, LoraConfig | LoHaConfig) or all(len(m.index) < 2 for m in chosen):
        return None
    return {module.part: _settings(config, here, selected, module).scaling for module in chosen}


def _orthonormal(name: str, u: np.ndarray) -> np.ndarray:
    """The columns as PEFT's Gram-Schmidt leaves them, but for signs, which do not matter."""
    columns = u.reshape(-1, u.shape[-1]).astype(np.float64)
    lengths = np.linalg.norm(columns, axis=0)
    q, r = np.linalg.qr(columns / np.where(lengths > 0, lengths, 1))
    if q.shape != columns.shape or np.abs(np.diagonal(r)).min(initial=1) < 1e-4:
        raise ValueError(
            f"{name}: `apply_GS` makes the columns of hra_u orthonormal, but they depend on each "
            f"other, so that PEFT's own result is rounding noise: this adapter is not trained"
        )
    return q.reshape(u.shape).astype(u.dtype)
