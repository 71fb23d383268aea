"""Plain LoRA adapters put together out of the factors of single weights."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from peftjax.adapter import Adapter
from peftjax.methods.lora import LoraConfig
from peftjax.sites import Leaf, Sites
from peftjax.targeting import exact_key, layer_names
from peftjax.unstacking import Part, indices, restack

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
    ranks = _layer_ranks(factors)
    r, pattern = _rank_fields(sites, ranks)
    fields |= {"rank_pattern": pattern, "alpha_pattern": pattern}
    config = LoraConfig(r=r, lora_alpha=r, lora_bias=shifts is not None, **fields)
    params: dict[Part, dict[str, np.ndarray]] = {}
    for site in sites.values():
        parts = [(site.name, index) for index in indices(site)]
        widest = max((np.dtype(dtypes[part]) for part in parts), key=lambda dtype: dtype.itemsize)
        for part in parts:
            a, b = _padded(factors[part], ranks[site.name][_layer(part)])
            own = {
                "lora_A": a.reshape(*site.in_shape, -1),
                "lora_B": b.reshape(-1, *site.out_shape),
            }
            own |= {"lora_B_bias": shifts[part]} if shifts is not None else {}
            params[part] = {name: array.astype(widest) for name, array in own.items()}
    return restack(config, sites, params, saved=saved)


def _padded(pair: Pair, rank: int) -> Pair:
    """Factors of the same product with that many ranks, some of them of zeros."""
    a, b = pair
    more = (0, rank - a.shape[-1])
    return np.pad(a, ((0, 0), more)), np.pad(b, (more, (0, 0)))


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


def _layer(part: Part) -> int:
    """The layer that a weight lies in; 0 for one of no stack."""
    return part[1][0] if part[1] else 0


def _layer_ranks(factors: Mapping[Part, Pair]) -> dict[str, dict[int, int]]:
    """The rank of every layer of every site: of the experts of one, the largest.

    A ``rank_pattern`` tells layers apart, but not the experts of one layer.
    """
    ranks: dict[str, dict[int, int]] = {}
    for part, (a, _) in factors.items():
        own, layer = ranks.setdefault(part[0], {}), _layer(part)
        own[layer] = max(own.get(layer, 0), a.shape[-1])
    return ranks


def _rank_fields(
    sites: Sites, ranks: Mapping[str, Mapping[int, int]]
) -> tuple[int, dict[str, int]]:
    """The rank that most layers have, and a ``rank_pattern`` for the others."""
    every = [rank for own in ranks.values() for rank in own.values()]
    common = collections.Counter(every).most_common(1)[0][0]
    named: dict[str, int] = {}
    for name, own in ranks.items():
        if len(set(own.values())) == 1:
            named[name] = next(iter(own.values()))
        else:
            named |= {layer_names(sites[name], i)[0]: rank for i, rank in own.items()}
    return common, {exact_key(name): rank for name, rank in named.items() if rank != common}
