"""The quickstart command: what it refuses, and a whole run on a tiny model."""

import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from peftjax.cli import display, finetune, main, options, probe, quickstart, result
from peftjax.cli.encoder import Encoder
from peftjax.cli.errors import CommandError, UsageError
from peftjax.cli.options import Quickstart
from peftjax.cli.result import Result
from peftjax.cli.sentiment import Tokens
from peftjax.cli.task import Task

ROWS = [f"{'good' if n % 2 else 'bad'} day number w{n % 7} w{n // 7}" for n in range(240)]


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Texts whose label is one of their words."""
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "".join(f"{row},{row.split()[0]}\n" for row in ROWS))
    return path


# --- the command line


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "quickstart" in capsys.readouterr().out


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 0
    assert "quickstart" in capsys.readouterr().out


def test_help_of_quickstart_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quickstart", "--help"])
    text = capsys.readouterr().out
    assert "Examples" in text
    assert "--data" in text
    assert "by method: lora 8, dora 8" in " ".join(text.replace("│", " ").split())
    for method in typing.get_args(options.Method):
        assert f"\n  {method} " in text


def test_help_is_quick_to_start() -> None:
    """Nothing that only the job needs is imported for it."""
    code = (
        "import sys; from peftjax.cli import main\n"
        "try: main(['quickstart', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'transformers', 'matplotlib', 'orbax', 'torch'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_words_end_with_two() -> None:
    for words in (["quick"], ["quickstart", "--stepz", "3"], ["quickstart", "--steps", "many"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps must be above 0, not 0"),
        (["--steps", "-5"], "--steps must be above 0, not -5"),
        (["--rank", "0"], "--rank must be above 0"),
        (["--batch-size", "0"], "--batch-size must be above 0"),
        (["--learning-rate", "nan"], "--learning-rate must be above 0"),
        (["--tokens", "2"], "--tokens must be 4 or more"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--seed", str(2**32)], "and below 2**32, not 4294967296"),
        (["--model", "nowhere"], "no directory nowhere"),
        (["--data", "nothing.csv"], "no file nothing.csv"),
        (["--label-column", "stars"], "--data"),
        (["--method", "ia3", "--rank", "4"], "--rank: ia3 has no rank"),
        (["--method", "ia3", "--alpha", "8"], "--alpha: ia3 has no alpha"),
        (["--method", "hra", "--alpha", "8"], "--alpha: hra has no alpha"),
        (["--method", "hra", "--rank", "3"], "--rank must be even for hra, not 3"),
        (["--method", "hra", "--rank", "0"], "--rank must be above 0, not 0"),
        (["--method", "loha", "--rank", "-2"], "--rank must be above 0, not -2"),
        (["--method", "dora", "--alpha", "0"], "--alpha must be above 0, not 0"),
    ],
)
def test_bad_flags_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quickstart", *flags]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.strip().splitlines()) == 1


def test_paths_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        options.check(Quickstart(output=file))
    with pytest.raises(UsageError, match="is a directory"):
        options.check(Quickstart(json=tmp_path))
    for inside in (file / "x", file / "y" / "x"):
        with pytest.raises(UsageError, match=f"--output: {file} is a file"):
            options.check(Quickstart(output=inside))
        with pytest.raises(UsageError, match=f"--json: {file} is a file"):
            options.check(Quickstart(json=inside))
    for taken in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(UsageError, match=f"--json: {taken} becomes a directory"):
            options.check(Quickstart(output=tmp_path / "a" / "b", json=taken))
    options.check(Quickstart(output=tmp_path / "a", json=tmp_path / "a" / "b" / "x.json"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": "{"}, "names no model_type"),
        ({"config.json": "[]"}, "names no model_type"),
        ({"config.json": '{"model_type": "gpt2"}'}, "'gpt2' model; quickstart knows bert"),
        ({"config.json": '{"model_type": "bert"}'}, "has no weights"),
        (
            {"config.json": '{"model_type": "bert"}', "model.safetensors": ""},
            "has no tokenizer",
        ),
    ],
)
def test_directories_that_hold_no_model(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        options.check(Quickstart(model=tmp_path))


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({}, "needs transformers: python -m pip install"),
        ({"transformers": "4.57.1"}, "needs matplotlib: python -m pip install"),
        ({"transformers": "5.0.0", "matplotlib": "3.10"}, "this is 5.0.0: python -m pip install"),
    ],
)
def test_missing_extras_are_one_line(
    installed: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["quickstart"]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.strip().splitlines()) == 1


def test_a_quantised_base_needs_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["quickstart", "--base-dtype", "nf4"]) == 2
    shown = capsys.readouterr().err
    assert '--base-dtype nf4 needs qwix: python -m pip install -e ".[quickstart,quant]"' in shown


def test_interruption_ends_cleanly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(given: Quickstart) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "check", interrupt)
    assert main(["quickstart"]) == 130
    assert "interrupted" in capsys.readouterr().err


# --- the methods


@pytest.fixture(params=typing.get_args(options.Method))
def method(request: pytest.FixtureRequest) -> options.Method:
    return request.param


def test_every_method_has_a_recipe_and_a_config() -> None:
    assert typing.get_args(options.Method) == tuple(options.RECIPES)
    # The config of a mixture is made of its experts'.
    assert tuple(options.RECIPES) == (*quickstart.METHODS, "xlora")


def test_recipes_pass_their_own_check(method: options.Method) -> None:
    recipe = options.RECIPES[method]
    options.check(Quickstart(method, recipe.rank, recipe.alpha, learning_rate=recipe.learning_rate))


def test_flags_change_the_recipe_and_nothing_else(method: options.Method) -> None:
    own = options.RECIPES[method]
    assert Quickstart(method).recipe == own
    assert Quickstart(method, learning_rate=1.0).recipe == dataclasses.replace(
        own, learning_rate=1.0
    )
    settings = Quickstart(method).settings()
    assert (settings["rank"], settings["alpha"]) == (own.rank, own.alpha)
    assert settings["learning_rate"] == own.learning_rate


@pytest.mark.parametrize("method", list(quickstart.METHODS))
def test_the_recipe_reaches_the_config(method: options.Method) -> None:
    """Whatever a method has, and no more: a number that is accepted is used."""
    own = options.RECIPES[method]
    given = Quickstart(method, rank=own.rank and 6, alpha=own.alpha and 5.0)
    config = quickstart.METHODS[method](given, options.MODULES["bert"], target_modules="all-linear")
    assert getattr(config, "r", getattr(config, "target_r", None)) == given.rank
    assert getattr(config, "lora_alpha", getattr(config, "alpha", None)) == given.alpha
    if method == "adalora":
        assert (config.init_r, config.total_step) == (9, given.steps)
    assert getattr(config, "use_dora", False) == (method == "dora")


# --- the probe


def clusters(seed: int, count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes; one feature never moves, another is large."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count).astype(np.int32)
    features = generator.normal(size=(count, 6)).astype(np.float32)
    features[np.arange(count), labels] += 1.5
    features[:, 4] = 7.0
    features[:, 5] *= 100.0
    return features, labels


def test_probe_reaches_the_optimum() -> None:
    """The objective is convex, so a vanishing gradient is the whole story."""
    features, labels = clusters(0)
    penalty = 0.01
    head = probe.fit_probe(features, labels, 3, penalty)
    kernel, bias = (np.asarray(head[name], np.float64) for name in ("kernel", "bias"))

    deviation = features.astype(np.float64).std(axis=0)
    logits = features.astype(np.float64) @ kernel + bias
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    error = (chances - np.eye(3)[labels]) / len(labels)
    moving = deviation > 0
    standardised = (features - features.mean(axis=0))[:, moving] / deviation[moving]
    gradient = standardised.T @ error + penalty * kernel[moving] * deviation[moving][:, None]
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    np.testing.assert_allclose(error.sum(axis=0), 0, atol=1e-4)
    np.testing.assert_array_equal(kernel[~moving], 0)


def test_probe_without_a_signal_gives_the_frequencies() -> None:
    labels = np.repeat(np.arange(3, dtype=np.int32), [10, 30, 60])
    head = probe.fit_probe(np.ones((100, 4), np.float32), labels, 3, 0.01)
    chances = np.asarray(jax.nn.softmax(head["bias"]))
    np.testing.assert_allclose(chances, [0.1, 0.3, 0.6], atol=1e-4)
    np.testing.assert_array_equal(np.asarray(head["kernel"]), 0)


def test_best_probe_generalises() -> None:
    features, labels = clusters(1)
    head = probe.best_probe(features, labels, 3, seed=0)
    fresh, truth = clusters(2)
    answers = np.argmax(fresh @ np.asarray(head["kernel"]) + np.asarray(head["bias"]), axis=1)
    assert np.mean(answers == truth) > 0.7


# --- the display


def test_bar_prints_plain_lines_without_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=100)
    shown = display.Display(console)
    with shown.bar("Training", 5, every=2) as advance:
        for done in range(1, 6):
            advance(done, f"loss {done}")
    lines = typing.cast(io.StringIO, console.file).getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["2/5", "4/5", "5/5"]
    assert "loss 4" in lines[1]
    assert "ETA" in lines[1]


def test_phases_add_up() -> None:
    shown = display.Display(Console(file=io.StringIO()))
    for _ in range(2):
        with shown.phase("one", "Doing one"):
            pass
    assert list(shown.seconds) == ["one"]
    shown.done("one", "[not markup]")
    assert "[not markup]" in typing.cast(io.StringIO, shown.console.file).getvalue()


# --- training


def test_optimizer_warms_up_and_ends_at_nothing() -> None:
    schedule = finetune.learning_rates(100, 1e-3)
    rates = [float(schedule(step)) for step in range(101)]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(1e-3)
    assert rates[100] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_optimizer_takes_any_number_of_steps(steps: int) -> None:
    schedule = finetune.learning_rates(steps, 1e-3)
    assert all(np.isfinite(schedule(step)) for step in range(steps + 1))


# --- a whole run


@pytest.fixture
def as_jax_comes() -> Iterator[None]:
    """transformers relies on JAX's ordinary promotion, which the other tests forbid."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT and its tokenizer, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    words = sorted({word for row in ROWS for word in row.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    directory = tmp_path_factory.mktemp("bert")
    (directory / "vocab.txt").write_text("\n".join(vocabulary))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        transformers.FlaxBertModel(config).save_pretrained(directory)
    transformers.BertTokenizerFast(str(directory / "vocab.txt")).save_pretrained(directory)
    return directory


@pytest.mark.usefixtures("as_jax_comes")
def test_a_whole_run_on_a_tiny_model(
    tiny_bert: Path,
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, file = tmp_path / "out", tmp_path / "deep" / "result.json"
    paths = f"--model {tiny_bert} --data {reviews} --output {out} --json {file}"
    numbers = "--steps 4 --rank 3 --alpha 5 --tokens 8 --seed 1"
    code = main(["quickstart", *paths.split(), *numbers.split()])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "points over the probe" in shown.out

    found = json.loads(file.read_text())
    assert set(found) == {field.name for field in dataclasses.fields(Result)}
    assert 0 <= found["probe_accuracy"] <= 1
    assert 0 <= found["accuracy"] <= 1
    gain = 100 * (found["accuracy"] - found["probe_accuracy"])
    assert found["gain_points"] == pytest.approx(gain)
    # Query and value in two layers, both factors; a classifier of two labels.
    trainable = 2 * 2 * 2 * 16 * 3 + 16 * 2 + 2
    assert found["trainable_parameters"] == trainable
    assert found["total_parameters"] == found["model_bytes"] // 4 + trainable
    assert found["adapter_bytes"] >= 4 * trainable
    assert found["labels"] == ["bad", "good"]
    assert found["held_out_texts"] == 60
    assert found["train_texts"] == 180
    assert found["held_out_curve"][0] == [0, found["probe_accuracy"]]
    assert found["held_out_curve"][-1] == [4, found["accuracy"]]
    assert found["settings"]["rank"] == 3
    assert found["settings"]["data"] == str(reviews)
    assert found["versions"]["jax"] == jax.__version__
    assert found["seconds"] > 0
    assert {"model", "features", "probe", "train", "evaluate", "save", "merge"} <= set(
        found["phase_seconds"]
    )
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "adapter").is_dir()


@pytest.mark.parametrize("method", list(quickstart.METHODS))
@pytest.mark.usefixtures("as_jax_comes")
def test_a_whole_run_of_every_method(
    method: options.Method,
    tiny_bert: Path,
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run itself checks that it starts as the probe, and what is restored and merged."""
    file = tmp_path / "result.json"
    paths = f"--model {tiny_bert} --data {reviews} --output {tmp_path / 'out'} --json {file}"
    base = {"dora": "nf4", "hra": "int8", "ia3": "int4"}.get(method, "float32")
    flags = f"--method {method} --base-dtype {base} {paths} --steps 4 --tokens 8"
    code = main(["quickstart", *flags.split()])
    shown = capsys.readouterr()
    assert code == 0, shown.err

    recipe = options.RECIPES[method]
    title = method if recipe.rank is None else f"{method}, rank {recipe.rank}"
    assert f"{title}, on " in shown.out
    assert f"{title}, 4 steps{'' if base == 'float32' else f', {base} base'}" in shown.out
    assert "None" not in shown.out
    found = json.loads(file.read_text())
    assert found["settings"]["learning_rate"] == recipe.learning_rate
    assert found["settings"]["rank"] == recipe.rank
    # In each of two layers: both factors, and the lengths of DoRA; twice the factors; reflections
    # of the inputs; or scales of keys, values and what both dense layers read.
    r = recipe.rank or 0
    a_layer = {
        "lora": 2 * (2 * 16 * r),
        "dora": 2 * (2 * 16 * r + 16),
        "loha": 2 * (4 * 16 * r),
        "hra": 2 * (16 * r),
        "ia3": 16 + 16 + 16 + 32,
        # Query, key and value: whatever their ranks, those of the budget are left in all.
        "adalora": 3 * (16 + 1 + 16) * r,
    }
    assert found["trainable_parameters"] == 2 * a_layer[method] + 16 * 2 + 2
    pictures = {"curves.png", *(["ranks.png"] if method == "adalora" else [])}
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == pictures
    assert len(found["ranks"]) == (6 if method == "adalora" else 0)
    # Six weights in each of two layers are quantised; their bytes are no longer among arguments.
    whole = 4 * (found["total_parameters"] - found["trainable_parameters"])
    weights, outputs = 2 * (4 * 16 * 16 + 2 * 16 * 32), 2 * (4 * 16 + 32 + 16)
    saved = {"int8": 3 * weights, "int4": 7 * weights // 2, "nf4": 7 * weights // 2}
    smaller = saved[base] - 4 * outputs if base in saved else 0
    assert found["model_bytes"] == whole - smaller
    assert whole - smaller < found["argument_bytes"] < whole - smaller + 40_000


@pytest.mark.usefixtures("as_jax_comes")
def test_a_whole_run_of_a_mixture(
    tiny_bert: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts on slices of the texts, the gate on all: numbers, pictures and a page."""
    file, out = tmp_path / "result.json", tmp_path / "out"
    paths = f"--model {tiny_bert} --data {reviews} --output {out} --json {file}"
    flags = f"--method xlora --experts 2 {paths} --steps 5 --tokens 8"
    code = main(["quickstart", *flags.split()])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "no merged weight" in shown.out

    found = json.loads(file.read_text())
    mixture = found["mixture"]
    assert len(mixture["experts"]) == 2
    assert sum(mixture["train_texts"]) == found["train_texts"]
    assert sum(mixture["held_out_texts"]) == found["held_out_texts"]
    others = {"probe", "uniform mix", "told the topic", "gated mix"}
    assert set(mixture["accuracy"]) == {*mixture["experts"], *others}
    assert mixture["accuracy"]["gated mix"] == found["accuracy"]
    for shares in mixture["scalings"]:
        assert shares is None or sum(shares) == pytest.approx(1, abs=1e-3)
    assert mixture["best_expert"] in mixture["experts"]
    # Both factors of two modules in two layers of each expert; and the gate.
    r = options.RECIPES["xlora"].rank
    assert found["trainable_parameters"] > 2 * 2 * 2 * (2 * 16 * r)
    assert {path.name for path in out.glob("*.png")} == {"curves.png", "routing.png"}
    assert "<html" in (out / "routing.html").read_text()


TINY = {
    "bert": {"num_hidden_layers": 2, "intermediate_size": 32},
    "roberta": {"num_hidden_layers": 2, "intermediate_size": 32},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "albert": {"num_hidden_layers": 2, "intermediate_size": 32, "embedding_size": 8},
}


@pytest.mark.usefixtures("as_jax_comes")
@pytest.mark.parametrize("kind", options.MODULES)
def test_adapters_find_their_modules_in_every_kind_of_model(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 9, "hidden_size": 16, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(kind, **sizes | TINY[kind])
    model = transformers.FlaxAutoModel.from_config(config)
    head = {"kernel": np.zeros((16, 2), np.float32), "bias": np.zeros(2, np.float32)}
    ids = np.ones((2, 8), np.int32)
    task = Task(
        title=kind,
        encoder=Encoder(model, lambda texts: texts, model.base_model_prefix, 8),
        params={model.base_model_prefix: model.params, "classifier": head},
        modules=options.MODULES[kind],
        texts=("one", "two"),
        train=Tokens(ids, ids, np.zeros(2, np.int32)),
        held_out=Tokens(ids, ids, np.zeros(2, np.int32)),
        features=(np.zeros((2, 16)), np.zeros((2, 16))),
        labels=("no", "yes"),
        probe_logits=np.zeros((2, 2), np.float32),
    )
    for method in ("lora", "ia3"):
        adapter, _ = quickstart.attach(Quickstart(method), task)
        adapted = adapter.params.keys() - {"classifier"}
        for part in options.RECIPES[method].parts:
            assert any(name.endswith(f".{task.modules[part]}") for name in adapted)
    # The second feedforward layer scales its inputs, which are wider than the model.
    assert any(
        np.size(arrays["ia3_l"]) == 32 for arrays in adapter.params.values() if "ia3_l" in arrays
    )


@pytest.mark.usefixtures("as_jax_comes")
def test_too_many_tokens_for_the_model(
    tiny_bert: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--model {tiny_bert} --data {reviews} --output {tmp_path / 'out'} --tokens 64"
    assert main(["quickstart", *flags.split()]) == 2
    assert "--tokens 64" in capsys.readouterr().err


@pytest.mark.usefixtures("as_jax_comes")
def test_weights_that_are_none_are_one_clear_line(
    tiny_bert: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(tiny_bert, tmp_path / "broken")
    (broken / "flax_model.msgpack").write_bytes(b"cut short")
    flags = f"--model {broken} --data {reviews} --output {tmp_path / 'out'}"
    assert main(["quickstart", *flags.split()]) == 2
    shown = capsys.readouterr().err
    assert "cannot load" in shown
    assert len(shown.strip().splitlines()) == 1


# --- the outcome


def outcome(accuracy: float, **settings: object) -> Any:
    """A result with made-up numbers."""
    return Result(
        probe_accuracy=0.8,
        accuracy=accuracy,
        gain_points=100 * (accuracy - 0.8),
        gain_error=0.6,
        trainable_parameters=75_000,
        total_parameters=22_800_000,
        adapter_bytes=300_000,
        model_bytes=90_900_000,
        argument_bytes=91_900_000,
        seconds=120.0,
        phase_seconds={"download": 3.0, "train": 60.0},
        train_texts=4000,
        held_out_texts=1500,
        labels=("negative", "positive"),
        held_out_curve=((0, 0.8), (150, accuracy)),
        ranks={},
        mixture=None,
        settings={**Quickstart().settings(), **settings},
        versions={},
    )


@pytest.mark.parametrize(
    ("accuracy", "settings", "words"),
    [
        (0.85, {}, "+5.0 points over the probe: the goal of 4 or more is reached."),
        (0.82, {}, "+2.0 points over the probe: the goal of 4 or more is missed."),
        (0.82, {"steps": 20}, "+2.0 points over the probe."),
        (0.79, {"data": "mine.csv"}, "-1.0 points over the probe."),
        (0.82, {"method": "ia3"}, "+2.0 points over the probe."),
        (0.82, {"base_dtype": "nf4"}, "+2.0 points over the probe."),
    ],
)
def test_verdict(accuracy: float, settings: dict[str, Any], words: str) -> None:
    assert result.verdict(outcome(accuracy, **settings)) == words


def test_tables_fit_an_ordinary_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(result.tables(outcome(0.85)))
    shown = typing.cast(io.StringIO, console.file).getvalue()
    for words in (
        "80.0%",
        "85.0%",
        "+5.0 ± 0.6 points",
        "75,000",
        "0.33%",
        "300.0 kB",
        "90.9 MB",
        "91.9 MB",
    ):
        assert words in shown
    assert "…" not in shown


def test_tables_of_a_method_without_a_rank() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(result.tables(outcome(0.85, **Quickstart("ia3").settings())))
    shown = typing.cast(io.StringIO, console.file).getvalue()
    assert "ia3, 350 steps" in shown
    assert "None" not in shown


def test_answers_that_differ_are_an_error() -> None:
    logits = np.array([[1.0, 2.0], [3.0, -4.0]])
    assert finetune.agree("it", logits, logits) == 0
    with pytest.raises(CommandError, match="it answers differently"):
        finetune.agree("it", logits + 0.01, logits)
    with pytest.raises(CommandError, match="it answers differently"):
        finetune.agree("it", logits * np.nan, logits)
