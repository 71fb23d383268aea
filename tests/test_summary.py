"""Counting parameters and bytes."""

import jax
import jax.numpy as jnp
from models import mlp, mlp_params

from peftjax import LoraConfig, XLoraConfig, find_sites, init_adapter, init_xlora, summary

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


def test_a_mixture_of_experts():
    """The classifier learns; the experts are there as well, with the padding of their ranks."""
    params = mlp_params()
    sites = find_sites(mlp, params, X)
    key = jax.random.key(0)
    experts = {
        name: init_adapter(key, LoraConfig(r=r, target_modules=[target]), sites)
        for name, r, target in (("a", 3, "up"), ("b", 2, "up"), ("c", 4, "down"))
    }
    frozen, trained = (
        summary(init_xlora(key, XLoraConfig(use_trainable_adapters=learn), experts, sites), params)
        for learn in (False, True)
    )
    classifier, arrays = 9 * 3 + 3, 3 * 3 * (6 + 9) + 3 * 4 * (9 + 5)
    base = 6 * 9 + 9 + 9 * 5 + 5
    assert frozen.trainable == classifier
    assert trained.trainable == classifier + arrays
    assert frozen.total == trained.total == base + classifier + arrays
    assert frozen.adapter_bytes == trained.adapter_bytes
    assert "xlora_classifier" in str(frozen)
    assert "layers.0.weight 9x3" in str(frozen)
    assert "lora_A 3x6x3" in str(trained)


def test_a_notebook_shows_plain_text(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    params = mlp_params()
    sites = find_sites(mlp, params, X)
    adapter = init_adapter(jax.random.key(0), LoraConfig(r=2, target_modules=["up"]), sites)
    text = str(summary(adapter, params))
    assert "Trainable parameters" in text
    assert "lora_A" in text
    assert "\x1b" not in text
