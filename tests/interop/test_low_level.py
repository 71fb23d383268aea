"""PEFT's low-level API on plain values, and whole models as state dicts."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import mlp, mlp_params, near, normal, scanned, scanned_params
from naive import drawn
from safetensors.numpy import load_file
from twins import NAMES, by_module, torch_weights, twin

from peftjax import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    ModuleNames,
    NoMatchingModuleError,
    adapt,
    base_state_dict,
    find_sites,
    get_peft_model_state_dict,
    init_adapter,
    inject_adapter_in_model,
    merge,
    pad_ranks,
    save_pretrained,
    set_peft_model_state_dict,
)
from peftjax.unstacking import unstack

P = "base_model.model."
KEY = jax.random.key(0)
TARGETS = ("mlp.up", "query", "attn.wo", "conv2", "layers.1.up", "layers.3.up", "moe.wi")
RANKS = {"layers.1.up": 4, "conv2": 2}
CASES = {
    "lora": LoraConfig(
        r=3,
        lora_alpha=5,
        bias="lora_only",
        target_modules=TARGETS,
        rank_pattern=RANKS,
        modules_to_save=["norm", "conv1"],
    ),
    "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=TARGETS),
    "pissa": LoraConfig(
        r=3, lora_alpha=5, init_lora_weights="pissa", target_modules=["mlp.up", "layers.up"]
    ),
    "loha": LoHaConfig(
        r=3, alpha=5, use_effective_conv2d=True, target_modules=TARGETS, rank_pattern=RANKS
    ),
    "hra": HRAConfig(r=4, bias="hra_only", target_modules=TARGETS),
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=["conv2", "attn.wo"]),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, target_modules=TARGETS),
}


def arrays(adapter):
    """The arrays of every weight without padding, and those that are trained whole."""
    singles = {part: single.params for part, single in unstack(adapter).items()}
    whole = {leaf.path: adapter.params[leaf.module][leaf.leaf_name] for leaf in adapter.saved}
    return singles, whole


@functools.cache
def both(name):
    """Two adapters of the same config with other numbers."""
    params, _, sites = twin()
    adapter = drawn(CASES[name], sites, params, std=0.3)
    return adapter, adapter.replace(params=jax.tree.map(lambda x: 1 - 2 * x, adapter.params))


def test_inject_is_find_init_and_adapt():
    params, x = mlp_params(), normal(4, 6, std=1)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["up"], modules_to_save=["down"])
    before = jax.tree.map(np.array, params)
    adapted, adapter = inject_adapter_in_model(config, mlp, params, x, key=KEY)
    chex.assert_trees_all_equal(
        adapter, init_adapter(KEY, config, find_sites(mlp, params, x), params)
    )
    chex.assert_trees_all_equal(params, before)
    chex.assert_trees_all_close(adapted(params, adapter, x), mlp(params, x), rtol=1e-5, atol=1e-6)
    other = adapter.replace(params=jax.tree.map(lambda x: x + 0.3, adapter.params))
    got = adapted(params, other, x)
    chex.assert_trees_all_equal(got, adapt(mlp)(params, other, x))
    assert np.abs(got - mlp(params, x)).max() > 0.1


def test_inject_takes_keywords_and_shapes():
    def scaled(params, x, *, factor):
        return mlp(params, x) * factor

    config = LoraConfig(r=2, lora_alpha=5, target_modules=["up"])
    x, factor = jax.ShapeDtypeStruct((4, 6), jnp.float32), jnp.float32(2)
    _, adapter = inject_adapter_in_model(config, scaled, mlp_params(), x, key=KEY, factor=factor)
    assert adapter.params["up"]["lora_A"].shape == (6, 2)


def test_inject_says_what_is_not_there():
    config = LoraConfig(r=2, target_modules=["upp"])
    with pytest.raises(NoMatchingModuleError, match=r"'upp'.*nearest: 'up'"):
        inject_adapter_in_model(config, mlp, mlp_params(), jnp.ones((2, 6)), key=KEY)
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        inject_adapter_in_model(LoraConfig(r=2), mlp, mlp_params(), jnp.ones((2, 6)), key=KEY)


@pytest.mark.parametrize("name", CASES)
def test_state_dict_is_what_the_file_holds(name, tmp_path):
    adapter, _ = both(name)
    got = get_peft_model_state_dict(adapter, NAMES)
    directory = save_pretrained(tmp_path, adapter, names=NAMES)
    chex.assert_trees_all_equal(got, load_file(directory / "adapter_model.safetensors"))
    assert all(key.startswith(P) for key in got)
    assert all(isinstance(tensor, np.ndarray) for tensor in got.values())


@pytest.mark.parametrize("prefix", [P, ""])
@pytest.mark.parametrize("name", CASES)
def test_set_is_the_inverse_of_get(name, prefix):
    adapter, other = both(name)
    given = get_peft_model_state_dict(other, NAMES)
    given = {prefix + key.removeprefix(P): tensor for key, tensor in given.items()}
    kept = {key: tensor.copy() for key, tensor in given.items()}
    before = jax.tree.map(np.array, adapter)
    got = set_peft_model_state_dict(adapter, given, NAMES)
    chex.assert_trees_all_equal(arrays(got), arrays(other))
    assert jax.tree.structure(got) == jax.tree.structure(adapter)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, adapter)
    chex.assert_trees_all_equal(got.buffers, adapter.buffers)
    chex.assert_trees_all_equal(given, kept)
    chex.assert_trees_all_equal(adapter, before)
    again = get_peft_model_state_dict(got, NAMES)
    chex.assert_trees_all_equal(again, get_peft_model_state_dict(other, NAMES))


@pytest.mark.parametrize("method", [LoraConfig, AdaLoraConfig])
def test_scale_is_not_applied_twice(method):
    params, _, sites = twin()
    ranks = {"r": 3} if method is LoraConfig else {"init_r": 3, "target_r": 2}
    adapter = drawn(method(**ranks, lora_alpha=5, target_modules=["mlp.up", "layers.up"]), sites)
    scales = jax.tree.map(lambda x: x * 3, adapter.buffers)
    adapter = adapter.replace(buffers=scales)
    state = get_peft_model_state_dict(adapter, NAMES)
    got = set_peft_model_state_dict(adapter, state, NAMES)
    chex.assert_trees_all_close(got, adapter, rtol=1e-6)
    if method is AdaLoraConfig:  # whose scale is the same for all modules in PEFT
        values = adapter.params["mlp.up"]["lora_E"] * 3
        tensor = state[f"{P}net.mlp.up.lora_E"]
        np.testing.assert_allclose(tensor[:, 0], values, rtol=1e-6)
    before, after = torch_weights(params), torch_weights(merge(params, got))
    own = {key: x.astype(np.float64) for key, x in by_module(state)["net.mlp.up"].items()}
    if method is LoraConfig:
        delta = own["lora_B.weight"] @ own["lora_A.weight"] * 5
    else:
        delta = own["lora_B"] @ (own["lora_A"] * own["lora_E"]) * 5 / (3 + 1e-5)
    change = after["net.mlp.up"] - before["net.mlp.up"]
    np.testing.assert_allclose(change, delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_strict_or_not(name):
    adapter, other = both(name)
    given = get_peft_model_state_dict(other, NAMES)
    keys = list(given)
    half = {key: given[key] for key in keys[::2]}
    with pytest.raises(ValueError, match="it is missing") as error:
        set_peft_model_state_dict(adapter, half, NAMES)
    assert keys[1].removeprefix(P) in str(error.value)
    got = get_peft_model_state_dict(
        set_peft_model_state_dict(adapter, half, NAMES, strict=False), NAMES
    )
    mixed = get_peft_model_state_dict(adapter, NAMES) | half
    chex.assert_trees_all_equal(got, mixed)
    untouched = set_peft_model_state_dict(adapter, {}, NAMES, strict=False)
    chex.assert_trees_all_equal(arrays(untouched), arrays(adapter))


@pytest.mark.parametrize("strict", [True, False])
def test_all_problems_are_listed_together(strict):
    adapter, other = both("lora")
    given = get_peft_model_state_dict(other, NAMES)
    given[f"{P}elsewhere.lora_A.weight"] = np.zeros((3, 6))
    given[f"{P}model.layers.0.up.lora_A.weight"] = np.zeros((3, 6))  # no layer that is adapted
    given[f"{P}net.norm.weight"] = np.zeros(7)
    given[f"{P}net.mlp.up.lora_A.weight"] = given[f"{P}net.mlp.up.lora_A.weight"].T
    del given[f"{P}net.query.lora_B.weight"]
    with pytest.raises(ValueError, match="does not fit the adapter") as error:
        set_peft_model_state_dict(adapter, given, NAMES, strict=strict)
    message = str(error.value)
    assert "elsewhere.lora_A.weight: there is no such tensor" in message
    assert "model.layers.0.up.lora_A.weight: there is no such tensor" in message
    assert "net.norm.weight: shape (7,) instead of (6,)" in message
    assert "net.mlp.up.lora_A.weight: shape (6, 3) instead of (3, 6)" in message
    assert ("net.query.lora_B.weight: it is missing" in message) == strict


def test_a_tensor_with_and_without_prefix_is_refused():
    adapter, other = both("ia3")
    given = get_peft_model_state_dict(other, NAMES)
    key = "net.mlp.up.ia3_l"
    with pytest.raises(ValueError, match=rf"{key}' is there twice"):
        set_peft_model_state_dict(adapter, {**given, key: given[P + key] + 1}, NAMES)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_and_places_stay(dtype):
    params, _, sites = twin()
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["mlp.up"], modules_to_save=["norm"])
    adapter = init_adapter(KEY, config, sites, params, dtype=dtype)
    device = jax.devices()[3]
    adapter = jax.device_put(adapter, device)
    given = get_peft_model_state_dict(adapter, NAMES)
    assert given[f"{P}net.mlp.up.lora_A.weight"].dtype == dtype
    got = set_peft_model_state_dict(
        adapter, {key: np.full(x.shape, 0.1, np.float32) for key, x in given.items()}, NAMES
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(got, adapter)
    assert got.params["mlp.up"]["lora_A"][0, 0] == jnp.asarray(0.1, dtype)
    assert {x.device for x in jax.tree.leaves(got)} == {device}


def test_arrays_of_jax_and_lists_are_taken():
    adapter, other = both("ia3")
    given = get_peft_model_state_dict(other, NAMES)
    given = {key: jnp.asarray(tensor) for key, tensor in given.items()}
    given[f"{P}net.mlp.up.ia3_l"] = given[f"{P}net.mlp.up.ia3_l"].tolist()
    got = set_peft_model_state_dict(adapter, given, NAMES)
    chex.assert_trees_all_equal(arrays(got), arrays(other))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("trained", [False, True])
def test_tensors_of_torch_are_taken(trained, dtype):
    torch = pytest.importorskip("torch")
    adapter, other = both("lora")
    given = {
        key: torch.nn.Parameter(torch.tensor(array).to(getattr(torch, dtype)), trained)
        for key, array in get_peft_model_state_dict(other, NAMES).items()
    }
    if not trained:
        given = {key: tensor.data for key, tensor in given.items()}
    got = set_peft_model_state_dict(adapter, given, NAMES)
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), other)
    chex.assert_trees_all_equal(arrays(got), arrays(rounded))


def test_a_padded_chain_comes_back():
    params, _, sites = twin()
    adapter = pad_ranks(drawn(HRAConfig(r=2, target_modules=["mlp.up"]), sites, std=0.3), 4)
    state = get_peft_model_state_dict(adapter, NAMES)
    got = set_peft_model_state_dict(adapter, state, NAMES)
    near(merge(params, got), merge(params, adapter), 1e-5)


@pytest.mark.parametrize("field", [{"apply_GS": True}, {"rank_pattern": {"query": 2}}])
def test_chains_that_peft_has_not(field):
    _, _, sites = twin()
    adapter = drawn(HRAConfig(r=4, target_modules=["mlp.up", "query"], **field), sites)
    state = get_peft_model_state_dict(adapter, NAMES)
    assert state[f"{P}net.query.hra_u"].shape == (6, 4)
    with pytest.raises(ValueError, match="use save_pretrained and load_pretrained"):
        set_peft_model_state_dict(adapter, state, NAMES)


def test_names_are_needed_for_stacks():
    params = scanned_params()
    sites = find_sites(scanned, params, jnp.ones((2, 6)))
    adapter = drawn(LoraConfig(r=2, lora_alpha=5, target_modules=["up"]), sites)
    with pytest.raises(ValueError, match=r"'layers\.up' is stacked"):
        get_peft_model_state_dict(adapter)
    with pytest.raises(ValueError, match=r"'layers\.up' is stacked"):
        set_peft_model_state_dict(adapter, {})
    names = ModuleNames((("layers.{name}", "h.{i}.{name}"),))
    keys = {f"{P}h.{i}.up.lora_{ab}.weight" for i in range(4) for ab in "AB"}
    assert set(get_peft_model_state_dict(adapter, names)) == keys


def test_base_state_dict():
    params, _, sites = twin()
    state = base_state_dict(params, sites, NAMES)
    weights = torch_weights(params)
    for name, weight in weights.items():
        np.testing.assert_array_equal(state[f"{name}.weight"], weight)
        assert state[f"{name}.weight"].dtype == np.float32
    rest = {
        key: tensor for key, tensor in state.items() if key.removesuffix(".weight") not in weights
    }
    own = {
        "temperature": params["temperature"],
        "net.norm.weight": params["norm"]["scale"],
        "net.query.bias": params["query"]["bias"].reshape(12),
        "net.attn.wq.bias": params["attn"]["bq"].reshape(12),
    }
    own |= {f"net.{name}.bias": params[name]["bias"] for name in ("conv1", "conv2", "norm")}
    own |= {f"net.mlp.{name}.bias": params["mlp"][name]["bias"] for name in ("up", "down")}
    for i in range(4):
        own[f"model.layers.{i}.up.bias"] = params["layers"]["up"]["bias"][i]
        own[f"model.layers.{i}.norm.weight"] = params["layers"]["norm"]["scale"][i]
    for i, j in np.ndindex(2, 3):
        own[f"model.layers.{i}.experts.{j}.wi.bias"] = params["moe"]["bi"][i, j]
    assert {key: x.shape for key, x in rest.items()} == {key: x.shape for key, x in own.items()}
    chex.assert_trees_all_equal(rest, {key: np.asarray(x) for key, x in own.items()})


def test_base_state_dict_of_a_merged_model():
    adapter, _ = both("lora")
    params, _, sites = twin()
    merged = merge(params, adapter)
    state = base_state_dict(merged, sites, NAMES)
    got = state["model.layers.3.up.weight"]
    np.testing.assert_array_equal(got, merged["layers"]["up"]["kernel"][3].T)
    assert np.abs(got - params["layers"]["up"]["kernel"][3].T).max() > 0.01


def test_base_state_dict_keeps_inputs_first_where_torch_does():
    params, _, sites = twin()
    names = ModuleNames(NAMES.rules, fan_in_fan_out=["net.mlp.{name}", "net.query"])
    state = base_state_dict(params, sites, names)
    np.testing.assert_array_equal(state["net.mlp.up.weight"], params["mlp"]["up"]["kernel"])
    query = params["query"]["kernel"].reshape(6, 12)
    np.testing.assert_array_equal(state["net.query.weight"], query)
    np.testing.assert_array_equal(
        state["net.attn.wq.weight"], params["attn"]["wq"].reshape(6, 12).T
    )


def test_base_state_dict_refuses_transposed_convolutions():
    def apply_fn(params, x):
        return jax.lax.conv_transpose(x, params["up"]["kernel"], (2,), "SAME")

    params = {"up": {"kernel": normal(3, 4, 4)}}
    sites = find_sites(apply_fn, params, jnp.ones((2, 5, 4)))
    with pytest.raises(ValueError, match=r"up is a transposed convolution.*\(3, 4, 4\)"):
        base_state_dict(params, sites)


def test_base_state_dict_refuses_other_params():
    params, _, sites = twin()
    rest = {name: own for name, own in params.items() if name != "norm"}
    with pytest.raises(ValueError, match=r"not the params.*norm\.bias, norm\.scale"):
        base_state_dict(rest, sites, NAMES)
    with pytest.raises(ValueError, match=r"not the params.*temperature"):
        base_state_dict(params | {"temperature": jnp.ones(3)}, sites, NAMES)
    twice = ModuleNames((("mlp.{name}", "net.{name}"), ("layers.{name}", "net.{i}.{name}")))
    x = jnp.ones((2, 6))
    with pytest.raises(ValueError, match="no rule gives"):
        base_state_dict(
            {"m": params["mlp"]},
            find_sites(lambda p, x: mlp(p["m"], x), {"m": params["mlp"]}, x),
            twice,
        )
    same = ModuleNames((("up", "dense"), ("down", "dense")))
    with pytest.raises(ValueError, match=r"two arrays have the torch name 'dense\.(weight|bias)'"):
        base_state_dict(params["mlp"], find_sites(mlp, params["mlp"], x), same)
