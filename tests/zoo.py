"""The model zoo: every way of using a weight that peftjax promises to find and to adapt."""

import zoo_control
import zoo_equinox
import zoo_haiku
import zoo_jax
import zoo_linen
import zoo_nnx
import zoo_transforms
from zoo_case import Case, Draw, Expected

__all__ = ["CASES", "Case", "Draw", "Expected"]

CASES: list[Case] = [
    *zoo_jax.CASES,
    *zoo_control.CASES,
    *zoo_transforms.CASES,
    *zoo_linen.CASES,
    *zoo_nnx.CASES,
    *zoo_haiku.CASES,
    *zoo_equinox.CASES,
]
