"""The ``quickstart`` job: a real model, real text, one adapter, and what it gained."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import peftjax
from peftjax import checkpoint, report
from peftjax.adapter import Adapter
from peftjax.cli import encoder, finetune, sentiment
from peftjax.cli.display import Display
from peftjax.cli.errors import CommandError
from peftjax.cli.finetune import Adapted, History
from peftjax.cli.options import Quickstart
from peftjax.cli.result import Result, conclude, named, tables, verdict
from peftjax.cli.sentiment import Tokens
from peftjax.cli.task import Task, prepare

COMPARED = 512  # held-out texts on which the restored and the merged adapter are asked again
LOGIT_TOLERANCE = 1e-4  # of the largest logit: the same float32 sums in another order

# The config of each method: of the flags, the model's own names of modules, and where it goes.
METHODS: dict[str, Callable[..., Any]] = {
    "lora": lambda options, names, **where: peftjax.LoraConfig(
        r=options.recipe.rank, lora_alpha=options.recipe.alpha, **where
    ),
    "dora": lambda options, names, **where: peftjax.LoraConfig(
        r=options.recipe.rank, lora_alpha=options.recipe.alpha, use_dora=True, **where
    ),
    "loha": lambda options, names, **where: peftjax.LoHaConfig(
        r=options.recipe.rank, alpha=options.recipe.alpha, **where
    ),
    "hra": lambda options, names, **where: peftjax.HRAConfig(r=options.recipe.rank, **where),
    "ia3": lambda options, names, **where: peftjax.IA3Config(
        feedforward_modules=[names["output"]], **where
    ),
    # Half as many ranks again to choose from, chosen over the first two thirds of the steps.
    "adalora": lambda options, names, **where: peftjax.AdaLoraConfig(
        target_r=options.recipe.rank,
        init_r=-(-3 * options.recipe.rank // 2),
        lora_alpha=options.recipe.alpha,
        total_step=options.steps,
        tinit=options.steps // 10,
        tfinal=options.steps // 3,
        deltaT=max(1, options.steps // 100),
        **where,
    ),
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained adapter and what it answers.

    Attributes:
      adapter: the adapter.
      predict: ``predict(adapter, texts)`` gives its logits.
      logits: those of this one.
      history: how training went.
      ranks: the rank of each module, where they were allocated.
      budget: the number of triplets allowed after each step, likewise.
    """

    adapter: Adapter
    predict: Callable[[Adapter, Tokens], np.ndarray]
    logits: np.ndarray
    history: History
    ranks: dict[str, int]
    budget: list[int]


def run(options: Quickstart, console: Console) -> Result:
    """Does the whole job and shows the result.

    Args:
      options: the checked flags.
      console: where progress and result are shown.

    Returns:
      The result, as printed and written.

    Raises:
      CommandError: something the user can put right, or a check that failed.
    """
    start = time.perf_counter()
    display = Display(console)
    task = prepare(options, display)
    trained = fine_tune(options, task, display)
    verify(options, task, trained, display)
    with display.phase("plot", "Drawing the curves"):
        curves = report.training_curves(
            options.output / "curves.png",
            loss=trained.history.loss,
            accuracy=trained.history.accuracy,
            held_out=trained.history.held_out,
            baseline=encoder.accuracy(task.probe_logits, task.held_out.labels),
            title=f"{named(options.method, options.recipe.rank)}, on {task.title}",
        )
        pictures = [curves]
        if trained.ranks:
            pictures.append(
                report.rank_allocation(
                    options.output / "ranks.png",
                    ranks=trained.ranks,
                    budget=trained.budget,
                    title=f"{named(options.method, options.recipe.rank)}, on {task.title}",
                )
            )
    display.done("plot", ", ".join(map(str, pictures)))
    result = conclude(
        options,
        task,
        trained.adapter,
        trained.logits,
        trained.history.held_out,
        trained.ranks,
        display.seconds,
        time.perf_counter() - start,
    )
    console.print()
    console.print(tables(result))
    console.print(verdict(result), style="bold")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(result.to_json(), encoding="utf-8")
        console.print(f"Numbers and settings: {options.json}", markup=False)
    console.print(_next(options), markup=False)
    return result


def _next(options: Quickstart) -> str:
    """What to do after the run."""
    if options.data is None:
        return "Next: your own texts, with `peftjax quickstart --data FILE.csv`."
    return f"Next: `peftjax.checkpoint.restore_adapter` reads {options.output / 'adapter'} back."


def attach(options: Quickstart, task: Task) -> tuple[Adapter, Adapted]:
    """An untrained adapter for the model, and the model as a function that takes one."""
    apply_fn = task.encoder.classify
    few = task.train[:2]
    sites = peftjax.find_sites(apply_fn, task.params, few.ids, few.mask)
    config = METHODS[options.method](
        options,
        task.modules,
        target_modules=[task.modules[part] for part in options.recipe.parts],
        modules_to_save=["classifier"],
    )
    adapter = peftjax.init_adapter(jax.random.key(options.seed), config, sites, task.params)
    # Training gives these arrays away step by step, and the classifier's may be the model's own.
    adapter = adapter.replace(params=jax.tree.map(jnp.copy, adapter.params))
    return adapter, peftjax.adapt(apply_fn)


def fine_tune(options: Quickstart, task: Task, display: Display) -> Trained:
    """Puts an adapter on the model and trains it; its classifier starts as the probe."""
    with display.phase("adapter", "Tracing and compiling the adapted model"):
        adapter, adapted = attach(options, task)
        forward = jax.jit(adapted)

        def predict(adapter: Adapter, texts: Tokens) -> np.ndarray:
            return encoder.predict(
                lambda ids, mask: forward(task.params, adapter, ids, mask), texts
            )

        untrained = predict(adapter, task.held_out[: encoder.PREDICTION_BATCH])
        _agree("the untrained adapter", untrained, task.probe_logits)
        transformation = finetune.optimizer(options.steps, options.recipe.learning_rate)
        allocates = options.method == "adalora"
        if allocates:
            transformation = peftjax.rank_allocator(transformation, adapter)
        state = transformation.init(adapter.params)
        example = task.train[np.arange(options.batch_size) % len(task.train)]
        step = finetune.compile_step(
            adapted,
            transformation,
            task.params,
            adapter,
            example,
            peftjax.orthogonality if allocates else None,
        )
    targets = ", ".join(task.modules[part] for part in options.recipe.parts)
    where = f"{len(adapter.params) - 1} modules ({targets}) and the classifier"
    display.done("adapter", f"{named(options.method, options.recipe.rank)}, on {where}")

    def measure(adapter: Adapter) -> float:
        with display.timed("evaluate"):
            return encoder.accuracy(predict(adapter, task.held_out), task.held_out.labels)

    budget: list[int] = []

    def on_step(history: History, state: Any) -> None:
        advance(len(history.loss), _progress(history))
        if allocates:
            budget.append(int(state.budget))

    every = max(50, -(-options.steps // 3))
    with display.bar("Training", options.steps, every=max(1, options.steps // 6)) as advance:
        adapter, state, history = finetune.train(
            step,
            task.params,
            adapter,
            state,
            sentiment.batches(task.train, options.batch_size, options.steps, options.seed),
            measure_at=range(every, options.steps, every),
            measure=measure,
            on_step=on_step,
        )
    display.seconds["train"] = sum(history.seconds)
    pace = f"{1000 * float(np.median(history.seconds)):.0f} ms each"
    display.done("train", f"{options.steps} steps of {options.batch_size} texts, {pace}")

    ranks: dict[str, Any] = {}
    if allocates:
        with display.phase("prune", "Dropping the triplets outside the budget"):
            ranks = peftjax.ranks(adapter, state)
            whole = predict(adapter, task.held_out[: encoder.PREDICTION_BATCH])
            adapter = peftjax.prune(adapter, state)
            _agree("the pruned adapter", predict(adapter, task.held_out[: len(whole)]), whole)
        left = f"{min(ranks.values())} to {max(ranks.values())} in each module"
        display.done("prune", f"{sum(ranks.values())} triplets are left, {left}")

    with display.phase("evaluate", "Measuring on held-out texts"):
        logits = predict(adapter, task.held_out)
    accuracy = encoder.accuracy(logits, task.held_out.labels)
    display.done("evaluate", f"{accuracy:.1%} right on held-out texts")
    # At step 0 the adapter changes nothing, as was just seen, so the probe's accuracy is the start.
    start = (0, encoder.accuracy(task.probe_logits, task.held_out.labels))
    history.held_out[:] = [start, *history.held_out, (options.steps, accuracy)]
    return Trained(adapter, predict, logits, history, ranks, budget)


def _progress(history: History) -> str:
    """What the bar says beside the steps."""
    loss, accuracy = np.mean(history.loss[-20:]), np.mean(history.accuracy[-20:])
    return f"loss {loss:.3f}  accuracy {accuracy:.1%}  {1000 * history.seconds[-1]:.0f} ms/step"


def verify(options: Quickstart, task: Task, trained: Trained, display: Display) -> None:
    """Saves the adapter alone, restores it, merges it, and compares what each of them answers.

    Raises:
      CommandError: the restored or merged model answers something else.
    """
    texts = task.held_out[:COMPARED]
    expected = trained.logits[:COMPARED]
    place = options.output / "adapter"
    with display.phase("save", "Saving and restoring the adapter"):
        checkpoint.save_adapter(place, trained.adapter)
        shapes = jax.eval_shape(lambda adapter: adapter, trained.adapter)
        restored = checkpoint.restore_adapter(place, shapes)
        if not np.array_equal(trained.predict(restored, texts), expected):
            raise CommandError(f"the adapter restored from {place} answers differently")
    display.done("save", "the adapter alone; restored, it gives the same logits to the last bit")

    with display.phase("merge", "Merging the adapter into the model"):
        params = peftjax.merge(task.params, trained.adapter)
        plain = jax.jit(task.encoder.classify)
        merged = encoder.predict(lambda ids, mask: plain(params, ids, mask), texts)
        difference = _agree("the merged model", merged, expected)
    display.done("merge", f"merged, the plain model gives the same logits within {difference:.0e}")


def _agree(what: str, logits: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference between logits; raises where it is more than rounding."""
    difference = float(np.max(np.abs(logits - expected[: len(logits)])))
    if not difference <= LOGIT_TOLERANCE * float(np.max(np.abs(expected))):
        raise CommandError(f"{what} answers differently: logits are {difference:.2g} apart")
    return difference
