"""The flags of ``peftjax convert``, checked before anything heavy starts."""

import dataclasses
import fnmatch
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from peftjax.cli.errors import UsageError
from peftjax.cli.options import EXTRA, optional

if TYPE_CHECKING:
    from rich.console import Console

Form = Literal["Orbax", "PEFT"]

_RUN = "adapter"  # where quickstart puts the adapter of a run
CONFIG = "adapter_config.json"  # PEFT's
_ORBAX = "adapter.json"
_WEIGHTS = ("*.safetensors", "*.msgpack", "*.bin")
# What adapters and models consist of: --overwrite removes nothing else.
_OWN = (
    *(_ORBAX, "arrays", "arrays-2"),
    *(*_WEIGHTS, "*.index.json", "*config.json"),
    *("*token*.json", "chat_template.*", "vocab.*", "merges.txt"),
    *("*.model", "*.spm", "*.jinja", "*.bpe", "*.codes"),
    *("README.md", "LICENSE*", ".gitattributes"),
)
_HOLDS = f"an Orbax adapter has {_ORBAX}, PEFT's has adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert an adapter from JAX to PEFT or back, or merge it into its model.

    What happens is seen from what SOURCE holds:
      an Orbax adapter  becomes a PEFT adapter, which torch reads: no model needed
      a PEFT adapter    becomes an Orbax adapter: with --model, whose weights it goes on
      either            with --model and --merge, a whole model that needs no adapter

    An Orbax adapter is what peftjax.checkpoint.save_adapter writes; the directory of a quickstart
    run counts too. A model is a directory as transformers saves it; its names and shapes are
    enough, and its weights are read only where they matter.

    Examples:
      peftjax convert peftjax-quickstart for-torch
      peftjax convert run/adapter for-torch --names gpt2 --base-model gpt2
      peftjax convert from-torch for-jax --model path/to/llama
      peftjax convert from-torch whole --model path/to/bert --merge
      peftjax convert run/adapter for-torch --plain-lora --rank 16 --model path/to/bert
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Directory of the adapter."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Directory to make. It appears when all of it is written."""

    model: Annotated[Path | None, optional("DIR", "none")] = None
    """Directory of the adapter's model, as transformers saves it."""

    merge: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the model with the adapter in its weights, for torch's transformers."""

    architecture: Annotated[str | None, optional("NAME", "what its config.json says")] = None
    """Class of the model, such as BertForSequenceClassification."""

    names: Annotated[str | None, optional("TYPE", "--model's; without it the same names")] = None
    """Model type whose modules have other names or layouts in torch, such as gpt2."""

    base_model: Annotated[str | None, optional("NAME", "what the adapter says")] = None
    """Name or path of the base model, for PEFT's config: torch finds it by that."""

    plain_lora: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Turn any method into plain LoRA: PiSSA and OLoRA need no base then, LoHa runs anywhere."""

    rank: Annotated[int | None, optional("INT", "as many as it takes to be exact")] = None
    """Highest rank of --plain-lora. DoRA and IA3, of full rank, need one."""

    allow_foreign: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write what torch's PEFT cannot run as well: peftjax reads it back."""

    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace OUT, all of it, if it is an adapter or a model and nothing else."""

    def run(self, console: "Console") -> None:
        """Checks the flags, then does the job."""
        source = check(self)
        from peftjax.cli.converting import convert

        convert(self, source, console)


class Source(NamedTuple):
    """An adapter on disk: its directory, and whose files they are."""

    directory: Path
    form: Form


def find_source(directory: Path) -> Source:
    """The adapter in a directory, or in that of a quickstart run.

    Raises:
      UsageError: there is none, or one of each form.
    """
    if not directory.is_dir():
        raise UsageError(f"no directory {directory}")
    for place in (directory, directory / _RUN):
        orbax = (place / _ORBAX).is_file()
        peft = any((place / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin"))
        if orbax and peft:
            raise UsageError(
                f"{place} holds an adapter of Orbax ({_ORBAX}) and one of PEFT (adapter_model.*): "
                "move one of them away"
            )
        if orbax or peft:
            return Source(place, "Orbax" if orbax else "PEFT")
    found = sorted(path.name for path in directory.iterdir())
    some = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    raise UsageError(f"{directory} holds no adapter but {some or 'nothing'}: {_HOLDS}")


def check(options: Convert) -> Source:
    """Finds the adapter; raises ``UsageError`` for the first thing that cannot work."""
    source = find_source(options.source)
    if _is_mixture(source):
        raise UsageError(
            f"{source.directory} holds an X-LoRA adapter, of several that lie in directories of "
            "their own: use save_pretrained and load_pretrained in Python, or convert one expert"
        )
    if options.model is None:
        if options.merge:
            raise UsageError("--merge: into which model? Add --model DIR")
        if options.architecture is not None:
            raise UsageError("--architecture is that of a model: add --model DIR")
        if source.form == "PEFT":
            raise UsageError(
                f"{source.directory} holds a PEFT adapter, which does not say what the weights of "
                "its model look like in JAX: add --model DIR"
            )
    _check_flags(options, source)
    _check_out(options, source)
    if options.model is not None:
        _check_model(options.model)
    return source


def _is_mixture(source: Source) -> bool:
    """Whether the config of an adapter, of either form, is X-LoRA's."""
    of_orbax = source.form == "Orbax"
    data = read_json(source.directory / (_ORBAX if of_orbax else CONFIG))
    config = data.get("config") if of_orbax else data
    return isinstance(config, dict) and config.get("peft_type") == "XLORA"


def read_json(path: Path) -> dict[str, Any]:
    """What an object of JSON says; nothing where it cannot be read, as who needs it will say."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _check_flags(options: Convert, source: Source) -> None:
    """Raises for a flag that would do nothing."""
    if options.rank is not None and not options.plain_lora:
        raise UsageError("--rank is that of --plain-lora: add it, or leave --rank out")
    if options.rank is not None and options.rank < 1:
        raise UsageError(f"--rank must be above 0, not {options.rank}")
    if options.merge and options.plain_lora:
        raise UsageError("--plain-lora: with --merge no adapter is written; leave one of them out")
    if options.merge or source.form == "PEFT":
        given = {
            "--base-model": options.base_model is not None,
            "--allow-foreign": options.allow_foreign,
        }
        for flag in (flag for flag, is_given in given.items() if is_given):
            what = "a whole model" if options.merge else "an Orbax adapter"
            raise UsageError(f"{flag} is for PEFT's files, and this writes {what}: leave it out")


def _check_model(directory: Path) -> None:
    """Raises unless it is a model's directory and transformers can be asked about it."""
    if not directory.is_dir():
        raise UsageError(f"--model: no directory {directory}")
    if not (directory / "config.json").is_file():
        raise UsageError(f"--model: {directory} has no config.json; it must be a whole model's")
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(f"--model needs transformers: {EXTRA}") from None
    if int(version.partition(".")[0]) >= 5:
        raise UsageError(
            f"--model needs the Flax models of transformers 4; this is {version}: {EXTRA}"
        )


def _check_out(options: Convert, source: Source) -> None:
    """Raises if something is in the way, or in danger."""
    out = options.out.resolve()
    for what in (source.directory, *([options.model] if options.model else [])):
        if out in (what.resolve(), *what.resolve().parents):
            raise UsageError(f"{options.out} holds {what}, which is read: write somewhere else")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{options.out} is a file, not a directory")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not options.overwrite:
        raise UsageError(f"{options.out} is not empty: name another, or add --overwrite")
    if not _is_adapter(out) and not _is_model(out):
        raise UsageError(
            f"--overwrite: {options.out} is neither an adapter nor a model, so it stays as it is"
        )
    other = [path.name for path in sorted(out.iterdir()) if not _matches(path, _OWN)]
    if other:
        raise UsageError(
            f"--overwrite: {options.out} also holds {', '.join(other[:5])}, so it stays as it is: "
            "move that away, or name another"
        )


def _is_adapter(directory: Path) -> bool:
    configs = read_json(directory / CONFIG), read_json(directory / _ORBAX).get("config")
    return any(isinstance(config, dict) and "peft_type" in config for config in configs)


def _is_model(directory: Path) -> bool:
    is_one = "model_type" in read_json(directory / "config.json")
    return is_one and any(_matches(path, _WEIGHTS) for path in directory.iterdir())


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)
