"""Adapters as plain LoRA, and padded to one rank: the same change of the weights."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import EverythingConfig, mlp, mlp_params, near, normal, scanned, scanned_params
from naive import check_plain, drawn, empty, house, rebuilt

from peftjax import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    adapt,
    find_sites,
    merge,
)
from peftjax.algebra.combining import combine_adapters
from peftjax.algebra.conversion import convert_to_lora, pad_ranks
from peftjax.unstacking import unstack

KEY = jax.random.key(0)
X = normal(4, 6, seed=9, std=1)
TARGETS = ("mlp.up", "wkv", "patch", "grouped", "taken", "layers.up", "kernels")
SOME = ("mlp.up", "layers.1.up", "layers.3.up", "kernels.1")
FEW = ("mlp.up", "wkv", "patch", "layers.up", "kernels")
RANKS = {"layers.up.1": 4, "layers.up.3": 1, "kernels.1": 2}

# A config, what it converts by, and the ranks of mlp.up and of the layers of layers.up.
CASES = {
    "lora": (LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, rank_pattern=RANKS), None),
    "rslora": (
        LoraConfig(r=3, lora_alpha=5, target_modules=SOME, rank_pattern=RANKS, use_rslora=True),
        None,
    ),
    "pissa": (
        LoraConfig(r=2, lora_alpha=5, target_modules=SOME, init_lora_weights="pissa"),
        None,
    ),
    "dora": (
        LoraConfig(r=3, lora_alpha=5, target_modules=FEW, rank_pattern=RANKS, use_dora=True),
        1.0,
    ),
    "loha": (LoHaConfig(r=2, alpha=5, target_modules=FEW, rank_pattern=RANKS), None),
    "core": (
        LoHaConfig(r=2, alpha=5, target_modules=["patch"], use_effective_conv2d=True),
        None,
    ),
    "hra": (HRAConfig(r=4, target_modules=FEW, rank_pattern=RANKS, init_weights=False), None),
    "adalora": (AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, target_modules=SOME), None),
    "ia3": (IA3Config(target_modules=SOME, feedforward_modules=[]), 1.0),
    "ia3_in": (IA3Config(target_modules=FEW, feedforward_modules=".*"), 1.0),
    "everything": (EverythingConfig(target_modules=FEW), 1.0),
}
LORA_RANKS = {
    "lora": (3, [3, 4, 3, 1]),
    "rslora": (3, [4, 1]),
    "pissa": (4, [4, 4]),
    "loha": (4, [4, 16, 4, 1]),
    "hra": (4, [4, 4, 4, 1]),
    "adalora": (3, [3, 3]),
}


def layer_ranks(adapter, name):
    """The rank of every layer of a stacked site, padding left out."""
    mask = adapter.buffers[name].get("rank_mask")
    wide = adapter.params[name]["lora_A"]
    return [wide.shape[-1]] * len(wide) if mask is None else [int(sum(own)) for own in mask]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_same_change(name):
    config, kept = CASES[name]
    _, params, sites = house()
    adapter = drawn(config, sites, params, std=0.6)
    lora = convert_to_lora(adapter, kept, params)
    near(*(jax.jit(merge)(params, each) for each in (lora, adapter)))
    check_plain(lora, sites, params)
    if name in LORA_RANKS:
        dense, stacked = LORA_RANKS[name]
        assert lora.params["mlp.up"]["lora_A"].shape == (6, dense)
        assert layer_ranks(lora, "layers.up") == stacked


def loha_of(name, weight, own):
    """What LoHa adds to a weight, by its two low-rank matrices."""
    rank = RANKS.get(name, 2)
    halves = []
    for half in "12":
        a, b = own[f"hada_w{half}_a"][:rank], own[f"hada_w{half}_b"][..., :rank]
        halves.append(b.reshape(-1, rank) @ a.reshape(rank, -1))
    return weight + 5 / rank * (halves[0] * halves[1]).reshape(weight.shape)


def ia3_of(name, weight, own):
    return weight * own["ia3_l"]


def leaf(params, site):
    for key in site.path.split("."):
        params = params[key]
    return params


def check_best(change, a, b, kept):
    """No approximation is nearer; an energy is reached with as few ranks as can be."""
    s, rank = np.linalg.svd(change, compute_uv=False), a.shape[-1]
    share = [np.sum(s[:k] ** 2) / np.sum(s**2) for k in range(len(s) + 1)]
    if isinstance(kept, int):
        assert rank == min(kept, np.linalg.matrix_rank(change))
    else:
        assert share[rank - 1] < kept <= share[rank]
    left = np.sum((change - a @ b) ** 2)
    assert left == pytest.approx(np.sum(s[rank:] ** 2), abs=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.filterwarnings("ignore:rank_pattern")
@pytest.mark.parametrize(("name", "formula"), [("loha", loha_of), ("ia3", ia3_of)])
def test_best_approximation(name, formula):
    config = dataclasses.replace(CASES[name][0], target_modules=("patch", "layers.up"))
    _, params, sites = house()
    adapter = drawn(config, sites, params, std=0.6)
    wanted = rebuilt(params, adapter, formula)
    for kept in (1, 3, 0.6, 0.95):
        lora, checked = convert_to_lora(adapter, kept, params), 0
        for (module, index), single in unstack(lora).items():
            site = lora.sites[module]
            before, after = (leaf(tree, site)[index] for tree in (params, wanted))
            change = np.asarray(after - before).reshape(site.in_size, site.out_size)
            a = single.params["lora_A"].reshape(site.in_size, -1)
            check_best(change, a, single.params["lora_B"].reshape(a.shape[-1], -1), kept)
            checked += 1
        assert checked == 5


def test_energy_that_is_met_exactly():
    """Singular values of 3 and 1 hold 0.9 and 0.1 of the energy."""
    params = {"kernel": jnp.eye(2)}
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["kernel"])
    adapter = made(config, params, lambda params, x: x[:, :2] @ params["kernel"])
    a = jnp.concatenate([jnp.diag(jnp.array([3.0, 1.0])), jnp.zeros((2, 2))], axis=1)
    own = {"lora_A": a, "lora_B": jnp.eye(4, 2)}
    adapter = adapter.replace(params={"kernel": own})
    ranks = [convert_to_lora(adapter, kept).config.r for kept in (0.5, 0.9, 0.91, 1.0, 7, None)]
    assert ranks == [1, 1, 2, 2, 2, 4]


def lora(**fields):
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"], **fields})


def made(config, params, apply_fn=mlp):
    x = X.astype(jax.tree.leaves(params)[0].dtype)
    return drawn(config, find_sites(apply_fn, params, x), params, std=0.3)


def test_no_change_has_rank_one():
    params = mlp_params()
    adapter = made(lora(), params)
    zero = {name: {**own, "lora_B": 0 * own["lora_B"]} for name, own in adapter.params.items()}
    for kept, rank in ((None, 3), (2, 2), (0.5, 1), (1.0, 1)):
        own = convert_to_lora(adapter.replace(params=zero), kept).params["up"]
        assert own["lora_A"].shape[-1] == rank
        assert np.abs(own["lora_A"] @ own["lora_B"]).max() == 0


# What layers keep of three triplets; one of them keeps none.
PRUNED = AdaLoraConfig(
    init_r=3,
    target_r=1,
    lora_alpha=5,
    target_modules=["up"],
    rank_pattern={"layers.up.lora_E": np.tri(4, 3, -1, dtype=bool).tolist()},
)


def test_pruned_triplets():
    params = scanned_params()
    adapter = made(PRUNED, params, scanned)
    lora = convert_to_lora(adapter)
    assert layer_ranks(lora, "layers.up") == [1, 1, 2, 3]
    near(jax.jit(merge)(params, lora), jax.jit(merge)(params, adapter), 1e-5)


def test_bias_of_lora():
    params = mlp_params()
    for fields in ({}, {"bias": "all"}):
        adapter = made(lora(lora_bias=True, **fields), params)
        converted = convert_to_lora(adapter, 1.0)
        assert converted.config.lora_bias
        assert converted.saved == adapter.saved
        near(merge(params, converted), merge(params, adapter), 1e-5)
        check_plain(converted, find_sites(mlp, params, X), params)


def test_bias_of_ia3():
    """Scaled biases become trained ones; a feedforward module's stays as it is."""
    params = mlp_params()
    config = IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])
    adapter = made(config, params)
    converted = convert_to_lora(adapter, 1.0, params)
    assert [leaf.path for leaf in converted.saved] == ["down.bias", "up.bias"]
    near(merge(params, converted), merge(params, adapter), 1e-5)
    assert converted.config.bias == "lora_only"
    # A feedforward module alone changes no bias.
    adapter = made(dataclasses.replace(config, target_modules=["down"]), params)
    assert convert_to_lora(adapter, 1.0, params).saved == ()


def test_bias_of_ia3_layers():
    params = scanned_params()
    config = IA3Config(target_modules=["layers.1.up", "layers.2.up"], feedforward_modules=[])
    adapter = made(config, params, scanned)
    converted = convert_to_lora(adapter, 1.0, params)
    near(merge(params, converted), merge(params, adapter), 1e-5)
    check_plain(converted, find_sites(scanned, params, X), params)


@pytest.mark.parametrize("bias", ["all", "hra_only"])
def test_saved_leaves(bias):
    params = {**mlp_params(), "unused": {"table": normal(3, 2)}}
    config = HRAConfig(r=2, target_modules=["up"], modules_to_save=["unused"], bias=bias)
    adapter = made(config, params)
    converted = convert_to_lora(adapter, None, params)
    assert converted.saved == adapter.saved
    near(merge(params, converted), merge(params, adapter), 1e-5)
    check_plain(converted, find_sites(mlp, params, X), params)


def test_saved_leaves_and_scaled_biases():
    params = mlp_params()
    config = IA3Config(target_modules=["up"], feedforward_modules=[], modules_to_save=["down"])
    adapter = made(config, params)
    converted = convert_to_lora(adapter, 1.0, params)
    assert [leaf.path for leaf in converted.saved] == ["down.bias", "down.kernel", "up.bias"]
    near(merge(params, converted), merge(params, adapter), 1e-5)


def test_half_precision():
    params = mlp_params(jnp.bfloat16)
    adapter = made(HRAConfig(r=2, target_modules=["up"]), params)
    converted = convert_to_lora(adapter, None, params)
    assert converted.params["up"]["lora_A"].dtype == jnp.float32
    exact = merge(jax.tree.map(lambda x: x.astype(jnp.float32), params), adapter)
    near(merge(params, converted)["up"]["kernel"].astype(jnp.float32), exact["up"]["kernel"], 1e-2)


@pytest.mark.parametrize(
    ("config", "kept", "with_params", "match"),
    [
        (HRAConfig(r=2, target_modules=["up"]), None, False, "pass the base's params"),
        (lora(use_dora=True), 2, False, "pass the base's params"),
        (lora(use_dora=True), None, True, "pass `rank_or_energy`"),
        (
            IA3Config(target_modules=["up"], feedforward_modules=[]),
            1.0,
            False,
            "pass the base's params",
        ),
        (IA3Config(target_modules=["up"], feedforward_modules=[]), None, True, "up: .*scales"),
        (lora(), 0, False, "a rank must be 1 or more, got 0"),
        (lora(), -0.5, False, r"an energy must be in \(0, 1\], got -0.5"),
        (lora(), 1.5, False, r"an energy must be in \(0, 1\], got 1.5"),
        (lora(), True, False, "takes an int, a float or None, got True"),
    ],
)
def test_conversion_errors(config, kept, with_params, match):
    params = mlp_params()
    adapter = empty(config, find_sites(mlp, params, X), params)
    with pytest.raises(ValueError, match=match):
        convert_to_lora(adapter, kept, params if with_params else None)


def test_broken_adapter():
    params = mlp_params()
    adapter = empty(lora(), find_sites(mlp, params, X), params)
    adapter.params["up"]["lora_A"][0] = np.nan
    with pytest.raises(ValueError, match="not finite: an adapter seems to be broken"):
        convert_to_lora(adapter, 2)


def test_other_params():
    params = mlp_params()
    adapter = empty(lora(), find_sites(mlp, params, X), params)
    with pytest.raises(ValueError, match="made for other params"):
        convert_to_lora(adapter, None, {"up": params["up"]})


# Per method: configs that differ in rank and scale, and the largest rank.
PADDED = {
    "lora": [
        lora(r=2, rank_pattern={"layers.2.up": 5}, lora_dropout=0.1),
        lora(r=4, lora_alpha=3, alpha_pattern={"down": 9}, init_lora_weights=False),
        lora(r=1, use_rslora=True, target_modules=["layers.up", "layers.down"]),
    ],
    "dora": [
        lora(r=2, use_dora=True, lora_alpha=3, target_modules=["up"]),
        lora(r=5, use_dora=True, target_modules=["up"]),
    ],
    "loha": [
        LoHaConfig(r=2, alpha=5, target_modules=["up"], rank_pattern={"layers.2.up": 3}),
        LoHaConfig(r=1, alpha=7, target_modules=["layers.up"], rank_dropout=0.5),
    ],
    "hra": [
        HRAConfig(r=2, apply_GS=True, target_modules=["up"], rank_pattern={"layers.1.up": 4}),
        HRAConfig(r=5, apply_GS=True, target_modules=["up"], init_weights=False),
    ],
    "adalora": [
        PRUNED,
        AdaLoraConfig(init_r=2, target_r=2, total_step=9, target_modules=["up"]),
    ],
}


@pytest.mark.parametrize("name", PADDED)
def test_one_program_for_padded_ranks(name):
    params = scanned_params()
    adapters = [made(config, params, scanned) for config in PADDED[name]]
    adapted = adapt(scanned)

    @jax.jit
    @chex.assert_max_traces(1)
    def run(params, adapter, x):
        return adapted(params, adapter, x)

    chex.clear_trace_counter()
    padded, base = [pad_ranks(adapter, 5) for adapter in adapters], scanned(params, X)
    for adapter, wide in zip(adapters, padded, strict=True):
        want = adapted(params, adapter, X)
        assert jnp.abs(want - base).max() > 1e-3
        near(run(params, wide, X), want, 1e-5)
        assert jax.tree.structure(wide) == jax.tree.structure(padded[0])
        assert not any("rank_mask" in own for own in wide.buffers.values())
        near(
            [own.get("scaling") for own in wide.buffers.values()],
            [own.get("scaling") for own in adapter.buffers.values()],
        )


@pytest.mark.usefixtures("x64")
def test_padded_convolutions():
    """Kernels with a core of their own for the taps, and saved leaves beside them."""
    _, params, sites = house()
    names = ["patch", "mixed", "grouped", "kernels"]
    config = LoHaConfig(r=2, alpha=5, target_modules=names, use_effective_conv2d=True)
    config = dataclasses.replace(config, modules_to_save=["mlp"])
    adapter = drawn(config, sites, params, std=0.6)
    padded = pad_ranks(adapter, 3)
    assert padded.params["kernels"]["hada_t1"].shape == (2, 3, 3, 3)
    assert padded.saved == adapter.saved
    near(jax.jit(merge)(params, padded), jax.jit(merge)(params, adapter), 1e-5)


def test_padding_under_jit():
    params = mlp_params()
    adapter = made(lora(lora_bias=True), params)
    padded = jax.jit(pad_ranks, static_argnums=1)(adapter, 4)
    assert padded.params["up"]["lora_B"].shape == (4, 9)
    near(merge(params, padded), merge(params, adapter), 1e-5)


@pytest.mark.parametrize(
    ("config", "rank", "match"),
    [
        (lora(rank_pattern={"down": 4}), 3, "down has rank 4, above `target_rank`=3"),
        (lora(init_lora_weights="pissa"), 8, "use convert_to_lora first"),
        (lora(init_lora_weights="olora"), 8, "use convert_to_lora first"),
        (
            IA3Config(target_modules=["up"], feedforward_modules=[]),
            8,
            "IA3Config has no ranks to pad",
        ),
        (lora(), 0, "must be an integer of 1 or more, got 0"),
    ],
)
def test_padding_errors(config, rank, match):
    params = mlp_params()
    adapter = empty(config, find_sites(mlp, params, X), params)
    with pytest.raises(ValueError, match=match):
        pad_ranks(adapter, rank)


def experts(params, x):
    """Two scanned layers of three experts each: two axes of a stack."""

    def layer(x, kernel):
        return jnp.tanh(jnp.einsum("nbi,nio->nbo", x, kernel)), None

    return jax.lax.scan(layer, x, params["moe"]["kernel"])[0]


@pytest.mark.usefixtures("x64")
def test_experts_of_a_layer():
    """A config gives a layer one rank: experts with less are padded."""
    params = {"moe": {"kernel": normal(2, 3, 5, 5, dtype=jnp.float64)}}
    sites = find_sites(experts, params, normal(3, 4, 5, dtype=jnp.float64))
    assert sites["moe"].stack_axes == (0, 1)
    kept = np.array([[[1, 0, 0], [0, 0, 0], [1, 1, 0]], [[1, 0, 0], [0, 0, 0], [1, 0, 0]]])
    pruned = AdaLoraConfig(
        init_r=3,
        lora_alpha=5,
        target_modules=["moe"],
        rank_pattern={"moe.lora_E": kept.astype(bool).tolist()},
    )
    hra = HRAConfig(r=2, target_modules=["moe"], rank_pattern={"moe.1": 4})
    for config, ranks in ((pruned, [2, 1]), (hra, [2, 4])):
        adapter = drawn(config, sites, params)
        lora = convert_to_lora(adapter, None, params)
        want = jax.jit(merge)(params, adapter)
        check_plain(lora, sites, params)
        assert np.sum(lora.buffers["moe"]["rank_mask"], axis=-1).tolist() == [
            [r] * 3 for r in ranks
        ]
        double = combine_adapters([lora, lora], [1.5, -0.5], combination_type="cat")
        for each in (lora, double, pad_ranks(adapter, 5)):
            near(jax.jit(merge)(params, each), want)
