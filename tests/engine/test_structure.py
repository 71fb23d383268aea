"""The program an adapted function becomes: what it holds, and what it must not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from models import (
    equations,
    mlp,
    mlp_params,
    named,
    normal,
    redraw,
    scanned,
    scanned_params,
)

from peftjax import IA3Config, LoraConfig, adapt, find_sites, from_nnx, init_adapter, merge

KEY = jax.random.key(0)


def everything(site):
    return True


def make(function, params, *args, **fields):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=everything, **fields)
    adapter = init_adapter(KEY, config, find_sites(function, params, *args), params)
    return adapter.replace(params=redraw(adapter.params))


def gradient(function, adapter):
    return lambda trainable, params, x: jax.grad(
        lambda t: function(params, adapter.replace(params=t), x).sum()
    )(trainable)


class TestLoops:
    def test_scan_and_remat_survive(self):
        params, x = scanned_params(), normal(3, 6)
        adapter = make(scanned, params, x)
        jaxpr = jax.make_jaxpr(adapt(scanned))(params, adapter, x)
        (scan,) = named(jaxpr, "scan")
        assert scan.params["length"] == 4
        (remat,) = named(jaxpr, "remat2", "checkpoint")
        assert remat.params["policy"] is jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def test_the_gradient_scans_once_forward_and_once_backward(self):
        params, x = scanned_params(), normal(3, 6)
        adapter = make(scanned, params, x)
        own = jax.make_jaxpr(gradient(adapt(scanned), adapter))(adapter.params, params, x)
        base = jax.make_jaxpr(jax.grad(lambda p, x: scanned(p, x).sum()))(params, x)
        assert len(named(own, "scan")) == len(named(base, "scan")) == 2
        (remat,) = named(own, "remat2", "checkpoint")
        assert remat.params["policy"] is jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    @pytest.mark.parametrize("loop", ["scan", "while"])
    def test_factors_are_made_outside(self, loop):
        """A scale inside a decode loop would be multiplied once a step."""

        def apply_fn(params, x):
            if loop == "scan":
                return lax.scan(lambda x, _: (jnp.tanh(x @ params["w"]), None), x, length=5)[0]
            return lax.fori_loop(0, jnp.int32(5), lambda _, x: jnp.tanh(x @ params["w"]), x)

        params, x = {"w": normal(6, 6)}, normal(2, 6)
        adapter = make(apply_fn, params, x, init_lora_weights="pissa")
        (eqn,) = named(jax.make_jaxpr(adapt(apply_fn))(params, adapter, x), loop)
        body = eqn.params["jaxpr" if loop == "scan" else "body_jaxpr"]
        inside = {inner.primitive.name for inner in equations(body)}
        assert inside <= {"copy", "dot_general", "add", "tanh"}

    def test_weights_that_a_scan_returns_are_not_built(self):
        """NNX scans return their params; nobody reads them, so nobody may pay for them."""

        class Layer(nnx.Module):
            def __init__(self, rngs):
                self.dense = nnx.Linear(6, 6, rngs=rngs)

            def __call__(self, x):
                return jnp.tanh(self.dense(x))

        class Model(nnx.Module):
            def __init__(self, rngs):
                self.layers = nnx.vmap(Layer, in_axes=(0,))(rngs.split(3))

            def __call__(self, x):
                return nnx.scan(
                    lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
                )(x, self.layers)

        apply_fn, params = from_nnx(Model(nnx.Rngs(0)))
        x = normal(2, 6)
        adapter = make(apply_fn, params, x)
        jaxpr = jax.make_jaxpr(adapt(apply_fn, on_fallback="error"))(params, adapter, x)
        assert not dense_products(jaxpr, 6)

    def test_a_weight_that_a_scan_hands_back_stays_a_weight(self):
        def apply_fn(params, x):
            y, again = lax.scan(lambda x, w: (jnp.tanh(x @ w), w), x, params["w"])
            return y @ again[0] + jnp.sum(again)

        params, x = {"w": normal(3, 6, 6)}, normal(2, 6)
        adapter = make(apply_fn, params, x)
        want = apply_fn(merge(params, adapter), x)
        assert jnp.abs(adapt(apply_fn)(params, adapter, x) - want).max() < 1e-5


def dense_products(jaxpr, width):
    """Products of two factors as large as the weight: what low rank is there to avoid."""
    found = []
    for eqn in named(jaxpr, "dot_general"):
        shape = eqn.outvars[0].aval.shape
        contracted = eqn.params["dimension_numbers"][0][0]
        size = eqn.invars[0].aval.shape[contracted[0]] if contracted else 1
        if shape[-2:] == (width, width) and size < width:
            found.append(eqn)
    return found


class TestJit:
    @staticmethod
    def repeated(params, x):
        layer = jax.jit(lambda own, x: jnp.tanh(x @ own["w"] + own["b"][None]))
        for own in params:
            x = layer(own, x)
        return x

    def test_a_layer_jitted_once_is_replayed_once(self):
        params = [{"w": normal(6, 6, seed=i), "b": normal(6, seed=i)} for i in range(12)]
        x = normal(2, 6)
        adapter = make(self.repeated, params, x)
        jaxpr = jax.make_jaxpr(adapt(self.repeated))(params, adapter, x)
        calls = [e for e in named(jaxpr, "jit") if e.params["name"] == "<lambda>"]
        assert len(calls) == 12
        assert len({id(call.params["jaxpr"]) for call in calls}) == 1

    def test_a_shared_body_still_counts_every_use(self):
        params = [{"w": normal(6, 6, seed=i), "b": normal(6, seed=i)} for i in range(3)]
        sites = find_sites(self.repeated, params, normal(2, 6))
        assert list(sites) == ["0", "1", "2"]
        assert [len(uses) for _, uses in sites.uses] == [1, 1, 1]
        assert [site.bias for site in sites.values()] == ["0.b", "1.b", "2.b"]

    def test_errors_inside_a_shared_body_name_the_weight(self):
        def apply_fn(params, x):
            layer = jax.jit(lambda w, x: x @ jnp.cumsum(w, 0) + x @ w)
            return layer(params["second"], layer(params["first"], x))

        params, x = {"first": normal(6, 6), "second": normal(6, 6, seed=1)}, normal(2, 6)
        adapter = make(apply_fn, params, x)
        with pytest.raises(ValueError, match="first meets cumsum"):
            adapt(apply_fn, on_fallback="error")(params, adapter, x)


class TestNames:
    @staticmethod
    def scopes(function, *args):
        """The full name of every matrix product in the program."""
        text = jax.jit(function).lower(*args).as_text(debug_info=True)
        return re.findall(r'loc\("([^"]*dot_general)"', text)

    @pytest.mark.parametrize("inside", ["plain", "scan", "jit", "remat"])
    def test_scopes_survive_and_do_not_double(self, inside):
        def dense(w, x):
            with jax.named_scope("attention"):
                return x @ w

        def apply_fn(params, x):
            w = params["w"]
            with jax.named_scope("model"):
                if inside == "scan":
                    return lax.scan(lambda x, _: (dense(w, x), None), x, length=2)[0]
                wrap = {"plain": lambda f: f, "jit": jax.jit, "remat": jax.checkpoint}[inside]
                return wrap(dense)(w, x)

        params, x = {"w": normal(6, 6)}, normal(2, 6)
        adapter = make(apply_fn, params, x)
        base = self.scopes(apply_fn, params, x)
        own = self.scopes(adapt(apply_fn), params, adapter, x)
        assert base
        assert own
        for name in own:
            for scope in ("attention", "model"):
                assert name.count(scope) == base[0].count(scope), (name, base)


class TestConstants:
    def test_the_base_is_an_argument(self):
        """Weights baked into a program would be copied into every executable."""
        params, x = mlp_params(), normal(2, 6)
        adapter = make(mlp, params, x)
        jaxpr = jax.make_jaxpr(adapt(mlp))(params, adapter, x)
        assert jaxpr.consts == []
        assert all(
            not inner.consts
            for eqn in equations(jaxpr)
            for inner in eqn.params.values()
            if hasattr(inner, "consts")
        )


@pytest.mark.parametrize("step", ["transpose", "reshape", "slice", "rev"])
def test_the_scale_of_every_groups_channels_survives_steps(step):
    """Steps that keep the axes keep the scale; others get the merged weight, which is exact."""

    def apply_fn(params, x):
        w = params["conv"]["kernel"]
        if step == "transpose":
            w = w.T.transpose(2, 1, 0)
        elif step == "reshape":
            w = w.reshape(3, 2, 1, 10).reshape(3, 2, 10)
        elif step == "slice":
            w = w[:, :, :6]
        else:
            w = w[::-1, ::-1]
        numbers = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=2
        )

    params, x = {"conv": {"kernel": normal(3, 2, 10)}}, normal(2, 7, 4, std=1)
    config = IA3Config(target_modules=["conv"], feedforward_modules=["conv"])
    adapter = init_adapter(KEY, config, find_sites(apply_fn, params, x))
    adapter = adapter.replace(params=redraw(adapter.params))
    got, want = adapt(apply_fn)(params, adapter, x), apply_fn(merge(params, adapter), x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert float(jnp.abs(got - apply_fn(params, x)).max()) > 0.1
