"""AdaLoRA: singular triplets added to a frozen weight, the least important of which are dropped."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from peftjax.adapter import Adapter, site_arrays
from peftjax.config import (
    LORA_FIELDS_OF_PEFT_ALONE,
    AdapterConfig,
    FrozenMapping,
    check_alphas,
    check_biases,
    check_probability,
    rejects,
)
from peftjax.factors import (
    Arrays,
    Factors,
    Method,
    Weight,
    accumulation_dtype,
    dot,
    gram,
    times,
    widened,
)
from peftjax.sites import Site
from peftjax.stacks import over_stack


@rejects(
    **LORA_FIELDS_OF_PEFT_ALONE,
    # These PEFT accepts here, and ignores.
    alpha_pattern=FrozenMapping(),
    lora_bias=False,
    r=8,
    use_dora=False,
    use_rslora=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(AdapterConfig):
    r"""Adaptive budget allocation: spend a budget of ranks where the loss needs them.

    A frozen weight :math:`W` of shape (in, out) gets ``init_r`` triplets: the columns of
    :math:`A`, (in, ``init_r``), the rows of :math:`B`, (``init_r``, out), and between them the
    entries of :math:`E`, which stand for singular values:

    .. math::

      y = x W + s \, ((x A) \odot E) B, \qquad s = \frac{\alpha}{\texttt{init\_r} + 10^{-5}}

    The scale stays what it is when triplets go, as in PEFT. While the model trains,
    ``peftjax.rank_allocator`` sets the :math:`E` of the least important triplets of all modules to
    zero, more of them with every step, until ``target_r`` are left on average:

    .. math::

      b(t) = \left\lfloor b_T + (b_0 - b_T)
        \left(1 - \frac{t - t_i}{T - t_f - t_i}\right)^3 \right\rfloor

    with :math:`b_0` and :math:`b_T` the two ranks times the number of modules, :math:`T` =
    ``total_step``, :math:`t_i` = ``tinit`` and :math:`t_f` = ``tfinal``.
    :func:`orthogonality` is the term that the loss needs beside it.

    Args:
      target_r: average rank at the end. From ``init_r`` on nothing is ever dropped (PEFT crashes).
      init_r: rank at the start.
      tinit: steps before the first triplet goes.
      tfinal: steps at the end in which the ranks stay.
      deltaT: steps between two allocations.
      beta1: decay of the average of the sensitivity.
      beta2: decay of the average of its uncertainty.
      orth_reg_weight: weight of the orthogonality term.
      total_step: number of training steps. Needed to train, not to run.
      lora_alpha: numerator of the scale; ``init_r`` where it is 0 or less.
      lora_dropout: probability of dropping an input feature on the adapter's way, in training.
      rank_pattern: which triplets of each module are left, for a pruned adapter: a list of bools
        of length ``init_r`` under ``<module>.lora_E``; of a stacked module one list for each
        selected layer. ``prune`` writes it.
      init_lora_weights: start with E zero, the identity. False: all normal, which is not.
      bias: biases of the base model to train: ``"none"``, ``"all"`` or ``"lora_only"`` (those of
        adapted modules).
      fan_in_fan_out: accepted because PEFT's files hold it, and never used: which axes of a weight
        are inputs is seen in the trace of the model.
      target_modules: see :class:`~peftjax.config.AdapterConfig`, as for the fields below.
      exclude_modules: modules not to adapt.
      layers_to_transform: layer indices to adapt.
      layers_pattern: name of the module that a layer index follows.
      modules_to_save: modules to train and save whole.
      base_model_name_or_path: the base model, for torch PEFT.
      revision: the base model's revision, for torch PEFT.
      task_type: PEFT's task, for torch PEFT.

    Raises:
      ValueError: a value out of range, a schedule without a step in which triplets go, or a field
        of PEFT's AdaLoraConfig that PEFT itself ignores.

    Example:
      >>> from peftjax.methods.adalora import AdaLoraConfig
      >>> config = AdaLoraConfig(init_r=6, target_r=4, total_step=1000, target_modules=["query"])
      >>> config.tinit, config.deltaT
      (0, 1)

    References:
      Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023,
      https://arxiv.org/abs/2303.10512
    """

    peft_type: ClassVar[str] = "ADALORA"
    pattern_suffix: ClassVar[str] = ".lora_E"

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    rank_pattern: Mapping[str, Sequence[Any]] = FrozenMapping()
    init_lora_weights: bool = True
    bias: str = "none"
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        if self.rank_pattern is None:
            object.__setattr__(self, "rank_pattern", {})
        super().__post_init__()
        least = {"target_r": 0, "init_r": 0, "tinit": 0, "tfinal": 0, "deltaT": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ValueError(f"`{name}` must be {minimum} or more, and whole, got {value!r}")
        check_alphas("lora_alpha", self.lora_alpha)
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in (0, 1), got {getattr(self, name)}")
        if self.orth_reg_weight < 0:
            raise ValueError(f"`orth_reg_weight` must be 0 or more, got {self.orth_reg_weight}")
        if self.total_step is not None and self.total_step <= 0:
            raise ValueError(f"`total_step` must be above 0, got {self.total_step}")
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"of {self.total_step} steps `tinit` ({self.tinit}) and `tfinal` ({self.tfinal}) "
                f"leave none in which ranks are allocated: lower them or raise `total_step`"
            )
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                f"`init_lora_weights` must be True or False, got {self.init_lora_weights!r}"
            )
        check_probability("lora_dropout", self.lora_dropout)
        check_biases(self.bias, "lora_only")


def orthogonality(adapter: Adapter) -> Float[Array, ""]:
    r"""The regulariser that keeps the triplets of an AdaLoRA adapter like singular vectors.

    .. math::
      \frac{\lambda}{2 n} \sum_{\text{weights}} \lVert A^\top A - I \rVert_F
        + \lVert B B^\top - I \rVert_F

    over n weights, each layer of a stack counted, with :math:`\lambda` = ``orth_reg_weight``. Add
    it to the loss while training, and leave it out of what is reported: PEFT adds it in evaluation
    too, and for a model without a task not at all.

    Args:
      adapter: an AdaLoRA adapter.

    Returns:
      A scalar; float32 for adapters of half precision.

    Raises:
      ValueError: the adapter is of another method.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.ones((40, 30))}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 40)))
      >>> config = peftjax.AdaLoraConfig(init_r=4, target_r=2, target_modules=["dense"])
      >>> adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
      >>> bool(abs(peftjax.orthogonality(adapter) - 0.5 * 2) < 0.1)  # A and B are near zero
      True

    References:
      Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023,
      https://arxiv.org/abs/2303.10512
    """
    config = check_adalora(adapter)

    def norms(params: Arrays, buffers: Arrays) -> Array:
        a, b = params["lora_A"], params["lora_B"]
        ins, outs = tuple(range(a.ndim - 1)), tuple(range(1, b.ndim))
        # A triplet of zeros alone is one that pad_ranks has put there.
        mask = jnp.any(a != 0, axis=ins) | jnp.any(b != 0, axis=outs)
        if "rank_mask" in buffers:
            mask &= buffers["rank_mask"] > 0
        grams = (gram(a, a), dot(b, b, ((outs, outs), ((), ()))))
        both = (mask[:, None] * mask[None]).astype(grams[0].dtype)
        first, second = (
            _norm((each - jnp.eye(len(each), dtype=each.dtype)) * both) for each in grams
        )
        return first + second

    every = [over_stack(norms, s)(*site_arrays(adapter, s)).sum() for s in adapter.sites.values()]
    weights = sum(math.prod(site.stack_shape) for site in adapter.sites.values())
    return config.orth_reg_weight * functools.reduce(jnp.add, every) / (2 * weights)


def _norm(x: Array) -> Array:
    """The Frobenius norm, whose gradient at zero is zero and not undefined."""
    squares = jnp.sum(jnp.square(x))
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def check_adalora(adapter: Adapter) -> AdaLoraConfig:
    """The adapter's config; raises a ValueError unless it is AdaLoRA's."""
    if not isinstance(adapter.config, AdaLoraConfig):
        name = type(adapter.config).__name__
        raise ValueError(f"this needs an adapter made with AdaLoraConfig, got one of {name}")
    return adapter.config


def prune_triplets(adapter: Adapter, kept: Mapping[str, Bool[Array, "*stack r"]]) -> Adapter:
    """An AdaLoRA adapter with only some of its triplets, in smaller arrays.

    Args:
      adapter: the adapter, not traced: the new shapes depend on what is kept.
      kept: for each module which of its triplets stay.

    Returns:
      The adapter, with the ``rank_pattern`` of its config as PEFT writes it. Where layers of a
      stack keep unequal numbers, they are padded to the largest.
    """
    config = check_adalora(adapter)
    params, buffers = dict(adapter.params), dict(adapter.buffers)
    pattern = {}
    for site in adapter.sites.values():
        name, stack = site.name, site.stack_shape
        own, frozen = site_arrays(adapter, site)
        chosen = np.asarray(kept[name]) & (np.asarray(frozen.get("rank_mask", True)) > 0)
        pattern[pattern_key(site)] = _extended(config, site, chosen).tolist()
        rank = int(chosen.sum(axis=-1).max(initial=0))
        # Those that stay come first, in order; of a stack, each layer has its own.
        order = np.argsort(~chosen, axis=-1, kind="stable")[..., :rank]
        for array, axis in (("lora_A", -1), ("lora_E", -1), ("lora_B", len(stack))):
            own[array] = _taken(own[array], order, axis, len(stack))
        if stack:
            mask = np.take_along_axis(chosen, order, axis=-1)
            frozen = {**frozen, "rank_mask": jnp.asarray(mask, own["lora_E"].dtype)}
        params[name] = {**adapter.params[name], **own}
        buffers[name] = frozen
    config = dataclasses.replace(config, rank_pattern=pattern)
    return adapter.replace(params=params, buffers=buffers, config=config)


def pattern_key(site: Site) -> str:
    """The key of a site in ``rank_pattern``."""
    return f"{site.name}.lora_E"


def _extended(config: AdaLoraConfig, site: Site, chosen: np.ndarray) -> np.ndarray:
    """What is kept of the ``init_r`` triplets there were at first."""
    before = config.rank_pattern.get(pattern_key(site))
    if before is None:
        return chosen
    after = np.array(before, dtype=bool)
    for index in np.ndindex(after.shape[:-1]):
        row = after[index]
        row[row] = chosen[index][: row.sum()]
    return after


def _taken(array: Array, order: np.ndarray, axis: int, stack: int) -> Array:
    """The entries of an array along its rank axis, each layer of a stack by its own order."""
    last = jnp.moveaxis(array, axis, -1)
    between = [1] * (last.ndim - stack - 1)
    index = order.reshape(*order.shape[:stack], *between, order.shape[-1])
    index = np.broadcast_to(index, (*last.shape[:-1], order.shape[-1]))
    return jnp.moveaxis(jnp.take_along_axis(last, jnp.asarray(index), axis=-1), -1, axis)


def _left(config: AdaLoraConfig, site: Site) -> np.ndarray | None:
    """How many triplets of each weight of a site are left; None where nothing was pruned."""
    pattern = config.rank_pattern.get(pattern_key(site))
    if pattern is None:
        return None
    kept, wanted = np.array(pattern, dtype=bool), (*site.stack_shape, config.init_r)
    if kept.shape != wanted:
        raise ValueError(
            f"`rank_pattern` has a list of shape {kept.shape} for it; {config.init_r} triplets in "
            f"a stack of shape {site.stack_shape} need {wanted}"
        )
    return kept.sum(axis=-1)


def _settings(config: AdaLoraConfig, site: Site, layer: int | None) -> int:
    """The rank of one weight; of several that share a layer, the largest."""
    left = _left(config, site)
    if left is None:
        return config.init_r
    if layer is None:
        return int(left)
    return int(left[list(site.layers or range(len(left))).index(layer)].max())


def _rank_mask(config: AdaLoraConfig, site: Site) -> np.ndarray | None:
    """Which triplets of a pruned stack are there, and which are padding."""
    left = _left(config, site)
    if left is None or not site.stack_axes:
        return None
    return np.arange(left.max()) < left[..., None]


def _buffers(key: PRNGKeyArray, config: AdaLoraConfig, rank: int, weight: Weight) -> Arrays:
    alpha = config.lora_alpha if config.lora_alpha > 0 else config.init_r
    dtype = accumulation_dtype(weight.spec.dtype)
    return {"scaling": jnp.asarray(alpha / (config.init_r + 1e-5), dtype)}


def _init(
    key: PRNGKeyArray, config: AdaLoraConfig, rank: int, weight: Weight, buffers: Arrays
) -> Arrays:
    """Vectors of small normal numbers, or normal ones; and singular values of zero, or normal."""
    spec = weight.spec
    shapes = {
        "lora_A": (*spec.in_shape, rank),
        "lora_E": (rank,),
        "lora_B": (rank, *spec.out_shape),
    }
    std = {"lora_A": 0.02, "lora_E": 0.0, "lora_B": 0.02}
    return {
        name: jax.random.normal(own, shape, spec.dtype)
        * jnp.asarray(std[name] if config.init_lora_weights else 1, spec.dtype)
        for own, (name, shape) in zip(jax.random.split(key, 3), shapes.items(), strict=True)
    }


def _factors(
    config: AdaLoraConfig,
    params: Arrays,
    buffers: Arrays,
    weight: Weight,
    key: PRNGKeyArray | None,
) -> Factors:
    values, a = widened(params["lora_E"] * buffers.get("rank_mask", 1)), widened(params["lora_A"])
    a = a * jnp.broadcast_to(values, a.shape)
    # A lookup has no input to drop from.
    dropout = 0.0 if weight.spec.kind == "lookup" else config.lora_dropout
    return Factors(A=a, B=times(buffers["scaling"], params["lora_B"]), dropout=dropout)


AdaLoraConfig.method = Method(
    settings=_settings,
    init=_init,
    buffers=_buffers,
    factors=_factors,
    axes={"lora_A": ("in", "rank"), "lora_E": ("rank",), "lora_B": ("rank", "out")},
    rank_mask=_rank_mask,
    params=("lora_A", "lora_E", "lora_B"),
    program=("lora_dropout",),
    mixes=lambda config: True,
)
