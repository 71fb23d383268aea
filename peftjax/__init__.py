"""Functional adapters for any JAX model, in the language of Hugging Face PEFT."""

import importlib
from typing import TYPE_CHECKING, Any

from peftjax.adapt import adapt
from peftjax.adapter import Adapter, init_adapter
from peftjax.algebra.combining import combine_adapters
from peftjax.algebra.conversion import convert_to_lora, pad_ranks
from peftjax.engine.trace import FallbackError
from peftjax.first_pass import xlora_scalings
from peftjax.frameworks import from_linen, from_nnx
from peftjax.generation import generate
from peftjax.interop.base import base_state_dict
from peftjax.interop.families import module_names
from peftjax.interop.low_level import (
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peftjax.interop.names import ModuleNames
from peftjax.interop.pretrained import load_pretrained, save_pretrained
from peftjax.merging import merge, unmerge
from peftjax.methods import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    XLoraConfig,
    hra_orthogonality,
    init_xlora,
    join_loha,
    orthogonality,
    split_loha,
    xlora_experts,
    xlora_layers,
)
from peftjax.quantization import quantize_base
from peftjax.routing import AdapterBank, stack_adapters
from peftjax.scalings_log import ScalingsLog
from peftjax.sharding import adapter_shardings
from peftjax.sites import Site, Sites, find_sites
from peftjax.summary import Summary, summary
from peftjax.targeting import NoMatchingModuleError
from peftjax.training import (
    TrainState,
    init_train_state,
    make_train_step,
    prune,
    rank_allocator,
    ranks,
)

if TYPE_CHECKING:
    from peftjax import checkpoint
    from peftjax.checkpointer import AdapterCheckpointer

__all__ = [
    "AdaLoraConfig",
    "Adapter",
    "AdapterBank",
    "AdapterCheckpointer",
    "FallbackError",
    "HRAConfig",
    "IA3Config",
    "LoHaConfig",
    "LoraConfig",
    "ModuleNames",
    "NoMatchingModuleError",
    "ScalingsLog",
    "Site",
    "Sites",
    "Summary",
    "TrainState",
    "XLoraConfig",
    "adapt",
    "adapter_shardings",
    "base_state_dict",
    "checkpoint",
    "combine_adapters",
    "convert_to_lora",
    "find_sites",
    "from_linen",
    "from_nnx",
    "generate",
    "get_peft_model_state_dict",
    "hra_orthogonality",
    "init_adapter",
    "init_train_state",
    "init_xlora",
    "inject_adapter_in_model",
    "join_loha",
    "load_pretrained",
    "make_train_step",
    "merge",
    "module_names",
    "orthogonality",
    "pad_ranks",
    "prune",
    "quantize_base",
    "rank_allocator",
    "ranks",
    "save_pretrained",
    "set_peft_model_state_dict",
    "split_loha",
    "stack_adapters",
    "summary",
    "unmerge",
    "xlora_experts",
    "xlora_layers",
    "xlora_scalings",
]


def __getattr__(name: str) -> Any:
    """Imports Orbax when it is wanted, not for everyone who adapts a model."""
    if name == "AdapterCheckpointer":
        return importlib.import_module("peftjax.checkpointer").AdapterCheckpointer
    if name == "checkpoint":
        return importlib.import_module("peftjax.checkpoint")
    raise AttributeError(f"module 'peftjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
