"""Merging and taking apart."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import EverythingConfig, mlp, mlp_params, normal, redraw

from peftjax import LoraConfig, find_sites, init_adapter, merge, unmerge

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


def test_none_changes_nothing():
    params = mlp_params()
    chex.assert_trees_all_equal(merge(params, None), params)
