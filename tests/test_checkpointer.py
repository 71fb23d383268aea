"""Checkpoints of training runs: bit for bit, on any mesh, and never a broken one."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from models import normal, redraw

import peftjax
from peftjax import AdapterCheckpointer
from peftjax import checkpointer as checkpointer_module

KEY = jax.random.key(0)
PARAMS = {"up": {"kernel": normal(8, 16)}, "down": {"kernel": normal(16, 8, seed=1)}}
X = normal(4, 8, seed=2)


def apply_fn(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def sites_of(params=PARAMS):
    return peftjax.find_sites(apply_fn, params, X)


def adapter_of(config=None, params=PARAMS, dtype=None):
    config = config or peftjax.LoraConfig(r=2, lora_alpha=5, target_modules=["up", "down"])
    adapter = peftjax.init_adapter(KEY, config, sites_of(params), params, dtype=dtype)
    return adapter.replace(params=redraw(adapter.params))


def mixture(*order):
    experts = {name: adapter_of() for name in order or ("poems", "code")}
    return peftjax.init_xlora(
        KEY, peftjax.XLoraConfig(hidden_size=8, xlora_depth=2), experts, sites_of()
    )


def adalora():
    return adapter_of(
        peftjax.AdaLoraConfig(
            init_r=3, target_r=2, total_step=20, tfinal=5, target_modules=["up", "down"]
        )
    )


def adam(adapter):
    return optax.adamw(1e-2)


CASES = {
    "lora_adamw": (adapter_of, adam),
    "bf16_chain": (
        lambda: adapter_of(dtype=jnp.bfloat16),
        lambda adapter: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    ),
    "multi_steps": (adapter_of, lambda adapter: optax.MultiSteps(optax.adam(1e-2), 2)),
    "adalora": (adalora, lambda adapter: peftjax.rank_allocator(optax.adam(1e-2), adapter)),
    "xlora": (mixture, adam),
    "saved": (
        lambda: adapter_of(
            peftjax.LoraConfig(r=2, target_modules=["up"], modules_to_save=["down"])
        ),
        adam,
    ),
    "no_state": (adapter_of, lambda adapter: optax.sgd(0.1)),
}


def state_of(case="lora_adamw", key=KEY):
    make, optimizer = CASES[case]
    adapter = make()
    state = peftjax.init_train_state(adapter, optimizer(adapter), key)
    rng = np.random.default_rng(5)

    def drawn(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=x.shape), x.dtype)
        return x

    return jax.tree.map(drawn, state)


def blank(state):
    """A state of the same shapes, with other numbers."""
    return jax.tree.map(
        lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.zeros_like(x), state
    )


def numbers(tree):
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    ]


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(numbers(got), numbers(want), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("case", CASES)
def test_what_goes_in_comes_out(case, tmp_path):
    state = state_of(case)
    with AdapterCheckpointer(tmp_path) as checkpointer:
        assert checkpointer.save(3, state, data_position={"epoch": 1, "batch": [4, None]})
        got, position = checkpointer.restore(blank(state))
    assert_same(got, state)
    assert position == {"epoch": 1, "batch": [4, None]}
    with AdapterCheckpointer(tmp_path) as checkpointer:
        # A new process, which knows shapes alone; and someone who wants the adapter alone.
        assert_same(checkpointer.restore(jax.eval_shape(lambda: state))[0], state)
        assert_same(checkpointer.restore(blank(state.adapter))[0], state.adapter)


def test_the_next_step_may_overwrite_what_is_being_saved(tmp_path):
    optimizer = optax.sgd(0.1)
    adapted = peftjax.adapt(apply_fn)
    step = peftjax.make_train_step(
        lambda params, adapter, x: jnp.square(adapted(params, adapter, x)).mean(), optimizer
    )
    state = peftjax.init_train_state(adapter_of(), optimizer)
    before = []
    with AdapterCheckpointer(tmp_path) as checkpointer:
        for n in range(4):
            before.append(jax.tree.map(np.array, numbers(state)))
            checkpointer.save(n, state)
            state, _ = step(state, PARAMS, X)
        for n, want in enumerate(before):
            got, _ = checkpointer.restore(state, step=n)
            for one, other in zip(numbers(got), want, strict=True):
                np.testing.assert_array_equal(one, other)


def mesh_of(shape, kind):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))


def laid_out(state, mesh):
    """The state on a mesh, along axes of a base that is split."""
    specs = {"up": {"kernel": P("data", "model")}, "down": {"kernel": P("model", "data")}}
    with jax.set_mesh(mesh):
        return jax.device_put(state, peftjax.adapter_shardings(state, specs))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_from_one_mesh_to_another(kind, tmp_path):
    state = state_of()
    with AdapterCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(1, laid_out(state, mesh_of((2, 4), AxisType.Auto)))
        for shape in ((4, 2), (1, 8)):
            like = laid_out(blank(state), mesh_of(shape, kind))
            got, _ = checkpointer.restore(like)
            assert_same(got, state)
            for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(like), strict=True):
                assert one.sharding == other.sharding
        alone, _ = checkpointer.restore(blank(state))
        assert {x.devices() == {jax.devices()[0]} for x in jax.tree.leaves(alone)} == {True}


@pytest.mark.parametrize("inside", [False, True])
def test_what_is_bound_to_no_device_goes_along_with_a_mesh(inside, tmp_path):
    """The step, the key and counts of a fresh state, beside an adapter that is split."""
    mesh = mesh_of((2, 4), AxisType.Auto)
    adapter = laid_out(adapter_of(), mesh)
    state = peftjax.init_train_state(adapter, optax.adam(1e-2), KEY)
    shapes = jax.eval_shape(lambda: state)
    total = jax.jit(lambda state: sum(x.sum() for x in numbers(state)).astype(jnp.float32))
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.set_mesh(mesh) if inside else contextlib.nullcontext(),
        AdapterCheckpointer(tmp_path) as checkpointer,
    ):
        checkpointer.save(1, state)
        want = total(state)
        got, _ = checkpointer.restore(state)
        assert_same(got, state)
        if not inside:  # inside, JAX places what is new on the mesh
            before, after = ([x.committed for x in jax.tree.leaves(t)] for t in (state, got))
            assert after == before
        assert total(got) == want
        unplaced, _ = checkpointer.restore(dataclasses.replace(shapes, adapter=adapter))
        assert_same(unplaced, state)
        assert total(unplaced) == want


def test_in_another_dtype(tmp_path):
    state = state_of()

    def half(x):
        return x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with AdapterCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        got, _ = checkpointer.restore(jax.tree.map(half, blank(state)))
    assert_same(got, jax.tree.map(half, state))


def test_which_are_kept(tmp_path):
    state = state_of("no_state")
    accuracies = {1: 0.7, 2: 0.9, 3: 0.8, 4: 0.6}
    with AdapterCheckpointer(tmp_path / "best", max_to_keep=2, best_metric="accuracy") as best:
        for step, accuracy in accuracies.items():
            best.save(step, state, metrics={"accuracy": jnp.float32(accuracy), "loss": 1.0})
        best.wait_until_finished()
        # The newest besides: a run that gets no better must not start over where it is killed.
        assert (best.all_steps(), best.best_step(), best.latest_step()) == ((2, 3, 4), 2, 4)
        assert_same(best.restore(state, best=True)[0], state)
    with AdapterCheckpointer(tmp_path / "new", max_to_keep=2, save_interval_steps=2) as newest:
        assert [newest.save(step, state) for step in range(7)] == [True, False] * 3 + [True]
        newest.wait_until_finished()
        assert newest.all_steps() == (4, 6)


def test_least_is_best(tmp_path):
    with AdapterCheckpointer(
        tmp_path, max_to_keep=1, best_metric="loss", best_mode="min"
    ) as checkpointer:
        for step, loss in enumerate((0.5, 0.2, 0.9, 0.4)):
            checkpointer.save(step, state_of("no_state"), metrics={"loss": loss})
        checkpointer.wait_until_finished()
        assert (checkpointer.best_step(), checkpointer.all_steps()) == (1, (1, 3))


def test_what_a_kill_left_half_removed_is_removed(tmp_path):
    state = state_of("no_state")
    with AdapterCheckpointer(tmp_path, best_metric="accuracy") as checkpointer:
        for step, accuracy in ((1, 0.1), (2, 0.9), (3, 0.5)):
            checkpointer.save(step, state, metrics={"accuracy": accuracy})
    shutil.rmtree(tmp_path / "1" / "metrics")
    with AdapterCheckpointer(tmp_path, best_metric="accuracy", max_to_keep=1) as checkpointer:
        assert_same(checkpointer.restore(blank(state), best=True)[0], state)
        for step in (4, 5):
            checkpointer.save(step, state, metrics={"accuracy": 0.2})
        checkpointer.wait_until_finished()
        assert (checkpointer.all_steps(), checkpointer.best_step()) == ((2, 5), 2)


def test_who_reads_leaves_a_save_of_another_alone(tmp_path):
    state = state_of()
    with AdapterCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    begun = tmp_path / "2.orbax-checkpoint-tmp"
    begun.mkdir()
    with AdapterCheckpointer(tmp_path) as checkpointer:
        assert_same(checkpointer.restore(blank(state))[0], state)
        assert begun.is_dir()
        # Who saves is the only one to: what it finds was begun by a process that is no more.
        checkpointer.save(3, state)
        checkpointer.wait_until_finished()
        assert not begun.exists()
        assert checkpointer.all_steps() == (1, 3)


def test_who_reads_sees_what_another_saves(tmp_path):
    state = state_of()
    with (
        AdapterCheckpointer(tmp_path, best_metric="loss", best_mode="min") as reader,
        AdapterCheckpointer(tmp_path, best_metric="loss", best_mode="min") as writer,
    ):
        assert reader.latest_step() is None
        for step, loss in ((1, 0.5), (2, 0.7)):
            writer.save(step, state, metrics={"loss": loss})
            writer.wait_until_finished()
            assert (reader.latest_step(), reader.best_step()) == (step, 1)
            assert_same(reader.restore(blank(state))[0], state)
        assert reader.all_steps() == (1, 2)


def test_who_did_not_see_a_save_of_another_saves_nothing_before_it(tmp_path):
    with AdapterCheckpointer(tmp_path) as stale, AdapterCheckpointer(tmp_path) as other:
        other.save(5, state_of())
        other.wait_until_finished()
        for step in (3, 5):
            with pytest.raises(ValueError, match=f"of step 5, and {step} is not after it"):
                stale.save(step, state_of())
        assert stale.save(6, state_of())


def test_a_save_compiles_once(tmp_path, caplog):
    state = state_of()
    with AdapterCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        with jax.log_compiles():
            checkpointer.save(2, state)
            assert "Compiling" not in caplog.text
            jax.jit(lambda x: x + 1)(state.step)
            assert "Compiling" in caplog.text


def test_only_the_adapter_is_written(tmp_path):
    """Of 200 modules, too, whose names take most of what is more than the arrays."""
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(50) for p in "qkvo"]
    params = {name: {"kernel": jnp.zeros((40, 30))} for name in names}

    def deep(params, x):
        return sum(x @ params[name]["kernel"] for name in names)

    sites = peftjax.find_sites(deep, params, jnp.ones((2, 40)))
    config = peftjax.LoraConfig(r=2, target_modules=lambda site: True)
    adapter = peftjax.init_adapter(KEY, config, sites)
    state = peftjax.init_train_state(adapter, optax.adam(1e-3))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state)
    with AdapterCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    own = sum(x.nbytes for x in jax.tree.leaves(state))
    assert written <= own + 256 * 1024


class TestMistakes:
    @pytest.fixture
    def one(self, tmp_path):
        with AdapterCheckpointer(tmp_path) as checkpointer:
            checkpointer.save(2, state_of())
            yield checkpointer

    def test_nothing_there(self, tmp_path):
        with AdapterCheckpointer(tmp_path) as checkpointer:
            assert checkpointer.latest_step() is None
            with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*; save\(\) writes"):
                checkpointer.restore(state_of())

    def test_no_such_step(self, one):
        with pytest.raises(FileNotFoundError, match=r"of step 7 in .*; there are those of 2"):
            one.restore(state_of(), step=7)

    def test_a_step_twice(self, one):
        with pytest.raises(ValueError, match="has a checkpoint of step 2"):
            one.save(2, state_of())

    def test_a_step_before_the_newest(self, one):
        for step in (0, 1):
            with pytest.raises(ValueError, match=f"of step 2, and {step} is not after it: go on"):
                one.save(step, state_of())
        with pytest.raises(ValueError, match="number of steps, got -1"):
            one.save(-1, state_of())

    def test_a_key_of_another_generator(self, tmp_path):
        with AdapterCheckpointer(tmp_path) as checkpointer:
            checkpointer.save(1, state_of(key=jax.random.key(0, impl="rbg")))
            like = state_of(key=jax.random.key(0, impl="unsafe_rbg"))
            with pytest.raises(ValueError, match=r"'key' is key<rbg> in it and key<urbg> here"):
                checkpointer.restore(like)

    def test_best_where_none_was_measured(self, tmp_path):
        with AdapterCheckpointer(tmp_path) as checkpointer:
            checkpointer.save(4, state_of("no_state"), metrics={"loss": 1.0})
        with AdapterCheckpointer(tmp_path, best_metric="accuracy") as checkpointer:
            assert checkpointer.best_step() is None
            with pytest.raises(FileNotFoundError, match=r"a metric 'accuracy'.*the steps 4"):
                checkpointer.restore(state_of("no_state"), best=True)

    def test_best_of_a_step(self, tmp_path):
        checkpointer = AdapterCheckpointer(tmp_path, best_metric="accuracy")
        with checkpointer, pytest.raises(ValueError, match="step=4 or best=True, not both"):
            checkpointer.restore(state_of("no_state"), step=4, best=True)

    def test_another_config(self, one):
        config = peftjax.LoraConfig(r=2, lora_alpha=7, target_modules=["up", "down"])
        with pytest.raises(ValueError, match=r"of another config: lora_alpha is 5 in it and 7"):
            one.restore(adapter_of(config))

    def test_another_order_of_experts(self, tmp_path):
        with AdapterCheckpointer(tmp_path) as checkpointer:
            checkpointer.save(1, mixture("poems", "code"))
            with pytest.raises(ValueError, match=r"adapters is \['poems', 'code'\] in it"):
                checkpointer.restore(mixture("code", "poems"))

    def test_another_model(self, one):
        params = {"up": {"kernel": normal(8, 24)}, "down": {"kernel": normal(24, 8)}}
        with pytest.raises(ValueError, match=r"model: down is {'shape': \[16, 8\]} in it and"):
            one.restore(adapter_of(params=params))

    def test_another_optimizer(self, one):
        state = peftjax.init_train_state(adapter_of(), optax.sgd(0.1), KEY)
        with pytest.raises(ValueError, match=r"'opt_state/0/count' is only in it"):
            one.restore(state)

    def test_another_rank_by_hand(self, one):
        adapter = adapter_of()
        up = adapter.params["up"] | {"lora_A": adapter.params["up"]["lora_A"][:, :1]}
        params = adapter.params | {"up": up}
        with pytest.raises(ValueError, match=r"'params/up/lora_A' has shape \(8, 2\) in it and"):
            one.restore(adapter.replace(params=params))

    def test_no_metric(self, tmp_path):
        with AdapterCheckpointer(tmp_path, best_metric="accuracy") as checkpointer:
            for metrics in (None, {"loss": 1.0}):
                with pytest.raises(ValueError, match="'accuracy', which is not among"):
                    checkpointer.save(1, state_of(), metrics=metrics)
            with pytest.raises(ValueError, match="'accuracy', which is nan at step 1"):
                checkpointer.save(1, state_of(), metrics={"accuracy": float("nan")})
            assert checkpointer.all_steps() == ()

    def test_best_of_no_metric(self, one):
        with pytest.raises(ValueError, match="needs a checkpointer with `best_metric`"):
            one.restore(state_of(), best=True)

    def test_what_is_no_state(self, one):
        with pytest.raises(ValueError, match="of one adapter, and the state holds 2"):
            one.save(3, (adapter_of(), adapter_of()))
        with pytest.raises(ValueError, match=r"'1' is a int: .* have to be JAX arrays"):
            one.save(3, (adapter_of(), 3))
        with pytest.raises(ValueError, match="`data_position` must be a JSON value"):
            one.save(3, state_of(), data_position={1, 2})
        assert one.all_steps() == (2,)

    @pytest.mark.parametrize(
        "settings", [{"max_to_keep": 0}, {"save_interval_steps": 0}, {"best_mode": "most"}]
    )
    def test_settings(self, settings, tmp_path):
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be"):
            AdapterCheckpointer(tmp_path, **settings)


def test_buckets_keep_their_names(tmp_path, monkeypatch):
    assert checkpointer_module._located("gs://bucket/run") == "gs://bucket/run"
    monkeypatch.chdir(tmp_path)
    assert checkpointer_module._located(Path("run")) == str(tmp_path / "run")
