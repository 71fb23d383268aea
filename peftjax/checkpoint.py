"""Adapters on disk through Orbax: the adapter's arrays alone, never the model's."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from peftjax.adapter import Adapter
from peftjax.identity import about, check_about
from peftjax.methods import XLoraConfig, config_from
from peftjax.methods.xlora import CLASSIFIER
from peftjax.sites import Leaf, Site, Sites

_ADAPTER = "adapter.json"
_ARRAYS = ("arrays", "arrays-2")
_WHOLE = ("_METADATA", "manifest.ocdbt")  # without which Orbax reads no arrays


def save_adapter(directory: str | Path, adapter: Adapter) -> Path:
    """Writes an adapter's params and buffers, and as JSON beside them its config and its sites.

    An adapter saved in the same directory before is replaced, from one moment to the next: a
    process killed meanwhile leaves the old one or the new one, whole. Other files there are left
    alone. In a run of several processes (``jax.distributed``) each of them has to call it.

    Args:
      directory: where to write; made if it does not exist.
      adapter: the adapter.

    Returns:
      The directory, absolute.

    Raises:
      ValueError: the directory is in a bucket, or the config holds what JSON has no word for.
    """
    directory = _located(directory)
    # The new arrays lie beside the old ones until the file that names them is replaced, at once.
    old = _arrays_in(directory)
    new = next(name for name in _ARRAYS if name != old)
    text = _text({"arrays": new, "config": adapter.config.to_dict(), **_structure(adapter)})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / new, _arrays(adapter), force=True)
        checkpointer.wait_until_finished()
    if jax.process_index() == 0:
        begun = directory / f"{_ADAPTER}.tmp"
        begun.write_text(text, encoding="utf-8")
        begun.replace(directory / _ADAPTER)
        if old is not None:
            shutil.rmtree(directory / old, ignore_errors=True)
    # Who reads or saves next must find what the first process wrote.
    multihost_utils.sync_global_devices("peftjax.save_adapter")
    return directory


def restore_adapter(directory: str | Path, like: Adapter | None = None) -> Adapter:
    """Reads an adapter that ``save_adapter`` wrote.

    Args:
      directory: where it was written.
      like: an adapter of the same config for the same model, which may have another dtype. Its
        arrays say what to expect and may be ``jax.ShapeDtypeStruct``s; where they carry a sharding,
        the result has it too. None takes the adapter as it was written, on the first device:
        whether it fits a model shows when it is used.

    Returns:
      ``like`` with the arrays from disk.

    Raises:
      FileNotFoundError: no adapter was saved there.
      ValueError: it is of another config or model than ``like``, or its files are not whole; the
        message names what differs or is damaged.
    """
    directory = _located(directory)
    if not (directory / _ADAPTER).is_file():
        begun = any((directory / name).exists() for name in _ARRAYS)
        why = f"its arrays have no {_ADAPTER}, so its save did not end; " if begun else ""
        raise FileNotFoundError(f"no adapter in {directory}: {why}save_adapter writes one")
    place, written = _as_written(directory)
    if like is None:
        like = written
    else:
        check_about(f"the adapter in {directory}", about(written), about(like))
    wanted = jax.tree.map(_abstract, _arrays(like))
    if missing := [name for name in _WHOLE if not (place / name).is_file()]:
        raise ValueError(f"{place} is not whole, it has no {missing[0]}: save the adapter again")
    with ocp.StandardCheckpointer() as checkpointer:
        with _whole(place):
            saved = checkpointer.metadata(place).item_metadata.tree
        _check(directory, _by_path(saved), _by_path(wanted))
        with _whole(place):
            arrays = checkpointer.restore(place, wanted)
    return like.replace(
        params=_refilled(like.params, arrays["params"]),
        buffers=_refilled(like.buffers, arrays["buffers"]),
    )


def _located(directory: str | Path) -> Path:
    """The directory, absolute; raises for one that is on no file system."""
    if "://" in str(directory):
        raise ValueError(
            f"{directory} is on no file system: AdapterCheckpointer saves into buckets, an adapter "
            f"alone too"
        )
    return Path(directory).absolute()


def _arrays_in(directory: Path) -> str | None:
    """Where the arrays of the adapter lie that is there now; None if there is none."""
    try:
        name = json.loads((directory / _ADAPTER).read_text(encoding="utf-8"))["arrays"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if name in _ARRAYS else None


def _text(data: dict[str, Any]) -> str:
    """JSON for a file; what is in a field keeps its order: patterns and experts mean one."""
    return json.dumps(dict(sorted(data.items())), indent=2) + "\n"


@contextlib.contextmanager
def _whole(place: Path) -> Iterator[None]:
    """Makes one error of those by which Orbax takes note of files that are damaged."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"Orbax cannot read {place}, which seems damaged ({type(error).__name__}: {said}): "
            f"save the adapter again"
        ) from error


def _structure(adapter: Adapter) -> dict[str, Any]:
    """All of an adapter but its config and the values of its arrays, JSON-ready."""

    def shapes(arrays: dict[str, Any]) -> dict[str, Any]:
        return {
            module: {n: {"shape": x.shape, "dtype": x.dtype.name} for n, x in own.items()}
            for module, own in arrays.items()
        }

    config = adapter.config
    mixture = {}
    if isinstance(config, XLoraConfig):
        mixture = {"experts": [each.to_dict() for each in config.experts], "head": config.head}
    return {
        "sites": [_record(site) for site in adapter.sites.values()],
        "others": [_record(site) for site in adapter.sites.others],
        "saved": [_record(leaf) for leaf in adapter.saved],
        "params": shapes(adapter.params),
        "buffers": shapes(adapter.buffers),
        **mixture,
    }


def _record(of: Site | Leaf) -> dict[str, Any]:
    """A site or a leaf as JSON has it."""
    fields = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
    fields["dtype"] = of.dtype.name
    if isinstance(of, Leaf):
        fields["site"] = None if of.site is None else _record(of.site)
    return fields


def _as_written(directory: Path) -> tuple[Path, Adapter]:
    """Where the arrays lie, and an adapter in the structure that was saved, with their shapes."""
    try:
        structure = json.loads((directory / _ADAPTER).read_text(encoding="utf-8"))
        config = structure["config"]
        sites, others = (tuple(map(_site, structure[part])) for part in ("sites", "others"))
        saved = tuple(_leaf(record) for record in structure["saved"])
        arrays: Any = {
            part: {
                module: {
                    name: jax.ShapeDtypeStruct(x["shape"], jnp.dtype(x["dtype"]))
                    for name, x in own.items()
                }
                for module, own in structure[part].items()
            }
            for part in ("params", "buffers")
        }
        own = config_from(config)
        modules = {site.name for site in sites} | {leaf.module for leaf in saved}
        modules |= {CLASSIFIER} if isinstance(own, XLoraConfig) else set()
        astray = modules ^ {*arrays["params"], *arrays["buffers"]}
        if astray:
            raise ValueError(f"its sites and its arrays differ: {', '.join(sorted(astray)[:5])}")
        if isinstance(own, XLoraConfig):
            # A config takes null for what is not given, and here it is a value.
            mixture = {"scaling_pass_value": config["scaling_pass_value"]}
            mixture["experts"] = tuple(config_from(each) for each in structure["experts"])
            own = dataclasses.replace(own, **mixture, head=structure["head"])
        place = directory / _ARRAYS[_ARRAYS.index(structure["arrays"])]
        return place, Adapter(
            **arrays, key=None, config=own, sites=Sites(sites, others=others), saved=saved
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{directory / _ADAPTER} does not say what the adapter is ({type(error).__name__}: "
            f"{error}): save it again"
        ) from error


def _site(record: Mapping[str, Any]) -> Site:
    site = Site(**_values(record))
    axes = sorted(site.in_axes + site.out_axes + site.stack_axes)
    if axes != list(range(len(site.shape))) or not set(site.tap_axes) <= set(site.in_axes):
        raise ValueError(f"the axes of {site.name} are not those of its shape {site.shape}")
    if not set(site.layers or ()) <= set(range(*site.full_stack_shape[:1] or (0,))):
        raise ValueError(f"{site.name} has no layers {site.layers} in its shape {site.shape}")
    return site


def _leaf(record: Mapping[str, Any]) -> Leaf:
    site = None if record["site"] is None else _site(record["site"])
    return Leaf(**_values(record) | {"site": site})


def _values(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record as they were: JSON has lists for tuples."""
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in record.items()}
    return values | {"dtype": jnp.dtype(record["dtype"])}


def _arrays(adapter: Adapter) -> dict[str, Any]:
    """What goes to disk: all but empty arrays, of which there is nothing to write."""
    return {
        "params": _written(adapter.params),
        "buffers": _written(adapter.buffers),
    }


def _written(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays by module and name, without those of size 0."""
    return {
        module: {name: x for name, x in own.items() if x.size} for module, own in arrays.items()
    }


def _refilled(like: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays from disk in the structure of ``like``, with its empty ones."""
    return {
        module: {
            name: arrays[module][name] if x.size else jnp.zeros(x.shape, x.dtype)
            for name, x in own.items()
        }
        for module, own in like.items()
    }


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of an array; the first device where none is given."""
    sharding = getattr(array, "sharding", None)
    if sharding is None:
        # Without one Orbax would take the sharding of the machine that saved.
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves by path, ``params/encoder.query/lora_A``."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _check(directory: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises for the first array that is not on both sides alike."""
    remedy = (
        "restore into an adapter that init_adapter made for the same model with the same config "
        f"(see {directory / _ADAPTER})"
    )
    for path, leaf in wanted.items():
        if path not in saved:
            raise ValueError(f"the adapter in {directory} has no '{path}'; {remedy}")
        found = saved[path]
        if tuple(found.shape) != tuple(leaf.shape):
            raise ValueError(
                f"'{path}' has shape {tuple(found.shape)} in {directory}, and "
                f"{tuple(leaf.shape)} is expected; {remedy}"
            )
        if found.dtype != leaf.dtype:
            raise ValueError(
                f"'{path}' is {found.dtype} in {directory}, and {leaf.dtype} is expected; {remedy}"
            )
    for path in saved:
        if path not in wanted:
            raise ValueError(f"the adapter in {directory} also has '{path}'; {remedy}")
