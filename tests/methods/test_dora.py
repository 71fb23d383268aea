"""DoRA: lengths and directions apart, the norm as a constant, and the weight as others left it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import mlp, mlp_params, normal, scanned, scanned_params
from naive import drawn, house, rebuilt

from peftjax import (
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    adapt,
    find_sites,
    init_adapter,
    merge,
    unmerge,
)

KEY = jax.random.key(0)
ALPHA, RANK = 5, 3
RANKS = {"layers.up.1": 5, "layers.up.3": 1, "kernels.1": 2}
MAGNITUDE = "lora_magnitude_vector"


def dora(**fields):
    return LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "use_dora": True, **fields})


def lengths(matrix):
    return np.array([np.sqrt(sum(column * column)) for column in matrix.T])


def rescaled(matrix, magnitude):
    """Every column at the length that the magnitude says."""
    return matrix * (magnitude.ravel() / lengths(matrix))


def low_rank(own, rank, alpha=ALPHA):
    a, b = own["lora_A"][..., :rank].reshape(-1, rank), own["lora_B"][:rank].reshape(rank, -1)
    return alpha / rank * a @ b


def dora_of(name, weight, own):
    """(m / |V|) V with V = W + s A B, column by column."""
    change = low_rank(own, RANKS.get(name, RANK))
    changed = weight.reshape(change.shape) + change
    return rescaled(changed, own[MAGNITUDE]).reshape(weight.shape)


def check_values(model, config):
    apply_fn, params, sites = model
    adapter = drawn(config, sites, params, std=0.5)
    want = rebuilt(params, adapter, dora_of)
    merged = jax.jit(merge)(params, adapter)
    chex.assert_trees_all_close(merged, want, rtol=1e-10, atol=1e-10)
    got, expected = adapt(apply_fn)(params, adapter), jax.jit(apply_fn)(want)
    chex.assert_trees_all_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_values_are_the_formula():
    targets = ["mlp.up", "mlp.down", "attn.wq", "wkv", "wo", "taken", "columns", "blocks"]
    targets += [
        "patch",
        "mixed",
        "grouped",
        "multiplied",
        "dilated_both_ways",
        "layers.up",
        "kernels",
    ]
    check_values(house(), dora(rank_pattern=RANKS, target_modules=targets))


@pytest.mark.usefixtures("x64")
def test_values_of_some_layers():
    params, x = scanned_params(dtype=jnp.float64), normal(4, 6, std=1, dtype=jnp.float64)

    def apply_fn(params):
        return scanned(params, x)

    config = dora(
        rank_pattern={"layers.up.1": 5},
        target_modules=["up", "down"],
        layers_to_transform=[1, 2],
    )
    check_values((apply_fn, params, find_sites(apply_fn, params)), config)


def network(dtype=jnp.float64):
    """Two dense layers, a convolution and a lookup, and their params."""
    params = {
        **mlp_params(dtype),
        "conv": {"kernel": normal(3, 5, 4, seed=4, dtype=dtype)},
        "table": {"embedding": normal(7, 6, seed=5, dtype=dtype)},
    }
    ids = jnp.asarray([[3, 0, 6, 6], [1, 2, 3, 4]], jnp.int32)

    def apply_fn(params, ids):
        h = mlp(params, params["table"]["embedding"][ids].reshape(8, 6)).reshape(2, 4, 5)
        dims = ("NWC", "WIO", "NWC")
        kernel = params["conv"]["kernel"]
        return lax.conv_general_dilated(h, kernel, (1,), "SAME", dimension_numbers=dims)

    return apply_fn, params, ids


MODULES = ["up", "conv", "table"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "init", [True, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", False]
)
def test_start(init):
    """Lengths start as they are, so that every start of LoRA that is the identity still is."""
    apply_fn, params, ids = network()
    config = dora(r=2, init_lora_weights=init, target_modules=MODULES)
    sites = find_sites(apply_fn, params, ids)
    adapter = jax.jit(lambda params: init_adapter(KEY, config, sites, params))(params)
    merged = jax.jit(merge)(params, adapter)
    for site in adapter.sites.values():
        module, leaf = site.path.split(".")
        magnitude = adapter.params[module][MAGNITUDE]
        assert magnitude.shape == site.out_shape
        # Without an identity these are the lengths of what LoRA alone would make.
        weight = np.asarray((params if init else merged)[module][leaf])
        matrix = weight.reshape(site.in_size, site.out_size)
        np.testing.assert_allclose(magnitude.ravel(), lengths(matrix), rtol=1e-10)
        own = {name: np.asarray(array) for name, array in adapter.params[module].items()}
        if init is False:
            want = np.asarray(params[module][leaf]).reshape(matrix.shape)
            np.testing.assert_allclose(matrix, want + low_rank(own, 2), atol=1e-12)
    got, base = adapt(apply_fn)(params, adapter, ids), apply_fn(params, ids)
    if init is False:
        assert float(jnp.abs(got - base).max()) > 1e-2
    else:
        np.testing.assert_allclose(got, base, atol=1e-10)
        chex.assert_trees_all_close(merged, params, atol=1e-10)


def make(config, std=0.5, dtype=jnp.float64):
    """The two dense layers with an adapter, all its numbers drawn."""
    params, x = mlp_params(dtype), normal(4, 6, seed=9, std=1, dtype=dtype)
    return params, x, drawn(config, find_sites(mlp, params, x), params, std=std)


def gradient(params, adapter, x):
    def loss(trainable):
        return jnp.sum(jnp.sin(adapt(mlp)(params, adapter.replace(params=trainable), x)))

    return jax.jit(jax.grad(loss))(adapter.params)


@pytest.mark.usefixtures("x64")
def test_norm_has_no_gradient():
    params, x, adapter = make(dora(target_modules=["up", "down"]))

    def by_hand(trainable, hold):
        changed = {}
        for module, own in trainable.items():
            kernel = params[module]["kernel"]
            v = kernel + ALPHA / RANK * own["lora_A"] @ own["lora_B"]
            norm = jnp.sqrt(jnp.sum(v**2, axis=0))
            kernel = (own[MAGNITUDE] / hold(norm))[None] * v
            changed[module] = {"kernel": kernel, "bias": params[module]["bias"]}
        return jnp.sum(jnp.sin(mlp(changed, x)))

    held, free = (
        jax.jit(jax.grad(lambda p, hold=hold: by_hand(p, hold)))(adapter.params)
        for hold in (lax.stop_gradient, lambda norm: norm)
    )
    got = gradient(params, adapter, x)
    chex.assert_trees_all_close(got, held, atol=1e-12)
    for module in ("up", "down"):
        for name in ("lora_A", "lora_B"):
            assert np.abs(got[module][name] - free[module][name]).max() > 1e-2
        np.testing.assert_allclose(got[module][MAGNITUDE], free[module][MAGNITUDE], atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_bias_is_not_scaled():
    params, x, adapter = make(dora(target_modules=["up"]))
    merged = jax.jit(merge)(params, adapter)
    chex.assert_trees_all_equal(merged["up"]["bias"], params["up"]["bias"])

    def up(params, x):
        return x @ params["up"]["kernel"] + params["up"]["bias"][None]

    np.testing.assert_array_equal(
        adapt(up)(params, adapter, 0 * x), np.tile(params["up"]["bias"], (4, 1))
    )


@pytest.mark.usefixtures("x64")
def test_scales():
    """The scale is LoRA's, by module and by the root of the rank."""
    config = dora(
        use_rslora=True, rank_pattern={"up": 2}, alpha_pattern={"up": 7}, target_modules=["up"]
    )
    params, _, adapter = make(config)
    own = {name: np.asarray(array) for name, array in adapter.params["up"].items()}
    v = np.asarray(params["up"]["kernel"]) + 7 / np.sqrt(2) * own["lora_A"] @ own["lora_B"]
    got = jax.jit(merge)(params, adapter)["up"]["kernel"]
    np.testing.assert_allclose(got, rescaled(v, own[MAGNITUDE]), rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_pissa():
    """The factors that were taken out of the weight stay out of it."""
    params, x = mlp_params(jnp.float64), normal(4, 6, seed=9, std=1, dtype=jnp.float64)
    config = dora(init_lora_weights="pissa", target_modules=["up", "down"])
    start = init_adapter(KEY, config, find_sites(mlp, params, x), params)
    adapter = make(config)[2].replace(buffers=start.buffers)
    want = dict(params)
    for module, own in adapter.params.items():
        own = {name: np.asarray(array) for name, array in own.items()}
        first = {name: np.asarray(array) for name, array in start.params[module].items()}
        change = low_rank(own, RANK) - low_rank(first, RANK)
        kernel = rescaled(np.asarray(params[module]["kernel"]) + change, own[MAGNITUDE])
        want[module] = {"kernel": jnp.asarray(kernel), "bias": params[module]["bias"]}
    chex.assert_trees_all_close(jax.jit(merge)(params, adapter), want, atol=1e-10)
    np.testing.assert_allclose(adapt(mlp)(params, adapter, x), mlp(want, x), atol=1e-10)


BEFORE = {
    "lora": LoraConfig(r=2, lora_alpha=3, target_modules=MODULES),
    "dora": LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=MODULES),
    "loha": LoHaConfig(r=2, alpha=3, target_modules=MODULES),
    "hra": HRAConfig(r=4, target_modules=MODULES),
    "ia3": IA3Config(target_modules=MODULES, feedforward_modules=[]),
    "ia3_feedforward": IA3Config(target_modules=MODULES, feedforward_modules=MODULES),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", BEFORE)
def test_after_another(name):
    """The norm is that of the weight as the one before left it."""
    apply_fn, params, ids = network()
    sites = find_sites(apply_fn, params, ids)
    first = drawn(BEFORE[name], sites, params, std=0.6)
    second = drawn(dora(target_modules=MODULES), sites, params, std=0.5)
    adapted = adapt(apply_fn, on_fallback="error")
    left = jax.jit(merge)(params, first)
    want = rebuilt(left, second, dora_of)
    merged = jax.jit(merge)(params, [first, second])
    chex.assert_trees_all_close(merged, want, atol=1e-10)

    def at_once(trainable):
        first_params, second_params = trainable
        pair = [first.replace(params=first_params), second.replace(params=second_params)]
        out = adapted(params, pair, ids)
        return jnp.sum(jnp.sin(out)), out

    def one_by_one(trainable):
        first_params, second_params = trainable
        left = merge(params, first.replace(params=first_params))
        out = apply_fn(merge(left, second.replace(params=second_params)), ids)
        return jnp.sum(jnp.sin(out)), out

    # The norm is held constant for the adapters before as well, as in merging.
    trainable = first.params, second.params
    got, expected = (jax.jit(jax.grad(f, has_aux=True))(trainable) for f in (at_once, one_by_one))
    np.testing.assert_allclose(got[1], apply_fn(want, ids), atol=1e-10)
    chex.assert_trees_all_close(got, expected, atol=1e-10)


def test_after_the_scaled_inputs_of_groups():
    """A scale for the channels of all groups is one that no single group can tell the norm of."""
    params, x = {"kernel": normal(3, 2, 6)}, normal(1, 5, 4, seed=9)

    def apply_fn(params, x):
        dims = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            x, params["kernel"], (1,), "SAME", dimension_numbers=dims, feature_group_count=2
        )

    sites = find_sites(apply_fn, params, x)
    ia3 = drawn(IA3Config(target_modules=["kernel"], feedforward_modules=["kernel"]), sites)
    adapter = drawn(dora(target_modules=["kernel"]), sites, params)
    with pytest.raises(ValueError, match=r"kernel: LoraConfig reads the weight .* put it first"):
        adapt(apply_fn)(params, [ia3, adapter], x)
    got = adapt(apply_fn)(params, [adapter, ia3], x)
    want = apply_fn(merge(merge(params, adapter), ia3), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_unmerging_says_why_not():
    params, _, adapter = make(dora(target_modules=["up"]), dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"DoRA .* no longer says how long .* keep the base"):
        unmerge(merge(params, adapter), adapter)


@pytest.mark.parametrize("drawn_factors", [False, True])
def test_a_column_of_zeros(drawn_factors):
    """A length of zero is the start of such a column; nothing is divided by it."""
    params, x = mlp_params(), normal(4, 6, seed=9, std=1)
    params["up"]["kernel"] = params["up"]["kernel"].at[:, 2].set(0)
    config, sites = dora(target_modules=["up", "down"]), find_sites(mlp, params, x)
    adapter = init_adapter(KEY, config, sites, params)
    if drawn_factors:
        adapter = drawn(config, sites, params, std=0.5)
    else:
        np.testing.assert_allclose(adapt(mlp)(params, adapter, x), mlp(params, x), atol=1e-5)
    merged = jax.jit(merge)(params, adapter)
    chex.assert_tree_all_finite((merged, gradient(params, adapter, x)))
    np.testing.assert_allclose(adapt(mlp)(params, adapter, x), mlp(merged, x), rtol=1e-4, atol=1e-4)


def test_half_precision():
    """The norm is summed in float32, and the factors stay there."""
    params, x, adapter = make(dora(target_modules=["up", "down"]), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter.params)} == {jnp.dtype("float32")}
    wide, wide_x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x))
    want = rebuilt(wide, adapter, dora_of)
    got = adapt(mlp)(params, adapter, x)
    assert got.dtype == jnp.bfloat16
    exact = np.asarray(mlp(want, wide_x))
    error = np.abs(np.asarray(got, np.float32) - exact).max() / np.abs(exact).max()
    assert error < 2e-2
    merged = jax.jit(merge)(params, adapter)
    for module in ("up", "down"):
        kernel = merged[module]["kernel"]
        assert kernel.dtype == jnp.bfloat16
        # One rounding, at the end.
        np.testing.assert_allclose(
            np.asarray(kernel, np.float32), want[module]["kernel"], rtol=2**-8, atol=1e-6
        )
    slope = gradient(params, adapter, x)
    chex.assert_tree_all_finite(slope)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(slope))


@pytest.mark.usefixtures("x64")
def test_half_precision_starts_as_the_identity():
    """Lengths are kept in float32, so that the start is the identity of the rounded weight."""
    params, x = mlp_params(jnp.bfloat16), normal(4, 6, seed=9, std=1, dtype=jnp.bfloat16)
    config = dora(target_modules=["up", "down"])
    adapter = init_adapter(KEY, config, find_sites(mlp, params, x), params)
    chex.assert_trees_all_equal(jax.jit(merge)(params, adapter), params)
    for module in ("up", "down"):
        want = lengths(np.asarray(params[module]["kernel"], np.float64))
        np.testing.assert_allclose(adapter.params[module][MAGNITUDE], want, rtol=1e-6)


def test_dropout_is_of_the_factors_alone():
    """PEFT drops from the input of the weight as well; here a start is one in training too."""
    params, x = mlp_params(), normal(4, 6, seed=9, std=1)
    config, sites = dora(lora_dropout=0.5, target_modules=["up"]), find_sites(mlp, params, x)
    adapted, start = adapt(mlp), init_adapter(KEY, config, sites, params)
    np.testing.assert_allclose(adapted(params, start.train(KEY), x), mlp(params, x), atol=1e-5)
    moved = drawn(config, sites, params, std=0.5)
    one, other = (adapted(params, moved.train(jax.random.key(i)), x) for i in range(2))
    assert float(jnp.abs(one - other).max()) > 1e-2
    chex.assert_trees_all_equal(merge(params, moved.train(KEY)), merge(params, moved))


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({"bias": "lora_only"}, {"up.bias"}),
        ({"modules_to_save": ["down"]}, {"down.bias", "down.kernel"}),
    ],
    ids=["lora_only", "modules_to_save"],
)
def test_whole_leaves_are_trained(fields, trained):
    params, x, adapter = make(dora(target_modules=["up"], **fields), dtype=jnp.float32)
    assert {leaf.path for leaf in adapter.saved} == trained
    merged = jax.jit(merge)(params, adapter)
    for path in trained:
        module, leaf = path.split(".")
        np.testing.assert_array_equal(merged[module][leaf], adapter.params[module][leaf])
    np.testing.assert_allclose(adapt(mlp)(params, adapter, x), mlp(merged, x), atol=1e-5)
    slope = gradient(params, adapter, x)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(slope))


def test_needs_the_params():
    """The lengths are those of the weights."""
    sites = find_sites(mlp, mlp_params(), jnp.ones((1, 6)))
    with pytest.raises(ValueError, match="initial factors out of the weights: pass params"):
        init_adapter(KEY, dora(target_modules=["up"]), sites)


def test_config():
    config = dora(rank_pattern={"q": 4}, alpha_pattern={"q": 2}, fan_in_fan_out=True)
    again = LoraConfig.from_dict(config.to_dict())
    assert again == config
    assert again.use_dora
    assert hash(again) == hash(config)
    with pytest.raises(ValueError, match="`lora_bias` does not work with `use_dora`"):
        dora(lora_bias=True)


def test_fan_in_fan_out_changes_nothing():
    params, _, adapter = make(dora(target_modules=["up"]), dtype=jnp.float32)
    turned = make(dora(target_modules=["up"], fan_in_fan_out=True), dtype=jnp.float32)[2]
    chex.assert_trees_all_equal(merge(params, adapter), merge(params, turned))
