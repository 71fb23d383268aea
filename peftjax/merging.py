"""Adapters built into plain params, and taken out again."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from peftjax.adapter import Adapter
from peftjax.attach import as_sequence, attach, check_fits, refill
from peftjax.engine.linear import merged
from peftjax.engine.packed import Packed, dense
from peftjax.running import rows
from peftjax.trees import leaf_paths


def merge(
    params: Any,
    adapter: Adapter | Sequence[Adapter] | None,
    *,
    safe: bool = False,
    dequantize: bool = False,
) -> Any:
    r"""Builds adapters into the params, for the plain ``apply_fn``.

    .. math::
      W' = s_{out} \odot (s_{in} \odot W + A B)

    Weights of half precision are merged in float32 and rounded once.

    Args:
      params: the base's params.
      adapter: an Adapter, a sequence of them, applied in order, or None.
      safe: check the result, which waits for it and so cannot be jitted.
      dequantize: make plain arrays of all quantised weights: of less digits than the merged ones
        have, they cannot hold them.

    Returns:
      Params of the same structure, shapes and dtypes.

    Raises:
      ValueError: the adapter belongs to other params; ``safe`` and a result is not finite; or the
        params are quantised without ``dequantize``.
    """
    # Dropout belongs to training: nothing of it is merged.
    adapters = [each.replace(key=None) for each in as_sequence(adapter)]
    _check_mergeable(adapters)
    before = leaf_paths(params)
    check_fits(before, adapters)
    leaves, views = attach(before, adapters)
    packed = [path for path, leaf in leaves.items() if isinstance(leaf, Packed)]
    if packed and not dequantize:
        raise ValueError(
            f"{packed[0]} is quantised, and what is merged into it has more digits than it can "
            f"hold: pass dequantize=True for params without quantised weights, as large as those "
            f"before"
        )
    leaves |= {path: dense(leaves[path]) for path in packed}
    leaves |= {path: merged(view) for path, view in views.items()}
    if safe:
        for path, leaf in leaves.items():
            if leaf is not before[path] and not bool(jnp.isfinite(leaf).all()):
                raise ValueError(
                    f"merging gives values in {path} that are not finite: the adapter or the "
                    f"weight seems to be broken"
                )
    return refill(params, leaves)


def unmerge(params: Any, adapter: Adapter | Sequence[Adapter] | None) -> Any:
    """Takes adapters out of params they were merged into.

    Args:
      params: what ``merge`` returned.
      adapter: the adapters, in the order in which they were merged.

    Returns:
      The params before the merge, up to rounding: in half precision that is visible, and keeping
      the base params is better. What an IA3 scaled by zero is gone, and comes back as NaN, where
      PEFT gives zeros.

    Raises:
      ValueError: an adapter replaced whole leaves (``modules_to_save``, a trained ``bias``), which
        are gone; or it belongs to other params.
    """
    adapters = as_sequence(adapter)
    for each in adapters:
        if each.saved:
            raise ValueError(
                f"merging replaced {', '.join(leaf.path for leaf in each.saved[:5])}, and what "
                f"was there before is gone: keep the base params instead of unmerging"
            )
    _check_mergeable(adapters)
    for each in reversed(adapters):
        leaves = leaf_paths(params)
        check_fits(leaves, [each])
        leaves, views = attach(leaves, [each.replace(key=None)], undo=True)
        leaves |= {path: merged(view) for path, view in views.items()}
        params = refill(params, leaves)
    return params


def _check_mergeable(adapters: Sequence[Adapter]) -> None:
    """Raises a ValueError for adapters that treat each row or token in its own way."""
    for each in adapters:
        deciding = each.config.method.gating is not None and each.route is None
        if deciding or rows(each):
            raise ValueError(
                "an adapter whose experts serve each row or token in its own way has no merged "
                "weight: merge one expert, or a bank's mix(weights) with one weight an expert"
            )
