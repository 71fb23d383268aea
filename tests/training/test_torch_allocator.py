"""AdaLoRA against torch PEFT: outputs, regulariser, starts, and every choice of its RankAllocator.

The allocators get the same triplets and the same gradients, drawn and not computed, and the same
plain SGD, so that what is compared is the allocation alone.
"""

import collections
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import peftjax

HOW = "torch PEFT is the oracle here: pip install -e '.[interop]'"
torch = pytest.importorskip("torch", reason=HOW)
peft = pytest.importorskip("peft", reason=HOW)
nn = torch.nn
torch.set_num_threads(1)  # two processes of tests share the cores

STEPS, LR, RANK = 60, 0.05, 5
TARGETS = ["conv", "up", "down", "twin"]
SCHEDULE = {"init_r": RANK, "target_r": 2, "tinit": 7, "tfinal": 13, "total_step": STEPS}
FREEZE = STEPS - SCHEDULE["tfinal"]


class Model(nn.Sequential):
    """A convolution and three dense layers, two of them alike; what they return has a loss."""

    def __init__(self):
        conv = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0))
        layers = {"conv": conv, "flat": nn.Flatten(), "tanh": nn.Tanh()}
        layers |= {"up": nn.Linear(24, 9), "down": nn.Linear(9, 9), "twin": nn.Linear(9, 9)}
        super().__init__(collections.OrderedDict(layers))

    def forward(self, x):
        return types.SimpleNamespace(y=super().forward(x), loss=torch.zeros(()))


def apply_fn(params, x):
    conv, dims = params["conv"], ("NCHW", "HWIO", "NCHW")
    h = lax.conv_general_dilated(
        x, conv["weight"], (2, 1), [(1, 1), (0, 0)], dimension_numbers=dims
    )
    h = jnp.tanh(h + conv["bias"].reshape(1, -1, 1, 1)).reshape(2, -1)
    for name in ("up", "down", "twin"):
        h = h @ params[name]["weight"] + params[name]["bias"][None]
    return h


def laid(name, array):
    """An array of PEFT's, or a gradient of one, as ours."""
    module, kind, _ = name.split(".")
    if kind == "lora_E":
        return jnp.array(array.ravel())
    if module == "conv" and kind == "lora_A":
        return jnp.array(array.reshape(-1, 3, 3, 2).transpose(2, 3, 1, 0))
    return jnp.array(array.T)


def as_ours(arrays):
    """Arrays by PEFT's names as a tree of ours."""
    tree = {}
    for name, array in arrays.items():
        module, kind, _ = name.split(".")
        tree.setdefault(module, {})[kind] = laid(name, np.asarray(array))
    return tree


class Both:
    """One model in both libraries, with AdaLoRA on four of its layers.

    Attributes:
      model: PEFT's model.
      triplets: its trainable tensors by name.
      params: the weights of the base in our layout.
      adapter: ours.
    """

    def __init__(self, targets=TARGETS, **fields):
        fields = {**SCHEDULE, **fields, "target_modules": targets}
        torch.manual_seed(0)
        self.model = peft.get_peft_model(Model(), peft.AdaLoraConfig(**fields)).base_model
        every = dict(self.model.model.named_parameters())
        self.triplets = {name: x for name, x in every.items() if x.requires_grad}
        self.params = self.weights()
        self.x = np.random.default_rng(1).normal(size=(2, 3, 4, 4)).astype(np.float32)
        sites = peftjax.find_sites(apply_fn, self.params, self.x)
        config = peftjax.AdaLoraConfig(**fields)
        self.adapter = peftjax.init_adapter(jax.random.key(0), config, sites)

    def weights(self):
        """The weights of PEFT's base in our layout."""

        def own(layer):
            layer = getattr(layer, "base_layer", layer)
            weight, bias = (x.detach().numpy() for x in (layer.weight, layer.bias))
            weight = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
            return {"weight": jnp.array(weight), "bias": jnp.array(bias)}

        return {name: own(getattr(self.model.model, name)) for name in TARGETS}

    def arrays(self):
        return as_ours({name: x.detach() for name, x in self.triplets.items()})

    def gradients(self):
        return as_ours({name: x.grad for name, x in self.triplets.items()})

    def draw(self, seed=2, alike=lambda arrays: arrays):
        """Draws all triplets with std 0.3, and gives ours the same."""
        drawn = alike(random_like(self.triplets, np.random.default_rng(seed), 0.3))
        for name, x in self.triplets.items():
            x.data = torch.tensor(drawn[name])
        self.adapter = self.adapter.replace(params=self.arrays())


def random_like(tensors, rng, std):
    return {
        name: rng.normal(0, std, tuple(x.shape)).astype(np.float32) for name, x in tensors.items()
    }


def close(got, want, tolerance=1e-5):
    def one(got, want):
        assert got.shape == want.shape
        largest = float(np.abs(want).max())
        assert largest > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * largest)

    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(one, got, want)


@pytest.mark.parametrize("alpha", [8, 3.5, 0])
def test_outputs_gradients_and_merged_weights(alpha):
    """The layers SVDLinear and SVDConv2d."""
    both = Both(lora_alpha=alpha)
    both.draw()
    x = torch.tensor(both.x, requires_grad=True)
    want = both.model(x).y
    want.square().mean().backward()

    def loss(trainable, x):
        adapter = both.adapter.replace(params=trainable)
        y = peftjax.adapt(apply_fn, on_fallback="error")(both.params, adapter, x)
        return jnp.square(y).mean(), y

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    gradients, got = run(both.adapter.params, both.x)
    close(np.asarray(got), want.detach().numpy())
    assert np.abs(apply_fn(both.params, both.x) - got).max() > 0.1 * np.abs(got).max()
    close(gradients, (both.gradients(), x.grad.numpy()))

    merged = peftjax.merge(both.params, both.adapter)
    both.model.merge_adapter()
    close(merged, both.weights())
    assert np.abs(merged["conv"]["weight"] - both.params["conv"]["weight"]).max() > 0.01


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_orthogonality(weight):
    both = Both(orth_reg_weight=weight)
    both.draw()
    want = both.model(torch.tensor(both.x)).loss
    want.backward()
    theirs = {name: x.grad for name, x in both.triplets.items() if "lora_E" not in name}
    ours = jax.jit(
        jax.value_and_grad(lambda p: peftjax.orthogonality(both.adapter.replace(params=p)))
    )
    got, slope = ours(both.adapter.params)
    assert float(got) == pytest.approx(want.item(), rel=1e-6)
    for own in slope.values():
        assert not own.pop("lora_E").any()
    close(slope, as_ours(theirs), tolerance=2e-6)


@pytest.mark.parametrize("identity", [True, False])
def test_starts(identity):
    both = Both(init_r=60, init_lora_weights=identity)
    want = {"lora_A": 0.02, "lora_B": 0.02, "lora_E": 0.0}
    want = want if identity else dict.fromkeys(want, 1.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(both.adapter.params, both.arrays())
    for arrays in (both.adapter.params, both.arrays()):
        for kind, std in want.items():
            numbers = np.concatenate([arrays[module][kind].ravel() for module in TARGETS])
            assert numbers.std() == pytest.approx(std, rel=0.15), kind
            assert abs(numbers.mean()) <= 0.15 * std
    base = apply_fn(both.params, both.x)
    got = peftjax.adapt(apply_fn)(both.params, both.adapter, both.x)
    theirs = both.model(torch.tensor(both.x)).y.detach().numpy()
    for y in (got, theirs):
        off = np.abs(y - base).max() / np.abs(base).max()
        assert off < 1e-6 if identity else off > 0.1


def pattern(both):
    """What PEFT's last allocation kept, by module."""
    found = both.model.peft_config["default"].rank_pattern
    everything = {f"{module}.lora_E.default": [True] * RANK for module in both.adapter.sites}
    return {name.split(".")[0]: np.array(mask) for name, mask in (found or everything).items()}


def scores(state):
    """The scores of all triplets, by module."""
    found = {}
    for module, average in state.sensitivity.items():
        own = {name: np.asarray(x * state.uncertainty[module][name]) for name, x in average.items()}
        vectors = own["lora_A"].reshape(-1, RANK).mean(axis=0) + own["lora_B"].mean(axis=1)
        found[module] = own["lora_E"] + vectors
    return found


def follow(both, alike=lambda arrays: arrays):
    """Sixty steps of both allocators on the same gradients, compared after each.

    Returns:
      Our states, by step.
    """
    optimizer = peftjax.rank_allocator(optax.sgd(LR), both.adapter)

    @jax.jit
    def ours(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    allocator, rng = both.model.rankallocator, np.random.default_rng(3)
    params = both.adapter.params
    state = optimizer.init(params)
    states = []
    for step in range(STEPS):
        drawn = alike(random_like(both.triplets, rng, 1.0))
        for name, x in both.triplets.items():
            x.grad = torch.tensor(drawn[name])
            x.data -= LR * x.grad
        both.model.update_and_allocate(step)
        params, state = ours(params, state, as_ours(drawn))
        states.append(state)

        # The choices are the same, exactly.
        kept = pattern(both)
        assert int(state.budget) == allocator.budget_schedule(step)[0]
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, state.kept), kept)
        ranks = peftjax.ranks(both.adapter.replace(params=params), state)
        assert ranks == {module: mask.sum() for module, mask in kept.items()}

        # So are the numbers, but for rounding; from the last allocation on PEFT has no averages.
        theirs = both.arrays()
        chex.assert_trees_all_close(params, theirs, rtol=0, atol=1e-6)
        for module, own in params.items():
            zeros = np.asarray(own["lora_E"]) == 0
            np.testing.assert_array_equal(zeros, np.asarray(theirs[module]["lora_E"]) == 0)
        if step < FREEZE:
            close(state.sensitivity, as_ours(allocator.exp_avg_ipt), tolerance=1e-6)
            close(state.uncertainty, as_ours(allocator.exp_avg_unc), tolerance=1e-6)
    assert not allocator.exp_avg_ipt
    return states


def check_gaps(states, interval):
    """Rounding decides nothing: those that stay score higher than those that go, and clearly."""
    allocations = 0
    for step in range(SCHEDULE["tinit"] + 1, FREEZE + 1):
        if step % interval and step != FREEZE:
            continue
        own, kept = scores(states[step]), states[step].kept
        stay = np.concatenate([own[module][np.asarray(kept[module])] for module in own])
        go = np.concatenate([own[module][~np.asarray(kept[module])] for module in own])
        assert stay.min() - go.max() > 1e-5 * stay.min()
        allocations += 1
    return allocations


@pytest.mark.parametrize(("interval", "allocations"), [(1, 40), (5, 9)])
def test_allocations(interval, allocations):
    """Before ``tinit``, while the budget falls, and after: the same budget, masks and ranks."""
    both = Both(deltaT=interval)
    both.draw()
    states = follow(both)
    assert check_gaps(states, interval) == allocations
    kept = [sum(int(mask.sum()) for mask in state.kept.values()) for state in states]
    assert kept[SCHEDULE["tinit"]] == 4 * RANK
    assert len(set(kept)) > 5
    assert set(kept[FREEZE:]) == {4 * SCHEDULE["target_r"]}
    ranks = [int(mask.sum()) for mask in states[-1].kept.values()]
    assert len(set(ranks)) > 1, "some layers keep more than others"


def one_for_all(arrays):
    """The numbers of one layer in the other too, and of its first triplet in its second."""
    alike = {}
    for name in arrays:
        array = np.array(arrays[name.replace("twin", "down")])
        array = array.T if "lora_B" in name else array
        array[1] = array[0]
        alike[name] = array.T if "lora_B" in name else array
    return alike


@pytest.mark.parametrize("interval", [1, 5])
def test_ties_all_go(interval):
    """Scores that are equal to the last bit go together, and leave less than the budget."""
    both = Both(targets=["down", "twin"], deltaT=interval)
    both.draw(alike=one_for_all)
    states = follow(both, one_for_all)
    check_gaps(states, interval)
    below = 0
    for state in states:
        down, twin = (np.asarray(state.kept[name]) for name in ("down", "twin"))
        np.testing.assert_array_equal(down, twin)
        assert down[0] == down[1]
        below += int(state.budget) > 2 * down.sum()
    assert below > 5
    for own in scores(states[FREEZE - 1]).values():
        assert own[0] == own[1]
        assert len(np.unique(own)) == RANK - 1
