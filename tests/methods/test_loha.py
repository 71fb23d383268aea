"""LoHa: its formula, its start, its dropouts, when it is fused, and pFedPara."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from models import mlp, mlp_params, named, normal, scanned, scanned_params
from naive import drawn, finite_differences, house, rebuilt
from zoo_jax import dilated_both_ways
from zoo_linen import linen_conv2d

from peftjax import (
    LoHaConfig,
    LoraConfig,
    adapt,
    find_sites,
    init_adapter,
    join_loha,
    merge,
    split_loha,
)
from peftjax.factors import WeightSpec
from peftjax.methods import loha
from peftjax.methods.loha import fusing_is_cheaper

KEY = jax.random.key(0)
ALPHA, RANK = 5, 3
RANKS = {"layers.up.1": 5, "layers.up.3": 1, "mlp.down": 2, "kernels.1": 2}
# Each of the two matrices of a convolution with a Tucker core, laid out as its kernel is.
CORES = {
    "linen_conv2d.patch": "ijhw,cj,io->hwco",
    "linen_conv2d.mixed": "ijhw,cj,io->hwco",
    "linen_grouped_conv.grouped": "ijk,cj,io->kco",
    "linen_grouped_conv.depthwise": "ijk,cj,io->kco",
    "linen_grouped_conv.multiplied": "ijk,cj,io->kco",
    "dilated_both_ways": "ijk,cj,io->cko",
    "kernels.0": "ijk,cj,io->kco",
    "kernels.1": "ijk,cj,io->kco",
}


def loha_of(name, weight, own):
    """W + s (B1 A1) * (B2 A2), multiplied out."""
    rank = RANKS.get(name, RANK)
    product = ALPHA / rank
    for half in "12":
        a = own[f"hada_w{half}_a"][:rank].reshape(rank, -1)
        b = own[f"hada_w{half}_b"][..., :rank].reshape(-1, rank)
        if f"hada_t{half}" in own:
            core = own[f"hada_t{half}"][:rank, :rank]
            product = product * np.einsum(CORES[name], core, b, a)
        else:
            product = product * (b @ a).reshape(weight.shape)
    return weight + product


def force(monkeypatch, fused):
    monkeypatch.setattr(loha, "fusing_is_cheaper", lambda *_: fused)


def check_values(model, config):
    apply_fn, params, sites = model
    adapter = drawn(config, sites)
    want = rebuilt(params, adapter, loha_of)
    chex.assert_trees_all_close(jax.jit(merge)(params, adapter), want, rtol=1e-10, atol=1e-10)
    got, expected = adapt(apply_fn)(params, adapter), jax.jit(apply_fn)(want)
    chex.assert_trees_all_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fused", [False, True], ids=["factors", "fused"])
def test_values_are_the_formula(fused, monkeypatch):
    force(monkeypatch, fused)
    targets = [*CORES, "mlp.up", "mlp.down", "attn.wq", "wkv", "taken", "blocks", "layers.up"]
    config = LoHaConfig(r=RANK, alpha=ALPHA, rank_pattern=RANKS, target_modules=targets)
    check_values(house(), config)


@pytest.mark.usefixtures("x64")
def test_values_of_some_layers():
    params, x = scanned_params(dtype=jnp.float64), normal(4, 6, std=1, dtype=jnp.float64)
    config = LoHaConfig(
        r=RANK,
        alpha=ALPHA,
        rank_pattern={"layers.up.1": 5},
        target_modules=["up", "down"],
        layers_to_transform=[1, 2],
    )
    apply_fn = functools.partial(scanned, x=x)
    check_values((apply_fn, params, find_sites(apply_fn, params)), config)


@pytest.mark.usefixtures("x64")
def test_values_with_a_core():
    """A kernel of several taps gets a core; other weights have none."""
    config = LoHaConfig(
        r=RANK,
        alpha=ALPHA,
        use_effective_conv2d=True,
        rank_pattern=RANKS,
        target_modules=[*CORES, "mlp.down", "layers.up"],
    )
    check_values(house(), config)


def test_alpha_of_single_modules():
    sites = find_sites(mlp, mlp_params(), jnp.ones((1, 6)))
    config = LoHaConfig(r=4, alpha=6, alpha_pattern={"up": 1}, target_modules=["up", "down"])
    buffers = drawn(config, sites).buffers
    assert float(buffers["down"]["scaling"]) == 6 / 4
    assert float(buffers["up"]["scaling"]) == 1 / 4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("core", [False, True], ids=["flat", "core"])
@pytest.mark.parametrize("case", [linen_conv2d, dilated_both_ways], ids=str)
def test_gradients_of_convolutions(case, core):
    """PEFT's own gradient of two of the factors next to a core is wrong."""
    apply_fn, params, args = case.build(KEY, jnp.float64)
    config = LoHaConfig(r=2, alpha=3, use_effective_conv2d=core, target_modules=r"patch|kernel")
    adapter = drawn(config, find_sites(apply_fn, params, *args))

    @jax.jit
    def both(trainable):
        def loss(trainable):
            out = adapt(apply_fn)(params, adapter.replace(params=trainable), *args)
            return jnp.sum(jnp.sin(out))

        return jax.grad(loss)(trainable), finite_differences(loss, trainable)

    (got,), (want,) = (each.values() for each in both(adapter.params))
    assert set(got) == {f"hada_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b")} | (
        {"hada_t1", "hada_t2"} if core else set()
    )
    for name in got:
        largest = np.abs(want[name]).max()
        assert largest > 0.1, name
        np.testing.assert_allclose(got[name], want[name], atol=1e-6 * largest, err_msg=name)


def matrix(*shape, dtype=jnp.float32):
    """A model that is one weight: with the unit vectors for x it returns the weight itself."""
    params = {"w": normal(*shape, dtype=dtype)}
    subscripts = {2: "bi,io->bo", 3: "bi,ihk->bhk"}[len(shape)]

    def apply_fn(params, x):
        return jnp.einsum(subscripts, x, params["w"])

    return apply_fn, params, jnp.eye(shape[0], dtype=dtype)


def members(count, width, out, dtype=jnp.float32):
    """The same with a stack of weights."""
    params = {"w": normal(count, width, out, dtype=dtype)}
    x = jnp.tile(jnp.eye(width, dtype=dtype)[None], (count, 1, 1))
    return lambda params, x: jnp.einsum("sbi,sio->sbo", x, params["w"]), params, x


def new(config, sites):
    return init_adapter(KEY, config, sites)


def make(model, start=drawn, **fields):
    apply_fn, params, x = model
    config = LoHaConfig(**{"r": 2, "alpha": 3, "target_modules": ["w"], **fields})
    return start(config, find_sites(apply_fn, params, x))


@pytest.mark.usefixtures("x64")
def test_start_is_the_identity():
    params = mlp_params(jnp.float64)
    x = normal(4, 6, seed=9, std=1, dtype=jnp.float64)
    config = LoHaConfig(r=2, target_modules=["up", "down"])
    adapter, adapted = init_adapter(KEY, config, find_sites(mlp, params, x)), adapt(mlp)
    np.testing.assert_allclose(adapted(params, adapter, x), mlp(params, x), rtol=1e-13)
    chex.assert_trees_all_equal(merge(params, adapter), params)

    def loss(trainable):
        return jnp.sum(jnp.sin(adapted(params, adapter.replace(params=trainable), x)))

    slope = jax.grad(loss)(adapter.params)
    moving = {name for own in slope.values() for name, x in own.items() if x.any()}
    assert moving == {"hada_w2_b"}


def check_uniform(array, bound):
    assert 0.97 * bound < float(jnp.abs(array).max()) <= bound
    assert abs(float(array.mean())) < 0.1 * bound
    assert abs(float(array.std()) - bound / math.sqrt(3)) < 0.06 * bound


@pytest.mark.parametrize("identity", [True, False])
def test_bounds_of_the_start(identity):
    model = matrix(200, 300)
    own = make(model, start=new, r=16, init_weights=identity).params["w"]
    bounds = {"hada_w1_a": 1 / 4, "hada_w1_b": 1 / math.sqrt(200), "hada_w2_a": 1 / 4}
    if identity:
        assert not own["hada_w2_b"].any()
    else:
        bounds["hada_w2_b"] = 1 / math.sqrt(200)
    for name, bound in bounds.items():
        check_uniform(own[name], bound)
    assert not np.allclose(own["hada_w1_a"], own["hada_w2_a"])


def test_bounds_of_the_start_with_a_core():
    """PEFT keeps these factors transposed, so that their fan-ins are other axes."""

    def apply_fn(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=dims)

    model = apply_fn, {"w": normal(3, 2, 40, 50)}, jnp.ones((1, 4, 4, 40))
    own = make(model, start=new, r=16, use_effective_conv2d=True, init_weights=False).params["w"]
    shapes = {
        "hada_w1_a": (16, 50),
        "hada_w1_b": (40, 16),
        "hada_t1": (16, 16, 3, 2),
        "hada_w2_a": (16, 50),
        "hada_w2_b": (40, 16),
        "hada_t2": (16, 16, 3, 2),
    }
    assert {name: x.shape for name, x in own.items()} == shapes
    for half in "12":
        check_uniform(own[f"hada_w{half}_a"], 1 / math.sqrt(50))
        check_uniform(own[f"hada_w{half}_b"], 1 / math.sqrt(40))
        check_uniform(own[f"hada_t{half}"], 1 / math.sqrt(16 * 3 * 2))


def test_without_identity():
    model = matrix(40, 30)
    adapter = make(model, start=new, init_weights=False)
    change = merge(model[1], adapter)["w"] - model[1]["w"]
    assert float(jnp.abs(change).max()) > 1e-3


def changes(model, adapter, keys):
    """What the adapter changes about the weight under each of the keys."""
    apply_fn, params, x = model
    adapted = adapt(apply_fn)
    each = jax.jit(jax.vmap(lambda key: adapted(params, adapter.train(key), x)))(keys)
    return np.asarray(each - apply_fn(params, x)[None])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fused", [False, True], ids=["factors", "fused"])
def test_rank_dropout_drops_outputs(fused, monkeypatch):
    """The outputs that stay are divided by their share: of those kept, not of those expected."""
    force(monkeypatch, fused)
    model = matrix(7, 4, 10, dtype=jnp.float64)
    adapter = make(model, rank_dropout=0.4)
    got = changes(model, adapter, jax.random.split(KEY, 8))
    whole = merge(model[1], adapter)["w"] - model[1]["w"]
    kept = np.abs(got).max(axis=1) > 1e-12
    share = kept.mean(axis=(1, 2))
    assert ((share > 0.3) & (share < 0.9)).all()
    want = np.where(kept[:, None], np.asarray(whole)[None] / share[:, None, None, None], 0)
    np.testing.assert_allclose(got, want, atol=1e-10)
    assert len({mask.tobytes() for mask in kept}) == 8, "different keys, different masks"
    assert 0.5 < kept.mean() < 0.7


def test_merging_drops_nothing():
    model = matrix(7, 9)
    adapter = make(model, rank_dropout=0.5, module_dropout=0.5)
    merged = merge(model[1], adapter)
    chex.assert_trees_all_equal(merge(model[1], adapter.train(KEY)), merged)
    plain = make(model)
    np.testing.assert_array_equal(merged["w"], merge(model[1], plain)["w"])


def test_nothing_is_dropped_outside_training():
    apply_fn, params, x = model = matrix(7, 9)
    with_dropout = make(model, rank_dropout=0.5, module_dropout=0.5)
    adapted = adapt(apply_fn)
    np.testing.assert_array_equal(adapted(params, with_dropout, x), adapted(params, make(model), x))


def test_all_outputs_dropped_is_no_change():
    """PEFT divides zero by zero here."""
    apply_fn, params, x = model = matrix(7, 3)
    adapter = make(model, rank_dropout=0.99)
    keys = jax.random.split(KEY, 20)
    kept = np.abs(changes(model, adapter, keys)).max(axis=(1, 2)) > 0
    dropped = adapter.train(keys[int(np.argmin(kept))])
    assert not kept.all()
    np.testing.assert_array_equal(adapt(apply_fn)(params, dropped, x), apply_fn(params, x))

    def loss(trainable):
        return jnp.sum(jnp.sin(adapt(apply_fn)(params, dropped.replace(params=trainable), x)))

    slope = jax.grad(loss)(adapter.params)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(slope))


def test_module_dropout_is_all_or_nothing():
    model = matrix(7, 9)
    adapter = make(model, module_dropout=0.3)
    got = changes(model, adapter, jax.random.split(KEY, 400))
    whole = np.asarray(merge(model[1], adapter)["w"] - model[1]["w"])
    there = np.abs(got).max(axis=(1, 2)) > 1e-5
    np.testing.assert_allclose(got, np.where(there[:, None, None], whole[None], 0), atol=1e-4)
    # Four standard deviations of the mean of 400 draws.
    assert abs(there.mean() - 0.7) < 0.092


def test_stacked_layers_drop_apart():
    model = members(3, 7, 9)
    adapter = make(model, module_dropout=0.5)
    there = np.abs(changes(model, adapter, jax.random.split(KEY, 400))).max(axis=(2, 3)) > 1e-5
    assert there.shape == (400, 3)
    np.testing.assert_allclose(there.mean(axis=0), 0.5, atol=0.1)
    # Of three coins two in eight fall the same.
    assert abs((there == there[:, :1]).all(axis=1).mean() - 0.25) < 0.09

    outputs = make(model, rank_dropout=0.5)
    masks = np.abs(changes(model, outputs, jax.random.split(KEY, 5))).max(axis=2) > 1e-5
    assert len({mask.tobytes() for mask in masks.reshape(15, 9)}) > 12


def dense(d_in, d_out, groups=1):
    return WeightSpec("dense", (d_in,), (d_out,), jnp.dtype(jnp.float32), groups=groups)


SPECS = [dense(40, 30), dense(5, 300), dense(64, 64, groups=4), dense(2400, 2400), dense(1, 1)]


def test_the_rule_is_the_documented_one():
    for spec in SPECS:
        (d_in,), (d_out,), g = spec.in_shape, spec.out_shape, spec.groups
        for r in (1, 2, 5, 16, 40):
            for n in (0, 1, 7, 512, 10**6):
                factors = 6 * n * r**2 * (g * d_in + d_out) + 5 * r**2 * (d_in + d_out)
                fused = (12 * r + 8) * d_in * d_out + 2 * n * d_in * d_out
                assert fusing_is_cheaper(r, spec, n) == (factors > fused)
    # Its limit for many tokens.
    assert fusing_is_cheaper(21, dense(2400, 2400), 10**7)
    assert not fusing_is_cheaper(20, dense(2400, 2400), 10**7)


def test_the_rule_changes_once():
    """Once fusing is cheaper it stays so, for more tokens and for higher ranks."""
    counts = [0, *(2**i for i in range(24))]
    for spec in SPECS:
        in_tokens = [[fusing_is_cheaper(r, spec, n) for n in counts] for r in range(1, 60)]
        for table in (in_tokens, list(zip(*in_tokens, strict=True))):
            assert all(list(row) == sorted(row) for row in table)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("rank", [4, 7, 16])
def test_the_rule_counts_what_the_compiler_counts(rank, monkeypatch):
    """A training step of one layer of 256 x 256 on 512 tokens: the two ways meet at rank 7."""
    width, tokens = 256, 512
    model = apply_fn, params, x = (*matrix(width, width)[:2], jnp.ones((tokens, width)))
    adapter = make(model, r=rank)

    def count(fused):
        force(monkeypatch, fused)

        def step(trainable, x, cotangent):
            def adapted(trainable, x):
                return adapt(apply_fn)(params, adapter.replace(params=trainable), x)

            y, pullback = jax.vjp(adapted, trainable, x)
            return y, pullback(cotangent)

        return flops(step, adapter.params, x, x) - 4 * tokens * width**2

    counted = [count(fused=False), count(fused=True)]
    factors = 12 * tokens * rank**2 * width + 10 * rank**2 * width
    fused = (12 * rank + 8 + 2 * tokens) * width**2
    np.testing.assert_allclose(counted, [factors, fused], rtol=0.02)
    ratio = counted[0] / counted[1]
    assert {4: ratio < 0.5, 7: abs(ratio - 1) < 0.15, 16: ratio > 2}[rank]
    monkeypatch.undo()
    assert fusing_is_cheaper(rank, dense(width, width), tokens) == (rank > 6)


def once(params, x):
    return jnp.tanh(x @ params["w"])


def three_times(params, x):
    return jnp.concatenate([once(params, part) for part in jnp.split(x, 3)])


def over_time(params, x):
    return lax.scan(lambda state, x: (state, once(params, x)), 0, x.reshape(3, -1, 40))[1]


def in_a_loop(params, x):
    def body(i, total):
        return total + once(params, lax.dynamic_slice_in_dim(x, i, len(x) // 3))

    return lax.fori_loop(0, 3, body, jnp.zeros((len(x) // 3, 30)))


@pytest.mark.parametrize("function", [once, three_times, over_time, in_a_loop])
def test_tokens_of_all_uses_decide(function):
    """For 40 x 30 and rank 5 nine tokens are the first that pay for fusing."""
    params = {"w": normal(40, 30)}
    sites = find_sites(function, params, jnp.ones((9, 40)))
    adapter = make((function, params, jnp.ones((9, 40))), r=5)
    assert sum(use.tokens for use in dict(sites.uses)["w"]) == 9
    for tokens, fused in ((6, False), (8, False), (9, True), (12, True)):
        if tokens % 3 and function is not once:
            continue
        jaxpr = jax.make_jaxpr(adapt(function))(params, adapter, jnp.ones((tokens, 40)))
        products = named(jaxpr, "dot_general")
        thin = any(5**2 in var.aval.shape for eqn in products for var in eqn.invars)
        assert thin != fused, tokens


def test_tokens_of_a_stack_are_those_of_one_layer():
    sites = find_sites(scanned, scanned_params(), jnp.ones((5, 6)))
    for uses in dict(sites.uses).values():
        assert [use.tokens for use in uses] == [5]


def test_a_lookup_sends_no_tokens():
    params, ids = {"w": normal(40, 30)}, jnp.zeros((7, 50), jnp.int32)
    sites = find_sites(lambda params, ids: params["w"][ids], params, ids)
    assert sum(use.tokens for use in dict(sites.uses)["w"]) == 0


@pytest.mark.usefixtures("x64")
def test_both_ways_agree(monkeypatch):
    params = mlp_params(jnp.float64)
    x = normal(4, 6, seed=9, std=1, dtype=jnp.float64)
    config = LoHaConfig(r=3, alpha=5, target_modules=["up", "down"])
    adapter = drawn(config, find_sites(mlp, params, x))

    def results(fused):
        force(monkeypatch, fused)

        # A new function each time, so that nothing traced before is taken.
        def loss(trainable, x):
            out = adapt(mlp)(params, adapter.replace(params=trainable), x)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(adapter.params, x)

    chex.assert_trees_all_close(results(False), results(True), rtol=1e-12, atol=1e-12)


def test_after_dropout_of_another_nothing_is_fused(monkeypatch):
    """LoRA's dropout acts on x of its own factors alone, which a fused weight would not have."""
    force(monkeypatch, fused=True)
    apply_fn, params, x = model = matrix(40, 30)
    config = LoraConfig(r=2, lora_dropout=0.5, target_modules=["w"])
    before = drawn(config, find_sites(apply_fn, params, x), std=0.3)
    adapter = make(model, r=5)
    adapted = adapt(apply_fn)
    got = adapted(params, [before.train(KEY), adapter], x)
    alone = adapted(params, before.train(KEY), x)
    want = merge(params, adapter)["w"] - params["w"]
    np.testing.assert_allclose(got - alone, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_halves_come_together_again():
    params, x = mlp_params(), jnp.ones((1, 6))
    sites = find_sites(mlp, params, x)
    config = LoHaConfig(r=2, target_modules=["up"], modules_to_save=["down"])
    adapter = drawn(config, sites, params)
    shared, own = split_loha(adapter)
    assert {module: set(arrays) for module, arrays in shared.items()} == {
        "up": {"hada_w1_a", "hada_w1_b"}
    }
    assert {module: set(arrays) for module, arrays in own.items()} == {
        "up": {"hada_w2_a", "hada_w2_b"},
        "down": {"kernel", "bias"},
    }
    again = join_loha(adapter, shared, own)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    chex.assert_trees_all_equal(again.params, adapter.params)
    doubled = join_loha(adapter, jax.tree.map(lambda x: 2 * x, shared), own)
    np.testing.assert_array_equal(
        doubled.params["up"]["hada_w1_a"], 2 * adapter.params["up"]["hada_w1_a"]
    )
    np.testing.assert_array_equal(
        doubled.params["up"]["hada_w2_a"], adapter.params["up"]["hada_w2_a"]
    )


def test_the_core_is_shared_too():
    apply_fn, params, args = dilated_both_ways.build(KEY, jnp.float32)
    config = LoHaConfig(r=2, use_effective_conv2d=True, target_modules=["kernel"])
    shared, own = split_loha(drawn(config, find_sites(apply_fn, params, *args)))
    assert set(shared["kernel"]) == {"hada_w1_a", "hada_w1_b", "hada_t1"}
    assert set(own["kernel"]) == {"hada_w2_a", "hada_w2_b", "hada_t2"}


def test_halves_that_do_not_fit():
    params, x = mlp_params(), jnp.ones((1, 6))
    sites = find_sites(mlp, params, x)
    config = LoHaConfig(r=2, target_modules=["up", "down"])
    adapter = drawn(config, sites)
    shared, own = split_loha(adapter)
    other = LoHaConfig(r=2, rank_pattern={"down": 3}, target_modules=["up", "down"])
    strange, _ = split_loha(drawn(other, sites))
    with pytest.raises(ValueError, match=r"do not fit the adapter at down: pass what"):
        join_loha(adapter, strange, own)
    with pytest.raises(ValueError, match=r"do not fit the adapter at up:"):
        join_loha(adapter, {"down": shared["down"]}, own)
    with pytest.raises(ValueError, match=r"do not fit the adapter at side:"):
        join_loha(adapter, {**shared, "side": shared["up"]}, own)
    lora = drawn(LoraConfig(target_modules=["up"]), sites)
    with pytest.raises(ValueError, match=r"split_loha needs a LoHa adapter, got one of .*Lora"):
        split_loha(lora)


def test_personalised_federated_learning():
    """Clients with a common pattern that each weighs in its own way: they share one half.

    Every client fits its own least squares; the server averages the halves they share. The
    average of whole adapters fits nobody.
    """
    rng = np.random.default_rng(0)
    params = {"w": normal(6, 8)}
    common = rng.normal(size=(6, 2)) @ rng.normal(size=(2, 8))
    weighed = [rng.normal(size=(6, 1)) @ rng.normal(size=(1, 8)) for _ in range(3)]
    xs = [rng.normal(size=(64, 6)) for _ in weighed]
    tasks = [
        (jnp.asarray(x, jnp.float32), jnp.asarray(x @ (params["w"] + common * own), jnp.float32))
        for x, own in zip(xs, weighed, strict=True)
    ]

    def apply_fn(params, x):
        return x @ params["w"]

    adapted, optimizer = adapt(apply_fn), optax.adam(3e-2)

    @jax.jit
    def loss(adapter, x, y):
        return jnp.mean((adapted(params, adapter, x) - y) ** 2)

    @jax.jit
    def train(adapter, x, y):
        """A few steps at one client."""

        def step(state, _):
            trainable, momenta = state
            slope = jax.grad(lambda p: loss(adapter.replace(params=p), x, y))(trainable)
            updates, momenta = optimizer.update(slope, momenta)
            return (optax.apply_updates(trainable, updates), momenta), None

        state = (adapter.params, optimizer.init(adapter.params))
        return adapter.replace(params=lax.scan(step, state, length=10)[0][0])

    def average(*trees):
        return jax.tree.map(lambda *arrays: sum(arrays) / len(arrays), *trees)

    def share_half(clients):
        halves = [split_loha(client) for client in clients]
        shared = average(*(half for half, _ in halves))
        return [
            join_loha(client, shared, own) for client, (_, own) in zip(clients, halves, strict=True)
        ]

    def share_all(clients):
        mean = average(*(client.params for client in clients))
        return [client.replace(params=mean) for client in clients]

    start = make((apply_fn, params, tasks[0][0]), start=new, r=2, alpha=4)

    def losses(share):
        clients = [start] * len(tasks)
        for _ in range(40):
            clients = [train(client, *task) for client, task in zip(clients, tasks, strict=True)]
            clients = share(clients)
        return clients, [
            float(loss(client, *task)) for client, task in zip(clients, tasks, strict=True)
        ]

    before = [float(loss(start, *task)) for task in tasks]
    with jax.numpy_dtype_promotion("standard"):  # Optax needs it.
        clients, personal = losses(share_half)
        _, together = losses(share_all)
    for at_start, own, same in zip(before, personal, together, strict=True):
        assert own < 0.1 * at_start
        assert own < 0.5 * same
    halves = [split_loha(client) for client in clients]
    chex.assert_trees_all_equal(*(shared for shared, _ in halves))
    assert not np.allclose(halves[0][1]["w"]["hada_w2_a"], halves[1][1]["w"]["hada_w2_a"])


def test_modules_to_save():
    params, x = mlp_params(), normal(4, 6, seed=9, std=1)
    config = LoHaConfig(r=2, target_modules=["up"], modules_to_save=["down"])
    sites = find_sites(mlp, params, x)
    start = init_adapter(KEY, config, sites, params)
    chex.assert_trees_all_equal(start.params["down"], params["down"])
    adapter = drawn(config, sites, params)
    merged = merge(params, adapter)
    chex.assert_trees_all_equal(merged["down"], adapter.params["down"])
    adapted = adapt(mlp)
    np.testing.assert_allclose(adapted(params, adapter, x), mlp(merged, x), atol=1e-4)

    def loss(trainable):
        return jnp.sum(jnp.sin(adapted(params, adapter.replace(params=trainable), x)))

    slope = jax.grad(loss)(adapter.params)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(slope))


def test_defaults_are_pefts():
    data = LoHaConfig().to_dict()
    assert data == {
        "peft_type": "LOHA",
        "r": 8,
        "alpha": 8,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "use_effective_conv2d": False,
        "init_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "base_model_name_or_path": None,
        "revision": None,
        "task_type": None,
    }
    assert LoHaConfig.from_dict(data) == LoHaConfig()


def test_round_trip():
    config = LoHaConfig(
        r=4,
        alpha=16,
        rank_dropout=0.1,
        module_dropout=0.2,
        use_effective_conv2d=True,
        rank_pattern={"q": 4, "k": 2},
        alpha_pattern={"q": 1.5},
        target_modules=["q", "k"],
    )
    again = LoHaConfig.from_dict(config.to_dict())
    assert again == config
    assert hash(again) == hash(config)
    assert list(again.rank_pattern) == ["q", "k"]


@pytest.mark.parametrize("r", [0, -1, 2.5, None])
def test_rank_is_positive(r):
    message = f"`r` should be a positive integer value but the value passed is {r}"
    with pytest.raises(ValueError, match=message):
        LoHaConfig(r=r)
    with pytest.raises(ValueError, match=r"`rank_pattern\['q'\]` should be a positive integer"):
        LoHaConfig(rank_pattern={"k": 1, "q": r})


@pytest.mark.parametrize("field", ["rank_dropout", "module_dropout"])
@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2])
def test_dropouts_are_probabilities_below_one(field, dropout):
    with pytest.raises(ValueError, match=rf"`{field}` must be in \[0, 1\)"):
        LoHaConfig(**{field: dropout})
    assert getattr(LoHaConfig(**{field: 0.999}), field) == 0.999


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_pattern_keys_are_regular_expressions(field):
    with pytest.raises(ValueError, match=f"`{field}` holds 'q\\('"):
        LoHaConfig(**{field: {"q(": 2}})


def test_there_is_no_bias_to_train():
    with pytest.raises(TypeError, match="bias"):
        LoHaConfig(bias="none")
