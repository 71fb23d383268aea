"""HRA: a chain of Householder reflections of a weight's inputs."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from peftjax.adapter import Adapter, site_arrays
from peftjax.config import AdapterConfig, FrozenMapping, check_biases, check_ranks
from peftjax.factors import Arrays, Factors, Method, Weight, accumulation_dtype, gram
from peftjax.sites import Site
from peftjax.stacks import over_stack
from peftjax.targeting import pattern_value


@dataclasses.dataclass(frozen=True, kw_only=True)
class HRAConfig(AdapterConfig):
    r"""Householder reflection adaptation: turn the inputs of a weight by a chain of reflections.

    The unit columns :math:`v_i = u_i / \lVert u_i \rVert` of the trainable :math:`U` of shape
    (in, ``r``) each reflect the in-space of a frozen weight :math:`W` of shape (in, out):

    .. math::

      W' = P^\top W, \qquad P = H_0 H_1 \cdots H_{r-1}, \qquad H_i = I - 2 v_i v_i^\top

    The chain is never multiplied out. With :math:`V` the unit columns side by side it is
    :math:`P = I - V T V^\top`, :math:`T^{-1} = \tfrac12 I + \mathrm{striu}(V^\top V)`, so that the
    change is one of rank ``r``, and works for convolutions, lookups and tied heads alike:

    .. math::

      W' = W + A B, \qquad A = V, \qquad B = -T^\top (V^\top W)

    For even ``r`` the columns start in pairs of equal ones, whose reflections cancel. For odd
    ``r`` the start is not the identity, as in PEFT, and a warning says so.

    With ``apply_GS`` the columns 0, 2, 4, ... are made orthonormal among themselves, and so are
    the columns 1, 3, 5, ...: each half reflects a whole subspace at once, and the halves start
    equal, so the start is still the identity. (PEFT orthonormalises all columns together. Its
    :math:`P` is then :math:`I - 2 Q Q^\top`, which no start makes the identity, and the second of
    two equal columns becomes rounding noise.) A PEFT file with ``apply_GS`` keeps its numbers here
    when its columns are replaced by their orthonormal :math:`Q`: orthonormal reflections commute,
    so the two halves of :math:`Q` make the same :math:`P`.

    Args:
      r: number of reflections.
      apply_GS: keep each half of the reflections orthonormal; a half has fewer than the weight has
        inputs.
      init_weights: start as the identity, for even ranks. False: random columns.
      rank_pattern: number of reflections of single modules; keys are regular expressions for the
        end of a path, the first that matches wins. PEFT has no such field.
      bias: biases of the base model to train: ``"none"``, ``"all"`` or ``"hra_only"`` (those of
        adapted modules).
      target_modules: see :class:`~peftjax.config.AdapterConfig`, as for the fields below.
      exclude_modules: modules not to adapt.
      layers_to_transform: layer indices to adapt.
      layers_pattern: name of the module that a layer index follows.
      modules_to_save: modules to train and save whole.
      base_model_name_or_path: the base model, for torch PEFT.
      revision: the base model's revision, for torch PEFT.
      task_type: PEFT's task, for torch PEFT.

    Raises:
      ValueError: a rank that is no positive integer, or an unknown ``bias``.

    Example:
      >>> from peftjax.methods.hra import HRAConfig
      >>> HRAConfig(r=4, target_modules=["query", "value"]).apply_GS
      False

    References:
      Yuan et al., Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder
      Reflection Adaptation, 2024, https://arxiv.org/abs/2405.17484

      Schreiber and Van Loan, A Storage-Efficient WY Representation for Products of Householder
      Transformations, 1989, https://doi.org/10.1137/0910005
    """

    peft_type: ClassVar[str] = "HRA"

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True
    rank_pattern: Mapping[str, int] = FrozenMapping()
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = check_ranks(self.r, self.rank_pattern)
        odd = [f"{name} = {rank}" for name, rank in ranks.items() if rank % 2]
        check_biases(self.bias, "hra_only")
        if odd and self.init_weights:
            warnings.warn(
                f"an odd number of reflections ({odd[0]}) does not start as the identity: "
                f"take an even one",
                UserWarning,
                stacklevel=3,
            )


def hra_orthogonality(adapter: Adapter) -> Float[Array, ""]:
    r"""The paper's regulariser, which pulls the reflections of an HRA adapter apart.

    .. math::
      \sum_{\text{weights}} \lVert V^\top V - I \rVert_F^2

    with the unit columns :math:`V` of every weight, each layer of a stack counted. Add a multiple
    of it to the loss.

    Args:
      adapter: an HRA adapter.

    Returns:
      A scalar, zero for orthonormal reflections; float32 for adapters of half precision.

    Raises:
      ValueError: the adapter is of another method.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.ones((40, 30))}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 40)))
      >>> config = peftjax.HRAConfig(r=2, target_modules=["dense"])
      >>> adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
      >>> round(float(peftjax.hra_orthogonality(adapter)), 3)  # two equal columns, at the start
      2.0

    References:
      Yuan et al., Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder
      Reflection Adaptation, 2024, https://arxiv.org/abs/2405.17484
    """
    config = adapter.config
    if not isinstance(config, HRAConfig):
        raise ValueError(f"hra_orthogonality needs an HRA adapter, got one of {type(config)}")

    def penalty(params: Arrays, buffers: Arrays) -> Array:
        v = reflections(config, params, buffers)
        # The diagonal is 1 by construction, and 0 for the padding of a stack.
        return 2 * jnp.sum(jnp.square(jnp.triu(gram(v, v), 1)))

    every = (
        jnp.sum(over_stack(penalty, site)(*site_arrays(adapter, site)))
        for site in adapter.sites.values()
    )
    return functools.reduce(jnp.add, every)


def _settings(config: HRAConfig, site: Site, layer: int | None) -> int:
    return pattern_value(config.rank_pattern, site, config.r, layer)


def _init(
    key: PRNGKeyArray, config: HRAConfig, rank: int, weight: Weight, buffers: Arrays
) -> Arrays:
    """Pairs of equal columns, uniform as torch would draw them: the fan-in is their number."""
    spec = weight.spec
    if config.apply_GS and (rank + 1) // 2 >= spec.in_size:
        raise ValueError(
            f"`apply_GS` keeps each half of {rank} reflections orthonormal, and a half of as many "
            f"as the {spec.in_size} inputs is -1 whatever it learns: take `r`, or the module's own "
            f"rank in `rank_pattern`, below {2 * spec.in_size - 1}, or exclude the module"
        )
    paired = config.init_weights and rank % 2 == 0
    drawn = rank // 2 if paired else rank
    bound = 1 / math.sqrt(drawn)
    u = jax.random.uniform(key, (*spec.in_shape, drawn), spec.dtype, -bound, bound)
    return {"hra_u": jnp.repeat(u, 2, axis=-1) if paired else u}


def _unit(u: Array) -> Array:
    """The columns at length 1; a column of zeros stays one, and reflects nothing."""
    squares = jnp.sum(jnp.square(u), axis=tuple(range(u.ndim - 1)), keepdims=True)
    there = squares != 0  # of NaN too, which must not pass for no reflection
    return jnp.where(there, u, 0) * lax.rsqrt(jnp.where(there, squares, 1))


def _orthonormal(u: Array) -> Array:
    """The columns as Gram and Schmidt leave them, through the Cholesky factor of their Gram matrix.

    Columns of zeros stay as they are.
    """
    if u.shape[-1] == 0:
        return u
    v = _unit(u)
    products = gram(v, v)
    empty = jnp.diagonal(products) == 0
    factor = jnp.linalg.cholesky(products + jnp.diag(empty.astype(v.dtype)))
    columns = v.reshape(-1, v.shape[-1])
    solved = lax.linalg.triangular_solve(
        factor, columns, left_side=False, lower=True, transpose_a=True
    )
    return solved.reshape(v.shape)


def reflections(config: HRAConfig, params: Arrays, buffers: Arrays) -> Array:
    """The unit vectors of the chain, in order, in the dtype sums run in."""
    u = params["hra_u"]
    if "rank_mask" in buffers:
        u = u * jnp.broadcast_to(buffers["rank_mask"], u.shape)
    u = u.astype(accumulation_dtype(u.dtype))
    if not config.apply_GS:
        return _unit(u)
    return jnp.concatenate([_orthonormal(u[..., 0::2]), _orthonormal(u[..., 1::2])], axis=-1)


def _change(v: Array, weight: Weight, undo: bool) -> Factors:
    """P^T W as W plus factors, or P W, which undoes it."""
    # T^-1 of the compact WY form; columns of zeros keep their half.
    t_inverse = jnp.triu(gram(v, v), 1) + 0.5 * jnp.eye(v.shape[-1], dtype=v.dtype)
    projected = weight.project(v)
    flat = projected.reshape(v.shape[-1], -1)
    # The small matrix alone is solved with: XLA would gather the columns of a sharded one.
    t = lax.linalg.triangular_solve(
        t_inverse,
        -jnp.eye(v.shape[-1], dtype=v.dtype),
        left_side=True,
        lower=False,
        transpose_a=not undo,
    )
    b = jnp.matmul(t, flat, precision="highest")
    return Factors(A=v, B=b.reshape(projected.shape))


def _factors(
    config: HRAConfig, params: Arrays, buffers: Arrays, weight: Weight, key: PRNGKeyArray | None
) -> Factors:
    return _change(reflections(config, params, buffers), weight, undo=False)


def _inverse(
    config: HRAConfig, params: Arrays, buffers: Arrays, weight: Weight, key: PRNGKeyArray | None
) -> Factors:
    return _change(reflections(config, params, buffers), weight, undo=True)


HRAConfig.method = Method(
    settings=_settings,
    init=_init,
    factors=_factors,
    inverse=_inverse,
    axes={"hra_u": ("in", "rank")},
    reads_weight=lambda config: True,
    params=("hra_u",),
    program=("apply_GS",),
)
