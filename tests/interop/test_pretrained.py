"""Adapters in PEFT's two files: every method's layout by hand, and everything back again."""

import dataclasses
import functools
import json
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax import lax
from models import near, normal, scanned, scanned_params
from naive import drawn
from safetensors import safe_open
from safetensors.numpy import load_file
from twins import (
    NAMES,
    STACKS,
    apply_fn,
    by_module,
    changed,
    is_inner,
    pattern_value,
    scale_of,
    torch_name,
    torch_weights,
    twin,
)

import peftjax
from peftjax import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    ModuleNames,
    adapt,
    find_sites,
    init_adapter,
    load_pretrained,
    merge,
    save_pretrained,
)
from peftjax.interop import pretrained
from peftjax.methods.hra import reflections
from peftjax.unstacking import unstack

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
DENSE = ("mlp.up", "mlp.down", "query", "attn.wq", "attn.wo")
LAYERS = ("layers.up", "layers.down", "moe.wi", "moe.wo")
LORA = (*DENSE, *LAYERS, "conv1", "conv2", "wide", "point", "conv3", "embed")
LOHA = (*DENSE, *LAYERS, "conv1", "conv2", "wide", "point", "grouped", "dilated")
HRA = (*DENSE, *LAYERS, "conv2", "point")
ADALORA = (*DENSE, *LAYERS, "conv2", "wide", "point", "dilated")
IA3 = (*ADALORA, "grouped", "conv3")
SOME = ("mlp.up", "query", "conv2", "layers.1.up", "layers.3.up", "moe.1.wi")
RANKS = {"layers.1.up": 4, "layers.3.up": 1, "moe.1.wi": 2, "conv2": 5}
INNER = ("mlp.down", "attn.wo", "layers.up", "moe.wo", "conv2", "conv3")
TUCKER = ("mlp.up", "conv1", "conv2", "wide", "point", "dilated", "grouped")

# A config, and whether it needs the params: because of what it starts from or saves.
CASES = {
    "lora": (LoraConfig(r=3, lora_alpha=5, target_modules=LORA), False),
    "rslora": (
        LoraConfig(
            r=3,
            lora_alpha=5,
            use_rslora=True,
            target_modules=LORA,
            rank_pattern=RANKS,
            alpha_pattern={"layers.2.up": 1.5, "moe.0.wi": 7, "embed": 2},
        ),
        False,
    ),
    "some": (LoraConfig(r=3, lora_alpha=5, target_modules=SOME, rank_pattern=RANKS), False),
    "lora_bias": (
        LoraConfig(
            r=3,
            lora_alpha=5,
            lora_bias=True,
            target_modules=("mlp", "query", "conv1", "conv2", "layers.up", "moe.wi", "attn.wq")[1:],
        ),
        False,
    ),
    "dora": (
        LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=LORA, rank_pattern=RANKS),
        True,
    ),
    "pissa": (
        LoraConfig(
            r=2,
            lora_alpha=5,
            init_lora_weights="pissa",
            target_modules=("query", "attn.wo", "layers.2.up", "layers.3.up", "moe.wi"),
        ),
        True,
    ),
    "olora": (
        LoraConfig(
            r=2,
            lora_alpha=5,
            init_lora_weights="olora",
            target_modules=("query", "attn.wo", "layers.up", "moe.wi"),
            rank_pattern={"layers.2.up": 4},
        ),
        True,
    ),
    "loha": (LoHaConfig(r=3, alpha=5, target_modules=LOHA, rank_pattern=RANKS), False),
    "tucker": (
        LoHaConfig(
            r=3,
            alpha=5,
            use_effective_conv2d=True,
            target_modules=TUCKER,
            rank_pattern={"conv2": 2},
            alpha_pattern={"wide": 7},
        ),
        False,
    ),
    "hra": (HRAConfig(r=4, target_modules=HRA), False),
    "ia3": (IA3Config(target_modules=IA3, feedforward_modules=INNER), False),
    "adalora": (AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, target_modules=ADALORA), False),
    "adalora_some": (
        AdaLoraConfig(init_r=3, target_r=2, lora_alpha=0, target_modules=SOME),
        False,
    ),
}

# What stands in the file of each method: PEFT's suffixes and shapes, by hand.
FILES = {
    "lora": {
        "net.mlp.up": {"lora_A.weight": (3, 6), "lora_B.weight": (9, 3)},
        "net.query": {"lora_A.weight": (3, 6), "lora_B.weight": (12, 3)},
        "net.attn.wo": {"lora_A.weight": (3, 12), "lora_B.weight": (7, 3)},
        "net.conv1": {"lora_A.weight": (3, 6, 3), "lora_B.weight": (5, 3, 1)},
        "net.wide": {"lora_A.weight": (3, 6, 2, 3), "lora_B.weight": (5, 3, 1, 1)},
        "net.conv3": {"lora_A.weight": (3, 6, 2, 1, 3), "lora_B.weight": (5, 3, 1, 1, 1)},
        "net.embed": {"lora_embedding_A": (3, 11), "lora_embedding_B": (6, 3)},
        "model.layers.3.up": {"lora_A.weight": (3, 6), "lora_B.weight": (9, 3)},
        "model.layers.1.experts.2.wo": {"lora_A.weight": (3, 7), "lora_B.weight": (6, 3)},
    },
    "some": {
        "net.conv2": {"lora_A.weight": (5, 6, 3, 3), "lora_B.weight": (5, 5, 1, 1)},
        "model.layers.1.up": {"lora_A.weight": (4, 6), "lora_B.weight": (9, 4)},
        "model.layers.3.up": {"lora_A.weight": (1, 6), "lora_B.weight": (9, 1)},
        "model.layers.1.experts.0.wi": {"lora_A.weight": (2, 6), "lora_B.weight": (7, 2)},
    },
    "lora_bias": {
        "net.query": {
            "lora_A.weight": (3, 6),
            "lora_B.weight": (12, 3),
            "lora_B.bias": (12,),
        },
        "net.conv1": {
            "lora_A.weight": (3, 6, 3),
            "lora_B.weight": (5, 3, 1),
            "lora_B.bias": (5,),
        },
    },
    "dora": {
        "net.query": {
            "lora_A.weight": (3, 6),
            "lora_B.weight": (12, 3),
            "lora_magnitude_vector": (12,),
        },
        "net.conv1": {
            "lora_A.weight": (3, 6, 3),
            "lora_B.weight": (5, 3, 1),
            "lora_magnitude_vector": (1, 5, 1),
        },
        "net.wide": {
            "lora_A.weight": (3, 6, 2, 3),
            "lora_B.weight": (5, 3, 1, 1),
            "lora_magnitude_vector": (1, 5, 1, 1),
        },
        "net.embed": {
            "lora_embedding_A": (3, 11),
            "lora_embedding_B": (6, 3),
            "lora_magnitude_vector": (6,),
        },
    },
    "loha": {
        "net.attn.wo": {
            "hada_w1_a": (7, 3),
            "hada_w1_b": (3, 12),
            "hada_w2_a": (7, 3),
            "hada_w2_b": (3, 12),
        },
        "net.wide": {
            "hada_w1_a": (5, 3),
            "hada_w1_b": (3, 36),
            "hada_w2_a": (5, 3),
            "hada_w2_b": (3, 36),
        },
        "net.grouped": {
            "hada_w1_a": (4, 3),
            "hada_w1_b": (3, 27),
            "hada_w2_a": (4, 3),
            "hada_w2_b": (3, 27),
        },
    },
    "tucker": {
        "net.conv1": {
            "hada_t1": (3, 3, 3, 1),
            "hada_t2": (3, 3, 3, 1),
            "hada_w1_a": (3, 5),
            "hada_w1_b": (3, 6),
            "hada_w2_a": (3, 5),
            "hada_w2_b": (3, 6),
        },
        "net.wide": {
            "hada_t1": (3, 3, 2, 3),
            "hada_t2": (3, 3, 2, 3),
            "hada_w1_a": (3, 5),
            "hada_w1_b": (3, 6),
            "hada_w2_a": (3, 5),
            "hada_w2_b": (3, 6),
        },
        "net.point": {
            "hada_w1_a": (5, 3),
            "hada_w1_b": (3, 6),
            "hada_w2_a": (5, 3),
            "hada_w2_b": (3, 6),
        },
    },
    "hra": {
        "net.mlp.up": {"hra_u": (6, 4)},
        "net.attn.wo": {"hra_u": (12, 4)},
        "net.conv2": {"hra_u": (54, 4)},
        "model.layers.0.experts.1.wo": {"hra_u": (7, 4)},
    },
    "ia3": {
        "net.mlp.up": {"ia3_l": (9, 1)},
        "net.mlp.down": {"ia3_l": (1, 9)},
        "net.query": {"ia3_l": (12, 1)},
        "net.attn.wo": {"ia3_l": (1, 12)},
        "net.conv2": {"ia3_l": (1, 6, 1, 1)},
        "net.wide": {"ia3_l": (1, 5, 1, 1)},
        "net.conv3": {"ia3_l": (1, 6, 1, 1, 1)},
        "net.grouped": {"ia3_l": (1, 4, 1, 1)},
        "model.layers.2.down": {"ia3_l": (6, 1)},
    },
    "adalora": {
        "net.query": {"lora_A": (3, 6), "lora_B": (12, 3), "lora_E": (3, 1)},
        "net.wide": {"lora_A": (3, 36), "lora_B": (5, 3), "lora_E": (3, 1)},
        "model.layers.0.experts.1.wi": {"lora_A": (3, 6), "lora_B": (7, 3), "lora_E": (3, 1)},
    },
}

# The keys that torch PEFT 0.21.2 writes.
EVERY = """auto_mapping base_model_name_or_path exclude_modules inference_mode modules_to_save
peft_type peft_version revision target_modules task_type"""
LAYERED = "layers_pattern layers_to_transform"
OF_LORA = f"""{EVERY} {LAYERED} alora_invocation_tokens alpha_pattern arrow_config bias corda_config
ensure_weight_tying eva_config fan_in_fan_out init_lora_weights kasa_config layer_replication
loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core
monteclora_config qalora_group_size r rank_pattern target_parameters trainable_token_indices
use_bdlora use_dora use_qalora use_rslora velora_config"""
KEYS = {
    LoraConfig: OF_LORA,
    AdaLoraConfig: f"""{OF_LORA} beta1 beta2 deltaT init_r orth_reg_weight target_r tfinal tinit
    total_step""",
    LoHaConfig: f"""{EVERY} {LAYERED} alpha alpha_pattern init_weights module_dropout r rank_dropout
    rank_pattern use_effective_conv2d""",
    HRAConfig: f"{EVERY} {LAYERED} apply_GS bias init_weights r",
    IA3Config: f"{EVERY} fan_in_fan_out feedforward_modules init_ia3_weights",
}


def read(directory):
    """The config and the tensors of a directory, by other programs than peftjax."""
    return json.loads((directory / CONFIG).read_text()), load_file(directory / TENSORS)


def payload(directory):
    """The bytes of the two files; of tensors without the header, whose order is not settled."""
    raw = (directory / TENSORS).read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :], (directory / CONFIG).read_text()


@functools.cache
def usual(name):
    """The adapter of a case in single precision."""
    config, needs = CASES[name]
    params, _, sites = twin()
    return drawn(config, sites, params if needs else None, std=0.3)


def check_same(adapter, other):
    """Holds the arrays of two adapters against each other, bit by bit but for padding."""
    arrays = [
        {part: single.params for part, single in unstack(each).items()} for each in (adapter, other)
    ]
    chex.assert_trees_all_equal(*arrays)
    chex.assert_trees_all_equal_dtypes(*arrays)
    chex.assert_trees_all_equal_shapes(adapter.params, other.params)


def check_as_peft(params, merged, directory):
    """Holds a merged model against what PEFT's formulas make of the files."""
    config, tensors = read(directory)
    before, after = torch_weights(params), torch_weights(merged)
    modules = by_module(tensors)
    for name, own in modules.items():
        tables = name in ("net.embed", "net.tied") and "lora_embedding_A" not in own
        turn = np.transpose if tables else np.asarray
        near(turn(after[name]), changed(config, name, turn(before[name]), own))
        assert np.abs(after[name] - before[name]).max() > 1e-3
    for name in before.keys() - modules.keys():
        np.testing.assert_array_equal(after[name], before[name])


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, tmp_path, x64):
    config, needs = CASES[name]
    params, _, sites = twin(jnp.float64)
    adapter = drawn(config, sites, params if needs else None, std=0.3)
    directory = save_pretrained(tmp_path / "first", adapter, names=NAMES)
    loaded = load_pretrained(directory, sites, params if needs else None, names=NAMES)
    check_same(loaded, adapter)
    if name in ("pissa", "olora"):  # their starts are computed again
        near(loaded.buffers, adapter.buffers)
    else:
        chex.assert_trees_all_equal(loaded.buffers, adapter.buffers)
    assert loaded.sites == adapter.sites
    check_as_peft(params, jax.jit(merge)(params, loaded), directory)
    again = save_pretrained(tmp_path / "second", loaded, names=NAMES)
    assert payload(again) == payload(directory)
    assert (again / TENSORS).read_bytes() == (directory / TENSORS).read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_keys_shapes_and_dtypes_are_those_of_peft(name, tmp_path):
    adapter = usual(name)
    directory = save_pretrained(tmp_path, adapter, names=NAMES)
    written, tensors = read(directory)
    found = by_module(tensors)
    for module, own in FILES[name].items():
        assert {suffix: tensor.shape for suffix, tensor in found[module].items()} == own
    assert sum(map(len, found.values())) == len(tensors)
    assert set(found) == set(written["target_modules"])
    modules = {
        torch_name(site.name, index)
        for site in adapter.sites.values()
        for index in np.ndindex(STACKS.get(site.name.split(".")[0], ()))
        if site.layers is None or index[0] in site.layers
    }
    assert set(found) == modules
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    with safe_open(directory / TENSORS, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", CASES)
def test_config_has_the_keys_of_peft(name, tmp_path):
    config = CASES[name][0]
    directory = save_pretrained(
        tmp_path, usual(name), names=NAMES, base_model_name_or_path="org/base"
    )
    written = read(directory)[0]
    assert set(written) == set(KEYS[type(config)].split())
    assert written["peft_type"] == config.peft_type
    fixed = {"inference_mode": True, "auto_mapping": None, "peft_version": "0.21.2"}
    assert fixed.items() <= written.items()
    assert written["base_model_name_or_path"] == "org/base"
    assert written["exclude_modules"] is written["modules_to_save"] is None
    assert written.get("layers_to_transform") is written.get("layers_pattern") is None
    if name != "adalora":
        assert written.get("rank_pattern") is None or all(
            key.startswith("^") for key in written["rank_pattern"]
        )
    assert all(key.startswith("^") for key in written.get("alpha_pattern") or ())
    text = (directory / CONFIG).read_text()
    assert text.rstrip() == json.dumps(written, indent=2, sort_keys=True)


def test_patterns_name_single_modules(tmp_path):
    _, _, sites = twin()
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=SOME,
        rank_pattern=RANKS,
        alpha_pattern={"layers.3.up": 2.5, "moe.1.wi": 4},
    )
    written = read(save_pretrained(tmp_path, drawn(config, sites), names=NAMES))[0]
    experts = [rf"^model\.layers\.1\.experts\.{i}\.wi" for i in range(3)]
    ranks = {r"^model\.layers\.1\.up": 4, r"^model\.layers\.3\.up": 1, r"^net\.conv2": 5}
    assert written["rank_pattern"] == ranks | dict.fromkeys(experts, 2)
    assert written["alpha_pattern"] == {r"^model\.layers\.3\.up": 2.5} | dict.fromkeys(experts, 4)
    assert (written["r"], written["lora_alpha"]) == (3, 5)
    assert pattern_value(written["rank_pattern"], "net.model.layers.1.up", 3) == 3


@pytest.mark.parametrize("method", [LoraConfig, LoHaConfig, AdaLoraConfig])
def test_changed_scales_survive_once(method, tmp_path, x64):
    alpha = "alpha" if method is LoHaConfig else "lora_alpha"
    ranks = {"init_r": 3, "target_r": 2} if method is AdaLoraConfig else {"r": 3}
    targets = ["mlp.up", "query", "layers.up", "moe.wi"]
    params, _, sites = twin(jnp.float64)
    adapter = drawn(method(**ranks, **{alpha: 5}, target_modules=targets), sites, std=0.3)
    own = {
        name: {
            "scaling": buffers["scaling"]
            * (1 + jnp.arange(buffers["scaling"].size) / 3).reshape(buffers["scaling"].shape)
        }
        for name, buffers in adapter.buffers.items()
    } | {"query": adapter.buffers["query"]}
    own["mlp.up"] = {"scaling": jnp.asarray(-0.7)}
    adapter = adapter.replace(buffers=own)
    directory = save_pretrained(tmp_path / "first", adapter, names=NAMES)
    loaded = load_pretrained(directory, sites, names=NAMES)
    if method is not AdaLoraConfig:
        near(loaded.buffers, adapter.buffers, 1e-15)
        chex.assert_trees_all_equal(loaded.params, adapter.params)
        written = read(directory)[0]
        assert written[alpha] == 5
        assert r"^net\.query" not in written["alpha_pattern"]
        assert len(written["alpha_pattern"]) == 1 + 3 + 5  # the first of each stack keeps its own
        assert scale_of(written, "net.mlp.up") == pytest.approx(-0.7)
    merged = jax.jit(merge)(params, loaded)
    if method is AdaLoraConfig:
        near(merged, jax.jit(merge)(params, adapter))
    check_as_peft(params, merged, directory)
    again = save_pretrained(tmp_path / "second", loaded, names=NAMES)
    assert payload(again) == payload(directory)


def test_changed_scale_of_pissa_is_refused(tmp_path):
    params, _, sites = twin()
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["mlp.up"], init_lora_weights="pissa")
    adapter = init_adapter(jax.random.key(0), config, sites, params)
    own = adapter.buffers["mlp.up"]
    adapter = adapter.replace(buffers={"mlp.up": {**own, "scaling": own["scaling"] / 3}})
    with pytest.raises(ValueError, match=r"net\.mlp\.up: its scale was changed.*convert_to_lora"):
        save_pretrained(tmp_path / "new", adapter, names=NAMES)
    assert not (tmp_path / "new").exists()


def test_scale_that_is_no_number_is_refused(tmp_path):
    _, _, sites = twin()
    adapter = drawn(LoraConfig(r=2, lora_alpha=5, target_modules=["mlp.up"]), sites)
    adapter = adapter.replace(buffers={"mlp.up": {"scaling": jnp.float32(jnp.nan)}})
    with pytest.raises(ValueError, match=r"net\.mlp\.up: a scale of nan"):
        save_pretrained(tmp_path / "new", adapter, names=NAMES)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_start_out_of_the_weights_needs_them(init, tmp_path):
    params, _, sites = twin()
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["mlp.up"], init_lora_weights=init)
    adapter = init_adapter(jax.random.key(0), config, sites, params)
    directory = save_pretrained(tmp_path, adapter, names=NAMES)
    with pytest.raises(ValueError, match=f"{init}.*pass params"):
        load_pretrained(directory, sites, names=NAMES)
    loaded = load_pretrained(directory, sites, params, names=NAMES)
    assert loaded.config.init_lora_weights == init.removesuffix("_niter_4")
    if init != "pissa_niter_4":
        chex.assert_trees_all_equal(loaded.params, adapter.params)
        near(merge(params, loaded)["mlp"], params["mlp"], 1e-5)  # untrained: the identity


def test_chains_of_hra(tmp_path, x64):
    params, _, sites = twin(jnp.float64)
    ranks = {"conv2": 2, "layers.2.up": 6, "moe.1.wi": 2}
    targets = ["mlp.up", "conv2", "layers.2.up", "layers.3.up", "moe.wi"]
    config = HRAConfig(r=4, target_modules=targets, rank_pattern=ranks)
    adapter = drawn(config, sites, std=0.3)
    directory = save_pretrained(tmp_path / "first", adapter, names=NAMES)
    written, tensors = read(directory)
    assert written["r"] == 6
    assert {tensor.shape[1] for tensor in tensors.values()} == {6}
    loaded = load_pretrained(directory, sites, names=NAMES)
    merged = jax.jit(merge)(params, loaded)
    near(merged, jax.jit(merge)(params, adapter))
    check_as_peft(params, merged, directory)
    again = save_pretrained(tmp_path / "second", loaded, names=NAMES)
    assert payload(again) == payload(directory)


def test_orthonormal_chains_of_hra(tmp_path, x64):
    params, _, sites = twin(jnp.float64)
    targets = ("mlp.up", "layers.1.up", "layers.2.up")
    config = HRAConfig(r=4, apply_GS=True, target_modules=targets, rank_pattern={"layers.2.up": 2})
    adapter = drawn(config, sites, std=0.3)
    directory = save_pretrained(tmp_path / "first", adapter, names=NAMES)
    written, tensors = read(directory)
    assert written["apply_GS"] is False
    own = tensors["base_model.model.net.mlp.up.hra_u"]
    near(own, reflections(config, adapter.params["mlp.up"], {}))
    loaded = load_pretrained(directory, sites, names=NAMES)
    merged = jax.jit(merge)(params, loaded)
    near(merged, jax.jit(merge)(params, adapter))
    check_as_peft(params, merged, directory)


def test_gram_and_schmidt_of_peft(tmp_path, x64):
    """A file of PEFT's with ``apply_GS``: all its columns orthonormal, P = I - 2 Q Q^T."""
    params, _, sites = twin(jnp.float64)
    adapter = drawn(HRAConfig(r=4, target_modules=["mlp.up"]), sites, std=0.3)
    directory = save_pretrained(tmp_path, adapter, names=NAMES)
    text = (directory / CONFIG).read_text().replace('"apply_GS": false', '"apply_GS": true')
    (directory / CONFIG).write_text(text)
    loaded = load_pretrained(directory, sites, names=NAMES)
    q = np.linalg.qr(np.asarray(adapter.params["mlp.up"]["hra_u"]))[0]
    kernel = params["mlp"]["up"]["kernel"]
    near(merge(params, loaded)["mlp"]["up"]["kernel"], kernel - 2 * q @ (q.T @ kernel))


@pytest.mark.filterwarnings("ignore:an odd number of reflections")
def test_odd_differences_of_hra_are_refused(tmp_path):
    _, _, sites = twin()
    config = HRAConfig(r=4, target_modules=["mlp.up", "query"], rank_pattern={"query": 3})
    with pytest.raises(ValueError, match=r"query: .* 3 cannot become 4"):
        save_pretrained(tmp_path / "new", drawn(config, sites), names=NAMES)
    assert not (tmp_path / "new").exists()
    odd = dataclasses.replace(config, r=5)
    adapter = drawn(odd, sites)
    loaded = load_pretrained(save_pretrained(tmp_path, adapter, names=NAMES), sites, names=NAMES)
    chex.assert_trees_all_equal(loaded.params["mlp.up"], adapter.params["mlp.up"])
    assert loaded.params["query"]["hra_u"].shape == (6, 5)


def test_scales_of_ia3_reach_the_bias(tmp_path):
    params, _, sites = twin()
    config = IA3Config(target_modules=("mlp.up", "mlp.down"), feedforward_modules=["mlp.down"])
    adapter = drawn(config, sites)
    directory = save_pretrained(tmp_path, adapter, names=NAMES)
    written, tensors = read(directory)
    merged = merge(params, load_pretrained(directory, sites, names=NAMES))
    assert not is_inner(written, "net.mlp.up")
    scale = tensors["base_model.model.net.mlp.up.ia3_l"][:, 0]
    near(merged["mlp"]["up"]["bias"], params["mlp"]["up"]["bias"] * scale, 1e-6)
    near(merged["mlp"]["down"]["bias"], params["mlp"]["down"]["bias"])


def test_feedforward_names_that_end_others(tmp_path):
    """PEFT takes ``xup`` for feedforward where ``up`` is: the file must not say so."""
    params = {name: {"kernel": normal(6, 6, seed=i)} for i, name in enumerate(("up", "xup"))}

    def two(params, x):
        return x @ params["up"]["kernel"] @ params["xup"]["kernel"]

    sites = find_sites(two, params, jnp.ones((2, 6)))
    config = IA3Config(target_modules=["up", "xup"], feedforward_modules=["up"])
    adapter = drawn(config, sites)
    assert adapter.params["up"]["ia3_l"].shape == (6, 1)
    directory = save_pretrained(tmp_path / "first", adapter)
    written = read(directory)[0]
    assert [is_inner(written, name) for name in ("up", "xup")] == [True, False]
    loaded = load_pretrained(directory, sites)
    chex.assert_trees_all_equal(loaded.params, adapter.params)
    merged = merge(params, loaded)["up"]["kernel"]
    near(merged, params["up"]["kernel"] * adapter.params["up"]["ia3_l"], 1e-6)
    assert payload(save_pretrained(tmp_path / "second", loaded)) == payload(directory)


def test_lora_bias_is_scaled(tmp_path):
    params, _, sites = twin()
    config = LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules=["query", "mlp.up"])
    adapter = drawn(config, sites)
    directory = save_pretrained(tmp_path, adapter, names=NAMES)
    tensors = read(directory)[1]
    merged = merge(params, load_pretrained(directory, sites, names=NAMES))
    shift = tensors["base_model.model.net.query.lora_B.bias"].reshape(3, 4) * 5 / 3
    near(merged["query"]["bias"], params["query"]["bias"] + shift, 1e-6)


SAVED = {
    "all": LoraConfig(
        r=3, lora_alpha=5, bias="all", target_modules=["mlp.up", "attn.wq", "layers.down", "moe.wi"]
    ),
    "lora_only": LoraConfig(
        r=3,
        lora_alpha=5,
        bias="lora_only",
        target_modules=["query", "attn.wq", "layers.1.up", "layers.3.up", "moe.wi"],
    ),
    "hra_only": HRAConfig(r=4, bias="hra_only", target_modules=["mlp", "query"][1:]),
    "adalora": AdaLoraConfig(
        init_r=3, target_r=2, lora_alpha=5, bias="lora_only", target_modules=["query", "moe.wi"]
    ),
    "modules": LoHaConfig(
        r=3,
        alpha=5,
        target_modules=["mlp.down", "layers.up"],
        modules_to_save=["norm", "query", "attn", "conv2", "embed", "moe"],
    ),
    "ia3": IA3Config(
        target_modules=["layers.2.up"],
        feedforward_modules=[],
        modules_to_save=["layers.norm", "layers.down", "mlp"],
    ),
}
P = "base_model.model."
# The keys of whole tensors, by hand, and their shapes.
WHOLE = {
    "all": {
        "net.mlp.up.base_layer.bias": (9,),
        "net.mlp.down.bias": (5,),
        "net.query.bias": (12,),
        "net.conv1.bias": (5,),
        "net.conv2.bias": (5,),
        "net.norm.bias": (6,),
        "net.attn.wq.base_layer.bias": (12,),
        **{f"model.layers.{i}.up.bias": (9,) for i in range(4)},
        **{f"model.layers.{i}.experts.{j}.wi.base_layer.bias": (7,) for i, j in np.ndindex(2, 3)},
    },
    "lora_only": {
        "net.query.base_layer.bias": (12,),
        "net.attn.wq.base_layer.bias": (12,),
        **{f"model.layers.{i}.up.{'base_layer.' * (i % 2)}bias": (9,) for i in range(4)},
        **{f"model.layers.{i}.experts.{j}.wi.base_layer.bias": (7,) for i, j in np.ndindex(2, 3)},
    },
    "hra_only": {"net.query.base_layer.bias": (12,)},
    "adalora": {
        "net.query.base_layer.bias": (12,),
        **{f"model.layers.{i}.experts.{j}.wi.base_layer.bias": (7,) for i, j in np.ndindex(2, 3)},
    },
    "modules": {
        "net.norm.weight": (6,),
        "net.norm.bias": (6,),
        **{f"model.layers.{i}.norm.weight": (6,) for i in range(4)},
        "net.query.weight": (12, 6),
        "net.query.bias": (12,),
        "net.attn.wq.weight": (12, 6),
        "net.attn.wq.bias": (12,),
        "net.attn.wo.weight": (7, 12),
        "net.conv2.weight": (5, 6, 3, 3),
        "net.conv2.bias": (5,),
        "net.embed.weight": (11, 6),
        **{f"model.layers.{i}.experts.{j}.wi.weight": (7, 6) for i, j in np.ndindex(2, 3)},
        **{f"model.layers.{i}.experts.{j}.wi.bias": (7,) for i, j in np.ndindex(2, 3)},
        **{f"model.layers.{i}.experts.{j}.wo.weight": (6, 7) for i, j in np.ndindex(2, 3)},
    },
    "ia3": {
        **{f"model.layers.{i}.norm.weight": (6,) for i in range(4)},
        **{f"model.layers.{i}.down.weight": (6, 9) for i in range(4)},
        "net.mlp.up.weight": (9, 6),
        "net.mlp.up.bias": (9,),
        "net.mlp.down.weight": (5, 9),
        "net.mlp.down.bias": (5,),
    },
}


@pytest.mark.parametrize("name", SAVED)
def test_whole_tensors(name, tmp_path, x64):
    params, _, sites = twin(jnp.float64)
    adapter = drawn(SAVED[name], sites, params, std=0.3)
    directory = save_pretrained(tmp_path / "first", adapter, names=NAMES)
    written, tensors = read(directory)
    own = {f"{module}.{key}" for module, own in by_module(tensors).items() for key in own}
    found = {key.removeprefix(P): tensor.shape for key, tensor in tensors.items()}
    assert {key: shape for key, shape in found.items() if key not in own} == WHOLE[name]
    loaded = load_pretrained(directory, sites, names=NAMES)
    chex.assert_trees_all_equal(loaded.params, adapter.params)
    chex.assert_trees_all_equal(loaded.buffers, adapter.buffers)
    assert set(loaded.saved) == set(adapter.saved)
    again = save_pretrained(tmp_path / "second", loaded, names=NAMES)
    assert payload(again)[0] == payload(directory)[0]
    modules = written["modules_to_save"] or []
    whole = {key.rpartition(".")[0] for key in WHOLE[name]} if SAVED[name].modules_to_save else ()
    assert {
        m for m in whole if not any(f"{m}.".startswith(f"{each}.") for each in modules)
    } == set()
    merged = torch_weights(jax.jit(merge)(params, loaded))
    for key in found:
        if key.endswith(".weight") and key in WHOLE[name] and "norm" not in key:
            np.testing.assert_array_equal(merged[key.removesuffix(".weight")], tensors[P + key])


def test_outputs_of_a_loaded_adapter(tmp_path):
    params, args, sites = twin()
    targets = ["mlp.up", "query", "embed", "layers.up"]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, modules_to_save=["norm"])
    adapter = drawn(config, sites, params, std=0.3)
    loaded = load_pretrained(save_pretrained(tmp_path, adapter, names=NAMES), sites, names=NAMES)

    def some(params, *args):
        return [apply_fn(params, *args)[name] for name in ("mlp", "query", "embed", "layers")]

    adapted = jax.jit(adapt(some))
    chex.assert_trees_all_equal(adapted(params, loaded, *args), adapted(params, adapter, *args))


def test_some_layers_of_a_saved_stack_need_the_params(tmp_path):
    params, _, sites = twin()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["layers.1.up"], bias="lora_only")
    directory = save_pretrained(tmp_path, drawn(config, sites, params), names=NAMES)
    tensors = read(directory)[1]
    kept = {key: tensor for key, tensor in tensors.items() if not re.search(r"\.up\.bias", key)}
    pretrained.save_file(kept, directory / TENSORS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.up\.bias: .*pass params"):
        load_pretrained(directory, sites, names=NAMES)
    bias = load_pretrained(directory, sites, params, names=NAMES).params["layers.up"]["bias"]
    own = tensors[f"{P}model.layers.1.up.base_layer.bias"]
    np.testing.assert_array_equal(bias, params["layers"]["up"]["bias"].at[1].set(own))
    kept = {key: tensor.astype(jnp.bfloat16) for key, tensor in kept.items()}
    pretrained.save_file(kept, directory / TENSORS, {"format": "pt"})
    bias = load_pretrained(directory, sites, params, names=NAMES).params["layers.up"]["bias"]
    np.testing.assert_array_equal(bias[0], params["layers"]["up"]["bias"][0])  # is not rounded


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "bfloat16") for name in ("rslora", "dora", "loha", "hra", "ia3", "adalora")),
        *((name, "float16") for name in ("rslora", "adalora")),
    ],
)
def test_half_precision_keeps_dtype_and_bytes(name, dtype, tmp_path):
    params, _, sites = twin()
    changes = {
        "rslora": {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 1.7}},
        "ia3": {"feedforward_modules": ["query"]},
    }.get(name, {"rank_pattern": {}})
    targets = ("mlp.up", "query", "layers.1.up")
    config = dataclasses.replace(CASES[name][0], target_modules=targets, **changes)
    adapter = drawn(config, sites, params, std=0.3, dtype=dtype)
    directory = save_pretrained(tmp_path / "first", adapter, names=NAMES)
    tensors = read(directory)[1]
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(dtype)}
    loaded = load_pretrained(directory, sites, names=NAMES)
    check_same(loaded, adapter)
    chex.assert_trees_all_equal(loaded.buffers, adapter.buffers)
    chex.assert_trees_all_equal_dtypes(loaded, adapter.replace(config=loaded.config))
    again = save_pretrained(tmp_path / "second", loaded, names=NAMES)
    assert (again / TENSORS).read_bytes() == (directory / TENSORS).read_bytes()
    assert payload(again) == payload(directory)


def test_mixed_dtypes(tmp_path):
    _, _, sites = twin()
    adapter = drawn(LoraConfig(r=2, lora_alpha=5, target_modules=["mlp.up", "mlp.down"]), sites)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter.params["mlp.up"])
    adapter = adapter.replace(params={**adapter.params, "mlp.up": half})
    directory = save_pretrained(tmp_path, adapter, names=NAMES)
    loaded = load_pretrained(directory, sites, names=NAMES)
    chex.assert_trees_all_equal(loaded.params, adapter.params)
    assert loaded.params["mlp.up"]["lora_A"].dtype == ml_dtypes.bfloat16


def trained(config, sites, steps=5):
    """An adapter whose triplets the allocator has weighed, and the allocator's state."""
    adapter = drawn(config, sites, std=0.3)
    optimizer = peftjax.rank_allocator(optax.sgd(0.01), adapter)
    state, trainable = optimizer.init(adapter.params), adapter.params

    @jax.jit
    def step(trainable, state, i):
        gradient = jax.tree.map(lambda x: jnp.sin(x * (i + 2)), trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state

    for i in range(steps):
        trainable, state = step(trainable, state, float(i))
    return adapter.replace(params=trainable), state


@pytest.mark.parametrize(
    "targets",
    [("mlp.up", "layers.up", "moe.wi"), ("conv2", "layers.1.up", "layers.3.up", "moe.1.wi")],
)
def test_pruned_triplets(targets, tmp_path, x64):
    params, _, sites = twin(jnp.float64)
    config = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=5, total_step=5, tfinal=1, target_modules=targets
    )
    adapter, state = trained(config, sites)
    small = peftjax.prune(adapter, state)
    directory = save_pretrained(tmp_path / "first", small, names=NAMES)
    written, tensors = read(directory)
    assert written["total_step"] == 5
    modules = by_module(tensors)
    assert set(written["rank_pattern"]) == {f"{name}.lora_E" for name in modules}
    left = {name: sum(written["rank_pattern"][f"{name}.lora_E"]) for name in modules}
    assert len(set(left.values())) > 1
    for name, own in modules.items():
        assert len(written["rank_pattern"][f"{name}.lora_E"]) == 4
        assert own["lora_E"].shape == (left[name], 1)
        assert own["lora_A"].shape[0] == own["lora_B"].shape[1] == left[name]
    loaded = load_pretrained(directory, sites, names=NAMES)
    check_same(loaded, small)
    chex.assert_trees_all_equal(loaded.buffers, small.buffers)
    assert loaded.config.rank_pattern == small.config.rank_pattern
    merged = jax.jit(merge)(params, loaded)
    after, before = torch_weights(merged), torch_weights(params)
    for name, own in modules.items():
        near(after[name], changed(written, name, before[name], own))
    again = save_pretrained(tmp_path / "second", loaded, names=NAMES)
    assert payload(again) == payload(directory)


def test_modules_of_rank_zero(tmp_path):
    params, _, sites = twin()
    pattern = {"mlp.up.lora_E": [False, False], "mlp.down.lora_E": [False, True]}
    config = AdaLoraConfig(
        init_r=2, target_r=1, lora_alpha=5, target_modules=["mlp.up", "mlp.down"]
    )
    config = dataclasses.replace(config, rank_pattern=pattern)
    adapter = drawn(config, sites)
    directory = save_pretrained(tmp_path, adapter, names=NAMES)
    written, tensors = read(directory)
    assert written["total_step"] == 1  # PEFT insists on one
    assert tensors[f"{P}net.mlp.up.lora_A"].shape == (0, 6)
    loaded = load_pretrained(directory, sites, names=NAMES)
    chex.assert_trees_all_equal(loaded.params, adapter.params)
    near(merge(params, loaded)["mlp"]["up"], params["mlp"]["up"])


FOREIGN = {
    "lora_grouped": (
        LoraConfig(r=2, lora_alpha=5, target_modules=["grouped", "mlp.up"]),
        "grouped",
    ),
    "lora_dilated": (LoraConfig(r=2, lora_alpha=5, target_modules=["dilated"]), "dilated"),
    "lora_tied": (LoraConfig(r=2, lora_alpha=5, target_modules=["tied", "embed"]), "table and an"),
    "adalora_table": (AdaLoraConfig(init_r=3, target_r=2, target_modules=["embed"]), "a table"),
    "adalora_line": (AdaLoraConfig(init_r=3, target_r=2, target_modules=["conv1"]), "one axis"),
    "adalora_space": (AdaLoraConfig(init_r=3, target_r=2, target_modules=["conv3"]), "three axes"),
    "adalora_groups": (AdaLoraConfig(init_r=3, target_r=2, target_modules=["grouped"]), "grouped"),
    "loha_table": (LoHaConfig(r=2, alpha=5, target_modules=["embed"]), "a table"),
    "loha_space": (
        LoHaConfig(r=2, alpha=5, use_effective_conv2d=True, target_modules=["conv3"]),
        "three axes",
    ),
    "hra_table": (HRAConfig(r=2, target_modules=["embed"]), "a table"),
    "hra_line": (HRAConfig(r=2, target_modules=["conv1"]), "one axis"),
    "hra_space": (HRAConfig(r=2, target_modules=["conv3"]), "three axes"),
    "hra_grouped": (HRAConfig(r=2, target_modules=["grouped"]), "grouped"),
    "hra_dilated": (HRAConfig(r=2, target_modules=["dilated"]), "dilated"),
    "hra_wide": (HRAConfig(r=2, target_modules=["wide"]), "not square"),
    "ia3_table": (IA3Config(target_modules=["embed"], feedforward_modules=[]), "a table"),
    "ia3_line": (IA3Config(target_modules=["conv1"], feedforward_modules=["conv1"]), "one axis"),
    "ia3_tied": (IA3Config(target_modules=["tied"], feedforward_modules=["tied"]), "table and an"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_peft_cannot_run(name, tmp_path):
    config, reason = FOREIGN[name]
    _, _, sites = twin()
    adapter = drawn(config, sites)
    module = "net.tied" if "tied" in name else f"net.{config.target_modules[0]}"
    with pytest.raises(ValueError, match=rf"{module}: it .*{reason}") as error:
        save_pretrained(tmp_path / "new", adapter, names=NAMES)
    assert "allow_foreign=True" in str(error.value)
    assert not (tmp_path / "new").exists()

    directory = save_pretrained(tmp_path / "new", adapter, names=NAMES, allow_foreign=True)
    loaded = load_pretrained(directory, sites, names=NAMES)
    chex.assert_trees_all_equal(loaded.params, adapter.params)
    chex.assert_trees_all_equal(loaded.buffers, adapter.buffers)
    again = save_pretrained(tmp_path / "again", loaded, names=NAMES, allow_foreign=True)
    assert payload(again) == payload(directory)
    # Without peftjax's word for it, the file is one that PEFT would misread.
    pretrained.save_file(read(directory)[1], directory / TENSORS, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{module}: it .*{reason}"):
        load_pretrained(directory, sites, names=NAMES)


def check_foreign(adapter, sites, params, directory, match, names=None):
    """Neither written for torch PEFT nor read as its file, but kept for peftjax alone."""
    with pytest.raises(ValueError, match=match):
        save_pretrained(directory, adapter, names=names)
    assert not directory.exists()
    save_pretrained(directory, adapter, names=names, allow_foreign=True)
    loaded = load_pretrained(directory, sites, params, names=names)
    chex.assert_trees_all_equal(loaded.params, adapter.params)
    pretrained.save_file(read(directory)[1], directory / TENSORS, {"format": "pt"})
    with pytest.raises(ValueError, match=match):
        load_pretrained(directory, sites, params, names=names)


def upsampled(params, x):
    x = lax.conv_general_dilated(
        x,
        params["up"]["kernel"],
        (1, 1),
        ((2, 2), (2, 2)),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return (x + params["up"]["bias"][None, None, None]) @ params["out"]["kernel"]


def upsampling():
    up = {"kernel": normal(3, 3, 4, 4, seed=2), "bias": normal(4, seed=3)}
    params = {"up": up, "out": {"kernel": normal(4, 5)}}
    return params, find_sites(upsampled, params, jnp.ones((2, 5, 5, 4)))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, lora_alpha=5, target_modules=["up"]),
        LoHaConfig(r=2, alpha=5, target_modules=["up"]),
        LoraConfig(r=2, lora_alpha=5, target_modules=["out"], modules_to_save=["up"]),
    ],
    ids=["lora", "loha", "saved"],
)
def test_a_transposed_convolution_is_foreign(config, tmp_path):
    params, sites = upsampling()
    match = "up: it is a transposed convolution, "
    check_foreign(drawn(config, sites, params), sites, params, tmp_path / "new", match)


def test_the_bias_of_a_transposed_convolution_is_saved(tmp_path):
    params, sites = upsampling()
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["out"], bias="all")
    adapter = drawn(config, sites, params)
    loaded = load_pretrained(save_pretrained(tmp_path, adapter), sites)
    chex.assert_trees_all_equal(loaded.params, adapter.params)


@pytest.mark.parametrize("options", [{"window_strides": (1, 2)}, {"padding": ((1, 1), (0, 0))}])
def test_hra_of_uneven_steps_is_foreign(options, tmp_path):
    def convolved(params, x):
        usual = {"window_strides": (1, 1), "padding": "VALID"}
        numbers = ("NHWC", "HWIO", "NHWC")
        kernel = params["c"]["kernel"]
        return lax.conv_general_dilated(x, kernel, **usual | options, dimension_numbers=numbers)

    params = {"c": {"kernel": normal(3, 3, 4, 6)}}
    sites = find_sites(convolved, params, jnp.ones((2, 6, 6, 4)))
    adapter = drawn(HRAConfig(r=2, target_modules=["c"]), sites)
    match = "c: it is a convolution of steps or padding that differ"
    check_foreign(adapter, sites, params, tmp_path / "new", match)


TIED_HEADS = {
    "log_softmax": jax.nn.log_softmax,
    "soft cap": lambda y: 30 * jnp.tanh(y / 30),
    "masked": lambda y: jnp.where(jnp.arange(8) < 6, y, -1e9),
}


@pytest.mark.parametrize("name", TIED_HEADS)
def test_a_tied_head_is_seen_behind_anything(name, tmp_path):
    def language_model(params, ids):
        table = params["emb"]["embedding"]
        return TIED_HEADS[name](jnp.tanh(table[ids]) @ table.T)

    params = {"emb": {"embedding": normal(8, 6)}}
    sites = find_sites(language_model, params, jnp.array([[0, 5]]))
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["emb"])
    match = "emb: it is used both ways round"
    check_foreign(drawn(config, sites), sites, params, tmp_path / "new", match)


def test_the_halves_of_an_autoencoder_are_tied(tmp_path):
    params = {"e": {"kernel": normal(6, 4)}}

    def autoencoder(params, x):
        return jnp.tanh(jnp.tanh(x @ params["e"]["kernel"]) @ params["e"]["kernel"].T)

    sites = find_sites(autoencoder, params, jnp.ones((2, 6)))
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["e"])
    match = "e: it is used both ways round"
    check_foreign(drawn(config, sites), sites, params, tmp_path / "new", match)


@pytest.mark.parametrize("module", ["embed", "conv2"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_out_of_the_weight_are_of_linear_layers(init, module, tmp_path):
    """PEFT leaves a table as it is and starts anew, and refuses convolutions."""
    params, _, sites = twin()
    config = LoraConfig(
        r=2, lora_alpha=5, init_lora_weights=init, target_modules=["mlp.up", module]
    )
    adapter = drawn(config, sites, params)
    match = rf"net\.{module}: it is no linear layer, and .*'{init}'.* convert_to_lora"
    check_foreign(adapter, sites, params, tmp_path / "new", match, NAMES)
    plain = peftjax.convert_to_lora(adapter, 1.0, params)
    directory = save_pretrained(tmp_path / "plain", plain, names=NAMES)
    loaded = load_pretrained(directory, sites, names=NAMES)
    near(merge(params, loaded), merge(params, adapter), 1e-5)


def test_a_start_that_peft_has_not_for_convolutions_is_not_written(tmp_path):
    _, _, sites = twin()
    config = LoraConfig(
        r=2, lora_alpha=5, init_lora_weights="orthogonal", target_modules=["mlp.up", "conv2"]
    )
    adapter = drawn(config, sites)
    directory = save_pretrained(tmp_path / "new", adapter, names=NAMES)
    assert read(directory)[0]["init_lora_weights"] is True
    loaded = load_pretrained(directory, sites, names=NAMES)
    chex.assert_trees_all_equal(loaded.params, adapter.params)
    linear = drawn(dataclasses.replace(config, target_modules=["mlp.up"]), sites)
    directory = save_pretrained(tmp_path / "linear", linear, names=NAMES)
    assert read(directory)[0]["init_lora_weights"] == "orthogonal"


def test_a_table_has_no_lora_bias_in_peft(tmp_path):
    params = {"emb": {"embedding": normal(8, 6), "bias": normal(6, seed=1)}}

    def apply_fn(params, ids):
        return jnp.tanh(params["emb"]["embedding"][ids] + params["emb"]["bias"][None, None])

    ids = jnp.array([[0, 5]])
    sites = find_sites(apply_fn, params, ids)
    config = LoraConfig(r=2, lora_alpha=5, lora_bias=True, target_modules=["emb"])
    adapter = drawn(config, sites)
    match = "emb: it is a table, for which torch PEFT has no `lora_bias`"
    check_foreign(adapter, sites, params, tmp_path / "new", match)
    save_pretrained(tmp_path / "new", adapter, allow_foreign=True)
    loaded = load_pretrained(tmp_path / "new", sites)
    near(*(adapt(apply_fn)(params, each, ids) for each in (loaded, adapter)))


def test_arrays_without_a_place_in_a_file_are_refused(tmp_path):
    _, _, sites = twin()
    adapter = drawn(LoraConfig(r=2, lora_alpha=5, target_modules=["mlp.up"]), sites)
    more = {**adapter.params["mlp.up"], "gain": jnp.ones(9)}
    adapter = adapter.replace(params={"mlp.up": more})
    with pytest.raises(ValueError, match=r"mlp\.up: .* no place for its 'gain' of shape \(9,\)"):
        save_pretrained(tmp_path / "new", adapter, names=NAMES)
    assert not (tmp_path / "new").exists()


def test_olora_on_conv1d_of_transformers_is_foreign(tmp_path):
    """PEFT takes its start out of the weight as it lies, which is the other way round there."""
    params, _, sites = twin()
    names = ModuleNames(NAMES.rules, fan_in_fan_out=["net.mlp.{name}"])
    config = LoraConfig(r=2, lora_alpha=5, init_lora_weights="olora", target_modules=["mlp.up"])
    match = r"net\.mlp\.up: it is transformers' Conv1D, .* transpose: convert_to_lora"
    check_foreign(drawn(config, sites, params), sites, params, tmp_path / "new", match, names)
    pissa = dataclasses.replace(config, init_lora_weights="pissa")
    save_pretrained(tmp_path / "pissa", drawn(pissa, sites, params), names=names)


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, alpha=5, target_modules=["mlp.up"]),
        HRAConfig(r=2, target_modules=["mlp.up"]),
    ],
)
def test_conv1d_of_transformers_is_foreign(config, tmp_path):
    _, _, sites = twin()
    names = ModuleNames(NAMES.rules, fan_in_fan_out=["net.mlp.{name}"])
    with pytest.raises(ValueError, match=r"net\.mlp\.up: it is transformers' Conv1D"):
        save_pretrained(tmp_path / "new", drawn(config, sites), names=names)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, lora_alpha=5, target_modules=["mlp.up"], modules_to_save=["mlp.down"]),
        IA3Config(target_modules=["mlp.up"], feedforward_modules=[], modules_to_save=["mlp.down"]),
    ],
)
def test_inputs_first(config, tmp_path):
    """Conv1D keeps its weight as (in, out); the tensors of adapters are those of a Linear."""
    params, _, sites = twin()
    names = ModuleNames(NAMES.rules, fan_in_fan_out=["net.mlp.{name}"])
    adapter = drawn(config, sites, params)
    written, tensors = read(save_pretrained(tmp_path / "first", adapter, names=names))
    assert written["fan_in_fan_out"] is True
    down = adapter.params["mlp.down"]["kernel"]
    np.testing.assert_array_equal(tensors[f"{P}net.mlp.down.weight"], down)
    usual = read(save_pretrained(tmp_path / "second", adapter, names=NAMES))
    assert usual[0]["fan_in_fan_out"] is False
    np.testing.assert_array_equal(usual[1][f"{P}net.mlp.down.weight"], down.T)
    for key, tensor in tensors.items():
        if "mlp.up" in key:
            np.testing.assert_array_equal(tensor, usual[1][key])
    loaded = load_pretrained(tmp_path / "first", sites, names=names)
    chex.assert_trees_all_equal(loaded.params, adapter.params)


def test_stacks_need_a_number_in_torch(tmp_path):
    params = scanned_params()
    sites = find_sites(scanned, params, jnp.ones((2, 6)))
    adapter = drawn(LoraConfig(r=2, lora_alpha=5, target_modules=["up"]), sites)
    with pytest.raises(ValueError, match=r"'layers\.up' is stacked.*names=ModuleNames"):
        save_pretrained(tmp_path / "new", adapter)
    assert not (tmp_path / "new").exists()


def test_two_arrays_of_one_torch_name_are_refused(tmp_path):
    params = {"up": {"kernel": normal(6, 6), "scale": normal(6, seed=1)}, "down": normal(6, 6)}

    def scaled(params, x):
        return x @ params["up"]["kernel"] * params["up"]["scale"][None] @ params["down"]

    sites = find_sites(scaled, params, jnp.ones((2, 6)))
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["down"], modules_to_save=["up"])
    with pytest.raises(ValueError, match=r"two arrays have the torch name 'up\.weight'"):
        save_pretrained(tmp_path / "new", drawn(config, sites, params))
    assert not (tmp_path / "new").exists()


def test_scalars_are_saved_as_scalars(tmp_path):
    params = {"head": {"kernel": normal(6, 4), "temperature": normal(seed=3)}, "up": normal(6, 6)}

    def warm(params, x):
        return x @ params["up"] @ params["head"]["kernel"] * params["head"]["temperature"]

    sites = find_sites(warm, params, jnp.ones((2, 6)))
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["up"], modules_to_save=["head"])
    adapter = drawn(config, sites, params)
    directory = save_pretrained(tmp_path, adapter)
    assert read(directory)[1][f"{P}head.temperature"].shape == ()
    loaded = load_pretrained(directory, sites)
    chex.assert_trees_all_equal(loaded.params, adapter.params)


@pytest.mark.parametrize("fails", ["save_file", "json", "replace"])
def test_an_error_in_the_middle_leaves_the_old_files(fails, tmp_path, monkeypatch):
    _, _, sites = twin()
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["mlp.up"])
    old, new = drawn(config, sites), drawn(dataclasses.replace(config, r=3), sites)
    directory = save_pretrained(tmp_path, old, names=NAMES)
    before = {name: (directory / name).read_bytes() for name in (CONFIG, TENSORS)}

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    target = {
        "save_file": (pretrained, "save_file"),
        "json": (pretrained.json, "dumps"),
        "replace": (pretrained.os, "replace"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*target[fails], fail)
        with pytest.raises(OSError, match="disk is full"):
            save_pretrained(directory, new, names=NAMES)
    assert {name: (directory / name).read_bytes() for name in (CONFIG, TENSORS)} == before
    loaded = load_pretrained(directory, sites, names=NAMES)
    chex.assert_trees_all_equal(loaded.params, old.params)
    save_pretrained(directory, new, names=NAMES)
    loaded = load_pretrained(directory, sites, names=NAMES)
    chex.assert_trees_all_equal(loaded.params, new.params)


def test_absent_and_pickled_files(tmp_path):
    _, _, sites = twin()
    with pytest.raises(FileNotFoundError, match=CONFIG):
        load_pretrained(tmp_path, sites, names=NAMES)
    with pytest.raises(FileNotFoundError, match=CONFIG):
        load_pretrained(tmp_path / "nowhere", sites, names=NAMES)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(ValueError, match=r"is a pickle, which runs.*safe_serialization=True"):
        load_pretrained(tmp_path, sites, names=NAMES)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=TENSORS):
        load_pretrained(tmp_path, sites, names=NAMES)


def test_a_name_that_ends_others_is_written_so_that_it_does_not_mean_them(tmp_path):
    """PEFT's lists match ends of names: `up` alone would mean `mlp.up` too."""

    def apply_fn(params, x):
        x = jnp.tanh(x @ params["up"]["kernel"])
        x, _ = jax.lax.scan(
            lambda x, k: (jnp.tanh(x @ k), None), x, params["layers"]["up"]["kernel"]
        )
        return x @ params["mlp"]["up"]["kernel"]

    square = {"kernel": normal(5, 5)}
    params = {"up": square, "mlp": {"up": square}, "layers": {"up": {"kernel": normal(3, 5, 5)}}}
    sites = peftjax.find_sites(apply_fn, params, normal(2, 5))
    rules = (("layers.{x}", "layers.{i}.{x}"), ("{*x}", "{*x}"))
    names = peftjax.ModuleNames(rules)
    config = peftjax.LoraConfig(r=2, lora_alpha=5, target_modules="up|layers.1.up")
    adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
    save_pretrained(tmp_path / "some", adapter, names=names)
    assert (
        json.loads((tmp_path / "some" / "adapter_config.json").read_text())["target_modules"]
        == r"layers\.1\.up|up"
    )
    again = load_pretrained(tmp_path / "some", sites, names=names)
    assert again.params.keys() == adapter.params.keys() == {"up", "layers.up"}
    assert again.sites["layers.up"].layers == (1,)

    config = peftjax.LoraConfig(r=2, lora_alpha=5, target_modules=["mlp.up"])
    adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
    save_pretrained(tmp_path / "one", adapter, names=names)
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"] == [
        "mlp.up"
    ]
