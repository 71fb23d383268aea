"""X-LoRA: adapters as experts, which a small classifier mixes for every token and layer."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from peftjax.adapter import Adapter
from peftjax.config import AdapterConfig, FrozenMapping, check_probability
from peftjax.experts import expert
from peftjax.factors import Arrays, Change, Gating, Method, Weight
from peftjax.routing import stack_adapters
from peftjax.sites import Site, Sites
from peftjax.unstacking import Index, indices

CLASSIFIER = "xlora_classifier"

# The fields of the config that are arrays, so that other values are no new program.
_VALUES = ("softmax_temperature", "global_scaling_weight", "scaling_pass_value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLoraConfig(AdapterConfig):
    r"""The config of an X-LoRA adapter, with PEFT's fields and defaults.

    Experts are adapters trained before, each with a low-rank change of every weight. The model
    runs twice: from the hidden states h of the first pass a classifier computes, for every token
    and layer, the scalings with which the second pass adds up the experts' changes:

    .. math::
      \sigma = \mathrm{softmax}(\mathrm{MLP}(h) / T), \qquad
      y = x W + w \sum_e \sigma_e \, s_e (x A_e) B_e

    ``top_k_lora`` keeps the largest of them alone, as they are; with ``enable_softmax_topk`` those
    kept go through a softmax once more. Where PEFT numbers the experts, they may have any name
    here; they may also be LoHa or AdaLoRA, whose changes add up as well.

    Args:
      hidden_size: size of the hidden states; None takes that of the output head.
      adapters: the experts' names, each with the directory its file is in; ``init_xlora`` fills
        it in.
      enable_softmax: whether the scalings are a softmax of what the classifier says.
      enable_softmax_topk: whether those that ``top_k_lora`` keeps go through a softmax.
      layerwise_scalings: whether every layer gets a mix of its own.
      xlora_depth: linear layers of the classifier.
      xlora_size: width between them.
      xlora_dropout_p: dropout between them while training.
      use_trainable_adapters: whether the experts learn too.
      softmax_temperature: T; lower is sharper.
      top_k_lora: how many experts serve a token at most; None for all.
      scaling_pass_value: scaling of every expert in the first pass; 0 runs the model without
        them, None is one over their number.
      global_scaling_weight: w, a factor of all experts.
      experts: the experts' own configs, in order; ``init_xlora`` fills it in, and PEFT's files have
        them beside the experts.
      head: path of the weight whose input are the hidden states, likewise.

    Raises:
      ValueError: a size, count or temperature is out of range, or a field says which modules to
        adapt, which is up to the experts.

    References:
      Buehler and Buehler, X-LoRA: Mixture of Low-Rank Adapter Experts, 2024,
      https://arxiv.org/abs/2402.07148
    """

    peft_type: ClassVar[str] = "XLORA"

    hidden_size: int | None = None
    adapters: Mapping[str, str] = FrozenMapping()
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float | None = 0.0
    global_scaling_weight: float = 1.0
    experts: tuple[AdapterConfig, ...] = ()
    head: str | None = None

    def __post_init__(self) -> None:
        if self.adapters is None:
            object.__setattr__(self, "adapters", {})
        super().__post_init__()
        for name in _OF_THE_EXPERTS:
            if getattr(self, name) not in (None, ()):
                raise ValueError(f"X-LoRA adapts what its experts adapt: leave `{name}` out")
        for name in ("hidden_size", "xlora_depth", "xlora_size", "top_k_lora"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {value}")
        if self.softmax_temperature <= 0:
            raise ValueError(
                f"`softmax_temperature` must be above 0, got {self.softmax_temperature}"
            )
        check_probability("xlora_dropout_p", self.xlora_dropout_p)
        if self.enable_softmax_topk and self.top_k_lora is None:
            warnings.warn(
                "`enable_softmax_topk` without `top_k_lora` is a softmax of all scalings",
                UserWarning,
                stacklevel=4,
            )
        if self.enable_softmax_topk and self.enable_softmax:
            warnings.warn(
                "`enable_softmax_topk` is a softmax of what `enable_softmax` made of the scalings, "
                "which flattens them: switch one of them off",
                UserWarning,
                stacklevel=4,
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns this config as JSON-ready values under PEFT's keys, ``peft_type`` among them."""
        ours = {"experts", "head"}
        shared = {field.name for field in dataclasses.fields(AdapterConfig)} - _OF_EVERY_FILE
        plain = dataclasses.replace(self, experts=())
        every = super(XLoraConfig, plain).to_dict()
        return {name: value for name, value in every.items() if name not in ours | shared}


_OF_THE_EXPERTS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)

_OF_EVERY_FILE = {"base_model_name_or_path", "revision", "task_type"}


class Names(Protocol):
    """Torch's names of modules, and their order in the torch model: ``ModuleNames`` is one."""

    def to_torch(self, name: str, index: Index = ()) -> str:
        """Torch's name of a module."""

    def place(self, torch_name: str) -> Any:
        """What to sort torch's names by."""


def init_xlora(
    key: PRNGKeyArray,
    config: XLoraConfig,
    experts: Mapping[str, Adapter],
    sites: Sites,
    *,
    names: Names | None = None,
) -> Adapter:
    """Makes an X-LoRA adapter of a new classifier and trained experts.

    Args:
      key: a PRNG key, from which the classifier is drawn.
      config: the config.
      experts: the experts by name, adapters of one family; their ranks, scales and modules may
        differ.
      sites: what ``find_sites`` found in the model, for its output head.
      names: the model's ``ModuleNames``: with them the layers of the scalings are in torch's
        order; without, in that of the params tree.

    Returns:
      The adapter. ``params["xlora_classifier"]`` learns; the experts are frozen in ``buffers``
      unless ``use_trainable_adapters``.

    Raises:
      ValueError: the experts cannot run as one, or their changes cannot be mixed; the config names
        other experts, or keeps more of them than there are.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> def apply_fn(params, ids):
      ...     return jnp.tanh(params["embed"]["embedding"][ids] @ params["dense"]["kernel"]) @ (
      ...         params["head"]["kernel"]
      ...     )
      >>> shapes = {"embed": (9, 4), "dense": (4, 5), "head": (5, 9)}
      >>> names = {"embed": "embedding", "dense": "kernel", "head": "kernel"}
      >>> params = {name: {names[name]: jnp.ones(shape)} for name, shape in shapes.items()}
      >>> ids = jnp.array([[1, 2, 3], [4, 5, 6]])
      >>> sites = peftjax.find_sites(apply_fn, params, ids)
      >>> config = peftjax.LoraConfig(r=2, target_modules=["dense"], init_lora_weights=False)
      >>> experts = {
      ...     name: peftjax.init_adapter(jax.random.key(i), config, sites)
      ...     for i, name in enumerate(["poems", "code"])
      ... }
      >>> config = peftjax.XLoraConfig(xlora_depth=2, xlora_size=8)
      >>> adapter = peftjax.init_xlora(jax.random.key(2), config, experts, sites)
      >>> adapted = peftjax.adapt(apply_fn, return_scalings=True)
      >>> out, scalings = adapted(params, adapter, ids)
      >>> out.shape, scalings.shape
      ((2, 3, 9), (2, 3, 1, 2))

    References:
      Buehler and Buehler, X-LoRA: Mixture of Low-Rank Adapter Experts, 2024,
      https://arxiv.org/abs/2402.07148
    """
    if config.adapters and set(config.adapters) != set(experts):
        raise ValueError(
            f"`adapters` of the config names {', '.join(config.adapters)}, and the experts are "
            f"{', '.join(experts)}"
        )
    bank = stack_adapters(experts)
    stacked, kind = bank.adapter, bank.adapter.config
    if not kind.method.mixes(kind):
        raise ValueError(
            f"X-LoRA adds up its experts' changes, and those of {type(kind).__name__} with these "
            f"fields are no sums: mix LoRA without DoRA, LoHa or AdaLoRA"
        )
    heads = [site for site in sites.values() if site.is_head]
    head = heads[0] if len(heads) == 1 else None
    size = config.hidden_size or (_features(head) if head else None)
    if size is None:
        raise ValueError(
            "this model has no one output head to tell the size of its hidden states: pass "
            "`hidden_size` in the config, and hidden_states= to adapt"
        )
    if config.top_k_lora is not None and config.top_k_lora > len(experts):
        raise ValueError(
            f"`top_k_lora` is {config.top_k_lora}, and there are {len(experts)} experts: "
            f"{', '.join(experts)}"
        )
    paths = config.adapters or {name: name for name in experts}
    config = dataclasses.replace(
        config,
        hidden_size=size,
        adapters={name: paths[name] for name in experts},
        experts=tuple(each.config for each in experts.values()),
        head=head.path if head else None,
    )
    places = _places(stacked.sites, names)
    value = config.scaling_pass_value
    values = {name: getattr(config, name) for name in _VALUES}
    values["scaling_pass_value"] = 1 / len(experts) if value is None else value
    frozen = {module: dict(own) for module, own in stacked.buffers.items()}
    for name, own in frozen.items():
        own["place"] = jnp.asarray(places[name])
    params = dict(stacked.params)
    if not config.use_trainable_adapters:
        frozen = {module: own | params.pop(module) for module, own in frozen.items()}
    layers = sum(place.size for place in places.values())
    dtype = next(iter(next(iter(stacked.params.values())).values())).dtype
    params[CLASSIFIER] = _init_classifier(key, config, len(experts), layers, dtype)
    frozen[CLASSIFIER] = {name: jnp.asarray(value, dtype) for name, value in values.items()}
    return Adapter(params, frozen, None, config, stacked.sites)


def xlora_experts(adapter: Adapter) -> dict[str, Adapter]:
    """The experts of an X-LoRA adapter, as they are now, each an adapter of its own.

    Raises:
      ValueError: the adapter is no X-LoRA.
    """
    config = check_xlora(adapter)
    names = config.experts[0].method.params
    params: dict[str, Arrays] = {}
    buffers: dict[str, Arrays] = {}
    for module in adapter.sites:
        every = adapter.buffers[module] | adapter.params.get(module, {})
        params[module] = {name: x for name, x in every.items() if name in names}
        buffers[module] = {name: x for name, x in every.items() if name not in names}
    stacked = adapter.replace(params=params, buffers=buffers)
    return {
        name: expert(stacked, place, own)
        for place, (name, own) in enumerate(zip(config.adapters, config.experts, strict=True))
    }


def xlora_layers(adapter: Adapter) -> tuple[str, ...]:
    """The names of the layers that an X-LoRA adapter's scalings are for, in their order.

    Raises:
      ValueError: the adapter is no X-LoRA.
    """
    check_xlora(adapter)
    places = {}
    for site in adapter.sites.values():
        own = np.asarray(adapter.buffers[site.name]["place"]).ravel()
        for place, index in zip(own.tolist(), indices(site), strict=True):
            places[place] = site.name + "".join(f"[{i}]" for i in index)
    return tuple(places[place] for place in sorted(places))


def check_xlora(adapter: Adapter) -> XLoraConfig:
    """The adapter's config; raises a ValueError unless it is X-LoRA's."""
    if not isinstance(adapter.config, XLoraConfig):
        name = type(adapter.config).__name__
        raise ValueError(f"this needs an adapter that init_xlora made, got one of {name}")
    return adapter.config


def _features(head: Site) -> int:
    """How many features an output head is applied to: a table is used the other way round."""
    return head.out_size if head.kind == "lookup" else head.in_size


def _places(sites: Sites, names: Names | None) -> dict[str, np.ndarray]:
    """For each weight of each site its place among all, along the site's stack axes."""
    parts = [(site.name, index) for site in sites.values() for index in indices(site)]
    if names is not None:
        parts.sort(key=lambda part: names.place(names.to_torch(*part)))
    places = {part: place for place, part in enumerate(parts)}
    return {
        site.name: np.reshape(
            [places[site.name, index] for index in indices(site)], site.stack_shape
        ).astype(np.int32)
        for site in sites.values()
    }


def classifier_sizes(config: XLoraConfig, experts: int, layers: int) -> dict[int, tuple[int, int]]:
    """Inputs and outputs of each linear layer of a classifier, by its number in PEFT's files.

    Between two of them are a ReLU and, if there is any, a dropout, which count too.
    """
    assert config.hidden_size is not None
    last = experts * layers if config.layerwise_scalings else experts
    widths = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), last]
    step = 3 if config.xlora_dropout_p > 0 else 2
    return {step * i: (n, m) for i, (n, m) in enumerate(itertools.pairwise(widths))}


def _init_classifier(
    key: PRNGKeyArray, config: XLoraConfig, experts: int, layers: int, dtype: Any
) -> Arrays:
    """Weights and biases as torch's Linear draws them."""
    params = {}
    for number, (ins, outs) in classifier_sizes(config, experts, layers).items():
        weight_key, bias_key = jax.random.split(jax.random.fold_in(key, number))
        bound = 1 / math.sqrt(ins)
        for name, own, shape in (("weight", weight_key, (ins, outs)), ("bias", bias_key, (outs,))):
            params[f"layers.{number}.{name}"] = jax.random.uniform(own, shape, dtype, -bound, bound)
    return params


def _first_pass(adapter: Adapter) -> Float[Array, " experts"]:
    """The weight of every expert in the first pass."""
    config = check_xlora(adapter)
    value = adapter.buffers[CLASSIFIER]["scaling_pass_value"]
    return _gates(adapter, jnp.broadcast_to(value, (1, 1, 1, len(config.experts))))[0, 0, 0]


def _scalings(
    adapter: Adapter, hidden: Float[Array, "batch sequence features"]
) -> Float[Array, "batch sequence _ experts"]:
    """What the classifier makes of the hidden states; one layer stands for all if they agree."""
    config, params = check_xlora(adapter), adapter.params[CLASSIFIER]
    if hidden.shape[-1] != config.hidden_size:
        raise ValueError(
            f"`hidden_size` is {config.hidden_size}, and the hidden states have {hidden.shape[-1]} "
            f"features: make the adapter with the sites of this model, or with its `hidden_size`"
        )
    numbers = sorted({int(name.split(".")[1]) for name in params})
    x = hidden.astype(params["layers.0.weight"].dtype)
    for number in numbers:
        weight, bias = params[f"layers.{number}.weight"], params[f"layers.{number}.bias"]
        x = jnp.einsum("bsi,io->bso", x, weight) + bias[None, None]
        if number == numbers[-1]:
            break
        x = jax.nn.relu(x)
        if adapter.key is not None and config.xlora_dropout_p > 0:
            key = jax.random.fold_in(adapter.key, number)
            keep = 1 - config.xlora_dropout_p
            x = jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep, 0)
    x = x.reshape(*x.shape[:2], -1, len(config.experts))
    if not config.enable_softmax:
        return x
    return jax.nn.softmax(x / adapter.buffers[CLASSIFIER]["softmax_temperature"])


def _gates(
    adapter: Adapter, scalings: Float[Array, "batch sequence layers experts"]
) -> Float[Array, "batch sequence layers experts"]:
    """The weights of the experts: the largest scalings, times the weight of all."""
    config, scalings = check_xlora(adapter), jnp.asarray(scalings)
    experts = len(config.experts)
    layers = sum(adapter.buffers[name]["place"].size for name in adapter.sites)
    if scalings.ndim != 4 or scalings.shape[-1] != experts or scalings.shape[2] not in (1, layers):
        raise ValueError(
            f"the scalings of this adapter have shape (batch, sequence, {layers} layers, {experts} "
            f"experts), got {scalings.shape}"
        )
    if config.top_k_lora is not None and config.top_k_lora < experts:
        _, kept = lax.top_k(scalings, config.top_k_lora)
        scalings = scalings * jax.nn.one_hot(kept, experts, dtype=scalings.dtype).sum(-2)
    if config.enable_softmax_topk:
        there = scalings != 0
        # Of no scaling that is left, all are masked, and none of them may become NaN.
        whole = jnp.where(there, scalings, -jnp.inf)
        whole = jnp.where(there.any(-1, keepdims=True), whole, 0)
        scalings = jnp.where(there, jax.nn.softmax(whole), 0)
    return scalings * adapter.buffers[CLASSIFIER]["global_scaling_weight"].astype(scalings.dtype)


def _factors(
    config: XLoraConfig, params: Arrays, buffers: Arrays, weight: Weight, key: PRNGKeyArray | None
) -> Change:
    """Those of an expert: frozen experts have all their arrays among the buffers."""
    own = config.experts[0]
    return own.method.factors(own, buffers | params, buffers, weight, key)


def _bias(config: XLoraConfig, params: Arrays, buffers: Arrays, weight: Weight) -> Any:
    own = config.experts[0]
    return own.method.bias(own, buffers | params, buffers, weight)


def _made_otherwise(*_: Any) -> Any:
    raise ValueError("an X-LoRA adapter is made of trained experts: use init_xlora")


XLoraConfig.method = Method(
    settings=_made_otherwise,
    init=_made_otherwise,
    factors=_factors,
    bias=_bias,
    mixes=lambda config: True,
    gating=Gating(
        module=CLASSIFIER,
        head=lambda config: config.head,
        first_pass=_first_pass,
        scalings=_scalings,
        gates=_gates,
    ),
)
