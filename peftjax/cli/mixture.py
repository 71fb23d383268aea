"""The ``quickstart`` job for X-LoRA: an expert a topic, and a gate that mixes them by token."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import peftjax
from peftjax import report
from peftjax.adapter import Adapter
from peftjax.cli import encoder, finetune, sentiment, slices
from peftjax.cli.display import Display
from peftjax.cli.encoder import Params
from peftjax.cli.finetune import Adapted, History, Trained
from peftjax.cli.options import Quickstart
from peftjax.cli.sentiment import Tokens
from peftjax.cli.slices import Slices
from peftjax.cli.task import Task

GATE = peftjax.XLoraConfig(
    xlora_depth=2, xlora_size=64, xlora_dropout_p=0.0, softmax_temperature=0.25
)
GATE_LEARNING_RATE = 1e-2
GATE_SHARE = 0.4  # of all steps
SHOWN = 8  # held-out texts of each slice on the page

# What answers beside the experts.
PROBE, UNIFORM, TOLD, GATED = "probe", "uniform mix", "told the topic", "gated mix"


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What the mix came to, beside what it is made of.

    Attributes:
      experts: their names, which are also those of the slices each was trained on.
      words: the most distinctive words of each slice.
      train_texts: number of texts each expert was trained on.
      held_out_texts: number of held-out texts in each slice.
      accuracy: held-out accuracy of each expert alone, of the probe, of the mix of all experts with
        equal weights, of each text's own expert, and of the gated mix.
      accuracy_by_slice: likewise, in each slice; None where it has no held-out text.
      scalings: the mean share of each expert (column) in the held-out texts of each slice (row);
        None likewise.
      best_expert: the best single one on all held-out texts.
      gain_points: by how many percentage points the gated mix is better than that.
      gain_error: its standard error over the held-out texts, in percentage points.
    """

    experts: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    train_texts: tuple[int, ...]
    held_out_texts: tuple[int, ...]
    accuracy: dict[str, float]
    accuracy_by_slice: dict[str, tuple[float | None, ...]]
    scalings: tuple[tuple[float, ...] | None, ...]
    best_expert: str
    gain_points: float
    gain_error: float


@dataclasses.dataclass(frozen=True)
class Mixed(Trained):
    """A trained X-LoRA adapter, what it answers, and how it mixes.

    Attributes:
      mixture: the outcome.
      log: the scalings of some held-out texts, slice after slice.
    """

    mixture: Mixture = dataclasses.field(kw_only=True)
    log: peftjax.ScalingsLog = dataclasses.field(kw_only=True)

    @property
    def parameters(self) -> int:
        """How many numbers were trained: those of the gate and of its experts."""
        experts = peftjax.xlora_experts(self.adapter).values()
        return super().parameters + sum(
            leaf.size for expert in experts for leaf in jax.tree.leaves(expert.params)
        )


def fine_tune(options: Quickstart, task: Task, display: Display) -> Mixed:
    """Trains an expert for each slice of the texts, then the gate on all of them."""
    with display.phase("topics", "Cutting the texts into topics"):
        count = options.recipe.experts
        assert count is not None
        topics = slices.cut(task.texts, task.features, count, options.seed)
    display.done("topics", f"the texts fall into {count} slices, an expert for each:")
    for name, words, size in zip(topics.names, topics.words, topics.sizes(), strict=True):
        display.note(f"{name:<22}{size:>6,} texts  {', '.join(words)}")
    gate_steps = max(1, round(GATE_SHARE * options.steps))
    bank, logits, history = _train_experts(
        options, task, topics, display, options.steps - gate_steps
    )
    return _train_gate(options, task, topics, display, gate_steps, bank, logits, history)


def _train_experts(
    options: Quickstart, task: Task, topics: Slices, display: Display, steps: int
) -> tuple[peftjax.AdapterBank, dict[str, np.ndarray], History]:
    """All experts in one program: of each batch, a text trains the expert of its slice alone.

    Returns:
      The trained bank, the logits of each expert and of other things on the held-out texts, and
      how training went.
    """
    with display.phase("adapter", "Tracing and compiling the experts"):
        apply_fn, recipe = task.encoder.classify, options.recipe
        sites = _sites(task)
        config = peftjax.LoraConfig(
            r=recipe.rank or 1,
            lora_alpha=recipe.alpha or 1.0,
            target_modules=[task.modules[part] for part in recipe.parts],
        )
        keys = jax.random.split(jax.random.key(options.seed), len(topics.names))
        bank = peftjax.stack_adapters(
            {
                name: peftjax.init_adapter(key, config, sites)
                for name, key in zip(topics.names, keys, strict=True)
            }
        )
        adapted = peftjax.adapt(apply_fn)

        def by_row(params: Params, adapter: Adapter, ids: Any, mask: Any, experts: Any) -> Any:
            own = dataclasses.replace(bank, adapter=adapter).rows(experts)
            return adapted(params, own, ids, mask)

        forward = jax.jit(by_row)

        def predict(adapter: Adapter, texts: Tokens) -> np.ndarray:
            return encoder.predict(lambda *inputs: forward(task.params, adapter, *inputs), texts)

        held_out = dataclasses.replace(task.held_out, experts=topics.held_out)
        untrained = predict(bank.adapter, held_out[: encoder.PREDICTION_BATCH])
        finetune.agree("the untrained bank", untrained, task.probe_logits)
        train = dataclasses.replace(task.train, experts=topics.train)
        step, state = _compiled(
            by_row,
            finetune.optimizer(steps, recipe.learning_rate),
            task,
            bank.adapter,
            train,
            options.batch_size,
        )
    targets = ", ".join(task.modules[part] for part in recipe.parts)
    where = f"{len(bank.adapter.sites)} modules ({targets})"
    display.done("adapter", f"{len(bank)} experts, lora of rank {recipe.rank}, on {where}")

    state, history = finetune.train(
        step,
        task.params,
        state,
        sentiment.batches(train, options.batch_size, steps, options.seed),
        steps=steps,
        display=display,
        phase="experts",
    )
    adapter = state.adapter
    bank = dataclasses.replace(bank, adapter=adapter)

    with display.phase("evaluate", "Measuring every expert on all held-out texts"):
        logits = {
            name: predict(
                adapter,
                dataclasses.replace(held_out, experts=np.full_like(topics.held_out, place)),
            )
            for place, name in enumerate(bank)
        }
        alone = np.stack(list(logits.values()))
        logits[TOLD] = alone[topics.held_out, np.arange(len(held_out))]
        even = jax.jit(adapted)
        mixed = bank.mix(np.full(len(bank), 1 / len(bank), np.float32))
        logits[UNIFORM] = encoder.predict(
            lambda ids, mask: even(task.params, mixed, ids, mask), task.held_out
        )
    return bank, logits, history


def _train_gate(
    options: Quickstart,
    task: Task,
    topics: Slices,
    display: Display,
    steps: int,
    bank: peftjax.AdapterBank,
    logits: dict[str, np.ndarray],
    history: History,
) -> Mixed:
    """The classifier that mixes the frozen experts, trained on all texts."""
    with display.phase("adapter", "Tracing and compiling the gate"):
        key = jax.random.fold_in(jax.random.key(options.seed), len(bank))
        experts = {name: bank[name] for name in bank}
        adapter = peftjax.init_xlora(key, GATE, experts, _sites(task))
        # The pooled states are the head's input: those of every token come out beside the logits.
        run = peftjax.adapt(
            task.encoder.classify_with_states,
            hidden_states=lambda out: out[1],
            return_scalings=True,
        )

        def gated(params: Params, adapter: Adapter, ids: Any, mask: Any) -> tuple[Any, Any]:
            (answers, _), scalings = run(params, adapter, ids, mask)
            # Without `layerwise_scalings` the layers agree.
            return answers, scalings[:, :, 0]

        forward = jax.jit(gated)

        def answer(adapter: Adapter, texts: Tokens) -> tuple[np.ndarray, np.ndarray]:
            return encoder.predict(lambda *inputs: forward(task.params, adapter, *inputs), texts)

        step, state = _compiled(
            lambda *inputs: gated(*inputs)[0],
            finetune.optimizer(steps, GATE_LEARNING_RATE),
            task,
            adapter,
            task.train,
            options.batch_size,
        )
    state, later = finetune.train(
        step,
        task.params,
        state,
        sentiment.batches(task.train, options.batch_size, steps, options.seed + 1),
        steps=steps,
        display=display,
        phase="gate",
    )
    adapter = state.adapter
    with display.phase("evaluate", "Measuring the gated mix on held-out texts"):
        logits[GATED], scalings = answer(adapter, task.held_out)
    logits[PROBE] = task.probe_logits
    mixture = _conclude(task, topics, logits, scalings)
    accuracy = mixture.accuracy
    display.done(
        "evaluate",
        f"{accuracy[GATED]:.1%} right on held-out texts; equal weights {accuracy[UNIFORM]:.1%}",
    )
    return Mixed(
        adapter,
        lambda adapter, texts: answer(adapter, texts)[0],
        logits[GATED],
        # First each text is served by its topic's expert; then nobody is told.
        History(
            history.loss + later.loss,
            history.accuracy + later.accuracy,
            history.seconds + later.seconds,
            [
                (0, accuracy[PROBE]),
                (len(history.loss), accuracy[TOLD]),
                (options.steps, accuracy[GATED]),
            ],
        ),
        argument_bytes=finetune.argument_bytes(step),
        mixture=mixture,
        log=_log(task, topics, scalings),
    )


def _sites(task: Task) -> peftjax.Sites:
    few = task.train[:2]
    return peftjax.find_sites(task.encoder.classify, task.params, few.ids, few.mask)


def _compiled(
    adapted: Adapted,
    transformation: optax.GradientTransformation,
    task: Task,
    adapter: Adapter,
    texts: Tokens,
    size: int,
) -> tuple[finetune.Step, peftjax.TrainState]:
    """The training step for batches of that size, and its first state."""
    example = texts[np.arange(size) % len(texts)]
    return finetune.compile_step(adapted, transformation, task.params, adapter, example)


def _conclude(
    task: Task, topics: Slices, logits: dict[str, np.ndarray], scalings: np.ndarray
) -> Mixture:
    """The numbers of a run.

    Args:
      task: what was worked on.
      topics: its slices.
      logits: what each expert and everything else answers on the held-out texts.
      scalings: the gate's, of shape (texts, tokens, experts).
    """
    right = {name: np.argmax(own, axis=-1) == task.held_out.labels for name, own in logits.items()}
    members = [topics.held_out == place for place in range(len(topics.names))]
    best = max(topics.names, key=lambda name: float(np.mean(right[name])))
    gains = right[GATED].astype(float) - right[best]
    return Mixture(
        experts=topics.names,
        words=topics.words,
        train_texts=tuple(topics.sizes()),
        held_out_texts=tuple(int(np.sum(member)) for member in members),
        accuracy={name: float(np.mean(own)) for name, own in right.items()},
        accuracy_by_slice={
            name: tuple(float(np.mean(own[member])) if member.any() else None for member in members)
            for name, own in right.items()
        },
        scalings=tuple(
            tuple(np.mean(scalings[member][real[member]], axis=0, dtype=float).tolist())
            if member.any()
            else None
            for real in [task.held_out.mask == 1]
            for member in members
        ),
        best_expert=best,
        gain_points=100 * float(np.mean(gains)),
        gain_error=100 * float(np.std(gains)) / math.sqrt(len(gains)),
    )


def _log(task: Task, topics: Slices, scalings: np.ndarray) -> peftjax.ScalingsLog:
    """The first held-out texts of each slice, an entry a slice."""
    log = peftjax.ScalingsLog(topics.names, layers=["all layers"])
    for place in range(len(topics.names)):
        chosen = np.flatnonzero(topics.held_out == place)[:SHOWN]
        if len(chosen):
            tokens = [
                task.encoder.tokenizer.convert_ids_to_tokens(ids[mask == 1].tolist())
                for ids, mask in zip(
                    task.held_out.ids[chosen], task.held_out.mask[chosen], strict=True
                )
            ]
            log.append(scalings[chosen][:, :, None], texts=tokens)
    return log


def draw(options: Quickstart, mixed: Mixed, title: str) -> list[Path]:
    """Draws what the gate gives whom, and writes a page of texts with the mix of every token."""
    mixture = mixed.mixture
    rows = [
        f"{name}\n{size} texts"
        for name, size in zip(mixture.experts, mixture.held_out_texts, strict=True)
    ]
    nothing = [math.nan] * len(rows)
    picture = report.routing(
        options.output / "routing.png",
        slices=rows,
        experts=mixture.experts,
        scalings=[nothing if own is None else own for own in mixture.scalings],
        accuracy={
            name: [math.nan if value is None else value for value in by_slice]
            for name, by_slice in mixture.accuracy_by_slice.items()
        },
        title=title,
    )
    page = mixed.log.write_html(
        options.output / "routing.html",
        title=f"Who serves which token: {SHOWN} held-out texts of each topic",
    )
    return [picture, page]
