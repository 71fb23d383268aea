"""A run of the learning-quality benchmark in JAX."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax
from benchmarks import quality_task as shared
from benchmarks.quality_task import Run
from peftjax.cli import encoder, finetune, mixture
from peftjax.cli.task import Task

VERSIONS = f"jax {jax.__version__}"


def optimizer(rates: np.ndarray, allocated: peftjax.Adapter | None) -> optax.GradientTransformation:
    """AdamW on clipped gradients, with the learning rates of both frameworks.

    The allocator sees the clipped gradients too, as in torch, which clips them in place.
    """
    schedule = jnp.asarray(rates)
    adam = optax.adamw(lambda count: schedule[count], **shared.ADAM)
    inner = adam if allocated is None else peftjax.rank_allocator(adam, allocated)
    return optax.chain(optax.clip_by_global_norm(shared.LARGEST_GRADIENT), inner)


def copied(adapter: peftjax.Adapter) -> peftjax.Adapter:
    """Training gives the arrays away, and the classifier's may be the model's own."""
    return adapter.replace(params=jax.tree.map(jnp.copy, adapter.params))


class Trainer:
    """A compiled training step, for adapters that differ in their numbers alone."""

    def __init__(
        self,
        work: Task,
        adapted: Any,
        adapter: peftjax.Adapter,
        rates: np.ndarray,
        allocates: bool = False,
    ):
        transformation = optimizer(rates, adapter if allocates else None)
        self.transformation, self.params, self.steps = transformation, work.params, len(rates)
        penalty = peftjax.orthogonality if allocates else None
        example = work.train[np.arange(shared.BATCH) % len(work.train)]
        self.step, _ = finetune.compile_step(
            adapted, transformation, work.params, copied(adapter), example, penalty
        )

    def __call__(self, adapter: peftjax.Adapter, data: Any) -> tuple[peftjax.TrainState, Any]:
        """Trains on all batches; the last state, and the loss of every step."""
        state, losses = peftjax.init_train_state(copied(adapter), self.transformation), []
        for batch in data:
            state, metrics = self.step(state, self.params, (batch.inputs, batch.labels))
            losses.append(metrics["cross_entropy"])
        return state, np.asarray(jax.block_until_ready(losses))


def accuracy(work: Task, adapted: Any, adapter: peftjax.Adapter) -> float:
    """Share of the held-out texts that an adapter gets right."""
    logits = encoder.predict(
        lambda ids, mask: adapted(work.params, adapter, ids, mask), work.held_out
    )
    return encoder.accuracy(logits, work.held_out.labels)


def size(params: Any) -> int:
    """How many numbers a tree has."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def train(run: Run) -> dict:
    """Trains and measures one adapter."""
    work = shared.task_of(run)
    if run.method == "xlora":
        return train_xlora(run, work)
    adapter = shared.first_adapter(run, work)
    adapted = jax.jit(peftjax.adapt(work.encoder.classify))
    rates = shared.rates(run.steps, shared.LEARNING_RATE[run.method])
    trainer = Trainer(work, adapted, adapter, rates, run.method == "adalora")
    start = time.process_time()
    state, losses = trainer(adapter, shared.batches(run, work.train, run.steps))
    seconds = time.process_time() - start
    trained = {"parameters": size(adapter.params), "kept": size(adapter.params)}
    if run.method == "adalora":
        pruned = peftjax.prune(state.adapter, state.opt_state)
        trained["kept"] = size(pruned.params)
    return {
        "accuracy": accuracy(work, adapted, state.adapter),
        **trained,
        "losses": losses,
        "step_seconds": seconds / run.steps,
    }


def train_xlora(run: Run, work: Task) -> dict:
    """Trains experts, each on its own slice, then the gate on all texts."""
    slices = shared.topics(run, work)
    expert_steps, gate_steps = shared.parts(run)
    adapted = jax.jit(peftjax.adapt(work.encoder.classify))
    first = [shared.first_adapter(run, work, number) for number in range(shared.EXPERTS)]
    rates = shared.rates(expert_steps, shared.LEARNING_RATE["xlora"])
    trainer = Trainer(work, adapted, first[0], rates)
    experts, alone = {}, []
    for number, adapter in enumerate(first):
        own = work.train[np.flatnonzero(slices.train == number)]
        state, _ = trainer(adapter, shared.batches(run, own, expert_steps, 1 + number))
        experts[str(number)] = state.adapter
        alone.append(accuracy(work, adapted, state.adapter))

    gate = shared.first_gate(run, work, experts)
    mixed = peftjax.adapt(work.encoder.classify_with_states, hidden_states=lambda out: out[1])
    answer = jax.jit(lambda *args: mixed(*args)[0])
    trainer = Trainer(work, answer, gate, shared.rates(gate_steps, mixture.GATE_LEARNING_RATE))
    start = time.process_time()
    state, losses = trainer(gate, shared.batches(run, work.train, gate_steps))
    seconds = time.process_time() - start
    parameters = size(gate.params) + sum(size(each.params) for each in experts.values())
    return {
        "accuracy": accuracy(work, answer, state.adapter),
        "experts": alone,
        "parameters": parameters,
        "kept": parameters,
        "losses": losses,
        "step_seconds": seconds / gate_steps,
    }


def gradients(run: Run, work: Task, adapter: peftjax.Adapter, batch: Any) -> tuple[float, Any]:
    """The loss and its gradients with respect to the adapter, regulariser and all."""
    if run.method == "xlora":
        mixed = peftjax.adapt(work.encoder.classify_with_states, hidden_states=lambda out: out[1])

    def loss(trainable: Any, params: Any) -> jax.Array:
        own = adapter.replace(params=trainable)
        if run.method == "xlora":
            logits = mixed(params, own, *batch.inputs)[0]
        else:
            logits = peftjax.adapt(work.encoder.classify)(params, own, *batch.inputs)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        return value + peftjax.orthogonality(own) if run.method == "adalora" else value

    value, found = jax.jit(jax.value_and_grad(loss))(adapter.params, work.params)
    return float(value), adapter.replace(params=found)
