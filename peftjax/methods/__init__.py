"""One file a method: its config, how it starts, its factors."""

from peftjax.methods.adalora import AdaLoraConfig as AdaLoraConfig
from peftjax.methods.adalora import orthogonality as orthogonality
from peftjax.methods.hra import HRAConfig as HRAConfig
from peftjax.methods.hra import hra_orthogonality as hra_orthogonality
from peftjax.methods.ia3 import IA3Config as IA3Config
from peftjax.methods.loha import LoHaConfig as LoHaConfig
from peftjax.methods.loha import join_loha as join_loha
from peftjax.methods.loha import split_loha as split_loha
from peftjax.methods.lora import LoraConfig as LoraConfig
