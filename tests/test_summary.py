"""Counting parameters and bytes."""

import jax
import jax.numpy as jnp
from models import mlp, mlp_params

from peftjax import LoraConfig, find_sites, init_adapter, summary

X = jax.ShapeDtypeStruct((4, 6), jnp.float32)


def test_counts():
    params = mlp_params()
    config = LoraConfig(r=3, target_modules=["up"], modules_to_save=["down"])
    adapter = init_adapter(jax.random.key(0), config, find_sites(mlp, params, X), params)
    size = summary(adapter, params)
    lora, down, up = 3 * (6 + 9), 9 * 5 + 5, 6 * 9 + 9
    assert size.trainable == lora + down
    assert size.total == up + down + lora
    assert size.adapter_bytes == 4 * (lora + down + 1)
    assert size.model_bytes == 4 * (up + down)
    assert size.modules["up"] == ({"lora_A": (6, 3), "lora_B": (3, 9)}, lora)
    assert size.percent == 100 * size.trainable / size.total


def test_the_table_ends_as_peft_prints_it():
    params = mlp_params(jnp.bfloat16)
    sites = find_sites(mlp, params, X.update(dtype=jnp.bfloat16))
    adapter = init_adapter(jax.random.key(0), LoraConfig(r=3, target_modules=["up"]), sites)
    text = str(summary(adapter, params))
    assert "trainable params: 45 || all params: 158 || trainable%: 28.4810" in text
    assert "adapter: 184 bytes || model: 226 bytes" in text
    assert "lora_A 6x3, lora_B 3x9" in text
