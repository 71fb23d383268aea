"""The convert command: what it refuses, and what needs no model."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import peftjax
from peftjax.checkpoint import save_adapter
from peftjax.cli import main


def converted(*words: Any) -> int:
    return main(["convert", *map(str, words)])


def files(directory: Path) -> list[str]:
    """All names below a directory, hidden ones too."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


# --- the command line


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        converted("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "Examples: peftjax convert",
        "an Orbax adapter becomes a PEFT adapter",
        "a PEFT adapter becomes an Orbax adapter",
        "a whole model that needs no adapter",
        "--model DIR",
        "--plain-lora",
    ):
        assert words in text
    assert "--no-merge" not in text


def test_help_of_all_lists_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "peftjax convert " in capsys.readouterr().out


def test_help_is_quick_to_start() -> None:
    code = (
        "import sys; from peftjax.cli import main\n"
        "try: main(['convert', '--help'])\n"
        "except SystemExit: pass\n"
        "job = {'transformers', 'peftjax.cli.converting', 'torch'} & set(sys.modules)\n"
        "sys.exit(', '.join(job) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What looks like adapters, models and other things, in the working directory."""
    for name in (
        "orbax/adapter.json",
        "run/adapter/adapter.json",
        "peft/adapter_config.json",
        "peft/adapter_model.safetensors",
        "both/adapter.json",
        "both/adapter_model.bin",
        "text/notes.txt",
        "model/config.json",
        "whole/config.json",
        "settings/config.json",
        "full/config.json",
        "full/model.safetensors",
        "full/notes.txt",
        "full/data/x",
        "file",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tmp_path / "bare").mkdir()
    (tmp_path / "settings" / "config.json").write_text('{"port": 80}')
    for name in ("model", "full"):
        (tmp_path / name / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere out", "no directory nowhere"),
        (
            "text out",
            "text holds no adapter but notes.txt: an Orbax adapter has adapter.json, PEFT's has",
        ),
        ("bare out", "bare holds no adapter but nothing"),
        ("both out", "holds an adapter of Orbax (adapter.json) and one of PEFT"),
        ("peft out", "peft holds a PEFT adapter, which does not say"),
        ("peft out --model nowhere", "--model: no directory nowhere"),
        ("peft out --model text", "--model: text has no config.json"),
        ("orbax out --merge", "--merge: into which model? Add --model DIR"),
        ("orbax out --architecture BertModel", "--architecture is that of a model"),
        ("orbax out --rank 4", "--rank is that of --plain-lora"),
        ("orbax out --plain-lora --rank 0", "--rank must be above 0, not 0"),
        ("orbax out --merge --model model --plain-lora", "with --merge no adapter is written"),
        ("orbax out --merge --model model --base-model x", "--base-model is for PEFT's files"),
        ("orbax out --merge --model model --allow-foreign", "--allow-foreign is for PEFT's"),
        ("peft out --model model --base-model x", "and this writes an Orbax adapter"),
        ("orbax out --names nonsense", "--names: no names are known for the model type"),
        ("orbax file", "file is a file, not a directory"),
        ("orbax text", "text is not empty: name another, or add --overwrite"),
        ("orbax text --overwrite", "text is neither an adapter nor a model"),
        ("orbax settings --overwrite", "settings is neither an adapter nor a model"),
        ("orbax model --overwrite", "model is neither an adapter nor a model"),
        ("orbax peft --overwrite", "peft is neither an adapter nor a model"),
        ("orbax full --overwrite", "full also holds data, notes.txt, so it stays as it is"),
        ("orbax orbax --overwrite", "orbax holds orbax, which is read"),
        ("run run --overwrite", "run holds run/adapter, which is read"),
        ("run whole --model whole --overwrite", "whole holds whole, which is read"),
        ("orbax . --overwrite", ". holds orbax, which is read"),
    ],
)
def test_bad_words_are_one_line_and_change_nothing(
    shelf: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(shelf)
    assert converted(*words.split()) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.strip().splitlines()) == 1
    assert files(shelf) == before


@pytest.mark.parametrize("source", ["orbax", "run", "peft"])
def test_mixtures_of_experts_are_refused(
    shelf: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shelf / source / ("adapter" if source == "run" else "")
    config = '{"peft_type": "XLORA"}'
    (place / "adapter_config.json").write_text(config)
    if source != "peft":
        (place / "adapter.json").write_text(f'{{"config": {config}}}')
    assert converted(source, "out") == 2
    assert f"{source} holds an X-LoRA adapter" in capsys.readouterr().err.replace("/adapter", "")
    assert not (shelf / "out").exists()


@pytest.mark.parametrize("version", [None, "5.0.0"])
def test_models_need_transformers_with_flax(
    shelf: Path,
    version: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert converted("peft", "out", "--model", "model") == 2
    assert "python -m pip install" in capsys.readouterr().err


# --- without a model


PARAMS = {"dense": {"kernel": np.ones((6, 4), np.float32)}}


def toy(config: Any) -> peftjax.Adapter:
    """An adapter of one matrix product."""
    apply_fn = lambda params, x: x @ params["dense"]["kernel"]  # noqa: E731
    sites = peftjax.find_sites(apply_fn, PARAMS, jnp.ones((2, 6)))
    return peftjax.init_adapter(jax.random.key(0), config, sites, PARAMS)


def factors(directory: Path) -> list[np.ndarray]:
    """A and B out of PEFT's file, laid out (in, r) and (r, out)."""
    tensors = load_file(directory / "adapter_model.safetensors")
    return [tensors[f"base_model.model.dense.lora_{name}.weight"].T for name in "AB"]


def lora(**fields: Any) -> peftjax.LoraConfig:
    return peftjax.LoraConfig(
        **{"r": 2, "target_modules": ["dense"], "init_lora_weights": False, **fields}
    )


def test_a_run_of_quickstart_becomes_peft_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = toy(lora())
    save_adapter(tmp_path / "run" / "adapter", adapter)
    assert converted(tmp_path / "run", tmp_path / "out", "--base-model", "mine") == 0
    shown = capsys.readouterr().out
    assert "LoRA, rank 2" in shown
    assert "adapter_model.safetensors" in shown
    assert "PeftModel.from_pretrained(model, " in shown

    assert files(tmp_path / "out") == ["adapter_config.json", "adapter_model.safetensors"]
    a, b = factors(tmp_path / "out")
    np.testing.assert_array_equal(a, adapter.params["dense"]["lora_A"])
    np.testing.assert_array_equal(b, adapter.params["dense"]["lora_B"])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "mine"
    assert (tmp_path / "out").stat().st_mode & 0o077 == (tmp_path / "run").stat().st_mode & 0o077
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_plain_lora_of_pissa_is_exact_without_the_base(tmp_path: Path) -> None:
    adapter = toy(lora(init_lora_weights="pissa"))
    trained = jax.tree.map(lambda x: x + 0.5, adapter.params)
    adapter = adapter.replace(params=trained)
    save_adapter(tmp_path / "in", adapter)
    assert converted(tmp_path / "in", tmp_path / "out", "--plain-lora") == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    a, b = factors(tmp_path / "out")
    change = peftjax.merge(PARAMS, adapter)["dense"]["kernel"] - 1
    np.testing.assert_allclose(a @ b, change, atol=1e-5)


def test_plain_lora_takes_a_rank(tmp_path: Path) -> None:
    save_adapter(
        tmp_path / "in", toy(peftjax.LoHaConfig(r=2, init_weights=False, target_modules=["dense"]))
    )
    assert converted(tmp_path / "in", tmp_path / "out", "--plain-lora", "--rank", 3) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3


def test_plain_lora_says_that_it_needs_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(tmp_path / "in", toy(peftjax.HRAConfig(r=2, target_modules=["dense"])))
    assert converted(tmp_path / "in", tmp_path / "out", "--plain-lora") == 2
    assert "depends on the weights: add --model" in capsys.readouterr().err


def test_foreign_adapters_are_for_peftjax_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = {"h": {"c_attn": {"kernel": jnp.ones((6, 4))}}}
    apply_fn = lambda params, x: x @ params["h"]["c_attn"]["kernel"]  # noqa: E731
    sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 6)))
    config = peftjax.HRAConfig(r=2, target_modules=["c_attn"])
    save_adapter(tmp_path / "in", peftjax.init_adapter(jax.random.key(0), config, sites))

    words = (tmp_path / "in", tmp_path / "out", "--names", "gpt2")
    assert converted(*words) == 2
    shown = capsys.readouterr().err
    assert "Conv1D" in shown
    assert "--allow-foreign" in shown
    assert len(shown.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

    assert converted(*words, "--allow-foreign") == 0
    shown = capsys.readouterr().out
    assert "torch's PEFT cannot run it" in shown
    assert "load_pretrained(" in shown


def test_overwriting_replaces_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(tmp_path / "in", toy(lora()))
    assert converted(tmp_path / "in", tmp_path / "out") == 0
    (tmp_path / "out" / "README.md").write_text("old")
    before = files(tmp_path)

    def full(directory: Path, *args: Any, **kwargs: Any) -> None:
        (directory / "half").write_text("written")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(peftjax, "save_pretrained", full)
        assert converted(tmp_path / "in", tmp_path / "out", "--overwrite") == 1
        assert converted(tmp_path / "in", tmp_path / "other") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert files(tmp_path) == before

    assert converted(tmp_path / "in", tmp_path / "out", "--overwrite") == 0
    assert files(tmp_path / "out") == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("gone", ["arrays/_METADATA", "adapter.json"])
def test_incomplete_orbax_files_are_one_line(
    tmp_path: Path, gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = save_adapter(tmp_path / "in", toy(lora()))
    (directory / gone).unlink()
    assert converted(directory, tmp_path / "out") in (1, 2)
    shown = capsys.readouterr().err
    assert str(directory) in shown
    assert len(shown.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
