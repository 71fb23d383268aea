"""Combined adapters against their formulas in NumPy, weight by weight and layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import mlp, mlp_params, near, normal, scanned, scanned_params
from naive import check_plain, drawn, empty, house, rebuilt

from peftjax import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    find_sites,
    merge,
)
from peftjax.algebra.combining import combine_adapters
from peftjax.algebra.conversion import convert_to_lora, pad_ranks

KEY = jax.random.key(0)
X = normal(4, 6, seed=9, std=1)
WEIGHTS = (0.7, -1.3)
SPARSE = ["magnitude_prune", "ties", "dare_linear", "dare_ties"]


def lora(**fields):
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"], **fields})


def several(params, *configs, apply_fn=mlp):
    """Adapters with numbers of their own."""
    x = X.astype(jax.tree.leaves(params)[0].dtype)
    sites = find_sites(apply_fn, params, x)
    made = [drawn(config, sites, params, std=0.3) for config in configs]
    return [
        a.replace(params=jax.tree.map(lambda x, i=i: x + i / 9, a.params))
        for i, a in enumerate(made)
    ]


def of_lora(config, weight):
    """The formula of a LoRA adapter times a weight, ranks of layers as the config says."""

    def formula(name, base, own):
        rank = config.rank_pattern.get(name, config.r)
        alpha = config.alpha_pattern.get(name, config.lora_alpha)
        a, b = own["lora_A"][..., :rank].reshape(-1, rank), own["lora_B"][:rank].reshape(rank, -1)
        scale = alpha / np.sqrt(rank) if config.use_rslora else alpha / rank
        return base + weight * scale * (a @ b).reshape(base.shape)

    return formula


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_exact_sums(kind):
    """Unequal ranks and scales, other targets and other layers of a stack."""
    _, params, sites = house()
    configs = [
        lora(
            target_modules=["mlp.up", "wkv", "patch", "taken", "layers.up", "kernels.1"],
            rank_pattern={"layers.up.1": 2, "layers.up.3": 1, "mlp.up": 1},
        ),
        lora(
            r=2,
            target_modules=["mlp.up", "mlp.down", "grouped", "layers.2.up", "layers.3.up"],
            use_rslora=True,
            alpha_pattern={"layers.up.3": 9},
        ),
        lora(r=1, target_modules=["kernels.0", "layers.1.down"]),
    ]
    weights = [0.7, -1.3, 0.4]
    adapters = [drawn(config, sites, params, std=0.5) for config in configs]
    rank = {"svd_rank": 99} if kind == "svd" else {}
    combined = combine_adapters(adapters, weights, combination_type=kind, **rank)
    want = params
    for adapter, weight in zip(adapters, weights, strict=True):
        want = rebuilt(want, adapter, of_lora(adapter.config, weight))
    near(jax.jit(merge)(params, combined), want)
    check_plain(combined, sites)
    assert combined.sites["kernels"].layers is None
    assert combined.sites["layers.down"].layers == (1,)
    assert [int(sum(own)) for own in combined.buffers["layers.up"]["rank_mask"]] == [3, 2, 5, 3]
    assert combined.params["mlp.up"]["lora_A"].shape == (6, 3)


@pytest.mark.usefixtures("x64")
def test_best_of_its_rank():
    params = mlp_params(jnp.float64)
    adapters = several(params, lora(), lora(r=4, lora_alpha=6))
    exact = merge(params, combine_adapters(adapters, WEIGHTS, combination_type="cat"))
    for rank in (None, 2):
        got = merge(params, combine_adapters(adapters, WEIGHTS, svd_rank=rank))
        for name in ("up", "down"):
            change = np.asarray(exact[name]["kernel"] - params[name]["kernel"])
            left = np.linalg.norm(np.asarray(exact[name]["kernel"] - got[name]["kernel"]))
            s = np.linalg.svd(change, compute_uv=False)
            assert left == pytest.approx(np.linalg.norm(s[rank or 4 :]), rel=1e-8)


def pruned(array, density):
    """The largest numbers, one after the other."""
    kept = np.zeros_like(array)
    order = sorted(np.ndindex(array.shape), key=lambda i: -abs(array[i]))
    for i in order[: int(density * array.size)]:
        kept[i] = array[i]
    return kept


def summed(kind, arrays, weights, density=None, sign="total"):
    """One number after the other, as the papers say."""
    if density is not None:
        arrays = [pruned(array, density) for array in arrays]
    total = np.zeros_like(arrays[0])
    for i in np.ndindex(total.shape):
        numbers = [array[i] for array in arrays]
        votes = sum(numbers) if sign == "total" else sum(map(np.sign, numbers))
        elected = 1 if votes >= 0 else -1
        if kind in ("linear", "magnitude_prune"):
            total[i] = sum(w * n for w, n in zip(weights, numbers, strict=True))
        elif agree := [(w, n) for w, n in zip(weights, numbers, strict=True) if n * elected > 0]:
            total[i] = sum(w * n for w, n in agree) / len(agree)
    return total


KINDS = [
    ("linear", None, "total"),
    ("magnitude_prune", 0.6, "total"),
    ("magnitude_prune_svd", 0.6, "total"),
    ("ties", 0.6, "total"),
    ("ties", 0.6, "frequency"),
    ("ties_svd", 0.6, "total"),
    ("ties_svd", 0.6, "frequency"),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "density", "sign"), KINDS)
def test_sparse_sums(kind, density, sign):
    """Each layer by itself, by its own scale; the sign of a weight goes to A alone."""
    params = scanned_params(2, jnp.float64)
    weights = (0.7, -1.3, 0.4)
    configs = [
        lora(target_modules=["up"], alpha_pattern={"layers.0.up": 2}),
        lora(target_modules=["up"], lora_alpha=7),
        lora(target_modules=["layers.1.up"], lora_alpha=4),
    ]
    adapters = several(params, *configs, apply_fn=scanned)
    fields = {"combination_type": kind, "density": density, "majority_sign_method": sign}
    fields |= {"svd_rank": 9} if kind.endswith("svd") else {}
    got = merge(params, combine_adapters(adapters, weights, **fields))

    scales = [[2 / 3, 7 / 3], [5 / 3, 7 / 3, 4 / 3]]
    for layer, own_scales in enumerate(scales):
        own = [adapter.params["layers.up"] for adapter in adapters]
        rows = [layer, layer, 0][: len(own_scales)]
        a, b = (
            [np.asarray(each[name][i]) for each, i in zip(own, rows, strict=False)]
            for name in ("lora_A", "lora_B")
        )
        both = list(zip(weights, own_scales, strict=False))
        rule = kind.removesuffix("_svd")
        if rule != kind:
            changes = [s * x @ y for (_, s), x, y in zip(both, a, b, strict=True)]
            change = summed(rule, changes, [w for w, _ in both], density, sign)
        else:
            roots = [np.sqrt(abs(w * s)) for w, s in both]
            signed = [np.sign(w) * root for (w, _), root in zip(both, roots, strict=True)]
            change = summed(kind, a, signed, density, sign) @ summed(kind, b, roots, density, sign)
        base = np.asarray(params["layers"]["up"]["kernel"][layer])
        near(np.asarray(got["layers"]["up"]["kernel"][layer]), base + change)


def test_random_numbers_are_kept():
    params = scanned_params()
    (adapter,) = several(params, lora(r=9, lora_alpha=36, target_modules=["up"]), apply_fn=scanned)

    def kept(key, adapters=(adapter,)):
        fields = {"combination_type": "dare_linear", "density": 0.3, "key": jax.random.key(key)}
        combined = combine_adapters(adapters, [1.0] * len(adapters), **fields)
        assert isinstance(combined.config, LoraConfig)
        return combined.params["layers.up"]

    first, again, other = kept(1), kept(1), kept(2)
    for name, array in first.items():
        mask = np.asarray(array != 0)
        np.testing.assert_array_equal(array, again[name])
        assert (mask != np.asarray(other[name] != 0)).any()
        # The root of the scale of 4 is in both factors.
        whole = 2 * np.asarray(adapter.params["layers.up"][name]) / 0.3
        np.testing.assert_allclose(array, np.where(mask, whole, 0), rtol=1e-5)
        assert 0.2 < mask.mean() < 0.4
        assert all((mask[0] != mask[i]).any() for i in (1, 2, 3))
    # Equal adapters lose different numbers.
    twice = kept(1, (adapter, adapter))
    assert np.mean(np.asarray(twice["lora_A"] != 0)) > 0.45


@pytest.mark.parametrize("kind", SPARSE)
def test_full_density_drops_nothing(kind):
    params = mlp_params()
    adapters = several(params, lora(), lora(lora_alpha=7))
    fields = {"density": 1.0, "key": KEY}
    got = combine_adapters(adapters, WEIGHTS, combination_type=f"{kind}_svd", svd_rank=9, **fields)
    changes = [merge(params, a)["up"]["kernel"] - params["up"]["kernel"] for a in adapters]
    rule = "ties" if kind.endswith("ties") else "linear"
    want = summed(rule, list(map(np.asarray, changes)), WEIGHTS)
    near(merge(params, got)["up"]["kernel"], params["up"]["kernel"] + want, 1e-5)


@pytest.mark.usefixtures("x64")
def test_ia3():
    """The scales of W that the sum of the merged weights has: no scale is a scale of one."""
    params = mlp_params(jnp.float64)
    configs = [
        IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]),
        IA3Config(target_modules=["down"], feedforward_modules=".*"),
    ]
    adapters = several(params, *configs)
    weights = [0.7, 0.3]
    combined = combine_adapters(adapters, weights, combination_type="linear")
    merged = [merge(params, adapter) for adapter in adapters]
    want = jax.tree.map(lambda *own: sum(w * x for w, x in zip(weights, own, strict=True)), *merged)
    near(merge(params, combined), want)
    assert combined.config.feedforward_modules == ("down",)
    fresh = empty(combined.config, find_sites(mlp, params, X.astype(jnp.float64)), params)
    assert jax.tree.map(jnp.shape, fresh.params) == jax.tree.map(jnp.shape, combined.params)


def test_ia3_of_other_layers():
    params = scanned_params()
    names = [["layers.up", "layers.1.down"], ["layers.3.up"]]
    configs = [IA3Config(target_modules=own, feedforward_modules=["down"]) for own in names[:1]]
    configs += [IA3Config(target_modules=names[1], feedforward_modules=[])]
    adapters = several(params, *configs, apply_fn=scanned)
    combined = combine_adapters(adapters, [0.6, 0.4], combination_type="linear")
    first, second = (np.array(each.params["layers.up"]["ia3_l"]) for each in adapters)
    second = np.concatenate([np.ones_like(first[:3]), second])
    want = 0.6 * first + 0.4 * second
    near(combined.params["layers.up"]["ia3_l"], want, 1e-6)
    assert combined.config.feedforward_modules == ("layers.down",)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties"])
def test_bias_of_lora(kind):
    """Sums are exact, whatever becomes of the weight."""
    params = mlp_params()
    adapters = several(params, lora(lora_bias=True), lora(lora_alpha=7), lora(lora_bias=True))
    density = {"density": 0.5} if kind == "ties" else {}
    combined = combine_adapters(adapters, [0.7, 1, -0.4], combination_type=kind, **density)
    shifts = [each.params["up"]["lora_B_bias"] for each in (adapters[0], adapters[2])]
    want = params["up"]["bias"] + 5 / 3 * (0.7 * shifts[0] - 0.4 * shifts[1])
    near(merge(params, combined)["up"]["bias"], want, 1e-5)
    assert combined.config.lora_bias


def test_saved_leaves_come_along():
    params = {**mlp_params(), "head": {"table": normal(3, 2)}, "tail": {"table": normal(2, 2)}}
    configs = [lora(modules_to_save=["head"], bias="lora_only"), lora(modules_to_save=["tail"])]
    adapters = several(params, *configs)
    combined = combine_adapters(adapters, WEIGHTS, combination_type="cat")
    assert combined.config.modules_to_save == ("head", "tail")
    assert combined.config.bias == "lora_only"
    after = merge(params, combined)
    for adapter in adapters:
        for leaf in adapter.saved:
            own = adapter.params[leaf.module][leaf.leaf_name]
            near(after[leaf.module][leaf.leaf_name], own, 0)
    check_plain(combined, find_sites(mlp, params, X), params)


def test_config_of_the_first():
    """What all adapters target is said as they say it; other fields are the first one's."""
    params = mlp_params()
    first = {"base_model_name_or_path": "base", "task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    adapters = several(params, lora(target_modules="all-linear", **first), lora())
    combined = combine_adapters([adapters[0], adapters[0]], WEIGHTS, combination_type="linear")
    assert combined.config == lora(target_modules="all-linear", lora_alpha=3, **first)
    combined = combine_adapters(adapters, WEIGHTS, combination_type="linear")
    assert combined.config == lora(target_modules=["down", "up"], lora_alpha=3, **first)


def test_scales_are_those_of_the_buffers():
    """After padding the config no longer tells them."""
    params = mlp_params()
    adapters = several(params, lora(), lora(r=2, lora_alpha=7))
    padded = [pad_ranks(adapter, 4) for adapter in adapters]
    got, want = (
        merge(params, combine_adapters(each, WEIGHTS, combination_type="cat"))
        for each in (padded, adapters)
    )
    near(got, want, 1e-5)


def test_half_precision():
    adapters = several(mlp_params(), lora(), lora(lora_alpha=7))
    half = [
        a.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), a.params)) for a in adapters
    ]
    combined = combine_adapters(half, WEIGHTS, combination_type="linear")
    assert combined.params["up"]["lora_A"].dtype == jnp.bfloat16
    want = combine_adapters(adapters, WEIGHTS, combination_type="linear")
    near(combined.params["up"]["lora_A"].astype(jnp.float32), want.params["up"]["lora_A"], 2e-2)
    mixed = combine_adapters([half[0], adapters[1]], WEIGHTS, combination_type="linear")
    assert mixed.params["up"]["lora_A"].dtype == jnp.float32


def test_what_cannot_be_summed_is_converted():
    params = mlp_params()
    configs = [LoHaConfig(r=2, alpha=5, target_modules=["up"]), lora(use_dora=True)]
    adapters = several(params, *configs)
    plain = [convert_to_lora(adapter, 1.0, params) for adapter in adapters]
    got = merge(params, combine_adapters(plain, WEIGHTS, combination_type="cat"))
    changes = [merge(params, a)["up"]["kernel"] - params["up"]["kernel"] for a in adapters]
    want = params["up"]["kernel"] + WEIGHTS[0] * changes[0] + WEIGHTS[1] * changes[1]
    near(got["up"]["kernel"], want, 1e-4)


DENSE = {"density": 0.5}
ARGUMENTS = [
    ([], [], {}, "no adapters"),
    ([lora()], [1, 2], {}, "1 adapters and 2 weights"),
    ([lora()], [1], {"combination_type": "sum"}, "must be one of linear, cat, svd.*got 'sum'"),
    ([lora()], [1], {"majority_sign_method": "most"}, "'total' or 'frequency', got 'most'"),
    ([lora()], [1], {"combination_type": "cat", "svd_rank": 3}, "does not use `svd_rank`"),
    ([lora()], [1], {"svd_rank": 0}, "an integer of 1 or more, got 0"),
    ([lora()], [1], {"combination_type": "ties"}, "needs `density`"),
    ([lora()], [1], {"combination_type": "ties", "density": 0}, r"in \(0, 1\], got 0"),
    ([lora()], [1], {"combination_type": "ties_svd", "density": 1.5}, r"in \(0, 1\], got 1.5"),
    ([lora()], [1], {"combination_type": "cat", **DENSE}, "leave `density` out"),
    ([lora()], [1], {"combination_type": "dare_ties_svd", **DENSE}, "pass `key`"),
    (
        [lora(), HRAConfig(r=2, target_modules=["up"])],
        [1, 1],
        {},
        "LoraConfig and HRAConfig.*convert_to_lora",
    ),
    ([HRAConfig(r=2, target_modules=["up"])], [1], {}, "HRAConfig.*convert_to_lora"),
    ([LoHaConfig(target_modules=["up"])], [1], {}, "LoHaConfig.*convert_to_lora"),
    ([AdaLoraConfig(target_modules=["up"])], [1], {}, "AdaLoraConfig.*convert_to_lora"),
    ([lora(), lora(use_dora=True)], [1, 1], {}, "DoRA.*convert_to_lora"),
    ([lora(init_lora_weights="pissa")], [1], {}, "PiSSA, OLoRA.*convert_to_lora"),
    ([lora(init_lora_weights="olora")], [1], {}, "PiSSA, OLoRA.*convert_to_lora"),
    (
        [IA3Config(target_modules=["up"], feedforward_modules=[])],
        [1],
        {},
        'pass combination_type="linear"',
    ),
    (
        [IA3Config(target_modules=["up"], feedforward_modules=own) for own in ([], ["up"])],
        [1, 1],
        {"combination_type": "linear"},
        "up scales its inputs in one adapter and its outputs in another",
    ),
    (
        [lora(), lora(rank_pattern={"down": 2})],
        [1, 1],
        {"combination_type": "linear"},
        'down has 3 and 2; take combination_type="cat" or "svd"',
    ),
    (
        [lora(bias="lora_only"), lora(bias="all")],
        [1, 1],
        {},
        "down.bias is trained whole by one adapter",
    ),
    (
        [lora(target_modules=["up"], modules_to_save=["down"]), lora()],
        [1, 1],
        {},
        "down.kernel is trained whole by one adapter",
    ),
]


@pytest.mark.parametrize(("configs", "weights", "fields", "match"), ARGUMENTS)
def test_errors(configs, weights, fields, match):
    params = mlp_params()
    sites = find_sites(mlp, params, X)
    adapters = [empty(config, sites, params) for config in configs]
    with pytest.raises(ValueError, match=match):
        combine_adapters(adapters, weights, **fields)


def test_adapters_of_other_models():
    first = several(mlp_params(), lora())
    params = mlp_params()
    params["up"]["kernel"] = normal(9, 6)

    def other(params, x):
        return x @ params["up"]["kernel"].T

    second = several({"up": params["up"]}, lora(target_modules=["up"]), apply_fn=other)
    with pytest.raises(ValueError, match=r"up is up.kernel of shape \(6, 9\) in one adapter"):
        combine_adapters([*first, *second], [1, 1])


def test_bias_of_lora_needs_biases():
    params = scanned_params()
    configs = [lora(target_modules=own, lora_bias=own == ["up"]) for own in (["up"], ["down"])]
    adapters = several(params, *configs, apply_fn=scanned)
    with pytest.raises(ValueError, match=r"`lora_bias`, and layers\.down of another has no bias"):
        combine_adapters(adapters, [1, 1])
