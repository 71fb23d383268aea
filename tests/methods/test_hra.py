"""HRA: its formula, its start, orthonormal halves, and what it makes of adapters around it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import mlp, mlp_params, normal, scanned, scanned_params
from naive import drawn, finite_differences, house, rebuilt

from peftjax import (
    HRAConfig,
    IA3Config,
    LoraConfig,
    adapt,
    find_sites,
    hra_orthogonality,
    init_adapter,
    merge,
    unmerge,
)

KEY = jax.random.key(0)
RANK = 3
RANKS = {"layers.up.1": 5, "layers.up.3": 1, "kernels.1": 2}


def chain(u):
    """H_0 H_1 ... H_{r-1} of the columns, every reflection a matrix of its own."""
    product = np.eye(len(u))
    for column in u.T:
        v = column / np.sqrt(np.sum(column**2))
        product = product @ (np.eye(len(u)) - 2 * np.outer(v, v))
    return product


def gram_schmidt(u):
    """The columns made orthonormal one after the other, each taken out of all that follow."""
    u = np.array(u)
    for i in range(u.shape[1]):
        u[:, i] /= np.sqrt(u[:, i] @ u[:, i])
        for j in range(i + 1, u.shape[1]):
            u[:, j] -= (u[:, i] @ u[:, j]) * u[:, i]
    return u


def halves(u):
    return np.concatenate([gram_schmidt(u[:, 0::2]), gram_schmidt(u[:, 1::2])], axis=1)


def reflected(make):
    """W' = P^T W, from the columns of one weight as ``make`` leaves them."""

    def formula(name, weight, own):
        rank = RANKS.get(name, RANK)
        u = own["hra_u"][..., :rank].reshape(-1, rank)
        return (chain(make(u)).T @ weight.reshape(len(u), -1)).reshape(weight.shape)

    return formula


def check_values(model, make, **fields):
    apply_fn, params, sites = model
    adapter = drawn(HRAConfig(r=RANK, init_weights=False, **fields), sites)
    want = rebuilt(params, adapter, reflected(make))
    merged = jax.jit(merge)(params, adapter)
    chex.assert_trees_all_close(merged, want, rtol=1e-10, atol=1e-10)
    got, expected = adapt(apply_fn)(params, adapter), jax.jit(apply_fn)(want)
    chex.assert_trees_all_close(got, expected, rtol=1e-10, atol=1e-10)
    back = jax.jit(unmerge)(merged, adapter)
    chex.assert_trees_all_close(back, params, rtol=1e-10, atol=1e-10)


TARGETS = ["mlp.up", "attn.wq", "taken", "patch", "grouped", "layers.up", "kernels"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gs", [False, True], ids=["plain", "GS"])
def test_values_are_the_formula(gs):
    """The values, and unmerging, of every kind of weight."""
    make = halves if gs else lambda u: u
    more = [] if gs else ["wkv", "columns", "blocks", "mixed", "dilated_both_ways"]
    fields = {"rank_pattern": RANKS, "target_modules": TARGETS + more}
    check_values(house(), make, apply_GS=gs, **fields)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gs", [False, True], ids=["plain", "GS"])
def test_values_of_some_layers(gs):
    params, x = scanned_params(dtype=jnp.float64), normal(4, 6, std=1, dtype=jnp.float64)

    def apply_fn(params):
        return scanned(params, x)

    check_values(
        (apply_fn, params, find_sites(apply_fn, params)),
        halves if gs else lambda u: u,
        apply_GS=gs,
        rank_pattern={"layers.up.1": 5},
        target_modules=["up", "down"],
        layers_to_transform=[1, 2],
    )


def one(width=6, out=5, dtype=jnp.float64, **fields):
    """A model of one weight, its params, and an HRA adapter with all numbers drawn."""
    params, x = {"w": normal(width, out, dtype=dtype)}, normal(4, width, seed=9, dtype=dtype)

    def apply_fn(params, x):
        return x @ params["w"]

    config = HRAConfig(init_weights=False, target_modules=["w"], **fields)
    return apply_fn, params, x, drawn(config, find_sites(apply_fn, params, x))


def holding(adapter, u):
    return adapter.replace(params={"w": {"hra_u": jnp.asarray(u)}})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gs", [False, True], ids=["plain", "GS"])
def test_turns_are_orthogonal(gs):
    *_, adapter = one(out=6, r=4, apply_GS=gs)
    p = np.asarray(jax.jit(merge)({"w": jnp.eye(6)}, adapter)["w"]).T
    np.testing.assert_allclose(p @ p.T, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(p), 1)
    u = np.asarray(adapter.params["w"]["hra_u"])
    np.testing.assert_allclose(p, chain(halves(u) if gs else u), atol=1e-12)
    assert np.abs(p - p.T).max() > 1e-2, "the other order would be the transpose"


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gs", [False, True], ids=["plain", "GS"])
def test_start_is_the_identity_and_moves(gs):
    """The reflections of a pair cancel, and so their gradients are opposite, but not zero."""
    params = mlp_params(jnp.float64)
    x = normal(4, 6, seed=9, std=1, dtype=jnp.float64)
    config = HRAConfig(r=4, apply_GS=gs, target_modules=["up", "down"])
    adapter = init_adapter(KEY, config, find_sites(mlp, params, x))

    def loss(trainable):
        out = adapt(mlp)(params, adapter.replace(params=trainable), x)
        return jnp.sum(jnp.sin(out)), out

    slopes, out = jax.jit(jax.grad(loss, has_aux=True))(adapter.params)
    np.testing.assert_allclose(out, mlp(params, x), atol=1e-12)
    chex.assert_trees_all_close(jax.jit(merge)(params, adapter), params, atol=1e-12)
    for module, slope in slopes.items():
        u, slope = adapter.params[module]["hra_u"], slope["hra_u"]
        np.testing.assert_array_equal(u[:, 0::2], u[:, 1::2])
        np.testing.assert_allclose(slope[:, 0::2], -slope[:, 1::2], atol=1e-12)
        assert (np.abs(slope).max(axis=0) > 1e-3).all()


def start(r, width=200, **fields):
    params, x = {"w": normal(width, 30)}, jnp.ones((1, width))
    sites = find_sites(lambda params, x: x @ params["w"], params, x)
    return params, init_adapter(KEY, HRAConfig(r=r, target_modules=["w"], **fields), sites)


@pytest.mark.parametrize(("fields", "drawn_columns"), [({}, 16), ({"init_weights": False}, 32)])
def test_bounds_of_the_start(fields, drawn_columns):
    """Torch draws half the columns, and takes their number for the fan-in."""
    _, adapter = start(32, **fields)
    u, bound = np.asarray(adapter.params["w"]["hra_u"]), drawn_columns**-0.5
    assert u.shape == (200, 32)
    assert 0.97 * bound < np.abs(u).max() <= bound
    assert abs(u.std() - bound / 3**0.5) < 0.05 * bound
    assert len(np.unique(u, axis=1).T) == drawn_columns


def test_random_start_is_not_the_identity():
    params, adapter = start(4, init_weights=False)
    assert float(jnp.abs(jax.jit(merge)(params, adapter)["w"] - params["w"]).max()) > 1e-2


def test_odd_ranks_warn():
    with pytest.warns(UserWarning, match=r"odd number of reflections \(r = 3\)"):
        params, adapter = start(3)
    assert float(jnp.abs(jax.jit(merge)(params, adapter)["w"] - params["w"]).max()) > 1e-2
    with pytest.warns(UserWarning, match=r"odd number of reflections \(rank_pattern\['k'\] = 5\)"):
        HRAConfig(rank_pattern={"q": 2, "k": 5})
    HRAConfig(r=3, init_weights=False)  # No promise, no warning.


@pytest.mark.parametrize("r", [7, 8, 12])
def test_an_orthonormal_half_leaves_a_direction_out(r):
    """One that spans all inputs is -1 and has no gradient; of more columns there is none."""
    with pytest.raises(
        ValueError, match=rf"w: `apply_GS` .* {r} reflections.* 4 inputs .* below 7,"
    ):
        start(r, width=4, apply_GS=True, init_weights=False)
    start(r, width=4, init_weights=False)
    params, adapter = start(6, width=4, apply_GS=True)
    merged = jax.jit(merge)(params, adapter)["w"]
    np.testing.assert_allclose(merged, params["w"], atol=1e-5)
    slope = jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(merge(params, holding(adapter, t))["w"]))))(
        adapter.params["w"]["hra_u"]
    )
    assert (np.abs(slope).max(axis=0) > 1e-3).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gs", [False, True], ids=["plain", "GS"])
def test_orthonormal_columns_are_those_of_peft(gs):
    """PEFT's P with ``apply_GS`` is I - 2 Q Q^T, in torch's layout W' = W P."""
    _, params, _, adapter = one(r=4, apply_GS=gs)
    q = np.linalg.qr(np.asarray(adapter.params["w"]["hra_u"]))[0]
    torch_weight = np.asarray(params["w"]).T
    want = torch_weight @ (np.eye(6) - 2 * q @ q.T)
    got = jax.jit(merge)(params, holding(adapter, q))["w"]
    np.testing.assert_allclose(np.asarray(got).T, want, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_half_reflects_a_whole_subspace():
    *_, adapter = one(width=7, out=7, r=6, apply_GS=True)
    u = np.array(adapter.params["w"]["hra_u"])
    u[:, 1::2] = 0
    p = np.asarray(jax.jit(merge)({"w": jnp.eye(7)}, holding(adapter, u))["w"]).T
    q = gram_schmidt(u[:, 0::2])
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(p, np.eye(7) - 2 * q @ q.T, atol=1e-12)
    np.testing.assert_allclose(p @ q, -q, atol=1e-12)
    assert float(hra_orthogonality(holding(adapter, u))) == pytest.approx(0, abs=1e-20)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("r", [1, 3, 4])
@pytest.mark.parametrize("gs", [False, True], ids=["plain", "GS"])
def test_gradients_are_finite_differences(gs, r):
    apply_fn, params, x, adapter = one(r=r, apply_GS=gs)

    @jax.jit
    def both(trainable):
        def loss(trainable):
            out = adapt(apply_fn)(params, adapter.replace(params=trainable), x)
            return jnp.sum(jnp.sin(out))

        return jax.grad(loss)(trainable), finite_differences(loss, trainable)

    got, want = (each["w"]["hra_u"] for each in both(adapter.params))
    largest = np.abs(want).max()
    assert largest > 1e-2
    np.testing.assert_allclose(got, want, atol=1e-6 * largest)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gs", [False, True], ids=["plain", "GS"])
def test_a_column_of_zeros_reflects_nothing(gs):
    apply_fn, params, x, adapter = one(r=4, apply_GS=gs)
    adapted = adapt(apply_fn)

    @jax.jit
    def run(adapter):
        def loss(trainable):
            out = adapted(params, adapter.replace(params=trainable), x)
            return jnp.sum(jnp.sin(out)), out

        slope, out = jax.grad(loss, has_aux=True)(adapter.params)
        return out, unmerge(merge(params, adapter), adapter)["w"], slope["w"]["hra_u"]

    for empty in ([2], [0], [0, 1, 2, 3]):
        u = np.array(adapter.params["w"]["hra_u"])
        u[:, empty] = 0
        even, odd = ([i for i in range(k, 4, 2) if i not in empty] for k in (0, 1))
        if gs:
            kept = np.concatenate([gram_schmidt(u[:, even]), gram_schmidt(u[:, odd])], axis=1)
        else:
            kept = u[:, sorted(even + odd)]
        want = chain(kept).T @ np.asarray(params["w"])
        out, back, slope = run(holding(adapter, u))
        np.testing.assert_allclose(out, np.asarray(x) @ want, atol=1e-12)
        np.testing.assert_allclose(back, params["w"], atol=1e-12)
        assert np.isfinite(slope).all()
        assert (np.abs(slope).max(axis=0) > 0).tolist() == [i not in empty for i in range(4)]


def trio(params, x):
    """A dense layer, a convolution and a stack, the first two with biases."""
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    dims = ("NWC", "WIO", "NWC")
    conv = params["conv"]
    h = lax.conv_general_dilated(h[None], conv["kernel"], (1,), "SAME", dimension_numbers=dims)
    h = jnp.tanh(h + conv["bias"][None, None])[0]
    h = jnp.stack([h, jnp.sin(2 * h), jnp.cos(h)])
    return jnp.einsum("sbi,sio->sbo", h, params["stack"]["kernel"])


def trio_params(dtype=jnp.float64):
    return {
        "up": {"kernel": normal(6, 7, dtype=dtype), "bias": normal(7, seed=1, dtype=dtype)},
        "conv": {
            "kernel": normal(3, 7, 5, seed=2, dtype=dtype),
            "bias": normal(5, seed=3, dtype=dtype),
        },
        "stack": {"kernel": normal(3, 5, 4, seed=4, dtype=dtype)},
    }


PAIRED = ["conv", "stack"]
OTHERS = {
    "hra": lambda: HRAConfig(r=4, target_modules=PAIRED),
    "lora": lambda: LoraConfig(r=2, lora_alpha=3, target_modules=PAIRED),
    "dora": lambda: LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=PAIRED),
    "ia3": lambda: IA3Config(feedforward_modules=["conv"], target_modules=PAIRED),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("hra", True),
        ("lora", True),
        ("lora", False),
        ("dora", True),
        ("dora", False),
        ("ia3", True),
        ("ia3", False),
    ],
)
def test_in_a_sequence(name, first):
    """One after the other is merging one after the other, and both are trained at once."""
    params, x = trio_params(), normal(4, 6, seed=9, std=1, dtype=jnp.float64)
    sites = find_sites(trio, params, x)
    config = HRAConfig(
        r=3,
        init_weights=False,
        rank_pattern={"stack.1": 2},
        target_modules=PAIRED,
    )
    pair = [drawn(config, sites), drawn(OTHERS[name](), sites, params, std=0.7)]
    pair = pair if first else pair[::-1]
    adapted = adapt(trio, on_fallback="error")

    def trained(trainable):
        return [a.replace(params=own) for a, own in zip(pair, trainable, strict=True)]

    def at_once(trainable):
        out = adapted(params, trained(trainable), x)
        return jnp.sum(jnp.sin(out)), out

    def one_by_one(trainable):
        merged = params
        for adapter in trained(trainable):
            merged = merge(merged, adapter)
        out = trio(merged, x)
        return jnp.sum(jnp.sin(out)), out

    @jax.jit
    def both(trainable):
        return [jax.grad(f, has_aux=True)(trainable) for f in (at_once, one_by_one)]

    got, want = both([adapter.params for adapter in pair])
    chex.assert_trees_all_close(got, want, rtol=1e-10, atol=1e-10)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(got[0]))
    if name != "dora":
        back = jax.jit(lambda params: unmerge(merge(params, pair), pair))(params)
        chex.assert_trees_all_close(back, params, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_a_sequence_multiplies_the_turns():
    """PEFT's W P_a P_b, in torch's layout."""
    apply_fn, params, x, a = one(r=3)
    b = holding(a, normal(6, 4, seed=5, dtype=jnp.float64))
    pa, pb = (chain(np.asarray(each.params["w"]["hra_u"])) for each in (a, b))
    want = (np.asarray(params["w"]).T @ pa @ pb).T
    np.testing.assert_allclose(jax.jit(merge)(params, [a, b])["w"], want, atol=1e-12)
    np.testing.assert_allclose(adapt(apply_fn)(params, [a, b], x), np.asarray(x) @ want, atol=1e-12)


def regularised(ranks, gs=False):
    params, x = trio_params(), jnp.ones((4, 6))
    config = HRAConfig(r=4, apply_GS=gs, rank_pattern=ranks, target_modules=["up", "conv", "stack"])
    return drawn(config, find_sites(trio, params, x))


@pytest.mark.usefixtures("x64")
def test_orthogonality_is_the_formula():
    adapter = regularised({"stack.1": 2, "conv": 6})
    own = {name: np.asarray(arrays["hra_u"]) for name, arrays in adapter.params.items()}
    each = [own["up"], own["conv"].reshape(-1, 6)]
    each += [own["stack"][0], own["stack"][1][:, :2], own["stack"][2]]
    want = 0.0
    for u in each:
        v = u / np.sqrt(np.sum(u**2, axis=0, keepdims=True))
        want += np.sum((v.T @ v - np.eye(v.shape[1])) ** 2)
    got = hra_orthogonality(adapter)
    assert got.shape == ()
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, want, rtol=1e-12)

    def penalty(trainable):
        return hra_orthogonality(adapter.replace(params=trainable))

    slope, numbers = jax.jit(lambda p: (jax.grad(penalty)(p), finite_differences(penalty, p)))(
        adapter.params
    )
    chex.assert_trees_all_close(slope, numbers, atol=1e-7)
    assert not np.asarray(slope["stack"]["hra_u"])[1, :, 2:].any(), "padding has no gradient"


@pytest.mark.usefixtures("x64")
def test_orthonormal_columns_cost_nothing():
    adapter = regularised({"stack.1": 2})

    def orthonormal(u):
        flat = np.asarray(u).reshape(*u.shape[: u.ndim - 2], u.shape[-2], u.shape[-1])
        return jnp.asarray(np.linalg.qr(flat)[0])

    params = {name: {"hra_u": orthonormal(own["hra_u"])} for name, own in adapter.params.items()}
    # A kernel's columns span taps and channels together.
    q = np.linalg.qr(np.asarray(adapter.params["conv"]["hra_u"]).reshape(-1, 4))[0]
    params["conv"] = {"hra_u": jnp.asarray(q.reshape(3, 7, 4))}
    adapter = adapter.replace(params=params)
    np.testing.assert_allclose(hra_orthogonality(adapter), 0, atol=1e-24)


def test_orthogonality_of_the_start_and_of_nothing():
    """Equal columns are as far from orthogonal as can be, and zeros are no reflections."""
    _, adapter = start(4, width=7)
    u = np.asarray(adapter.params["w"]["hra_u"])
    cosine = u[:, 0] @ u[:, 2] / np.linalg.norm(u[:, 0]) / np.linalg.norm(u[:, 2])
    np.testing.assert_allclose(hra_orthogonality(adapter), 4 + 8 * cosine**2, rtol=1e-5)

    def penalty(u):
        return hra_orthogonality(holding(adapter, u))

    assert float(penalty(jnp.zeros((7, 4)))) == 0
    slope = jax.jit(jax.grad(penalty))
    for columns in (u, np.where([[True, False, True, True]], u, 0), 0 * u):
        assert np.isfinite(slope(jnp.asarray(columns))).all()


def test_orthogonality_is_of_hra():
    params, x = mlp_params(), jnp.ones((1, 6))
    lora = drawn(LoraConfig(target_modules=["up"]), find_sites(mlp, params, x))
    with pytest.raises(ValueError, match=r"needs an HRA adapter, got one of .*LoraConfig"):
        hra_orthogonality(lora)


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({"bias": "hra_only"}, {"up.bias"}),
        ({"bias": "all"}, {"up.bias", "down.bias"}),
        ({"modules_to_save": ["down"]}, {"down.bias", "down.kernel"}),
    ],
    ids=["hra_only", "all", "modules_to_save"],
)
def test_whole_leaves_are_trained(fields, trained):
    params, x = mlp_params(), normal(4, 6, seed=9, std=1)
    sites = find_sites(mlp, params, x)
    config = HRAConfig(r=2, target_modules=["up"], **fields)
    adapter = drawn(config, sites, params, std=0.3)
    assert {leaf.path for leaf in adapter.saved} == trained
    merged = merge(params, adapter)
    for path in trained:
        module, leaf = path.split(".")
        np.testing.assert_array_equal(merged[module][leaf], adapter.params[module][leaf])

    def loss(trainable):
        out = adapt(mlp)(params, adapter.replace(params=trainable), x)
        return jnp.sum(jnp.sin(out)), out

    slope, out = jax.jit(jax.grad(loss, has_aux=True))(adapter.params)
    np.testing.assert_allclose(out, mlp(merged, x), atol=1e-5)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(slope))


def test_defaults_are_pefts():
    data = HRAConfig().to_dict()
    assert data == {
        "peft_type": "HRA",
        "r": 8,
        "apply_GS": False,
        "init_weights": True,
        "rank_pattern": {},
        "bias": "none",
        "target_modules": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "base_model_name_or_path": None,
        "revision": None,
        "task_type": None,
    }
    assert HRAConfig.from_dict(data) == HRAConfig()


def test_round_trip():
    config = HRAConfig(
        r=4,
        apply_GS=True,
        rank_pattern={"q": 4, "k": 2},
        bias="hra_only",
        target_modules=["q", "k"],
    )
    again = HRAConfig.from_dict(config.to_dict())
    assert again == config
    assert hash(again) == hash(config)
    assert list(again.rank_pattern) == ["q", "k"]


@pytest.mark.parametrize("r", [0, -1, 2.5, None])
def test_rank_is_positive(r):
    message = f"`r` should be a positive integer value but the value passed is {r}"
    with pytest.raises(ValueError, match=message):
        HRAConfig(r=r)
    with pytest.raises(ValueError, match=r"`rank_pattern\['q'\]` should be a positive integer"):
        HRAConfig(rank_pattern={"k": 2, "q": r})


def test_bias_values():
    for bias in ("none", "all", "hra_only"):
        assert HRAConfig(bias=bias).bias == bias
    with pytest.raises(ValueError, match="`bias` must be one of none, all, hra_only; got 'lora_"):
        HRAConfig(bias="lora_only")
