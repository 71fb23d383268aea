"""The learning-quality benchmark: both frameworks compute the same, and no run is done twice."""

import dataclasses
import json
import pathlib
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
import peftjax
from benchmarks import quality, quality_jax, quality_tables, quality_task
from benchmarks.quality import Run, append, grid, key, missing, read, seconds_left


def run(framework="peftjax", method="lora", budget=2, seed=0, **fields):
    given = {"texts": 60, "steps": 6, "held_out": 40} | fields
    return Run(framework, method, budget, seed=seed, **given)


def row(accuracy, framework="peftjax", method="lora", budget=2, seed=0, **fields):
    seen = {"parameters": 10, "kept": 10, "probe": 0.5, "step_seconds": 0.1, "cpu_seconds": 3}
    first = {"first_losses": [1.0, 0.5], "last_loss": 0.4, "seconds": 4.0, "accuracy": accuracy}
    made = dataclasses.asdict(run(framework, method, budget, seed))
    return {**made, **seen, **first, **fields}


# --- the grid and its file


def test_grid_is_every_setting_once():
    runs = grid()
    assert len(runs) == len(set(runs))
    settings = {(r.method, r.budget, r.texts) for r in runs}
    assert len(settings) == (6 * 3 + 1) * 2
    for framework in ("peftjax", "torch"):
        own = {(r.method, r.budget, r.texts, r.seed) for r in runs if r.framework == framework}
        assert len(own) == len(settings) * 5
    assert [r.seed for r in runs] == sorted(r.seed for r in runs)
    once = [r for r in runs if r.framework == "both"]
    assert len(once) == 19
    assert {r.texts for r in once} == {500}


def test_grid_is_cut_by_flags():
    runs = grid(only=("torch", "hra", "ia3"), seeds=2, budgets=(4,), texts=(4000,))
    assert [(r.framework, r.method, r.rank, r.seed) for r in runs] == [
        ("torch", "hra", 8, 0),
        ("torch", "ia3", 0, 0),
        ("torch", "hra", 8, 1),
        ("torch", "ia3", 0, 1),
    ]
    assert {r.steps for r in runs} == {250}


def test_a_second_start_does_what_is_missing(tmp_path, monkeypatch):
    done = []

    def perform(one):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(one)
        return {**dataclasses.asdict(one), "seconds": 2.0}

    monkeypatch.setattr(quality, "perform", perform)
    runs, path, said = grid(quick=True, only=("peftjax", "lora", "dora", "ia3")), tmp_path / "f", []
    with pytest.raises(KeyboardInterrupt):
        quality.work_through(runs, path, said.append)
    assert done == runs[:2]
    # What a killed process leaves is done again, and does not spoil the next line.
    path.write_text(path.read_text() + '{"framework": "pef')
    monkeypatch.setattr(quality, "perform", lambda one: {**dataclasses.asdict(one), "seconds": 5.0})
    rows = quality.work_through(runs, path, said.append)
    assert [key(each) for each in rows] == [key(dataclasses.asdict(r)) for r in runs]
    assert [each["seconds"] for each in rows] == [2.0, 2.0, 5.0]
    assert len(path.read_text().splitlines()) == 4
    assert said[0].startswith("0 of 3 runs: ")
    assert said[-1].startswith("2 of 3 runs, about 0 min left: peftjax ia3")


def test_rows_of_other_runs_are_kept_apart(tmp_path):
    path, wanted = tmp_path / "rows.jsonl", run()
    for other in (run(seed=1), run(steps=7), run("torch")):
        append(path, {**dataclasses.asdict(other), "seconds": 1.0})
    assert missing([wanted], read(path)) == [wanted]


def test_time_left_goes_by_runs_of_the_same_kind():
    rows = [row(0.5, seconds=3.0), row(0.5, seconds=5.0), row(0.5, "torch", seconds=10.0)]
    assert seconds_left([run(seed=7)], rows) == 4
    assert seconds_left([run("torch", "hra", seed=7), run(texts=4000)], rows) == 14
    assert seconds_left([run()], []) is None


# --- tables


def rows_of(method, accuracies, framework="peftjax", **fields):
    return [
        row(accuracy, framework, method, seed=seed, **fields)
        for seed, accuracy in enumerate(accuracies)
    ]


def test_accuracies_with_their_errors():
    rows = [*rows_of("lora", [0.8, 0.9]), *rows_of("lora", [0.7, 0.9], "torch")]
    shown = quality_tables.accuracies(rows, 60)
    # Half of the difference of two numbers is their standard error.
    assert "| 85.0 ± 5.0 % | 80.0 ± 10.0 % | 5.0 ± 5.0 | level or above | 2 |" in shown


@pytest.mark.parametrize(
    ("ours", "standing"),
    [
        ([0.79, 0.79], "level or above"),
        ([0.77, 0.77], "within one error"),
        ([0.6, 0.6], "below by more than one error"),
    ],
)
def test_standing(ours, standing):
    rows = [*rows_of("lora", ours), *rows_of("lora", [0.76, 0.80], "torch")]
    assert f"| {standing} |" in quality_tables.accuracies(rows, 60)
    assert f"| {standing} |" in quality_tables.by_method(rows)


def test_a_mean_over_settings_is_over_the_same_settings():
    """A seed that one method lacks is left out for all."""
    pairs = [("lora", [0.8, 0.9]), ("lora", [0.8, 0.9]), ("hra", [0.7, 0.6]), ("hra", [0.7])]
    sides = ["peftjax", "torch"] * 2
    rows = [r for (m, own), side in zip(pairs, sides, strict=True) for r in rows_of(m, own, side)]
    shown = quality_tables.by_method(rows)
    assert "| LoRA | 80.0 % | 80.0 % |" in shown
    assert "| HRA | 70.0 % | 70.0 % |" in shown
    assert quality_tables.whole(rows[:-1]) == []


def test_claims_pair_the_budgets_that_the_papers_do():
    rows = [
        *rows_of("lora", [0.80, 0.80, 0.81]),
        *rows_of("adalora", [0.85, 0.86, 0.86]),  # the same budget
        *rows_of("hra", [0.80, 0.81, 0.80], budget=1),  # half of the parameters
        *rows_of("loha", [0.70, 0.70, 0.72], budget=1),  # as many parameters
        *rows_of("xlora", [0.90, 0.91, 0.90], experts=[0.5, 0.8, 0.7]),
        *rows_of("xlora", [0.92, 0.91, 0.90], budget=4, experts=[0.9, 0.8, 0.7]),
    ]
    found = {claim.where: claim for claim in quality_tables.claims(rows)}
    wanted = {
        "60 texts: AdaLoRA, r 2 − LoRA, r 2": (5.333, "holds"),
        "60 texts: HRA, r 2 − LoRA, r 2": (0.0, "not refuted"),
        "60 texts: LoHa, r 1 − LoRA, r 2": (-9.667, "does not hold"),
        "60 texts: X-LoRA, r 2 − best expert": (10.333, "holds"),
        "60 texts: X-LoRA, r 4 − best expert": (1.0, "not shown"),
        "mean of these": (5.667, "holds"),
    }
    assert found.keys() == wanted.keys()
    for where, (points, verdict) in wanted.items():
        difference = found[where].sides["peftjax"]
        assert difference.mean == pytest.approx(points, abs=1e-3)
        assert quality_tables.verdict(found[where], difference) == verdict


def test_broken_tells_what_is_apart():
    once = row(None, "both", loss=1e-6, gradient=2e-6, tensor="a.lora_A")
    rows = [once, *rows_of("lora", [0.8]), *rows_of("lora", [0.8], "torch")]
    assert quality.broken(rows) == []
    far = [{**once, "gradient": 2e-4}, {**once, "loss": float("nan")}]
    assert len(quality.broken(far)) == 2
    other = rows_of("lora", [0.8], "torch", parameters=11)
    assert "parameters differ" in quality.broken([*rows_of("lora", [0.8]), *other])[0]


def test_tables_and_plots_of_any_part_of_a_grid(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        each
        for side in ("peftjax", "torch")
        for method in quality.METHODS
        for budget in (1, 2)
        for each in rows_of(method, [0.8, 0.82], side, budget=budget, experts=[0.7])
    ]
    once = row(None, "both", loss=1e-6, gradient=2e-6, tensor="a.lora_A")
    for part in ([], [once], rows[:1], rows, [once, *rows]):
        shown = quality.tables(part)
        assert shown.count("linear probe, where") == any(r["framework"] != "both" for r in part)
        for line in shown.splitlines():
            assert not line.startswith("| ---") or line.count("|") > 2
    pictures = quality.plots(rows, tmp_path)
    assert [each.name for each in pictures] == ["quality.png", "quality_claims.png"]
    assert all(each.read_bytes().startswith(b"\x89PNG") for each in pictures)
    assert quality.plots([once], tmp_path) == []


def test_report_of_a_file(tmp_path, capsys):
    """Nothing is run; what is broken is told by the exit code."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "rows.jsonl"
    kept = {"texts": 500, "steps": 100, "held_out": 1000}
    append(path, row(0.8125, **kept))
    append(path, row(0.25, **kept | {"steps": 99}))  # of another grid
    assert quality.main(["--report", "--results", str(path)]) == 0
    assert "| LoRA, r 2 | 10 | 81.2 % |" in capsys.readouterr().out
    assert (tmp_path / "quality.png").exists()
    append(path, row(None, "both", loss=1.0, gradient=2e-6, tensor="a.lora_A", **kept))
    assert quality.main(["--report", "--results", str(path)]) == 1
    assert "the first loss is 1.0e+00 from torch PEFT's" in " ".join(
        capsys.readouterr().err.split()
    )


# --- both frameworks, on a tiny model


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The benchmark's task, on a random two-layer BERT and made-up texts."""
    pytest.importorskip("torch", reason="pip install -e '.[interop]'")
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from peftjax.cli import assets

    texts = [f"{'good' if n % 3 else 'bad'} day w{n % 7} w{n % 11} w{n}" for n in range(160)]
    words = sorted({word for text in texts for word in text.split()})
    directory = tmp_path_factory.mktemp("bert")
    (directory / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    transformers.set_seed(0)
    config = transformers.BertConfig(
        vocab_size=5 + len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    transformers.BertModel(config).save_pretrained(directory)
    transformers.BertTokenizerFast(str(directory / "vocab.txt")).save_pretrained(directory)
    tweets = directory / "tweets.csv"
    # The last word of every seventh text says nothing of its label.
    lines = [f"{'ab'[n % 7 == 0]}{text.split()[0]},1,{text}" for n, text in enumerate(texts)]
    tweets.write_text("sentiment,confidence,text\n" + "\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "minilm_directory", lambda *_: directory)
        patch.setattr(assets, "tweets_file", lambda *_: tweets)
        # transformers relies on JAX's ordinary promotion, which the other tests forbid.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            quality_task.task.cache_clear()
            yield quality_task
            quality_task.task.cache_clear()


QUIET = pytest.mark.filterwarnings("ignore:.*(Flax|flax|JAX|jax).*", "ignore::UserWarning")


@QUIET
@pytest.mark.parametrize("method", quality.METHODS)
def test_first_step_is_the_same(method, shared):
    from benchmarks import quality_torch

    seen = quality_torch.compare(run("both", method))
    assert seen["loss"] < 1e-5
    assert seen["gradient"] < quality_tables.TOLERANCE
    assert seen["smallest"] > 1e-6


@QUIET
@pytest.mark.parametrize("method", ["lora", "adalora", "xlora"])
def test_training_is_the_same(method, shared, monkeypatch):
    """The optimizers, clipping, the allocators, and the experts behind a gate."""
    monkeypatch.setattr(shared, "LARGEST_GRADIENT", 0.5)  # so that every step is clipped
    here, there = (quality.perform(run(side, method, steps=30)) for side in ("peftjax", "torch"))
    assert json.loads(json.dumps(here)) == here
    assert len(here["first_losses"]) == quality_task.FIRST
    np.testing.assert_allclose(here["first_losses"], there["first_losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(here["last_loss"], there["last_loss"], rtol=0, atol=1e-4)
    assert here["parameters"] == there["parameters"]
    assert here["kept"] == there["kept"]
    assert (here["kept"] < here["parameters"]) == (method == "adalora")
    assert here["accuracy"] == there["accuracy"]


@QUIET
@pytest.mark.parametrize("side", ["peftjax", "torch"])
def test_training_learns(side, shared, monkeypatch):
    moved = quality.perform(run(side, "ia3", steps=40))
    monkeypatch.setitem(shared.LEARNING_RATE, "ia3", 0.0)
    still = quality.perform(run(side, "ia3", steps=40))
    assert moved["first_losses"][0] == still["first_losses"][0]
    assert moved["last_loss"] < still["last_loss"] - 0.01


def test_allocator_sees_clipped_gradients():
    """As in torch, whose gradients are clipped in place before PEFT looks at them."""
    params, x = {"dense": {"kernel": jnp.ones((8, 6))}}, jnp.ones((2, 8))
    sites = peftjax.find_sites(lambda params, x: x @ params["dense"]["kernel"], params, x)
    config = peftjax.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["dense"])
    adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
    optimizer = quality_jax.optimizer(quality_task.rates(9, 0.1), adapter)

    def sensitivity(gradient):
        gradients = jax.tree.map(lambda x: jnp.full(x.shape, gradient), adapter.params)
        state = optimizer.update(gradients, optimizer.init(adapter.params), adapter.params)[1]
        return optax.tree.get(state, "sensitivity")

    with jax.numpy_dtype_promotion("standard"):  # optax's adamw relies on it
        clipped, far, small = (sensitivity(size) for size in (3.0, 100.0, 1e-3))
    chex.assert_trees_all_close(clipped, far, rtol=1e-5)
    assert 0 < small["dense"]["lora_A"].max() < 0.1 * clipped["dense"]["lora_A"].max()


def test_learning_rates():
    rates = quality_task.rates(100, 2.0)
    assert rates.shape == (100,)
    assert rates[9] == rates.max() == 2
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 5)
    assert (np.diff(rates[9:]) < 0).all()
    assert 0 < rates[-1] < 0.01
    assert quality_task.rates(1, 2.0).tolist() == [2.0]
