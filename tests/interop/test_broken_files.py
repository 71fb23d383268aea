"""Files that are broken, foreign or of another model: one clear error, or what they say."""

import copy
import dataclasses
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import normal
from naive import drawn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from twins import by_module, pattern_value, scale_of

from peftjax import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    ModuleNames,
    find_sites,
    load_pretrained,
    save_pretrained,
)
from peftjax.unstacking import unstack

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NAMES = ModuleNames((("layers.{*rest}", "layers.{i}.{*rest}"), ("{*rest}", "{*rest}")))
P = "base_model.model."


def apply_fn(params, x):
    """A dense layer, and two stacked ones."""
    up = params["up"]
    h = x @ up["kernel"] + up["bias"][None]
    down = params["layers"]["down"]["kernel"]
    return lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), h, down)[0]


PARAMS = {
    "up": {"kernel": normal(3, 4), "bias": normal(4, seed=1)},
    "layers": {"down": {"kernel": normal(2, 4, 4, seed=2)}},
}
SITES = find_sites(apply_fn, PARAMS, jax.ShapeDtypeStruct((2, 3), jnp.float32))
BOTH = ["up", "down"]
KEPT = {"up.lora_E": [True, False, True], "layers.down.lora_E": [[True, True, False], [False] * 3]}
METHODS = {
    "lora": LoraConfig(
        r=2,
        lora_alpha=5,
        bias="all",
        target_modules=BOTH,
        rank_pattern={"layers.1.down": 1},
        alpha_pattern={"up": 3},
    ),
    "dora": LoraConfig(r=2, lora_alpha=5, use_dora=True, use_rslora=True, target_modules=BOTH),
    "loha": LoHaConfig(r=2, alpha=5, target_modules=BOTH, modules_to_save=None),
    "hra": HRAConfig(r=2, bias="hra_only", target_modules=BOTH),
    "ia3": IA3Config(target_modules=BOTH, feedforward_modules=["up"]),
    "adalora": AdaLoraConfig(
        init_r=3, target_r=2, lora_alpha=5, target_modules=BOTH, rank_pattern=KEPT
    ),
    "saved": LoraConfig(r=2, lora_alpha=5, target_modules=["down"], modules_to_save=["up"]),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Both files of every method: the bytes of the config, and those of the tensors."""
    files = {}
    for name, config in METHODS.items():
        adapter = drawn(config, SITES, PARAMS, std=0.3)
        directory = save_pretrained(tmp_path_factory.mktemp(name), adapter, names=NAMES)
        files[name] = (directory / CONFIG).read_bytes(), (directory / TENSORS).read_bytes()
    return files


def load(directory, config=None, tensors=None, **rest):
    """What a directory with these bytes, JSON values or arrays loads as."""
    if config is not None:
        raw = config if isinstance(config, bytes) else json.dumps(config).encode()
        (directory / CONFIG).write_bytes(raw)
    if isinstance(tensors, bytes):
        (directory / TENSORS).write_bytes(tensors)
    elif tensors is not None:
        save_file(tensors, directory / TENSORS, {"format": "pt"})
    return load_pretrained(directory, rest.pop("sites", SITES), names=NAMES, **rest)


def parts(files, directory):
    """A config and tensors as values."""
    (directory / TENSORS).write_bytes(files[1])
    return json.loads(files[0]), load_file(directory / TENSORS)


@pytest.mark.parametrize("method", [None, 3, "VERA", "lora", ["LORA"], "PROMPT_TUNING"])
def test_unknown_method(method, written, tmp_path):
    config = json.loads(written["lora"][0]) | {"peft_type": method}
    with pytest.raises(
        ValueError, match=r"`peft_type` is .*LORA, ADALORA, LOHA, HRA, IA3"
    ) as error:
        load(tmp_path, config, written["lora"][1])
    assert CONFIG in str(error.value)
    del config["peft_type"]
    with pytest.raises(ValueError, match="`peft_type` is None"):
        load(tmp_path, config)


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{", b"\xff{}", b"null", b"[" * 100_000])
def test_config_that_is_no_object(text, written, tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load(tmp_path, text, written["lora"][1])


@pytest.mark.parametrize("name", METHODS)
def test_fields_of_newer_versions(name, written, tmp_path):
    config = json.loads(written[name][0]) | {"peft_version": "0.99.1"}
    config |= {"use_foo": True}
    with pytest.raises(ValueError, match=r"no field 'use_foo', which PEFT 0\.99\.1 wrote"):
        load(tmp_path, config, written[name][1])
    config |= {"use_foo": False, "foo_bar": None, "foo_list": []}
    with pytest.warns(UserWarning, match="'foo_bar', 'foo_list', 'use_foo': dropped"):
        loaded = load(tmp_path, config)
    chex.assert_trees_all_equal(loaded, load(tmp_path, written[name][0]))


# Values that no field of a name may have; a name that is not there stands for all others.
WRONG = {
    "r": [0, -1, 2.0, "2", True, [2], 10**30, 10**400],
    "init_r": [-1, 3.0, "3", True],
    "lora_alpha": ["5", True, [5], float("nan"), float("inf"), 10**400],
    "alpha": ["5", True, float("nan"), -float("inf"), 10**400],
    "lora_dropout": [1, 1.5, -0.1, "0", float("nan")],
    "rank_dropout": [1, -0.1, "0"],
    "module_dropout": [1, -0.1, True],
    "bias": ["some", 1, True, ["all"]],
    "use_rslora": [1, "true", []],
    "use_dora": ["true", 0],
    "apply_GS": ["true", 0],
    "use_effective_conv2d": ["true", 0],
    "lora_bias": [True, "x"],
    "init_weights": [1, "true"],
    "init_ia3_weights": [1, "true"],
    "init_lora_weights": [3, "eva", "corda", "pissa_niter_x", ["pissa"]],
    "rank_pattern": [[], "x", 3, {"(": 2}, {"up": "2"}, {"up": 0}, {"up": None}, {"(?i)up": 2}],
    "alpha_pattern": [
        [],
        3,
        {"(": 2},
        {"up": "2"},
        {"up": float("nan")},
        {"up": float("inf")},
        {"up": 10**400},
        {"up": True},
        {"(?i)up": 2},
        {"u{99999999999}": 2},
        {"(" * 5000 + ")" * 5000: 2},
    ],
    "target_modules": [3, True, [3], [""], {}, "(", [["up"]], "u{99999999999}"],
    "exclude_modules": [3, [None], "("],
    "modules_to_save": ["up", 3, [3], [""]],
    "feedforward_modules": [None, 3, [3], "("],
    "layers_to_transform": ["0", [-1], [1.5], [True], 1.0],
    "layers_pattern": [3, [3], "layers", "("],
    "target_r": [-1, "2", 1.5],
    "tinit": [-1, 5],
    "tfinal": [-1, 5],
    "deltaT": [0, "1"],
    "beta1": [0, 1, "x", 10**400],
    "beta2": [0, 1, float("nan")],
    "orth_reg_weight": [-1, "x"],
    "total_step": [0, -1, "x", 1.5],
    "fan_in_fan_out": ["x", 0],
    "task_type": [3, ["x"]],
    "revision": [3],
    "base_model_name_or_path": [3, ["x"]],
    "layer_replication": [[[0, 4]]],
    "trainable_token_indices": [[1]],
    "target_parameters": [["x"]],
    "loftq_config": [{"loftq_bits": 4}],
    "alora_invocation_tokens": [[1]],
    "megatron_config": [{}, {"a": 1}],
    "qalora_group_size": [8],
}
FREE = {"auto_mapping", "inference_mode", "peft_version", "peft_type"}
# What PEFT keeps in AdaLoRA's files and ignores, and what holds AdaLoRA's own lists.
OF_ADALORA = {
    "r": [4],
    "rank_pattern": [[], {"up.lora_E": 3}, {"up.lora_E": [True]}, {"up.lora_E": [1, 0, 1]}],
    "alpha_pattern": [{"up": 2}],
    "init_lora_weights": ["gaussian", 3],
    "use_rslora": [True],
    "use_dora": [True],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "loha", "hra", "ia3", "adalora"])
def test_wrong_values_of_every_field(name, written, tmp_path):
    config = json.loads(written[name][0])
    for field in config.keys() - FREE:
        own = OF_ADALORA if name == "adalora" and field in OF_ADALORA else WRONG
        for value in own.get(field, [object]):
            if value is object:
                value = {"x": 1}
            with pytest.raises(ValueError, match=r"\w") as error:
                load(tmp_path, config | {field: value}, written[name][1])
            if field not in ("use_dora", "lora_bias", "bias", "r", "use_effective_conv2d"):
                assert field in str(error.value), value


@pytest.mark.parametrize("name", ["lora", "loha", "hra", "adalora"])
@pytest.mark.parametrize("rank", [10**4, 10**9, 2**62, 10**30])
def test_huge_ranks_allocate_nothing(name, rank, written, tmp_path):
    config = json.loads(written[name][0])
    field = "init_r" if name == "adalora" else "r"
    with pytest.raises(ValueError, match=r"rank|`(r|init_r)` cannot be"):
        load(tmp_path, config | {field: rank}, written[name][1])
    if name == "adalora":
        with pytest.raises(ValueError, match=r"rank of|shape|cannot be"):
            load(tmp_path, config | {field: rank, "rank_pattern": None})
        with pytest.raises(ValueError, match=r"rank of|shape|cannot be"):
            load(tmp_path, config | {field: rank, "rank_pattern": {"elsewhere.lora_E": [True]}})
    elif name != "hra":
        with pytest.raises(ValueError, match=r"rank of|cannot be"):
            load(tmp_path, config | {"rank_pattern": {"up": rank}})


def test_a_mistaken_rank_as_large_as_a_vocabulary(tmp_path):
    """A dimension of that size is there, so only the shape gives the mistake away."""
    rows = 400_000
    params = {"embed": {"embedding": jax.ShapeDtypeStruct((rows, 2), jnp.float32)}}

    def lookup(params, ids):
        return jnp.tanh(params["embed"]["embedding"][ids])

    sites = find_sites(lookup, params, jax.ShapeDtypeStruct((2,), jnp.int32))
    adapter = drawn(LoraConfig(r=1, lora_alpha=5, target_modules=["embed"]), sites)
    save_pretrained(tmp_path, adapter)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"r": rows}
    with pytest.raises(ValueError, match=rf"shape \(1, {rows}\) instead of \({rows}, {rows}\)"):
        load(tmp_path, config, sites=sites)


def test_empty_tensors_do_not_vouch_for_a_rank(written, tmp_path):
    config, tensors = parts(written["lora"], tmp_path)
    tensors[f"{P}up.lora_A.weight"] = np.zeros((0, 2**40), np.float32)
    with pytest.raises(
        ValueError, match=r"no tensor is large enough for its rank of 1099511627776"
    ):
        load(tmp_path, config | {"r": 2**40, "rank_pattern": {}}, tensors)


@pytest.mark.parametrize("size", [0, 4, 8, 40, -1, -40])
def test_truncated_tensors(size, written, tmp_path):
    config, tensors = written["lora"]
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors is no whole safetensors file"
    ):
        load(tmp_path, config, tensors[:size])


@pytest.mark.parametrize("raw", [b"PK\x03\x04" * 20, b"\x80\x04." * 30, b"\xff" * 200, b"{}" * 30])
def test_other_formats(raw, written, tmp_path):
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        load(tmp_path, written["lora"][0], raw)


def test_foreign_tensors(written, tmp_path):
    config = written["lora"][0]
    with pytest.raises(ValueError, match="does not fit the model"):
        load(tmp_path, config, {"model.embed_tokens.weight": np.zeros((4, 2), np.float32)})
    with pytest.raises(ValueError, match=r"up: `target_modules` names it, but no tensor is there"):
        load(tmp_path, config, {})
    with pytest.raises(ValueError, match="no tensor is one of this method"):
        load(tmp_path, json.loads(config) | {"target_modules": None, "bias": "none"}, {})


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "int64", "uint16"])
def test_dtypes_of_no_adapter(dtype, written, tmp_path):
    config, tensors = parts(written["lora"], tmp_path)
    key = f"{P}up.lora_A.weight"
    tensors[key] = np.ones(tensors[key].shape, dtype)
    with pytest.raises(ValueError, match=r"up\.lora_A\.weight: \w+ is no dtype of an adapter"):
        load(tmp_path, config, tensors)


def test_layers_of_a_stack_share_the_widest_dtype(written, tmp_path):
    config, tensors = parts(written["lora"], tmp_path)
    key, other = (f"{P}layers.{i}.down.lora_A.weight" for i in (0, 1))
    tensors[key] = tensors[key].astype(np.float16)
    loaded = load(tmp_path, config, tensors).params["layers.down"]["lora_A"]
    assert loaded.dtype == jnp.float32
    np.testing.assert_array_equal(loaded[0].T, tensors[key])
    np.testing.assert_array_equal(loaded[1, :, :1].T, tensors[other])
    tensors[other] = tensors[other].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"layers\.down: some .* are float16 and others bfloat16"):
        load(tmp_path, config, tensors)
    config, tensors = parts(written["saved"], tmp_path)
    key, other = f"{P}up.weight", f"{P}up.bias"
    tensors |= {key: tensors[key].astype(np.float16), other: tensors[other].astype(jnp.bfloat16)}
    loaded = load(tmp_path, config, tensors).params["up"]
    assert (loaded["kernel"].dtype, loaded["bias"].dtype) == (jnp.float16, jnp.bfloat16)


def test_double_precision_is_not_rounded_in_silence(written, tmp_path):
    config, tensors = parts(written["hra"], tmp_path)
    tensors = {key: tensor.astype(np.float64) + 1e-12 for key, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"up\.hra_u: float64.*jax_enable_x64"):
        load(tmp_path, config, tensors)
    with jax.enable_x64(True):
        loaded = load(tmp_path, config)
    np.testing.assert_array_equal(loaded.params["up"]["hra_u"], tensors[f"{P}up.hra_u"])


@pytest.mark.parametrize("name", METHODS)
def test_shapes_of_another_model(name, written, tmp_path):
    params = {
        "up": {"kernel": normal(5, 6), "bias": normal(6)},
        "layers": {"down": {"kernel": normal(2, 6, 6)}},
    }
    sites = find_sites(apply_fn, params, jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="instead of") as error:
        load(tmp_path, *written[name], sites=sites)
    assert len(re.findall("instead of", str(error.value))) > 1
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_modules_that_the_model_lacks(name, written, tmp_path):
    config, tensors = parts(written[name], tmp_path)
    renamed = {key.replace("layers.1.down", "layers.1.downs"): t for key, t in tensors.items()}
    with pytest.raises(ValueError, match=r"layers\.1\.downs: there is no such module") as error:
        load(tmp_path, config, renamed)
    message = str(error.value)
    assert "nearest: 'layers.1.down' (here 'layers.down')" in message
    assert "layers.1.down: `target_modules` names it, but no tensor is there for it" in message


@pytest.mark.parametrize("name", METHODS)
def test_missing_tensors(name, written, tmp_path):
    config, tensors = parts(written[name], tmp_path)
    for key in tensors:
        rest = {k: t for k, t in tensors.items() if k != key}
        with pytest.raises(ValueError, match=r"it is missing|no tensor is there for it"):
            load(tmp_path, config, rest)


@pytest.mark.parametrize("name", METHODS)
def test_all_problems_are_listed_together(name, written, tmp_path):
    config, tensors = parts(written[name], tmp_path)
    keys = [key for key in tensors if ".layers.0." in key]
    tensors[keys[0]] = np.zeros((7, 7), np.float32)
    tensors[f"{P}elsewhere.lora_A.weight"] = np.zeros((1, 1), np.float32)
    tensors[f"{P}up.lora_Q"] = np.zeros((1, 1), np.float32)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load(tmp_path, config, tensors)
    message = str(error.value)
    short = keys[0].removeprefix(P)
    assert f"{short}: shape (7, 7) instead of" in message
    assert re.search(r"elsewhere[\w.]*: there is no such module", message)
    assert "up.lora_Q" in message


def test_tensors_that_the_config_denies(written, tmp_path):
    config, tensors = parts(written["dora"], tmp_path)
    with pytest.raises(ValueError, match=r"up\.lora_magnitude_vector: the config says"):
        load(tmp_path, config | {"use_dora": False}, tensors)
    both = tensors | {"up.lora_A.weight": tensors[f"{P}up.lora_A.weight"]}
    with pytest.raises(ValueError, match=r"up\.lora_A\.weight' is there twice"):
        load(tmp_path, config, both)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, lora_alpha=5, target_modules=["moe"]),
        HRAConfig(r=2, target_modules=["moe"]),
        IA3Config(target_modules=["moe"], feedforward_modules=[]),
        AdaLoraConfig(
            init_r=2,
            target_r=1,
            target_modules=["moe"],
            rank_pattern={"moe.lora_E": [[[True, False]] * 3] * 2},
        ),
    ],
)
def test_one_expert_alone(config, tmp_path):
    """Experts of one layer are one array here, so that none can be left out."""
    params = {"moe": {"kernel": normal(2, 3, 4, 4)}}

    def moe(params, x):
        def layer(x, own):
            return jnp.tanh(jnp.einsum("ebd,edf->ebf", x, own)), None

        return lax.scan(layer, x, params["moe"]["kernel"])[0]

    sites = find_sites(moe, params, jnp.ones((3, 2, 4)))
    names = ModuleNames((("moe", "layers.{i}.{j}"),))
    save_pretrained(tmp_path, drawn(config, sites), names=names)
    data, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / TENSORS)
    kept = {key: tensor for key, tensor in tensors.items() if ".layers.1.2." not in key}
    save_file(kept, tmp_path / TENSORS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.2: `target_modules` names it"):
        load_pretrained(tmp_path, sites, names=names)
    data["target_modules"].remove("layers.1.2")
    (tmp_path / CONFIG).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"layers\.1\.2: others of its layer are adapted"):
        load_pretrained(tmp_path, sites, names=names)
    whole = {key: tensor for key, tensor in tensors.items() if ".layers.1." not in key}
    save_file(whole, tmp_path / TENSORS, {"format": "pt"})
    data["target_modules"] = [name for name in data["target_modules"] if ".0." in name]
    (tmp_path / CONFIG).write_text(json.dumps(data))
    assert load_pretrained(tmp_path, sites, names=names).sites["moe"].layers == (0,)


def test_experts_of_unequal_ranks_are_refused(tmp_path):
    params = {"moe": normal(3, 4, 4)}
    sites = find_sites(
        lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["moe"]), params, jnp.ones((3, 2, 4))
    )
    site = dataclasses.replace(sites["moe"])
    assert site.stack_axes == (0,)
    names = ModuleNames((("moe", "experts.{i}"),))
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["moe"], rank_pattern={"moe.1": 1})
    adapter = drawn(config, sites)
    loaded = load_pretrained(save_pretrained(tmp_path, adapter, names=names), sites, names=names)
    ranks = [single.params["lora_A"].shape[-1] for single in unstack(loaded).values()]
    assert ranks == [2, 1, 2]  # experts alone are layers: each may have its own


POOL = [
    None, True, False, 0, 1, -1, 2, 3, 1.5, -0.0, 1e308, 10**30, 10**400, float("nan"),
    float("inf"), "", "up", ".*", "(", "(?i)up", "a{99999999999}", "pissa", "olora", "gaussian",
    "all", "none", "lora_only", "LOHA", "IA3", "\ud800", [], ["up"], ["layers.1.down"], ["nope"],
    ["layers.down"], [1], [None], [[]], {}, {"up": 2}, {"up": 1.5}, {"up": True}, {".*": 1},
    {"down": 3}, {"(": 1}, {"(?i)up": 3}, {"up": 10**9}, {"up": 1e300}, {"layers.0.down": 1},
    {"up.lora_E": [True]}, {"up.lora_E": [False, True, True]}, {"^up": 2, "up": 1},
]  # fmt: skip
SHAPES = [[], [0], [2, 4], [4, 2], [3, 2], [2, 3], [-1], [2**62, 0], [1e3], ["2"], None]
DTYPES = ["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F32", "XX", 3, None]


def bytes_mutated(rng, raw):
    """One to three bytes changed, put in or left out."""
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(raw)))
        kind = rng.integers(4)
        if kind == 0:
            raw[at] = rng.integers(256)
        elif kind == 1:
            raw[at] ^= 1 << rng.integers(8)
        elif kind == 2:
            del raw[at]
        else:
            raw.insert(at, rng.choice(list(b'0123456789"{}[],:.-eEnulltrue')))
    return bytes(raw)


def pick(rng, values):
    values = list(values)
    return values[rng.integers(len(values))]


def config_mutated(rng, config):
    """Values and keys of a config changed, in JSON that is whole."""
    config = json.loads(config)
    for _ in range(rng.integers(1, 3)):
        key, other = pick(rng, config), pick(rng, config)
        kind = rng.integers(6)
        if kind <= 2:
            config[key] = copy.deepcopy(pick(rng, POOL))
        elif kind == 3:
            config[pick(rng, ["", f"{key}s", "use_foo", other])] = config.pop(key)
        elif kind == 4:
            config[key], config[other] = config[other], config[key]
        elif isinstance(config[key], dict | list) and config[key]:
            inner = config[key]
            at = pick(rng, inner) if isinstance(inner, dict) else int(rng.integers(len(inner)))
            inner[at] = pick(rng, POOL)
        else:
            del config[key]
    return json.dumps(config).encode()


def header_mutated(rng, raw):
    """Names, shapes, dtypes and offsets of tensors changed, in a header that is whole."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    keys = [key for key in header if key != "__metadata__"]
    for _ in range(rng.integers(1, 3)):
        key, other = pick(rng, keys), pick(rng, keys)
        if key not in header or other not in header or len(header[key]) < 3:
            continue
        entry, kind = header[key], rng.integers(8)
        if kind == 0:
            names = [
                key.removeprefix(P),
                f"{key}x",
                key.replace(".bias", ".base_layer.bias"),
                key.replace(".base_layer", ""),
                key.replace("layers.0", "layers.1"),
                key.replace("layers.1", "layers.2"),
                key.replace(".weight", ""),
                "",
            ]
            header[pick(rng, names)] = header.pop(key)
        elif kind == 1:
            header[key], header[other] = header[other], entry
        elif kind == 2:
            shape = entry["shape"] or []
            entry["shape"] = pick(rng, [*SHAPES, shape[::-1], [*shape, 1]])
        elif kind == 3:
            entry["dtype"] = pick(rng, DTYPES)
        elif kind == 4:
            ends = entry["data_offsets"]
            entry["data_offsets"] = pick(rng, [ends[::-1], [0, 4], [ends[0], ends[1] + 4], [-1, 3]])
        elif kind == 5:
            del header[key]
        elif kind == 6:
            header["__metadata__"] = pick(rng, [{}, {"format": "np"}, {"a": 1}, 3, {"x": "y"}])
        else:
            entry.pop(pick(rng, entry))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def mutated(rng, files):
    """A pair of files with something wrong in it, most of the time."""
    config, tensors = files[pick(rng, files)]
    kind = rng.integers(8)
    if kind <= 1:
        config = config_mutated(rng, config)
    elif kind == 2:
        config = bytes_mutated(rng, config)
    elif kind <= 4:
        tensors = header_mutated(rng, tensors)
    elif kind == 5:
        # Half of the time in the numbers alone: those are to be read as they are.
        start = 8 + int.from_bytes(tensors[:8], "little") if rng.integers(2) else 0
        raw = np.frombuffer(tensors, np.uint8).copy()
        raw[rng.integers(start, len(raw), 3)] = rng.integers(256, size=3)
        tensors = raw.tobytes() if start else bytes_mutated(rng, tensors)
    elif kind == 6:
        cut = pick(rng, ["config", "tensors", "longer"])
        if cut == "config":
            config = config[: rng.integers(len(config))]
        elif cut == "tensors":
            tensors = tensors[: rng.integers(len(tensors))]
        else:
            tensors += bytes(int(rng.integers(1, 9)))
    else:
        other = files[pick(rng, files)]
        config, tensors = pick(rng, [(config, other[1]), (config_mutated(rng, config), other[1])])
    return config, tensors


DEFAULTS = {
    "r": 8, "init_r": 12, "lora_alpha": 8, "alpha": 8, "rank_pattern": {}, "alpha_pattern": {},
    "use_rslora": False, "apply_GS": False, "use_dora": False,
}  # fmt: skip


def rank_of(config, name):
    """The rank that a file gives to a module."""
    if config["peft_type"] != "ADALORA":
        return pattern_value(config["rank_pattern"], name, config["r"])
    kept = config["rank_pattern"].get(f"{name}.lora_E")
    return config["init_r"] if kept is None else sum(kept)


def plain(key):
    """A key as it is in the model, and not in PEFT's wrapping."""
    return key.removeprefix(P).replace(".base_layer.", ".")


def check_means_what_it_says(loaded, directory, again):
    """Holds an adapter against its files as the standard library and safetensors read them."""
    config = json.loads((directory / CONFIG).read_text("utf-8"))
    config = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    tensors = load_file(directory / TENSORS)
    save_pretrained(again, loaded, names=NAMES)
    saved = {plain(key): tensor for key, tensor in load_file(again / TENSORS).items()}
    found = {plain(key): tensor for key, tensor in tensors.items()}
    assert len(found) == len(tensors)
    assert saved.keys() == found.keys()
    for key, tensor in found.items():
        assert saved[key].shape == tensor.shape
        # The layers of a stack have one dtype, which a layer without triplets has no part in.
        assert saved[key].dtype == tensor.dtype or not tensor.size
        if not (config["apply_GS"] and key.endswith("hra_u")):
            assert saved[key].tobytes() == tensor.tobytes()
            continue
        q = np.linalg.qr(tensor.astype(np.float64))[0]
        unit = saved[key] / np.linalg.norm(saved[key], axis=0)
        np.testing.assert_allclose(unit @ unit.T, q @ q.T, atol=1e-4)
    singles = {NAMES.to_torch(*part): single for part, single in unstack(loaded).items()}
    modules = by_module({f"{P}{key.removeprefix(P)}": t for key, t in tensors.items()})
    assert singles.keys() == modules.keys()
    for name, single in singles.items():
        if "scaling" in single.buffers:
            scale = single.buffers["scaling"]
            with np.errstate(over="ignore"):
                assert scale == np.asarray(scale_of(config, name)).astype(scale.dtype)
        assert ("lora_magnitude_vector" in single.params) == config["use_dora"]
        for key, axis in (("lora_B", 0), ("hada_w2_b", -1), ("hra_u", -1)):
            if key in single.params:
                assert single.params[key].shape[axis] == rank_of(config, name)


BATCHES, SIZE = 20, 500


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", range(BATCHES))
def test_mutated_files(batch, written, tmp_path):
    """Ten thousand pairs of files: each is refused, or loads as what it says."""
    rng = np.random.default_rng(batch)
    outcomes = {"loaded": 0, "refused": 0}
    directory, again = tmp_path / "first", tmp_path / "again"
    directory.mkdir()
    for number in range(SIZE):
        config, tensors = mutated(rng, written)
        try:
            loaded = load(directory, config, tensors)
        except (ValueError, FileNotFoundError):
            outcomes["refused"] += 1
            continue
        except Exception as error:
            raise AssertionError(f"number {number}: {config!r} {tensors!r}") from error
        try:
            check_means_what_it_says(loaded, directory, again)
        except (AssertionError, ValueError, SafetensorError) as error:
            raise AssertionError(f"number {number}: {config!r} {tensors!r}") from error
        outcomes["loaded"] += 1
    assert min(outcomes.values()) > SIZE / 50, outcomes
