"""One file a method: its config, how it starts, its factors."""

from peftjax.methods.lora import LoraConfig as LoraConfig
