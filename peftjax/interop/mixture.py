"""X-LoRA in torch PEFT's terms: a classifier, and experts in directories of their own."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.adapter import Adapter, weight_spec
from peftjax.factors import Arrays
from peftjax.interop.configs import PEFT_VERSION
from peftjax.interop.exporting import PREFIX, Export, export
from peftjax.interop.limits import unsupported
from peftjax.interop.names import ModuleNames
from peftjax.interop.stored import Stored, misfits, refuse
from peftjax.methods import LoraConfig, XLoraConfig, init_xlora, xlora_experts
from peftjax.methods.xlora import CLASSIFIER, check_xlora, classifier_sizes
from peftjax.sites import Site, Sites
from peftjax.unstacking import Index, Part, indices

EXPERTS = "experts"  # the directory with those that we write

_KEY = "base_model.internal_xlora_classifier."  # what PEFT puts before the classifier's arrays
_INSIDE = "base_model.lora_model.model."  # and before the names of the model inside an X-LoRA
_LORA = re.compile(r"\.lora_[^.]+(\.(weight|bias))?$")
_WHOLE = (
    "torch PEFT loses layers of it when it saves it: have torch write all of it, with "
    "safetensors.torch.save_file({k: v for k, v in model.state_dict().items() if "
    "'internal_xlora_classifier' in k}, 'adapter_model.safetensors')"
)


def export_xlora(
    adapter: Adapter,
    names: ModuleNames | None,
    base_model_name_or_path: str | None,
    directory: Path,
) -> dict[Path, Export]:
    """An X-LoRA adapter in torch PEFT's terms, by the directories to write.

    Args:
      adapter: the adapter.
      names: the rules between the names.
      base_model_name_or_path: the base model, where the configs do not name it.
      directory: that of the whole, absolute; PEFT finds the experts by their paths.

    Raises:
      ValueError: an expert's name cannot be a directory's, a value is not finite, or a module has
        no torch name.
    """
    names = names or ModuleNames()
    config, experts = check_xlora(adapter), xlora_experts(adapter)
    for name in experts:
        if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise ValueError(
                f"the expert {name!r} is written in a directory of its name, which this cannot be: "
                f"make the adapter with another name"
            )
    paths = {name: directory / EXPERTS / name for name in experts}
    fields = config.to_dict()
    if config.scaling_pass_value is None:
        fields["scaling_pass_value"] = 1 / len(experts)
    for name, array in adapter.buffers[CLASSIFIER].items():
        fields[name] = _value(name, array, fields[name])
    fields |= {
        "peft_version": PEFT_VERSION,
        "auto_mapping": None,
        "inference_mode": True,
        "base_model_name_or_path": base_model_name_or_path or config.base_model_name_or_path,
        "adapters": {str(i): str(path) for i, path in enumerate(paths.values())},
    }
    tensors = classifier_tensors(adapter, names)
    foreign = _foreign(config, experts, names)
    written = {
        paths[name]: export(each, names, base_model_name_or_path) for name, each in experts.items()
    }
    return {**written, directory: Export(fields, tensors, foreign)}


def _value(name: str, array: Any, given: float) -> float:
    """The value of an array, in the digits of the config if that is where it is from."""
    value = float(array)
    if not np.isfinite(value):
        raise ValueError(f"`{name}` is {value}, which cannot be written")
    return float(given) if np.float32(given) == value else value


def _foreign(
    config: XLoraConfig, experts: Mapping[str, Adapter], names: ModuleNames
) -> dict[str, str]:
    """Why torch PEFT cannot run an X-LoRA of these experts, by expert and by module."""
    foreign = {}
    for name, each in experts.items():
        if not isinstance(each.config, LoraConfig):
            kind = type(each.config).__name__.removesuffix("Config")
            foreign[f"the expert {name!r}"] = (
                f"is of {kind}, and torch PEFT's X-LoRA mixes LoRA alone: convert_to_lora turns it "
                f"into that"
            )
        elif each.config.method.buffers_read_weight(each.config):
            foreign[f"the expert {name!r}"] = (
                f"started out of the weights (`init_lora_weights` = "
                f"{each.config.init_lora_weights!r}), which torch PEFT takes out of the base for "
                f"every expert, mixed or not: convert_to_lora turns it into plain LoRA"
            )
    places: dict[Any, list[str]] = {}
    for site, index in _layers_of(experts):
        module = names.to_torch(site.name, index)
        places.setdefault(names.place(module), []).append(module)
        spec = weight_spec(site, site.dtype)
        if reason := unsupported(config, site, spec, names.keeps_inputs_first(module)):
            foreign[module] = reason
        elif not module.startswith("model.") or module.startswith("model.model."):
            foreign[module] = (
                "does not lie right in a module `model`, and torch PEFT's X-LoRA reads experts for "
                "such modules alone"
            )
    if config.layerwise_scalings:
        foreign |= {
            module: "has scalings of its own, in the order of torch's modules, and `names` does "
            "not tell where it stands among them: name its segments in ModuleNames(order=...)"
            for same in places.values()
            for module in (same if len(same) > 1 else ())
        }
    return foreign


def _layers_of(experts: Mapping[str, Adapter]) -> list[tuple[Site, Index]]:
    """The weights that experts adapt, each once."""
    layers = {
        (site.name, index): (site, index)
        for each in experts.values()
        for site in each.sites.values()
        for index in indices(site)
    }
    return list(layers.values())


def classifier_tensors(adapter: Adapter, names: ModuleNames) -> dict[str, np.ndarray]:
    """The classifier of an X-LoRA adapter under PEFT's keys, all of it.

    Scalings of single layers are in the order of torch's modules, as far as the names tell it.
    """
    return {
        f"{_KEY}{name}": np.ascontiguousarray(np.asarray(array).T)
        for name, array in _reordered(adapter, names, adapter.params[CLASSIFIER]).items()
    }


def with_classifier(
    adapter: Adapter, names: ModuleNames, tensors: Mapping[str, np.ndarray]
) -> Adapter:
    """The X-LoRA adapter with some or all arrays of a classifier under PEFT's keys."""
    own = adapter.params[CLASSIFIER]
    given = {key.removeprefix(_KEY): tensor.T for key, tensor in tensors.items()}
    laid = _reordered(adapter, names, given, back=True)
    placed = {
        name: jax.device_put(array.astype(own[name].dtype), getattr(own[name], "sharding", None))
        for name, array in laid.items()
    }
    return adapter.replace(params={**adapter.params, CLASSIFIER: own | placed})


def _reordered(
    adapter: Adapter, names: ModuleNames, arrays: Mapping[str, Any], *, back: bool = False
) -> dict[str, Any]:
    """A classifier's arrays with the scalings of layers in torch's order; or ``back`` again."""
    config = check_xlora(adapter)
    if not config.layerwise_scalings:
        return dict(arrays)
    places: dict[Part, int] = {}
    for site in adapter.sites.values():
        own = np.asarray(adapter.buffers[site.name]["place"]).ravel().tolist()
        places |= {(site.name, i): n for i, n in zip(indices(site), own, strict=True)}
    in_torch = sorted(places, key=lambda part: names.place(names.to_torch(*part)))
    order = np.array([places[part] for part in in_torch])
    order = np.argsort(order) if back else order
    last = max(classifier_sizes(config, len(config.experts), order.size))

    def reordered(array: Any) -> np.ndarray:
        parts = np.asarray(array).reshape(*array.shape[:-1], order.size, -1)
        return parts[..., order, :].reshape(array.shape)

    return {
        name: reordered(array) if name.startswith(f"layers.{last}.") else array
        for name, array in arrays.items()
    }


def find_experts(
    directory: Path, config: XLoraConfig, given: Mapping[str | int, str | Path]
) -> dict[str, Path]:
    """The directories of the experts by name, in order.

    An expert that PEFT numbers has the name of its directory, if they all differ. It is looked for
    among those written beside the classifier, where the config says, and relative to it.

    Args:
      directory: the directory of the X-LoRA adapter.
      config: its config.
      given: directories of experts by name or number, which are used instead.

    Raises:
      FileNotFoundError: an expert is nowhere.
      ValueError: the config names none, or one of those given is unknown.
    """
    keys = list(config.adapters)
    if not keys:
        raise ValueError("`adapters` of the config names no experts")
    numbers = [str(i) for i in range(len(keys))]
    names = keys
    if set(keys) == set(numbers):
        keys = names = numbers
        ends = [Path(config.adapters[key]).name for key in keys]
        names = ends if len({*ends, ""}) > len(ends) else keys
    positions: dict[str | int, int] = {i: i for i in range(len(keys))}
    for known in (keys, names):
        positions.update({each: i for i, each in enumerate(known)})
    if unknown := [each for each in given if each not in positions]:
        raise ValueError(
            f"experts= gives {unknown}, and the experts here are {', '.join(names)}, or their "
            f"numbers"
        )
    chosen = {positions[each]: Path(path) for each, path in given.items()}
    found = {}
    for i, (name, key) in enumerate(zip(names, keys, strict=True)):
        path = Path(config.adapters[key])
        usual = [directory / EXPERTS / path.name, path, directory / path, directory / path.name]
        tried = [chosen[i]] if i in chosen else [*usual, directory / key]
        tried = [place for place in dict.fromkeys(tried) if place != directory]
        place = next((p for p in tried if os.path.isfile(p / "adapter_config.json")), None)
        if place is None:
            raise FileNotFoundError(
                f"{directory}: there is no adapter of the expert {name!r} in "
                f"{', '.join(map(str, tried))}: pass its directory, "
                f"load_pretrained(..., experts={{{name!r}: ...}})"
            )
        found[name] = place
    return found


def check_classifier(config: XLoraConfig, stored: Mapping[str, Stored]) -> None:
    """Raises a ValueError that lists all arrays of the classifier that lack, or do not belong."""
    layers = _layers(config)
    kinds = ("weight", "bias")
    missing = [
        f"{_KEY}layers.{n}.{kind}: it is missing"
        for n in islice(layers, 50)  # a mistaken depth may be any number
        for kind in kinds
        if f"{_KEY}layers.{n}.{kind}" not in stored
    ]
    refuse("this X-LoRA classifier is not whole", missing, _WHOLE)
    known = {f"{_KEY}layers.{n}.{kind}" for n in islice(layers, len(stored)) for kind in kinds}
    refuse(
        f"this X-LoRA classifier has {config.xlora_depth} layers",
        [f"{key}: there is no such array in it" for key in stored if key not in known],
        "load it with the config that it was written with",
    )


def _layers(config: XLoraConfig) -> range:
    """The numbers of the classifier's linear layers."""
    step = 3 if config.xlora_dropout_p > 0 else 2
    return range(0, step * config.xlora_depth, step)


def read_xlora(
    config: XLoraConfig,
    stored: Mapping[str, Stored],
    places: Mapping[str, Path],
    experts: Mapping[str, Adapter],
    sites: Sites,
    names: ModuleNames | None,
    foreign: bool,
) -> Adapter:
    """The X-LoRA adapter of a classifier of torch PEFT's and experts that were read.

    Args:
      config: the config.
      stored: the classifier's tensors, which ``check_classifier`` found to be all.
      places: the directories of the experts.
      experts: the experts.
      sites: what ``find_sites`` found.
      names: the rules between the names.
      foreign: whether the file says that torch PEFT cannot run it, so that peftjax wrote it.

    Raises:
      ValueError: something does not fit; all of it is listed.
    """
    layers = len(_layers_of(experts))
    problems = [
        problem
        for key, shape in _laid_shapes(config, len(experts), layers)
        for problem in misfits(key, stored[key], shape)
    ]
    if len(dtypes := sorted({tensor.dtype for tensor in stored.values()})) > 1:
        problems.append(f"the classifier has arrays of {' and '.join(dtypes)}: give them one dtype")
    if not foreign:
        found = _foreign(config, experts, names or ModuleNames())
        problems += [f"{module}: it {reason}" for module, reason in found.items()]
    refuse(
        f"this X-LoRA adapter of {len(experts)} experts on {layers} layers does not fit",
        problems,
        "load it with its own experts, for the model it was made for, or mend names=",
    )
    config = dataclasses.replace(
        config, adapters={name: str(path) for name, path in places.items()}
    )
    adapter = init_xlora(jax.random.key(0), config, experts, sites, names=names)
    classifier: Arrays = {
        key.removeprefix(_KEY): jnp.asarray(tensor.read().T) for key, tensor in stored.items()
    }
    return adapter.replace(params={**adapter.params, CLASSIFIER: classifier})


def _laid_shapes(
    config: XLoraConfig, experts: int, layers: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The classifier's arrays with the shapes that PEFT keeps them in."""
    if config.hidden_size is None:
        raise ValueError("`hidden_size` of the config is missing: PEFT writes it in every file")
    for number, (ins, outs) in classifier_sizes(config, experts, layers).items():
        yield f"{_KEY}layers.{number}.weight", (outs, ins)
        yield f"{_KEY}layers.{number}.bias", (outs,)


def of_expert(stored: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """The tensors of LoRA alone, where torch PEFT wrote an expert out of its X-LoRA model.

    Beside them it then writes weights of the base and parts of the classifier.
    """
    if not any(key.startswith((_INSIDE, _KEY)) for key in stored):
        return stored
    return {
        PREFIX + key.removeprefix(_INSIDE).removeprefix(PREFIX): tensor
        for key, tensor in stored.items()
        if _LORA.search(key)
    }
