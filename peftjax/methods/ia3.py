"""IA3: a trainable scale for every input or output of a frozen weight."""

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from peftjax.config import AdapterConfig, check_names, check_regex
from peftjax.factors import Arrays, BiasChange, Factors, Method, Weight, WeightSpec
from peftjax.sites import Site
from peftjax.targeting import ends_with, is_named


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    r"""Infused adapter by inhibiting and amplifying inner activations: learn scales alone.

    A module scales what comes out of it, its bias included; a feedforward module what goes in:

    .. math::

      y = l \odot (x W + b) \qquad \text{or, feedforward,} \qquad y = (l \odot x) W + b

    Several IA3 adapters of one module multiply. A convolution has one scale for every channel.

    Args:
      feedforward_modules: which of the adapted modules scale their inputs: a list of names, as in
        ``target_modules`` (PEFT's own match ignores where a name begins, so that ``dense`` means
        ``xdense`` too; here it does not), or a string, a regular expression for the whole path.
        Must be given: ``[]`` for none.
      init_ia3_weights: start at ones, the identity. False: normal, which is not.
      fan_in_fan_out: accepted because PEFT's files hold it, and never used: which axes of a weight
        are inputs is seen in the trace of the model.
      target_modules: see :class:`~peftjax.config.AdapterConfig`, as for the fields below.
      exclude_modules: modules not to adapt.
      layers_to_transform: layer indices to adapt. PEFT has no such field for IA3.
      layers_pattern: name of the module that a layer index follows. PEFT has none either.
      modules_to_save: modules to train and save whole.
      base_model_name_or_path: the base model, for torch PEFT.
      revision: the base model's revision, for torch PEFT.
      task_type: PEFT's task, for torch PEFT.

    Raises:
      ValueError: ``feedforward_modules`` is missing, or names a module that ``target_modules``
        does not.

    Example:
      >>> from peftjax.methods.ia3 import IA3Config
      >>> config = IA3Config(target_modules=["key", "value", "down"], feedforward_modules=["down"])
      >>> config.feedforward_modules
      ('down',)

    References:
      Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
      Learning, 2022, https://arxiv.org/abs/2205.05638
    """

    peft_type: ClassVar[str] = "IA3"

    feedforward_modules: str | Sequence[str] | None = None
    init_ia3_weights: bool = True
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("feedforward_modules", self.feedforward_modules, or_string=True)
        if isinstance(self.feedforward_modules, str):
            check_regex("feedforward_modules", self.feedforward_modules)
        elif self.feedforward_modules and isinstance(self.target_modules, tuple):
            for module in self.feedforward_modules:
                if not any(_alike(module, target) for target in self.target_modules):
                    raise ValueError(
                        f"`feedforward_modules` should be a subset of `target_modules`, which "
                        f"does not hold {module!r}"
                    )


def _alike(name: str, other: str) -> bool:
    """Whether one of two names may be the end of the other; layers of a stack need no number."""
    name, other = (re.sub(r"\.\d+(?=\.|$)", "", each) for each in (name, other))
    return ends_with(name, other) or ends_with(other, name)


def _settings(config: IA3Config, site: Site, layer: int | None) -> bool:
    """Whether a module is feedforward: it scales its inputs."""
    modules = config.feedforward_modules
    if modules is None:
        raise ValueError(
            "`feedforward_modules` says which modules scale their inputs, and is missing: pass "
            "their names, or [] for none"
        )
    if layer is None:
        return is_named(modules, site)
    layers = site.layers or range(site.full_stack_shape[0])
    if len({is_named(modules, site, each) for each in layers}) > 1:
        raise ValueError(
            "`feedforward_modules` names some of the stacked layers, whose scales would differ in "
            "shape: name all or none of them"
        )
    return is_named(modules, site, layer)


def _init(
    key: PRNGKeyArray, config: IA3Config, feedforward: bool, weight: Weight, buffers: Arrays
) -> Arrays:
    """Scales laid out like the weight, of size 1 along the axes that they do not scale.

    So the shape says which ones they do: PEFT tells them apart in the same way.
    """
    spec = weight.spec
    ones_in, ones_out = (1,) * len(spec.in_shape), (1,) * len(spec.out_shape)
    shape = (*_channels(spec), *ones_out) if feedforward else (*ones_in, *spec.out_shape)
    if feedforward and max(shape) == 1:
        raise ValueError("a feedforward module has a single input: exclude the module")
    if config.init_ia3_weights:
        return {"ia3_l": jnp.ones(shape, spec.dtype)}
    return {"ia3_l": jax.random.normal(key, shape, spec.dtype)}


def _channels(spec: WeightSpec) -> tuple[int, ...]:
    """The in-axes, with one entry for all taps of a kernel, and the channels of all groups."""
    sizes = [1 if axis in spec.taps else n for axis, n in enumerate(spec.in_shape)]
    if spec.groups > 1:
        channels = [axis for axis in range(len(sizes)) if axis not in spec.taps]
        if len(channels) != 1 or len(spec.out_shape) != 1:
            raise ValueError(
                "a feedforward convolution in groups has more than one axis of channels, as when "
                "it is vmapped over kernels: exclude the module, or let it scale its outputs"
            )
        sizes[channels[0]] *= spec.groups
    return tuple(sizes)


def _scale(params: Arrays, weight: Weight) -> tuple[Array, bool]:
    """The scale along the axes it scales, and whether those are the in-axes."""
    scale, ins = params["ia3_l"], len(weight.spec.in_shape)
    feedforward = max(scale.shape[:ins]) > 1
    return scale.reshape(scale.shape[:ins] if feedforward else scale.shape[ins:]), feedforward


def _factors(
    config: IA3Config, params: Arrays, buffers: Arrays, weight: Weight, key: PRNGKeyArray | None
) -> Factors:
    scale, feedforward = _scale(params, weight)
    return Factors(in_scale=scale) if feedforward else Factors(out_scale=scale)


def _bias(config: IA3Config, params: Arrays, buffers: Arrays, weight: Weight) -> BiasChange:
    scale, feedforward = _scale(params, weight)
    return BiasChange() if feedforward else BiasChange(scale=scale)


IA3Config.method = Method(
    settings=_settings,
    init=_init,
    factors=_factors,
    bias=_bias,
    axes={"ia3_l": ("in", "out")},
    params=("ia3_l",),
)
