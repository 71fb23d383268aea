"""What both frameworks are given: the same texts, batches, first weights and hyper-parameters.

Everything drawn at random is drawn here, once for both, out of the seed of the run.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import numpy as np
from rich.console import Console

import peftjax
from peftjax.cli import encoder, mixture, sentiment, slices
from peftjax.cli.display import Display
from peftjax.cli.options import Quickstart
from peftjax.cli.sentiment import Tokens
from peftjax.cli.slices import Slices
from peftjax.cli.task import Task, prepare

BATCH, TOKENS = 16, 40  # nine tweets of ten have no more
EXPERTS = 3
FIRST = 10  # losses kept from the start of a run, where rounding has not yet driven them apart

# optax's adamw and torch's AdamW agree in all of these.
ADAM = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 1e-4}
LARGEST_GRADIENT = 1.0  # global norm

LEARNING_RATE = {
    "lora": 5e-3,
    "dora": 5e-3,
    "loha": 5e-3,
    "hra": 5e-3,
    "ia3": 1e-2,
    "adalora": 1e-2,
    "xlora": 5e-3,  # of the experts; the gate has its own
}

# torch's names: its model is `model`, as X-LoRA in PEFT needs it.
NAMES = peftjax.ModuleNames(
    (
        ("bert.encoder.layer.{*rest}", "model.encoder.layer.{*rest}"),
        ("{*rest}", "{*rest}"),
    )
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      framework: ``peftjax`` or ``torch``; ``both`` compares the two without training.
      method: the method.
      budget: the rank, of which HRA takes twice as much; 0 for IA3, which has none.
      texts: number of texts to train on.
      seed: draws texts, order and first weights.
      steps: number of training steps.
      held_out: number of texts to measure on.
    """

    framework: str
    method: str
    budget: int
    texts: int
    seed: int
    steps: int
    held_out: int

    @property
    def rank(self) -> int:
        """The rank of the method's own config: HRA's reflections start in pairs."""
        return 2 * self.budget if self.method == "hra" else self.budget


@functools.lru_cache(maxsize=1)
def task(texts: int, seed: int, held_out: int) -> Task:
    """MiniLM, the tweets of one seed and the probe that every run starts from."""
    options = Quickstart(texts=texts, held_out=held_out, seed=seed, tokens=TOKENS)
    return prepare(options, Display(Console(quiet=True)))


def task_of(run: Run) -> Task:
    """The task of a run."""
    return task(run.texts, run.seed, run.held_out)


def batches(run: Run, data: Tokens, steps: int, offset: int = 0) -> Iterator[Tokens]:
    """The batches of a run, the same arrays for both frameworks."""
    return sentiment.batches(data, BATCH, steps, 1000 * run.seed + offset)


def rates(steps: int, highest: float) -> np.ndarray:
    """The learning rate of each step: up over a tenth of them, then down along a cosine."""
    warmup = max(1, steps // 10)
    step = np.arange(1, steps + 1)
    down = (1 + np.cos(math.pi * np.maximum(step - warmup, 0) / (steps - warmup + 1))) / 2
    return (highest * np.minimum(step / warmup, down)).astype(np.float32)


def fields(run: Run) -> dict:
    """The fields of the run's config, which PEFT's class of the same name takes too."""
    rank, where = run.rank, {"target_modules": ["query", "value"]}
    if run.method in ("lora", "dora", "xlora"):
        return {"r": rank, "lora_alpha": 2 * rank, "use_dora": run.method == "dora", **where}
    if run.method == "loha":
        return {"r": rank, "alpha": 16 * rank, **where}
    if run.method == "hra":
        return {"r": rank, **where}
    if run.method == "ia3":  # as PEFT has it for BERT
        layers = ["key", "value", "output.dense"]
        return {"target_modules": layers, "feedforward_modules": ["output.dense"]}
    first = math.ceil(1.5 * rank)
    return {
        "init_r": first,
        "target_r": rank,
        "lora_alpha": 64 / 6 * first,
        "total_step": run.steps,
        "tinit": run.steps // 10,
        "tfinal": run.steps // 3,
        **where,
    }


CONFIGS = {
    "lora": "LoraConfig",
    "dora": "LoraConfig",
    "loha": "LoHaConfig",
    "hra": "HRAConfig",
    "ia3": "IA3Config",
    "adalora": "AdaLoraConfig",
    "xlora": "LoraConfig",  # of an expert
}


def saved(run: Run) -> dict:
    """The classifier learns too, but under X-LoRA, where the mix alone makes the difference."""
    return {} if run.method == "xlora" else {"modules_to_save": ["classifier"]}


def sites(work: Task) -> peftjax.Sites:
    few = work.train[:2]
    return peftjax.find_sites(work.encoder.classify, work.params, few.ids, few.mask)


def first_adapter(run: Run, work: Task, number: int = 0) -> peftjax.Adapter:
    """The adapter that a run of either framework starts from; the classifier is the probe."""
    config = getattr(peftjax, CONFIGS[run.method])(**fields(run), **saved(run))
    key = jax.random.fold_in(jax.random.key(run.seed), number)
    return peftjax.init_adapter(key, config, sites(work), work.params)


def first_gate(run: Run, work: Task, experts: dict[str, peftjax.Adapter]) -> peftjax.Adapter:
    """The gate that an X-LoRA run of either framework starts from, around its experts."""
    key = jax.random.fold_in(jax.random.key(run.seed), EXPERTS)
    return peftjax.init_xlora(key, mixture.GATE, experts, sites(work), names=NAMES)


def gate_fields() -> dict:
    """The fields of X-LoRA's config."""
    names = (
        "xlora_depth xlora_size xlora_dropout_p softmax_temperature enable_softmax "
        "layerwise_scalings scaling_pass_value global_scaling_weight"
    )
    return {name: getattr(mixture.GATE, name) for name in names.split()}


def topics(run: Run, work: Task) -> Slices:
    """The texts of each expert."""
    return slices.cut(work.texts, work.features, EXPERTS, run.seed)


def parts(run: Run) -> tuple[int, int]:
    """The steps of each of X-LoRA's experts, and of its gate."""
    return max(1, run.steps // 2), max(1, run.steps // 2)


def probe_accuracy(run: Run) -> float:
    """What the frozen model gets right, where every run starts."""
    work = task_of(run)
    return encoder.accuracy(work.probe_logits, work.held_out.labels)
