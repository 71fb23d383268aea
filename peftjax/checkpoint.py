"""Adapters on disk through Orbax: the adapter's arrays alone, never the model's."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from peftjax.adapter import Adapter
from peftjax.methods import XLoraConfig, config_from
from peftjax.sites import Leaf, Site, Sites

_ARRAYS = "arrays"
_CONFIG = "adapter_config.json"
_STRUCTURE = "adapter_structure.json"


def save_adapter(directory: str | Path, adapter: Adapter) -> Path:
    """Writes an adapter's params and buffers, and as JSON beside them its config and its sites.

    An adapter saved in the same directory before is replaced; other files there are left alone.

    Args:
      directory: where to write; made if it does not exist.
      adapter: the adapter.

    Returns:
      The directory, absolute.
    """
    directory = Path(directory).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / _ARRAYS, _arrays(adapter), force=True)
        checkpointer.wait_until_finished()
    if jax.process_index() == 0:
        for name, data in ((_CONFIG, adapter.config.to_dict()), (_STRUCTURE, _structure(adapter))):
            # What is in a field keeps its order, which means something for patterns and experts.
            text = json.dumps(dict(sorted(data.items())), indent=2)
            (directory / name).write_text(text + "\n", encoding="utf-8")
    return directory


def restore_adapter(directory: str | Path, like: Adapter | None = None) -> Adapter:
    """Reads an adapter that ``save_adapter`` wrote.

    Args:
      directory: where it was written.
      like: an adapter of the same config for the same model. Its arrays say what to expect and
        may be ``jax.ShapeDtypeStruct``s; where they carry a sharding, the result has it too. None
        takes the adapter as it was written, on the first device: whether it fits a model shows
        when it is used.

    Returns:
      ``like`` with the arrays from disk.

    Raises:
      FileNotFoundError: no adapter was saved there.
      ValueError: the saved arrays are not those of ``like``; the message names the first one.
    """
    directory = Path(directory).absolute()
    if not (directory / _ARRAYS).is_dir():
        raise FileNotFoundError(f"no adapter in {directory}; save_adapter writes one")
    if like is None:
        like = _as_written(directory)
    wanted = jax.tree.map(_abstract, _arrays(like))
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(directory / _ARRAYS).item_metadata.tree
        _check(directory, _by_path(saved), _by_path(wanted))
        arrays = checkpointer.restore(directory / _ARRAYS, wanted)
    return like.replace(
        params=_refilled(like.params, arrays["params"]),
        buffers=_refilled(like.buffers, arrays["buffers"]),
    )


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


def _as_written(directory: Path) -> Adapter:
    """An adapter in the structure that was saved, with the shapes of its arrays alone."""
    try:
        config, structure = (
            json.loads((directory / name).read_text(encoding="utf-8"))
            for name in (_CONFIG, _STRUCTURE)
        )
        sites = Sites(tuple(_site(record) for record in structure["sites"]))
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
        if isinstance(own, XLoraConfig):
            # A config takes null for what is not given, and here it is a value.
            mixture = {"scaling_pass_value": config["scaling_pass_value"]}
            mixture["experts"] = tuple(config_from(each) for each in structure["experts"])
            own = dataclasses.replace(own, **mixture, head=structure["head"])
        return Adapter(**arrays, key=None, config=own, sites=sites, saved=saved)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{directory} does not say what its adapter is ({type(error).__name__}: {error}): "
            f"restore it into one that init_adapter made, with like="
        ) from error


def _site(record: Mapping[str, Any]) -> Site:
    return Site(**_values(record))


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
        "restore into an adapter that init_adapter made for the same model with the same config"
        + (f" (see {directory / _CONFIG})" if (directory / _CONFIG).is_file() else "")
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
