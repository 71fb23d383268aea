"""A run of the learning-quality benchmark in torch PEFT, from the numbers that JAX starts with."""

import dataclasses
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from rich.console import Console
from torch import nn

import peftjax
from benchmarks import quality_jax
from benchmarks import quality_task as shared
from benchmarks.quality_task import NAMES, Run
from peftjax.cli import assets, encoder, mixture
from peftjax.cli.task import Task

VERSIONS = f"torch {torch.__version__.partition('+')[0]}, peft {peft.__version__}"


class Classifier(nn.Module):
    """MiniLM with a linear classifier on the mean of its last states, as ``Encoder.classify``."""

    def __init__(self, work: Task):
        super().__init__()
        directory = assets.minilm_directory(assets.cache_directory(), Console(quiet=True))
        with encoder.quiet(transformers.utils.logging):
            self.model = transformers.BertModel.from_pretrained(
                directory,
                add_pooling_layer=False,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        self.config = self.model.config
        self.config.use_cache = False  # X-LoRA insists on it
        head = work.params["classifier"]
        self.classifier = nn.Linear(*head["kernel"].shape)
        self.classifier.weight.data = torch.tensor(np.asarray(head["kernel"]).T.copy())
        self.classifier.bias.data = torch.tensor(np.asarray(head["bias"]))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        **ignored: Any,
    ) -> types.SimpleNamespace:
        """Logits, the loss where there are labels, and the states that X-LoRA's gate reads.

        Ignored is what X-LoRA asks of transformers' models: to give those states, and by name.
        """
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.to(states.dtype)[..., None]
        logits = self.classifier((states * weight).sum(1) / weight.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return types.SimpleNamespace(logits=logits, loss=loss, hidden_states=(states,))


def wrapped(run: Run, work: Task, adapter: peftjax.Adapter) -> peft.PeftModel:
    """PEFT's model with the same adapter."""
    kind = getattr(peft, shared.CONFIGS[run.method])
    config = kind(**shared.fields(run), **shared.saved(run))
    model = peft.get_peft_model(Classifier(work), config)
    load(model, adapter)
    return model


def load(model: peft.PeftModel, adapter: peftjax.Adapter) -> None:
    """Gives PEFT's adapter the numbers of one of ours."""
    ours = peftjax.get_peft_model_state_dict(adapter, names=NAMES)
    theirs = parameters(model)
    if ours.keys() != theirs.keys():
        raise ValueError(f"PEFT trains other tensors: {sorted(ours.keys() ^ theirs.keys())}")
    for key, array in ours.items():
        theirs[key].data.copy_(torch.tensor(array))


def parameters(model: peft.PeftModel) -> dict[str, nn.Parameter]:
    """What PEFT trains, under the keys of its files."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.replace("vector.default.weight", "vector")  # DoRA's lengths
            name = name.replace("modules_to_save.default.", "").replace(".default", "")
            found[name] = parameter
    return found


def loss_of(run: Run, model: peft.PeftModel, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What is differentiated, and the cross-entropy in it."""
    # A PeftModel without a task type goes past AdaLoRA's regulariser, which is in the model below.
    call = model.base_model if run.method == "adalora" else model
    labels = torch.tensor(batch.labels, dtype=torch.long)
    out = call(
        input_ids=torch.tensor(batch.ids, dtype=torch.long),
        attention_mask=torch.tensor(batch.mask, dtype=torch.long),
        labels=labels,
    )
    return out.loss, nn.functional.cross_entropy(out.logits.detach(), labels)


def fit(run: Run, model: peft.PeftModel, data: Any, rates: np.ndarray) -> np.ndarray:
    """Trains on all batches; the loss of every step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = dict(shared.ADAM)
    betas = adam.pop("b1"), adam.pop("b2")
    optimizer = torch.optim.AdamW(trained, betas=betas, **adam)
    losses = []
    for step, (batch, rate) in enumerate(zip(data, rates.tolist(), strict=True)):
        optimizer.param_groups[0]["lr"] = rate
        loss, shown = loss_of(run, model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, shared.LARGEST_GRADIENT)
        optimizer.step()
        if run.method == "adalora":  # nothing in PEFT calls its allocator
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(float(shown))
    return np.asarray(losses)


@torch.no_grad()
def accuracy(work: Task, model: peft.PeftModel) -> float:
    """Share of the held-out texts that a model gets right."""
    model.eval()

    def logits(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        ids, mask = (torch.tensor(each, dtype=torch.long) for each in (ids, mask))
        return model(input_ids=ids, attention_mask=mask).logits.numpy()

    found = encoder.accuracy(encoder.predict(logits, work.held_out), work.held_out.labels)
    model.train()
    return found


def size(model: peft.PeftModel) -> int:
    """How many numbers are trained."""
    return sum(each.numel() for each in model.parameters() if each.requires_grad)


def train(run: Run) -> dict:
    """Trains and measures one adapter."""
    work = shared.task_of(run)
    if run.method == "xlora":
        return train_xlora(run, work)
    model = wrapped(run, work, shared.first_adapter(run, work))
    rates = shared.rates(run.steps, shared.LEARNING_RATE[run.method])
    start = time.process_time()
    losses = fit(run, model, shared.batches(run, work.train, run.steps), rates)
    seconds = time.process_time() - start
    trained = {"parameters": size(model), "kept": size(model)}
    if run.method == "adalora":
        trained["kept"] -= sum(
            (parameter == 0).sum().item() * (layer.in_features + layer.out_features + 1)
            for layer in model.modules()
            if isinstance(layer, peft.tuners.adalora.SVDLinear)
            for parameter in layer.lora_E.values()
        )
    return {
        "accuracy": accuracy(work, model),
        **trained,
        "losses": losses,
        "step_seconds": seconds / run.steps,
    }


def train_xlora(run: Run, work: Task) -> dict:
    """Trains experts, each on its own slice, then the gate on all texts."""
    slices = shared.topics(run, work)
    expert_steps, gate_steps = shared.parts(run)
    rates = shared.rates(expert_steps, shared.LEARNING_RATE["xlora"])
    first = [shared.first_adapter(run, work, number) for number in range(shared.EXPERTS)]
    alone, count = [], 0
    with tempfile.TemporaryDirectory() as directory:
        for number, adapter in enumerate(first):
            model = wrapped(run, work, adapter)
            count += size(model)
            own = work.train[np.flatnonzero(slices.train == number)]
            fit(run, model, shared.batches(run, own, expert_steps, 1 + number), rates)
            alone.append(accuracy(work, model))
            model.save_pretrained(f"{directory}/{number}")
        experts = {str(number): adapter for number, adapter in enumerate(first)}
        model = gated(work, Path(directory))
        load(model, shared.first_gate(run, work, experts))
    count += size(model)
    start = time.process_time()
    rates = shared.rates(gate_steps, mixture.GATE_LEARNING_RATE)
    losses = fit(run, model, shared.batches(run, work.train, gate_steps), rates)
    seconds = time.process_time() - start
    return {
        "accuracy": accuracy(work, model),
        "experts": alone,
        "parameters": count,
        "kept": count,
        "losses": losses,
        "step_seconds": seconds / gate_steps,
    }


def gated(work: Task, directory: Path) -> peft.PeftModel:
    """PEFT's X-LoRA of the experts in a directory."""
    model = Classifier(work)
    paths = {str(number): f"{directory}/{number}" for number in range(shared.EXPERTS)}
    config = peft.XLoraConfig(
        hidden_size=model.config.hidden_size, adapters=paths, **shared.gate_fields()
    )
    return peft.get_peft_model(model, config)


def compare(run: Run) -> dict:
    """Loss and gradients of one batch in both frameworks, on numbers away from the start.

    At the start of most methods a factor is zero, and with it the gradient of the other: so all
    are moved first. The regulariser of AdaLoRA, whose gradient has a norm in it, is part of it.

    Returns:
      The difference of the losses, and the largest of two gradients of one array over its largest
      entry.
    """
    work = shared.task_of(run)
    batch = next(iter(shared.batches(run, work.train, 1)))
    # Labels that the probe has not learned: next to no gradient would be left of its own.
    batch = dataclasses.replace(batch, labels=(batch.labels + 1) % len(work.labels))
    experts = range(shared.EXPERTS if run.method == "xlora" else 1)
    moved = [_moved(shared.first_adapter(run, work, number), number) for number in experts]
    if run.method == "xlora":
        named = {str(number): adapter for number, adapter in enumerate(moved)}
        adapter = _moved(shared.first_gate(run, work, named), 9)
        with tempfile.TemporaryDirectory() as directory:
            for name, expert in named.items():
                peftjax.save_pretrained(f"{directory}/{name}", expert, names=NAMES)
            model = gated(work, Path(directory))
        load(model, adapter)
    else:
        (adapter,) = moved
        model = wrapped(run, work, adapter)
    loss, _ = loss_of(run, model, batch)
    loss.backward()
    value, found = quality_jax.gradients(run, work, adapter, batch)
    ours = peftjax.get_peft_model_state_dict(found, names=NAMES)
    theirs = {key: parameter.grad.numpy() for key, parameter in parameters(model).items()}
    apart = {
        key: float(np.abs(ours[key] - wanted).max() / np.abs(wanted).max())
        for key, wanted in theirs.items()
    }
    worst = max(apart, key=apart.__getitem__)
    return {
        "loss": abs(float(loss.detach()) - value),
        "gradient": apart[worst],
        "tensor": worst,
        "smallest": min(float(np.abs(wanted).max()) for wanted in theirs.values()),
    }


def _moved(adapter: peftjax.Adapter, seed: int) -> peftjax.Adapter:
    """An adapter whose arrays all have some noise."""
    rng = np.random.default_rng(seed)
    noise = [rng.normal(0, 0.05, leaf.shape) for leaf in jax.tree.leaves(adapter.params)]
    noise = jax.tree.unflatten(jax.tree.structure(adapter.params), noise)
    moved = jax.tree.map(lambda x, own: x + jnp.asarray(own, x.dtype), adapter.params, noise)
    return dataclasses.replace(adapter, params=moved)
