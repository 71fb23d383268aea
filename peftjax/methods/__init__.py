"""One file a method: its config, how it starts, its factors."""

from collections.abc import Mapping
from typing import Any

from peftjax.config import AdapterConfig
from peftjax.methods.adalora import AdaLoraConfig as AdaLoraConfig
from peftjax.methods.adalora import orthogonality as orthogonality
from peftjax.methods.hra import HRAConfig as HRAConfig
from peftjax.methods.hra import hra_orthogonality as hra_orthogonality
from peftjax.methods.ia3 import IA3Config as IA3Config
from peftjax.methods.loha import LoHaConfig as LoHaConfig
from peftjax.methods.loha import join_loha as join_loha
from peftjax.methods.loha import split_loha as split_loha
from peftjax.methods.lora import LoraConfig as LoraConfig
from peftjax.methods.xlora import XLoraConfig as XLoraConfig
from peftjax.methods.xlora import init_xlora as init_xlora
from peftjax.methods.xlora import xlora_experts as xlora_experts
from peftjax.methods.xlora import xlora_layers as xlora_layers

# The only place where a method is looked up by name: the reader of a config file.
CONFIGS: dict[str, type[AdapterConfig]] = {
    cls.peft_type: cls
    for cls in (LoraConfig, AdaLoraConfig, LoHaConfig, HRAConfig, IA3Config, XLoraConfig)
}


def config_from(data: Any) -> AdapterConfig:
    """The config that the contents of an ``adapter_config.json`` say.

    Raises:
      ValueError: it is no config, or of a method that is not known here.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"a config is a JSON object, got {type(data).__name__}")
    method = data.get("peft_type")
    if not isinstance(method, str) or method not in CONFIGS:
        known = ", ".join(CONFIGS)
        raise ValueError(f"`peft_type` is {method!r}; the methods here are {known}")
    try:
        return CONFIGS[method].from_dict(data)
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error
