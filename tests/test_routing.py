"""Banks of adapters: each row with its own, or mixed, against each adapter alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import equations, mlp, mlp_params, normal, scanned, scanned_params
from test_contract import CASES, METHODS, error
from zoo_case import Case

from peftjax import (
    AdaLoraConfig,
    FallbackError,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    adapt,
    convert_to_lora,
    find_sites,
    get_peft_model_state_dict,
    init_adapter,
    merge,
    stack_adapters,
)
from peftjax.engine.routes import RouteError

KEY = jax.random.key(3)
lora = functools.partial(LoraConfig, lora_alpha=5, init_lora_weights=False)


def drawn(adapter, seed=0, std=0.3):
    rng = np.random.default_rng(seed)
    return adapter.replace(
        params=jax.tree.map(
            lambda x: jnp.asarray(std * rng.normal(size=x.shape), x.dtype), adapter.params
        )
    )


def experts(configs, sites, params=None, std=0.3):
    return {
        name: drawn(init_adapter(KEY, config, sites, params), seed, std)
        for seed, (name, config) in enumerate(configs.items())
    }


def each_alone(function, choice, args, axis=0):
    """What every row gives if the whole batch runs with its adapter."""
    outs = {id(adapter): function(adapter, *args) for adapter in choice}
    return jax.tree.map(
        lambda *rows: jnp.stack(
            [jnp.take(row, i, axis=axis) for i, row in enumerate(rows)], axis=axis
        ),
        *[outs[id(adapter)] for adapter in choice],
    )


KINDS_OF = {
    "lora": ["linen_scan_axis1_remat", "linen_tied_embedding", "equinox_conv"],
    "ia3_feedforward": ["linen_scan_axis1_remat", "linen_grouped_conv", "linen_tied_embedding"],
}
SAME_AS_OTHERS = {"everything", "loha", "loha_core", "loha_fused"}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "case"),
    [
        pytest.param(method, case, id=f"{method.name}-{case.name}")
        for method in METHODS
        for case in CASES
        if not method.seldom
        if case.name in KINDS_OF.get(method.name, ["linen_scan_axis1_remat"])
        if method.name not in SAME_AS_OTHERS
    ],
)
def test_each_row_as_if_alone(method, case: Case):
    """Three adapters, and none, over the rows of one batch: values and gradients."""
    with case.rules():
        apply_fn, params, args = case.build(jax.random.key(1), jnp.float64)
        names = {name for name, site in case.sites.items() if method.accepts(site)}
        sites = find_sites(apply_fn, params, *args)
        config = method.config(target_modules=lambda site: site.name in names)
        known = experts(dict.fromkeys("abc", config), sites, params, method.std)
        bank = stack_adapters(known, capacity=4)
        batch = len(jax.tree.leaves(args)[0])
        chosen = ["c", None, "a"][:batch]
        adapted = adapt(apply_fn, on_fallback="error")

        @jax.jit
        def run(trainable, stacked):
            return adapted(params, stacked.replace(params=trainable), *args)

        stacked = bank.rows(chosen)
        out = run(stacked.params, stacked)
        want = each_alone(
            lambda adapter, *args: adapted(params, adapter, *args),
            [known[name] if name else None for name in chosen],
            args,
        )
        assert error(out, want) < 1e-10

        # One adapter learns what its row makes it learn, the unused ones nothing.
        def of_row(out):
            return jnp.sin(jax.tree.leaves(out)[0][0]).sum()

        got = jax.grad(lambda own: of_row(run(own, stacked)))(stacked.params)
        alone = jax.grad(lambda own: of_row(adapted(params, known["c"].replace(params=own), *args)))
        assert error(jax.tree.map(lambda x: x[2], got), alone(known["c"].params)) < 1e-9
        assert not any(jnp.any(x[jnp.array([1, 3])]) for x in jax.tree.leaves(got))


@pytest.fixture(scope="module")
def layered():
    params, x = scanned_params(), normal(3, 5, 6, seed=5)

    sites = find_sites(scanned, params, x)
    known = experts(
        {
            "both": lora(r=2, target_modules=["up", "down"]),
            "some layers": lora(
                r=4, target_modules=["up"], layers_to_transform=[1, 3], rank_pattern={"3.up": 1}
            ),
            "down": lora(r=3, target_modules=["down"]),
        },
        sites,
    )
    return params, x, sites, known


class TestBank:
    def test_ranks_and_targets_and_layers_may_differ(self, layered):
        params, x, _, known = layered
        bank = stack_adapters(known)
        out = adapt(scanned)(params, bank.rows(list(known)), x)
        want = each_alone(
            lambda adapter, x: adapt(scanned)(params, adapter, x), list(known.values()), (x,)
        )
        np.testing.assert_allclose(out, want, atol=1e-5)

    def test_an_expert_comes_out_as_it_went_in(self, layered):
        _, _, _, known = layered
        bank = stack_adapters(known, capacity=5, r=6)
        assert list(bank) == list(known)
        for name, before in known.items():
            after = bank[name]
            assert after.config == before.config
            assert after.sites == before.sites
            assert jax.tree.structure(after) == jax.tree.structure(before)
            for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
                np.testing.assert_array_equal(one, other)

    def test_another_choice_weight_expert_or_scale_is_no_new_program(self, layered):
        params, x, sites, known = layered
        bank = stack_adapters(known, capacity=5, r=6)
        adapted, traces = adapt(scanned), []

        @jax.jit
        def run(adapter, x):
            traces.append(1)
            return adapted(params, adapter, x)

        run(bank.rows([0, 1, -1]), x)
        run(bank.rows(["down", None, "both"]), x)
        late = experts({"late": lora(r=6, target_modules=["down"])}, sites)["late"]
        late = late.replace(
            buffers={m: {n: 7 * b for n, b in own.items()} for m, own in late.buffers.items()}
        )
        more = bank.add("late", late)
        out = run(more.rows(["late", None, "both"]), x)
        np.testing.assert_allclose(out[0], adapted(params, late, x)[0], atol=1e-5)
        gone = more.remove("both")
        assert "both" not in gone
        assert len(gone) == 3
        out = run(gone.rows([-1, "down", "late"]), x)
        np.testing.assert_allclose(out[0], scanned(params, x)[0], atol=1e-6)
        again = gone.add("both", known["late" if "late" in known else "both"])
        np.testing.assert_allclose(
            run(again.rows(["both"] * 3), x), adapted(params, known["both"], x), atol=1e-5
        )
        assert len(traces) == 1

    def test_a_step_costs_what_its_rows_cost(self):
        """However many experts the bank has room for."""
        params, x = mlp_params(), normal(4, 3, 6, std=1)
        sites = find_sites(mlp, params, x)
        every = experts({str(i): lora(r=2, target_modules=["up"]) for i in range(4)}, sites)

        bank = stack_adapters(every, capacity=61)
        jaxpr = jax.make_jaxpr(adapt(mlp))(params, bank.rows(jnp.array([2, 0, -1, 3])), x)
        # What says that buffers have no gradient hands them on as they are.
        computed = [e for e in equations(jaxpr) if e.primitive.name != "custom_jvp_call"]
        made = {n for eqn in computed for var in eqn.outvars for n in var.aval.shape}
        assert 61 not in made, "something is computed of the whole bank"

    @pytest.mark.parametrize("capacity", [2, 5])
    @pytest.mark.parametrize("batch_axes", [None, 0])
    @pytest.mark.parametrize(
        "config",
        [
            lora(r=2),
            lora(r=2, use_dora=True),
            LoHaConfig(r=2, alpha=5),
            HRAConfig(r=2),
            AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5),
            IA3Config(feedforward_modules=[]),
            IA3Config(feedforward_modules=["dense"]),
        ],
        ids=["lora", "dora", "loha", "hra", "adalora", "ia3", "ia3_feedforward"],
    )
    def test_a_row_without_an_expert_is_the_plain_model(self, config, batch_axes, capacity):
        """Whatever the experts are; and one whose expert is not there, or diverged, is NaN."""
        function = lambda params, x: x @ params["dense"]["kernel"]  # noqa: E731
        params, x = {"dense": {"kernel": normal(4, 3)}}, normal(3, 5, 4, seed=1, std=1)
        sites = find_sites(function, params, x)
        config = dataclasses.replace(config, target_modules=["dense"])
        good = experts({"good": config}, sites, params)["good"]
        bad = good.replace(params=jax.tree.map(lambda x: x * jnp.nan, good.params))
        bank = stack_adapters({"bad": bad, "good": good}, capacity=capacity)
        run = adapt(function, batch_axes=batch_axes)
        out = jax.jit(lambda index: run(params, bank.rows(index), x))
        got = out(jnp.array([-1, 1, capacity]))
        assert jnp.allclose(got[0], function(params, x)[0], atol=1e-6)
        assert jnp.isfinite(got[1]).all()
        assert jnp.isnan(got[2]).all()
        assert jnp.isnan(out(jnp.array([-1, 1, 0]))[2]).all()

    def test_mixes_add_up(self, layered):
        params, x, _, known = layered
        bank = stack_adapters(known)
        weights = np.random.default_rng(0).normal(size=(3, 5, 3)).astype(np.float32)
        adapted = jax.jit(adapt(scanned, on_fallback="error"))
        out = adapted(params, bank.mix(weights), x)
        np.testing.assert_allclose(out, _naive_mix(known, params, x, weights), atol=1e-5)
        by_row = adapted(params, bank.mix(weights[:, 0]), x)
        same = np.repeat(weights[:, :1], 5, axis=1)
        np.testing.assert_allclose(by_row, _naive_mix(known, params, x, same), atol=1e-5)
        one = bank.mix(weights[0, 0])
        same = np.broadcast_to(weights[0, 0], (3, 5, 3))
        want = _naive_mix(known, params, x, same)
        np.testing.assert_allclose(adapted(params, one, x), want, atol=1e-5)
        np.testing.assert_allclose(scanned(merge(params, one), x), want, atol=1e-5)

    def test_of_other_families(self, layered):
        params, x, sites, _ = layered
        for config in (
            LoHaConfig(r=2, alpha=5, target_modules=["up", "down"]),
            AdaLoraConfig(init_r=3, lora_alpha=5, target_modules=["up", "down"]),
        ):
            known = experts({"a": config, "b": config}, sites, std=0.6)
            plain = {name: convert_to_lora(adapter) for name, adapter in known.items()}
            weights = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
            got, want = (
                adapt(scanned)(params, stack_adapters(each).mix(weights), x)
                for each in (known, plain)
            )
            np.testing.assert_allclose(got, want, atol=1e-5)

    def test_together_with_other_adapters(self, layered):
        params, x, sites, known = layered
        before = experts({"ia3": IA3Config(target_modules=["up"], feedforward_modules=[])}, sites)
        after = experts(
            {"ia3": IA3Config(target_modules=["up"], feedforward_modules=["up"])}, sites
        )
        order = [before["ia3"], stack_adapters(known).rows(list(known)), after["ia3"]]
        out = adapt(scanned)(params, order, x)
        want = each_alone(
            lambda own, x: adapt(scanned)(params, [order[0], own, order[2]], x),
            list(known.values()),
            (x,),
        )
        np.testing.assert_allclose(out, want, atol=1e-5)

    def test_dropout_of_rows(self, layered):
        params, x, sites, _ = layered
        config = lora(r=2, lora_dropout=0.5, target_modules=["up"])
        bank = stack_adapters(experts({"a": config, "b": config}, sites))
        adapted = adapt(scanned)
        out = adapted(params, bank.rows([0, 1, -1]).train(jax.random.key(1)), x)
        other = adapted(params, bank.rows([0, 1, -1]).train(jax.random.key(2)), x)
        changed = np.abs(out - other).max(axis=(1, 2))
        assert (changed[:2] > 1e-3).all()
        assert changed[2] == 0


@pytest.mark.parametrize("axis", [None, 0])
def test_dropout_of_equal_rows(axis):
    """Every row has its own, of the bank and of an adapter beside it."""
    params, x = {"dense": normal(4, 3)}, jnp.repeat(normal(1, 5, 4, std=1), 3, axis=0)
    function = lambda params, x: x @ params["dense"]  # noqa: E731
    config = lora(r=2, lora_dropout=0.5, target_modules=["dense"])
    one = experts({"a": config}, find_sites(function, params, x))["a"]
    rows = stack_adapters({"a": one}).rows([0, 0, 0])
    adapted, key = adapt(function, batch_axes=axis), jax.random.key(1)
    for own in (rows.train(key), [rows, one.train(key)]):
        out = adapted(params, own, x)
        assert all(jnp.abs(out[i] - out[i - 1]).max() > 1e-3 for i in range(3))


def _naive_mix(known, params, x, weights):
    """The same, written out layer by layer."""

    def change(module, layer, x):
        total = 0
        for place, adapter in enumerate(known.values()):
            if module not in adapter.sites:
                continue
            layers = adapter.sites[module].layers or range(4)
            if layer not in layers:
                continue
            i = list(layers).index(layer)
            a, b = adapter.params[module]["lora_A"][i], adapter.params[module]["lora_B"][i]
            mask = adapter.buffers[module].get("rank_mask")
            a = a if mask is None else a * mask[i][None]
            s = adapter.buffers[module]["scaling"][i]
            total = total + weights[..., place, None] * (s * (x @ a) @ b)
        return total

    for layer in range(4):
        own = jax.tree.map(lambda w, layer=layer: w[layer], params["layers"])
        h = x @ own["up"]["kernel"] + own["up"]["bias"][None, None] + change("layers.up", layer, x)
        h = jnp.tanh(h)
        x = x + h @ own["down"]["kernel"] + change("layers.down", layer, h)
    return x


@pytest.fixture(scope="module")
def pair():
    params = mlp_params()
    sites = find_sites(mlp, params, normal(2, 6))
    both = ["up", "down"]
    return params, experts(
        {"a": lora(r=2, target_modules=both), "b": lora(r=3, target_modules=both)}, sites
    )


class TestLayouts:
    """Which axes hold rows and tokens is told by shapes, or by ``batch_axes``."""

    def test_flattened_tokens(self, pair):
        params, known = pair

        def flat(params, x):
            return mlp(params, x.reshape(-1, 6)).reshape(*x.shape[:2], -1)

        x = normal(2, 7, 6, seed=4)
        stacked, adapted = stack_adapters(known), adapt(flat)
        out = adapted(params, stacked.rows(["b", "a"]), x)
        want = each_alone(lambda own, x: adapted(params, own, x), [known["b"], known["a"]], (x,))
        np.testing.assert_allclose(out, want, atol=1e-6)
        weights = jax.nn.softmax(normal(2, 7, 2, seed=8, std=2))
        np.testing.assert_allclose(
            adapted(params, stacked.mix(weights), x),
            adapt(mlp)(params, stacked.mix(weights), x),
            atol=1e-6,
        )
        np.testing.assert_allclose(
            adapted(params, stacked.mix(weights[:, 0]), x),
            adapted(params, stacked.mix(jnp.repeat(weights[:, :1], 7, axis=1)), x),
            atol=1e-6,
        )

    def test_rows_elsewhere_are_an_error_that_says_what_to_do(self, pair):
        params, known = pair
        x = normal(7, 2, 6, seed=4)
        stacked = stack_adapters(known)
        with pytest.raises(RouteError, match=r"up\.kernel meets dot_general.*batch_axes="):
            adapt(time_major)(params, stacked.rows(["a", "b"]), x)
        with pytest.raises(RouteError, match=r"tokens of shape \(2, 7\)"):
            adapt(time_major)(params, stacked.mix(jnp.ones((2, 7, 2))), x)

    def test_by_row(self, pair):
        params, known = pair
        x = normal(7, 3, 6, seed=4)
        stacked = stack_adapters(known)
        adapted = jax.jit(adapt(time_major, batch_axes=1))
        out = adapted(params, stacked.rows(["b", None, "a"]), x)
        want = each_alone(
            lambda own, x: adapt(time_major)(params, own, x),
            [known["b"], None, known["a"]],
            (x,),
            axis=1,
        )
        np.testing.assert_allclose(out, want, atol=1e-6)
        weights = jax.nn.softmax(normal(3, 7, 2, seed=8, std=2))
        np.testing.assert_allclose(
            adapted(params, stacked.mix(weights), x),
            jnp.swapaxes(adapt(mlp)(params, stacked.mix(weights), jnp.swapaxes(x, 0, 1)), 0, 1),
            atol=1e-6,
        )

    def test_by_row_even_where_the_weight_has_to_be_merged(self, pair):
        params, known = pair
        x = normal(3, 5, 6, seed=4)

        def normalised(params, x):
            kernel = params["up"]["kernel"]
            return mlp({**params, "up": {**params["up"], "kernel": jnp.tanh(kernel)}}, x)

        rows = stack_adapters(known).rows(["b", None, "a"])
        with pytest.raises(FallbackError, match="batch_axes="):
            adapt(normalised)(params, rows, x)
        out = adapt(normalised, batch_axes=0)(params, rows, x)
        want = each_alone(
            lambda own, x: adapt(normalised)(params, own, x),
            [known["b"], None, known["a"]],
            (x,),
        )
        np.testing.assert_allclose(out, want, atol=1e-6)

    def test_as_many_rows_as_positions_are_told_apart(self, pair):
        params, known = pair
        x = normal(3, 3, 6, seed=4)
        rows = stack_adapters(known).rows(["b", None, "a"])
        want = each_alone(
            lambda own, x: adapt(mlp)(params, own, x), [known["b"], None, known["a"]], (x,)
        )
        np.testing.assert_allclose(adapt(mlp)(params, rows, x), want, atol=1e-6)

        def row_by_row(params, x):
            return jax.lax.map(lambda row: mlp(params, row), x)

        with pytest.raises(RouteError, match="batch_axes="):
            adapt(row_by_row)(params, rows, x)
        np.testing.assert_allclose(
            adapt(row_by_row, batch_axes=0)(params, rows, x), want, atol=1e-6
        )

    @pytest.mark.parametrize(
        ("length", "shapes"), [(8, [(2, 4, 8, 3)]), (8, [(2, 4)]), (12, [(2, 6, 12), (2, 4, 12)])]
    )
    def test_positions_are_no_rows_however_many_there_are(self, length, shapes):
        """Eight of them are two rows of four heads by their number alone."""
        params = {"embed": normal(9, 4), "places": normal(16, 4), "dense": normal(4, 5)}

        def function(params, ids, cache):
            h = params["embed"][ids] + params["places"][jnp.arange(ids.shape[1])][None]
            return (jnp.tanh(h).reshape(-1, 4) @ params["dense"]).reshape(*ids.shape, 5)

        args = jnp.arange(2 * length).reshape(2, -1) % 9, [jnp.zeros(shape) for shape in shapes]
        sites, configs = find_sites(function, params, *args), dict.fromkeys("ab", lora(r=2))

        def bank(*targets):
            own = {n: dataclasses.replace(c, target_modules=targets) for n, c in configs.items()}
            return stack_adapters(experts(own, sites))

        with pytest.raises(RouteError, match=r"with \d rows, places meets gather.*batch_axes="):
            adapt(function)(params, bank("places").rows([0, 1]), *args)
        known = bank("places", "embed", "dense")
        want = each_alone(
            lambda own, *args: adapt(function)(params, own, *args), [known["a"], known["b"]], args
        )
        got = adapt(function, batch_axes=0)(params, known.rows([0, 1]), *args)
        np.testing.assert_allclose(got, want, atol=1e-6)
        known = bank("embed", "dense")
        want = each_alone(
            lambda own, *args: adapt(function)(params, own, *args), [known["a"], known["b"]], args
        )
        got = adapt(function)(params, known.rows([0, 1]), *args)
        np.testing.assert_allclose(got, want, atol=1e-6)

    def test_a_mix_whose_positions_are_no_rows(self):
        params = {"embed": normal(9, 4), "places": normal(16, 4)}

        def function(params, ids, cache):
            return params["embed"][ids] + params["places"][jnp.arange(ids.shape[1])][None]

        args = jnp.arange(16).reshape(2, 8) % 9, jnp.zeros((2, 4, 8, 3))
        sites = find_sites(function, params, *args)
        config = lora(r=2, target_modules=["places"])
        mixed = stack_adapters(experts({"a": config, "b": config}, sites)).mix(normal(2, 2))
        with pytest.raises(RouteError, match=r"with \d rows, places meets gather"):
            adapt(function)(params, mixed, *args)

    @pytest.mark.parametrize("how", ["rows", "mix"])
    def test_a_model_with_its_number_of_rows_written_into_it(self, how):
        """It cannot be asked about more of them, whether its reshapes go through or not."""
        params = {"up": normal(6, 8), "out": normal(8, 5)}

        def function(params, x):
            h = jnp.tanh(x.reshape(-1, 6) @ params["up"]).reshape(2, -1, 8)
            return h @ params["out"]

        x = normal(2, 4, 6, std=1)
        sites = find_sites(function, params, x)
        config = lora(r=2, target_modules=["up", "out"])
        bank = stack_adapters(experts({"a": config, "b": config}, sites))
        routed = bank.rows(["a", "b"]) if how == "rows" else bank.mix(jnp.eye(2))
        want = each_alone(
            lambda own, x: adapt(lambda params, x: jnp.tanh(x @ params["up"]) @ params["out"])(
                params, own, x
            ),
            [bank["a"], bank["b"]],
            (x,),
        )
        np.testing.assert_allclose(adapt(function)(params, routed, x), want, atol=1e-5)

    def test_batch_axes_that_do_not_fit(self, pair):
        params, known = pair
        rows = stack_adapters(known).rows(["b", "a"])
        x = normal(7, 3, 6, seed=4)
        with pytest.raises(ValueError, match=r"route \[2\] rows.*\[3\]"):
            adapt(time_major, batch_axes=1)(params, rows, x)
        with pytest.raises(ValueError, match="no prefix"):
            adapt(time_major, batch_axes=(1, 0))(params, rows, x)
        with pytest.raises(RouteError, match="axis of rows"):
            adapt(lambda params, x: mlp(params, x).sum(), batch_axes=0)(
                params, rows, normal(2, 3, 6)
            )


def time_major(params, x):
    """The same of (sequence, batch, features), which it flattens."""
    return mlp(params, x.reshape(-1, 6)).reshape(*x.shape[:2], -1)


@pytest.fixture(scope="module")
def made():
    params, x = mlp_params(), normal(2, 6)
    sites = find_sites(mlp, params, x)

    def make(config):
        return init_adapter(KEY, config, sites, params)

    return params, x, make


class TestMistakes:
    def test_of_other_families_or_programs(self, made):
        _, _, make = made
        one = make(lora(r=2, target_modules=["up"]))
        for other, message in (
            (make(HRAConfig(r=2, target_modules=["up"])), "one family"),
            (make(lora(r=2, target_modules=["up"], lora_dropout=0.1)), "`lora_dropout`"),
            (make(lora(r=2, target_modules=["up"], use_dora=True)), "`use_dora`"),
            (make(lora(r=2, target_modules=["up"], bias="all")), "whole leaves"),
            (
                make(LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa")),
                "keep their start",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                stack_adapters({"one": one, "other": other})

    def test_of_another_model(self, made):
        _, _, make = made
        params = {"up": {"kernel": normal(6, 8), "bias": normal(8)}, "down": mlp_params()["down"]}
        params["down"] = {"kernel": normal(8, 5), "bias": normal(5)}
        sites = find_sites(mlp, params, normal(2, 6))
        other = init_adapter(KEY, lora(r=2, target_modules=["up"]), sites)
        one = make(lora(r=2, target_modules=["up"]))
        with pytest.raises(ValueError, match="another model"):
            stack_adapters({"one": one, "other": other})
        with pytest.raises(ValueError, match="another model"):
            stack_adapters({"one": one}, capacity=2).add("other", other)

    def test_added_as_strictly_as_stacked(self):
        params, x = {"square": normal(4, 4)}, normal(2, 4)

        def make(function, dtype=None, **fields):
            config = LoraConfig(r=2, target_modules=["square"], **fields)
            return init_adapter(KEY, config, find_sites(function, params, x), params, dtype=dtype)

        def plain(params, x):
            return x @ params["square"]

        bank = stack_adapters({"one": make(plain)}, capacity=2)
        with pytest.raises(ValueError, match=r"square: other was made for another model"):
            bank.add("other", make(lambda params, x: x @ params["square"].T))
        with pytest.raises(ValueError, match="keep their start"):
            bank.add("other", make(plain, init_lora_weights="pissa"))
        half = stack_adapters({"one": make(plain, "bfloat16")}, capacity=2)
        with pytest.raises(ValueError, match="lora_A of other is float32, and bfloat16 in the"):
            half.add("other", make(plain))
        assert bank.add("other", half["one"])["other"].params["square"]["lora_A"].dtype == "float32"

    def test_no_room(self, made):
        _, _, make = made
        one, two = (make(lora(r=r, target_modules=["up"])) for r in (2, 3))
        bank = stack_adapters({"one": one}, capacity=2)
        with pytest.raises(ValueError, match="larger r"):
            bank.add("two", two)
        with pytest.raises(ValueError, match="no room"):
            bank.add("down", make(lora(r=2, target_modules=["down"])))
        full = bank.add("two", one)
        with pytest.raises(ValueError, match="capacity="):
            full.add("three", one)
        with pytest.raises(ValueError, match="do not fit into a capacity of 1"):
            stack_adapters({"one": one, "two": one}, capacity=1)
        with pytest.raises(ValueError, match="rank 3 does not fit into r=2"):
            stack_adapters({"two": two}, r=2)

    def test_rows_and_weights_of_other_numbers(self, made):
        params, x, make = made
        bank = stack_adapters({"one": make(lora(r=2, target_modules=["up"]))}, capacity=2)
        with pytest.raises(ValueError, match="no expert at"):
            bank.rows([0, 1])
        with pytest.raises(KeyError, match="no expert 'two'"):
            bank.rows(["one", "two"])
        with pytest.raises(ValueError, match="vector of integers"):
            bank.rows(jnp.zeros((2, 2), int))
        with pytest.raises(ValueError, match="2 experts have shape"):
            bank.mix([1.0, 2.0, 3.0])
        with pytest.raises(RouteError, match="3 rows"):
            adapt(mlp)(params, bank.rows([0, 0, 0]), x)
        # What only a run can see is loud, too.
        beyond = jax.jit(lambda i: adapt(mlp)(params, bank.rows(i), x))(jnp.array([5, 0]))
        assert np.isnan(beyond[0]).all()
        assert np.isfinite(beyond[1]).all()

    @pytest.mark.parametrize("dtype", ["uint8", "uint32", "int8"])
    @pytest.mark.parametrize("capacity", [2, 5])
    def test_rows_of_any_integers(self, made, dtype, capacity):
        params, x, make = made
        one = drawn(make(lora(r=2, target_modules=["up"])))
        bank = stack_adapters({"other": drawn(one, 1), "one": one}, capacity=capacity)
        run = lambda index: adapt(mlp)(params, bank.rows(index), x)  # noqa: E731
        index = jnp.array([1, 1], dtype)
        for out in (run(index), run(np.asarray(index)), jax.jit(run)(index)):
            np.testing.assert_allclose(out, adapt(mlp)(params, one, x), atol=1e-6)
        beyond = jax.jit(run)(jnp.array([1, 7], dtype))
        assert np.isfinite(beyond[0]).all()
        assert np.isnan(beyond[1]).all()

    def test_what_cannot_be_mixed_or_merged(self, made):
        params, x, make = made
        bank = stack_adapters({"a": make(HRAConfig(r=2, target_modules=["up"]))})
        with pytest.raises(ValueError, match=r"HRAConfig.*choose them by row"):
            bank.mix([1.0])
        rows = stack_adapters({"a": make(lora(r=2, target_modules=["up"]))}).rows([0, 0])
        with pytest.raises(ValueError, match="no merged weight"):
            merge(params, rows)
        with pytest.raises(ValueError, match=r"bank\.rows\(index\)"):
            adapt(mlp)(params, rows.replace(route=None), x)
        for function in (convert_to_lora, get_peft_model_state_dict):
            with pytest.raises(ValueError, match=r"bank\[name\]"):
                function(rows)
        after = make(lora(r=2, target_modules=["up"], use_dora=True))
        with pytest.raises(ValueError, match="put it first"):
            adapt(mlp)(params, [rows, after], x)
