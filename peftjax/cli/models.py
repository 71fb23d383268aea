"""Model directories of transformers: traced without weights, read and written without torch."""

import dataclasses
import inspect
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import peftjax
from peftjax.adapter import Adapter
from peftjax.attach import refill
from peftjax.cli.encoder import quiet
from peftjax.cli.errors import CommandError, UsageError
from peftjax.interop.modules import leaf_tensors
from peftjax.interop.names import ModuleNames
from peftjax.sites import Sites
from peftjax.trees import leaf_paths

CONFIG = "config.json"
TENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FLAX = ("flax_model.msgpack", "flax_model.msgpack.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TEXT = 8  # tokens of the text that a model is traced with

_HEAD = "lm_head.kernel"

# What goes with a model besides its weights: its tokenizer and other settings.
_SETTINGS = {".json", ".txt", ".model", ".spm", ".jinja", ".bpe", ".codes"}

# Very old files name the arrays of a norm as TensorFlow did.
_OLD = {"gamma": "weight", "beta": "bias"}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model whose structure is known, and whose weights are not read.

    Attributes:
      directory: where it is.
      architecture: torch's name of its class.
      flax: transformers' Flax model, without params.
      shapes: its params as ``jax.ShapeDtypeStruct``s.
      sites: what ``find_sites`` found in it.
      names: the rules between its names and torch's.
    """

    directory: Path
    architecture: str
    flax: Any
    shapes: Any
    sites: Sites
    names: ModuleNames


class Weights(NamedTuple):
    """A params tree, and the paths of those leaves that no file has: they are zeros."""

    params: Any
    missing: frozenset[str]


def trace(directory: Path, architecture: str | None, names: ModuleNames | None) -> Model:
    """Makes transformers' Flax model of a directory and finds its sites, all of it abstract.

    Args:
      directory: the model's directory.
      architecture: torch's name of its class; None takes that of its config.
      names: the rules between the names; None takes those of its model type.

    Raises:
      UsageError: transformers has no Flax class for it or cannot make it, or no names are known.
    """
    import transformers

    data = _config(directory)
    flax_class, architecture = _flax_class(directory, data, architecture)
    with quiet(transformers.utils.logging):
        try:
            config = flax_class.config_class.from_pretrained(directory, local_files_only=True)
            flax = flax_class(config, _do_init=False)
            example = _example(flax)
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            first = str(error).strip().partition("\n")[0]
            raise UsageError(f"--model: transformers cannot make {directory}: {first}") from error
    names = names or names_of(config.model_type)
    shapes = flax.params_shape_tree
    sites = peftjax.find_sites(
        lambda params, example: flax(**example, params=params, return_dict=False), shapes, example
    )
    return Model(directory, architecture, flax, shapes, sites, names)


def names_of(kind: str) -> ModuleNames:
    """The names of a model type; a ``UsageError`` if there are none."""
    try:
        return peftjax.module_names(kind)
    except ValueError as error:
        known = str(error).partition(";")[0]
        raise UsageError(f"--names: {known}; in Python, save_pretrained takes any") from error


def _config(directory: Path) -> dict[str, Any]:
    """What a model's config.json says."""
    try:
        data = json.loads((directory / CONFIG).read_text("utf-8"))
        if isinstance(data, dict) and isinstance(data["model_type"], str):
            return data
    except (ValueError, KeyError):
        pass
    raise UsageError(f"--model: {directory / CONFIG} names no model_type")


def _flax_class(
    directory: Path, data: Mapping[str, Any], architecture: str | None
) -> tuple[Any, str]:
    """The Flax class of a model, and torch's name of it."""
    import transformers

    kind = data["model_type"]
    wanted = [architecture.removeprefix("Flax")] if architecture else data.get("architectures")
    wanted = [] if wanted is None else wanted
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise UsageError(
            f"--model: {directory / CONFIG} has architectures that are no list of names, "
            f"{wanted!r}: choose one with --architecture"
        )
    for name in wanted:
        found = getattr(transformers, f"Flax{name}", None)
        # Other things by that name are transformers' stand-ins for what is not installed.
        known = getattr(getattr(found, "config_class", None), "model_type", None)
        if known == kind:
            return found, name
        if known is not None:
            raise UsageError(f"--architecture: {name} is of type {known!r}, not {kind!r}")
    of_kind, kinds = _flax_names(kind)
    what = " and ".join(wanted) if wanted else f"{directory / CONFIG}, which names no architectures"
    where = "--architecture" if architecture else "--model"
    if of_kind:
        raise UsageError(
            f"{where}: transformers has no Flax class for {what}; for {kind!r} it has "
            f"{', '.join(of_kind)}: choose one with --architecture"
        )
    raise UsageError(
        f"{where}: transformers has no Flax class for {what}, nor any for {kind!r}: its Flax "
        f"models are {', '.join(kinds)}"
    )


def _flax_names(kind: str) -> tuple[list[str], list[str]]:
    """The Flax classes of a model type, by torch's names; and all types that have some."""
    from transformers.models.auto import modeling_flax_auto

    tables = [
        table
        for name, table in vars(modeling_flax_auto).items()
        if name.startswith("FLAX_") and name.endswith("_MAPPING_NAMES")
    ]
    of_kind = {table[kind].removeprefix("Flax") for table in tables if kind in table}
    return sorted(of_kind), sorted({kind for table in tables for kind in table})


def _example(flax: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs of the right shapes for a Flax model of transformers, whatever it reads."""
    arguments = inspect.signature(type(flax).__call__).parameters
    shapes = flax.input_shape
    shapes = [shapes] if isinstance(shapes[0], int) else shapes
    # Sparse attention wants texts of many blocks, and says so.
    length = next((s[1] for s in shapes if len(s) == 2 and s[1] > 1), _TEXT)
    length = next((s[2] for s in shapes if len(s) == 3 and "input_ids" in arguments), length)
    choices = (2,) if "MultipleChoice" in type(flax).__name__ else ()
    made = {
        "input_ids": ((2, *choices, length), jnp.int32),
        "decoder_input_ids": ((2, _TEXT), jnp.int32),
        "input_features": ((2, *shapes[0][1:]), jnp.float32),
    }
    for _, high, wide, channels in (s for s in shapes if len(s) == 4):
        made["pixel_values"] = (2, channels, high, wide), jnp.float32
    return {name: jax.ShapeDtypeStruct(*made[name]) for name in arguments if name in made}


def load_weights(model: Model) -> Weights:
    """Reads a model's weights, each in the dtype that its file has.

    Raises:
      CommandError: there are no weights that can be read here.
      ValueError: they are not those of the model.
    """
    unused = [x.path for x in model.sites.leaves if x.site is None and x.leaf_name == "kernel"]
    if unused:
        raise CommandError(
            f"{model.architecture} does not use all of its weights, and how torch lays those out "
            f"is not known: {', '.join(unused[:5])}"
        )
    directory = model.directory
    if any((directory / name).is_file() for name in _FLAX) or _is_flax(directory / TENSORS):
        found = _from_flax(model)
    elif (directory / TENSORS).is_file() or (directory / INDEX).is_file():
        found = _from_torch(model)
    elif any((directory / name).is_file() for name in _PICKLED):
        raise CommandError(
            f"{directory} has its weights as a pickle alone, which only torch reads: have it "
            f"write {TENSORS}, with model.save_pretrained(...)"
        )
    else:
        raise CommandError(f"{directory} has no weights: none of {TENSORS}, {INDEX}, {_FLAX[0]}")
    wanted = leaf_paths(model.shapes)
    if _HEAD in wanted and _HEAD not in found and model.flax.config.tie_word_embeddings:
        # Llama's and Mistral's heads are never tied in JAX.
        for table in [x for path, x in found.items() if path.endswith("embed_tokens.embedding")]:
            found[_HEAD] = table.T
    missing = frozenset(wanted) - frozenset(found)
    whole = {p: found[p] if p in found else np.zeros(x.shape, x.dtype) for p, x in wanted.items()}
    return Weights(refill(model.shapes, whole), missing)


def check_weights(model: Model, adapter: Adapter, missing: frozenset[str]) -> None:
    """Raises a ``UsageError`` if weights are missing that the adapter does not bring along."""
    left = sorted(missing - {leaf.path for leaf in adapter.saved})
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise UsageError(
            f"--model: {model.directory} has no weights for {', '.join(left[:5])}{more} of "
            f"{model.architecture}, nor has the adapter: is it another --architecture?"
        )


def _is_flax(path: Path) -> bool:
    """Whether a file of tensors is in Flax's layouts."""
    if not path.is_file():
        return False
    with _opened(path) as file:
        return (file.metadata() or {}).get("format") == "flax"


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CommandError(f"{path} is no whole safetensors file: {error}") from error


def _from_flax(model: Model) -> dict[str, Any]:
    """The arrays by path, as transformers reads its Flax files."""
    import transformers

    with quiet(transformers.utils.logging):
        try:
            _, params = type(model.flax).from_pretrained(
                model.directory, config=model.flax.config, _do_init=False, local_files_only=True
            )
        except OSError as error:
            first = str(error).strip().partition("\n")[0]
            raise CommandError(
                f"transformers cannot read the weights in {model.directory}: {first}"
            ) from error
    return leaf_paths(params)


def _from_torch(model: Model) -> dict[str, Any]:
    """The arrays by path, out of torch's tensors."""
    prefix = f"{model.flax.base_model_prefix}."
    stored = _by_name(model.directory)
    arrays: dict[str, np.ndarray] = {}
    missing = set()
    for tensor in leaf_tensors(model.sites.leaves, model.sites.sites, model.names):
        # With a head or without one: the model inside goes with and without its prefix.
        keys = tensor.key, prefix + tensor.key, tensor.key.removeprefix(prefix)
        place = next((stored[key] for key in keys if key in stored), None)
        path = tensor.leaf.path
        if place is None:
            missing.add(path)
            continue
        file, key = place
        value = file.get_tensor(key)
        if value.shape != tensor.shape:
            raise ValueError(
                f"{model.directory}: {key} has the shape {value.shape}, and {model.architecture} "
                f"wants {tensor.shape}"
            )
        array = arrays.setdefault(path, np.empty(tensor.leaf.shape, value.dtype))
        tensor.put(array, value)
    return {path: array for path, array in arrays.items() if path not in missing}


def _by_name(directory: Path) -> dict[str, tuple[Any, str]]:
    """Of each tensor in torch's files, the file and the key that it has there."""
    files = [directory / TENSORS]
    if not files[0].is_file():
        try:
            shards = json.loads((directory / INDEX).read_text("utf-8"))["weight_map"].values()
            files = [directory / name for name in sorted(set(shards))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CommandError(
                f"{directory / INDEX} has no weight_map that names the file of each tensor"
            ) from error
    stored = {}
    for path in files:
        file = _opened(path)
        for key in file.keys():  # noqa: SIM118
            head, _, last = key.rpartition(".")
            name = f"{head}.{_OLD[last]}" if last in _OLD and _is_norm(head) else key
            stored[name] = file, key
    return stored


def _is_norm(module: str) -> bool:
    return re.search(r"norm[^.]*$", module, re.IGNORECASE) is not None


def save_model(directory: Path, model: Model, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a whole model for torch's transformers.

    Args:
      directory: where to; it is there and empty.
      model: the model, whose settings and tokenizer go along.
      tensors: its weights under torch's names. Those that torch ties are there once.
    """
    save_file(dict(tensors), directory / TENSORS, {"format": "pt"})
    for path in _settings(model.directory):
        shutil.copyfile(path, directory / path.name)
    changed: dict[str, Any] = {"architectures": [model.architecture]}
    if "lm_head.weight" in tensors and model.flax.config.tie_word_embeddings:
        # In JAX this head has weights of its own, which torch would take from the embedding.
        changed["tie_word_embeddings"] = False
    data = _config(model.directory)
    if data | changed != data:
        text = json.dumps(data | changed, indent=2, sort_keys=True)
        (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def _settings(directory: Path) -> Iterator[Path]:
    """The files of a model that are neither weights nor an adapter."""
    for path in sorted(directory.iterdir()):
        weights = path.name.endswith(".index.json") or path.name.startswith(
            ("adapter.", "adapter_")
        )
        if path.is_file() and path.suffix in _SETTINGS and not weights:
            yield path
