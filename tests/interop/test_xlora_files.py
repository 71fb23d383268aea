"""X-LoRA in files, without torch: what is written, found again, refused and broken."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import normal
from naive import drawn
from safetensors.numpy import load_file, save_file

from peftjax import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    ModuleNames,
    XLoraConfig,
    find_sites,
    get_peft_model_state_dict,
    init_xlora,
    load_pretrained,
    save_pretrained,
    set_peft_model_state_dict,
    xlora_experts,
    xlora_layers,
)
from peftjax.methods.xlora import CLASSIFIER

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.internal_xlora_classifier.layers."
RULES = (
    ("layers.{name}", "model.layers.{i}.{name}"),
    ("head", "lm_head"),
    ("{*rest}", "model.{*rest}"),
)
NAMES = ModuleNames(RULES, order=("model", "up", "embed", "layers", "down", "conv", "lm_head"))
UNORDERED = ModuleNames(RULES)


def apply_fn(params, ids):
    """A table, stacked layers of two weights each, a convolution and an output head."""
    x = params["embed"]["embedding"][ids]
    stack = params["layers"]["up"]["kernel"], params["layers"]["down"]["kernel"]
    x, _ = lax.scan(lambda x, own: (jnp.tanh(x @ own[0]) @ own[1], None), x, stack)
    x = lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.tanh(x) @ params["head"]["kernel"]


PARAMS = {
    "embed": {"embedding": normal(7, 4)},
    "layers": {"up": {"kernel": normal(3, 4, 5, seed=1)}, "down": {"kernel": normal(3, 5, 4)}},
    "conv": {"kernel": normal(3, 4, 4, seed=2)},
    "head": {"kernel": normal(4, 7, seed=3)},
}
SITES = find_sites(apply_fn, PARAMS, jax.ShapeDtypeStruct((2, 6), jnp.int32))
LORA = {
    "poems": LoraConfig(r=2, lora_alpha=5, target_modules=["up", "down"]),
    "code": LoraConfig(r=3, target_modules=["up", "embed"], rank_pattern={"embed": 1}),
    "a law": LoraConfig(r=1, target_modules=["down"], layers_to_transform=[0, 2]),
}
# With a depth of two: layers.0 and layers.3.
FIELDS = {"xlora_depth": 2, "xlora_size": 6, "layerwise_scalings": True, "top_k_lora": 2}


def lora(name, config):
    """An expert, other than those of other names."""
    adapter = drawn(config, SITES, PARAMS, std=0.3)
    return adapter.replace(params=jax.tree.map(lambda x: x * (1 + len(name)), adapter.params))


def xlora(configs=None, names=NAMES, **fields):
    experts = {name: lora(name, config) for name, config in (configs or LORA).items()}
    config = XLoraConfig(**fields)
    adapter = init_xlora(jax.random.key(0), config, experts, SITES, names=names)
    values = {n: normal(*x.shape, seed=5) for n, x in adapter.params[CLASSIFIER].items()}
    return adapter.replace(params=adapter.params | {CLASSIFIER: values})


def load(directory, **rest):
    return load_pretrained(directory, SITES, **{"names": NAMES, **rest})


def assert_same(one, other):
    """Two adapters are the same but for the paths of their experts."""
    chex.assert_trees_all_equal((one.params, one.buffers), (other.params, other.buffers))
    assert tuple(one.config.adapters) == tuple(other.config.adapters)
    assert tuple(one.sites.values()) == tuple(other.sites.values())
    assert xlora_layers(one) == xlora_layers(other)
    assert one.config.head == other.config.head


@pytest.fixture(scope="module")
def adapter():
    return xlora(**FIELDS)


@pytest.fixture
def written(adapter, tmp_path):
    return save_pretrained(tmp_path / "xlora", adapter, names=NAMES)


def edited(directory, changes=(), **fields):
    """Changes fields of the config; ``...`` takes one out."""
    path = directory / CONFIG
    config = json.loads(path.read_text()) | dict(changes) | fields
    config = {name: value for name, value in config.items() if value is not ...}
    path.write_text(json.dumps(config))


def tensors(directory, change=None):
    """The tensors of a directory, or other ones."""
    path = directory / TENSORS
    found = load_file(path)
    if change is not None:
        found = change(found)
        save_file(found, path, {"format": "pt"})
    return found


# --- what is written


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layerwise_scalings": True, "enable_softmax": False},
        FIELDS,
        {"xlora_depth": 3, "xlora_size": 6, "xlora_dropout_p": 0.0, "scaling_pass_value": None},
        {"use_trainable_adapters": True, "softmax_temperature": 0.7},
        {"base_model_name_or_path": "llama", "task_type": "CAUSAL_LM"},
    ],
)
def test_round_trip(fields, tmp_path):
    adapter = xlora(**fields)
    directory = save_pretrained(tmp_path, adapter, names=NAMES)
    again = load(directory)
    assert_same(again, adapter)
    config = json.loads((directory / CONFIG).read_text())
    paths = {str(i): str(tmp_path / "experts" / name) for i, name in enumerate(LORA)}
    assert config["adapters"] == paths
    given = XLoraConfig(**fields)
    for name in ("softmax_temperature", "global_scaling_weight"):
        assert config[name] == getattr(given, name)
    passing = given.scaling_pass_value
    assert config["scaling_pass_value"] == (1 / 3 if passing is None else passing)
    assert config["hidden_size"] == 4
    assert not {"experts", "head", "target_modules"} & config.keys()
    for name, own in xlora_experts(adapter).items():
        alone = load(directory / "experts" / name)
        chex.assert_trees_all_equal((alone.params, alone.buffers), (own.params, own.buffers))


def test_keys_and_shapes_are_pefts(written):
    shapes = {key: x.shape for key, x in tensors(written).items()}
    layers = 3 + 3 + 1  # up, down and the table
    assert shapes == {
        f"{KEY}0.weight": (6, 4),
        f"{KEY}0.bias": (6,),
        f"{KEY}3.weight": (3 * layers, 6),
        f"{KEY}3.bias": (3 * layers,),
    }


def test_values_are_those_of_the_arrays(adapter, tmp_path):
    changed = {"softmax_temperature": 0.3, "global_scaling_weight": 2.0, "scaling_pass_value": 0.25}
    arrays = {name: jnp.float32(value) for name, value in changed.items()}
    adapter = adapter.replace(buffers=adapter.buffers | {CLASSIFIER: arrays})
    directory = save_pretrained(tmp_path, adapter, names=NAMES)
    config = json.loads((directory / CONFIG).read_text())
    assert {name: np.float32(config[name]) for name in changed} == {
        name: np.float32(value) for name, value in changed.items()
    }
    chex.assert_trees_all_equal(load(directory).buffers, adapter.buffers)
    arrays["softmax_temperature"] = jnp.float32(jnp.nan)
    with pytest.raises(ValueError, match="`softmax_temperature` is nan"):
        save_pretrained(tmp_path, adapter, names=NAMES)


def test_layers_are_written_in_torchs_order(adapter, tmp_path):
    """By the places of the adapter's own layers, whatever order they are in."""
    here = xlora(names=UNORDERED, **FIELDS)
    assert xlora_layers(here) != xlora_layers(adapter)
    directory = save_pretrained(tmp_path, here, names=NAMES)
    again = load(directory)
    assert xlora_layers(again) == xlora_layers(adapter)
    for name in ("layers.3.weight", "layers.3.bias"):
        parts = [
            np.reshape(each.params[CLASSIFIER][name], (-1, 7, 3)).transpose(1, 0, 2)
            for each in (here, again)
        ]
        own = dict(zip(xlora_layers(here), parts[0], strict=True))
        wanted = [own[layer] for layer in xlora_layers(again)]
        np.testing.assert_array_equal(parts[1], wanted)


def test_half_precision_is_kept(tmp_path):
    adapter = xlora()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter.params)
    adapter = adapter.replace(params=half)
    assert_same(load(save_pretrained(tmp_path, adapter, names=NAMES)), adapter)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "/tmp", "a\0"])
def test_a_name_that_is_no_directorys(name, tmp_path):
    adapter = xlora({name: LORA["poems"], "code": LORA["code"]})
    with pytest.raises(ValueError, match="is written in a directory of its name"):
        save_pretrained(tmp_path / "x", adapter, names=NAMES)
    assert not list(tmp_path.iterdir())


# --- what torch PEFT cannot run


FOREIGN = {
    "loha": (
        {n: LoHaConfig(r=2, target_modules=["up"]) for n in "ab"},
        {},
        "the expert 'a': it is of LoHa, and torch PEFT's X-LoRA mixes LoRA alone: convert_to_lora",
    ),
    "adalora": (
        {n: AdaLoraConfig(init_r=2, target_modules=["up"]) for n in "ab"},
        {},
        "the expert 'b': it is of AdaLora",
    ),
    "pissa": (
        {n: LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa") for n in "ab"},
        {},
        r"the expert 'a': it started out of the weights \(`init_lora_weights` = 'pissa'\)",
    ),
    "convolution": (
        LORA | {"conv": LoraConfig(r=2, target_modules=["conv"])},
        {},
        "model.conv: it is a convolution, where torch PEFT's X-LoRA takes the axes",
    ),
    "head": (
        LORA | {"head": LoraConfig(r=2, target_modules=["head"])},
        {},
        "lm_head: it does not lie right in a module `model`",
    ),
    "order": (
        LORA,
        {"layerwise_scalings": True, "names": UNORDERED},
        r"model\.layers\.1\.up: it has scalings of its own(.|\n)*ModuleNames\(order=",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign(case, tmp_path):
    """It is refused by name, or written so that only we read it, and not read if torch wrote it."""
    configs, fields, message = FOREIGN[case]
    adapter = xlora(configs, **fields)
    names = fields.get("names", NAMES)
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path, adapter, names=names)
    assert not list(tmp_path.iterdir())
    save_pretrained(tmp_path, adapter, names=names, allow_foreign=True)
    assert_same(load(tmp_path, names=names, params=PARAMS), adapter)
    tensors(tmp_path, lambda found: found)  # without our word in the header
    with pytest.raises(ValueError, match=message):
        load(tmp_path, names=names, params=PARAMS)


# --- where the experts are


def test_a_directory_that_was_moved(adapter, written, tmp_path):
    written.rename(tmp_path / "elsewhere")
    assert_same(load(tmp_path / "elsewhere"), adapter)
    (tmp_path / "elsewhere" / "experts").rename(tmp_path / "elsewhere" / "mine")
    relative = {str(i): f"mine/{name}" for i, name in enumerate(LORA)}
    edited(tmp_path / "elsewhere", adapters=relative)
    assert_same(load(tmp_path / "elsewhere"), adapter)
    for i, name in enumerate(LORA):
        (tmp_path / "elsewhere" / "mine" / name).rename(tmp_path / "elsewhere" / str(i))
    assert_same(load(tmp_path / "elsewhere"), adapter)


def test_a_copy_has_its_own_experts(adapter, written, tmp_path):
    shutil.copytree(written, tmp_path / "copy")
    tensors(written / "experts" / "poems", lambda found: {k: 0 * x for k, x in found.items()})
    assert_same(load(tmp_path / "copy"), adapter)
    with pytest.raises(AssertionError):
        assert_same(load(written), adapter)


def test_experts_that_the_caller_has_elsewhere(adapter, written, tmp_path):
    for name in LORA:
        (written / "experts" / name).rename(tmp_path / f"{name} 2")
    with pytest.raises(FileNotFoundError) as error:
        load(written)
    text = str(error.value)
    assert "expert 'poems'" in text
    assert str(written / "experts" / "poems") in text
    assert str(written / "0") in text
    assert "experts={'poems': ...}" in text
    places = {"poems": tmp_path / "poems 2", 1: str(tmp_path / "code 2")}
    again = load(written, experts={**places, "2": tmp_path / "a law 2"})
    assert_same(again, adapter)
    assert again.config.adapters["code"] == str(tmp_path / "code 2")
    with pytest.raises(FileNotFoundError, match=f"expert 'poems' in {tmp_path / 'none'}:"):
        load(written, experts={"poems": tmp_path / "none"})
    with pytest.raises(ValueError, match=r"experts= gives \['prose', 3\].*are poems, code, a law"):
        load(written, experts={"prose": tmp_path, 3: tmp_path})


def test_names_of_experts(written, tmp_path):
    """They are those of the directories, unless two are the same or the config has names."""
    paths = [written / "experts" / name for name in LORA]
    for i, path in enumerate(paths):
        path.rename(written / str(i) if i else written / "last")
    named = {"0": str(written / "last"), "1": str(written / "1"), "2": str(written / "2")}
    edited(written, adapters=named)
    assert tuple(load(written).config.adapters) == ("last", "1", "2")
    (written / "a" / "same").mkdir(parents=True)
    shutil.copytree(written / "last", written / "same")
    shutil.copytree(written / "1", written / "a" / "same", dirs_exist_ok=True)
    edited(written, adapters=named | {"0": "same", "1": "a/same"})
    experts = {0: written / "same", 1: written / "a" / "same"}
    assert tuple(load(written, experts=experts).config.adapters) == ("0", "1", "2")
    edited(written, adapters={"z": named["0"], "b": named["1"], "y": named["2"]})
    assert tuple(load(written).config.adapters) == ("z", "b", "y")


def test_numbers_are_numbers(tmp_path):
    """PEFT sorts what it writes, and ten comes before two; experts stay in the order of theirs."""
    adapter = xlora({f"expert {i}": LORA["a law"] for i in range(11)}, layerwise_scalings=True)
    directory = save_pretrained(tmp_path, adapter, names=NAMES)
    config = json.loads((directory / CONFIG).read_text())
    assert list(config["adapters"]) == [str(i) for i in range(11)]
    (directory / CONFIG).write_text(json.dumps(config, sort_keys=True))
    assert list(json.loads((directory / CONFIG).read_text())["adapters"])[2] == "10"
    assert_same(load(directory), adapter)


def test_experts_as_torch_writes_them(adapter, written):
    """Beside its X-LoRA torch PEFT writes experts with weights of the base, and incomplete."""
    place = written / "experts" / "code"
    own = load(place)
    prefix, inside = "base_model.model.", "base_model.lora_model.model."
    other = {
        f"{inside}model.embed.base_layer.weight": np.zeros((7, 4), np.float32),
        f"{inside}lm_head.weight": np.zeros((7, 4), np.float32),
        f"{KEY}weight": np.zeros((6, 4), np.float32),
    }
    lora = {key.replace(prefix, inside): x for key, x in tensors(place).items()}
    tensors(place, lambda _: other | lora)
    again = load(place)
    chex.assert_trees_all_equal((again.params, again.buffers), (own.params, own.buffers))
    assert_same(load(written), adapter)
    tensors(place, lambda found: {k: x for k, x in found.items() if ".layers.1." not in k})
    for directory in (place, written):
        with pytest.raises(ValueError, match=r"loses tensors of layers(.|\n)*model\.layers\.1\.up"):
            load(directory)


# --- what is broken


def test_a_classifier_as_torch_writes_it(written):
    for left in ([f"{KEY}3.weight", f"{KEY}3.bias"], []):
        tensors(written, lambda found, left=left: {key: found[key] for key in left})
        with pytest.raises(ValueError, match="torch PEFT loses layers of it") as error:
            load(written)
        text = str(error.value)
        assert str(written) in text
        assert f"{KEY}0.weight: it is missing" in text
        assert (f"{KEY}3.weight: it is missing" in text) == (not left)
        assert "model.state_dict()" in text


BROKEN = {
    "another hidden size": (
        {"hidden_size": 5},
        None,
        r"layers\.0\.weight: shape \(6, 4\) instead of \(6, 5\)",
    ),
    "no hidden size": ({"hidden_size": None}, None, "`hidden_size` of the config is missing"),
    "another width": (
        {"xlora_size": 7},
        None,
        r"layers\.0\.weight: shape \(6, 4\) instead of \(7, 4\)\n(.|\n)*layers\.3\.weight: shape",
    ),
    "not layerwise": (
        {"layerwise_scalings": False},
        None,
        r"layers\.3\.bias: shape \(21,\) instead of \(3,\)",
    ),
    "a deeper one": ({"xlora_depth": 3}, None, r"layers\.6\.weight: it is missing"),
    "far deeper": ({"xlora_depth": 2**40}, None, r"layers\.6\.weight: it is missing"),
    "far wider": ({"xlora_size": 2**40}, None, "shape"),
    "a shallower one": ({"xlora_depth": 1}, None, r"layers\.3\.bias: there is no such array"),
    "another stride": ({"xlora_dropout_p": 0.0}, None, r"layers\.2\.weight: it is missing"),
    "no experts": ({"adapters": {}}, None, "`adapters` of the config names no experts"),
    "no adapters": ({"adapters": None}, None, "names no experts"),
    "adapters of a list": ({"adapters": ["a"]}, None, "`adapters` cannot be"),
    "adapters of numbers": ({"adapters": {"0": 3}}, None, "`adapters` cannot be"),
    "one expert less": (
        lambda c: {"adapters": {k: c["adapters"][k] for k in "01"}},
        None,
        r"of 2 experts on 7 layers(.|\n)*layers\.3\.bias: shape \(21,\) instead of \(14,\)",
    ),
    "one expert twice": (
        lambda c: {"adapters": {**c["adapters"], "3": c["adapters"]["0"]}},
        None,
        r"of 4 experts on 7 layers(.|\n)*layers\.3\.bias: shape \(21,\) instead of \(28,\)",
    ),
    "too many kept": ({"top_k_lora": 4}, None, "`top_k_lora` is 4, and there are 3 experts"),
    "none kept": ({"top_k_lora": 0}, None, "`top_k_lora` must be 1 or more"),
    "no temperature": ({"softmax_temperature": 0}, None, "`softmax_temperature` must be above 0"),
    "an unknown field": ({"use_foo": True}, None, "no field 'use_foo'"),
    "targets": ({"target_modules": ["up"]}, None, "leave `target_modules` out"),
    "another array": (
        {},
        lambda t: t | {f"{KEY}9.bias": t[f"{KEY}0.bias"]},
        r"layers\.9\.bias: there is no such array",
    ),
    "an array of LoRA": (
        {},
        lambda t: t | {"base_model.model.model.embed.lora_embedding_A": t[f"{KEY}0.bias"]},
        "lora_embedding_A: there is no such array",
    ),
    "integers": (
        {},
        lambda t: t | {f"{KEY}0.bias": np.zeros(6, np.int32)},
        r"layers\.0\.bias: I32 is no dtype of an adapter",
    ),
    "two dtypes": (
        {},
        lambda t: t | {f"{KEY}0.bias": np.zeros(6, np.float16)},
        "arrays of float16 and float32: give them one dtype",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case, written):
    fields, change, message = BROKEN[case]
    if callable(fields):
        fields = fields(json.loads((written / CONFIG).read_text()))
    edited(written, fields)
    if change is not None:
        tensors(written, change)
    with pytest.raises(ValueError, match=message) as error:
        load(written)
    assert str(written) in str(error.value)


def test_experts_of_another_kind(written):
    place = written / "experts" / "code"
    ia3 = lora("ia3", IA3Config(target_modules=["up"], feedforward_modules=[]))
    save_pretrained(place, ia3, names=NAMES)
    with pytest.raises(ValueError, match="the expert 'code': it is of IA3, and torch PEFT"):
        load(written)
    edited(place, peft_type="VERA")
    with pytest.raises(ValueError, match=r"code.adapter_config.json: `peft_type` is 'VERA'"):
        load(written)
    shutil.copy(written / CONFIG, place / CONFIG)
    with pytest.raises(ValueError, match="code: an X-LoRA adapter cannot be an expert"):
        load(written)
    (place / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {TENSORS} in {place}"):
        load(written)


def test_an_expert_of_another_model(written):
    tensors(
        written / "experts" / "code",
        lambda found: {key.replace(".up.", ".upper."): x for key, x in found.items()},
    )
    with pytest.raises(ValueError, match=r"experts/code: this Lora adapter does not fit") as error:
        load(written)
    assert "model.layers.2.upper: there is no such module" in str(error.value)


def test_experts_are_those_of_xlora_alone(written):
    with pytest.raises(ValueError, match="`experts` are those of an X-LoRA"):
        load(written / "experts" / "code", experts={0: written})


def test_mutated_configs(written):
    """Whatever a field of the config says, it is an error or what it says."""
    text = (written / CONFIG).read_text()
    values = [None, True, -1, 0, 2, 0.5, 1e400, "x", [], {}, {"0": "x"}, {"0": "\0"}, 10**30]
    errors = []
    for name in json.loads(text):
        for value in values:
            (written / CONFIG).write_text(text)
            edited(written, {name: value})
            try:
                again = load(written)
            except (ValueError, FileNotFoundError) as error:
                errors.append(str(error))
            else:
                assert tuple(again.config.adapters) == tuple(LORA)
    assert len(errors) > 100
    assert all(str(written) in error for error in errors)


# --- state dicts


def test_state_dicts(adapter):
    state = get_peft_model_state_dict(adapter, NAMES)
    assert state.keys() == {f"{KEY}{n}.{kind}" for n in (0, 3) for kind in ("weight", "bias")}
    zero = adapter.replace(params=jax.tree.map(jnp.zeros_like, adapter.params))
    assert_same(set_peft_model_state_dict(zero, state, NAMES), adapter)
    some = {key: x for key, x in state.items() if "3.weight" in key}
    part = set_peft_model_state_dict(zero, some, NAMES, strict=False)
    chex.assert_trees_all_equal(
        part.params[CLASSIFIER]["layers.3.weight"], adapter.params[CLASSIFIER]["layers.3.weight"]
    )
    assert not part.params[CLASSIFIER]["layers.3.bias"].any()
    with pytest.raises(ValueError, match=r"layers\.0\.weight: it is missing"):
        set_peft_model_state_dict(zero, some, NAMES)
    with pytest.raises(ValueError, match=r"layers\.9\.bias: there is no such tensor"):
        set_peft_model_state_dict(zero, state | {f"{KEY}9.bias": np.zeros(3)}, NAMES)
    with pytest.raises(ValueError, match=r"layers\.0\.bias: shape \(3,\) instead of \(6,\)"):
        set_peft_model_state_dict(zero, state | {f"{KEY}0.bias": np.zeros(3)}, NAMES)


def test_state_dicts_of_trained_experts():
    adapter = xlora(use_trainable_adapters=True)
    for call in (get_peft_model_state_dict, lambda a: set_peft_model_state_dict(a, {})):
        with pytest.raises(ValueError, match=r"trains its experts too.*xlora_experts"):
            call(adapter)
