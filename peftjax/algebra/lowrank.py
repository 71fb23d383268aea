"""Plain LoRA adapters put together out of the factors of single weights."""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.adapter import Adapter
from peftjax.factors import Arrays
from peftjax.methods.lora import LoraConfig
from peftjax.sites import Leaf, Site, Sites
from peftjax.targeting import exact_key, layer_names
from peftjax.unstacking import Part, indices

Matrix = np.ndarray
Pair = tuple[Matrix, Matrix]  # A of shape (in, r), B of shape (r, out)


def plain_lora(
    sites: Sites,
    factors: Mapping[Part, Pair],
    dtypes: Mapping[Part, Any],
    *,
    shifts: Mapping[Part, np.ndarray] | None = None,
    saved: Mapping[Leaf, Any] | None = None,
    **fields: Any,
) -> Adapter:
    r"""A LoRA adapter of scale 1 out of the factors of single weights.

    Args:
      sites: the adapted sites.
      factors: A of shape (in, r) and B of shape (r, out) for each weight of each site.
      dtypes: the dtype of each weight's arrays.
      shifts: what is added to the bias of each weight, of shape (\*out,), if anything is.
      saved: the values of whole leaves.
      **fields: further fields of the config.
    """
    r, pattern = _rank_fields(sites, {part: a.shape[-1] for part, (a, _) in factors.items()})
    fields |= {"rank_pattern": pattern, "alpha_pattern": pattern}
    config = LoraConfig(r=r, lora_alpha=r, lora_bias=shifts is not None, **fields)
    params: dict[str, Arrays] = {}
    buffers: dict[str, Arrays] = {}
    for site in sites.values():
        own = _stacked(site, factors, shifts)
        widest = max((dtypes[site.name, index] for index in indices(site)), key=_width)
        frozen = {"scaling": np.ones(site.stack_shape), "rank_mask": own.pop("rank_mask", None)}
        params[site.name], buffers[site.name] = (
            {name: jax.device_put(x.astype(widest)) for name, x in each.items() if x is not None}
            for each in (own, frozen)
        )
    for leaf, value in (saved or {}).items():
        params.setdefault(leaf.module, {})[leaf.leaf_name] = jnp.asarray(value)
    return Adapter(params, buffers, None, config, sites, tuple(saved or ()))


def _width(dtype: Any) -> int:
    return np.dtype(dtype).itemsize


def _stacked(
    site: Site, factors: Mapping[Part, Pair], shifts: Mapping[Part, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """The arrays of a site, stack axes in front, and the mask of unequal ranks if there is one."""
    every, stack = list(indices(site)), site.stack_shape
    ranks = [factors[site.name, index][0].shape[-1] for index in every]
    widest = max(ranks)
    a = np.zeros((len(every), site.in_size, widest))
    b = np.zeros((len(every), widest, site.out_size))
    for i, (index, rank) in enumerate(zip(every, ranks, strict=True)):
        a[i, :, :rank], b[i, :rank] = factors[site.name, index]
    arrays = {
        "lora_A": a.reshape(*stack, *site.in_shape, widest),
        "lora_B": b.reshape(*stack, widest, *site.out_shape),
    }
    if shifts is not None:
        shift = np.stack([shifts[site.name, index] for index in every])
        arrays["lora_B_bias"] = shift.reshape(*stack, *site.out_shape)
    if stack:
        # Weights that share a layer have the rank of the layer, as the config says.
        layer = np.array(ranks).reshape(stack[0], -1).max(axis=1)
        if len(set(layer.tolist())) > 1:
            mask = np.arange(widest) < layer.reshape(-1, *[1] * len(stack))
            arrays["rank_mask"] = np.broadcast_to(mask, (*stack, widest))
    return arrays


def best_product(a: Matrix, b: Matrix, kept: int | float) -> Pair:
    """The best factors of lower rank of a product, which is never built.

    Args:
      a: matrix of shape (in, r).
      b: matrix of shape (r, out).
      kept: the largest rank, or the share of the energy to keep.
    """
    q_in, r_in = np.linalg.qr(a.astype(np.float64))
    q_out, r_out = np.linalg.qr(b.T.astype(np.float64))
    left, right = best_factors(r_in @ r_out.T, kept)
    return q_in @ left, right @ q_out.T


def best_factors(matrix: Matrix, kept: int | float) -> Pair:
    """The best factors of a matrix by rank or energy; its singular values are in the second."""
    if not np.isfinite(matrix).all():
        raise ValueError("the change of a weight is not finite: an adapter seems to be broken")
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    if isinstance(kept, int):
        rank = min(kept, len(s))
    elif kept == 1:
        rank = max(int(np.count_nonzero(s)), 1)
    else:
        energy = np.cumsum(np.square(s, dtype=np.float64))
        rank = int(np.searchsorted(energy, kept * energy[-1])) + 1
    return u[:, :rank], s[:rank, None] * vt[:rank]


def _rank_fields(sites: Sites, ranks: Mapping[Part, int]) -> tuple[int, dict[str, int]]:
    """The rank that most weights have, and a ``rank_pattern`` for the others."""
    # A pattern tells layers apart, but not the experts of one layer: the largest is theirs.
    by_layer: dict[str, dict[int, int]] = {}
    for (name, index), rank in ranks.items():
        own, layer = by_layer.setdefault(name, {}), index[0] if index else 0
        own[layer] = max(own.get(layer, 0), rank)
    every = [rank for own in by_layer.values() for rank in own.values()]
    common = collections.Counter(every).most_common(1)[0][0]
    named: dict[str, int] = {}
    for name, own in by_layer.items():
        if len(set(own.values())) == 1:
            named[name] = next(iter(own.values()))
        else:
            named |= {layer_names(sites[name], i)[0]: rank for i, rank in own.items()}
    return common, {exact_key(name): rank for name, rank in named.items() if rank != common}
