"""Merging and taking apart."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import EverythingConfig, mlp, mlp_params, normal, redraw

from peftjax import IA3Config, LoraConfig, adapt, find_sites, init_adapter, merge, unmerge

KEY = jax.random.key(0)
X = normal(4, 6, seed=9, std=1)


def make(params, config):
    adapter = init_adapter(
        KEY, config, find_sites(mlp, params, X.astype(params["up"]["bias"].dtype)), params
    )
    return adapter.replace(params=redraw(adapter.params))


def lora(**fields):
    return LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], **fields)


def test_merge_is_the_formula():
    with jax.enable_x64(True):
        params = mlp_params(jnp.float64)
        adapter = make(params, lora(lora_bias=True))
        own, merged = adapter.params["up"], merge(params, adapter)
        a, b, shift = (np.asarray(own[n]) for n in ("lora_A", "lora_B", "lora_B_bias"))
        want = np.asarray(params["up"]["kernel"]) + 5 / 3 * a @ b
        np.testing.assert_allclose(merged["up"]["kernel"], want, rtol=1e-12)
        bias = np.asarray(params["up"]["bias"]) + 5 / 3 * shift
        np.testing.assert_allclose(merged["up"]["bias"], bias, rtol=1e-12)


def test_half_precision_is_rounded_once():
    params = mlp_params(jnp.bfloat16)
    adapter = make(params, lora())
    got = merge(params, adapter)["up"]["kernel"]
    own = {n: np.asarray(x, np.float64) for n, x in adapter.params["up"].items()}
    exact = np.asarray(params["up"]["kernel"], np.float64) + 5 / 3 * own["lora_A"] @ own["lora_B"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))


def test_nothing_but_the_targets_changes():
    params = {**mlp_params(), "other": jnp.ones(3), "name": "kept"}
    merged = merge(params, make(mlp_params(), lora()))
    assert merged["name"] == "kept"
    chex.assert_trees_all_equal(merged["other"], params["other"])
    chex.assert_trees_all_equal(merged["up"]["bias"], params["up"]["bias"])


def test_unmerge_undoes_a_sequence():
    params = mlp_params()
    adapters = [
        make(params, lora(lora_bias=True)),
        make(params, EverythingConfig(target_modules=["up"])),
    ]
    back = unmerge(merge(params, adapters), adapters)
    chex.assert_trees_all_close(back, params, atol=1e-5)


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"modules_to_save": ["down"]}])
def test_whole_leaves_cannot_come_back(fields):
    params = mlp_params()
    config = LoraConfig(r=3, target_modules=["up"], **fields)
    adapter = make(params, config)
    with pytest.raises(ValueError, match=r"down\.bias.*keep the base params"):
        unmerge(merge(params, adapter), adapter)


def test_safe_names_the_broken_module():
    params = mlp_params()
    adapter = make(params, lora())
    broken = {
        **adapter.params,
        "down": {**adapter.params["down"], "lora_A": jnp.full((9, 3), jnp.nan)},
    }
    adapter = adapter.replace(params=broken)
    assert jnp.isnan(merge(params, adapter)["down"]["kernel"]).all()
    with pytest.raises(ValueError, match=r"down\.kernel that are not finite"):
        merge(params, adapter, safe=True)


@pytest.mark.parametrize(
    ("module", "name"), [("up", "lora_B_bias"), ("down", "kernel"), ("down", "bias")]
)
def test_safe_looks_at_biases_and_whole_leaves(module, name):
    params = mlp_params()
    config = LoraConfig(r=3, target_modules=["up"], lora_bias=True, modules_to_save=["down"])
    adapter = make(params, config)
    merge(params, adapter, safe=True)
    own = adapter.params[module]
    own = {**own, name: jnp.full_like(own[name], jnp.inf)}
    path = rf"{module}\.{name.removeprefix('lora_B_')}"
    with pytest.raises(ValueError, match=rf"{path} that are not finite"):
        merge(params, adapter.replace(params={**adapter.params, module: own}), safe=True)


UP = {"target_modules": ["up"]}
SAVED = LoraConfig(**UP, modules_to_save=["down"])


@pytest.mark.parametrize(
    ("first", "second", "path"),
    [
        (lora(), SAVED, "down.kernel"),
        (lora(lora_bias=True), SAVED, "down.bias"),
        (lora(bias="all"), SAVED, "down.bias"),
        (IA3Config(**UP, feedforward_modules=[]), LoraConfig(**UP, bias="lora_only"), "up.bias"),
        (LoraConfig(**UP, lora_bias=True), LoraConfig(**UP, bias="all"), "up.bias"),
    ],
    ids=["weight", "two", "trained twice", "scaled bias", "shifted bias"],
)
def test_a_whole_leaf_drops_nothing(first, second, path):
    """What an adapter before it made of a leaf, one that trains it whole would replace."""
    params = mlp_params()
    adapters = [make(params, first), make(params, second)]
    for run in (lambda: merge(params, adapters), lambda: adapt(mlp)(params, adapters, X)):
        with pytest.raises(ValueError, match=rf"^{re.escape(path)}: .*put the adapter that trains"):
            run()
    if not adapters[0].saved:
        got = adapt(mlp)(params, adapters[::-1], X)
        want = mlp(merge(merge(params, adapters[1]), adapters[0]), X)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_none_changes_nothing():
    params = mlp_params()
    chex.assert_trees_all_equal(merge(params, None), params)
