"""IA3: its formula, biases, which side is scaled, and several of them."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import mlp, mlp_params, normal, scanned, scanned_params
from naive import drawn, house, rebuilt
from zoo_jax import tied_autoencoder
from zoo_linen import linen_grouped_conv, linen_tied_embedding

from peftjax import IA3Config, adapt, find_sites, init_adapter, merge, unmerge

KEY = jax.random.key(0)
BIASES = ["mlp.up", "mlp.down", "layers.up", "linen_conv2d.patch", "linen_grouped_conv.grouped"]
TARGETS = [*BIASES, "layers.down", "attn.wq", "wkv", "wo", "taken", "columns", "multiplied"]


def leaf(params, path):
    return functools.reduce(operator.getitem, path.split("."), params)


def outputs_scaled(name, weight, own):
    """W with every column times its scale; what comes out is what the columns make."""
    scale = own["ia3_l"]
    ins = weight.ndim - sum(n > 1 for n in scale.shape)
    assert scale.shape == (1,) * ins + weight.shape[ins:]
    scaled = np.empty_like(weight)
    for index in np.ndindex(weight.shape):
        scaled[index] = weight[index] * scale[(0,) * ins + index[ins:]]
    return scaled


def inputs_scaled(name, weight, own):
    """W with every row times its scale, an input's own: the taps of a kernel share one."""
    scale = own["ia3_l"]
    scaled = np.empty_like(weight)
    for index in np.ndindex(weight.shape):
        at = tuple(i if n > 1 else 0 for i, n in zip(index, scale.shape, strict=True))
        scaled[index] = weight[index] * scale[at]
    return scaled


def with_biases(params, adapter, names):
    """The params with the biases of these modules scaled as their outputs are."""
    for name in names:
        bias, scale = leaf(params, f"{name}.bias"), adapter.params[name]["ia3_l"]
        leaf(params, name)["bias"] = bias * scale.reshape(bias.shape)
    return params


def check_values(model, adapter, want):
    apply_fn, params = model
    merged = jax.jit(merge)(params, adapter)
    chex.assert_trees_all_close(merged, want, rtol=1e-10, atol=1e-10)
    got, expected = adapt(apply_fn)(params, adapter), jax.jit(apply_fn)(want)
    chex.assert_trees_all_close(got, expected, rtol=1e-10, atol=1e-10)
    back = jax.jit(unmerge)(merged, adapter)
    chex.assert_trees_all_close(back, params, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_scaled_outputs_are_the_formula():
    """The weights and the biases of what scales its outputs: dense, conv, lookup and stack."""
    apply_fn, params, sites = house()
    adapter = drawn(IA3Config(target_modules=TARGETS, feedforward_modules=[]), sites)
    want = with_biases(rebuilt(params, adapter, outputs_scaled), adapter, BIASES)
    check_values((apply_fn, params), adapter, want)


@pytest.mark.usefixtures("x64")
def test_scaled_inputs_are_the_formula():
    """The weights alone: a bias is added to what the scaled inputs make."""
    apply_fn, params, sites = house()
    targets = [name for name in TARGETS if name not in ("linen_grouped_conv.grouped", "multiplied")]
    config = IA3Config(target_modules=targets, feedforward_modules=targets)
    adapter = drawn(config, sites)
    check_values((apply_fn, params), adapter, rebuilt(params, adapter, inputs_scaled))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("feedforward", [False, True])
def test_values_of_some_layers(feedforward):
    params, x = scanned_params(dtype=jnp.float64), normal(4, 6, std=1, dtype=jnp.float64)

    def apply_fn(params):
        return scanned(params, x)

    config = IA3Config(
        target_modules=["up", "down"],
        feedforward_modules=["up", "down"] if feedforward else [],
        layers_to_transform=[1, 3],
    )
    adapter = drawn(config, find_sites(apply_fn, params))
    assert adapter.params["layers.up"]["ia3_l"].shape == ((2, 6, 1) if feedforward else (2, 1, 9))
    want = rebuilt(params, adapter, inputs_scaled if feedforward else outputs_scaled)
    if not feedforward:
        scale = adapter.params["layers.up"]["ia3_l"][:, 0]
        bias = np.array(params["layers"]["up"]["bias"])
        bias[[1, 3]] *= scale
        want["layers"]["up"]["bias"] = jnp.asarray(bias)
    check_values((apply_fn, params), adapter, want)


def test_shapes_are_pefts():
    """Ones along the axes that are not scaled, so that the shape tells which ones are."""
    apply_fn, params, args = linen_grouped_conv.build(KEY, jnp.float32)
    sites = find_sites(apply_fn, params, *args)
    for feedforward, shapes in (
        # The kernels are (3, 3, 10), (4, 1, 10) and (5, 1, 20): taps, channels of a group, outputs.
        ([], {"grouped": (1, 1, 10), "depthwise": (1, 1, 10), "multiplied": (1, 1, 20)}),
        (".*", {"grouped": (1, 6, 1), "depthwise": (1, 10, 1), "multiplied": (1, 10, 1)}),
    ):
        config = IA3Config(target_modules=lambda site: True, feedforward_modules=feedforward)
        adapter = init_adapter(KEY, config, sites)
        assert {name: own["ia3_l"].shape for name, own in adapter.params.items()} == shapes


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("groups", "width"), [(2, 6), (6, 6), (3, 6)])
def test_feedforward_of_groups_scales_x(groups, width):
    """Every channel of x has a scale of its own, whichever group it is in."""
    params = {"kernel": normal(3, width // groups, 12, dtype=jnp.float64)}
    x = normal(2, 8, width, seed=9, std=1, dtype=jnp.float64)

    def apply_fn(params, x):
        dims = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            x,
            params["kernel"],
            (2,),
            [(2, 1)],
            rhs_dilation=(2,),
            dimension_numbers=dims,
            feature_group_count=groups,
        )

    config = IA3Config(target_modules=["kernel"], feedforward_modules=["kernel"])
    adapter = drawn(config, find_sites(apply_fn, params, x))
    scale = np.asarray(adapter.params["kernel"]["ia3_l"])
    assert scale.shape == (1, width, 1)
    want = apply_fn(params, x * scale.reshape(1, 1, width))
    adapted = adapt(apply_fn, on_fallback="error")
    np.testing.assert_allclose(adapted(params, adapter, x), want, atol=1e-12)

    # The outputs of a group lie side by side, and see the channels of that group alone.
    kernel = np.array(params["kernel"])
    for out in range(12):
        group = out // (12 // groups)
        for channel in range(width // groups):
            kernel[:, channel, out] *= scale[0, group * (width // groups) + channel, 0]
    merged = jax.jit(merge)(params, adapter)
    np.testing.assert_allclose(merged["kernel"], kernel, atol=1e-12)
    chex.assert_trees_all_close(jax.jit(unmerge)(merged, adapter), params, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("case", [tied_autoencoder, linen_tied_embedding], ids=str)
def test_tied_weights_are_scaled_both_ways(case, feedforward):
    """What scales the outputs of a weight scales the inputs of its transpose."""
    apply_fn, params, args = case.build(KEY, jnp.float64)
    name = {"tied_autoencoder": "kernel", "linen_tied_embedding": "embed"}[case.name]
    names = [name] if feedforward else []
    config = IA3Config(target_modules=[name], feedforward_modules=names)
    sites = find_sites(apply_fn, params, *args)
    assert {use.transposed for use in dict(sites.uses)[name]} == {False, True}
    adapter = drawn(config, sites)
    scale = np.asarray(adapter.params[name]["ia3_l"])
    assert scale.shape == ((sites[name].shape[0], 1) if feedforward else (1, sites[name].shape[1]))
    if case is tied_autoencoder:
        want = {**params, "kernel": params["kernel"] * scale}
        if not feedforward:
            want["encoded_bias"] = params["encoded_bias"] * scale[0]
    else:
        want = {**params, "embed": {"embedding": params["embed"]["embedding"] * scale}}
    adapted = adapt(apply_fn, on_fallback="error")
    got, expected = adapted(params, adapter, *args), apply_fn(want, *args)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    chex.assert_trees_all_close(jax.jit(merge)(params, adapter), want, atol=1e-12)


def network(feedforward, dtype=jnp.float64, **fields):
    params, x = mlp_params(dtype), normal(4, 6, seed=9, std=1, dtype=dtype)
    config = IA3Config(target_modules=["up", "down"], feedforward_modules=feedforward, **fields)
    return params, x, config, find_sites(mlp, params, x)


def naive(params, x, scales):
    """The two layers, ``up`` scaling what comes out of it and ``down`` what goes in."""
    h = np.asarray(x) @ np.asarray(params["up"]["kernel"]) + np.asarray(params["up"]["bias"])
    for up, _ in scales:
        h = h * up
    h = np.tanh(h)
    for _, down in scales:
        h = h * down
    return h @ np.asarray(params["down"]["kernel"]) + np.asarray(params["down"]["bias"])


@pytest.mark.usefixtures("x64")
def test_several_multiply():
    params, x, config, sites = network(["down"])
    one, other = drawn(config, sites), drawn(config, sites, std=0.5)
    scales = [
        [np.asarray(a.params[name]["ia3_l"]).ravel() for name in ("up", "down")]
        for a in (one, other)
    ]
    adapted = adapt(mlp)
    both = np.asarray(adapted(params, [one, other], x))
    np.testing.assert_allclose(both, naive(params, x, scales), atol=1e-12)
    np.testing.assert_allclose(both, adapted(params, [other, one], x), atol=1e-12)
    merged = merge(params, [one, other])
    np.testing.assert_allclose(mlp(merged, x), both, atol=1e-12)
    chex.assert_trees_all_close(unmerge(merged, [one, other]), params, atol=1e-12)

    def loss(trainable):
        pair = [a.replace(params=p) for a, p in zip((one, other), trainable, strict=True)]
        return jnp.sum(jnp.sin(adapted(params, pair, x)))

    first, second = jax.jit(jax.grad(loss))([one.params, other.params])
    # A product of scales: each one times its own gradient is the same number.
    for name in ("up", "down"):
        products = [
            a.params[name]["ia3_l"] * g[name]["ia3_l"]
            for a, g in zip((one, other), (first, second), strict=True)
        ]
        np.testing.assert_allclose(*products, atol=1e-12)
        assert np.abs(products[0]).max() > 1e-2


@pytest.mark.usefixtures("x64")
def test_gradient_is_that_of_the_formula():
    params, x, config, sites = network(["down"])
    adapter, adapted = drawn(config, sites), adapt(mlp)

    def by_hand(up, down):
        h = jnp.tanh((x @ params["up"]["kernel"] + params["up"]["bias"][None]) * up)
        out = (h * down) @ params["down"]["kernel"] + params["down"]["bias"][None]
        return jnp.sum(jnp.sin(out))

    def loss(trainable):
        return jnp.sum(jnp.sin(adapted(params, adapter.replace(params=trainable), x)))

    up, down = (adapter.params[name]["ia3_l"] for name in ("up", "down"))
    want = jax.jit(jax.grad(by_hand, (0, 1)))(up, down.T)
    got = jax.jit(jax.grad(loss))(adapter.params)
    np.testing.assert_allclose(got["up"]["ia3_l"], want[0], atol=1e-12)
    np.testing.assert_allclose(got["down"]["ia3_l"], want[1].T, atol=1e-12)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(got))


def test_start_is_ones():
    params, x, config, sites = network(["down"], jnp.float32)
    adapter = init_adapter(KEY, config, sites)
    assert {name: own["ia3_l"].shape for name, own in adapter.params.items()} == {
        "up": (1, 9),
        "down": (9, 1),
    }
    assert all((np.asarray(leaf) == 1).all() for leaf in jax.tree.leaves(adapter.params))
    assert not any(adapter.buffers.values())
    chex.assert_trees_all_equal(merge(params, adapter), params)
    np.testing.assert_allclose(adapt(mlp)(params, adapter, x), mlp(params, x), atol=1e-6)


def test_random_start_is_normal():
    params, x = {"w": normal(3, 4000)}, jnp.ones((1, 3))
    sites = find_sites(lambda params, x: x @ params["w"], params, x)
    config = IA3Config(target_modules=["w"], feedforward_modules=[], init_ia3_weights=False)
    scale = np.asarray(init_adapter(KEY, config, sites).params["w"]["ia3_l"])
    assert abs(scale.mean()) < 0.07
    assert abs(scale.std() - 1) < 0.05


def test_feedforward_modules_must_be_given():
    _, _, config, sites = network(None, jnp.float32)
    with pytest.raises(ValueError, match=r"down: `feedforward_modules` says .* is missing: .*\[\]"):
        init_adapter(KEY, config, sites)


def test_feedforward_modules_are_among_the_targets():
    message = "`feedforward_modules` should be a subset of `target_modules`.* hold 'down'"
    with pytest.raises(ValueError, match=message):
        IA3Config(target_modules=["up"], feedforward_modules=["up", "down"])
    # Which modules the others select is not known before a model is.
    for targets in ("up|down", lambda site: True, None):
        IA3Config(target_modules=targets, feedforward_modules=["down"])


@pytest.mark.parametrize(
    ("feedforward", "scaled_inputs"),
    [
        (["down"], {"net.down", "net.up.down"}),
        (["net.down"], {"net.down"}),
        ("net.down", {"net.down"}),
        ("down", set()),
        (r".*\.(x?)down", {"net.down", "net.xdown", "net.up.down"}),
        ([], set()),
    ],
)
def test_which_modules_are_feedforward(feedforward, scaled_inputs):
    """A list names the ends of paths, at a dot (in PEFT anywhere); a string the whole path."""
    names = ["net.down", "net.xdown", "net.up.down"]
    params = {
        "net": {
            "down": {"kernel": normal(4, 5)},
            "xdown": {"kernel": normal(5, 6)},
            "up": {"down": {"kernel": normal(6, 7)}},
        }
    }

    def apply_fn(params, x):
        for name in names:
            x = jnp.tanh(x @ leaf(params, name)["kernel"])
        return x

    sites = find_sites(apply_fn, params, jnp.ones((1, 4)))
    # A function selects, as a list of names would have to hold the feedforward ones word for word.
    config = IA3Config(target_modules=lambda site: True, feedforward_modules=feedforward)
    adapter = init_adapter(KEY, config, sites)
    assert {name for name in names if adapter.params[name]["ia3_l"].shape[0] > 1} == scaled_inputs


def test_layers_of_a_stack_are_alike():
    params, x = scanned_params(), jnp.ones((1, 6))
    sites = find_sites(scanned, params, x)
    some = IA3Config(target_modules=["up", "down"], feedforward_modules=["1.up"])
    with pytest.raises(ValueError, match=r"layers.up: .*names some of the stacked layers"):
        init_adapter(KEY, some, sites)
    # Where only those are adapted that it names, they are alike.
    chosen = {"target_modules": ["up"], "layers_to_transform": [1, 2]}
    every = IA3Config(feedforward_modules=r"layers\.(1|2)\.up", **chosen)
    assert init_adapter(KEY, every, sites).params["layers.up"]["ia3_l"].shape == (2, 6, 1)


def test_layers_that_a_list_names_one_by_one():
    """A function selects both stacks; the list names every layer of one of them."""
    sites = find_sites(scanned, scanned_params(), jnp.ones((1, 6)))
    names = [f"layers.{layer}.up" for layer in range(4)]
    config = IA3Config(target_modules=lambda site: True, feedforward_modules=names)
    params = init_adapter(KEY, config, sites).params
    assert params["layers.up"]["ia3_l"].shape == (4, 6, 1)
    assert params["layers.down"]["ia3_l"].shape == (4, 1, 6)


def test_an_input_alone_cannot_be_feedforward():
    params = {"w": normal(1, 5)}
    sites = find_sites(lambda params, x: x @ params["w"], params, jnp.ones((2, 1)))
    config = IA3Config(target_modules=["w"], feedforward_modules=["w"])
    with pytest.raises(ValueError, match="w: a feedforward module has a single input"):
        init_adapter(KEY, config, sites)


@pytest.mark.usefixtures("x64")
def test_a_single_output_is_scaled():
    params = {"w": normal(5, 1, dtype=jnp.float64), "b": normal(1, seed=1, dtype=jnp.float64)}
    x = normal(3, 5, seed=9, dtype=jnp.float64)

    def apply_fn(params, x):
        return x @ params["w"] + params["b"][None]

    config = IA3Config(target_modules=["w"], feedforward_modules=[])
    adapter = drawn(config, find_sites(apply_fn, params, x))
    scale = adapter.params["w"]["ia3_l"]
    got = adapt(apply_fn)(params, adapter, x)
    np.testing.assert_allclose(got, apply_fn(params, x) * scale, atol=1e-12)


def test_what_was_scaled_by_zero_is_gone():
    """PEFT divides by the scale plus 1e-8, and gives zeros for weights."""
    params = mlp_params()
    sites = find_sites(mlp, params, normal(4, 6))
    adapter = init_adapter(KEY, IA3Config(target_modules=["up"], feedforward_modules=[]), sites)
    scale = adapter.params["up"]["ia3_l"].at[0, 2].set(0)
    adapter = adapter.replace(params={"up": {"ia3_l": scale}})
    back = unmerge(merge(params, adapter), adapter)["up"]["kernel"]
    np.testing.assert_array_equal(back, params["up"]["kernel"].at[:, 2].set(jnp.nan))


def test_modules_to_save():
    params, x = mlp_params(), normal(4, 6, seed=9, std=1)
    config = IA3Config(target_modules=["up"], feedforward_modules=[], modules_to_save=["down"])
    sites = find_sites(mlp, params, x)
    start = init_adapter(KEY, config, sites, params)
    chex.assert_trees_all_equal(start.params["down"], params["down"])
    adapter = drawn(config, sites, params)
    merged = merge(params, adapter)
    chex.assert_trees_all_equal(merged["down"], adapter.params["down"])

    def loss(trainable):
        out = adapt(mlp)(params, adapter.replace(params=trainable), x)
        return jnp.sum(jnp.sin(out)), out

    slope, out = jax.jit(jax.grad(loss, has_aux=True))(adapter.params)
    np.testing.assert_allclose(out, mlp(merged, x), atol=1e-5)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(slope))


def test_defaults_are_pefts():
    data = IA3Config().to_dict()
    assert data == {
        "peft_type": "IA3",
        "feedforward_modules": None,
        "init_ia3_weights": True,
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
    assert IA3Config.from_dict(data) == IA3Config()


def test_round_trip():
    config = IA3Config(
        target_modules=["k", "down"],
        feedforward_modules=["down"],
        init_ia3_weights=False,
        fan_in_fan_out=True,
    )
    again = IA3Config.from_dict(config.to_dict())
    assert again == config
    assert hash(again) == hash(config)


def test_fan_in_fan_out_changes_nothing():
    _, _, config, sites = network(["down"], jnp.float32)
    _, _, turned, _ = network(["down"], jnp.float32, fan_in_fan_out=True)
    chex.assert_trees_all_equal(
        init_adapter(KEY, config, sites).params, init_adapter(KEY, turned, sites).params
    )


def test_names_and_patterns_are_checked():
    with pytest.raises(ValueError, match=r"`feedforward_modules` holds 'down\('"):
        IA3Config(feedforward_modules="down(")
    with pytest.raises(TypeError, match="`feedforward_modules` takes a list of names, got 3"):
        IA3Config(feedforward_modules=3)


@pytest.mark.parametrize("field", ["bias", "rank_pattern", "r"])
def test_fields_it_does_not_have(field):
    with pytest.raises(TypeError, match=field):
        IA3Config(**{field: 1})
