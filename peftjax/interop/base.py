"""Whole params trees as the state dict of the torch twin."""

from typing import Any

import numpy as np

from peftjax.engine.packed import dense
from peftjax.interop.limits import unknown_layout
from peftjax.interop.modules import leaf_tensors
from peftjax.interop.names import ModuleNames
from peftjax.sites import Sites
from peftjax.trees import leaf_paths


def base_state_dict(
    params: Any, sites: Sites, names: ModuleNames | None = None
) -> dict[str, np.ndarray]:
    """The params of a model, such as ``merge`` returns them, under torch's names and layouts.

    Args:
      params: the params.
      sites: what ``find_sites`` found in a function of them, which tells inputs from outputs.
      names: the rules between the names; None if they are the same.

    Returns:
      The tensors by torch's keys, for ``load_state_dict`` or ``safetensors.numpy.save_file``.

    Raises:
      ValueError: an array has no torch name, or is the kernel of a transposed convolution, which
        torch keeps the other way round; or the params are not those of ``sites``.

    Example:
      >>> import jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 4)))
      >>> {key: array.shape for key, array in peftjax.base_state_dict(params, sites).items()}
      {'dense.weight': (3, 4)}
    """
    names = names or ModuleNames()
    arrays = leaf_paths(params)
    wanted = {leaf.path: leaf.shape for leaf in sites.leaves}
    found = {path: tuple(array.shape) for path, array in arrays.items()}
    if wanted != found:
        wrong = sorted(p for p in {*wanted, *found} if wanted.get(p) != found.get(p))
        raise ValueError(
            f"these are not the params that the sites were found in: {', '.join(wrong[:5])}"
        )
    tensors: dict[str, np.ndarray] = {}
    for tensor in leaf_tensors(sites.leaves, sites.sites, names):
        if tensor.key in tensors:
            raise ValueError(f"two arrays have the torch name {tensor.key!r}: change names=")
        if reason := unknown_layout(tensor.leaf):
            raise ValueError(
                f"{tensor.module} {reason}: pass params without it, and the sites that are left"
            )
        laid = tensor.there(np.asarray(dense(arrays[tensor.leaf.path])))
        tensors[tensor.key] = np.array(laid, order="C")  # even a scalar, unlike ascontiguousarray
    return tensors
