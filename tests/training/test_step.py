"""The training step: what it computes, draws and reports, and what it is compiled to."""

import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import mlp, mlp_params, near, normal, redraw, scanned, scanned_params

from peftjax import (
    AdaLoraConfig,
    LoraConfig,
    TrainState,
    XLoraConfig,
    adapt,
    adapter_shardings,
    find_sites,
    init_adapter,
    init_train_state,
    init_xlora,
    make_train_step,
    orthogonality,
    rank_allocator,
    ranks,
)

KEY = jax.random.key(0)
BATCH = {"x": normal(8, 6, seed=4, std=1), "y": normal(8, 5, seed=5)}
ADAPTED = adapt(mlp)


def optaxs(optimizer):
    """An optimizer of optax's, many of which rely on promotion: ours, around it, may not."""

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def adam(rate=0.05):
    return optaxs(optax.adam(rate))


def loss_fn(params, adapter, batch):
    return jnp.square(ADAPTED(params, adapter, batch["x"]) - batch["y"]).mean()


def drawn(config=None, base=None):
    base = mlp_params() if base is None else base
    config = config or LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"])
    adapter = init_adapter(KEY, config, find_sites(mlp, base, BATCH["x"]), base)
    return adapter.replace(params=redraw(adapter.params))


def run(step, state, params, batch, steps):
    history = []
    for _ in range(steps):
        state, metrics = step(state, params, batch)
        history.append(metrics)
    return state, jax.tree.map(lambda *each: jnp.stack(each), *history)


def by_hand(adapter, optimizer, params, batch, steps, loss=loss_fn):
    """The loop that the step stands for, nothing of it compiled together."""
    trainable, state = adapter.params, optimizer.init(adapter.params)
    losses, norms = [], []
    slopes = jax.jit(
        jax.value_and_grad(lambda own: loss(params, adapter.replace(params=own), batch))
    )
    for _ in range(steps):
        value, slope = slopes(trainable)
        losses.append(value)
        norms.append(jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(slope))))
        updates, state = optimizer.update(slope, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return trainable, state, {"loss": jnp.stack(losses), "grad_norm": jnp.stack(norms)}


def test_steps_are_those_of_a_loop_by_hand():
    adapter, optimizer, params = drawn(), adam(), mlp_params()
    step = make_train_step(loss_fn, optimizer)
    state, metrics = run(step, init_train_state(adapter, optimizer), params, BATCH, 4)
    trainable, opt_state, want = by_hand(adapter, optimizer, params, BATCH, 4)
    near(metrics, want, 1e-6)
    near((state.adapter.params, state.opt_state), (trainable, opt_state), 1e-5)
    assert float(metrics["loss"][-1]) < float(metrics["loss"][0])
    assert (int(state.step), state.key) == (4, None)
    chex.assert_trees_all_equal(state.adapter.buffers, adapter.buffers)
    assert state.adapter.config == adapter.config


def test_parts_of_a_batch_are_the_batch():
    """Losses, gradients and what else is reported are means over equal parts."""
    params, optimizer = mlp_params(), optax.sgd(0.1)

    def with_more(params, adapter, batch):
        loss = loss_fn(params, adapter, batch)
        return loss, {"mean": batch["y"].mean(), "big": loss > 0, "rows": 8}

    def trained(parts):
        step = make_train_step(with_more, optimizer, accumulate=parts)
        return run(step, init_train_state(drawn(), optimizer), params, BATCH, 3)

    state, whole = trained(1)
    near(whole["mean"], jnp.full(3, BATCH["y"].mean()), 1e-6)
    for parts in (2, 4, 8):
        own, metrics = trained(parts)
        near(own.adapter.params, state.adapter.params, 1e-6)
        near(
            {k: metrics[k] for k in ("loss", "grad_norm", "mean")},
            {k: whole[k] for k in ("loss", "grad_norm", "mean")},
            1e-6,
        )
        assert metrics["big"].tolist() == [1.0] * 3
        assert metrics["rows"].tolist() == [8.0] * 3


def test_parts_of_half_precision_add_up_in_single():
    """Sums of gradients in bfloat16 would stand still: 256 + 1 is 256 there."""
    params, optimizer = mlp_params(), optax.sgd(1.0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["up"])
    sites = find_sites(mlp, params, BATCH["x"])
    adapter = init_adapter(KEY, config, sites, dtype=jnp.bfloat16)

    def linear(params, adapter, batch):
        return (adapter.params["up"]["lora_B"] * batch.mean()).sum().astype(jnp.float32)

    step = make_train_step(linear, optimizer, accumulate=512)
    state, _ = step(init_train_state(adapter, optimizer), params, jnp.ones(512, jnp.bfloat16))
    got = state.adapter.params["up"]["lora_B"]
    assert got.dtype == jnp.bfloat16
    assert (got == -1).all()


def key_of(state, accumulate=1, part=0):
    return jax.random.fold_in(state.key, state.step * accumulate + part)


def test_dropout_differs_by_step_and_part_and_comes_from_key_and_step_alone():
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.5, target_modules=["up", "down"])
    params, still = mlp_params(), optax.sgd(0.0)
    # Every part holds the same rows, so that their losses differ by dropout alone.
    rows = jax.tree.map(lambda x: jnp.repeat(x[:4], 2, axis=0), BATCH)

    def noisy(params, adapter, batch):
        return loss_fn(params, adapter, batch), {"key": jax.random.key_data(adapter.key)[1]}

    step = make_train_step(loss_fn, still)
    halves = make_train_step(loss_fn, still, accumulate=2)
    first = init_train_state(drawn(config), still, key=KEY)
    keys = {(s, p): jax.random.fold_in(KEY, 2 * s + p) for s in range(3) for p in range(2)}
    part = jax.tree.map(lambda x: x[:4], BATCH)
    losses = {at: loss_fn(params, drawn(config).train(key), part) for at, key in keys.items()}
    assert len({float(loss) for loss in losses.values()}) == 6
    state, metrics = run(halves, first, params, rows, 3)
    want = jnp.stack([(losses[s, 0] + losses[s, 1]) / 2 for s in range(3)])
    near(metrics["loss"], want, 1e-6)
    chex.assert_trees_all_equal(*map(jax.random.key_data, (state.key, KEY)))
    # The state after two steps, made anew, takes the third as it was taken.
    again = init_train_state(drawn(config), still, key=KEY)
    again = TrainState(again.adapter, again.opt_state, jnp.int32(2), again.key)
    assert halves(again, params, rows)[1]["loss"] == metrics["loss"][2]
    # Raw keys are keys; without one there is no dropout.
    raw = init_train_state(drawn(config), still, key=jax.random.key_data(KEY))
    near(
        step(raw, params, part)[1]["loss"],
        loss_fn(params, drawn(config).train(keys[0, 0]), part),
        1e-6,
    )
    dry = step(init_train_state(drawn(config).train(KEY), still), params, part)[1]["loss"]
    near(dry, loss_fn(params, drawn(config), part), 1e-6)


def sizes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_state_is_overwritten_in_place_and_nothing_else_is():
    params, optimizer, adapter = mlp_params(), adam(), drawn()
    step = make_train_step(loss_fn, optimizer)
    state = init_train_state(adapter, optimizer, key=KEY)
    compiled = step.lower(state, params, BATCH).compile()
    trained = state.adapter.params, state.opt_state, state.step
    assert compiled.memory_analysis().alias_size_in_bytes >= sizes(trained)
    after, _ = step(state, params, BATCH)
    assert all(x.is_deleted() for x in jax.tree.leaves(trained))
    mine = (params, BATCH, adapter, KEY, after)
    assert not any(x.is_deleted() for x in jax.tree.leaves(mine))


@pytest.mark.parametrize("jitted", [False, True])
def test_a_state_never_holds_one_buffer_twice(jitted):
    """PiSSA keeps its start, and some optimizers the params: donated together they would clash."""
    params = mlp_params()
    config = LoraConfig(r=3, lora_alpha=5, init_lora_weights="pissa", target_modules=["up"])
    optimizer = optaxs(optax.contrib.schedule_free_sgd(0.1))
    sites = find_sites(mlp, params, BATCH["x"])

    def make(params):
        return init_train_state(init_adapter(KEY, config, sites, params), optimizer, KEY)

    state = jax.jit(make)(params) if jitted else make(params)
    start = jax.tree.map(jnp.copy, state.adapter.params)
    state, metrics = make_train_step(loss_fn, optimizer)(state, params, BATCH)
    near(metrics["loss"], jnp.square(mlp(params, BATCH["x"]) - BATCH["y"]).mean(), 1e-5)
    near(state.adapter.buffers["up"]["lora_A_init"], start["up"]["lora_A"], 0)
    assert float(jnp.abs(state.adapter.params["up"]["lora_A"] - start["up"]["lora_A"]).max()) > 1e-4


def constants(text):
    """The number of elements of each constant in a StableHLO program."""
    types = re.findall(r"stablehlo\.constant dense<.*> : tensor<([0-9x]*)[a-z]", text)
    counts = [[int(n) for n in each.split("x") if n] for each in types]
    assert counts
    return [jnp.prod(jnp.asarray(each)) if each else 1 for each in counts]


def test_base_is_an_argument_and_no_constant():
    params, x = scanned_params(), normal(8, 6, std=1)
    adapted, optimizer = adapt(scanned), optax.sgd(0.1)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["up", "down"])
    adapter = init_adapter(KEY, config, find_sites(scanned, params, x))
    state = init_train_state(adapter, optimizer, key=KEY)

    def passed(params, adapter, batch):
        return jnp.square(adapted(params, adapter, batch)).mean()

    def closed(_, adapter, batch):
        return passed(params, adapter, batch)

    def largest(loss):
        lowered = make_train_step(loss, optimizer, accumulate=2).lower(state, params, x)
        return lowered, max(constants(lowered.as_text()))

    smallest = min(x.size for x in jax.tree.leaves(params))
    lowered, largest_constant = largest(passed)
    assert largest_constant < smallest
    arguments = lowered.compile().memory_analysis().argument_size_in_bytes
    assert arguments >= sizes(params) + sizes(x)
    # What the check would see of a base that is closed over.
    assert largest(closed)[1] >= smallest


def test_many_steps_are_one_program():
    chex.clear_trace_counter()
    params, optimizer = mlp_params(), adam()
    counted = chex.assert_max_traces(loss_fn, n=1)
    step = make_train_step(counted, optimizer)
    state = init_train_state(drawn(), optimizer, key=KEY)
    state, _ = run(step, state, params, BATCH, 4)
    # Another base of these shapes is no new program.
    other = redraw(params, seed=90)
    _, metrics = step(state, other, BATCH)
    assert jnp.isfinite(metrics["loss"])


def test_rank_allocator_and_its_regulariser_inside():
    fields = {"init_r": 4, "target_r": 1, "total_step": 6, "tfinal": 2}
    config = AdaLoraConfig(**fields, orth_reg_weight=0.5, target_modules=["up", "down"])
    adapter, params = drawn(config), mlp_params()
    optimizer = rank_allocator(adam(), adapter)

    def loss(params, adapter, batch):
        return loss_fn(params, adapter, batch) + orthogonality(adapter)

    step = make_train_step(loss, optimizer, accumulate=2)
    state, metrics = run(step, init_train_state(adapter, optimizer), params, BATCH, 6)
    compiled = optimizer._replace(update=jax.jit(optimizer.update))
    trainable, opt_state, want = by_hand(adapter, compiled, params, BATCH, 6, loss)
    near(metrics["loss"], want["loss"], 1e-4)
    assert ranks(state.adapter, state.opt_state) == ranks(adapter, opt_state)
    assert sum(ranks(state.adapter, state.opt_state).values()) == 2
    near(state.adapter.params, trainable, 1e-4)


def test_classifier_alone_learns_and_experts_too_if_told():
    def decoder(params, ids):
        return jnp.tanh(params["table"][ids] @ params["inner"]) @ params["head"]

    params = {"table": normal(7, 6), "inner": normal(6, 6, seed=1), "head": normal(6, 7, seed=2)}
    ids = jnp.arange(12).reshape(4, 3) % 7
    sites, adapted = find_sites(decoder, params, ids), adapt(decoder)
    config = LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, target_modules=["inner"])
    experts = {name: init_adapter(jax.random.key(i), config, sites) for i, name in enumerate("ab")}

    def loss(params, adapter, ids):
        return -jax.nn.log_softmax(adapted(params, adapter, ids))[..., 0].mean()

    for learn in (False, True):
        mixing = XLoraConfig(xlora_depth=1, use_trainable_adapters=learn)
        mixture = init_xlora(KEY, mixing, experts, sites)
        optimizer = optax.sgd(0.5)
        step = make_train_step(loss, optimizer)
        state, metrics = run(step, init_train_state(mixture, optimizer, KEY), params, ids, 4)
        assert float(metrics["loss"][-1]) < float(metrics["loss"][0])
        assert ("inner" in state.adapter.params) == learn
        both = {**state.adapter.buffers, **state.adapter.params}
        before = {**mixture.buffers, **mixture.params}
        moved = {
            module: any(
                float(jnp.abs(both[module][name] - before[module][name]).max()) > 1e-5
                for name in ("lora_A", "lora_B")
            )
            for module in ["inner"]
        }
        assert moved == {"inner": learn}


def test_whole_modules_are_trained_and_the_base_is_not():
    params, optimizer = mlp_params(), optax.sgd(0.1)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["up"], modules_to_save=["down"])
    adapter = drawn(config)
    step = make_train_step(loss_fn, optimizer)
    state, metrics = run(step, init_train_state(adapter, optimizer), params, BATCH, 3)
    trainable, _, want = by_hand(adapter, optimizer, params, BATCH, 3)
    assert set(trainable["down"]) == {"kernel", "bias"}
    near(state.adapter.params, trainable, 1e-6)
    near(metrics, want, 1e-6)
    chex.assert_trees_all_equal(params, mlp_params())


WHERE = {
    "up": {"kernel": P(None, "model"), "bias": P("model")},
    "down": {"kernel": P("model"), "bias": P()},
}
MOVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def wide():
    """The same two layers, with sizes that two devices divide."""
    return {
        "up": {"kernel": normal(6, 8), "bias": normal(8, seed=1)},
        "down": {"kernel": normal(8, 5, seed=2), "bias": normal(5, seed=3)},
    }


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_parts_of_a_sharded_batch_stay_where_they_are(kind):
    """And the state stays where ``shardings`` say, in one program."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    optimizer = optax.sgd(0.1, momentum=0.9)
    first = init_train_state(drawn(base=wide()), optimizer, key=KEY)
    want, whole = run(make_train_step(loss_fn, optimizer), first, wide(), BATCH, 3)
    params = jax.device_put(wide(), jax.tree.map(lambda s: NamedSharding(mesh, s), WHERE))
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        state = init_train_state(drawn(base=wide()), optimizer, key=KEY)
        shardings = adapter_shardings(state, params)
        state = jax.device_put(state, shardings)
        step = make_train_step(sharded_loss(kind), optimizer, accumulate=2, shardings=shardings)
        # It refuses what lies elsewhere than it was compiled for.
        compiled = step.lower(state, params, batch).compile()
        state, metrics = run(compiled, state, params, batch, 3)
    text = compiled.as_text()
    assert not [op for op in MOVES if op in text]
    assert "all-reduce" in text
    for array, where in zip(*map(jax.tree.leaves, (state, shardings)), strict=True):
        assert array.sharding.is_equivalent_to(where, array.ndim)
    near(jax.device_get(metrics), jax.device_get(whole), 1e-5)
    near(jax.device_get(state.adapter.params), jax.device_get(want.adapter.params), 1e-5)


def sharded_loss(kind):
    """The loss of a model that says where its products lie, as Explicit axes want it."""
    if kind is AxisType.Auto:
        return loss_fn

    def apply_fn(params, x):
        h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
        y = jnp.matmul(h, params["down"]["kernel"], out_sharding=P("data", None))
        return y + params["down"]["bias"][None]

    adapted = adapt(apply_fn)
    return lambda p, a, batch: jnp.square(adapted(p, a, batch["x"]) - batch["y"]).mean()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("several", [False, True])
def test_optimizers_that_want_the_loss(accumulate, several):
    """Optax's own Polyak step is the loss over the squared norm of the gradient."""
    params, optimizer = mlp_params(), optax.polyak_sgd(max_learning_rate=100.0)
    if several:
        optimizer = optax.MultiSteps(optimizer, 1)
    step = make_train_step(loss_fn, optimizer, accumulate=accumulate)
    with jax.numpy_dtype_promotion("standard"):
        state, metrics = step(init_train_state(drawn(), optimizer), params, BATCH)
    slope = jax.grad(lambda own: loss_fn(params, drawn().replace(params=own), BATCH))(
        drawn().params
    )
    rate = metrics["loss"] / metrics["grad_norm"] ** 2
    want = jax.tree.map(lambda p, g: p - rate * g, drawn().params, slope)
    near(state.adapter.params, want, 1e-5)


def test_a_rate_that_falls_where_the_loss_does_not():
    params = mlp_params()
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=1.0)
    optimizer = optax.chain(optax.sgd(0.1), plateau)
    step = make_train_step(loss_fn, optimizer)
    with jax.numpy_dtype_promotion("standard"):
        state, _ = run(step, init_train_state(drawn(), optimizer), params, BATCH, 3)
    assert float(state.opt_state[1].scale) < 1


def test_optimizers_that_are_told_nothing_or_are_compiled():
    params, compiled = mlp_params(), optax.polyak_sgd()
    compiled = compiled._replace(update=jax.jit(compiled.update))
    sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1))
    for optimizer in (sam, optax.chain(optax.clip_by_global_norm(1.0), sam), compiled):
        with jax.numpy_dtype_promotion("standard"):
            step = make_train_step(loss_fn, optimizer)
            _, metrics = run(step, init_train_state(drawn(), optimizer), params, BATCH, 3)
        assert float(metrics["loss"][-1]) != float(metrics["loss"][0])


def test_a_line_search_is_an_error_before_anything_runs():
    params = mlp_params()
    for optimizer in (optax.lbfgs(), optax.MultiSteps(optax.lbfgs(), 2)):
        with jax.numpy_dtype_promotion("standard"):
            step = make_train_step(loss_fn, optimizer)
            state = init_train_state(drawn(), optimizer)
            with pytest.raises(ValueError, match="this optimizer has a line search"):
                jax.eval_shape(step, state, params, BATCH)
    optimizer = optax.lbfgs(0.1, linesearch=None)
    with jax.numpy_dtype_promotion("standard"):
        step = make_train_step(loss_fn, optimizer)
        jax.eval_shape(step, init_train_state(drawn(), optimizer), params, BATCH)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_the_step_reports_is_its_own(name):
    def named(params, adapter, batch):
        return loss_fn(params, adapter, batch), {name: 7.0, "mine": 1.0}

    for parts in (1, 2):
        step = make_train_step(named, optax.sgd(0.1), accumulate=parts)
        with pytest.raises(ValueError, match=f"loss_fn reports {name}, which the step reports"):
            step(init_train_state(drawn(), optax.sgd(0.1)), mlp_params(), BATCH)


def test_errors():
    params, optimizer = mlp_params(), optax.sgd(0.1)
    for wrong in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="`accumulate` must be an integer of 1 or more, got"):
            make_train_step(loss_fn, optimizer, accumulate=wrong)

    def state():
        return init_train_state(drawn(), optimizer)

    step = make_train_step(loss_fn, optimizer, accumulate=3)
    with pytest.raises(ValueError, match=r"^\['x'\] of shape \(8, 6\) cannot be cut into 3 equal"):
        step(state(), params, BATCH)
    step = make_train_step(loss_fn, optimizer, accumulate=2)
    with pytest.raises(ValueError, match=r"^\['n'\] of shape \(\) cannot be cut into 2 equal"):
        step(state(), params, {**BATCH, "n": jnp.float32(1)})
    with pytest.raises(ValueError, match=r"^the batch of shape \(3,\)"):
        step(state(), params, jnp.ones(3))

    def rows(params, adapter, batch):
        return jnp.square(ADAPTED(params, adapter, batch["x"])).mean(axis=1)

    for parts in (1, 2):
        step = make_train_step(rows, optimizer, accumulate=parts)
        with pytest.raises(ValueError, match=rf"scalar, .* has shape \({8 // parts},\)"):
            step(state(), params, BATCH)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="its XLA cannot move sharded arrays from the host"
)
def test_an_optimizer_may_keep_its_state_in_host_memory():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    whole = NamedSharding(mesh, P())
    params, batch = jax.device_put((mlp_params(), BATCH), whole)
    state = init_train_state(drawn(), adam())
    shardings = adapter_shardings(state, params)

    def to_host(tree):
        return jax.tree.map(lambda where: where.with_memory_kind("pinned_host"), tree)

    hosted = TrainState(
        shardings.adapter, to_host(shardings.opt_state), shardings.step, shardings.key
    )
    ends = []
    for where in (shardings, hosted):
        step = make_train_step(loss_fn, adam(), shardings=where)
        own = jax.device_put(init_train_state(drawn(), adam()), where)
        own, _ = run(step, own, params, batch, 2)
        ends.append(own)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(ends[1].opt_state)} == {"pinned_host"}
    assert "pinned_host" not in {x.sharding.memory_kind for x in jax.tree.leaves(ends[1].adapter)}
    chex.assert_trees_all_equal(*map(jax.device_get, ends))
