"""Functional adapters for any JAX model, in the language of Hugging Face PEFT."""

from typing import TYPE_CHECKING, Any

from peftjax.adapt import adapt as adapt
from peftjax.adapter import Adapter as Adapter
from peftjax.adapter import init_adapter as init_adapter
from peftjax.algebra.combining import combine_adapters as combine_adapters
from peftjax.algebra.conversion import convert_to_lora as convert_to_lora
from peftjax.algebra.conversion import pad_ranks as pad_ranks
from peftjax.engine.trace import FallbackError as FallbackError
from peftjax.first_pass import xlora_scalings as xlora_scalings
from peftjax.frameworks import from_linen as from_linen
from peftjax.frameworks import from_nnx as from_nnx
from peftjax.generation import generate as generate
from peftjax.interop.base import base_state_dict as base_state_dict
from peftjax.interop.families import module_names as module_names
from peftjax.interop.low_level import get_peft_model_state_dict as get_peft_model_state_dict
from peftjax.interop.low_level import inject_adapter_in_model as inject_adapter_in_model
from peftjax.interop.low_level import set_peft_model_state_dict as set_peft_model_state_dict
from peftjax.interop.names import ModuleNames as ModuleNames
from peftjax.interop.pretrained import load_pretrained as load_pretrained
from peftjax.interop.pretrained import save_pretrained as save_pretrained
from peftjax.merging import merge as merge
from peftjax.merging import unmerge as unmerge
from peftjax.methods import AdaLoraConfig as AdaLoraConfig
from peftjax.methods import HRAConfig as HRAConfig
from peftjax.methods import IA3Config as IA3Config
from peftjax.methods import LoHaConfig as LoHaConfig
from peftjax.methods import LoraConfig as LoraConfig
from peftjax.methods import XLoraConfig as XLoraConfig
from peftjax.methods import hra_orthogonality as hra_orthogonality
from peftjax.methods import init_xlora as init_xlora
from peftjax.methods import join_loha as join_loha
from peftjax.methods import orthogonality as orthogonality
from peftjax.methods import split_loha as split_loha
from peftjax.methods import xlora_experts as xlora_experts
from peftjax.methods import xlora_layers as xlora_layers
from peftjax.quantization import quantize_base as quantize_base
from peftjax.routing import AdapterBank as AdapterBank
from peftjax.routing import stack_adapters as stack_adapters
from peftjax.scalings_log import ScalingsLog as ScalingsLog
from peftjax.sharding import adapter_shardings as adapter_shardings
from peftjax.sites import Site as Site
from peftjax.sites import Sites as Sites
from peftjax.sites import find_sites as find_sites
from peftjax.summary import Summary as Summary
from peftjax.summary import summary as summary
from peftjax.targeting import NoMatchingModuleError as NoMatchingModuleError
from peftjax.training import TrainState as TrainState
from peftjax.training import init_train_state as init_train_state
from peftjax.training import make_train_step as make_train_step
from peftjax.training import prune as prune
from peftjax.training import rank_allocator as rank_allocator
from peftjax.training import ranks as ranks

if TYPE_CHECKING:
    from peftjax.checkpointer import AdapterCheckpointer as AdapterCheckpointer


def __getattr__(name: str) -> Any:
    """Imports Orbax when it is wanted, not for everyone who adapts a model."""
    if name == "AdapterCheckpointer":
        from peftjax.checkpointer import AdapterCheckpointer

        return AdapterCheckpointer
    raise AttributeError(f"module 'peftjax' has no attribute {name!r}")
