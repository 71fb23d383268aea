"""LoRA: a low-rank change added to a frozen weight."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from peftjax.config import (
    LORA_FIELDS_OF_PEFT_ALONE,
    AdapterConfig,
    FrozenMapping,
    check_alphas,
    check_biases,
    check_probability,
    check_ranks,
    rejects,
)
from peftjax.factors import (
    Arrays,
    BiasChange,
    Dense,
    Factors,
    Method,
    Weight,
    WeightSpec,
    accumulation_dtype,
    inverse,
    times,
    widened,
)
from peftjax.sites import Site
from peftjax.targeting import pattern_value

_INITS = re.compile(r"gaussian|orthogonal|olora|pissa(_niter_\d+)?")
_INITS_OF_PEFT_ALONE = ("mica", "eva", "corda", "loftq", "lora_ga")


@rejects(**LORA_FIELDS_OF_PEFT_ALONE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    r"""Low-rank adaptation: learn the change of a weight as a product of two thin matrices.

    A frozen weight :math:`W` of shape (in, out) gets the trainable factors :math:`A` of shape
    (in, ``r``) and :math:`B` of shape (``r``, out). With :math:`\alpha` as ``lora_alpha``, the
    input passed through dropout for the second term alone:

    .. math::

      y = x W + s \, (x A) B, \qquad
      s = \begin{cases}
        \alpha / r        & \text{by default} \\
        \alpha / \sqrt{r} & \text{with } \texttt{use\_rslora}
      \end{cases}

    With ``use_dora`` the columns of the changed weight :math:`V = W + s A B` keep their directions
    and get trainable lengths :math:`m`; the norm is taken without gradient, as the paper does:

    .. math::

      y = \frac{m}{\lVert V \rVert} \odot (x W + s \, (x A) B), \qquad
      \lVert V \rVert^2 = \lVert W \rVert^2 + 2 s \, (W^\top A) \cdot B
        + s^2 \, B \cdot (A^\top A) B \quad \text{column by column}

    Neither V nor any other matrix of W's size is built. A bias is not scaled. ``lora_dropout``
    drops from the input of A alone; PEFT also drops from the input of :math:`(m / \lVert V \rVert
    - 1) W`, which has the same mean, more noise, and costs a second product with W. Of several
    DoRA adapters in a row each takes the norms of the weight as those before it left it; PEFT takes
    all of them of the frozen weight.

    Args:
      r: rank of the change.
      lora_alpha: numerator of the scale.
      lora_dropout: probability of dropping an input feature on the adapter's way, in training.
      use_rslora: divide by the square root of the rank, which keeps large ranks learning.
      use_dora: learn lengths and directions of the weight's columns apart.
      lora_bias: give the change a bias of its own.
      rank_pattern: rank of single modules; keys are regular expressions for the end of a path,
        the first that matches wins.
      alpha_pattern: ``lora_alpha`` of single modules, by the same rule.
      init_lora_weights: how the factors start. True: A uniform, B zero. ``"gaussian"``: A normal,
        B zero. ``"orthogonal"``: orthogonal rows and columns, for even ranks. ``"olora"``,
        ``"pissa"`` and ``"pissa_niter_N"`` (N steps of a randomised SVD): from the weight itself.
        False: both factors random, so the adapted function differs from the base at the start.
      bias: biases of the base model to train: ``"none"``, ``"all"`` or ``"lora_only"`` (those of
        adapted modules).
      fan_in_fan_out: accepted because PEFT's files hold it, and never used: PEFT overwrites it
        layer by layer, so a file tells only about the last one. Which axes of a weight are inputs
        is seen in the trace of the model.
      target_modules: see :class:`~peftjax.config.AdapterConfig`, as for the fields below.
      exclude_modules: modules not to adapt.
      layers_to_transform: layer indices to adapt.
      layers_pattern: name of the module that a layer index follows.
      modules_to_save: modules to train and save whole.
      base_model_name_or_path: the base model, for torch PEFT.
      revision: the base model's revision, for torch PEFT.
      task_type: PEFT's task, for torch PEFT.

    Raises:
      ValueError: a value out of range, fields that exclude each other, or a field of PEFT's
        LoraConfig that is not supported here.

    Example:
      >>> from peftjax.methods.lora import LoraConfig
      >>> config = LoraConfig(r=16, lora_alpha=32, target_modules=["query", "value"])
      >>> config.scaling(r=16, alpha=32)
      2.0

    References:
      Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021,
      https://arxiv.org/abs/2106.09685

      Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023,
      https://arxiv.org/abs/2312.03732

      Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
      Language Models, 2024, https://arxiv.org/abs/2404.02948

      Büyükakyüz, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, 2024,
      https://arxiv.org/abs/2406.01775

      Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024,
      https://arxiv.org/abs/2402.09353
    """

    peft_type: ClassVar[str] = "LORA"

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = FrozenMapping()
    alpha_pattern: Mapping[str, float] = FrozenMapping()
    init_lora_weights: bool | str = True
    bias: str = "none"
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = check_ranks(self.r, self.rank_pattern)
        alphas = check_alphas("lora_alpha", self.lora_alpha, self.alpha_pattern)
        self._check_init(alphas)
        odd = [f"{name} = {rank}" for name, rank in ranks.items() if rank % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise ValueError(f'`init_lora_weights="orthogonal"` needs even ranks, got {odd[0]}')
        check_probability("lora_dropout", self.lora_dropout)
        check_biases(self.bias, "lora_only")
        if self.lora_bias and self.use_dora:
            raise ValueError("`lora_bias` does not work with `use_dora`: set one of them")

    def _check_init(self, alphas: Mapping[str, float]) -> None:
        init = self.init_lora_weights
        if isinstance(init, bool):
            return
        if init in _INITS_OF_PEFT_ALONE:
            raise ValueError(f'`init_lora_weights="{init}"` is not supported by peftjax')
        if not isinstance(init, str) or not _INITS.fullmatch(init):
            raise ValueError(
                "`init_lora_weights` must be True, False, 'gaussian', 'orthogonal', 'olora', "
                f"'pissa' or 'pissa_niter_N'; got {init!r}"
            )
        low = [f"`{name}` = {alpha}" for name, alpha in alphas.items() if alpha <= 0]
        if low and init.startswith("pissa"):
            raise ValueError(
                f"`init_lora_weights={init!r}` divides by the scale, which must be above 0: got "
                f"{low[0]}"
            )
        if self.lora_bias:
            raise ValueError(
                f"`lora_bias` needs `init_lora_weights` to be True or False, got {init!r}"
            )

    def scaling(self, r: int, alpha: float) -> float:
        """Returns the factor of the low-rank product for a module's own rank and alpha."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Rank and scale of one weight."""

    rank: int
    scaling: float


def _settings(config: LoraConfig, site: Site, layer: int | None) -> _Settings:
    rank = pattern_value(config.rank_pattern, site, config.r, layer)
    alpha = pattern_value(config.alpha_pattern, site, config.lora_alpha, layer)
    if config.lora_bias and site.bias is None:
        raise ValueError(
            "there is no bias that `lora_bias` could change: exclude the module or leave it off"
        )
    return _Settings(rank, config.scaling(rank, alpha))


def _buffers(key: PRNGKeyArray, config: LoraConfig, settings: _Settings, weight: Weight) -> Arrays:
    """The scale; with PiSSA and OLoRA also where A and B start, which is subtracted from them."""
    dtype = accumulation_dtype(weight.spec.dtype)
    scaling = {"scaling": jnp.asarray(settings.scaling, dtype)}
    if not _starts_from_weight(config):
        return scaling
    a, b = _from_weight(str(config.init_lora_weights), key, weight, settings)
    return scaling | {"lora_A_init": a, "lora_B_init": b}


def _init(
    key: PRNGKeyArray, config: LoraConfig, settings: _Settings, weight: Weight, buffers: Arrays
) -> Arrays:
    """A and B of one weight, a bias and lengths if there are any."""
    spec, rank = weight.spec, settings.rank
    init = config.init_lora_weights
    if _starts_from_weight(config):
        a, b = buffers["lora_A_init"], buffers["lora_B_init"]
    elif init == "orthogonal":
        a, b = _orthogonal(key, spec, rank)
    else:
        a, b = _random(key, init, spec, rank)
    params = {"lora_A": a, "lora_B": b}
    if config.lora_bias:
        bound = 0.0 if init else 1 / math.sqrt(rank)
        shape = spec.out_shape
        params["lora_B_bias"] = jax.random.uniform(key, shape, spec.dtype, -bound, bound)
    if config.use_dora:
        # The lengths of the columns as they are, so that nothing is rescaled at the start.
        norms = _norms(weight, *_low_rank(params, buffers))
        params["lora_magnitude_vector"] = norms.astype(spec.dtype)
    return params


def _starts_from_weight(config: LoraConfig) -> bool:
    return str(config.init_lora_weights).startswith(("olora", "pissa"))


def _random(key: Array, init: bool | str, spec: WeightSpec, rank: int) -> tuple[Array, Array]:
    """One factor random, the other zero; both random without an identity init.

    A table starts the other way round: zero rows and a random map.
    """
    key_a, key_b = jax.random.split(key)
    a_shape, b_shape = (*spec.in_shape, rank), (rank, *spec.out_shape)
    if spec.kind == "lookup":
        a = jnp.zeros(a_shape, spec.dtype)
        return (
            jax.random.normal(key_a, a_shape, spec.dtype) if init is False else a,
            jax.random.normal(key_b, b_shape, spec.dtype),
        )
    if init == "gaussian":
        a = jax.random.normal(key_a, a_shape, spec.dtype) / rank
    else:
        a = _uniform(key_a, a_shape, math.prod(spec.in_shape), spec.dtype)
    zeros = jnp.zeros(b_shape, spec.dtype)
    return a, _uniform(key_b, b_shape, rank, spec.dtype) if init is False else zeros


def _uniform(key: Array, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> Array:
    """Kaiming's uniform distribution with slope sqrt(5), the default of a torch Linear."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _orthogonal(key: Array, spec: WeightSpec, rank: int) -> tuple[Array, Array]:
    """A from the odd, B from the even rows of one orthogonal matrix, so that A B = 0."""
    key_q, key_a, key_b = jax.random.split(key, 3)
    half, dtype = rank // 2, accumulation_dtype(spec.dtype)
    q = jnp.linalg.qr(jax.random.normal(key_q, (rank, rank), dtype))[0]
    a = jax.random.normal(key_a, (spec.in_size, half), dtype) @ q[1::2] / 10
    b = q[0::2].T @ jax.random.normal(key_b, (half, spec.out_size), dtype) / 10
    return _laid_out(a, b, spec)


def _laid_out(a: Array, b: Array, spec: WeightSpec) -> tuple[Array, Array]:
    """Two matrices as A and B of the adapter."""
    a, b = a.reshape(*spec.in_shape, a.shape[1]), b.reshape(b.shape[0], *spec.out_shape)
    return a.astype(spec.dtype), b.astype(spec.dtype)


def _from_weight(init: str, key: Array, weight: Weight, settings: _Settings) -> tuple[Array, Array]:
    """The factors that PiSSA and OLoRA take out of the weight, before they are scaled."""
    spec, rank, matrix = weight.spec, settings.rank, weight.matrix()
    if rank > min(matrix.shape):
        raise ValueError(
            f"init_lora_weights={init!r} takes at most {min(matrix.shape)} directions out of a "
            f"weight of shape {spec.in_shape} -> {spec.out_shape}, but the rank is {rank}"
        )
    if init == "olora":
        # In torch's layout (out, in): W = Q R, A = R[:rank], B = Q[:, :rank].
        q, r = jnp.linalg.qr(matrix.T)
        a, b = r[:rank].T, q[:, :rank].T
    else:
        u, s, vt = _svd(init, key, matrix, rank)
        root = jnp.sqrt(s / settings.scaling)
        a, b = u * root[None], root[:, None] * vt
    return _laid_out(a, b, spec)


def _svd(init: str, key: Array, matrix: Array, rank: int) -> tuple[Array, Array, Array]:
    """The leading singular triplets, exact or by a randomised range finder."""
    if init == "pissa":
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    steps = int(init.rpartition("_")[2])
    width = min(2 * rank, *matrix.shape)
    basis = matrix @ jax.random.normal(key, (matrix.shape[1], width), matrix.dtype)
    for _ in range(steps):
        basis = matrix @ (matrix.T @ jnp.linalg.qr(basis)[0])
    basis = jnp.linalg.qr(basis)[0]
    u, s, vt = jnp.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vt[:rank]


def _low_rank(params: Arrays, buffers: Arrays) -> tuple[Array, Array]:
    """A and s B, the initial ones subtracted where they were taken out of the weight."""
    a, b, scaling = params["lora_A"], params["lora_B"], buffers["scaling"]
    if "rank_mask" in buffers:
        a = a * jnp.broadcast_to(buffers["rank_mask"], a.shape)
    b = times(scaling, b)
    if "lora_A_init" in buffers:
        a = jnp.concatenate([a, buffers["lora_A_init"]], axis=-1)
        b = jnp.concatenate([b, -times(scaling, buffers["lora_B_init"])], axis=0)
    return a, b


def _norms(weight: Weight, a: Array, b: Array) -> Array:
    """The lengths of the columns of W + A B, which is not built."""
    changed = dataclasses.replace(weight, earlier=(*weight.earlier, Factors(A=a, B=b)))
    # Rounding could leave a column of zeros a square below zero.
    squares = changed.squared_norms()
    squares = jnp.maximum(squares, jnp.finfo(squares.dtype).tiny)
    return lax.stop_gradient(jnp.sqrt(squares))


def _factors(
    config: LoraConfig, params: Arrays, buffers: Arrays, weight: Weight, key: PRNGKeyArray | None
) -> Factors:
    a, b = _low_rank(params, buffers)
    # A lookup has no input to drop from.
    dropout = 0.0 if weight.spec.kind == "lookup" else config.lora_dropout
    if not config.use_dora:
        return Factors(A=a, B=b, dropout=dropout)
    magnitude = widened(params["lora_magnitude_vector"])
    norms = _norms(weight, a, b).astype(magnitude.dtype)
    return Factors(A=a, B=b, out_scale=magnitude / norms, dropout=dropout)


def _inverse(
    config: LoraConfig, params: Arrays, buffers: Arrays, weight: Weight, key: PRNGKeyArray | None
) -> Factors | Dense:
    if config.use_dora:
        raise ValueError(
            "a weight that DoRA was merged into no longer says how long its columns were: keep "
            "the base params instead of unmerging"
        )
    return inverse(_factors(config, params, buffers, weight, key))


def _bias(config: LoraConfig, params: Arrays, buffers: Arrays, weight: Weight) -> BiasChange:
    if not config.lora_bias:
        return BiasChange()
    return BiasChange(shift=times(buffers["scaling"], params["lora_B_bias"]))


LoraConfig.method = Method(
    settings=_settings,
    init=_init,
    buffers=_buffers,
    factors=_factors,
    inverse=_inverse,
    bias=_bias,
    axes={
        "lora_A": ("in", "rank"),
        "lora_B": ("rank", "out"),
        "lora_B_bias": ("out",),
        "lora_magnitude_vector": ("out",),
        "lora_A_init": ("in", "rank"),
        "lora_B_init": ("rank", "out"),
    },
    init_reads_weight=lambda config: config.use_dora,
    buffers_read_weight=_starts_from_weight,
    reads_weight=lambda config: config.use_dora,
    params=("lora_A", "lora_B", "lora_B_bias", "lora_magnitude_vector"),
    program=("use_dora", "lora_dropout", "lora_bias"),
    mixes=lambda config: not config.use_dora,
)
