"""Finding sites: what the zoo does not cover. Names, heads, tables, weights made of weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from models import mlp, mlp_params, normal, redraw, scanned, scanned_params

from peftjax import LoraConfig, NoMatchingModuleError, adapt, find_sites, init_adapter, merge
from peftjax.engine.views import Window

KEY = jax.random.key(0)
X = jax.ShapeDtypeStruct((4, 6), jnp.float32)


def test_shapes_are_enough():
    params = jax.eval_shape(mlp_params)
    assert dict(find_sites(mlp, params, X)) == dict(find_sites(mlp, mlp_params(), normal(4, 6)))


def test_the_table():
    lines = str(find_sites(scanned, scanned_params(), X)).splitlines()
    assert lines[0].split() == ["module", "kind", "shape", "in", "out", "stacked", "bias", "uses"]
    assert lines[2].split() == [
        "layers.down",
        "dense",
        *["4", "x", "9", "x", "6"],
        "1",
        "2",
        "0",
        "1",
    ]
    assert lines[3].split()[-2:] == ["bias", "1"]


def test_keys_may_lie_among_the_params():
    params = mlp_params() | {"rng": jax.random.key(0)}
    assert dict(find_sites(mlp, params, X)) == dict(find_sites(mlp, mlp_params(), X))


def test_the_function_comes_first():
    with pytest.raises(TypeError, match=r"find_sites\(apply_fn, params, \*args\).*of dict"):
        find_sites(mlp_params(), mlp, X)


def test_nothing_found_says_so():
    sites = find_sites(lambda params, x: x + params["b"][None], {"b": normal(6)}, X)
    assert len(sites) == 0
    assert str(sites).startswith("module")
    assert "no array of params meets a product" in str(sites)
    with pytest.raises(NoMatchingModuleError, match="from_nnx make apply_fn out of a module"):
        init_adapter(KEY, LoraConfig(target_modules="all-linear"), sites)


def test_sites_are_a_hashable_mapping():
    one, two = (find_sites(mlp, mlp_params(), X) for _ in range(2))
    assert hash(one) == hash(two)
    assert one == two
    assert list(one) == ["down", "up"]
    assert one["up"].in_size == 6
    assert "middle" not in one


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: jax.Array
    key: jax.Array
    value: jax.Array


class TestNames:
    def test_a_field_called_value_is_no_box(self):
        params = {"attn": Attention(*(normal(6, 6, seed=seed) for seed in range(3)))}

        def apply_fn(params, x):
            own = params["attn"]
            return (x @ own.query + x @ own.key) @ own.value

        sites = find_sites(apply_fn, params, X)
        assert set(sites) == {"attn.query", "attn.key", "attn.value"}
        adapter = init_adapter(KEY, LoraConfig(r=2, target_modules=["value"]), sites)
        adapter = adapter.replace(params=redraw(adapter.params))
        x, merged = normal(4, 6, seed=9, std=1), merge(params, adapter)
        assert (merged["attn"].value != params["attn"].value).any()
        assert (merged["attn"].query == params["attn"].query).all()
        got = adapt(apply_fn)(params, adapter, x)
        np.testing.assert_allclose(got, apply_fn(merged, x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "box", [lambda x: linen.Partitioned(x, names=(None, None)), nnx.Param], ids=["linen", "nnx"]
    )
    def test_a_box_leaves_no_trace(self, box):
        params = {"attn": {"query": box(normal(6, 6)), "value": box(normal(6, 6, seed=1))}}

        def apply_fn(params, x):
            own = jax.tree.leaves(params["attn"])
            return x @ own[0] @ own[1]

        assert set(find_sites(apply_fn, params, X)) == {"attn.query", "attn.value"}

    def test_two_weights_of_one_module_keep_their_own_names(self):
        params = {"attn": {"wq": normal(6, 6), "wo": normal(6, 6), "scale": normal(6)}}

        def apply_fn(params, x):
            own = params["attn"]
            return (x * own["scale"][None]) @ own["wq"] @ own["wo"]

        assert list(find_sites(apply_fn, params, X)) == ["attn.wo", "attn.wq"]

    def test_lists_count_and_slashes_are_dots(self):
        params = [{"mlp/~/linear_0": {"w": normal(6, 6)}}, {"w": normal(6, 6)}]

        def apply_fn(params, x):
            return x @ params[0]["mlp/~/linear_0"]["w"] @ params[1]["w"]

        assert list(find_sites(apply_fn, params, X)) == ["0.mlp.~.linear_0", "1"]

    def test_two_arrays_of_one_path(self):
        params = {"a.b": normal(6, 6), "a": {"b": normal(6, 6)}}
        with pytest.raises(ValueError, match=r"two arrays of the params have the path 'a\.b'"):
            find_sites(lambda p, x: x @ p["a.b"] @ p["a"]["b"], params, X)


class TestHeads:
    @staticmethod
    def language_model(params, ids):
        x = params["embed"][ids]
        x = jnp.tanh(x @ params["mlp"])
        return 0.5 * (x @ params["head"])[:, -1:].astype(jnp.float32)

    def params(self):
        return {"embed": normal(11, 6), "mlp": normal(6, 6), "head": normal(6, 11)}

    def test_a_head_is_what_reaches_the_output(self):
        sites = find_sites(self.language_model, self.params(), jnp.zeros((2, 3), jnp.int32))
        assert {site.name for site in sites.values() if site.is_head} == {"head"}

    def test_all_linear_leaves_out_heads_and_lookups(self):
        sites = find_sites(self.language_model, self.params(), jnp.zeros((2, 3), jnp.int32))
        adapter = init_adapter(KEY, LoraConfig(target_modules="all-linear"), sites)
        assert list(adapter.sites) == ["mlp"]

    def test_without_a_lookup_there_is_no_head_to_leave_out(self):
        sites = find_sites(mlp, mlp_params(), X)
        assert sites["down"].is_head
        adapter = init_adapter(KEY, LoraConfig(target_modules="all-linear"), sites)
        assert list(adapter.sites) == ["down", "up"]

    def test_an_activation_ends_it(self):
        sites = find_sites(lambda p, x: jnp.tanh(x @ p["w"]), {"w": normal(6, 5)}, X)
        assert not sites["w"].is_head


class TestWindows:
    """How a convolution moves its kernel, which torch's modules and PEFT's methods tell apart."""

    @pytest.mark.parametrize(
        ("options", "window"),
        [
            ({}, ()),
            ({"window_strides": (2, 2), "padding": "VALID"}, ()),
            ({"padding": [(0, 1), (0, 1)]}, ()),
            ({"rhs_dilation": (1, 2), "padding": "VALID"}, ("dilated",)),
            ({"lhs_dilation": (2, 2), "padding": [(1, 1), (1, 1)]}, ("spread",)),
            ({"window_strides": (1, 2), "padding": "VALID"}, ("uneven",)),
            ({"padding": [(1, 1), (0, 0)]}, ("uneven",)),
        ],
        ids=str,
    )
    def test_of_a_convolution(self, options, window):
        options = {"window_strides": (1, 1), "padding": "SAME"} | options

        def apply_fn(params, x):
            numbers = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(
                x, params["kernel"], dimension_numbers=numbers, **options
            )

        site = find_sites(apply_fn, {"kernel": normal(3, 3, 2, 5)}, normal(1, 8, 8, 2))["kernel"]
        assert {name for name in Window._fields if getattr(site, name)} == set(window)

    @pytest.mark.parametrize("turned", [False, True])
    def test_of_a_transposed_one(self, turned):
        def apply_fn(params, x):
            return lax.conv_transpose(x, params["kernel"], (2, 2), "SAME", transpose_kernel=turned)

        site = find_sites(apply_fn, {"kernel": normal(3, 3, 5, 5)}, normal(1, 4, 4, 5))["kernel"]
        assert site.spread


class TestTies:
    IDS = jnp.zeros((2, 3), jnp.int32)

    def test_a_table_that_is_the_head_too(self):
        def apply_fn(params, ids):
            return jax.nn.log_softmax(jnp.tanh(params["embed"][ids]) @ params["embed"].T)

        site = find_sites(apply_fn, {"embed": normal(11, 6)}, self.IDS)["embed"]
        assert site.kind == "lookup"
        assert site.is_tied
        assert not site.is_head

    def test_two_halves_of_an_autoencoder(self):
        sites = find_sites(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w": normal(6, 5)}, X)
        assert sites["w"].is_tied

    def test_layers_of_a_stack(self):
        def apply_fn(params, x):
            return lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, params["w"])[0]

        assert find_sites(apply_fn, {"w": normal(3, 6, 5)}, X)["w"].is_tied

    @pytest.mark.parametrize(
        "apply_fn",
        [
            lambda p, x: x @ p["w"].T,
            lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"],
            lambda p, x: p["w"][jnp.zeros(3, jnp.int32)].sum() + x @ p["w"],
        ],
        ids=["transposed", "twice", "one-hot"],
    )
    def test_one_way_round_is_no_tie(self, apply_fn):
        assert not find_sites(apply_fn, {"w": normal(6, 6)}, X)["w"].is_tied


class TestWeightsOfWeights:
    """A use of something made of weights alone is a use of those weights, merged first."""

    @pytest.mark.parametrize(
        ("make", "names"),
        [
            (lambda p: jnp.tanh(p["w"]), "w"),
            (lambda p: p["w"] * p["g"][None], "wg"),
            (lambda p: p["w"] + p["v"], "wv"),
            (lambda p: jnp.concatenate([p["w"], p["v"]], axis=1), "wv"),
        ],
        ids=["function", "gain", "sum", "concatenated"],
    )
    def test_it_is_found_and_exact(self, make, names):
        every = {"w": normal(6, 5), "v": normal(6, 5, seed=1), "g": normal(5, seed=2)}
        params = {name: every[name] for name in names}

        def apply_fn(params, x):
            return x @ make(params)

        sites = find_sites(apply_fn, params, X)
        assert sites["w"].in_axes == (0,)
        assert all(use.fallback for use in dict(sites.uses)["w"])
        adapter = init_adapter(KEY, LoraConfig(target_modules=["w"]), sites)
        adapter = adapter.replace(params=redraw(adapter.params))
        x = normal(4, 6, seed=5)
        got, want = adapt(apply_fn)(params, adapter, x), apply_fn(merge(params, adapter), x)
        assert float(jnp.abs(got - want).max()) < 1e-5
        assert float(jnp.abs(got - apply_fn(params, x)).max()) > 1e-2


def test_a_weight_that_is_no_linear_one_says_so():
    params = {"dense": {"kernel": normal(6, 5)}, "norm": {"scale": normal(6)}}

    def apply_fn(params, x):
        return (x * params["norm"]["scale"][None]) @ params["dense"]["kernel"]

    sites = find_sites(apply_fn, params, X)
    with pytest.raises(NoMatchingModuleError, match="norm"):
        init_adapter(KEY, LoraConfig(target_modules=["norm"]), sites)


class TestStrays:
    """An array of several axes that no product was seen of is named, with what it met."""

    @staticmethod
    def sites():
        def apply_fn(params, x):
            h = (x + params["pos"]) * params["d"]["g"][None]
            return jax.nn.relu(h @ params["d"]["w"]) @ (params["m"] * jnp.tril(jnp.ones((6, 6))))

        dense = {"w": normal(6, 6), "g": normal(6)}
        return find_sites(apply_fn, {"d": dense, "m": normal(6, 6), "pos": normal(4, 6)}, X)

    def test_the_table_names_them(self):
        sites = self.sites()
        assert list(sites) == ["d"]
        assert sites.strays == (("m", "mul"), ("pos", "add"))
        assert str(sites).endswith("\n\nnot followed to a product: m (mul), pos (add)")

    def test_a_target_that_means_one_says_so(self):
        sites = self.sites()
        with pytest.raises(NoMatchingModuleError, match=r"only: 'm'; not followed.*: m \(mul\)$"):
            init_adapter(KEY, LoraConfig(target_modules=["m"]), sites)

    def test_vectors_and_biases_are_none(self):
        def scanned(params, x):
            def block(x, layer):
                w, b, g = layer
                return (jnp.einsum("sd,dhk->shk", x * g[None], w) + b[None]).reshape(x.shape), None

            return jax.lax.scan(block, x, params)[0]

        params = (normal(3, 6, 2, 3), normal(3, 2, 3), normal(3, 6))
        assert find_sites(scanned, params, X).strays == ()

    def test_many_are_cut_short(self):
        params = [normal(6, 6, seed=i) for i in range(10)]
        sites = find_sites(lambda params, x: sum(x[:, None] * w[None] for w in params), params, X)
        assert len(sites.strays) == 10
        assert str(sites).endswith("7 (mul), ...")


def test_integer_leaves_and_things_that_are_no_arrays_are_no_sites():
    params = {"w": normal(6, 6), "table": jnp.arange(12).reshape(6, 2), "name": "x", "none": None}

    def apply_fn(params, x):
        return (x @ params["w"])[:, params["table"][:, 0] % 6]

    assert list(find_sites(apply_fn, params, X)) == ["w"]


def test_taps_are_told_from_channels():
    """Whatever the layout, and whatever transposes come before."""

    def apply_fn(params, x):
        kernel = params["kernel"].transpose(2, 3, 0, 1)  # (out, in, h, w) to (h, w, out, in)
        numbers = ("NHWC", "HWOI", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    sites = find_sites(apply_fn, {"kernel": jnp.ones((5, 4, 3, 2))}, jnp.ones((1, 6, 6, 4)))
    site = sites["kernel"]
    assert (site.in_axes, site.out_axes, site.tap_axes) == ((1, 2, 3), (0,), (2, 3))


class TestTokens:
    def count(self, apply_fn, params, *args):
        sites = find_sites(apply_fn, params, *args)
        return {name: [use.tokens for use in uses] for name, uses in sites.uses}

    def test_every_use_counts_its_vectors(self):
        def apply_fn(params, x, image):
            h = params["table"][jnp.arange(3)] + jnp.einsum("bsd,dk->bsk", x, params["w"]).sum()
            numbers = ("NHWC", "HWIO", "NHWC")
            y = lax.conv_general_dilated(
                image, params["conv"], (2, 2), "SAME", dimension_numbers=numbers
            )
            return h @ params["table"].T, y

        params = {"table": jnp.ones((7, 6)), "w": jnp.ones((4, 6)), "conv": jnp.ones((3, 3, 2, 5))}
        got = self.count(apply_fn, params, jnp.ones((2, 5, 4)), jnp.ones((2, 8, 6, 2)))
        assert got == {"conv": [2 * 4 * 3], "table": [0, 3], "w": [10]}

    def test_loops_repeat_what_they_do_not_slice(self):
        def apply_fn(params, x):
            def step(h, own):
                return jnp.tanh(h @ params["shared"] @ own), None

            def twice(h, _):
                return lax.scan(step, h, params["layers"])[0], None

            h, _ = lax.scan(twice, x, None, length=2)
            return h @ params["shared"]

        params = {"shared": jnp.ones((4, 4)), "layers": jnp.ones((3, 4, 4))}
        got = self.count(apply_fn, params, jnp.ones((5, 4)))
        # Each layer meets 5 vectors, twice; the shared weight all of them, and those at the end.
        assert got == {"layers": [10], "shared": [5 * 3 * 2, 5]}

    def test_members_of_a_batched_product_share_them(self):
        def apply_fn(params, x):
            return jnp.einsum("ebd,edk->ebk", x, params["experts"])

        got = self.count(apply_fn, {"experts": jnp.ones((3, 4, 6))}, jnp.ones((3, 5, 4)))
        assert got == {"experts": [5]}
