"""Combined adapters against torch PEFT's own, by what they change about the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from peftjax import IA3Config, LoHaConfig, LoraConfig, find_sites, init_adapter, merge
from peftjax.algebra.combining import combine_adapters
from peftjax.algebra.conversion import convert_to_lora

HOW = "torch PEFT is the oracle here: pip install -e '.[interop]'"
torch = pytest.importorskip("torch", reason=HOW)
peft = pytest.importorskip("peft", reason=HOW)
Conv1D = pytest.importorskip("transformers.pytorch_utils", reason=HOW).Conv1D
# PEFT says which layers it transposes, and that a density of 1 keeps everything.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:The density")
torch.set_num_threads(1)  # two processes of tests share the cores

# How torch makes each layer, and its weight's axes in our order: (in, out), (taps, in, out).
LAYERS = {
    "linear": (lambda: torch.nn.Linear(7, 6), (1, 0)),
    "gpt2": (lambda: Conv1D(6, 7), (0, 1)),
    "conv": (lambda: torch.nn.Conv2d(4, 5, 3), (2, 3, 1, 0)),
    "table": (lambda: torch.nn.Embedding(8, 5), (0, 1)),
}
PARTS = {
    "lora_A": {"linear": (1, 0), "gpt2": (1, 0), "conv": (2, 3, 1, 0), "table": (1, 0)},
    "lora_B": {"linear": (1, 0), "gpt2": (1, 0), "conv": (1, 0, 2, 3), "table": (1, 0)},
}


class Model(torch.nn.Module):
    """Layers side by side: only their weights matter here."""

    def __init__(self, kinds):
        super().__init__()
        for kind in kinds:
            setattr(self, kind, LAYERS[kind][0]())

    def forward(self):
        raise NotImplementedError


def apply_fn(params, ids):
    out = []
    for kind, own in params.items():
        w = own["weight"]
        if kind == "table":
            out.append(w[ids])
        elif kind == "conv":
            dims = ("NHWC", "HWIO", "NHWC")
            x = jnp.ones((1, 3, 3, 4))
            out.append(lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=dims))
        else:
            out.append(jnp.ones((2, 7)) @ w)
    return out


class Both:
    """The same adapters of the same weights in both libraries, with numbers of std 0.3."""

    def __init__(self, kinds, *fields):
        torch.manual_seed(0)
        model = Model(kinds)
        for own in model.parameters():
            own.data.normal_(0, 0.3)
        weights = {kind: getattr(model, kind).weight.detach().numpy() for kind in kinds}
        self.params = {
            kind: {"weight": jnp.asarray(w.transpose(LAYERS[kind][1]))}
            for kind, w in weights.items()
        }
        sites = find_sites(apply_fn, self.params, jnp.arange(4))
        self.names = [f"adapter{i}" for i in range(len(fields))]
        configs = [peft.LoraConfig(**{"target_modules": list(kinds), **each}) for each in fields]
        self.model = peft.get_peft_model(model, configs[0], adapter_name=self.names[0])
        for name, config in zip(self.names[1:], configs[1:], strict=True):
            self.model.add_adapter(name, config)
        self.adapters = []
        for name, each in zip(self.names, fields, strict=True):
            config = LoraConfig(**{"target_modules": list(kinds), **each})
            adapter = init_adapter(jax.random.key(0), config, sites)
            own = {kind: self._draw(kind, name) for kind in adapter.sites}
            assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, adapter.params)
            self.adapters.append(adapter.replace(params=own))

    def _draw(self, kind, name):
        """Draws what PEFT's layer holds, and gives it in our layout."""
        layer, own = getattr(self.model.base_model.model, kind), {}
        for part, axes in PARTS.items():
            if kind == "table":
                tensor = getattr(layer, part.replace("lora", "lora_embedding"))[name]
            else:
                tensor = getattr(layer, part)[name].weight
            tensor.data.normal_(0, 0.3)
            array = tensor.detach().numpy().transpose(axes[kind])
            shape = array.shape[:2] if part == "lora_B" else array.shape
            own[part] = jnp.asarray(array.reshape(shape))
        return own

    def theirs(self, weights, **fields):
        """What PEFT's combination changes about each weight, in our layout."""
        self.model.add_weighted_adapter(self.names, weights, "combined", **fields)
        return {
            kind: getattr(self.model.base_model.model, kind)
            .get_delta_weight("combined")
            .detach()
            .numpy()
            .transpose(LAYERS[kind][1])
            for kind in self.params
            if "combined" in self.combined_in(kind)
        }

    def combined_in(self, kind):
        layer = getattr(self.model.base_model.model, kind)
        return [*layer.lora_A, *layer.lora_embedding_A]

    def ours(self, weights, **fields):
        combined = combine_adapters(self.adapters, weights, **fields)
        return changes(self.params, combined)


def changes(params, adapter):
    after = merge(params, adapter)
    return {kind: np.asarray(after[kind]["weight"] - params[kind]["weight"]) for kind in params}


def alike(got, want):
    for kind, change in want.items():
        largest = np.abs(change).max()
        assert largest > 1e-2
        np.testing.assert_allclose(got[kind], change, rtol=0, atol=1e-5 * max(largest, 1))


EQUAL = [{"r": 3, "lora_alpha": 5}, {"r": 3, "lora_alpha": 4, "use_rslora": True}]
EQUAL = [*EQUAL, {"r": 3, "lora_alpha": 7}]
UNEQUAL = [{"r": 2, "lora_alpha": 5}, {"r": 4, "lora_alpha": 3}, {"r": 1, "lora_alpha": 2}]
WEIGHTS = [0.7, -0.4, 1.3]
SPARSE = [
    ("ties", 0.6),
    ("magnitude_prune", 0.6),
    ("dare_linear", 1.0),
    ("dare_ties", 1.0),
]


def fields_of(kind, density):
    return {"combination_type": kind, "density": density}


@pytest.mark.parametrize("layers", [("linear", "gpt2", "table"), ("conv",)])
@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_sums(kind, layers):
    both = Both(layers, *(EQUAL if kind == "linear" else UNEQUAL))
    fields = {"combination_type": kind}
    alike(both.ours(WEIGHTS, **fields), both.theirs(WEIGHTS, **fields))


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize(("kind", "density"), SPARSE)
def test_sparse_factors(kind, density, sign):
    both = Both(("linear", "conv", "table"), *EQUAL)
    fields = {**fields_of(kind, density), "majority_sign_method": sign}
    got = both.ours(WEIGHTS, **fields, key=jax.random.key(0))
    alike(got, both.theirs(WEIGHTS, **fields))


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize(("kind", "density"), SPARSE)
def test_sparse_changes(kind, density, sign):
    both = Both(("linear", "conv", "table"), *UNEQUAL)
    fields = {**fields_of(f"{kind}_svd", density), "majority_sign_method": sign, "svd_rank": 3}
    got = both.ours(WEIGHTS, **fields, key=jax.random.key(0))
    alike(got, both.theirs(WEIGHTS, **fields))


def test_unequal_targets():
    fields = [
        {"r": 2, "lora_alpha": 5, "target_modules": ["linear", "table"]},
        {"r": 3, "lora_alpha": 4, "target_modules": ["linear", "gpt2"]},
    ]
    both = Both(("linear", "gpt2", "table"), *fields)
    kind = {"combination_type": "cat"}
    want = both.theirs([0.7, -0.4], **kind)
    assert sorted(want) == ["gpt2", "linear", "table"]
    alike(both.ours([0.7, -0.4], **kind), want)


def test_first_adapter_of_another_scale():
    """PEFT's sum inherits use_rslora of the first adapter, and so is not of scale 1."""
    both = Both(("linear", "table"), EQUAL[1], EQUAL[0])
    kind = {"combination_type": "linear"}
    theirs = both.theirs([0.7, -0.4], **kind)
    alike(both.ours([0.7, -0.4], **kind), {k: x / np.sqrt(3) for k, x in theirs.items()})


def test_ia3_sums_scales():
    torch.manual_seed(0)
    model = Model(["linear", "gpt2"])
    config = {"target_modules": ["linear", "gpt2"], "feedforward_modules": ["gpt2"]}
    theirs = peft.get_peft_model(model, peft.IA3Config(**config), adapter_name="one")
    theirs.add_adapter("two", peft.IA3Config(**config))
    params = {
        "linear": {"weight": jnp.asarray(model.linear.base_layer.weight.detach().numpy().T)},
        "gpt2": {"weight": jnp.asarray(model.gpt2.base_layer.weight.detach().numpy())},
    }
    sites, adapters = find_sites(apply_fn, params, jnp.arange(4)), []
    for name in ("one", "two"):
        own = {}
        for module in config["target_modules"]:
            scale = getattr(model, module).ia3_l[name]
            scale.data.normal_(1, 0.3)
            own[module] = {"ia3_l": jnp.asarray(scale.detach().numpy().T)}
        adapter = init_adapter(jax.random.key(0), IA3Config(**config), sites)
        adapters.append(adapter.replace(params=own))
    theirs.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum")
    combined = combine_adapters(adapters, [0.7, -0.4], combination_type="linear")
    for module in config["target_modules"]:
        want = getattr(model, module).ia3_l["sum"].detach().numpy().T
        np.testing.assert_allclose(combined.params[module]["ia3_l"], want, atol=1e-6)


@pytest.mark.parametrize("kept", [2, 5, 0.5, 0.9, 0.999, 1.0])
def test_conversion_of_loha(kept):
    torch.manual_seed(0)
    model = Model(["linear"])
    config = {"r": 3, "alpha": 5, "target_modules": ["linear"], "init_weights": False}
    theirs = peft.get_peft_model(model, peft.LoHaConfig(**config))
    layer, names = model.linear, ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
    own = {}
    for name in names:
        tensor = getattr(layer, name)["default"]
        tensor.data.normal_(0, 1)
        own[name] = jnp.asarray(tensor.detach().numpy().T)
    params = {"linear": {"weight": jnp.asarray(layer.base_layer.weight.detach().numpy().T)}}
    sites = find_sites(apply_fn, params, jnp.arange(4))
    adapter = init_adapter(jax.random.key(0), LoHaConfig(**config), sites)
    lora = convert_to_lora(adapter.replace(params={"linear": own}), kept)

    _, state = peft.convert_to_lora(theirs, rank=kept)
    a, b = (next(v.numpy() for k, v in state.items() if n in k) for n in ("lora_A", "lora_B"))
    assert lora.config.r == lora.params["linear"]["lora_A"].shape[-1] == len(a)
    got = changes(params, lora)
    alike(got, {"linear": (b @ a).T})
