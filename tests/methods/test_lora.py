"""LoRA's starts: what is drawn, what is taken from the weight, and what is the identity."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import normal, redraw

from peftjax import LoraConfig, adapt, find_sites, init_adapter, merge, save_pretrained

KEY = jax.random.key(0)


def start(init, r=4, shape=(200, 300), alpha=5, dtype=None, **fields):
    params = {"w": normal(*shape)}
    sites = find_sites(lambda p, x: x @ p["w"], params, jnp.ones((1, shape[0])))
    config = LoraConfig(
        r=r, lora_alpha=alpha, init_lora_weights=init, target_modules=["w"], **fields
    )
    return params, init_adapter(KEY, config, sites, params, dtype=dtype)


def test_default_is_kaiming_uniform_and_zero():
    _, adapter = start(True)
    a, b = adapter.params["w"]["lora_A"], adapter.params["w"]["lora_B"]
    bound = 1 / math.sqrt(200)
    assert float(jnp.abs(a).max()) <= bound
    assert abs(float(a.std()) - bound / math.sqrt(3)) < 0.05 * bound
    assert not b.any()


def test_gaussian_has_std_one_over_rank():
    _, adapter = start("gaussian")
    assert abs(float(adapter.params["w"]["lora_A"].std()) - 1 / 4) < 0.02
    assert not adapter.params["w"]["lora_B"].any()


def test_false_is_not_the_identity():
    params, adapter = start(False)
    b = adapter.params["w"]["lora_B"]
    assert abs(float(jnp.abs(b).max()) - 1 / math.sqrt(4)) < 0.01
    assert float(jnp.abs(merge(params, adapter)["w"] - params["w"]).max()) > 1e-2


def test_orthogonal_factors_cancel():
    _params, adapter = start("orthogonal")
    own = adapter.params["w"]
    assert float(jnp.abs(own["lora_A"]).min()) > 0
    assert float(jnp.abs(own["lora_B"]).max()) > 0
    np.testing.assert_allclose(own["lora_A"] @ own["lora_B"], 0, atol=1e-6)


def test_a_table_starts_from_zero_rows():
    params, ids = {"table": normal(12, 5)}, jnp.arange(3)
    sites = find_sites(lambda p, ids: p["table"][ids], params, ids)
    adapter = init_adapter(KEY, LoraConfig(r=64, target_modules=["table"]), sites)
    assert not adapter.params["table"]["lora_A"].any()
    assert abs(float(adapter.params["table"]["lora_B"].std()) - 1) < 0.15


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora"])
def test_factors_out_of_the_weight_start_as_the_identity(init):
    params, adapter = start(init)
    own, kept = adapter.params["w"], adapter.buffers["w"]
    np.testing.assert_array_equal(own["lora_A"], kept["lora_A_init"])
    np.testing.assert_array_equal(own["lora_B"], kept["lora_B_init"])
    x = normal(3, 200, std=1)
    got = adapt(lambda p, x: x @ p["w"])(params, adapter, x)
    np.testing.assert_allclose(got, x @ params["w"], atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("init", ["orthogonal", "pissa", "pissa_niter_8", "olora"])
def test_half_precision_starts_are_the_rounded_ones(init, dtype):
    """JAX decomposes nothing in half precision, and a start rounded once is the nearest."""
    _, half = start(init, shape=(12, 9), dtype=dtype)
    _, full = start(init, shape=(12, 9))
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {jnp.dtype(dtype)}
    for name, array in half.params["w"].items():
        np.testing.assert_array_equal(array, full.params["w"][name].astype(dtype))
        if init != "orthogonal":
            np.testing.assert_array_equal(half.buffers["w"][f"{name}_init"], array)


def test_pissa_is_the_best_approximation():
    """s A B is the weight's own best approximation of that rank, split evenly."""
    params, adapter = start("pissa", use_rslora=True)
    own, scaling = adapter.params["w"], adapter.buffers["w"]["scaling"]
    u, s, vt = np.linalg.svd(np.asarray(params["w"], np.float64), full_matrices=False)
    best = (u[:, :4] * s[:4]) @ vt[:4]
    assert float(scaling) == pytest.approx(5 / 2)
    np.testing.assert_allclose(scaling * own["lora_A"] @ own["lora_B"], best, atol=1e-4)
    norms = [np.linalg.norm(own["lora_A"], axis=0), np.linalg.norm(own["lora_B"], axis=1)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def test_randomised_pissa_comes_close():
    (_, exact), (_, fast) = start("pissa", shape=(60, 40)), start("pissa_niter_16", shape=(60, 40))
    products = [a.params["w"]["lora_A"] @ a.params["w"]["lora_B"] for a in (exact, fast)]
    np.testing.assert_allclose(products[1], products[0], atol=2e-2)


def test_olora_takes_the_orthonormal_basis():
    """In torch's layout W = Q R; B is the first columns of Q, A the first rows of R."""
    params, adapter = start("olora")
    own = adapter.params["w"]
    np.testing.assert_allclose(own["lora_B"] @ own["lora_B"].T, np.eye(4), atol=1e-5)
    projected = params["w"] @ own["lora_B"].T
    np.testing.assert_allclose(own["lora_A"], projected, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_base_is_never_changed(init):
    """PEFT subtracts the initial factors from the weight; here they stay in the buffers."""
    params, adapter = start(init)
    before = np.array(params["w"])
    moved = adapter.replace(params=jax.tree.map(lambda x: x + 0.1, adapter.params))
    merged = merge(params, moved)["w"]
    np.testing.assert_array_equal(params["w"], before)
    own, kept = moved.params["w"], adapter.buffers["w"]
    change = own["lora_A"] @ own["lora_B"] - kept["lora_A_init"] @ kept["lora_B_init"]
    np.testing.assert_allclose(merged - before, kept["scaling"] * change, atol=1e-3)


@pytest.mark.parametrize(("rslora", "want"), [(False, 5 / 4), (True, 5 / 2)])
def test_scaling(rslora, want):
    _, adapter = start(True, use_rslora=rslora)
    assert float(adapter.buffers["w"]["scaling"]) == pytest.approx(want)


def test_half_precision_keeps_the_scale(tmp_path):
    """8 / 6 is no number of bfloat16, and a file would tell of another alpha."""
    _, adapter = start(True, r=6, alpha=8, dtype=jnp.bfloat16)
    assert float(adapter.buffers["w"]["scaling"]) == pytest.approx(8 / 6, rel=1e-7)
    written = json.loads((save_pretrained(tmp_path, adapter) / "adapter_config.json").read_text())
    assert (written["lora_alpha"], written["alpha_pattern"]) == (8, {})


@pytest.mark.parametrize("kind", ["product", "lookup"])
def test_half_precision_factors_keep_the_digits_of_the_product(kind):
    """With a bias of the change, and factors that were taken out of the weight or not."""
    params = {"w": normal(12, 9), "bias": normal(9, seed=1)}
    x = jnp.arange(5) if kind == "lookup" else normal(5, 12, std=1)

    def apply_fn(params, x):
        y = params["w"][x] if kind == "lookup" else x @ params["w"]
        return y + jnp.expand_dims(params["bias"], 0)

    sites = find_sites(apply_fn, params, x)
    for fields in ({"lora_bias": True}, {"init_lora_weights": "pissa"}):
        config = LoraConfig(r=6, lora_alpha=8, target_modules=["w"], **fields)
        half = init_adapter(KEY, config, sites, params, dtype=jnp.bfloat16)
        half = half.replace(params=redraw(half.params))

        def wide(tree):
            return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

        full = half.replace(params=wide(half.params), buffers=wide(half.buffers))
        got, want = (jax.jit(adapt(apply_fn))(params, each, x) for each in (half, full))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
