"""Tensors of a file before they are read, and what can be wrong with them."""

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping

import jax
import numpy as np

_MOST = 12  # problems shown


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor that is not read yet.

    Attributes:
      shape: its shape.
      dtype: its dtype, by its NumPy name.
      read: reads it.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def two_halves(dtypes: Mapping[str, Container[str]]) -> list[str]:
    """What comes in both dtypes of half precision, neither of which holds the other."""
    return [
        f"{name}: some of its tensors are float16 and others bfloat16: give them one dtype"
        for name, own in dtypes.items()
        if "float16" in own and "bfloat16" in own
    ]


def misfits(key: str, tensor: Stored, wanted: tuple[int, ...]) -> list[str]:
    """What is wrong with a tensor that should have a shape."""
    problems = []
    if tensor.shape != wanted:
        problems.append(f"{key}: shape {tensor.shape} instead of {wanted}")
    if tensor.dtype not in ("float16", "bfloat16", "float32", "float64"):
        problems.append(f"{key}: {tensor.dtype} is no dtype of an adapter")
    elif tensor.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        problems.append(f"{key}: float64, which JAX has with jax_enable_x64 alone")
    return problems


def refuse(what: str, problems: Iterable[str], remedy: str) -> None:
    """Raises a ValueError that lists the problems, if there are any."""
    problems = list(dict.fromkeys(problems))
    if problems:
        more = [f"and {len(problems) - _MOST} more"] if len(problems) > _MOST else []
        listed = "\n  ".join([*problems[:_MOST], *more])
        raise ValueError(f"{what}; {remedy}:\n  {listed}")
