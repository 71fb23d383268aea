"""The ``quickstart`` job: a real model, real text, one adapter, and what it gained."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import peftjax
from peftjax import checkpoint, report
from peftjax.adapter import Adapter
from peftjax.cli import encoder, finetune, mixture, sentiment
from peftjax.cli.display import Display
from peftjax.cli.errors import CommandError
from peftjax.cli.finetune import Adapted, Trained
from peftjax.cli.mixture import Mixed
from peftjax.cli.options import Quickstart
from peftjax.cli.result import Result, conclude, named, tables, verdict
from peftjax.cli.sentiment import Tokens
from peftjax.cli.task import Task, prepare

COMPARED = 512  # held-out texts on which the restored and the merged adapter are asked again

# The config of each method: of the flags, the model's own names of modules, and where it goes.
# That of xlora is in mixture.py with its job.
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
    job = mixture.fine_tune if options.method == "xlora" else fine_tune
    trained = job(options, task, display)
    verify(options, task, trained, display)
    with display.phase("plot", "Drawing"):
        pictures = _draw(options, task, trained)
    display.done("plot", ", ".join(map(str, pictures)))
    result = conclude(
        options,
        task,
        trained,
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


def _draw(options: Quickstart, task: Task, trained: Trained) -> list[Path]:
    """Draws the curves and whatever else a method has to show."""
    title = f"{named(options.method, options.recipe.rank)}, on {task.title}"
    baselines = {
        "probe on frozen features": encoder.accuracy(task.probe_logits, task.held_out.labels)
    }
    phases = {}
    if isinstance(trained, Mixed):
        best = trained.mixture.best_expert
        baselines[f"best single expert, {best}"] = trained.mixture.accuracy[best]
        phases = {"experts": 0, "gate": trained.history.held_out[1][0]}
    pictures = [
        report.training_curves(
            options.output / "curves.png",
            loss=trained.history.loss,
            accuracy=trained.history.accuracy,
            held_out=trained.history.held_out,
            baselines=baselines,
            phases=phases,
            title=title,
        )
    ]
    if trained.ranks:
        path = options.output / "ranks.png"
        pictures.append(
            report.rank_allocation(path, ranks=trained.ranks, budget=trained.budget, title=title)
        )
    if isinstance(trained, Mixed):
        pictures += mixture.draw(options, trained, title)
    return pictures


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
        finetune.agree("the untrained adapter", untrained, task.probe_logits)
        transformation = finetune.optimizer(options.steps, options.recipe.learning_rate)
        allocates = options.method == "adalora"
        if allocates:
            transformation = peftjax.rank_allocator(transformation, adapter)
        example = task.train[np.arange(options.batch_size) % len(task.train)]
        penalty = peftjax.orthogonality if allocates else None
        step, state = finetune.compile_step(
            adapted, transformation, task.params, adapter, example, penalty
        )
    targets = ", ".join(task.modules[part] for part in options.recipe.parts)
    where = f"{len(adapter.params) - 1} modules ({targets}) and the classifier"
    display.done("adapter", f"{named(options.method, options.recipe.rank)}, on {where}")

    def measure(adapter: Adapter) -> float:
        with display.timed("evaluate"):
            return encoder.accuracy(predict(adapter, task.held_out), task.held_out.labels)

    budget: list[int] = []

    def on_step(state: Any) -> None:
        if allocates:
            budget.append(int(state.budget))

    every = max(50, -(-options.steps // 3))
    state, history = finetune.train(
        step,
        task.params,
        state,
        sentiment.batches(task.train, options.batch_size, options.steps, options.seed),
        steps=options.steps,
        display=display,
        measure_at=range(every, options.steps, every),
        measure=measure,
        on_step=on_step,
    )

    adapter = state.adapter
    ranks: dict[str, Any] = {}
    if allocates:
        with display.phase("prune", "Dropping the triplets outside the budget"):
            ranks = peftjax.ranks(adapter, state.opt_state)
            whole = predict(adapter, task.held_out[: encoder.PREDICTION_BATCH])
            adapter = peftjax.prune(adapter, state.opt_state)
            finetune.agree(
                "the pruned adapter", predict(adapter, task.held_out[: len(whole)]), whole
            )
        left = f"{min(ranks.values())} to {max(ranks.values())} in each module"
        display.done("prune", f"{sum(ranks.values())} triplets are left, {left}")

    with display.phase("evaluate", "Measuring on held-out texts"):
        logits = predict(adapter, task.held_out)
    accuracy = encoder.accuracy(logits, task.held_out.labels)
    display.done("evaluate", f"{accuracy:.1%} right on held-out texts")
    # At step 0 the adapter changes nothing, as was just seen, so the probe's accuracy is the start.
    start = (0, encoder.accuracy(task.probe_logits, task.held_out.labels))
    history.held_out[:] = [start, *history.held_out, (options.steps, accuracy)]
    reads = finetune.argument_bytes(step)
    return Trained(adapter, predict, logits, history, ranks, budget, reads)


def verify(options: Quickstart, task: Task, trained: Trained, display: Display) -> None:
    """Saves the adapter alone, restores it, merges it, and compares what each of them answers.

    A mix that depends on the token has no merged weight.

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

    if isinstance(trained, Mixed):
        display.note("no merged weight: the mix depends on the token")
        return
    with display.phase("merge", "Merging the adapter into the model"):
        params = peftjax.merge(
            task.params, trained.adapter, dequantize=options.base_dtype != "float32"
        )
        plain = jax.jit(task.encoder.classify)
        merged = encoder.predict(lambda ids, mask: plain(params, ids, mask), texts)
        difference = finetune.agree("the merged model", merged, expected)
    display.done("merge", f"merged, the plain model gives the same logits within {difference:.0e}")
