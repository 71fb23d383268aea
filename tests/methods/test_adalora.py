"""AdaLoRA: its formula, its start, orthogonality, and what a config may say."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import mlp, mlp_params, named, normal, redraw, scanned, scanned_params
from naive import drawn, finite_differences, house, rebuilt

from peftjax import (
    AdaLoraConfig,
    LoraConfig,
    adapt,
    find_sites,
    init_adapter,
    merge,
    orthogonality,
    pad_ranks,
    unmerge,
)

KEY = jax.random.key(0)
ALPHA, RANK = 5, 4
TARGETS = [
    "mlp.up",
    "mlp.down",
    "attn.wq",
    "wkv",
    "attn.wo",
    "taken",
    "columns",
    "blocks",
    "patch",
    "mixed",
    "grouped",
    "dilated_both_ways",
    "kernels",
    "layers.up",
    "layers.down",
]
# What is left of some modules: of a stack as many of each layer as are padded to the largest.
PATTERN = {
    "mlp.down.lora_E": [True, False, False, True],
    "layers.up.lora_E": [[True] * 4, [False] * 4, [False, True, False, True], [True] * 3 + [False]],
    "layers.down.lora_E": [[True, True, False, False]] * 4,
    "kernels.lora_E": [[False, True, False, False], [True] * 4],
}
LEFT = {
    **{"mlp.down": 2, "layers.up.0": 4, "layers.up.1": 0, "layers.up.2": 2, "layers.up.3": 3},
    **{f"layers.down.{i}": 2 for i in range(4)},
    **{"kernels.0": 1, "kernels.1": 4},
}


def adalora(ranks, alpha=ALPHA):
    """W + s ((A E) B), multiplied out; what is padding counts for nothing."""

    def formula(name, weight, own):
        rank = ranks.get(name, RANK)
        a = own["lora_A"].reshape(-1, own["lora_E"].size)[:, :rank]
        b = own["lora_B"].reshape(own["lora_E"].size, -1)[:rank]
        change = alpha / (RANK + 1e-5) * (a @ np.diag(own["lora_E"][:rank]) @ b)
        return weight + change.reshape(weight.shape)

    return formula


def check_values(model, formula, **fields):
    apply_fn, params, sites = model
    fields = {"init_r": RANK, "lora_alpha": ALPHA, **fields}
    adapter = drawn(AdaLoraConfig(**fields), sites)
    want = rebuilt(params, adapter, formula)
    merged = jax.jit(merge)(params, adapter)
    chex.assert_trees_all_close(merged, want, rtol=1e-10, atol=1e-10)
    got, expected = adapt(apply_fn)(params, adapter), jax.jit(apply_fn)(want)
    chex.assert_trees_all_close(got, expected, rtol=1e-10, atol=1e-10)
    back = jax.jit(unmerge)(merged, adapter)
    chex.assert_trees_all_close(back, params, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_values_are_the_formula(pruned):
    """The scale is that of the first rank, whatever is left of it."""
    targets = [name.removesuffix(".lora_E") for name in PATTERN] if pruned else TARGETS
    fields = {"target_modules": targets, "rank_pattern": PATTERN if pruned else {}}
    check_values(house(), adalora(LEFT if pruned else {}), **fields)


@pytest.mark.usefixtures("x64")
def test_values_of_some_layers():
    """The pattern has a list for each selected layer, and for no other."""
    params, x = scanned_params(dtype=jnp.float64), normal(4, 6, std=1, dtype=jnp.float64)

    def apply_fn(params):
        return scanned(params, x)

    check_values(
        (apply_fn, params, find_sites(apply_fn, params)),
        adalora({"layers.up.1": 1, "layers.up.2": 3}),
        rank_pattern={"layers.up.lora_E": [[False, True, False, False], [True] * 3 + [False]]},
        target_modules=["up", "down"],
        layers_to_transform=[1, 2],
    )


def new(config, sites, params):
    return init_adapter(KEY, config, sites, params)


def on_mlp(dtype=jnp.float32, start=drawn, **fields):
    """Params, an input and an adapter of two dense layers."""
    params, x = mlp_params(dtype), normal(4, 6, seed=9, std=1, dtype=dtype)
    config = AdaLoraConfig(**{"init_r": RANK, "target_modules": ["up", "down"], **fields})
    return params, x, start(config, find_sites(mlp, params, x), params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("alpha", "numerator"), [(8, 8), (2.5, 2.5), (0, RANK), (-1, RANK)])
def test_scale(alpha, numerator):
    params, x, adapter = on_mlp(jnp.float64, lora_alpha=alpha)
    want = rebuilt(params, adapter, adalora({}, numerator))
    chex.assert_trees_all_close(merge(params, adapter), want, rtol=1e-12)
    np.testing.assert_allclose(adapt(mlp)(params, adapter, x), mlp(want, x), rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_start_is_the_identity_and_moves():
    """Only the singular values have a gradient, as they are zero and the vectors are not."""
    params, x, adapter = on_mlp(jnp.float64, new)

    def loss(trainable):
        out = adapt(mlp)(params, adapter.replace(params=trainable), x)
        return jnp.sum(jnp.sin(out)), out

    slopes, out = jax.jit(jax.grad(loss, has_aux=True))(adapter.params)
    np.testing.assert_allclose(out, mlp(params, x), rtol=1e-13)
    chex.assert_trees_all_equal(merge(params, adapter), params)
    for own in slopes.values():
        assert not own["lora_A"].any()
        assert not own["lora_B"].any()
        assert np.abs(own["lora_E"]).min() > 1e-6


@pytest.mark.parametrize("identity", [True, False])
def test_spread_of_the_start(identity):
    params = {"w": normal(80, 90)}
    sites = find_sites(lambda params, x: x @ params["w"], params, jnp.ones((1, 80)))
    config = AdaLoraConfig(init_r=300, init_lora_weights=identity, target_modules=["w"])
    adapter = init_adapter(KEY, config, sites)
    own = adapter.params["w"]
    chex.assert_shape([own["lora_A"], own["lora_E"], own["lora_B"]], [(80, 300), (300,), (300, 90)])
    for name in ("lora_A", "lora_B"):
        std = 0.02 if identity else 1
        assert float(own[name].std()) == pytest.approx(std, rel=0.03)
        assert abs(float(own[name].mean())) < 0.03 * std
    change = jnp.abs(merge(params, adapter)["w"] - params["w"]).max()
    if identity:
        assert not own["lora_E"].any()
        assert float(change) == 0
    else:
        assert float(own["lora_E"].std()) == pytest.approx(1, rel=0.15)
        assert float(change) > 0.1


@pytest.mark.usefixtures("x64")
def test_gradients_are_finite_differences():
    params, x, adapter = on_mlp(jnp.float64)

    def loss(trainable):
        return jnp.sum(jnp.sin(adapt(mlp)(params, adapter.replace(params=trainable), x)))

    both = jax.jit(lambda params: (jax.grad(loss)(params), finite_differences(loss, params)))
    got, want = both(redraw(adapter.params))
    chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-6)
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(want))


def regularised(dtype=jnp.float64, pattern=None, **fields):
    """An adapter of a dense layer, a kernel, a table, and a stack."""
    params = {
        "layers": scanned_params(dtype=dtype)["layers"],
        "conv": normal(3, 6, 5, dtype=dtype),
        "table": normal(7, 6, dtype=dtype),
    }

    def apply_fn(params, ids):
        h = scanned(params, params["table"][ids])
        dims = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            h[None], params["conv"], (1,), "SAME", dimension_numbers=dims
        )

    sites = find_sites(apply_fn, params, jnp.arange(3, dtype=jnp.int32))
    config = AdaLoraConfig(
        init_r=RANK, target_modules=list(sites), rank_pattern=pattern or {}, **fields
    )
    return drawn(config, sites, std=0.3)


def weights_of(adapter):
    """A and B of every weight as matrices, the layers of a stack one by one, without padding."""
    for name, own in adapter.params.items():
        a, b = np.asarray(own["lora_A"], np.float64), np.asarray(own["lora_B"], np.float64)
        stacked = name.startswith("layers")
        pairs = zip(a, b, strict=True) if stacked else [(a, b)]
        masks = adapter.buffers[name].get("rank_mask")
        masks = np.ones((len(a) if stacked else 1, b.shape[-2])) if masks is None else masks
        for (a, b), mask in zip(pairs, np.asarray(masks), strict=True):
            yield a.reshape(-1, a.shape[-1])[:, mask > 0], b.reshape(len(b), -1)[mask > 0]


def penalty_of(adapter):
    def off(gram):
        return np.sqrt(np.sum((gram - np.eye(len(gram))) ** 2))

    norms = [norm for a, b in weights_of(adapter) for norm in (off(a.T @ a), off(b @ b.T))]
    assert len(norms) == 2 * (4 + 4 + 1 + 1)
    return adapter.config.orth_reg_weight * np.mean(norms)


UNEQUAL = {
    "layers.up.lora_E": PATTERN["layers.up.lora_E"],
    "conv.lora_E": [True, False, True, False],
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("pattern", [None, UNEQUAL], ids=["whole", "pruned"])
@pytest.mark.parametrize("weight", [0.5, 3])
def test_orthogonality_is_the_formula(weight, pattern):
    """Every layer of a stack counts, and of pruned layers what is no padding."""
    adapter = regularised(orth_reg_weight=weight, pattern=pattern)
    got = orthogonality(adapter)
    chex.assert_shape(got, ())
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, penalty_of(adapter), rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("pattern", [None, UNEQUAL], ids=["whole", "pruned"])
def test_orthogonality_of_a_padded_adapter(pattern):
    """What pad_ranks adds costs nothing and has no gradient."""
    adapter = regularised(pattern=pattern)
    padded = pad_ranks(adapter, RANK + 2)

    @jax.jit
    @jax.value_and_grad
    def penalty(trainable):
        return orthogonality(padded.replace(params=trainable))

    cost, slope = penalty(padded.params)
    np.testing.assert_allclose(cost, orthogonality(adapter), rtol=1e-12)
    for name, own in slope.items():
        np.testing.assert_array_equal(own["lora_B"] == 0, padded.params[name]["lora_B"] == 0)


@pytest.mark.usefixtures("x64")
def test_gradients_of_orthogonality():
    adapter = regularised(pattern=UNEQUAL)

    def penalty(trainable):
        return orthogonality(adapter.replace(params=trainable))

    both = jax.jit(lambda params: (jax.grad(penalty)(params), finite_differences(penalty, params)))
    slope, want = both(adapter.params)
    chex.assert_trees_all_close(slope, want, rtol=1e-6, atol=1e-8)
    assert not any(own["lora_E"].any() for own in slope.values())
    padding = adapter.buffers["layers.up"]["rank_mask"] == 0
    assert int(padding.sum()) == 4 + 2 + 1
    np.testing.assert_array_equal((slope["layers.up"]["lora_B"] == 0).all(axis=-1), padding)
    np.testing.assert_array_equal((slope["layers.up"]["lora_A"] == 0).all(axis=1), padding)


def test_orthonormal_vectors_cost_nothing():
    """The norm is not squared, and would have no gradient there."""
    _, _, adapter = on_mlp(target_modules=["up"])
    eye = {"lora_A": jnp.eye(6, RANK), "lora_E": jnp.ones(RANK), "lora_B": jnp.eye(RANK, 9)}

    @jax.jit
    @jax.value_and_grad
    def penalty(own):
        return orthogonality(adapter.replace(params={"up": own}))

    cost, slope = penalty(eye)
    assert float(cost) == 0
    chex.assert_trees_all_equal(slope, jax.tree.map(jnp.zeros_like, eye))
    cost, slope = penalty(eye | {"lora_B": 2 * jnp.eye(RANK, 9)})
    assert float(cost) == pytest.approx(0.5 * (3 * RANK**0.5) / 2)
    chex.assert_tree_all_finite(slope)
    assert not slope["lora_A"].any()
    assert slope["lora_B"].any()


@pytest.mark.parametrize("pattern", [None, UNEQUAL], ids=["whole", "pruned"])
def test_orthogonality_in_half_precision(pattern):
    """The sums are float32, and so is the result."""
    adapter = regularised(jnp.float32, pattern)

    def half(arrays):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)

    adapter = adapter.replace(params=half(adapter.params), buffers=half(adapter.buffers))
    penalty = jax.jit(
        jax.value_and_grad(lambda params: orthogonality(adapter.replace(params=params)))
    )
    cost, slope = penalty(adapter.params)
    assert cost.dtype == jnp.float32
    np.testing.assert_allclose(cost, penalty_of(adapter), rtol=1e-5)
    chex.assert_trees_all_equal_dtypes(slope, adapter.params)
    chex.assert_tree_all_finite(slope)


def test_a_stack_is_one_product():
    """However many layers there are."""

    def products(layers):
        params, x = scanned_params(layers), jnp.ones((2, 6))
        config = AdaLoraConfig(init_r=RANK, target_modules=["up", "down"])
        adapter = jax.eval_shape(lambda: init_adapter(KEY, config, find_sites(scanned, params, x)))
        return len(named(jax.make_jaxpr(orthogonality)(adapter), "dot_general"))

    assert products(2) == products(7) == 2 * 2


def test_orthogonality_is_of_adalora():
    params, x = mlp_params(), jnp.ones((1, 6))
    lora = drawn(LoraConfig(target_modules=["up"]), find_sites(mlp, params, x))
    with pytest.raises(ValueError, match="AdaLoraConfig, got one of LoraConfig"):
        orthogonality(lora)


def test_dropout():
    """It drops inputs of the adapter's way, and scales up what is left; a lookup has none."""
    params = {"w": normal(40, 5), "table": normal(40, 5, seed=1)}
    ids = jnp.arange(40, dtype=jnp.int32)

    def apply_fn(params, x):
        return x @ params["w"], params["table"][ids]

    config = AdaLoraConfig(init_r=RANK, lora_dropout=0.4, target_modules=["w", "table"])
    adapter = drawn(config, find_sites(apply_fn, params, jnp.eye(40)))
    run = jax.jit(adapt(apply_fn))
    whole, rows = run(params, adapter, jnp.eye(40))
    change = whole - params["w"]
    np.testing.assert_allclose(whole, merge(params, adapter)["w"], rtol=1e-5, atol=1e-5)
    masks = []
    for key in jax.random.split(KEY, 3):
        got, trained_rows = run(params, adapter.train(key), jnp.eye(40))
        masks.append(np.abs(got - params["w"]).max(axis=1) > 1e-6)
        want = np.where(masks[-1][:, None], change / 0.6, 0)
        np.testing.assert_allclose(got - params["w"], want, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(trained_rows, rows)
    assert len({mask.tobytes() for mask in masks}) == 3
    assert 0.45 < np.mean(masks) < 0.75


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({"bias": "lora_only"}, {"up.bias"}),
        ({"bias": "all"}, {"up.bias", "down.bias"}),
        ({"modules_to_save": ["down"]}, {"down.bias", "down.kernel"}),
    ],
    ids=["lora_only", "all", "modules_to_save"],
)
def test_whole_leaves_are_trained(fields, trained):
    params, x, adapter = on_mlp(target_modules=["up"], **fields)
    assert {leaf.path for leaf in adapter.saved} == trained
    merged = merge(params, adapter)
    for path in trained:
        module, leaf = path.split(".")
        np.testing.assert_array_equal(merged[module][leaf], adapter.params[module][leaf])

    def loss(trainable):
        current = adapter.replace(params=trainable)
        out = adapt(mlp)(params, current, x)
        return jnp.sum(jnp.sin(out)) + orthogonality(current), out

    slope, out = jax.jit(jax.grad(loss, has_aux=True))(adapter.params)
    np.testing.assert_allclose(out, mlp(merged, x), atol=1e-5)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(slope))


def test_defaults_are_pefts():
    data = AdaLoraConfig().to_dict()
    assert data == {
        "peft_type": "ADALORA",
        "target_r": 8,
        "init_r": 12,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
        "total_step": None,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "rank_pattern": {},
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "base_model_name_or_path": None,
        "revision": None,
        "task_type": None,
    }
    assert AdaLoraConfig.from_dict(data) == AdaLoraConfig()


def test_round_trip():
    config = AdaLoraConfig(
        init_r=RANK,
        target_r=2,
        tinit=10,
        tfinal=20,
        total_step=100,
        rank_pattern=PATTERN,
        target_modules=["up", "down"],
    )
    data = json.loads(json.dumps(config.to_dict()))
    assert data["rank_pattern"] == PATTERN
    again = AdaLoraConfig.from_dict(data)
    assert again == config
    assert hash(again) == hash(config)
    assert AdaLoraConfig.from_dict({**data, "rank_pattern": None}).rank_pattern == {}


def test_a_file_of_pefts():
    """Fields that PEFT writes and ignores, at their defaults."""
    data = {"peft_type": "ADALORA", "r": 8, "use_dora": False, "alpha_pattern": {}}
    data |= {"layer_replication": None, "inference_mode": True, "total_step": 50}
    assert AdaLoraConfig.from_dict(data) == AdaLoraConfig(total_step=50)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_r": -1}, "`target_r` must be 0 or more"),
        ({"init_r": -1}, "`init_r` must be 0 or more"),
        ({"tinit": -1}, "`tinit` must be 0 or more"),
        ({"tfinal": -2}, "`tfinal` must be 0 or more"),
        ({"deltaT": 0}, "`deltaT` must be 1 or more"),
        ({"beta1": 0}, r"`beta1` must be in \(0, 1\)"),
        ({"beta1": 1.0}, r"`beta1` must be in \(0, 1\)"),
        ({"beta2": 0.0}, r"`beta2` must be in \(0, 1\)"),
        ({"beta2": 1}, r"`beta2` must be in \(0, 1\)"),
        ({"orth_reg_weight": -0.1}, "`orth_reg_weight` must be 0 or more"),
        ({"total_step": 0}, "`total_step` must be above 0"),
        ({"total_step": -5}, "`total_step` must be above 0"),
        ({"total_step": 10, "tinit": 10}, r"of 10 steps `tinit` \(10\) and `tfinal` \(0\)"),
        ({"total_step": 10, "tinit": 4, "tfinal": 6}, r"`tinit` \(4\) and `tfinal` \(6\)"),
        ({"total_step": 10, "tfinal": 12}, r"`tinit` \(0\) and `tfinal` \(12\)"),
        ({"init_lora_weights": "gaussian"}, "`init_lora_weights` must be True or False"),
        ({"lora_dropout": 1.5}, "lora_dropout"),
        ({"bias": "some"}, "`bias` must be one of none, all, lora_only"),
        ({"r": 4}, "`r` is not supported"),
        ({"use_rslora": True}, "`use_rslora` is not supported"),
        ({"lora_bias": True}, "`lora_bias` is not supported"),
        ({"use_dora": True}, "`use_dora` is not supported"),
        ({"alpha_pattern": {"q": 3}}, "`alpha_pattern` is not supported"),
        ({"loftq_config": {"bits": 4}}, "`loftq_config` is not supported"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        AdaLoraConfig(**fields)


def test_least_schedule():
    assert AdaLoraConfig(total_step=10, tinit=4, tfinal=5).total_step == 10
    assert AdaLoraConfig(init_r=0, target_r=0, orth_reg_weight=0).init_r == 0


@pytest.mark.parametrize("key", ["up.lora_E", "mlp.up", "mlp.down.lora_E"])
def test_patterns_are_the_names_of_tensors(key):
    """A key that is the end of one, or no tensor, does nothing, and is not ignored in silence."""
    params = {"mlp": mlp_params()}
    sites = find_sites(lambda params, x: mlp(params["mlp"], x), params, normal(4, 6))

    def ranks(key):
        config = AdaLoraConfig(
            init_r=4, target_r=2, target_modules=["up"], rank_pattern={key: [True, False] * 2}
        )
        return init_adapter(KEY, config, sites).params["mlp.up"]["lora_E"].shape

    with pytest.warns(UserWarning, match=rf"rank_pattern: '{key}' matches no adapted module"):
        assert ranks(key) == (4,)
    assert ranks("mlp.up.lora_E") == (2,)
