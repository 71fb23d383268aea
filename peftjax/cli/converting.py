"""The ``convert`` job: an adapter read, turned into what was asked for, and written whole."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import safe_open

import peftjax
from peftjax.adapter import Adapter, check_leaves
from peftjax.checkpoint import restore_adapter, save_adapter
from peftjax.cli import models
from peftjax.cli.convert import CONFIG, Convert, Source, read_json
from peftjax.cli.display import Display
from peftjax.cli.errors import CommandError, UsageError
from peftjax.cli.models import Model
from peftjax.cli.result import size
from peftjax.interop.pretrained import TENSORS
from peftjax.methods import config_from
from peftjax.trees import leaf_paths

_MOST = 3  # problems shown

# What the library calls an argument, and its flag here.
_FLAGS = {
    "allow_foreign=True": "--allow-foreign",
    "mend names=": "choose other --names or another --architecture",
    "change names=": "choose other --names",
    "make one with find_sites and init_adapter on these, or pass the params it was made for": (
        "choose another --model or --architecture"
    ),
    "pass `rank_or_energy`, a rank or 1.0 for all of it": "add --rank",
    "pass the base's params": "add --model",
}


def convert(options: Convert, source: Source, console: Console) -> None:
    """Does the job and shows what came of it.

    Args:
      options: the checked flags.
      source: the adapter.
      console: where progress and outcome are shown.

    Raises:
      CommandError: something the user can put right; nothing is written then.
    """
    display = Display(console)
    names = None if options.names is None else models.names_of(options.names)
    model = None
    if options.model is not None:
        with display.phase("model", "Tracing the model"), _as_usage():
            model = models.trace(options.model, options.architecture, names)
        names = model.names
        display.done("model", f"{model.architecture}, {len(model.sites)} weights to adapt")
    adapter = _read(source, model, display)
    display.done("adapter", f"{_described(adapter)}, from {source.form}'s files")
    if options.plain_lora:
        adapter = _plain(adapter, options.rank, model, display)

    tensors = None
    if options.merge:
        assert model is not None
        weights = _weights(model, adapter, display)
        with display.phase("merge", "Merging"), _as_usage():
            merged = peftjax.merge(weights, adapter, safe=True)
            tensors = peftjax.base_state_dict(merged, model.sites, model.names)
        before, after = leaf_paths(weights), leaf_paths(merged)
        changed = sum(after[path] is not array for path, array in before.items())
        display.done("merge", f"{changed} of {len(before)} arrays changed")
    writing = display.phase("write", f"Writing {options.out}")
    with writing, _as_usage(), _staged(options.out) as new:
        if tensors is not None and model is not None:
            models.save_model(new, model, tensors)
        elif source.form == "PEFT":
            save_adapter(new, adapter)
        else:
            peftjax.save_pretrained(
                new,
                adapter,
                names=names,
                base_model_name_or_path=options.base_model,
                allow_foreign=options.allow_foreign,
            )
    display.done("write", str(options.out))
    _show(options, source, adapter, model, console)


def _read(source: Source, model: Model | None, display: Display) -> Adapter:
    """The adapter, checked against the model."""
    if source.form == "Orbax":
        with display.phase("adapter", f"Reading {source.directory}"), _as_usage():
            adapter = restore_adapter(source.directory)
            if model is not None:
                check_leaves(leaf_paths(model.shapes), adapter.sites, adapter.saved)
        return adapter
    assert model is not None
    params, missing = None, frozenset[str]()
    if _starts_from_weights(source.directory):
        with display.phase("weights", "Loading the weights"), _as_usage():
            params, missing = models.load_weights(model)
        display.done("weights", f"{model.directory}, out of which the adapter started")
    with display.phase("adapter", f"Reading {source.directory}"), _as_usage():
        adapter = peftjax.load_pretrained(source.directory, model.sites, params, names=model.names)
        models.check_weights(model, adapter, missing)
    return adapter


def _starts_from_weights(directory: Path) -> bool:
    """Whether PEFT's files lack the start of an adapter, as those of PiSSA and OLoRA do."""
    try:
        config = config_from(read_json(directory / CONFIG))
    except ValueError:
        return False  # load_pretrained says what is wrong
    return config.method.buffers_read_weight(config)


def _plain(adapter: Adapter, rank: int | None, model: Model | None, display: Display) -> Adapter:
    """Plain LoRA that changes the weights as the adapter does."""
    config, params = adapter.config, None
    if config.method.reads_weight(config) or isinstance(config, peftjax.IA3Config):
        if model is None:
            raise UsageError(
                f"--plain-lora: what {title(adapter)} changes depends on the weights: add --model"
            )
        params = _weights(model, adapter, display)
    with display.phase("lora", "Turning it into plain LoRA"), _as_usage():
        adapter = peftjax.convert_to_lora(adapter, rank, params)
    display.done("lora", _described(adapter))
    return adapter


def _weights(model: Model, adapter: Adapter, display: Display) -> Any:
    """The model's params, all there but for what the adapter holds itself."""
    with display.phase("weights", "Loading the weights"), _as_usage():
        params, missing = models.load_weights(model)
        models.check_weights(model, adapter, missing)
    display.done("weights", str(model.directory))
    return params


@contextlib.contextmanager
def _as_usage() -> Iterator[None]:
    """Makes one clear line of what the library says about files or arguments."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise UsageError(_in_a_line(error)) from error
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error


def _in_a_line(error: Exception) -> str:
    """An error of the library in one line, with our flags for its arguments."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or ["?"]
    more = [f"and {len(rest) - _MOST} more"] if len(rest) > _MOST else []
    line = " ".join([first, "; ".join([*rest[:_MOST], *more])]).strip()
    for words, flag in _FLAGS.items():
        line = line.replace(words, flag)
    return line


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A new directory that takes the place of ``out`` when the block ends well."""
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as hidden:
            new, old = Path(hidden) / "new", Path(hidden) / "old"
            new.mkdir()  # unlike the hidden one, for everybody to read
            yield new
            if out.exists():
                os.replace(out, old)
            try:
                os.replace(new, out)
            except OSError:
                if old.exists():
                    os.replace(old, out)
                raise
    except OSError as error:
        raise CommandError(f"cannot write {out}: {error.strerror or error}") from error


def title(adapter: Adapter) -> str:
    """An adapter's method for people: ``LoRA, rank 8``."""
    config = adapter.config
    name = type(config).__name__.removesuffix("Config").replace("Lora", "LoRA")
    start = str(getattr(config, "init_lora_weights", ""))
    for prefix, word in (("pissa", "PiSSA"), ("olora", "OLoRA")):
        name = word if start.startswith(prefix) else name
    name = "DoRA" if getattr(config, "use_dora", False) else name
    rank = getattr(config, "r", None)
    patterned = " or as its rank_pattern says" if getattr(config, "rank_pattern", None) else ""
    return name if rank is None else f"{name}, rank {rank}{patterned}"


def _described(adapter: Adapter) -> str:
    modules = len(adapter.sites)
    whole = f", {len(adapter.saved)} whole arrays" if adapter.saved else ""
    return f"{title(adapter)}, on {modules} module{'s' * (modules != 1)}{whole}"


def _show(
    options: Convert, source: Source, adapter: Adapter, model: Model | None, console: Console
) -> None:
    """What was written, and what to do with it."""
    parameters = sum(x.size for own in adapter.params.values() for x in own.values())
    kinds = sorted({name.rpartition(".")[2] for name in adapter.sites})
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "method": title(adapter),
        "modules": f"{len(adapter.sites)} ({', '.join(kinds[:6])}{', ...' * (len(kinds) > 6)})",
        "saved whole": ", ".join(leaf.path for leaf in adapter.saved[:4])
        + ", ..." * (len(adapter.saved) > 4),
        "parameters": f"{parameters:,}",
        "written": "\n".join(f"{name}  {size(n)}" for name, n in _written(options.out)),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(value))
    console.print()
    console.print(table)
    console.print()
    start = str(getattr(adapter.config, "init_lora_weights", ""))
    if start.startswith("pissa_niter") and source.form == "Orbax" and not options.merge:
        console.print(
            "Note: whoever reads this draws its randomised SVD anew; --plain-lora keeps it exact.",
            style="yellow",
            soft_wrap=True,
        )
    if _is_foreign(options.out):
        console.print("Note: torch's PEFT cannot run it.", style="yellow")
    console.print("Next, in Python:", style="bold")
    for line in _next(options, source, model):
        console.print(f"  {line}", markup=False, soft_wrap=True)


def _is_foreign(out: Path) -> bool:
    """Whether PEFT's files, if it is they that were written, say that torch cannot run them."""
    path = out / TENSORS
    if not path.is_file():
        return False
    with safe_open(path, framework="numpy") as file:
        return "peftjax" in file.metadata()


def _written(out: Path) -> list[tuple[str, int]]:
    """What stands in a directory now, with its size in bytes."""
    return [
        (path.name, sum(x.stat().st_size for x in (path, *path.rglob("*")) if x.is_file()))
        for path in sorted(out.iterdir())
    ]


def _next(options: Convert, source: Source, model: Model | None) -> tuple[str, str]:
    """The two lines of Python that load what was written."""
    out = json.dumps(str(options.out), ensure_ascii=False)
    if options.merge and model is not None:
        name = model.architecture
        return f"from transformers import {name}", f"model = {name}.from_pretrained({out})"
    if _is_foreign(options.out):
        names = "" if options.names is None else f", names=module_names({options.names!r})"
        loaded = f"adapter = load_pretrained({out}, find_sites(apply_fn, params, x){names})"
        return "from peftjax import find_sites, load_pretrained, module_names", loaded
    if source.form == "Orbax":
        return "from peft import PeftModel", f"model = PeftModel.from_pretrained(model, {out})"
    return "from peftjax.checkpoint import restore_adapter", f"adapter = restore_adapter({out})"
