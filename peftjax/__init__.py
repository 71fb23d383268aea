"""Functional adapters for any JAX model, in the language of Hugging Face PEFT."""

from peftjax.adapt import adapt as adapt
from peftjax.adapter import Adapter as Adapter
from peftjax.adapter import init_adapter as init_adapter
from peftjax.engine.trace import FallbackError as FallbackError
from peftjax.frameworks import from_linen as from_linen
from peftjax.frameworks import from_nnx as from_nnx
from peftjax.merging import merge as merge
from peftjax.merging import unmerge as unmerge
from peftjax.methods import AdaLoraConfig as AdaLoraConfig
from peftjax.methods import HRAConfig as HRAConfig
from peftjax.methods import IA3Config as IA3Config
from peftjax.methods import LoHaConfig as LoHaConfig
from peftjax.methods import LoraConfig as LoraConfig
from peftjax.methods import hra_orthogonality as hra_orthogonality
from peftjax.methods import join_loha as join_loha
from peftjax.methods import orthogonality as orthogonality
from peftjax.methods import split_loha as split_loha
from peftjax.sites import Site as Site
from peftjax.sites import Sites as Sites
from peftjax.sites import find_sites as find_sites
from peftjax.summary import Summary as Summary
from peftjax.summary import summary as summary
from peftjax.targeting import NoMatchingModuleError as NoMatchingModuleError
from peftjax.training import prune as prune
from peftjax.training import rank_allocator as rank_allocator
from peftjax.training import ranks as ranks
