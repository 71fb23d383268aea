"""``adapt`` as a function: what goes in, what comes out, and what surrounds it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import (
    EverythingConfig,
    equations,
    mlp,
    mlp_params,
    named,
    normal,
    redraw,
    scanned,
    scanned_params,
)

from peftjax import (
    Adapter,
    FallbackError,
    IA3Config,
    LoraConfig,
    adapt,
    find_sites,
    init_adapter,
    merge,
    stack_adapters,
)

KEY = jax.random.key(0)


def make(function, params, *args, **fields):
    fields = {"r": 3, "lora_alpha": 5, "target_modules": lambda site: True, **fields}
    adapter = init_adapter(KEY, LoraConfig(**fields), find_sites(function, params, *args), params)
    return adapter.replace(params=redraw(adapter.params))


@pytest.fixture(scope="module")
def model():
    """A model, an input, an adapter and what the two give by merging."""
    params, x = mlp_params(), normal(4, 6, seed=9, std=1)
    adapter = make(mlp, params, x)
    return params, x, adapter, mlp(merge(params, adapter), x)


def close(got, want, tolerance=1e-5):
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


def as_they_are(x, w):
    """A product of two dtypes, neither promoted."""
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=w.dtype)


class TestArguments:
    def test_none_is_the_model_itself(self, model):
        params, x, *_ = model
        np.testing.assert_array_equal(adapt(mlp)(params, None, x), mlp(params, x))
        np.testing.assert_array_equal(adapt(mlp)(params, [], x), mlp(params, x))

    def test_a_sequence_is_applied_in_order(self, model):
        params, x, first, _ = model
        sites = find_sites(mlp, params, x)
        second = init_adapter(KEY, EverythingConfig(target_modules=["up"]), sites)
        one_way = adapt(mlp)(params, [first, second], x)
        other_way = adapt(mlp)(params, [second, first], x)
        close(one_way, mlp(merge(merge(params, first), second), x))
        close(other_way, mlp(merge(merge(params, second), first), x))
        assert jnp.abs(one_way - other_way).max() > 1e-2

    def test_what_is_no_array_is_static(self, model):
        params, x, adapter, _ = model

        def function(params, x, flag, *, times, mode):
            assert isinstance(flag, bool)
            assert isinstance(times, int)
            assert mode == "double"
            return mlp(params, x) * (times if flag else 1)

        adapted = adapt(function)
        once = adapted(params, adapter, x, False, times=2, mode="double")
        twice = adapted(params, adapter, x, True, times=2, mode="double")
        close(twice, 2 * once)

    def test_equal_values_of_different_types_stay_apart(self, model):
        params, x, adapter, _ = model
        seen = []

        def function(params, x, flag):
            seen.append(type(flag))
            return mlp(params, x)

        adapted = adapt(function)
        for flag in (1, True, 1.0):
            adapted(params, adapter, x, flag)
        assert seen == [int, bool, float]

    def test_an_argument_that_is_neither_array_nor_hashable(self, model):
        params, x, adapter, _ = model
        with pytest.raises(TypeError, match="bytearray, which is neither an array nor hashable"):
            adapt(lambda params, x, what: mlp(params, x))(params, adapter, x, bytearray(b"no"))

    def test_params_alone_are_no_adapter(self, model):
        params, x, adapter, _ = model
        with pytest.raises(TypeError, match=r"got dict; .*adapter\.replace"):
            adapt(mlp)(params, adapter.params, x)

    def test_a_bank_is_no_adapter(self, model):
        params, x, adapter, _ = model
        with pytest.raises(TypeError, match=r"bank\.rows.* or .*bank\.mix"):
            adapt(mlp)(params, stack_adapters({"a": adapter}), x)

    @pytest.mark.parametrize("option", ["on_fallback", "on_unused"])
    def test_unknown_options(self, option):
        with pytest.raises(ValueError, match=f"{option} must be"):
            adapt(mlp, **{option: "maybe"})

    def test_whole_numbers(self):
        """As x they meet a weight as they are; what meets the factors must have digits."""

        def function(params, x):
            return sum(as_they_are(x, params[name]["kernel"]) for name in "ab")

        params = {name: {"kernel": normal(4, 5, seed=i)} for i, name in enumerate("ab")}
        x = jnp.arange(12).reshape(3, 4)
        adapter = make(function, params, x)
        close(adapt(function)(params, adapter, x), function(merge(params, adapter), x))

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize(
        "config",
        [
            LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules="all-linear"),
            LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules="all-linear"),
            IA3Config(target_modules="all-linear", feedforward_modules=".*"),
        ],
        ids=["lora", "dora", "ia3_feedforward"],
    )
    def test_whole_numbers_keep_the_digits_of_scales(self, config):
        """On either side of a weight, and sorted by expert."""

        def function(params, x, z, sizes):
            kernel, experts = params["dense"]["kernel"], params["experts"]["kernel"]
            sorted_by_expert = lax.ragged_dot(x, experts, sizes, preferred_element_type=x64)
            return as_they_are(x, kernel), as_they_are(z, kernel.T), sorted_by_expert

        x64 = jnp.float64

        double = functools.partial(normal, dtype=x64)
        params = {"dense": {"kernel": double(4, 5)}, "experts": {"kernel": double(2, 4, 5)}}
        args = jnp.arange(12).reshape(3, 4), jnp.arange(10).reshape(2, 5), jnp.array([2, 1])
        sites = find_sites(function, params, *args)
        adapter = init_adapter(KEY, config, sites, params)
        adapter = adapter.replace(params=redraw(adapter.params))
        got, want = adapt(function)(params, adapter, *args), function(merge(params, adapter), *args)
        for one, other in zip(got, want, strict=True):
            close(one, other, 1e-10)

    def test_whole_numbers_drop_out(self):
        function = lambda params, x: as_they_are(x, params["dense"]["kernel"])  # noqa: E731
        params, x = {"dense": {"kernel": normal(4, 5)}}, jnp.arange(12).reshape(3, 4)
        config = LoraConfig(
            r=2, lora_dropout=0.5, init_lora_weights=False, target_modules=["dense"]
        )
        adapter = init_adapter(KEY, config, find_sites(function, params, x))
        run, training = adapt(function), adapter.train(jax.random.key(1))
        close(run(params, training, x), run(params, training, x.astype(jnp.float32)))

    def test_any_output_tree(self, model):
        params, x, adapter, want = model
        out = adapt(lambda params, x: {"y": (mlp(params, x), None), "n": x.sum()})(
            params, adapter, x
        )
        close(out["y"][0], want)
        assert out["y"][1] is None


class TestMismatch:
    def test_other_shapes_are_named(self, model):
        params, x, adapter, _ = model
        other = {**params, "up": {**params["up"], "kernel": normal(6, 8)}}
        with pytest.raises(ValueError, match=r"up\.kernel: \(6, 8\) instead of \(6, 9\)"):
            adapt(mlp)(other, adapter, x)
        with pytest.raises(ValueError, match=r"up\.kernel: \(6, 8\) instead of \(6, 9\)"):
            merge(other, adapter)

    def test_other_structure_is_named(self, model):
        params, x, adapter, _ = model
        other = {"encoder": params}
        with pytest.raises(ValueError, match=r"up: there is no up\.kernel"):
            adapt(lambda params, x: mlp(params["encoder"], x))(other, adapter, x)

    def test_trainable_arrays_of_another_adapter(self, model):
        params, x, adapter, _ = model
        other = adapter.replace(params={"up": adapter.params["up"], "side": {}})
        with pytest.raises(ValueError, match="does not fit the adapter: down, side"):
            adapt(mlp)(params, other, x)

    def test_unused_modules(self, model):
        params, x, adapter, _ = model

        def first_half(params, x):
            return x @ params["up"]["kernel"]

        with pytest.raises(ValueError, match=r"1 of the adapter's 2 modules \(down\)"):
            adapt(first_half)(params, adapter, x)
        partial = adapt(first_half, on_unused="ignore")(params, adapter, x)
        close(partial, x @ merge(params, adapter)["up"]["kernel"])

    def test_a_function_that_uses_none_always_raises(self, model):
        params, x, adapter, _ = model
        with pytest.raises(ValueError, match="uses none of the adapter's 2 modules"):
            adapt(lambda params, x: 2 * x, on_unused="ignore")(params, adapter, x)

    def test_buffers_have_no_gradient(self, model):
        params, x, adapter, _ = model
        with pytest.raises(TypeError, match=r"adapter\.params alone"):
            jax.grad(lambda adapter: adapt(mlp)(params, adapter, x).sum())(adapter)


class TestFallback:
    @staticmethod
    def cumulated(params, x):
        return x @ jnp.cumsum(params["w"], axis=0) + x @ params["w"]

    def test_it_materialises_and_is_exact(self):
        params, x = {"w": normal(6, 5)}, normal(3, 6, seed=1)
        adapter = make(self.cumulated, params, x)
        got = adapt(self.cumulated)(params, adapter, x)
        close(got, self.cumulated(merge(params, adapter), x))

    def test_it_is_recorded(self):
        sites = find_sites(self.cumulated, {"w": normal(6, 5)}, normal(3, 6))
        ((name, uses),) = sites.uses
        assert name == "w"
        assert sorted(bool(use.fallback) for use in uses) == [False, True]
        assert "cumsum materialises" in str(sites)

    def test_error_names_path_shape_and_primitive(self):
        params, x = {"w": normal(6, 5)}, normal(3, 6, seed=1)
        adapter = make(self.cumulated, params, x)
        with pytest.raises(FallbackError, match=r"w meets cumsum as float32\[6,5\]"):
            adapt(self.cumulated, on_fallback="error")(params, adapter, x)

    def test_dropout_cannot_be_merged(self):
        params, x = {"w": normal(6, 5)}, normal(3, 6, seed=1)
        adapter = make(self.cumulated, params, x, lora_dropout=0.5)
        adapt(self.cumulated)(params, adapter, x)
        with pytest.raises(FallbackError, match="set the dropout to 0"):
            adapt(self.cumulated)(params, adapter.train(KEY), x)


class TestTransformations:
    """Under JAX's own transformations an adapted function is a function like any other."""

    def test_jit_traces_once(self, model):
        params, x, adapter, want = model

        @jax.jit
        @chex.assert_max_traces(n=1)
        def step(adapter, x):
            return adapt(mlp)(params, adapter, x)

        chex.clear_trace_counter()
        for i in range(200):
            scale = jax.tree.map(lambda s: s * 1.0, adapter.buffers)
            out = step(adapter.replace(buffers=scale), x + 0 * i)
        close(out, want)

    def test_eager_calls_trace_once(self, model):
        params, x, adapter, want = model

        def counted(params, x):
            return mlp(params, x)

        chex.clear_trace_counter()
        adapted = adapt(chex.assert_max_traces(counted, n=1))
        for _ in range(200):
            out = adapted(params, adapter, x)
        close(out, want)

    def test_a_new_scale_does_not_recompile(self, model):
        params, x, adapter, _ = model
        chex.clear_trace_counter()
        adapted = adapt(chex.assert_max_traces(lambda params, x: mlp(params, x), n=1))
        halved = adapter.replace(buffers=jax.tree.map(lambda s: s / 2, adapter.buffers))
        base = mlp(params, x)
        assert jnp.abs(adapted(params, adapter, x) - adapted(params, halved, x)).max() > 1e-3
        zero = adapter.replace(buffers=jax.tree.map(jnp.zeros_like, adapter.buffers))
        close(adapted(params, zero, x), base)

    def test_vmap_over_inputs(self, model):
        params, x, adapter, want = model
        got = jax.vmap(lambda row: adapt(mlp)(params, adapter, row[None])[0])(x)
        close(got, want)

    def test_vmap_over_adapters(self, model):
        params, x, adapter, want = model
        pair = jax.tree.map(lambda a: jnp.stack([a, 0 * a]), adapter)
        got = jax.vmap(lambda adapter: adapt(mlp)(params, adapter, x))(pair)
        close(got[0], want)
        close(got[1], mlp(params, x))

    def test_pmap(self, model):
        params, x, adapter, want = model
        rows = x.reshape(2, 2, 6)
        got = jax.pmap(lambda rows: adapt(mlp)(params, adapter, rows))(rows)
        close(got.reshape(4, 5), want)

    def test_scan(self, model):
        params, x, adapter, want = model
        _, got = lax.scan(lambda c, row: (c, adapt(mlp)(params, adapter, row[None])[0]), 0, x)
        close(got, want)

    def test_remat(self, model):
        params, x, adapter, _ = model

        def loss(function):
            return lambda p: jnp.sin(function(params, adapter.replace(params=p), x)).sum()

        plain = jax.grad(loss(adapt(mlp)))(adapter.params)
        saved = jax.grad(loss(jax.checkpoint(adapt(mlp))))(adapter.params)
        chex.assert_trees_all_close(plain, saved, rtol=1e-5)

    def test_hessian_vector_product(self, model):
        params, x, adapter, _ = model

        def loss(p, function):
            return jnp.sin(function(adapter.replace(params=p))).sum()

        def product(function):
            gradient = jax.grad(lambda p: loss(p, function))
            return jax.jvp(gradient, (adapter.params,), (adapter.params,))[1]

        got = product(lambda a: adapt(mlp)(params, a, x))
        want = product(lambda a: mlp(merge(params, a), x))
        chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-4)

    def test_gradients_of_the_base_still_flow(self, model):
        params, x, adapter, _ = model
        got = jax.grad(lambda p: jnp.sin(adapt(mlp)(p, adapter, x)).sum())(params)
        want = jax.grad(lambda p: jnp.sin(mlp(merge(p, adapter), x)).sum())(params)
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)

    def test_one_adapted_function_in_several_contexts(self, model):
        params, x, adapter, want = model
        adapted = adapt(mlp)
        close(adapted(params, adapter, x), want)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (params, x))
            assert adapted(wide[0], adapter, wide[1]).dtype == jnp.float64
        with jax.default_matmul_precision("highest"):
            jaxpr = jax.make_jaxpr(adapted)(params, adapter, x)
        dots = named(jaxpr, "dot_general")
        assert len(dots) == 6
        assert all(eqn.params["precision"] is not None for eqn in dots)
        assert adapted(params, adapter, x).dtype == jnp.float32


class TestDropout:
    def test_off_without_a_key(self, model):
        params, x, _, want = model
        adapter = make(mlp, params, x, lora_dropout=0.5)
        close(adapt(mlp)(params, adapter, x), want)

    def test_it_drops_inputs_and_rescales_the_rest(self):
        """With one input per feature and an identity base, the change shows its own mask."""
        size = 2000
        params, x = {"w": jnp.zeros((1, 1))}, jnp.ones((size, 1))
        adapter = make(lambda p, x: x @ p["w"], params, x, lora_dropout=0.25, r=1)
        adapted = adapt(lambda p, x: x @ p["w"])
        whole = adapted(params, adapter, x)
        ratio = adapted(params, adapter.train(KEY), x) / whole
        np.testing.assert_allclose(np.unique(np.round(ratio, 5)), [0, 1.33333], atol=1e-4)
        assert abs(float((ratio == 0).mean()) - 0.25) < 0.04

    def test_the_same_key_gives_the_same_numbers(self, model):
        params, x, _, _ = model
        adapter = make(mlp, params, x, lora_dropout=0.5)
        first = adapt(mlp)(params, adapter.train(KEY), x)
        np.testing.assert_array_equal(first, adapt(mlp)(params, adapter.train(KEY), x))
        other = adapt(mlp)(params, adapter.train(jax.random.key(1)), x)
        assert jnp.abs(first - other).max() > 1e-3
        old_style = adapter.train(jax.random.PRNGKey(0))
        np.testing.assert_array_equal(first, adapt(mlp)(params, old_style, x))

    @pytest.mark.parametrize("way", ["unrolled", "jitted", "scan", "while", "stack"])
    def test_every_use_draws_its_own_mask(self, way):
        """The same weight on the same input three times: three different results."""

        def apply_fn(params, x):
            if way == "stack":
                return lax.scan(lambda c, own: (c, x @ own), 0, params["stack"])[1]
            w = params["w"]
            if way == "unrolled":
                return jnp.stack([x @ w, x @ w, x @ w])
            if way == "jitted":
                layer = jax.jit(lambda w, x: x @ w)
                return jnp.stack([layer(w, x), layer(w, x), layer(w, x)])
            if way == "scan":
                return lax.scan(lambda c, _: (c, x @ w), 0, None, length=3)[1]
            out = jnp.zeros((3, 8, 5))
            stop = jnp.int32(3)  # traced, so that the loop stays a while
            return lax.fori_loop(0, stop, lambda i, out: out.at[i].set(x @ w), out)

        same = normal(6, 5)
        params = {"stack": jnp.stack([same] * 3)} if way == "stack" else {"w": same}
        x = normal(8, 6, std=1)
        adapter = make(apply_fn, params, x, lora_dropout=0.5)
        if way == "stack":
            alike = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), adapter.params)
            adapter = adapter.replace(params=alike)
        dry = adapt(apply_fn)(params, adapter, x)
        np.testing.assert_allclose(dry[0], dry[1], rtol=1e-5)
        wet = adapt(apply_fn)(params, adapter.train(KEY), x)
        differences = [jnp.abs(wet[i] - wet[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))]
        assert min(differences) > 1e-2

    def test_forward_and_rematerialised_masks_are_the_same(self):
        """Otherwise gradients would be wrong: finite differences tell."""
        with jax.enable_x64(True):
            params, x = scanned_params(dtype=jnp.float64), normal(3, 6, std=1, dtype=jnp.float64)
            adapter = make(scanned, params, x, lora_dropout=0.5).train(KEY)
            adapted = adapt(scanned)

            @jax.jit
            def loss(p):
                return jnp.sin(adapted(params, adapter.replace(params=p), x)).sum()

            direction = redraw(adapter.params, seed=50)
            products = jax.tree.map(jnp.vdot, jax.grad(loss)(adapter.params), direction)

            def moved(by):
                return loss(jax.tree.map(lambda p, d: p + by * d, adapter.params, direction))

            slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
            np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-7)


def test_an_adapter_is_a_pytree(model):
    _, _, adapter, _ = model
    leaves, structure = jax.tree.flatten(adapter)
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, Adapter)
    assert jax.tree.structure(again) == structure
    assert hash(structure) == hash(jax.tree.structure(again))
    assert len(leaves) == 6


def test_equations_of_the_base_are_untouched(model):
    """What no adapted weight meets is replayed as it was, primitive by primitive."""
    params, x, adapter, _ = model
    base = [eqn.primitive.name for eqn in equations(jax.make_jaxpr(mlp)(params, x))]
    adapted = jax.make_jaxpr(adapt(mlp))(params, adapter, x)
    own = [eqn.primitive.name for eqn in equations(adapted)]
    for name in set(base) - {"dot_general", "add", "mul"}:
        assert own.count(name) == base.count(name)
