"""What a quickstart run came to: its numbers, as tables and as JSON."""

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from peftjax import report
from peftjax.cli import mixture
from peftjax.cli.finetune import Trained
from peftjax.cli.mixture import Mixed, Mixture
from peftjax.cli.options import Quickstart
from peftjax.cli.task import Task
from peftjax.trees import leaf_bytes, leaves_of

GOAL_POINTS = 4.0

LIBRARIES = ("peftjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
      probe_accuracy: held-out accuracy of the linear probe, between 0 and 1.
      accuracy: held-out accuracy of the adapted model, between 0 and 1.
      gain_points: the difference, in percentage points.
      gain_error: its standard error over the held-out texts, in percentage points.
      trainable_parameters: numbers the adapter trains.
      total_parameters: those and all frozen ones.
      adapter_bytes: bytes of the adapter's arrays.
      model_bytes: bytes of the frozen arrays.
      argument_bytes: bytes of all arguments of the compiled training step: those, the adapter, the
        optimizer's state and a batch.
      seconds: time of the whole run but the download.
      phase_seconds: time by phase.
      train_texts: how many texts were trained on.
      held_out_texts: how many texts were measured on.
      labels: names of the labels.
      held_out_curve: (step, held-out accuracy).
      ranks: rank of each module, where they were allocated.
      mixture: what a mix of experts is made of and is compared with; None of one adapter.
      settings: all flags, as ``Quickstart.settings`` gives them.
      versions: of Python and the libraries.
    """

    probe_accuracy: float
    accuracy: float
    gain_points: float
    gain_error: float
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    model_bytes: int
    argument_bytes: int
    seconds: float
    phase_seconds: dict[str, float]
    train_texts: int
    held_out_texts: int
    labels: tuple[str, ...]
    held_out_curve: tuple[tuple[int, float], ...]
    ranks: dict[str, int]
    mixture: Mixture | None
    settings: dict[str, Any]
    versions: dict[str, str]

    def to_json(self) -> str:
        """The result as JSON, indented."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def conclude(
    options: Quickstart,
    task: Task,
    trained: Trained,
    phase_seconds: Mapping[str, float],
    seconds: float,
) -> Result:
    """Builds the result of a run.

    Args:
      options: the flags.
      task: what was worked on.
      trained: the trained adapter and its answers on the held-out texts.
      phase_seconds: time by phase.
      seconds: time of the whole run, the download included.
    """
    right = (np.argmax(trained.logits, axis=-1) == task.held_out.labels).astype(float)
    probe_right = (np.argmax(task.probe_logits, axis=-1) == task.held_out.labels).astype(float)
    # Both were asked the same texts, so the error of the difference is that of paired answers.
    gains = right - probe_right
    trainable = trained.parameters
    frozen = sum(leaf.size for leaf in leaves_of(task.params))
    return Result(
        probe_accuracy=float(np.mean(probe_right)),
        accuracy=float(np.mean(right)),
        gain_points=100 * float(np.mean(gains)),
        gain_error=100 * float(np.std(gains)) / math.sqrt(len(gains)),
        trainable_parameters=trainable,
        total_parameters=frozen + trainable,
        adapter_bytes=leaf_bytes((trained.adapter.params, trained.adapter.buffers)),
        model_bytes=leaf_bytes(task.params),
        argument_bytes=trained.argument_bytes,
        seconds=seconds - phase_seconds.get("download", 0.0),
        phase_seconds=dict(phase_seconds),
        train_texts=len(task.train),
        held_out_texts=len(task.held_out),
        labels=task.labels,
        held_out_curve=tuple(trained.history.held_out),
        ranks=dict(trained.ranks),
        mixture=trained.mixture if isinstance(trained, Mixed) else None,
        settings=options.settings(),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def tables(result: Result) -> Table:
    """The numbers of a run and, beside them, where the time went."""
    settings = result.settings
    share = result.trainable_parameters / result.total_parameters
    dtype = settings["base_dtype"]
    base = "" if dtype == "float32" else f", {dtype} base"
    outcome = report.facts(
        f"{named(settings['method'], settings['rank'])}, {settings['steps']} steps{base}",
        {
            "probe on frozen features": f"{result.probe_accuracy:.1%}",
            "with the adapter": f"[bold]{result.accuracy:.1%}[/]",
            "gain": f"[bold]{result.gain_points:+.1f}[/] ± {result.gain_error:.1f} points",
            "held-out texts": f"{result.held_out_texts:,}",
        },
        last={
            "trained parameters": f"{result.trainable_parameters:,}",
            "of all parameters": f"{share:.2%} of {result.total_parameters:,}",
            "adapter": size(result.adapter_bytes),
            "model": size(result.model_bytes),
            "all a training step reads": size(result.argument_bytes),
        },
    )
    times = report.facts(
        "seconds",
        {phase: f"{spent:.1f}" for phase, spent in result.phase_seconds.items()},
        last={"all but download": f"{result.seconds:.1f}"},
    )
    beside = Table.grid(padding=(0, 2))
    beside.add_row(outcome, times)
    if result.mixture is None:
        return beside
    below = Table.grid()
    below.add_row(beside)
    below.add_row(mixture_table(result.mixture))
    return below


def mixture_table(outcome: Mixture) -> Table:
    """Each expert alone and whatever else answered; and what the gate gives the expert."""
    table = Table(
        title="held-out accuracy, and what the gate gives",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("expert", no_wrap=True)
    for heading in ("all texts", "its topic", "given there", "elsewhere"):
        table.add_column(heading, justify="right")
    texts = np.asarray(outcome.held_out_texts, float)
    scalings = np.array([own or [0.0] * len(texts) for own in outcome.scalings])
    for place, name in enumerate(outcome.experts):
        own = outcome.accuracy_by_slice[name][place]
        others = np.delete(texts, place)
        elsewhere = np.delete(scalings[:, place], place) @ others / max(others.sum(), 1)
        table.add_row(
            name,
            f"{outcome.accuracy[name]:.1%}",
            "" if own is None else f"{own:.1%}",
            "" if own is None else f"{scalings[place, place]:.0%}",
            f"{elsewhere:.0%}",
        )
    table.add_section()
    for name in (mixture.PROBE, mixture.UNIFORM, mixture.TOLD, mixture.GATED):
        style = "bold" if name == mixture.GATED else ""
        table.add_row(name, f"{outcome.accuracy[name]:.1%}", style=style)
    return table


def named(method: str, rank: int | None) -> str:
    """A method for people, with its rank if it has one.

    Example:
      >>> named("lora", 8), named("ia3", None)
      ('lora, rank 8', 'ia3')
    """
    return method if rank is None else f"{method}, rank {rank}"


def verdict(result: Result) -> str:
    """The gain in words, from this run's own measurement."""
    words = f"{result.gain_points:+.1f} points over the probe"
    if result.mixture is not None:
        own = result.mixture
        over = f"{own.gain_points:+.1f} ± {own.gain_error:.1f} points over its best single expert"
        return f"{over}, {own.best_expert}; {words}."
    if result.gain_points >= GOAL_POINTS:
        return f"{words}: the goal of {GOAL_POINTS:.0f} or more is reached."
    # A short run, another task, method or base promises nothing.
    usual = Quickstart()
    settings = result.settings
    other = settings["data"] or settings["model"] or settings["method"] != usual.method
    other = other or settings["base_dtype"] != usual.base_dtype
    if settings["steps"] < usual.steps or other:
        return f"{words}."
    return f"{words}: the goal of {GOAL_POINTS:.0f} or more is missed."


def size(count: int) -> str:
    """Bytes for people.

    Example:
      >>> size(299_532), size(90_870_000)
      ('299.5 kB', '90.9 MB')
    """
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
