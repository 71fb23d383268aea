"""LoHa: the Hadamard product of two low-rank matrices added to a frozen weight."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from peftjax.adapter import Adapter
from peftjax.config import (
    AdapterConfig,
    FrozenMapping,
    check_alphas,
    check_probability,
    check_ranks,
)
from peftjax.factors import (
    Arrays,
    Change,
    Dense,
    Factors,
    Method,
    Weight,
    WeightSpec,
    accumulation_dtype,
    times,
    widened,
)
from peftjax.sites import Site
from peftjax.targeting import pattern_value


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHaConfig(AdapterConfig):
    r"""Low-rank Hadamard product: learn a change of rank ``r`` squared with two products of rank r.

    A frozen weight :math:`W` of shape (in, out) is changed by the elementwise product of two
    low-rank matrices, whose factors are the trainable ``hada_w1_b`` and ``hada_w2_b``
    (:math:`B_1, B_2`, (in, ``r``)) and ``hada_w1_a`` and ``hada_w2_a`` (:math:`A_1, A_2`,
    (``r``, out)):

    .. math::

      W' = W + s \, (B_1 A_1) \odot (B_2 A_2), \qquad s = \alpha / r

    Its rows and columns are never multiplied out where that costs more than it saves: the same
    change is a product of two factors of rank ``r`` squared, the Khatri-Rao products of the small
    ones,

    .. math::

      (B_1 A_1) \odot (B_2 A_2) = (B_1 \ast B_2)(A_1 \ast A_2), \qquad
      (B_1 \ast B_2)_{:,(i,j)} = B_{1:,i} \odot B_{2:,j}.

    For ranks and token counts where ``fusing_is_cheaper``, the change is built once a call and
    added to the weight instead, rounded to the weight's dtype as merging would. That takes as much
    memory as the weight; of a scanned stack, as the whole stack.

    With ``use_effective_conv2d`` a convolution whose kernel has more than one tap gets a Tucker
    core for each of the two matrices (``hada_t1``, ``hada_t2``, (``r``, ``r``, \*taps)), the small
    factors then spanning channels alone:

    .. math::

      (B A)_{(c, t), o} \to \sum_{i,j} \mathcal{T}_{i,j,t} \, A_{i,o} \, B_{c,j}

    Args:
      r: rank of each of the two matrices.
      alpha: numerator of the scale.
      rank_dropout: probability of dropping an output of the change, in training; those that stay
        are divided by their share. (PEFT's name: no rank is dropped.) Where all are dropped the
        change is zero; PEFT's is not a number.
      module_dropout: probability of dropping the whole change of a module, in training.
      use_effective_conv2d: give convolutions of more than one tap a Tucker core.
      init_weights: start as the identity. False: all factors random.
      rank_pattern: rank of single modules; keys are regular expressions for the end of a path,
        the first that matches wins.
      alpha_pattern: ``alpha`` of single modules, by the same rule.
      target_modules: see :class:`~peftjax.config.AdapterConfig`, as for the fields below.
      exclude_modules: modules not to adapt.
      layers_to_transform: layer indices to adapt.
      layers_pattern: name of the module that a layer index follows.
      modules_to_save: modules to train and save whole.
      base_model_name_or_path: the base model, for torch PEFT.
      revision: the base model's revision, for torch PEFT.
      task_type: PEFT's task, for torch PEFT.

    Raises:
      ValueError: a rank that is no positive integer, an alpha that is no number, or a probability
        out of range.

    Example:
      >>> from peftjax.methods.loha import LoHaConfig
      >>> LoHaConfig(r=4, alpha=8, target_modules=["query", "value"]).alpha
      8

    References:
      Hyeon-Woo et al., FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
      Learning, 2021, https://arxiv.org/abs/2108.06098

      Yeh et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
      Evaluation, 2023, https://arxiv.org/abs/2309.14859
    """

    peft_type: ClassVar[str] = "LOHA"

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    rank_pattern: Mapping[str, int] = FrozenMapping()
    alpha_pattern: Mapping[str, float] = FrozenMapping()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self.r, self.rank_pattern)
        check_alphas("alpha", self.alpha, self.alpha_pattern)
        check_probability("rank_dropout", self.rank_dropout)
        check_probability("module_dropout", self.module_dropout)


def fusing_is_cheaper(r: int, spec: WeightSpec, tokens: int) -> bool:
    r"""Whether building the change once costs fewer FLOPs than sending every token through factors.

    Counted over forward and backward, for :math:`n` tokens and a weight of :math:`d_i` inputs and
    :math:`d_o` outputs in :math:`g` groups. Factors of rank :math:`r^2`: two thin products, each
    again for the gradient of its input and of its factor, and the Khatri-Rao products themselves
    with their gradients, which take about :math:`5 r^2` operations a row. Fused: the two products
    of rank r with their gradients, the elementwise work, and one more product as large as the
    weight's own, for the gradient of the change.

    .. math::
      6 n r^2 (g d_i + d_o) + 5 r^2 (d_i + d_o) > (12 r + 8) d_i d_o + 2 n d_i d_o

    For many tokens that is :math:`r > \sqrt{d / 6}` where both widths are :math:`d`: 20 at 2,400.
    Few tokens always go through factors.

    Args:
      r: rank of each of the two matrices.
      spec: the weight.
      tokens: how many vectors one call sends through it.
    """
    size, thin = spec.in_size * spec.out_size, spec.groups * spec.in_size + spec.out_size
    factors = 6 * tokens * r**2 * thin + 5 * r**2 * (spec.in_size + spec.out_size)
    return factors > (12 * r + 8) * size + 2 * tokens * size


def split_loha(adapter: Adapter) -> tuple[dict[str, Arrays], dict[str, Arrays]]:
    r"""Splits a LoHa adapter for personalised federated learning: what to share, what to keep.

    In pFedPara every client trains both matrices of the Hadamard product, sends the first to be
    averaged with the other clients', and keeps the second, which makes the change its own. (The
    paper also adds 1 to the second, which PEFT's LoHa does not have.)

    Args:
      adapter: a LoHa adapter.

    Returns:
      The global half of ``adapter.params``, ``hada_w1_*`` and ``hada_t1``, and the local half:
      ``hada_w2_*``, ``hada_t2`` and whatever else the adapter trains.

    Raises:
      ValueError: the adapter is of another method.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 4)))
      >>> config = peftjax.LoHaConfig(r=2, target_modules=["dense"])
      >>> adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
      >>> shared, own = peftjax.split_loha(adapter)
      >>> sorted(shared["dense"]), sorted(own["dense"])
      (['hada_w1_a', 'hada_w1_b'], ['hada_w2_a', 'hada_w2_b'])
      >>> shared = jax.tree.map(lambda x: 0.5 * x, shared)  # the server's average, say
      >>> adapter = peftjax.join_loha(adapter, shared, own)

    References:
      Hyeon-Woo et al., FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
      Learning, 2021, https://arxiv.org/abs/2108.06098
    """
    if not isinstance(adapter.config, LoHaConfig):
        raise ValueError(f"split_loha needs a LoHa adapter, got one of {type(adapter.config)}")
    shared: dict[str, Arrays] = {}
    own: dict[str, Arrays] = {}
    for module, arrays in adapter.params.items():
        for name, array in arrays.items():
            half = shared if module in adapter.sites and name in _GLOBAL else own
            half.setdefault(module, {})[name] = array
    return shared, own


def join_loha(adapter: Adapter, shared: Mapping[str, Arrays], own: Mapping[str, Arrays]) -> Adapter:
    """The adapter with both halves that ``split_loha`` gave put together again.

    Args:
      adapter: the adapter that was split, or one like it.
      shared: the global half, of this or another client.
      own: the local half.

    Raises:
      ValueError: the halves are not those of this adapter; names or shapes differ.
    """
    modules = dict.fromkeys([*own, *shared])
    params = {m: {**own.get(m, {}), **shared.get(m, {})} for m in modules}
    before, after = (jax.tree.map(jnp.shape, each) for each in (adapter.params, params))
    if before != after:
        wrong = sorted(m for m in {*before, *after} if before.get(m) != after.get(m))
        raise ValueError(
            f"the halves do not fit the adapter at {', '.join(wrong[:5])}: pass what split_loha "
            f"gave for adapters of the same config and model"
        )
    return adapter.replace(params=params)


_GLOBAL = ("hada_w1_a", "hada_w1_b", "hada_t1")


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Rank and scale of one weight."""

    rank: int
    scaling: float


def _settings(config: LoHaConfig, site: Site, layer: int | None) -> _Settings:
    rank = pattern_value(config.rank_pattern, site, config.r, layer)
    alpha = pattern_value(config.alpha_pattern, site, config.alpha, layer)
    return _Settings(rank, alpha / rank)


def core_taps(config: LoHaConfig, spec: WeightSpec) -> tuple[int, ...]:
    """The shape of a kernel's taps if they get a core of their own; empty otherwise."""
    taps = tuple(spec.in_shape[axis] for axis in spec.taps)
    return taps if config.use_effective_conv2d and math.prod(taps) > 1 else ()


def _buffers(key: PRNGKeyArray, config: LoHaConfig, settings: _Settings, weight: Weight) -> Arrays:
    return {"scaling": jnp.asarray(settings.scaling, accumulation_dtype(weight.spec.dtype))}


def _init(
    key: PRNGKeyArray, config: LoHaConfig, settings: _Settings, weight: Weight, buffers: Arrays
) -> Arrays:
    """Uniform factors, as torch would draw them, but for one that is zero."""
    spec, r = weight.spec, settings.rank
    taps = core_taps(config, spec)
    if taps:
        ins = tuple(n for axis, n in enumerate(spec.in_shape) if axis not in spec.taps)
        # PEFT keeps these factors transposed, and torch takes the second axis for the fan-in.
        fans = {"a": spec.out_size, "b": math.prod(ins), "t": r * math.prod(taps)}
        shapes = {"a": (r, *spec.out_shape), "b": (*ins, r), "t": (r, r, *taps)}
    else:
        fans = {"a": r, "b": spec.in_size}
        shapes = {"a": (r, *spec.out_shape), "b": (*spec.in_shape, r)}

    params = {}
    names = {"a": "hada_w{}_a", "b": "hada_w{}_b", "t": "hada_t{}"}
    for own, part in zip(jax.random.split(key, len(shapes)), shapes, strict=True):
        bound = 1 / math.sqrt(fans[part])
        for own_key, half in zip(jax.random.split(own), (1, 2), strict=True):
            params[names[part].format(half)] = jax.random.uniform(
                own_key, shapes[part], spec.dtype, -bound, bound
            )
    if config.init_weights:
        params["hada_w2_b"] = jnp.zeros_like(params["hada_w2_b"])
    return params


def _halves(params: Arrays, buffers: Arrays, spec: WeightSpec) -> list[tuple[Array, Array]]:
    """The two low-rank matrices as factors of shapes (*in, r) and (r, *out)."""
    halves = []
    for half in (1, 2):
        a, b = (widened(params[f"hada_w{half}_{side}"]) for side in "ab")
        if "rank_mask" in buffers:
            mask = buffers["rank_mask"].astype(a.dtype)
            a = a * mask.reshape(-1, *[1] * (a.ndim - 1))
            b = b * jnp.broadcast_to(mask, b.shape)
        if f"hada_t{half}" in params:
            b = _with_core(widened(params[f"hada_t{half}"]), b, spec)
        halves.append((b, a))
    return halves


def _with_core(core: Array, b: Array, spec: WeightSpec) -> Array:
    """The in factor of a kernel, (*in, i), from its core, (i, j, *taps), and (*channels, j)."""
    spread = jnp.tensordot(core, b, ((1,), (b.ndim - 1,)), precision="highest")
    taps_first = jnp.moveaxis(spread, 0, -1)
    now = [*spec.taps, *(axis for axis in range(len(spec.in_shape)) if axis not in spec.taps)]
    return jnp.moveaxis(taps_first, range(len(now)), now)


def _kept(config: LoHaConfig, key: PRNGKeyArray, spec: WeightSpec, dtype: Any) -> Array:
    """What the two dropouts of training multiply the outputs of the change with."""
    key_rows, key_module = jax.random.split(key)
    rows = jax.random.uniform(key_rows, spec.out_shape) > config.rank_dropout
    share = jnp.maximum(jnp.mean(rows, dtype=accumulation_dtype(dtype)), 1 / spec.out_size)
    module = jax.random.uniform(key_module) > config.module_dropout
    return jnp.where(rows & module, 1 / share, 0).astype(dtype)


def _change(
    config: LoHaConfig, params: Arrays, buffers: Arrays, weight: Weight, key: PRNGKeyArray | None
) -> Change:
    spec, scaling = weight.spec, buffers["scaling"]
    (b1, a1), (b2, a2) = _halves(params, buffers, spec)
    if key is not None and (config.rank_dropout or config.module_dropout):
        a1 = a1 * _kept(config, key, spec, a1.dtype)[None]
    rank = a1.shape[0]
    if weight.fusible and (weight.tokens is None or fusing_is_cheaper(rank, spec, weight.tokens)):
        return Dense(times(scaling, _product(b1, a1)) * _product(b2, a2))
    factor_in = (b1[..., :, None] * b2[..., None, :]).reshape(*spec.in_shape, rank**2)
    factor_out = (a1[:, None] * a2[None, :]).reshape(rank**2, *spec.out_shape)
    return Factors(A=factor_in, B=times(scaling, factor_out))


def _product(b: Array, a: Array) -> Array:
    return jnp.tensordot(b, a, ((b.ndim - 1,), (0,)), precision="highest")


def _wants_tokens(config: LoHaConfig, spec: WeightSpec, params: Arrays) -> bool:
    """Only where the answer for very many tokens differs from that for none."""
    return fusing_is_cheaper(params["hada_w1_b"].shape[-1], spec, 2**62)


LoHaConfig.method = Method(
    settings=_settings,
    init=_init,
    buffers=_buffers,
    factors=_change,
    axes={
        "hada_w1_a": ("rank", "out"),
        "hada_w1_b": ("in", "rank"),
        "hada_w2_a": ("rank", "out"),
        "hada_w2_b": ("in", "rank"),
        "hada_t1": ("rank", "rank", "taps"),
        "hada_t2": ("rank", "rank", "taps"),
    },
    wants_tokens=_wants_tokens,
    params=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    program=("use_effective_conv2d", "rank_dropout", "module_dropout"),
    mixes=lambda config: True,
)
