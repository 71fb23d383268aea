"""How torch lays out a weight, and torch PEFT the arrays of each method for it.

Torch keeps a weight as (out, in), a kernel as (out, in, *taps), a table as (rows, width); PEFT's
arrays follow suit, each method in its own way. Here everything keeps the axes of the weight.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from peftjax.config import AdapterConfig
from peftjax.factors import WeightSpec
from peftjax.methods import AdaLoraConfig, HRAConfig, IA3Config, LoHaConfig, LoraConfig
from peftjax.methods.loha import core_taps
from peftjax.sites import Site
from peftjax.stacks import stacked_weight


class Layout(NamedTuple):
    """One tensor of PEFT's for one array of ours.

    Attributes:
      suffix: what PEFT calls it, behind the name of its module.
      there: our array, free of stack axes, as PEFT lays it out.
      back: the opposite, given our array's shape too.
    """

    suffix: str
    there: Callable[[np.ndarray, WeightSpec], np.ndarray]
    back: Callable[[np.ndarray, WeightSpec, tuple[int, ...]], np.ndarray]


def layouts(config: AdapterConfig, spec: WeightSpec) -> Mapping[str, Layout]:
    """How PEFT keeps a method's arrays for one weight, by our names for them."""
    return _LAYOUTS[type(config)](config, spec)


def _order(spec: WeightSpec) -> tuple[int, ...]:
    """The in-axes with the channels first and then the taps of a kernel, as torch has them."""
    channels = (axis for axis in range(len(spec.in_shape)) if axis not in spec.taps)
    return (*channels, *spec.taps)


def taps_of(spec: WeightSpec) -> tuple[int, ...]:
    """The shape of a kernel's taps; empty for what is no kernel."""
    return tuple(spec.in_shape[axis] for axis in spec.taps)


def _channels(spec: WeightSpec) -> int:
    return spec.in_size // math.prod(taps_of(spec))


def _flat_columns(array: np.ndarray, spec: WeightSpec) -> np.ndarray:
    r"""(\*in, r) as (r, channels * taps)."""
    order = _order(spec)
    return np.transpose(array, (len(order), *order)).reshape(array.shape[-1], spec.in_size)


def _from_columns(tensor: np.ndarray, spec: WeightSpec, shape: tuple[int, ...]) -> np.ndarray:
    order = _order(spec)
    split = tensor.reshape(shape[-1], *(spec.in_shape[axis] for axis in order))
    return np.transpose(split, (*(order.index(axis) + 1 for axis in range(len(order))), 0))


def _columns(array: np.ndarray, spec: WeightSpec) -> np.ndarray:
    r"""(\*in, r) as (r, channels, \*taps)."""
    return _flat_columns(array, spec).reshape(array.shape[-1], _channels(spec), *taps_of(spec))


def _outs_first(array: np.ndarray, spec: WeightSpec) -> np.ndarray:
    r"""(r, \*out) as (out, r)."""
    return array.reshape(array.shape[0], spec.out_size).T


def _outs_first_kernel(array: np.ndarray, spec: WeightSpec) -> np.ndarray:
    r"""(r, \*out) as a kernel of single taps, (out, r, 1, ...)."""
    return _outs_first(array, spec).reshape(spec.out_size, array.shape[0], *[1] * len(spec.taps))


def _from_outs_first(tensor: np.ndarray, spec: WeightSpec, shape: tuple[int, ...]) -> np.ndarray:
    return tensor.reshape(spec.out_size, shape[0]).T.reshape(shape)


def _reshaped(tensor: np.ndarray, spec: WeightSpec, shape: tuple[int, ...]) -> np.ndarray:
    return tensor.reshape(shape)


def _outs(array: np.ndarray, spec: WeightSpec) -> np.ndarray:
    return array.reshape(spec.out_size)


def _channel_scale(array: np.ndarray, spec: WeightSpec) -> np.ndarray:
    """A number for every channel of an image, (1, channels, 1, ...)."""
    return array.reshape(1, array.size, *[1] * len(spec.taps))


def _lora(config: AdapterConfig, spec: WeightSpec) -> Mapping[str, Layout]:
    if spec.kind == "lookup":
        return {
            "lora_A": Layout("lora_embedding_A", _flat_columns, _from_columns),
            "lora_B": Layout("lora_embedding_B", _outs_first, _from_outs_first),
            "lora_B_bias": Layout("lora_embedding_B.bias", _outs, _reshaped),
            "lora_magnitude_vector": Layout("lora_magnitude_vector", _outs, _reshaped),
        }
    b, lengths = (
        (_outs_first_kernel, _channel_scale) if spec.kind == "conv" else (_outs_first, _outs)
    )
    return {
        "lora_A": Layout("lora_A.weight", _columns, _from_columns),
        "lora_B": Layout("lora_B.weight", b, _from_outs_first),
        "lora_B_bias": Layout("lora_B.bias", _outs, _reshaped),
        "lora_magnitude_vector": Layout("lora_magnitude_vector", lengths, _reshaped),
    }


def _adalora(config: AdapterConfig, spec: WeightSpec) -> Mapping[str, Layout]:
    return {
        "lora_A": Layout("lora_A", _flat_columns, _from_columns),
        "lora_E": Layout("lora_E", lambda array, spec: array[:, None], _reshaped),
        "lora_B": Layout("lora_B", _outs_first, _from_outs_first),
    }


def _loha(config: Any, spec: WeightSpec) -> Mapping[str, Layout]:
    taps = core_taps(config, spec)
    if not taps:
        a, b = (_outs_first, _from_outs_first), (_flat_columns, _from_columns)
        parts = {"hada_w{}_a": a, "hada_w{}_b": b}
    else:
        # Beside a core PEFT keeps the other factors the other way round.
        parts = {
            "hada_w{}_a": (lambda array, spec: array.reshape(-1, spec.out_size), _reshaped),
            "hada_w{}_b": (
                lambda array, spec: array.reshape(_channels(spec), -1).T,
                lambda tensor, spec, shape: tensor.T.reshape(shape),
            ),
            # PEFT takes a kernel with one axis of taps for one with two.
            "hada_t{}": (
                lambda array, spec: array[..., None] if len(taps) == 1 else array,
                _reshaped,
            ),
        }
    return {
        name.format(half): Layout(name.format(half), *pair)
        for name, pair in parts.items()
        for half in (1, 2)
    }


def _hra(config: AdapterConfig, spec: WeightSpec) -> Mapping[str, Layout]:
    return {
        "hra_u": Layout(
            "hra_u",
            lambda array, spec: _flat_columns(array, spec).T,
            lambda tensor, spec, shape: _from_columns(tensor.T, spec, shape),
        )
    }


def _ia3(config: AdapterConfig, spec: WeightSpec) -> Mapping[str, Layout]:
    def there(array: np.ndarray, spec: WeightSpec) -> np.ndarray:
        if spec.kind == "conv":
            return _channel_scale(array, spec)
        feedforward = max(array.shape[: len(spec.in_shape)]) > 1
        return array.reshape(1, -1) if feedforward else array.reshape(-1, 1)

    return {"ia3_l": Layout("ia3_l", there, _reshaped)}


_LAYOUTS: dict[type, Callable[[Any, WeightSpec], Mapping[str, Layout]]] = {
    LoraConfig: _lora,
    AdaLoraConfig: _adalora,
    LoHaConfig: _loha,
    HRAConfig: _hra,
    IA3Config: _ia3,
}


def weight_there(array: np.ndarray, site: Site, spec: WeightSpec, inputs_first: bool) -> np.ndarray:
    """One weight of a site, free of stack axes, as torch lays it out."""
    one = stacked_weight(site, spec, None)
    laid = np.transpose(array, (*one.in_axes, *one.out_axes))
    if spec.kind == "lookup" or inputs_first:
        return laid.reshape(spec.in_size, spec.out_size)
    columns = _columns(laid.reshape(*spec.in_shape, spec.out_size), spec)
    return np.ascontiguousarray(columns)


def weight_back(tensor: np.ndarray, site: Site, spec: WeightSpec, inputs_first: bool) -> np.ndarray:
    """A weight of torch's in the axes of the site, free of stack axes."""
    one = stacked_weight(site, spec, None)
    if spec.kind == "lookup" or inputs_first:
        laid = tensor.reshape(*spec.in_shape, *spec.out_shape)
    else:
        shape = (*spec.in_shape, spec.out_size)
        laid = _from_columns(tensor, spec, shape).reshape(*spec.in_shape, *spec.out_shape)
    return np.transpose(laid, np.argsort((*one.in_axes, *one.out_axes)))
