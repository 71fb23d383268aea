"""Arrays of several models summed after most of their numbers are dropped: TIES, DARE, pruning."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from peftjax.adapter import path_key

SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
SIGNS = ("total", "frequency")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the arrays of several adapters become one.

    Attributes:
      name: ``linear``, ``ties``, ``dare_linear``, ``dare_ties`` or ``magnitude_prune``.
      density: the share of the numbers that are kept.
      sign: how the sign of each number is elected.
      key: what random choices are drawn from.
    """

    name: str
    density: float | None
    sign: str
    key: PRNGKeyArray | None

    def mixed(
        self, arrays: Mapping[int, np.ndarray], weights: Sequence[float], label: str
    ) -> np.ndarray:
        """The weighted sum of arrays of one shape, after some of their numbers are dropped.

        Args:
          arrays: the arrays, by the position of their weights.
          weights: the weights.
          label: what these arrays are, in words that no others have: random choices differ by it.
        """
        kept = {i: self._pruned(array, f"{label} {i}") for i, array in arrays.items()}
        stacked = np.stack(list(kept.values()))
        scales = np.array([weights[i] for i in kept], stacked.dtype)
        weighted = stacked * scales.reshape(-1, *[1] * (stacked.ndim - 1))
        if not self.name.endswith("ties"):
            return weighted.sum(axis=0)
        # Signs are elected before the weights come in: a negative weight does not change sides.
        votes = stacked if self.sign == "total" else np.sign(stacked)
        elected = np.where(votes.sum(axis=0) >= 0, 1, -1)
        agree = np.sign(stacked) == elected
        voters = np.maximum(agree.sum(axis=0), 1).astype(stacked.dtype)
        return (weighted * agree).sum(axis=0) / voters

    def _pruned(self, array: np.ndarray, label: str) -> np.ndarray:
        """An array with a share of its numbers, and zeros for the others."""
        if self.density is None or self.density == 1:
            return array
        if self.name.startswith("dare"):
            assert self.key is not None
            mask = jax.random.bernoulli(path_key(self.key, label), self.density, array.shape)
            return array * np.asarray(mask) / self.density
        dropped = array.size - int(self.density * array.size)
        smallest = np.argpartition(np.abs(array), dropped - 1, axis=None)[:dropped]
        pruned = array.copy()
        pruned.flat[smallest] = 0
        return pruned
