"""The training loop: one jitted step, the frozen params passed in, the adapter's donated."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax
from peftjax.adapter import Adapter
from peftjax.cli.display import Display
from peftjax.cli.encoder import Params
from peftjax.cli.errors import CommandError
from peftjax.cli.sentiment import Tokens

Adapted = Callable[..., jax.Array]
Step = Callable[..., tuple[peftjax.TrainState, dict[str, jax.Array]]]

LOGIT_TOLERANCE = 1e-4  # of the largest logit: the same float32 sums in another order


@dataclasses.dataclass
class History:
    """What training showed, step by step.

    Attributes:
      loss: training loss.
      accuracy: accuracy on the step's own batch.
      seconds: time of the step.
      held_out: (steps done, held-out accuracy), wherever it was measured.
    """

    loss: list[float] = dataclasses.field(default_factory=list)
    accuracy: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    held_out: list[tuple[int, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained adapter and what it answers.

    Attributes:
      adapter: the adapter.
      predict: ``predict(adapter, texts)`` gives its logits.
      logits: those of this one on the held-out texts.
      history: how training went.
      ranks: the rank of each module, where they were allocated.
      budget: the number of triplets allowed after each step, likewise.
      argument_bytes: bytes of all arguments of the compiled step.
    """

    adapter: Adapter
    predict: Callable[[Adapter, Tokens], np.ndarray]
    logits: np.ndarray
    history: History
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    budget: list[int] = dataclasses.field(default_factory=list)
    argument_bytes: int = 0

    @property
    def parameters(self) -> int:
        """How many numbers were trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.adapter.params))


def learning_rates(steps: int, highest: float) -> optax.Schedule:
    """The learning rate of each step: a tenth of them to warm up, then along a cosine to zero."""
    warmup = max(1, steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, highest, warmup, max(steps, warmup + 1))


def optimizer(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """AdamW on clipped gradients, with a second moment that follows a run this short."""
    rates = learning_rates(steps, learning_rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rates, b2=0.99))


def compile_step(
    adapted: Adapted,
    transformation: optax.GradientTransformation,
    params: Params,
    adapter: Adapter,
    batch: Tokens,
    penalty: Callable[[Adapter], jax.Array] | None = None,
) -> tuple[Step, peftjax.TrainState]:
    """Compiles the training step ahead of time, so that no step has to wait for it.

    Args:
      adapted: ``adapted(params, adapter, *inputs)`` gives logits.
      transformation: the optimizer.
      params: the frozen params.
      adapter: where to start; its arrays are donated and must be nobody else's.
      batch: a batch of the size to come.
      penalty: what to add to the loss, and to leave out where the loss is shown.

    Returns:
      ``step(state, params, (inputs, labels)) -> (state, metrics)`` and the first state.
    """

    def loss_fn(params: Params, adapter: Adapter, batch: Any) -> tuple[jax.Array, Any]:
        inputs, labels = batch
        logits = adapted(params, adapter, *inputs)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        total = loss if penalty is None else loss + penalty(adapter)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        return total, {"cross_entropy": loss, "accuracy": accuracy}

    state = peftjax.init_train_state(adapter, transformation)
    step: Any = peftjax.make_train_step(loss_fn, transformation)
    return step.lower(state, params, (batch.inputs, batch.labels)).compile(), state


def argument_bytes(step: Step) -> int:
    """Bytes of all arguments of a compiled step."""
    return int(cast(Any, step).memory_analysis().argument_size_in_bytes)


def train(
    step: Step,
    params: Params,
    state: peftjax.TrainState,
    data: Iterable[Tokens],
    *,
    steps: int,
    display: Display,
    phase: str = "train",
    measure_at: Sequence[int] = (),
    measure: Callable[[Adapter], float] | None = None,
    on_step: Callable[[optax.OptState], None] | None = None,
) -> tuple[peftjax.TrainState, History]:
    """Runs the training step over all batches, and shows how it goes.

    Args:
      step: what ``compile_step`` gave.
      params: the frozen params.
      state: where to start; it is donated.
      data: the batches.
      steps: their number.
      display: where progress is shown.
      phase: under which name.
      measure_at: numbers of steps after which held-out accuracy is measured.
      measure: gives the held-out accuracy of an adapter.
      on_step: told the optimizer's state after each step.

    Returns:
      The last state and the history.

    Raises:
      CommandError: the loss is no longer finite.
    """
    history = History()
    texts = 0
    with display.bar(f"Training: {phase}", steps, every=max(1, steps // 6)) as advance:
        for batch in data:
            start = time.perf_counter()
            state, metrics = step(state, params, (batch.inputs, batch.labels))
            history.loss.append(float(metrics["cross_entropy"]))
            if not math.isfinite(history.loss[-1]):
                raise CommandError(
                    f"the loss is {history.loss[-1]} at step {len(history.loss)}; "
                    "try a smaller --learning-rate"
                )
            history.accuracy.append(float(metrics["accuracy"]))
            history.seconds.append(time.perf_counter() - start)
            done, texts = len(history.loss), len(batch)
            advance(done, _progress(history))
            if on_step is not None:
                on_step(state.opt_state)
            if measure is not None and done in measure_at:
                history.held_out.append((done, measure(state.adapter)))
    display.seconds[phase] = sum(history.seconds)
    pace = f"{1000 * float(np.median(history.seconds)):.0f} ms each"
    display.done(phase, f"{steps} steps of {texts} texts, {pace}")
    return state, history


def _progress(history: History) -> str:
    """What the bar says beside the steps."""
    loss, accuracy = np.mean(history.loss[-20:]), np.mean(history.accuracy[-20:])
    return f"loss {loss:.3f}  accuracy {accuracy:.1%}  {1000 * history.seconds[-1]:.0f} ms/step"


def agree(what: str, logits: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference between logits; raises where it is more than rounding."""
    difference = float(np.max(np.abs(logits - expected[: len(logits)])))
    if not difference <= LOGIT_TOLERANCE * float(np.max(np.abs(expected))):
        raise CommandError(f"{what} answers differently: logits are {difference:.2g} apart")
    return difference
