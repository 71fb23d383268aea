"""Adapters turned into others that change the weights alike: plain LoRA, and padded ranks."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peftjax.adapter import Adapter, check_leaves, check_single, site_arrays
from peftjax.algebra.lowrank import Pair, best_factors, best_product, plain_lora
from peftjax.attach import attach
from peftjax.changes import bias_change
from peftjax.config import AdapterConfig
from peftjax.engine import packed
from peftjax.engine.linear import merged
from peftjax.factors import Arrays, Change, Factors, Weight, accumulation_dtype
from peftjax.methods.lora import LoraConfig
from peftjax.sites import Leaf, Site, Sites
from peftjax.stacks import stacked_weight
from peftjax.targeting import exact_names
from peftjax.trees import leaf_paths
from peftjax.unstacking import Part, Single, indices, unstack

Kept = int | float | None


def convert_to_lora(adapter: Adapter, rank_or_energy: Kept = None, params: Any = None) -> Adapter:
    r"""Turns an adapter of any method into a plain LoRA adapter that changes the weights alike.

    The change of a weight laid out (in, out) becomes two factors of rank k, its scale within them:

    .. math::
      W' - W \approx A B, \qquad \sum_{i \le k} \sigma_i^2 \ge e \sum_i \sigma_i^2

    where the :math:`\sigma_i` are the singular values of the change and e is an energy, if one is
    given. A change that is a product of thin factors is never built: two QR decompositions leave a
    matrix as small as its rank. IA3 and DoRA scale the weight itself, and what that changes is
    built, one site at a time, in float32 (in double precision for a base that has it).

    Of the methods here PEFT converts LoRA and LoHa alone, on linear layers, and nothing that trains
    a bias; of DoRA it forgets the lengths.

    Args:
      adapter: the adapter, not traced: the new shapes depend on its values.
      rank_or_energy: None for the factors the method itself has, which are exact: those of a LoRA
        of rank r have rank r, with PiSSA or OLoRA 2r, those of LoHa r * r, of HRA r, and of
        AdaLoRA as many as it kept. An int: the best approximation of at most that rank. A float in
        (0, 1]: the smallest rank that keeps this share of each change's energy; 1.0 keeps all.
      params: the base's params, for methods that read or scale the weight: HRA, DoRA, IA3.

    Returns:
      A LoRA adapter of scale 1, with a ``rank_pattern`` where ranks differ. What changed a bias
      still does: a ``lora_bias`` stays one, and the biases that IA3 scales become trained ones
      (``bias="lora_only"``). So do whole saved leaves.

    Raises:
      ValueError: the rank or energy is out of range; the params are missing or others; or the
        change has no factors of its own, and so needs a rank or an energy.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.ones((8, 6))}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 8)))
      >>> config = peftjax.LoHaConfig(r=2, init_weights=False, target_modules=["dense"])
      >>> adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
      >>> lora = peftjax.convert_to_lora(adapter)
      >>> lora.config.r, lora.config.lora_alpha, lora.params["dense"]["lora_A"].shape
      (4, 4, (8, 4))

    References:
      Eckart and Young, The Approximation of One Matrix by Another of Lower Rank, 1936,
      https://doi.org/10.1007/BF02288367
    """
    _check_kept(rank_or_energy)
    config, leaves = adapter.config, _leaves(adapter, params)
    singles = unstack(adapter)
    scaled = {site.name for site in adapter.sites.values() if _is_scaled(config, site, singles)}
    _check_needs(adapter, rank_or_energy, scaled, params)
    factors: dict[Part, Pair] = {}
    for site in adapter.sites.values():
        scales = site.name in scaled
        dense = (
            np.asarray(_change_of(packed.dense(leaves[site.path]), _alone(adapter, site)))
            if scales
            else None
        )
        for index in indices(site):
            single = singles[site.name, index]
            if dense is not None:
                assert rank_or_energy is not None
                pair = best_factors(dense[index], rank_or_energy)
            else:
                pair = _matrices(_factors(config, *_arguments(single, leaves)), single)
                if rank_or_energy is not None:
                    pair = best_product(*pair, rank_or_energy)
            factors[site.name, index] = pair
    shifts = None
    if isinstance(config, LoraConfig) and config.lora_bias:
        shifts = {part: _shift(config, single) for part, single in singles.items()}
    saved, bias = _saved(adapter, leaves, shifts is not None)
    fields = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(AdapterConfig)
    }
    fields |= {"bias": bias, "lora_dropout": getattr(config, "lora_dropout", 0.0)}
    dtypes = {part: single.spec.dtype for part, single in singles.items()}
    return plain_lora(adapter.sites, factors, dtypes, shifts=shifts, saved=saved, **fields)


def pad_ranks(adapter: Adapter, target_rank: int) -> Adapter:
    r"""Pads an adapter to a rank, so that one compiled program serves all adapters up to it.

    .. math::
      A B = \begin{pmatrix} A & 0 \end{pmatrix} \begin{pmatrix} B \\ 0 \end{pmatrix}

    Padded adapters of the same method and sites have the same tree of arrays and equal configs,
    whatever their ranks and scales were: a jitted function takes one for another without compiling
    again. The scales stay in ``buffers``; the config no longer tells them, nor dropout, nor where
    the adapter came from. So save the adapter itself, and pad what is to run.

    Args:
      adapter: a LoRA, DoRA, LoHa, HRA or AdaLoRA adapter. May be traced.
      target_rank: the rank to pad to: the largest among the adapters that take turns.

    Raises:
      ValueError: a rank is above the target; or the method has no ranks, or factors taken out of
        the weight.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.ones((8, 6))}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 8)))
      >>> configs = [peftjax.LoraConfig(r=r, lora_alpha=16, target_modules="dense") for r in (2, 4)]
      >>> a, b = (peftjax.init_adapter(jax.random.key(0), config, sites) for config in configs)
      >>> jax.tree.structure(peftjax.pad_ranks(a, 4)) == jax.tree.structure(peftjax.pad_ranks(b, 4))
      True
    """
    check_single(adapter)
    config, method = adapter.config, adapter.config.method
    _check_paddable(adapter, target_rank)
    params, buffers = dict(adapter.params), dict(adapter.buffers)
    for site in adapter.sites.values():
        own, frozen = site_arrays(adapter, site)
        frozen = dict(frozen)
        mask, depth = frozen.pop("rank_mask", None), len(site.stack_axes)
        for name, axes in method.rank_axes.items():
            for axis in axes if name in own else ():
                # A rank axis counted from the front stands behind the stack axes.
                at = axis + (depth if axis >= 0 else own[name].ndim)
                own[name] = _widened(own[name], at, target_rank, mask)
        params[site.name] = {**adapter.params[site.name], **own}
        buffers[site.name] = frozen
    known = {field.name for field in dataclasses.fields(config)}
    fields: dict[str, Any] = dict.fromkeys(known & _RANK_FIELDS, target_rank)
    fields |= {name: getattr(config, name) for name in known & _PROGRAM_FIELDS}
    fields |= dict.fromkeys(known & {"init_weights"}, False)  # True warns of odd ranks
    config = type(config)(target_modules=exact_names(adapter.sites.values()), **fields)
    return adapter.replace(params=params, buffers=buffers, config=config)


def _widened(array: Array, axis: int, rank: int, mask: Array | None) -> Array:
    """An array padded with zeros along a rank axis, zeros in the place of other padding too."""
    if mask is not None:
        between, behind = axis - mask.ndim + 1, array.ndim - axis - 1
        shape = (*mask.shape[:-1], *[1] * between, mask.shape[-1], *[1] * behind)
        array = jnp.where(mask.reshape(shape) > 0, array, 0)
    width = [(0, 0)] * array.ndim
    width[axis] = (0, rank - array.shape[axis])
    return jnp.pad(array, width)


# Of all configs: what holds a rank, or a scale that is the rank's; and what changes the program.
_RANK_FIELDS = {"r", "init_r", "target_r", "alpha", "lora_alpha"}
_PROGRAM_FIELDS = {
    "apply_GS",
    "bias",
    "lora_bias",
    "modules_to_save",
    "use_dora",
    "use_effective_conv2d",
}


def _check_kept(kept: Kept) -> None:
    """Raises a ValueError unless it is None, a rank, or a share."""
    if kept is None:
        return
    if isinstance(kept, bool) or not isinstance(kept, int | float):
        raise ValueError(f"`rank_or_energy` takes an int, a float or None, got {kept!r}")
    if isinstance(kept, int) and kept < 1:
        raise ValueError(f"`rank_or_energy` as a rank must be 1 or more, got {kept}")
    if isinstance(kept, float) and not 0 < kept <= 1:
        raise ValueError(f"`rank_or_energy` as an energy must be in (0, 1], got {kept}")


def _check_needs(adapter: Adapter, kept: Kept, scaled: set[str], params: Any) -> None:
    """Raises a ValueError if the params or a rank are missing."""
    name = type(adapter.config).__name__
    if params is None and (scaled or adapter.config.method.reads_weight(adapter.config)):
        raise ValueError(
            f"what this adapter ({name}) changes depends on the weights: pass the base's params"
        )
    if kept is None and scaled:
        raise ValueError(
            f"{', '.join(sorted(scaled)[:5])}: this adapter ({name}) scales the weight, a change "
            f"that has no factors of its own: pass `rank_or_energy`, a rank or 1.0 for all of it"
        )


def _check_paddable(adapter: Adapter, target_rank: int) -> None:
    """Raises a ValueError unless all ranks of an adapter can be padded to the target."""
    axes = adapter.config.method.rank_axes
    if not axes:
        raise ValueError(f"{type(adapter.config).__name__} has no ranks to pad")
    if isinstance(target_rank, bool) or not isinstance(target_rank, int) or target_rank < 1:
        raise ValueError(f"`target_rank` must be an integer of 1 or more, got {target_rank!r}")
    for site in adapter.sites.values():
        own, frozen = site_arrays(adapter, site)
        if any(name in frozen for name in axes):
            raise ValueError(
                f"{site.name} has factors taken out of the weight (PiSSA, OLoRA), which belong to "
                f"its own rank and scale: use convert_to_lora first"
            )
        rank = max(
            own[n].shape[-1 if a[0] < 0 else len(site.stack_axes) + a[0]]
            for n, a in axes.items()
            if n in own
        )
        if rank > target_rank:
            raise ValueError(
                f"{site.name} has rank {rank}, above `target_rank`={target_rank}: raise it, or "
                f"lower the rank with convert_to_lora"
            )


def _leaves(adapter: Adapter, params: Any) -> dict[str, Any]:
    """The base's arrays by path, whole saved leaves in their place; empty without params."""
    if params is None:
        return {}
    leaves = leaf_paths(params)
    check_leaves(leaves, adapter.sites, adapter.saved)
    return leaves | {leaf.path: _value(adapter, leaf) for leaf in adapter.saved}


def _value(adapter: Adapter, leaf: Leaf) -> Array:
    return adapter.params[leaf.module][leaf.leaf_name]


def _arguments(single: Single, leaves: Mapping[str, Any]) -> tuple[Any, Any, Weight]:
    """What a method makes the factors of one weight out of: no dense change among them."""
    site, base = single.site, None
    if leaves:
        where: list[Any] = [slice(None)] * len(site.shape)
        for axis, i in zip(site.stack_axes, single.index, strict=True):
            where[axis] = i
        base = packed.dense(leaves[site.path])[tuple(where)]
    return single.params, single.buffers, stacked_weight(site, single.spec, base, fusible=False)


@functools.partial(jax.jit, static_argnums=0)
def _factors(config: Any, params: Arrays, buffers: Arrays, weight: Weight) -> Change:
    return config.method.factors(config, params, buffers, weight, None)


def _is_scaled(config: AdapterConfig, site: Site, singles: Mapping[Part, Single]) -> bool:
    """Whether what changes about a site's weights is more than a product of thin factors."""
    single = singles[site.name, next(iter(indices(site)))]
    shape = [n for axis, n in enumerate(site.shape) if axis not in site.stack_axes]
    params, buffers, weight = _arguments(single, {})

    def make(base: Array) -> Change:
        return _factors(config, params, buffers, dataclasses.replace(weight, base=base))

    change = jax.eval_shape(make, jax.ShapeDtypeStruct(tuple(shape), site.dtype))
    if not isinstance(change, Factors) or change.A is None or change.B is None:
        return True
    return change.in_scale is not None or change.out_scale is not None


def _matrices(change: Any, single: Single) -> Pair:
    """A and B as matrices; of a rank of 0, one of zeros."""
    a = np.asarray(change.A).reshape(single.spec.in_size, -1)
    b = np.asarray(change.B).reshape(-1, single.spec.out_size)
    if a.shape[-1] == 0:
        return np.zeros((len(a), 1), a.dtype), np.zeros((1, b.shape[-1]), b.dtype)
    return a, b


def _alone(adapter: Adapter, site: Site) -> Adapter:
    """An adapter of one site, without saved leaves."""
    params, buffers = site_arrays(adapter, site)
    return Adapter({site.name: params}, {site.name: buffers}, None, adapter.config, Sites((site,)))


@jax.jit
def _change_of(base: Array, adapter: Adapter) -> Array:
    """What an adapter of one site changes about its weights, laid out (stack, in, out)."""
    (site,) = adapter.sites.values()
    adapter = adapter.replace(sites=Sites((dataclasses.replace(site, bias=None),)))
    wide = base.astype(accumulation_dtype(base.dtype))
    change = merged(attach({site.path: wide}, [adapter])[1][site.path]) - wide
    laid = jnp.transpose(change, (*site.stack_axes, *site.in_axes, *site.out_axes))
    return laid.reshape(*site.full_stack_shape, site.in_size, site.out_size)


@jax.jit
def _bias_of(base: Array, bias: Array, adapter: Adapter) -> Array:
    """The bias of an adapter's one site, as the adapter leaves it."""
    (site,) = adapter.sites.values()
    assert site.bias is not None
    return attach({site.path: base, site.bias: bias}, [adapter])[0][site.bias]


def _saved(
    adapter: Adapter, leaves: Mapping[str, Array], shifted: bool
) -> tuple[dict[Leaf, Array], str]:
    """The whole leaves of the LoRA adapter, and its ``bias``.

    Args:
      adapter: the adapter.
      leaves: the base's arrays by path.
      shifted: whether a ``lora_bias`` already carries what it changes about the biases.
    """
    saved = {leaf.path: (leaf, _value(adapter, leaf)) for leaf in adapter.saved}
    bias = getattr(adapter.config, "bias", "none")
    bias = bias if bias in ("none", "all") else "lora_only"
    sites = [site for site in adapter.sites.values() if site.bias is not None]
    changed = any(each is not None for s in sites for each in bias_change(adapter, s))
    if shifted or not changed:
        return dict(saved.values()), bias
    values = dict(leaves)
    for site in sites:
        path = str(site.bias)
        values[path] = _bias_of(
            packed.dense(leaves[site.path]), values[path], _alone(adapter, site)
        )
        shape, dtype = tuple(values[path].shape), np.dtype(values[path].dtype)
        leaf = Leaf(path, shape, dtype, dataclasses.replace(site, layers=None))
        saved[path] = (saved[path][0] if path in saved else leaf, values[path])
    return dict(saved.values()), "all" if bias == "all" else "lora_only"


def _shift(config: AdapterConfig, single: Single) -> np.ndarray:
    """What is added to the bias of one weight."""
    params, buffers, weight = _arguments(single, {})
    return np.asarray(config.method.bias(config, params, buffers, weight).shift)
