"""The rank allocator: its rule, its schedule, what it goes with, and what is left after pruning."""

import bisect
import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import mlp, mlp_params, normal, redraw, scanned, scanned_params

from peftjax import (
    AdaLoraConfig,
    LoraConfig,
    adapt,
    find_sites,
    init_adapter,
    merge,
    orthogonality,
    prune,
    rank_allocator,
    ranks,
)
from peftjax.checkpoint import restore_adapter, save_adapter
from peftjax.training.allocator import _drops

KEY = jax.random.key(0)
LR = 0.05
SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 5, "total_step": 24}
FREEZE = 19
HOUSE = {
    "table": normal(7, 6),
    "q": normal(6, 2, 3, seed=1),
    "conv": normal(3, 6, 4, seed=2),
    "experts": normal(2, 3, 6, 4, seed=3),
    **scanned_params(),
}
IDS = jnp.arange(5, dtype=jnp.int32)


def house(params, ids):
    """A lookup, scanned layers, a weight of three axes, a convolution, and two axes of experts."""
    h = scanned(params, params["table"][ids])
    q = jnp.einsum("bi,ihk->bhk", h, params["q"])
    dims = ("NWC", "WIO", "NWC")
    conv = lax.conv_general_dilated(h[None], params["conv"], (1,), "SAME", dimension_numbers=dims)
    spread = jnp.broadcast_to(h, (2, 3, *h.shape))
    return q, conv, jnp.einsum("lebi,leio->lebo", spread, params["experts"])


@functools.cache
def house_sites():
    return find_sites(house, HOUSE, IDS)


@functools.cache
def mlp_sites():
    return find_sites(mlp, mlp_params(), jnp.ones((1, 6)))


def drawn(sites, dtype=None, base=None, **fields):
    """An adapter with all its arrays drawn; its own start is never computed."""
    config = AdaLoraConfig(**{**SCHEDULE, **fields})

    def make():
        return init_adapter(KEY, config, sites, base, dtype=dtype)

    shapes, buffers = jax.eval_shape(make), jax.jit(lambda: make().buffers)()
    return shapes.replace(params=redraw(shapes.params), buffers=buffers)


def every(sites, **fields):
    return drawn(sites, target_modules=list(sites), **fields)


def gradients(params, step):
    """The gradients of a step, drawn."""
    return redraw(params, seed=1000 + 100 * step)


def optaxs(optimizer):
    """An optimizer of optax's, many of which rely on promotion: ours, inside or around, may not."""

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def adam():
    return optaxs(optax.adam(LR))


def stepper(optimizer):
    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(optimizer, params, steps, gradients=gradients):
    """Params and state after each of the steps."""
    step, state = stepper(optimizer), optimizer.init(params)
    after = []
    for i in range(steps):
        params, state = step(params, state, gradients(params, i))
        after.append((params, state))
    return after


def budget_of(step, first, last, tinit, tfinal, total_step):
    if step <= tinit:
        return first
    if step > total_step - tfinal:
        return last
    left = 1 - (step - tinit) / (total_step - tfinal - tinit)
    return int((first - last) * left**3 + last)


def score_of(own):
    """The scores of one weight's or stack's triplets, one after the other."""
    scores = np.zeros(own["lora_E"].shape, np.float32)
    for place in np.ndindex(scores.shape):
        *layer, k = place
        a, b = own["lora_A"][tuple(layer)], own["lora_B"][tuple(layer)]
        scores[place] = own["lora_E"][place] + a[..., k].mean() + b[k].mean()
    return scores


def by_the_rule(adapter, steps, lr=LR):
    """Budget, masks, params and averages after each step of plain SGD, in NumPy and float32."""
    config = adapter.config
    params = jax.tree.map(np.array, adapter.params)
    average = jax.tree.map(np.zeros_like, params)
    spread = jax.tree.map(np.zeros_like, params)
    kept = {name: np.ones(own["lora_E"].shape, bool) for name, own in params.items()}
    first = sum(mask.size for mask in kept.values())
    last = first * config.target_r // config.init_r
    freeze = config.total_step - config.tfinal
    beta1, beta2 = np.float32(config.beta1), np.float32(config.beta2)
    for step in range(steps):
        slopes = jax.tree.map(np.asarray, gradients(adapter.params, step))
        params = jax.tree.map(lambda p, g: p - np.float32(lr) * g, params, slopes)
        if step < freeze:
            now = jax.tree.map(lambda p, g: np.abs(p * g), params, slopes)
            average = jax.tree.map(lambda i, n: beta1 * i + (1 - beta1) * n, average, now)
            spread = jax.tree.map(
                lambda u, n, i: beta2 * u + (1 - beta2) * np.abs(n - i), spread, now, average
            )
        budget = budget_of(step, first, last, config.tinit, config.tfinal, config.total_step)
        if config.tinit < step <= freeze and (step % config.deltaT == 0 or step == freeze):
            entries = jax.tree.map(np.multiply, average, spread)
            scores = {name: score_of(own) for name, own in entries.items()}
            order = np.sort(np.concatenate([score.ravel() for score in scores.values()]))
            threshold, following = order[first - budget - 1], order[first - budget]
            assert following - threshold > 1e-5 * following, "rounding would decide"
            kept = {name: score > threshold for name, score in scores.items()}
        if step > freeze or (step > config.tinit and step % config.deltaT == 0) or step == freeze:
            for name, mask in kept.items():
                params[name]["lora_E"] = np.where(mask, params[name]["lora_E"], 0)
        yield budget, kept, jax.tree.map(np.copy, params), (average, spread)


@pytest.mark.parametrize("interval", [1, 4])
def test_rule_for_every_kind_of_weight(interval):
    adapter = every(house_sites(), deltaT=interval)
    after = train(rank_allocator(optax.sgd(LR), adapter), adapter.params, 24)
    steps = zip(after, by_the_rule(adapter, 24), strict=True)
    for (params, state), (budget, kept, want, averages) in steps:
        assert int(state.budget) == budget
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, state.kept), kept)
        chex.assert_trees_all_close(params, want, rtol=0, atol=1e-6)
        got = (state.sensitivity, state.uncertainty)
        chex.assert_trees_all_close(got, averages, rtol=0, atol=1e-6)
    chex.assert_shape(state.kept["experts"], (2, 3, 4))
    assert sum(mask.sum() for mask in kept.values()) == 2 * (3 + 6 + 8)


def unrolled(params, x):
    for own in params["layers"].values():
        h = jnp.tanh(x @ own["up"]["kernel"] + own["up"]["bias"][None])
        x = x + h @ own["down"]["kernel"]
    return x


def slices(tree):
    """The arrays of the stacked modules as those of single layers."""
    return {
        name.replace("layers", f"layers.{i}"): {n: x[i] for n, x in own.items()}
        for name, own in tree.items()
        for i in range(4)
    }


def test_scanned_layers_are_as_good_as_single_ones():
    x, params = normal(3, 6, std=1), scanned_params()
    stacked = every(find_sites(scanned, params, x))
    single = {str(i): jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(4)}
    sites = find_sites(unrolled, {"layers": single}, x)
    assert len(sites) == 8
    one_by_one = every(sites).replace(params=slices(stacked.params))
    after = train(rank_allocator(adam(), stacked), stacked.params, 24)
    others = train(
        rank_allocator(adam(), one_by_one),
        one_by_one.params,
        24,
        lambda params, step: slices(gradients(stacked.params, step)),
    )
    for (params, state), (own_params, own_state) in zip(after, others, strict=True):
        assert int(state.budget) == int(own_state.budget)
        got, want = ranks(stacked, state), ranks(one_by_one, own_state)
        for name, count in want.items():
            _, layer, module = name.split(".")
            assert count == got[f"layers.{module}"][int(layer)]
        chex.assert_trees_all_close(slices(params), own_params, rtol=0, atol=1e-6)
    assert len(set(want.values())) > 1


SCHEDULES = [(0, 0, 24, 4, 1), (3, 5, 24, 4, 2), (10, 1, 12, 4, 0), (0, 11, 13, 4, 3)]


@pytest.mark.parametrize(("tinit", "tfinal", "total", "first", "last"), SCHEDULES)
def test_budget_is_the_formula(tinit, tfinal, total, first, last):
    """At every step, also of a training longer than was said, and for any ``deltaT``."""
    fields = {"init_r": first, "target_r": last}
    fields |= {"tinit": tinit, "tfinal": tfinal, "total_step": total, "deltaT": 3}
    adapter = every(mlp_sites(), **fields)
    after = train(rank_allocator(optax.sgd(LR), adapter), adapter.params, total + 3)
    got = [int(state.budget) for _, state in after]
    want = [budget_of(i, 2 * first, 2 * last, tinit, tfinal, total) for i in range(total + 3)]
    assert got == want
    assert (got[0], got[-1]) == (2 * first, 2 * last)


@pytest.mark.parametrize(
    ("first", "last", "tinit", "tfinal", "total"),
    [
        (12 * 72, 8 * 72, 0, 0, 100_000),
        (12 * 72, 8 * 72, 5_000, 20_000, 100_000),
        (3 * 500, 1 * 500, 123, 4_567, 100_000),
        (10, 7, 99_000, 0, 100_000),
        (2_000, 0, 1, 1, 1_000),
    ],
)
def test_budget_of_long_schedules(first, last, tinit, tfinal, total):
    """The steps where a triplet goes say the budget of every step, without rounding."""
    config = AdaLoraConfig(tinit=tinit, tfinal=tfinal, total_step=total)
    drops = _drops(config, first, last)
    assert len(drops) == first - last
    assert drops == sorted(drops)
    near = {step + off for step in drops for off in (-1, 0, 1)}
    for step in near | set(range(0, total, 997)) | {0, tinit, tinit + 1, total - tfinal, total}:
        got = first - bisect.bisect_right(drops, step)
        assert got == budget_of(step, first, last, tinit, tfinal, total), step


def test_a_whole_training_compiles_once():
    """Buffers, keys and steps are traced, and so are all three phases."""
    chex.clear_trace_counter()
    params, x, y = mlp_params(), normal(8, 6, std=1), normal(8, 5, seed=4)
    adapter = every(mlp_sites(), total_step=30, lora_dropout=0.1)
    optimizer = rank_allocator(adam(), adapter)
    adapted = adapt(mlp)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(adapter, state, key):
        def loss(trainable):
            current = adapter.replace(params=trainable).train(key)
            out = adapted(params, current, x)
            return jnp.square(out - y).mean() + 0.01 * orthogonality(current)

        value, slope = jax.value_and_grad(loss)(adapter.params)
        updates, state = optimizer.update(slope, state, adapter.params)
        return adapter.replace(params=optax.apply_updates(adapter.params, updates)), state, value

    state = optimizer.init(adapter.params)
    values = []
    for i in range(32):
        adapter, state, value = step(adapter, state, jax.random.fold_in(KEY, i))
        values.append(float(value))
    assert step._cache_size() == 1
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
    assert sum(ranks(adapter, state).values()) == 2 * 2
    assert all(np.isfinite(values))


def choices(after):
    return [jax.tree.map(np.asarray, state.kept) for _, state in after]


def test_accumulated_gradients():
    """One allocation for each accumulated step, on the averaged gradients."""
    adapter = every(mlp_sites())
    optimizer = rank_allocator(adam(), adapter)
    many = optaxs(optax.MultiSteps(optimizer, every_k_schedule=2))
    after = train(many, adapter.params, 2 * 24)

    def averaged(params, step):
        pair = (gradients(params, 2 * step + i) for i in range(2))
        return jax.tree.map(lambda a, b: (a + b) / 2, *pair)

    want = train(optimizer, adapter.params, 24, averaged)
    for i, (_, state) in enumerate(after):
        assert int(state.inner_opt_state.step) == (i + 1) // 2
    for (params, state), (own_params, own_state) in zip(after[1::2], want, strict=True):
        chex.assert_trees_all_equal(state.inner_opt_state.kept, own_state.kept)
        assert ranks(adapter, state) == ranks(adapter, own_state)
        chex.assert_trees_all_close(params, own_params, rtol=0, atol=1e-6)
    assert sum(ranks(adapter, state).values()) == 4


def test_whole_leaves_under_another_label():
    """Saved modules and biases learn in another way, next to the triplets or in their module."""
    params = mlp_params()
    fields = {"target_modules": ["up"], "bias": "lora_only", "modules_to_save": ["down"]}
    adapter = drawn(mlp_sites(), base=params, **fields)
    assert set(adapter.params["up"]) == {"lora_A", "lora_E", "lora_B", "bias"}
    labels = {
        module: {name: "triplets" if name.startswith("lora_") else "whole" for name in own}
        for module, own in adapter.params.items()
    }
    parts = {"triplets": rank_allocator(adam(), adapter), "whole": optax.sgd(LR)}
    after = train(optax.partition(parts, labels), adapter.params, 24)

    def alone(tree):
        return {"up": {name: tree["up"][name] for name in ("lora_A", "lora_E", "lora_B")}}

    want = train(
        rank_allocator(adam(), adapter),
        alone(adapter.params),
        24,
        lambda _, step: alone(gradients(adapter.params, step)),
    )
    expected = adapter.params
    for step, ((params, state), (own, own_state)) in enumerate(zip(after, want, strict=True)):
        assert ranks(adapter, state) == ranks(adapter, own_state)
        chex.assert_trees_all_close(alone(params), own, rtol=0, atol=1e-6)
        slopes = gradients(expected, step)
        expected = jax.tree.map(lambda p, g: p - LR * g, expected, slopes)
        chex.assert_trees_all_close(params["down"], expected["down"], rtol=0, atol=1e-6)
        chex.assert_trees_all_close(params["up"]["bias"], expected["up"]["bias"], rtol=0, atol=1e-6)
    assert ranks(adapter, state) == {"up": 2}
    pruned = prune(adapter.replace(params=params), state)
    chex.assert_trees_all_equal(pruned.params["down"], params["down"])
    chex.assert_shape(pruned.params["up"]["lora_A"], (6, 2))
    np.testing.assert_array_equal(pruned.params["up"]["bias"], params["up"]["bias"])


def test_everything_else_goes_inside():
    adapter = every(mlp_sites())
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LR, weight_decay=0.1))
    after = train(rank_allocator(optaxs(inner), adapter), adapter.params, 24)
    for step, (params, state) in enumerate(after):
        counts = ranks(adapter, state)
        if step > SCHEDULE["tinit"]:
            for name, own in params.items():
                assert int((own["lora_E"] != 0).sum()) == counts[name]
    assert sum(counts.values()) == 4
    chex.assert_tree_all_finite(params)


def test_something_around_it_is_found_out():
    adapter = every(mlp_sites())
    outer = optax.chain(rank_allocator(adam(), adapter), optax.scale(0.5))
    after = train(outer, adapter.params, 8)
    for _, state in after[: SCHEDULE["tinit"] + 1]:
        assert ranks(adapter, state) == {"up": 4, "down": 4}
    for function in (ranks, prune):
        with pytest.raises(ValueError, match="something around it changed its updates"):
            function(adapter, after[-1][1])
    # Once is enough, whatever comes later.
    honest = stepper(rank_allocator(adam(), adapter))
    params, (state, _) = after[-1]
    for step in range(8, 24):
        params, state = honest(params, state, gradients(params, step))
    with pytest.raises(ValueError, match="something around it changed its updates"):
        ranks(adapter, state)


def test_in_a_larger_tree():
    adapter = every(mlp_sites())
    optimizer = rank_allocator(adam(), adapter)
    head = {"kernel": normal(5, 3), "lora_A": normal(3)}

    def both(params, step):
        return {"adapter": gradients(params["adapter"], step), "head": redraw(head, seed=step)}

    after = train(optimizer, {"adapter": adapter.params, "head": head}, 24, both)
    want = train(optimizer, adapter.params, 24)
    chex.assert_trees_all_equal(choices(after), choices(want))
    chex.assert_trees_all_equal(after[-1][0]["adapter"], want[-1][0])
    assert np.abs(after[-1][0]["head"]["lora_A"] - head["lora_A"]).min() > 0
    assert ranks(adapter, after[-1][1]) == ranks(adapter, want[-1][1])


def test_triplets_are_there_once():
    adapter = every(mlp_sites())
    optimizer = rank_allocator(optax.sgd(LR), adapter)
    state = optimizer.init(adapter.params)
    with pytest.raises(ValueError, match=r"down\.lora_A is not among the params"):
        optimizer.init({"up": adapter.params["up"]})
    less = {name: dict(own) for name, own in adapter.params.items()}
    del less["up"]["lora_E"]
    with pytest.raises(ValueError, match=r"up\.lora_E is not among the params"):
        optimizer.update(less, state, less)
    with pytest.raises(ValueError, match=r"\.lora_[AEB] is in the params twice"):
        optimizer.init({"one": adapter.params, "two": adapter.params})
    with pytest.raises(ValueError, match="needs the params"):
        optimizer.update(adapter.params, state)


def test_what_belongs_together():
    adapter = every(mlp_sites())
    optimizer = rank_allocator(optax.sgd(LR), adapter)
    state = optimizer.init(adapter.params)
    assert ranks(adapter, (optax.EmptyState(), {"mine": state})) == {"up": 4, "down": 4}
    with pytest.raises(ValueError, match=r"expected one state of rank_allocator .* found 0"):
        ranks(adapter, adam().init(adapter.params))
    with pytest.raises(ValueError, match=r"expected one state of rank_allocator .* found 2"):
        prune(adapter, (state, state))
    other = drawn(mlp_sites(), target_modules=["up"])
    with pytest.raises(ValueError, match="belongs to an adapter of other modules"):
        ranks(other, state)
    for function in (ranks, prune):
        with pytest.raises(ValueError, match=r"^down: .* shape \(4,\), .* shape \(6,\)"):
            function(every(mlp_sites(), init_r=6), state)
    lora = init_adapter(KEY, LoraConfig(target_modules=["up"]), mlp_sites())
    for function in (
        lambda: rank_allocator(optax.sgd(LR), lora),
        lambda: ranks(lora, state),
        lambda: prune(lora, state),
    ):
        with pytest.raises(ValueError, match="AdaLoraConfig, got one of LoraConfig"):
            function()
    with pytest.raises(ValueError, match="`total_step`"):
        rank_allocator(optax.sgd(LR), every(mlp_sites(), total_step=None, tinit=0, tfinal=0))


def dropped(params, kept):
    """The singular values that the last allocation did not keep."""
    pairs = [(np.asarray(params[name]["lora_E"]), ~np.asarray(mask)) for name, mask in kept.items()]
    return np.concatenate([values[mask] for values, mask in pairs])


@pytest.mark.parametrize("strict", [False, True])
def test_momentum_revives_between_allocations(strict):
    """By default as in PEFT; with ``strict`` never, and in the last phase never either way."""
    adapter = every(mlp_sites(), deltaT=4)
    optimizer = rank_allocator(adam(), adapter, strict=strict)
    after = train(optimizer, adapter.params, 28)
    revived = 0
    for step, (params, state) in enumerate(after):
        gone = dropped(params, state.kept)
        allocates = SCHEDULE["tinit"] < step and (step % 4 == 0 or step >= FREEZE)
        if allocates or strict:
            assert not gone.any(), step
        else:
            revived += int((gone != 0).sum())
    assert (revived > 10) != strict
    assert gone.size == 4
    assert sum(ranks(adapter, state).values()) == 2 * SCHEDULE["target_r"]
    chex.assert_trees_all_equal(*(after[i][1].kept for i in (FREEZE, -1)))
    chex.assert_trees_all_equal(*(after[i][1].sensitivity for i in (FREEZE - 1, -1)))


@pytest.mark.parametrize("strict", [False, True])
def test_half_precision(strict):
    """The statistics are float32, zeros are zeros, and nothing trains the scale, as PEFT does."""
    adapter = every(mlp_sites(), dtype=jnp.bfloat16)
    optimizer = rank_allocator(optaxs(optax.adamw(LR)), adapter, strict=strict)
    adapted, params, x = adapt(mlp), mlp_params(), normal(8, 6, std=1)

    @jax.jit
    def slopes(trainable):
        def loss(trainable):
            return jnp.square(adapted(params, adapter.replace(params=trainable), x)).mean()

        return jax.grad(loss)(trainable)

    after = train(optimizer, adapter.params, 24, lambda trainable, _: slopes(trainable))
    for step, (params_now, state) in enumerate(after):
        chex.assert_trees_all_equal_dtypes(params_now, adapter.params)
        chex.assert_type(jax.tree.leaves((state.sensitivity, state.uncertainty)), jnp.float32)
        if step > SCHEDULE["tinit"]:
            assert not dropped(params_now, state.kept).any()
    assert int(state.budget) == 4
    assert 0 < sum(ranks(adapter, state).values()) <= 4
    chex.assert_tree_all_finite(params_now)
    assert {str(x.dtype) for x in jax.tree.leaves(adapter.params)} == {"bfloat16"}
    for own in adapter.buffers.values():
        assert own["scaling"] == jnp.asarray(8 / (4 + 1e-5), jnp.float32)
    pruned = prune(adapter.replace(params=params_now), state)
    chex.assert_trees_all_equal_dtypes(pruned.params, adapter.params)


@pytest.mark.parametrize("target", [4, 7])
def test_a_target_above_the_start_drops_nothing(target):
    adapter = every(mlp_sites(), target_r=target)
    optimizer = rank_allocator(adam(), adapter)
    after = train(optimizer, adapter.params, 26)
    plain = train(adam(), adapter.params, 26)
    for (params, state), (want, _) in zip(after, plain, strict=True):
        chex.assert_trees_all_close(params, want, rtol=0, atol=1e-7)
        assert ranks(adapter, state) == {"up": 4, "down": 4}
        assert int(state.budget) == 8
    pattern = prune(adapter, state).config.to_dict()["rank_pattern"]
    assert pattern == {"up.lora_E": [True] * 4, "down.lora_E": [True] * 4}


def slow_for_q(params, step):
    """Gradients that leave one module nothing, and the layers of the others unequal ranks."""
    slopes = gradients(params, step)
    return slopes | {"q": jax.tree.map(lambda g: 1e-3 * g, slopes["q"])}


def trained(adapter, gradients=gradients):
    """The adapter after its last allocation, and the state of the allocator."""
    optimizer = rank_allocator(optax.sgd(LR), adapter)
    params, state = train(optimizer, adapter.params, FREEZE + 2, gradients)[-1]
    return adapter.replace(params=params), state


SOME_LEFT = pytest.mark.parametrize("left", [True, False], ids=["some of each", "nothing of q"])


@functools.cache
def trained_house(left):
    """With triplets of every module left, or none of one."""
    adapter, state = trained(every(house_sites()), gradients if left else slow_for_q)
    assert (ranks(adapter, state)["q"] > 0) == left
    return adapter, state


run_house, merge_house = jax.jit(adapt(house)), jax.jit(merge)


def outputs(adapter):
    return run_house(HOUSE, adapter, IDS)


def check_pruned(before, state, after):
    """What is left fits what was kept, and does the same."""
    chex.assert_trees_all_close(outputs(after), outputs(before), rtol=1e-6, atol=1e-6)
    merged, wanted = (merge_house(HOUSE, adapter) for adapter in (after, before))
    chex.assert_trees_all_close(merged, wanted, rtol=1e-6, atol=1e-6)
    for name, count in ranks(before, state).items():
        own = after.params[name]
        assert own["lora_E"].shape[-1] == np.max(count)
        assert own["lora_A"].shape == (*before.params[name]["lora_A"].shape[:-1], np.max(count))
        if np.ndim(count):
            masked = after.buffers[name]["rank_mask"].sum(axis=-1)
            np.testing.assert_array_equal(masked, np.asarray(count, np.float32))
        else:
            assert "rank_mask" not in after.buffers[name]


@SOME_LEFT
def test_pruned_is_smaller_and_does_the_same(left):
    """A lookup, a convolution, stacks of unequal ranks, and a module of which nothing is left."""
    adapter, state = trained_house(left)
    pruned = prune(adapter, state)
    check_pruned(adapter, state, pruned)
    counts = ranks(adapter, state)
    chex.assert_shape(counts["experts"], (2, 3))
    assert len(set(counts["experts"].ravel().tolist())) > 1
    assert len(set(counts["layers.up"].tolist())) > 1
    size = [sum(x.size for x in jax.tree.leaves(a.params)) for a in (adapter, pruned)]
    assert size[1] < 0.9 * size[0]
    assert pruned.config == dataclasses.replace(
        adapter.config, rank_pattern=pruned.config.rank_pattern
    )
    for name, own in pruned.buffers.items():
        np.testing.assert_array_equal(own["scaling"], adapter.buffers[name]["scaling"])


def test_pattern_is_what_peft_writes():
    adapter, state = trained_house(left=False)
    config = prune(adapter, state).config
    data = json.loads(json.dumps(config.to_dict()))
    assert data["rank_pattern"] == {
        f"{name}.lora_E": np.asarray(mask).tolist() for name, mask in state.kept.items()
    }
    assert data["rank_pattern"]["q.lora_E"] == [False] * 4
    assert np.shape(data["rank_pattern"]["experts.lora_E"]) == (2, 3, 4)
    again = AdaLoraConfig.from_dict(data)
    assert again == config
    assert hash(again) == hash(config)


@SOME_LEFT
def test_pruned_on_disk(left, tmp_path):
    adapter, state = trained_house(left)
    pruned = prune(adapter, state)
    save_adapter(tmp_path, pruned)
    written = AdaLoraConfig.from_dict(json.loads((tmp_path / "adapter.json").read_text())["config"])
    like = jax.eval_shape(lambda: init_adapter(KEY, written, house_sites()))
    chex.assert_trees_all_equal_shapes_and_dtypes(like, pruned)
    found = restore_adapter(tmp_path, like)
    chex.assert_trees_all_equal(found, pruned)
    chex.assert_trees_all_equal(outputs(found), outputs(pruned))


@SOME_LEFT
def test_pruned_only_once_with_a_state(left):
    adapter, state = trained_house(left)
    with pytest.raises(ValueError, match=r"it was pruned already, or is another one; pass the"):
        prune(prune(adapter, state), state)
    with pytest.raises(ValueError, match="pruned already"):
        ranks(prune(adapter, state), state)


def test_pruned_only_once_where_a_layer_keeps_all():
    """Then the shape stays, and the triplets of the other layers have moved."""
    sites = find_sites(scanned, scanned_params(), jnp.ones((1, 6)))
    adapter = drawn(sites, target_modules=["up"])
    state = rank_allocator(optax.sgd(LR), adapter).init(adapter.params)
    kept = np.ones((4, 4), bool)
    kept[1] = [False, True, False, True]
    state = state._replace(kept={name: jnp.asarray(kept) for name in state.kept})
    once = prune(adapter, state)
    assert once.params["layers.up"]["lora_E"].shape == kept.shape
    with pytest.raises(ValueError, match="pruned already"):
        prune(once, state)


def test_a_new_adapter_has_the_ranks_of_the_pattern():
    adapter, state = trained_house(True)
    pruned = prune(adapter, state)
    new = jax.jit(lambda: init_adapter(KEY, pruned.config, house_sites()).buffers)()
    for name, own in pruned.buffers.items():
        assert set(new[name]) == set(own)
        for buffer in own:
            np.testing.assert_array_equal(new[name][buffer], own[buffer], err_msg=name)


@SOME_LEFT
def test_pruning_again(left):
    """Padding is never kept, and costs nothing: the budget starts at the ranks that are left."""
    first, state = trained_house(left)
    once = prune(first, state)
    counts = ranks(first, state)
    config = dataclasses.replace(once.config, target_r=1)
    adapter = once.replace(config=config, params=redraw(once.params))
    optimizer = rank_allocator(optax.sgd(LR), adapter)
    after = train(optimizer, adapter.params, FREEZE + 2)
    assert sum(np.sum(count) for count in counts.values()) == 2 * 17
    assert int(after[0][1].budget) == 2 * 17
    real = jax.tree.map(
        lambda mask: mask > 0, {"layers.up": once.buffers["layers.up"]["rank_mask"]}
    )
    for _, state in after:
        kept = {name: np.asarray(mask) for name, mask in state.kept.items()}
        assert sum(mask.sum() for mask in kept.values()) == int(state.budget)
        assert not (kept["layers.up"] & ~np.asarray(real["layers.up"])).any()
    assert int(state.budget) == 17
    adapter = adapter.replace(params=after[-1][0])
    twice = prune(adapter, state)
    check_pruned(adapter, state, twice)
    for name, pattern in twice.config.rank_pattern.items():
        pattern, before = np.array(pattern), np.array(once.config.rank_pattern[name])
        assert pattern.shape == before.shape
        assert not (pattern & ~before).any()
        np.testing.assert_array_equal(
            pattern.sum(axis=-1), ranks(adapter, state)[name.removesuffix(".lora_E")]
        )
    like = jax.eval_shape(lambda: init_adapter(KEY, twice.config, house_sites()))
    chex.assert_trees_all_equal_shapes_and_dtypes(like, twice)


def test_pruning_keeps_the_right_numbers():
    adapter = every(mlp_sites())
    state = rank_allocator(optax.sgd(LR), adapter).init(adapter.params)
    kept = {"up": [False, True, False, True], "down": [False, False, True, False]}
    pruned = prune(adapter, state._replace(kept=kept))
    up, old = pruned.params["up"], adapter.params["up"]
    np.testing.assert_array_equal(up["lora_A"], old["lora_A"][:, 1::2])
    np.testing.assert_array_equal(up["lora_E"], old["lora_E"][1::2])
    np.testing.assert_array_equal(up["lora_B"], old["lora_B"][1::2])
    down, old = pruned.params["down"], adapter.params["down"]
    np.testing.assert_array_equal(down["lora_B"], old["lora_B"][2:3])

    twice = prune(pruned, state._replace(kept={"up": [False, True], "down": [True]}))
    np.testing.assert_array_equal(twice.params["up"]["lora_A"], up["lora_A"][:, 1:])
    assert twice.config.to_dict()["rank_pattern"] == {
        "up.lora_E": [False, False, False, True],
        "down.lora_E": [False, False, True, False],
    }


def test_nothing_left_at_all():
    params, x = mlp_params(), normal(3, 6, std=1)
    adapter, state = trained(every(mlp_sites(), target_r=0))
    assert ranks(adapter, state) == {"up": 0, "down": 0}
    pruned = prune(adapter, state)
    assert sum(x.size for x in jax.tree.leaves(pruned.params)) == 0
    run = jax.jit(adapt(mlp))
    for each in (pruned, adapter):
        chex.assert_trees_all_close(run(params, each, x), mlp(params, x), rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal(merge(params, pruned), params)
    assert np.isfinite(orthogonality(pruned))


def test_some_layers_of_a_stack():
    params, x = scanned_params(), normal(3, 6, std=1)
    sites = find_sites(scanned, params, x)
    adapter, state = trained(every(sites, layers_to_transform=[1, 3]))
    pruned = prune(adapter, state)
    run = jax.jit(adapt(scanned))
    chex.assert_trees_all_close(
        run(params, pruned, x), run(params, adapter, x), rtol=1e-6, atol=1e-6
    )
    assert sum(count.sum() for count in ranks(adapter, state).values()) == 2 * 4
    data = pruned.config.to_dict()
    assert np.shape(data["rank_pattern"]["layers.up.lora_E"]) == (2, 4)
    config = AdaLoraConfig.from_dict(data)
    shapes = jax.eval_shape(lambda: init_adapter(KEY, config, sites))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, pruned)
    buffers = jax.jit(lambda: init_adapter(KEY, config, sites).buffers)()
    chex.assert_trees_all_equal(buffers, pruned.buffers)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("q", [True] * 3),
        ("q", [[True] * 4]),
        ("layers.up", [True] * 4),
        ("layers.up", [[True] * 4] * 3),
        ("experts", [[[True] * 5] * 3] * 2),
    ],
)
def test_patterns_fit(name, pattern):
    fields = {"init_r": 4, "rank_pattern": {f"{name}.lora_E": pattern}}
    config = AdaLoraConfig(target_modules=list(house_sites()), **fields)
    with pytest.raises(ValueError, match=rf"{name}: `rank_pattern` has a list of shape"):
        jax.eval_shape(lambda: init_adapter(KEY, config, house_sites()))


@functools.cache
def resumable():
    """A training of 14 steps with momentum, all its params and states."""
    fields = {"tinit": 2, "tfinal": 4, "total_step": 14, "deltaT": 2}
    adapter = every(mlp_sites(), **fields)
    optimizer = rank_allocator(adam(), adapter)
    return adapter, stepper(optimizer), train(optimizer, adapter.params, 14)


@pytest.mark.parametrize("stop", [1, 3, 6, 10, 12])
def test_interruption(stop, tmp_path):
    """In any phase, also between two allocations: it goes on as if nothing had happened."""
    adapter, step, after = resumable()
    params, state = after[stop - 1]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "here", {"params": params, "opt_state": state})
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            {"params": params, "opt_state": state},
        )
        found = checkpointer.restore(tmp_path / "here", abstract)
    params, state = found["params"], found["opt_state"]
    assert int(state.step) == stop
    for i in range(stop, 14):
        params, state = step(params, state, gradients(params, i))
        chex.assert_trees_all_equal((params, state), after[i])
    assert ranks(adapter, state) == ranks(adapter, after[-1][1])
    assert sum(ranks(adapter, state).values()) == 4


def test_on_a_mesh():
    """The triplets' own axis on one axis of the mesh, the layers' on the other."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sites = find_sites(scanned, scanned_params(), jnp.ones((3, 6)))
    adapter = every(sites)
    specs = {
        "lora_A": P("data", None, "model"),
        "lora_E": P("data", "model"),
        "lora_B": P("data", "model", None),
    }

    def placed(tree):
        return {
            module: {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in own.items()}
            for module, own in tree.items()
        }

    optimizer = rank_allocator(adam(), adapter)
    want = train(optimizer, adapter.params, 24)
    with jax.set_mesh(mesh):
        after = train(
            optimizer, placed(adapter.params), 24, lambda params, i: placed(gradients(params, i))
        )
    chex.assert_trees_all_equal(choices(after), choices(want))
    for (params, _), (expected, _) in zip(after, want, strict=True):
        chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-6)
    assert after[-1][0]["layers.up"]["lora_A"].sharding.spec == specs["lora_A"]
    assert sum(count.sum() for count in ranks(adapter, after[-1][1]).values()) == 2 * 8
