"""Making adapters: selection, stacks of unequal ranks, whole leaves, keys and bad input."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import mlp, mlp_params, normal, redraw, scanned, scanned_params

from peftjax import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    NoMatchingModuleError,
    adapt,
    find_sites,
    init_adapter,
    merge,
)

KEY = jax.random.key(0)
X = normal(4, 6, seed=9, std=1)


@pytest.fixture(scope="module")
def dense():
    params = mlp_params()
    return params, find_sites(mlp, params, X)


@pytest.fixture(scope="module")
def stack():
    params = scanned_params()
    return params, find_sites(scanned, params, X)


class TestLayout:
    def test_arrays_keep_the_axes_of_the_weight(self, dense, stack):
        config = LoraConfig(r=3, target_modules=["up"])
        shapes = jax.tree.map(jnp.shape, init_adapter(KEY, config, dense[1]).params)
        assert shapes == {"up": {"lora_A": (6, 3), "lora_B": (3, 9)}}
        shapes = jax.tree.map(jnp.shape, init_adapter(KEY, config, stack[1]).params)
        assert shapes == {"layers.up": {"lora_A": (4, 6, 3), "lora_B": (4, 3, 9)}}

    @pytest.mark.parametrize(
        ("base", "dtype", "want"),
        [
            (jnp.float32, None, jnp.float32),
            (jnp.bfloat16, None, jnp.float32),
            (jnp.float16, None, jnp.float32),
            (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        ],
    )
    def test_dtype(self, base, dtype, want):
        params = mlp_params(base)
        sites = find_sites(mlp, params, X.astype(base))
        adapter = init_adapter(KEY, LoraConfig(target_modules=["up"]), sites, dtype=dtype)
        assert {x.dtype for x in jax.tree.leaves(adapter.params)} == {jnp.dtype(want)}
        assert {x.dtype for x in jax.tree.leaves(adapter.buffers)} == {jnp.dtype(jnp.float32)}
        assert adapt(mlp, on_unused="ignore")(params, adapter, X.astype(base)).dtype == base

    def test_abstract_params_make_abstract_adapters(self, dense):
        _params, sites = dense
        config = LoraConfig(r=3, target_modules=["up"])
        shapes = jax.eval_shape(lambda: init_adapter(KEY, config, sites))
        chex.assert_trees_all_equal_shapes_and_dtypes(shapes, init_adapter(KEY, config, sites))


class TestKeys:
    def test_another_target_changes_no_number(self, dense):
        _, sites = dense
        one = init_adapter(KEY, LoraConfig(target_modules=["up"]), sites)
        two = init_adapter(KEY, LoraConfig(target_modules=["up", "down"]), sites)
        chex.assert_trees_all_equal(one.params["up"], two.params["up"])
        assert not np.allclose(two.params["up"]["lora_A"][:5], two.params["down"]["lora_A"][:5])

    def test_another_selection_of_layers_changes_no_number(self, stack):
        _, sites = stack
        whole = init_adapter(KEY, LoraConfig(target_modules=["up"]), sites)
        some = LoraConfig(target_modules=["up"], layers_to_transform=[1, 3])
        part = init_adapter(KEY, some, sites)
        for name in ("lora_A", "lora_B"):
            np.testing.assert_array_equal(
                part.params["layers.up"][name], whole.params["layers.up"][name][jnp.array([1, 3])]
            )

    def test_the_layers_of_a_stack_differ(self, stack):
        adapter = init_adapter(KEY, LoraConfig(target_modules=["up"]), stack[1])
        a = adapter.params["layers.up"]["lora_A"]
        assert len(np.unique(np.round(a[:, 0, 0], 6))) == 4


class TestStacks:
    def test_only_selected_layers_are_held_and_changed(self, stack):
        params, sites = stack
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["up"], layers_to_transform=[0, 2])
        adapter = init_adapter(KEY, config, sites)
        adapter = adapter.replace(params=redraw(adapter.params))
        assert adapter.params["layers.up"]["lora_A"].shape == (2, 6, 3)
        merged = merge(params, adapter)
        change = merged["layers"]["up"]["kernel"] - params["layers"]["up"]["kernel"]
        changed = jnp.abs(change).max(axis=(1, 2)) > 1e-3
        np.testing.assert_array_equal(changed, [True, False, True, False])
        got, want = adapt(scanned)(params, adapter, X), scanned(merged, X)
        assert jnp.abs(got - want).max() < 1e-5 * jnp.abs(want).max()

    def test_unequal_ranks_are_padded_and_masked(self, stack):
        params, sites = stack
        config = LoraConfig(
            r=2,
            lora_alpha=5,
            target_modules=["up", "down"],
            rank_pattern={"layers.1.up": 4, "layers.2.up": 3},
            alpha_pattern={"layers.3.up": 7},
        )
        adapter = init_adapter(KEY, config, sites)
        own, mask = adapter.params["layers.up"], adapter.buffers["layers.up"]["rank_mask"]
        assert own["lora_A"].shape == (4, 6, 4)
        np.testing.assert_array_equal(mask.sum(axis=1), [2, 4, 3, 2])
        np.testing.assert_allclose(
            adapter.buffers["layers.up"]["scaling"], [5 / 2, 5 / 4, 5 / 3, 7 / 2]
        )
        assert "rank_mask" not in adapter.buffers["layers.down"]
        assert (own["lora_A"] * (1 - mask[:, None]) == 0).all()

        adapter = adapter.replace(params=redraw(adapter.params))

        def loss(trainable):
            return jnp.sin(adapt(scanned)(params, adapter.replace(params=trainable), X)).sum()

        gradient = jax.grad(loss)(adapter.params)["layers.up"]
        assert (gradient["lora_A"] * (1 - mask[:, None]) == 0).all()
        assert (gradient["lora_B"] * (1 - mask[:, :, None]) == 0).all()
        assert all(jnp.isfinite(g).all() for g in gradient.values())
        # What stands in the padding must not matter.
        noise = {"lora_A": own["lora_A"] + 9 * (1 - mask[:, None]), "lora_B": own["lora_B"]}
        again = adapter.replace(params={**adapter.params, "layers.up": noise})
        clean = adapter.replace(params={**adapter.params, "layers.up": own})
        chex.assert_trees_all_close(merge(params, again), merge(params, clean))

    def test_each_rank_starts_as_its_own(self, stack):
        """Padding comes after the init: a layer of rank 2 starts as a layer of rank 2 does."""
        _, sites = stack
        fields = {"r": 2, "target_modules": ["up"], "init_lora_weights": "gaussian"}
        plain = init_adapter(KEY, LoraConfig(**fields), sites)
        mixed = init_adapter(KEY, LoraConfig(**fields, rank_pattern={"layers.1.up": 4}), sites)
        for layer in (0, 2, 3):
            np.testing.assert_array_equal(
                mixed.params["layers.up"]["lora_A"][layer, :, :2],
                plain.params["layers.up"]["lora_A"][layer],
            )


class TestWholeLeaves:
    def test_modules_to_save_are_copies_that_train(self, dense):
        params, sites = dense
        config = LoraConfig(target_modules=["up"], modules_to_save=["down"])
        adapter = init_adapter(KEY, config, sites, params)
        chex.assert_trees_all_equal(adapter.params["down"], params["down"])
        moved = jax.tree.map(lambda x: x + 1, adapter.params)
        got = adapt(mlp)(params, adapter.replace(params=moved), X)
        want = mlp(merge(params, adapter.replace(params=moved)), X)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        gradient = jax.grad(lambda p: adapt(mlp)(params, adapter.replace(params=p), X).sum())(
            adapter.params
        )
        assert set(gradient["down"]) == {"kernel", "bias"}
        assert float(jnp.abs(gradient["down"]["bias"]).max()) > 0

    @pytest.mark.parametrize(
        ("bias", "paths"),
        [("none", set()), ("lora_only", {"up.bias"}), ("all", {"up.bias", "down.bias"})],
    )
    def test_trained_biases(self, dense, bias, paths):
        params, sites = dense
        adapter = init_adapter(KEY, LoraConfig(target_modules=["up"], bias=bias), sites, params)
        assert {leaf.path for leaf in adapter.saved} == paths
        moved = jax.tree.map(lambda x: x + 1, adapter.params)
        merged = merge(params, adapter.replace(params=moved))
        for path in ("up", "down"):
            shift = merged[path]["bias"] - params[path]["bias"]
            np.testing.assert_allclose(shift, float(f"{path}.bias" in paths), atol=1e-6)

    def test_biases_of_a_stack_train_where_its_layers_are_adapted(self, stack):
        params, sites = stack
        config = LoraConfig(target_modules=["up"], layers_to_transform=[1, 2], bias="lora_only")
        adapter = init_adapter(KEY, config, sites, params)

        def loss(trainable):
            return jnp.sin(adapt(scanned)(params, adapter.replace(params=trainable), X)).sum()

        slope = jax.jit(jax.grad(loss))(adapter.params)["layers.up"]["bias"]
        trains = np.array([False, True, True, False])
        np.testing.assert_array_equal(jnp.abs(slope).max(axis=1) > 0, trains)
        # A decay of weights, say, moves them all.
        moved = adapter.replace(params=jax.tree.map(lambda x: x + 1, adapter.params))
        shift = merge(params, moved)["layers"]["up"]["bias"] - params["layers"]["up"]["bias"]
        np.testing.assert_allclose(shift, np.where(trains, 1.0, 0)[:, None] * np.ones(9), atol=1e-6)

    @pytest.mark.parametrize("more", [{"bias": "all"}, {"modules_to_save": ["layers.up_bias"]}])
    def test_biases_meant_by_name_train_in_all_layers(self, more):
        layers = scanned_params()["layers"]
        params = {"layers": {**layers, "up_bias": {"b": layers["up"].pop("bias")}}}

        def apply_fn(params, x):
            own = params["layers"]
            up = {**own["up"], "bias": own["up_bias"]["b"]}
            return scanned({"layers": {"up": up, "down": own["down"]}}, x)

        config = LoraConfig(
            target_modules=["up"], layers_to_transform=[1], **{"bias": "lora_only", **more}
        )
        adapter = init_adapter(KEY, config, find_sites(apply_fn, params, X), params)
        moved = adapter.replace(params=jax.tree.map(lambda x: x + 1, adapter.params))
        shift = merge(params, moved)["layers"]["up_bias"]["b"] - params["layers"]["up_bias"]["b"]
        np.testing.assert_allclose(shift, 1, atol=1e-6)

    def test_a_bias_of_two_weights_trains_where_one_of_them_is_adapted(self):
        kernels = {"a": {"w": normal(3, 6, 6)}, "b": {"w": normal(3, 6, 6, seed=1)}}
        params = kernels | {"bias": normal(3, 6, seed=2)}

        def apply_fn(params, x):
            def layer(x, own):
                shift = own["bias"][None]
                return jnp.tanh(x @ own["a"]["w"] + shift) @ own["b"]["w"] + shift, None

            return jax.lax.scan(layer, x, params)[0]

        config = LoraConfig(target_modules=["a.0", "b.2"], bias="lora_only")
        adapter = init_adapter(KEY, config, find_sites(apply_fn, params, X), params)
        moved = adapter.replace(params=jax.tree.map(lambda x: x + 1, adapter.params))
        shift = merge(params, moved)["bias"] - params["bias"]
        np.testing.assert_allclose(shift.max(axis=1), [1, 0, 1], atol=1e-6)

    @pytest.mark.parametrize(
        ("base", "dtype", "want"),
        [
            (jnp.bfloat16, None, jnp.float32),
            (jnp.bfloat16, jnp.float32, jnp.float32),
            (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
            (jnp.float32, None, jnp.float32),
            (jnp.float32, jnp.float16, jnp.float16),
        ],
    )
    def test_copies_have_the_dtype_of_an_adapter(self, base, dtype, want):
        """A step of an optimizer that bfloat16 would lose is kept; the base's dtype is used."""
        params, x = mlp_params(base), X.astype(base)
        config = LoraConfig(target_modules=["up"], modules_to_save=["down"], bias="lora_only")
        adapter = init_adapter(KEY, config, find_sites(mlp, params, x), params, dtype=dtype)
        assert {x.dtype for x in jax.tree.leaves(adapter.params)} == {jnp.dtype(want)}
        kernel = params["down"]["kernel"]
        np.testing.assert_array_equal(adapter.params["down"]["kernel"], kernel.astype(want))
        assert adapt(mlp)(params, adapter, x).dtype == base
        assert merge(params, adapter)["down"]["kernel"].dtype == base

    def test_an_own_bias_and_a_trained_bias_of_one_module(self, dense):
        params, sites = dense
        config = LoraConfig(target_modules=["up"], bias="lora_only", lora_bias=True)
        adapter = init_adapter(KEY, config, sites, params)
        assert set(adapter.params["up"]) == {"lora_A", "lora_B", "lora_B_bias", "bias"}
        adapter = adapter.replace(params=redraw(adapter.params))
        got, want = adapt(mlp)(params, adapter, X), mlp(merge(params, adapter), X)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_adapters_are_told_apart_by_identity(dense):
    _, sites = dense
    adapter = init_adapter(KEY, LoraConfig(target_modules=["up"]), sites)
    assert adapter == adapter
    assert adapter != adapter.replace()
    assert len({adapter, adapter.replace()}) == 2


def test_training_without_a_key_is_inference(dense):
    _, sites = dense
    config = LoraConfig(target_modules=["up"], lora_dropout=0.5)
    adapter = init_adapter(KEY, config, sites).train(KEY)
    assert adapter.key is not None
    assert adapter.train(None).key is None


class TestBadInput:
    def test_what_is_not_real_cannot_train(self):
        weights = {"a": {"w": normal(6, 6).astype(jnp.complex64)}, "b": {"w": normal(6, 6)}}
        params = weights | {"head": {"w": normal(6, 6), "order": jnp.arange(6)}}

        def apply_fn(params, x):
            h = (x.astype(jnp.complex64) @ params["a"]["w"]).real @ params["b"]["w"]
            return (h @ params["head"]["w"])[:, params["head"]["order"]]

        sites = find_sites(apply_fn, params, X)
        for config in (LoraConfig(), HRAConfig(), IA3Config(feedforward_modules=[])):
            config = dataclasses.replace(config, target_modules=["a"])
            with pytest.raises(ValueError, match=r"^a\.w is complex64.*`exclude_modules`"):
                init_adapter(KEY, config, sites, params)
        config = LoraConfig(target_modules=["b"], modules_to_save=["head"])
        with pytest.raises(ValueError, match=r"^head\.order is int32.*`modules_to_save`"):
            init_adapter(KEY, config, sites, params)

    def test_arguments_in_another_order(self, dense):
        params, sites = dense
        config = LoraConfig(target_modules=["up"])
        with pytest.raises(TypeError, match=r"init_adapter\(key, config, sites, params\)"):
            init_adapter(config, KEY, sites)
        with pytest.raises(TypeError, match="sites of dict"):
            init_adapter(KEY, config, params)

    def test_an_unknown_target_names_the_nearest(self, dense):
        with pytest.raises(NoMatchingModuleError, match=r"upp.*up"):
            init_adapter(KEY, LoraConfig(target_modules=["upp"]), dense[1])

    def test_rank_zero(self):
        with pytest.raises(ValueError, match="`r` should be a positive integer value"):
            LoraConfig(r=0)

    def test_a_dtype_that_does_not_float(self, dense):
        with pytest.raises(ValueError, match="dtype must be floating, got int8"):
            init_adapter(KEY, LoraConfig(target_modules=["up"]), dense[1], dtype=jnp.int8)

    @pytest.mark.parametrize(
        "fields",
        [{"modules_to_save": ["down"]}, {"bias": "all"}, {"init_lora_weights": "pissa"}],
    )
    def test_params_are_asked_for(self, dense, fields):
        with pytest.raises(ValueError, match="pass params to init_adapter"):
            init_adapter(KEY, LoraConfig(target_modules=["up"], **fields), dense[1])

    def test_params_of_another_model(self, dense):
        other = {**mlp_params(), "up": {"kernel": normal(7, 9), "bias": normal(9)}}
        with pytest.raises(ValueError, match=r"up\.kernel: \(7, 9\) instead of \(6, 9\)"):
            init_adapter(KEY, LoraConfig(target_modules=["up"]), dense[1], other)

    def test_a_bias_for_a_module_that_has_none(self, stack):
        config = LoraConfig(target_modules=["down"], lora_bias=True)
        with pytest.raises(ValueError, match=r"layers\.down: there is no bias"):
            init_adapter(KEY, config, stack[1])

    def test_more_directions_than_the_weight_has(self, dense):
        params, sites = dense
        config = LoraConfig(r=7, target_modules=["up"], init_lora_weights="pissa")
        with pytest.raises(ValueError, match="at most 6 directions"):
            init_adapter(KEY, config, sites, params)

    def test_a_pattern_that_does_nothing_warns(self, dense):
        config = LoraConfig(target_modules=["up"], rank_pattern={"dwon": 3})
        with pytest.warns(UserWarning, match="rank_pattern: 'dwon'"):
            init_adapter(KEY, config, dense[1])


def test_repr_is_short(dense):
    adapter = init_adapter(KEY, LoraConfig(r=3, target_modules=["up"]), dense[1])
    assert repr(adapter) == "Adapter(Lora, 1 modules, 45 parameters, inference)"
    assert repr(adapter.train(KEY)).endswith("training)")


def test_a_function_as_target_becomes_names(dense):
    adapter = init_adapter(KEY, LoraConfig(target_modules=lambda s: s.in_size == 9), dense[1])
    assert adapter.config.target_modules == ("down",)
    adapter.config.to_dict()


def test_a_function_that_excludes_becomes_names(stack):
    """So that the config can be saved, and means the same modules when it is used again."""
    _, sites = stack
    config = LoraConfig(target_modules=["up", "down"], exclude_modules=lambda s: s.in_size == 9)
    with pytest.raises(ValueError, match=r"`exclude_modules` is a function, .* init_adapter"):
        config.to_dict()
    adapter = init_adapter(KEY, config, sites)
    assert list(adapter.sites) == ["layers.up"]
    read = type(config).from_dict(adapter.config.to_dict())
    assert list(init_adapter(KEY, read, sites).sites) == ["layers.up"]
    nothing = dataclasses.replace(config, exclude_modules=lambda site: False)
    with pytest.warns(UserWarning, match="selects no site"):
        assert init_adapter(KEY, nothing, sites).config.exclude_modules is None


def test_an_excluding_function_means_no_other_module_of_that_end():
    params = {"up": {"kernel": normal(6, 6)}, "layers": scanned_params()["layers"]}

    def apply_fn(params, x):
        return scanned(params, x @ params["up"]["kernel"])

    sites = find_sites(apply_fn, params, X)
    config = LoraConfig(target_modules=["up"], exclude_modules=lambda site: site.name == "up")
    config = init_adapter(KEY, config, sites).config
    assert list(init_adapter(KEY, config, sites).sites) == ["layers.up"]


EVERY_METHOD = pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, lora_alpha=5),
        LoraConfig(r=3, lora_alpha=5, use_dora=True),
        LoHaConfig(r=1, alpha=5, rank_dropout=0.2),
        LoHaConfig(r=6, alpha=5),
        HRAConfig(r=4),
        HRAConfig(r=4, apply_GS=True),
        IA3Config(feedforward_modules=["down"]),
        AdaLoraConfig(init_r=3, lora_alpha=5),
    ],
    ids=["lora", "dora", "loha", "loha_fused", "hra", "hra_gs", "ia3", "adalora"],
)


@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16])
@EVERY_METHOD
def test_adapters_of_half_precision(config, weights):
    """Whatever the weights are: the algebra of small matrices runs in float32."""
    params, x = mlp_params(weights), normal(4, 6, std=1, dtype=weights)
    config = dataclasses.replace(config, target_modules=["up", "down"])
    adapter = init_adapter(KEY, config, find_sites(mlp, params, x), params, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter.params)} == {jnp.dtype(jnp.bfloat16)}
    adapter = adapter.replace(params=redraw(adapter.params))

    def outputs(adapter):
        return adapt(mlp)(params, adapter, x), mlp(merge(params, adapter), x)

    got, want = jax.jit(outputs)(adapter)
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=5e-2)
    assert jnp.isfinite(adapt(mlp)(params, adapter.train(KEY), x)).all()


@EVERY_METHOD
def test_half_precision_rounds_only_what_is_trained(config):
    """The scale and what is made of the arrays are those of the same numbers in float32."""
    params = mlp_params()
    config = dataclasses.replace(config, target_modules=["up", "down"])
    sites = find_sites(mlp, params, X)
    half = init_adapter(KEY, config, sites, params, dtype=jnp.bfloat16)
    half = half.replace(params=redraw(half.params))
    full = init_adapter(KEY, config, sites, params)
    chex.assert_trees_all_equal(half.buffers, full.buffers)
    full = full.replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), half.params))

    @jax.jit
    def outputs(adapter):
        return adapt(mlp)(params, adapter, X), merge(params, adapter)

    chex.assert_trees_all_close(outputs(half), outputs(full), rtol=1e-5, atol=1e-5)
