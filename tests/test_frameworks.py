"""From modules to functions: collections, streams of randomness, BatchNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import normal, redraw

from peftjax import LoraConfig, adapt, find_sites, from_linen, from_nnx, init_adapter, merge

KEY = jax.random.key(0)
X = normal(8, 6, std=1)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(9)(x))
        return nn.Dense(5)(nn.Dropout(0.5, deterministic=not train)(x))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 9, rngs=rngs)
        self.norm = nnx.BatchNorm(9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(9, 5, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(self.norm(self.up(x))))


def adapter_for(apply_fn, params, *args, **kwargs):
    sites = find_sites(apply_fn, params, *args, **kwargs)
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
    adapter = init_adapter(KEY, config, sites)
    return adapter.replace(params=redraw(adapter.params))


@pytest.fixture(scope="module")
def linen():
    module = LinenModel()
    variables = module.init(KEY, X, train=False)
    return module, variables["params"], {"batch_stats": variables["batch_stats"]}


def test_linen_in_evaluation(linen):
    module, params, rest = linen
    apply_fn = from_linen(module, train=False)
    adapter = adapter_for(apply_fn, params, X, variables=rest)
    got = adapt(apply_fn)(params, adapter, X, variables=rest)
    want = module.apply({"params": merge(params, adapter), **rest}, X, train=False)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_linen_in_training(linen):
    module, params, rest = linen
    apply_fn = from_linen(module, train=True, mutable=["batch_stats"])
    kwargs = {"variables": rest, "rngs": {"dropout": KEY}}
    adapter = adapter_for(apply_fn, params, X, **kwargs)
    got, updated = adapt(apply_fn)(params, adapter, X, **kwargs)
    want, expected = module.apply(
        {"params": merge(params, adapter), **rest},
        X,
        train=True,
        rngs={"dropout": KEY},
        mutable=["batch_stats"],
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(updated), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    mean = rest["batch_stats"]["BatchNorm_0"]["mean"]
    assert float(jnp.abs(updated["batch_stats"]["BatchNorm_0"]["mean"] - mean).max()) > 1e-3


def test_linen_flags_at_the_call(linen):
    module, params, rest = linen
    apply_fn = from_linen(module)
    adapter = adapter_for(apply_fn, params, X, train=False, variables=rest)
    got = adapt(apply_fn)(params, adapter, X, train=False, variables=rest)
    assert got.shape == (8, 5)


def test_nnx_in_evaluation():
    model = NnxModel(nnx.Rngs(0))
    model.eval()
    apply_fn, params = from_nnx(model)
    adapter = adapter_for(apply_fn, params, X)
    got = adapt(apply_fn)(params, adapter, X)
    nnx.update(model, nnx.State(merge(params, adapter)))
    np.testing.assert_allclose(got, model(X), rtol=1e-4, atol=1e-5)


def test_nnx_state_comes_back():
    model = NnxModel(nnx.Rngs(0))
    model.train()
    apply_fn, params = from_nnx(model)
    adapter = adapter_for(apply_fn, params, X)
    adapted = adapt(apply_fn)
    first, state = adapted(params, adapter, X, state=apply_fn.state)
    second, _ = adapted(params, adapter, X, state=state)
    assert float(jnp.abs(first - second).max()) > 1e-3, "the stream of dropout moved on"
    nnx.update(model, nnx.State(merge(params, adapter)))
    np.testing.assert_allclose(first, model(X), rtol=1e-4, atol=1e-5)
    kept = nnx.state(model, nnx.BatchStat)["norm"]["mean"]
    np.testing.assert_allclose(state["norm"]["mean"][...], kept[...], rtol=1e-4, atol=1e-5)


def test_nnx_names_are_the_attribute_paths():
    apply_fn, params = from_nnx(NnxModel(nnx.Rngs(0)))
    assert list(find_sites(apply_fn, params, X)) == ["down", "up"]
