"""The training loop: one jitted step, the frozen params passed in, the adapter's donated."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from peftjax.adapter import Adapter
from peftjax.cli.encoder import Params
from peftjax.cli.errors import CommandError
from peftjax.cli.sentiment import Tokens

Adapted = Callable[..., jax.Array]
Step = Callable[..., tuple[Any, optax.OptState, jax.Array, jax.Array]]


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
) -> Step:
    """Compiles the training step ahead of time, so that no step has to wait for it.

    Args:
      adapted: ``adapted(params, adapter, ids, mask)`` gives logits.
      transformation: the optimizer.
      params: the frozen params, an argument of the step and never a constant in it.
      adapter: everything about the adapter but its params, which the step takes and gives.
      batch: a batch of the size to come.
      penalty: what to add to the loss, and to leave out where the loss is shown.

    Returns:
      ``step(trainable, state, params, ids, mask, labels) -> (trainable, state, loss, accuracy)``;
      the first two arguments are donated.
    """

    def objective(
        trainable: Any, params: Params, ids: jax.Array, mask: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        current = adapter.replace(params=trainable)
        logits = adapted(params, current, ids, mask)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        total = loss if penalty is None else loss + penalty(current)
        return total, (loss, jnp.mean(jnp.argmax(logits, axis=-1) == labels))

    def step(
        trainable: Any,
        state: optax.OptState,
        params: Params,
        ids: jax.Array,
        mask: jax.Array,
        labels: jax.Array,
    ) -> tuple[Any, optax.OptState, jax.Array, jax.Array]:
        measure = jax.value_and_grad(objective, has_aux=True)
        (_, (loss, accuracy)), grads = measure(trainable, params, ids, mask, labels)
        updates, state = transformation.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss, accuracy

    state = jax.eval_shape(transformation.init, adapter.params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        adapter.params, state, params, batch.ids, batch.mask, batch.labels
    )
    return cast(Step, lowered.compile())


def train(
    step: Step,
    params: Params,
    adapter: Adapter,
    state: optax.OptState,
    data: Iterable[Tokens],
    *,
    measure_at: Sequence[int],
    measure: Callable[[Adapter], float],
    on_step: Callable[[History, optax.OptState], None],
) -> tuple[Adapter, optax.OptState, History]:
    """Runs the training step over all batches.

    Args:
      step: what ``compile_step`` gave.
      params: the frozen params.
      adapter: where to start; its params are donated and must be nobody else's.
      state: the optimizer's state.
      data: the batches.
      measure_at: numbers of steps after which held-out accuracy is measured.
      measure: gives the held-out accuracy of an adapter.
      on_step: told after each step what there is so far, and the optimizer's state.

    Returns:
      The trained adapter, the optimizer's last state and the history.

    Raises:
      CommandError: the loss is no longer finite.
    """
    history = History()
    trainable = adapter.params
    for batch in data:
        start = time.perf_counter()
        trainable, state, loss, accuracy = step(
            trainable, state, params, batch.ids, batch.mask, batch.labels
        )
        history.loss.append(float(loss))
        if not math.isfinite(history.loss[-1]):
            raise CommandError(
                f"the loss is {history.loss[-1]} at step {len(history.loss)}; "
                "try a smaller --learning-rate"
            )
        history.accuracy.append(float(accuracy))
        history.seconds.append(time.perf_counter() - start)
        on_step(history, state)
        done = len(history.loss)
        if done in measure_at:
            history.held_out.append((done, measure(adapter.replace(params=trainable))))
    return adapter.replace(params=trainable), state, history
