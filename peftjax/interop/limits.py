"""What torch PEFT cannot run: modules that a method of its own refuses, or computes wrongly."""

from collections.abc import Callable
from typing import NamedTuple

from peftjax.config import AdapterConfig
from peftjax.factors import WeightSpec
from peftjax.interop.layouts import taps_of
from peftjax.methods import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    XLoraConfig,
)
from peftjax.sites import Leaf, Site


class _Case(NamedTuple):
    """A method on one weight of a site, whose torch module may be transformers' ``Conv1D``."""

    config: AdapterConfig
    site: Site
    spec: WeightSpec
    inputs_first: bool


class Limit(NamedTuple):
    """A kind of module that a method of PEFT's does not work on.

    Attributes:
      reason: what the module is, as the end of a sentence that begins with it.
      holds: whether a case is one of that.
    """

    reason: str
    holds: Callable[[_Case], bool]


def unsupported(config: AdapterConfig, site: Site, spec: WeightSpec, inputs_first: bool) -> str:
    """Why torch PEFT cannot run a method on the torch module of a site; empty if it can.

    Args:
      config: the method's config.
      site: the site.
      spec: one of its weights.
      inputs_first: whether the torch module is transformers' ``Conv1D``.
    """
    case = _Case(config, site, spec, inputs_first)
    method = type(config).__name__.removesuffix("Config")
    for reason, holds in (_TIED, _SPREAD, *_LIMITS[type(config)]):
        if holds(case):
            return reason.format(method=method, config=config)
    return ""


def unknown_layout(leaf: Leaf) -> str:
    """Why nobody can tell how torch lays out a whole array; empty if it is known.

    Torch turns the kernel of a transposed convolution round, and JAX may have it either way.
    """
    site = leaf.site
    if site is None or site.path != leaf.path or not site.spread:
        return ""
    return (
        f"is a transposed convolution, whose kernel ({leaf.path}, of shape {leaf.shape}) torch "
        f"keeps the other way round"
    )


def _refused(what: str) -> str:
    return f"is {what}, which torch PEFT's {{method}} does not support"


_TIED = Limit(
    "is used both ways round, as a table and an output head at once is, and torch PEFT would "
    "change one of the two alone",
    lambda case: case.site.is_tied,
)
_TABLE = Limit(_refused("a table"), lambda case: case.spec.kind == "lookup")
_CONV1D = Limit(_refused("transformers' Conv1D"), lambda case: case.inputs_first)
_ONE_AXIS = Limit(_refused("a convolution over one axis"), lambda case: len(case.spec.taps) == 1)
_THREE_AXES = Limit(_refused("a convolution over three axes"), lambda case: len(case.spec.taps) > 2)
_GROUPED = Limit(_refused("a grouped convolution"), lambda case: case.spec.groups > 1)
_NOT_SQUARE = Limit(
    _refused("a kernel that is not square"), lambda case: len(set(taps_of(case.spec))) > 1
)
_SPREAD = Limit(
    _refused("a transposed convolution"),
    lambda case: case.site.spread,
)
_UNEVEN = Limit(
    "is a convolution of steps or padding that differ between its axes, of which torch PEFT's "
    "{method} takes the first alone",
    lambda case: case.site.uneven,
)
_DILATED = Limit(
    "is a dilated convolution, whose dilation torch PEFT's {method} forgets",
    lambda case: case.site.dilated,
)
_MIXED_GROUPS = Limit(
    "is a grouped convolution, where A of torch PEFT's {method} sees the channels of all groups, "
    "which is no change of the kernel",
    _GROUPED.holds,
)
_STARTED = Limit(
    "is no linear layer, and torch PEFT takes {config.init_lora_weights!r} out of those alone: "
    "convert_to_lora makes plain LoRA of it",
    lambda case: case.config.method.buffers_read_weight(case.config) and case.spec.kind != "dense",
)
_OLORA_CONV1D = Limit(
    "is transformers' Conv1D, which torch PEFT's OLoRA takes for its transpose: convert_to_lora "
    "makes plain LoRA of it",
    lambda case: case.inputs_first and getattr(case.config, "init_lora_weights", None) == "olora",
)
_TABLE_BIAS = Limit(
    "is a table, for which torch PEFT has no `lora_bias`",
    lambda case: case.spec.kind == "lookup" and getattr(case.config, "lora_bias", False),
)
_CONVOLUTION = Limit(
    "is a convolution, where torch PEFT's X-LoRA takes the axes of an image for those of tokens",
    lambda case: case.spec.kind == "conv",
)

_LIMITS: dict[type, tuple[Limit, ...]] = {
    LoraConfig: (_MIXED_GROUPS, _DILATED, _STARTED, _OLORA_CONV1D, _TABLE_BIAS),
    AdaLoraConfig: (_TABLE, _ONE_AXIS, _THREE_AXES, _GROUPED),
    LoHaConfig: (_TABLE, _CONV1D, _THREE_AXES),
    HRAConfig: (_TABLE, _CONV1D, _ONE_AXIS, _THREE_AXES, _GROUPED, _DILATED, _NOT_SQUARE, _UNEVEN),
    IA3Config: (_TABLE, _ONE_AXIS),
    XLoraConfig: (_CONVOLUTION,),
}
