"""The convert command on models of transformers: both ways, merged, and in torch."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peftjax
from peftjax.checkpoint import restore_adapter, save_adapter
from peftjax.cli import main
from peftjax.trees import leaf_paths

TORCH = "torch PEFT is the oracle here: pip install -e '.[interop]'"
TOLERANCE = 1e-4
IDS = np.random.default_rng(0).integers(0, 50, (2, 7))
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}


def converted(*words: Any) -> int:
    return main(["convert", *map(str, words)])


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.fixture(scope="module")
def as_jax_comes() -> Iterator[None]:
    """transformers relies on JAX's ordinary promotion, which the other tests forbid."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class Saved:
    """A random model of transformers, saved as Flax saves it."""

    def __init__(self, directory: Path, name: str, config: Any):
        import transformers

        self.directory, self.config = directory, config
        self.flax = getattr(transformers, f"Flax{name}")(config, _do_init=False)
        rng = np.random.default_rng(1)
        self.params = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype),
            self.flax.params_shape_tree,
        )
        self.flax.save_pretrained(directory, params=self.params)
        (directory / "tokenizer_config.json").write_text('{"its": "own"}')
        for name in ("adapter_config.json", "adapter.json"):
            (directory / name).write_text("{}")  # of somebody else's adapter
        self.sites = peftjax.find_sites(self.logits, self.params, IDS)

    def logits(self, params: Any, ids: Any) -> jax.Array:
        return self.flax(ids, params=params).logits

    def adapter(self, **fields: Any) -> peftjax.Adapter:
        adapter = peftjax.init_adapter(
            jax.random.key(2), peftjax.LoraConfig(r=2, **fields), self.sites, self.params
        )
        rng = np.random.default_rng(3)
        drawn = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), adapter.params)
        return adapter.replace(params=drawn)


def bert(directory: Path) -> Saved:
    import transformers

    config = transformers.BertConfig(**SIZES, num_labels=3)
    return Saved(directory, "BertForSequenceClassification", config)


def gpt2(directory: Path) -> Saved:
    import transformers

    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}
    return Saved(directory, "GPT2LMHeadModel", transformers.GPT2Config(**sizes))


FAMILIES: dict[str, tuple[Callable[[Path], Saved], dict[str, Any]]] = {
    "bert": (bert, {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
}


@pytest.fixture(scope="module")
def family(as_jax_comes: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Makes a model of a family, once."""
    pytest.importorskip("transformers")
    return functools.cache(lambda name: FAMILIES[name][0](tmp_path_factory.mktemp(name)))


@pytest.fixture(params=FAMILIES)
def saved(request: pytest.FixtureRequest, family: Callable[[str], Saved]) -> Saved:
    return family(request.param)


@pytest.fixture
def adapter(saved: Saved) -> peftjax.Adapter:
    return saved.adapter(**FAMILIES[saved.config.model_type][1])


# What one family shows for all.
on_bert = pytest.mark.parametrize("saved", ["bert"], indirect=True)
on_gpt2 = pytest.mark.parametrize("saved", ["gpt2"], indirect=True)


def assert_same(trees: Any, others: Any) -> None:
    """Equal to the last bit, dtypes included."""
    left, right = leaf_paths(trees), leaf_paths(others)
    assert left.keys() == right.keys()
    for path, array in left.items():
        assert array.dtype == right[path].dtype, path
        np.testing.assert_array_equal(np.asarray(array), np.asarray(right[path]), err_msg=path)


def test_to_peft_and_back_is_the_same_to_the_last_bit(
    saved: Saved, adapter: peftjax.Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(tmp_path / "in", adapter)
    names = ("--names", saved.config.model_type)
    assert converted(tmp_path / "in", tmp_path / "peft", *names) == 0
    assert converted(tmp_path / "peft", tmp_path / "back", "--model", saved.directory) == 0
    assert "restore_adapter(" in capsys.readouterr().out
    back = restore_adapter(tmp_path / "back")
    assert_same(back.params, adapter.params)
    assert_same(back.buffers, adapter.buffers)
    # Again, now with a model that says the names and is compared.
    assert converted(tmp_path / "back", tmp_path / "two", "--model", saved.directory) == 0
    assert_same(*(load_file(tmp_path / x / "adapter_model.safetensors") for x in ("peft", "two")))


def test_merging_gives_a_whole_model(
    saved: Saved, adapter: peftjax.Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Out of Flax's file, then out of torch's that was written; and from either form."""
    names = peftjax.module_names(saved.config.model_type)
    peftjax.save_pretrained(tmp_path / "peft", adapter, names=names)
    save_adapter(tmp_path / "orbax", adapter)
    model, wanted = saved.directory, saved.params
    for number, form in enumerate(("orbax", "peft")):
        out = tmp_path / f"whole {number}"
        assert converted(tmp_path / form, out, "--model", model, "--merge") == 0
        assert f"{saved.config.architectures[0]}.from_pretrained(" in capsys.readouterr().out
        assert files(out) == sorted(
            {"config.json", "model.safetensors", "tokenizer_config.json"}
            | {path.name for path in model.glob("generation_config.json")}
        )
        wanted = peftjax.merge(wanted, adapter)
        tensors = load_file(out / "model.safetensors")
        assert_same(tensors, peftjax.base_state_dict(wanted, saved.sites, names))
        assert "lm_head.weight" not in tensors  # torch ties it
        model = out
    assert json.loads((model / "tokenizer_config.json").read_text()) == {"its": "own"}


@on_bert
def test_weights_keep_their_dtype_in_shards_and_without_the_head(
    saved: Saved, adapter: peftjax.Adapter, tmp_path: Path
) -> None:
    """A base model in half precision gets the head that the adapter has."""
    names = peftjax.module_names("bert")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), saved.params)
    tensors = {
        key.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma"): x
        for key, x in peftjax.base_state_dict(half, saved.sites, names).items()
        if not key.startswith("classifier.")
    }
    model = tmp_path / "model"
    model.mkdir()
    shutil.copyfile(saved.directory / "config.json", model / "config.json")
    shards = {f"model-{n}.safetensors": dict(list(tensors.items())[n::2]) for n in range(2)}
    for name, part in shards.items():
        save_file(part, model / name, {"format": "pt"})
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))

    save_adapter(tmp_path / "in", adapter)
    assert converted(tmp_path / "in", tmp_path / "out", "--model", model, "--merge") == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    classifier = {key for key in found if key.startswith("classifier.")}
    assert {key for key, x in found.items() if x.dtype != jnp.bfloat16} == classifier
    wanted = peftjax.merge({**half, "classifier": saved.params["classifier"]}, adapter)
    assert_same(found, peftjax.base_state_dict(wanted, saved.sites, names))
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


@on_gpt2
def test_pissa_starts_again_from_the_weights(saved: Saved, tmp_path: Path) -> None:
    targets = FAMILIES[saved.config.model_type][1]["target_modules"][:1]
    adapter = saved.adapter(target_modules=targets, init_lora_weights="pissa")
    save_adapter(tmp_path / "in", adapter)
    assert converted(tmp_path / "in", tmp_path / "peft", "--model", saved.directory) == 0
    assert converted(tmp_path / "peft", tmp_path / "back", "--model", saved.directory) == 0
    back = restore_adapter(tmp_path / "back")
    assert_same(back.params, adapter.params)
    both = (peftjax.merge(saved.params, each) for each in (back, adapter))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *both)


@on_bert
def test_plain_lora_of_dora(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = FAMILIES[saved.config.model_type][1]["target_modules"][:1]
    adapter = saved.adapter(target_modules=targets, use_dora=True)
    save_adapter(tmp_path / "in", adapter)
    words = (tmp_path / "in", tmp_path / "out", "--model", saved.directory, "--plain-lora")
    assert converted(*words) == 2
    assert "add --rank" in capsys.readouterr().err
    assert converted(*words, "--rank", 16) == 0
    names = peftjax.module_names(saved.config.model_type)
    plain = peftjax.load_pretrained(tmp_path / "out", saved.sites, names=names)
    both = (peftjax.merge(saved.params, each) for each in (plain, adapter))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *both)


@on_bert
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--architecture Nonsense", "has no Flax class for Nonsense; for '"),
        ("--architecture FlaxOPTModel", "--architecture: OPTModel is of type 'opt', not 'bert'"),
        ("--merge --model empty", "has no weights: none of model.safetensors"),
        ("--merge --model pickled", "only torch reads"),
        ("--model strange", "has no Flax class for QwenModel, nor any for 'qwen'"),
        ("--model broken", "names no model_type"),
    ],
)
def test_models_that_cannot_be_used_are_one_line(
    saved: Saved,
    adapter: peftjax.Adapter,
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    own = (saved.directory / "config.json").read_text()
    strange = '{"model_type": "qwen", "architectures": ["QwenModel"]}'
    for name, text in {"empty": own, "pickled": own, "strange": strange, "broken": "{"}.items():
        Path(name).mkdir()
        (Path(name) / "config.json").write_text(text)
    Path("pickled/pytorch_model.bin").touch()
    save_adapter(tmp_path / "in", adapter)
    model = () if "--model" in words else ("--model", saved.directory)
    assert converted("in", "out", *words.split(), *model) in (1, 2)
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.strip().splitlines()) == 1
    assert not Path("out").exists()


@on_gpt2
def test_an_adapter_of_another_model_is_one_line(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = {"dense": {"kernel": jnp.ones((6, 4))}}
    sites = peftjax.find_sites(lambda params, x: x @ params["dense"]["kernel"], params, IDS[:, :6])
    config = peftjax.LoraConfig(r=2, target_modules=["dense"])
    save_adapter(tmp_path / "in", peftjax.init_adapter(jax.random.key(0), config, sites))
    assert converted(tmp_path / "in", tmp_path / "peft") == 0
    capsys.readouterr()
    for form in ("in", "peft"):
        words = (tmp_path / form, tmp_path / "out", "--model", saved.directory)
        assert converted(*words) == 2
        shown = capsys.readouterr().err
        assert "dense" in shown
        assert "another --architecture" in shown or "another --model" in shown
        assert len(shown.strip().splitlines()) == 1


@on_bert
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("flax_model.msgpack", "cut short", "transformers cannot read the weights in"),
        ("model.safetensors.index.json", "{}", "has no weight_map that names"),
        ("model.safetensors.index.json", '{"weight_map": []}', "has no weight_map that names"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}', "has no weight_map that"),
        ("config.json", {"architectures": 5}, "architectures that are no list of names, 5"),
        ("config.json", {"architectures": [5]}, "architectures that are no list of names, [5]"),
        ("config.json", {"architectures": "BertModel"}, "no list of names, 'BertModel'"),
    ],
)
def test_damaged_models_are_one_line(
    saved: Saved,
    adapter: peftjax.Adapter,
    tmp_path: Path,
    name: str,
    content: Any,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_adapter(tmp_path / "in", adapter)
    model = Path(shutil.copytree(saved.directory, tmp_path / "model"))
    if name == "config.json":
        content = json.dumps(json.loads((model / name).read_text()) | content)
    else:
        (model / "flax_model.msgpack").unlink()
    (model / name).write_text(content)
    words = (tmp_path / "in", tmp_path / "out", "--model", model, "--merge")
    assert converted(*words) in (1, 2)
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


# --- in torch


def test_merged_models_load_in_torch(
    saved: Saved, adapter: peftjax.Adapter, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason=TORCH)
    transformers = pytest.importorskip("transformers", reason=TORCH)
    save_adapter(tmp_path / "in", adapter)
    words = (tmp_path / "in", tmp_path / "out", "--model", saved.directory, "--merge")
    assert converted(*words) == 0
    wanted = jax.jit(peftjax.adapt(saved.logits))(saved.params, adapter, IDS)
    assert np.abs(wanted - jax.jit(saved.logits)(saved.params, IDS)).max() > 0.1

    of_torch = getattr(transformers, saved.config.architectures[0])
    model, report = of_torch.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        found = model.eval()(input_ids=torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_converted_adapters_run_in_torch(
    saved: Saved, adapter: peftjax.Adapter, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason=TORCH)
    peft = pytest.importorskip("peft", reason=TORCH)
    transformers = pytest.importorskip("transformers", reason=TORCH)
    save_adapter(tmp_path / "in", adapter)
    assert converted(tmp_path / "in", tmp_path / "out", "--model", saved.directory) == 0
    names = peftjax.module_names(saved.config.model_type)
    weights = peftjax.base_state_dict(saved.params, saved.sites, names)
    base = getattr(transformers, saved.config.architectures[0])(saved.config)
    base.load_state_dict({k: torch.tensor(np.asarray(x)) for k, x in weights.items()}, strict=False)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        found = model(input_ids=torch.tensor(IDS)).logits.numpy()
    wanted = jax.jit(peftjax.adapt(saved.logits))(saved.params, adapter, IDS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
