"""Adapters in Hugging Face PEFT's two files, a config and tensors in the safetensors format."""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peftjax.adapter import Adapter
from peftjax.config import AdapterConfig
from peftjax.interop.exporting import Export, export
from peftjax.interop.importing import read_adapter
from peftjax.interop.mixture import (
    check_classifier,
    export_xlora,
    find_experts,
    of_expert,
    read_xlora,
)
from peftjax.interop.names import ModuleNames
from peftjax.interop.stored import Stored, refuse
from peftjax.methods import XLoraConfig, config_from
from peftjax.sites import Sites

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

# The header of a file says that PEFT cannot run it; no other program asks.
_FOREIGN = {"peftjax": "not for torch PEFT"}

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}


def save_pretrained(
    directory: str | Path,
    adapter: Adapter,
    *,
    names: ModuleNames | None = None,
    base_model_name_or_path: str | None = None,
    allow_foreign: bool = False,
) -> Path:
    """Writes an adapter as Hugging Face PEFT writes it, so that torch PEFT reads it.

    The config names every adapted module in full, the layers of a stack one by one. What PEFT has
    no word for is written so that it computes the same: scales that were changed become alphas,
    shorter chains of HRA are continued with pairs of reflections that cancel, and those made
    orthonormal (``apply_GS``) are written as they are. PiSSA and OLoRA are written as PEFT writes
    them, to be subtracted again from the base when they are read, for linear layers, which are all
    that PEFT takes them out of; ``convert_to_lora`` first makes them plain LoRA of twice the rank.
    The start of ``pissa_niter_N`` is drawn anew by whoever reads it, so that one had better be
    converted.

    An X-LoRA adapter is written with its experts as they are now, each as an adapter of its own in
    ``experts/<name>``. PEFT finds them by the absolute paths in the config; ``load_pretrained``
    also if the directory was moved. The classifier is written whole, which PEFT does not do.

    Args:
      directory: where to write; made if it does not exist. Files of those names are replaced.
      adapter: the adapter.
      names: the rules between the model's names and those of its torch twin, such as
        ``module_names("llama")``; None if they are the same.
      base_model_name_or_path: the base model, by which PEFT loads it; by default what the config
        says.
      allow_foreign: write modules too that torch PEFT cannot run with this method; peftjax reads
        them back.

    Returns:
      The directory, absolute.

    Raises:
      ValueError: a module has no torch name, or torch PEFT cannot run the method on it; nothing is
        written then.

    Example:
      >>> import jax, jax.numpy as jnp, json, peftjax, pathlib, tempfile
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 4)))
      >>> config = peftjax.LoraConfig(r=2, lora_alpha=6, target_modules=["dense"])
      >>> adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
      >>> directory = peftjax.save_pretrained(pathlib.Path(tempfile.mkdtemp()), adapter)
      >>> sorted(path.name for path in directory.iterdir())
      ['adapter_config.json', 'adapter_model.safetensors']
      >>> again = peftjax.load_pretrained(directory, sites)
      >>> bool((again.params["dense"]["lora_A"] == adapter.params["dense"]["lora_A"]).all())
      True
    """
    directory = Path(directory).absolute()
    if isinstance(adapter.config, XLoraConfig):
        written = export_xlora(adapter, names, base_model_name_or_path, directory)
    else:
        written = {directory: export(adapter, names, base_model_name_or_path)}
    if not allow_foreign:
        refuse(
            "torch PEFT cannot run this adapter",
            [
                f"{module}: it {reason}"
                for each in written.values()
                for module, reason in each.foreign.items()
            ],
            "leave these modules out, or write it for peftjax alone with allow_foreign=True",
        )
    for place, each in written.items():
        _write(place, each)
    return directory


def _write(directory: Path, written: Export) -> None:
    """Writes the two files of an adapter."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = dict(sorted(written.config.items()))
    # All is sorted, as by PEFT, but for experts: it goes by their order, and "10" is before "2".
    text = json.dumps(fields, indent=2, sort_keys="adapters" not in fields) + "\n"
    metadata = {"format": "pt", **(_FOREIGN if written.foreign else {})}
    # Complete under another name first: who is interrupted still has the old files.
    new_tensors, new_config = (directory / f".{name}.new" for name in (TENSORS, CONFIG))
    save_file(written.tensors, new_tensors, metadata)
    new_config.write_text(text, encoding="utf-8")
    shutil.copymode(new_config, new_tensors)  # safetensors keeps its files from everybody else
    os.replace(new_tensors, directory / TENSORS)
    os.replace(new_config, directory / CONFIG)


def load_pretrained(
    directory: str | Path,
    sites: Sites,
    params: Any = None,
    *,
    names: ModuleNames | None = None,
    experts: Mapping[str | int, str | Path] | None = None,
) -> Adapter:
    """Reads an adapter that torch PEFT or ``save_pretrained`` wrote.

    The tensors are read one by one, after everything about them was checked. Their dtype is kept;
    PEFT makes half precision float32 for training. The config comes back under the names of this
    model, its modules named in full.

    Of an X-LoRA adapter the experts are read too, under the names of their directories: out of
    ``experts/`` beside the classifier, else where the config says, there or relative to it. Of
    those that torch PEFT writes beside its own X-LoRA only the tensors of LoRA are read.

    Args:
      directory: a local directory with PEFT's two files.
      sites: what ``find_sites`` found in the model.
      params: the base's params. Needed by PiSSA and OLoRA, whose files do not hold the start that
        is subtracted, and where a file holds some layers alone of a stacked array that is trained
        whole; otherwise only checked.
      names: the rules between the model's names and torch's; None if they are the same.
      experts: of X-LoRA, directories of experts that lie elsewhere, by name or number.

    Returns:
      The adapter, without dropout until it is given a key.

    Raises:
      FileNotFoundError: one of the two files is not there, or an expert.
      ValueError: a file is broken, of an unknown method or of another model; all that does not fit
        is listed, and nothing was read. Or it is what torch PEFT wrote of an X-LoRA, of whose
        classifier it loses layers.

    Example:
      See ``save_pretrained``.
    """
    directory = Path(directory)
    with _opened(directory) as files:
        config, stored = files.config, files.stored
        if not isinstance(config, XLoraConfig):
            if experts is not None:
                raise ValueError("`experts` are those of an X-LoRA, and this adapter is none")
            return _read(files, sites, params, names)
        check_classifier(config, stored)
        places = find_experts(directory, config, experts or {})
        own = {name: _read_expert(place, sites, params, names) for name, place in places.items()}
        return read_xlora(config, stored, places, own, sites, names, files.foreign)


class _Files(NamedTuple):
    """The two files of an adapter, opened.

    Attributes:
      config: the config.
      stored: the tensors by key.
      foreign: whether they say that torch PEFT cannot run the adapter.
    """

    config: AdapterConfig
    stored: Mapping[str, Stored]
    foreign: bool


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[_Files]:
    """The files of an adapter; every error of the block names the directory."""
    _check_files(directory)
    with _tensors(directory / TENSORS) as file, warnings.catch_warnings():
        # How an adapter would start, or be trained, says nothing about one that is trained.
        warnings.filterwarnings("ignore", message="an odd number of reflections")
        warnings.filterwarnings("ignore", message="`enable_softmax_topk`")
        data = _json(directory / CONFIG)
        try:
            config = config_from(data)
        except ValueError as error:
            raise ValueError(f"{directory / CONFIG}: {error}") from error
        stored = {key: _stored(file, key) for key in file.keys()}  # noqa: SIM118
        foreign = _FOREIGN.items() <= (file.metadata() or {}).items()
        try:
            yield _Files(config, stored, foreign)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error


def _read(files: _Files, sites: Sites, params: Any, names: ModuleNames | None) -> Adapter:
    """The adapter that files hold, which may be an expert as torch PEFT's X-LoRA writes it."""
    stored = of_expert(files.stored)
    try:
        return read_adapter(files.config, stored, sites, params, names, files.foreign)
    except ValueError as error:
        if stored is files.stored:
            raise
        raise ValueError(
            f"torch PEFT wrote this expert out of an X-LoRA model, and then loses tensors of "
            f"layers with the numbers of other experts: take the expert's own directory; {error}"
        ) from error


def _read_expert(directory: Path, sites: Sites, params: Any, names: ModuleNames | None) -> Adapter:
    with _opened(directory) as files:
        if isinstance(files.config, XLoraConfig):
            raise ValueError("an X-LoRA adapter cannot be an expert of another one")
        return _read(files, sites, params, names)


def _check_files(directory: Path) -> None:
    """Raises unless both files are there, and says why a pickled one does not do."""
    if not (directory / TENSORS).is_file() and (directory / PICKLED).is_file():
        raise ValueError(
            f"{directory / PICKLED} is a pickle, which runs whatever code it holds when it is "
            f"read: have torch write {TENSORS}, with safe_serialization=True"
        )
    for name in (CONFIG, TENSORS):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"there is no {name} in {directory}: PEFT's save_pretrained and peftjax's write it"
            )


def _tensors(path: Path) -> Any:
    """The file, to be read tensor by tensor."""
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _stored(file: Any, key: str) -> Stored:
    part = file.get_slice(key)
    dtype = part.get_dtype()
    name = _DTYPES[dtype].name if dtype in _DTYPES else dtype
    return Stored(tuple(part.get_shape()), name, lambda: file.get_tensor(key))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
