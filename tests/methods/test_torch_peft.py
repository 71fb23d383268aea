"""Every method against torch PEFT's own modules: outputs, gradients, merged weights and starts.

Both sides get the same random numbers, so that what is compared is the arithmetic alone.
"""

import collections
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import peftjax

HOW = "torch PEFT is the oracle here: pip install -e '.[interop]'"
torch = pytest.importorskip("torch", reason=HOW)
peft = pytest.importorskip("peft", reason=HOW)
Conv1D = pytest.importorskip("transformers.pytorch_utils", reason=HOW).Conv1D
nn = torch.nn
torch.set_num_threads(1)  # two processes of tests share the cores

# How torch makes a layer, and the shape of an input for it.
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 4, 6)),
    "after": (lambda: nn.Linear(5, 7), (2, 4, 5)),
    "gpt2": (lambda: Conv1D(5, 6), (2, 4, 6)),
    "conv": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 7, 6)),
    "square": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 6)),
    "pointwise": (lambda: nn.Conv2d(3, 4, 1), (2, 3, 5, 4)),
    "dilated": (lambda: nn.Conv2d(3, 4, 2, dilation=2), (2, 3, 7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2, padding=1), (2, 3, 3, 4, 3)),
    "table": (lambda: nn.Embedding(7, 5), (2, 4)),
    "wide linear": (lambda: nn.Linear(64, 480), (2, 4, 64)),
    "wide conv": (lambda: nn.Conv2d(16, 24, 3), (2, 16, 5, 5)),
    "wide conv1d": (lambda: nn.Conv1d(16, 24, 5), (2, 16, 7)),
    "wide table": (lambda: nn.Embedding(64, 48), (2, 4)),
}

LORA = {"r": 3, "lora_alpha": 5}
LOHA = {"r": 3, "alpha": 50}  # the product of two small matrices is smaller still
CORE = {**LOHA, "use_effective_conv2d": True}
CONVS = ["conv", "square", "pointwise", "conv1d"]
SCALED = ["linear", "gpt2", "conv", "pointwise", "dilated", "grouped", "conv3d"]

# A config, its fields, and the layers that PEFT can adapt and merge with it, and does so rightly:
# its LoRA forgets a dilation and does not merge groups, its HRA knows square kernels alone.
METHODS = {
    "lora": ("LoraConfig", LORA, ["linear", "gpt2", *CONVS, "conv3d", "table"]),
    "rslora": ("LoraConfig", {**LORA, "use_rslora": True}, ["linear", "conv", "table"]),
    "lora_bias": ("LoraConfig", {**LORA, "lora_bias": True}, ["linear", "gpt2", "conv"]),
    "dora": ("LoraConfig", {**LORA, "use_dora": True}, ["linear", "gpt2", *CONVS, "table"]),
    "pissa": ("LoraConfig", {**LORA, "init_lora_weights": "pissa"}, ["linear", "gpt2"]),
    "olora": ("LoraConfig", {**LORA, "init_lora_weights": "olora"}, ["linear"]),
    "loha": ("LoHaConfig", LOHA, ["linear", *CONVS, "dilated", "grouped"]),
    "loha_core": ("LoHaConfig", CORE, [*CONVS, "dilated", "grouped"]),
    "hra": ("HRAConfig", {"r": 4}, ["linear", "square", "pointwise"]),
    "hra_odd": ("HRAConfig", {"r": 3, "init_weights": False}, ["linear", "square"]),
    "ia3": ("IA3Config", {"feedforward_modules": []}, SCALED),
    "ia3_in": ("IA3Config", {"feedforward_modules": ["layer"]}, SCALED),
}
CASES = [
    pytest.param(config, fields, layer, id=f"{name}-{layer}")
    for name, (config, fields, layers) in METHODS.items()
    for layer in layers
]


def laid(array):
    r"""An array in the order of torch's weights, (out, in, \*taps), in ours: (\*taps, in, out)."""
    return np.moveaxis(array, (0, 1), (-1, -2))


def vectors(array, layer):
    r"""Vectors of torch's in-axes, (r, in \* taps), as (\*taps, in, r)."""
    return laid(array.reshape(-1, *layer.get_base_layer().weight.shape[1:]))


def core(array, layer):
    """A core of (r, r, taps, 1) for one axis of taps loses the last axis."""
    return array.reshape(*array.shape[:2], *layer.get_base_layer().kernel_size)


def scale(array, layer):
    """(out, 1) or (1, in), but for a convolution (1, channels, 1, ...) either way."""
    outs_second = array.ndim > 2 and not layer.is_feedforward
    return laid(array.swapaxes(0, 1) if outs_second else array)


# How an array of PEFT's becomes ours, for each name and a layer of PEFT's. Beside a core, LoHa's
# other factors are transposed.
LAYOUTS = {
    "lora_A": lambda array, layer: laid(array),
    "lora_B": lambda array, layer: array.reshape(array.shape[:2]).T,
    "lora_B_bias": lambda array, layer: array,
    "lora_embedding_A": lambda array, layer: array.T,
    "lora_embedding_B": lambda array, layer: array.T,
    "lora_magnitude_vector": lambda array, layer: array.ravel(),
    "hada_w1_a": lambda array, layer: array if layer.hada_t1 else array.T,
    "hada_w1_b": lambda array, layer: array.T if layer.hada_t1 else vectors(array, layer),
    "hada_w2_a": lambda array, layer: array if layer.hada_t1 else array.T,
    "hada_w2_b": lambda array, layer: array.T if layer.hada_t1 else vectors(array, layer),
    "hada_t1": core,
    "hada_t2": core,
    "hra_u": lambda array, layer: vectors(array.T, layer),
    "ia3_l": scale,
}


def same_weights(layer):
    """The weights of a layer of torch's, in our layout."""
    own = {name: tensor.detach().numpy() for name, tensor in layer.named_parameters()}
    if not isinstance(layer, nn.Embedding | Conv1D):
        own["weight"] = laid(own["weight"])
    return jax.tree.map(jnp.array, own)


def same_function(layer):
    """The function of a layer of torch's, in JAX and on the same inputs."""
    if isinstance(layer, nn.Embedding):
        return lambda own, x: own["weight"][x]
    if isinstance(layer, nn.Linear | Conv1D):
        return lambda own, x: x @ own["weight"] + own["bias"][None, None]
    taps = "DHW"[-len(layer.kernel_size) :]

    def convolution(own, x):
        y = lax.conv_general_dilated(
            x,
            own["weight"],
            window_strides=layer.stride,
            padding=[(n, n) for n in layer.padding],
            rhs_dilation=layer.dilation,
            dimension_numbers=(f"NC{taps}", f"{taps}IO", f"NC{taps}"),
            feature_group_count=layer.groups,
        )
        return y + own["bias"].reshape(1, -1, *[1] * len(taps))

    return convolution


def draw(module, seed):
    """Draws a module's own arrays with std 0.3; lengths are positive, near those they start at."""
    rng = np.random.default_rng(seed)
    for name, tensor in module.named_parameters():
        if "magnitude" in name:
            tensor.data *= torch.tensor(rng.uniform(0.5, 1.5, tensor.shape), dtype=tensor.dtype)
        elif "base_layer" not in name:
            tensor.data = torch.tensor(rng.normal(0, 0.3, tensor.shape), dtype=tensor.dtype)


class Both:
    """One model in both libraries: the same weights, and the same adapters as they start.

    Attributes:
      model: torch's model, each layer of it wrapped by PEFT.
      apply_fn: the same function in JAX, of ``params``.
      adapters: ours, of PEFT's ``names``.
      x: an input.
      base: what the model makes of it without adapters.
    """

    def __init__(self, config, fields, *layers, count=1):
        targets = ["layer", "next"][: len(layers)]
        fields = {**fields, "target_modules": targets}
        if "gpt2" in layers:
            fields["fan_in_fan_out"] = True
        made = {name: LAYERS[kind][0]() for name, kind in zip(targets, layers, strict=True)}
        self.model = nn.Sequential(collections.OrderedDict(made)).eval()
        draw(self.model, seed=0)

        self.params = {name: same_weights(layer) for name, layer in made.items()}
        functions = {name: same_function(layer) for name, layer in made.items()}

        def apply_fn(params, x):
            for name, function in functions.items():
                x = function(params[name], x)
            return x

        self.apply_fn = apply_fn
        rng, shape = np.random.default_rng(1), LAYERS[layers[0]][1]
        ids = isinstance(made["layer"], nn.Embedding)
        self.x = rng.integers(7, size=shape) if ids else rng.normal(size=shape).astype(np.float32)
        self.base = self.model(torch.tensor(self.x)).detach().numpy()

        self.names = [f"adapter{i}" for i in range(count)]
        torch.manual_seed(0)
        for name in self.names:
            theirs = getattr(peft, config)(**fields)
            peft.inject_adapter_in_model(theirs, self.model, adapter_name=name)
        for layer in self.model:
            layer.set_adapter(self.names)

        ours = getattr(peftjax, config)(**fields)
        sites = peftjax.find_sites(apply_fn, self.params, self.x)
        key = jax.random.key(0)
        self.adapters = [peftjax.init_adapter(key, ours, sites, self.params) for _ in self.names]

    def draw(self):
        """Draws the arrays of PEFT's adapters, and gives ours the same."""
        for seed, layer in enumerate(self.model):
            draw(layer, seed + 2)
        for i, name in enumerate(self.names):
            drawn = self.arrays(name)
            assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(
                jnp.shape, self.adapters[i].params
            )
            self.adapters[i] = self.adapters[i].replace(params=drawn)

    def arrays(self, adapter, gradients=False):
        """The arrays of one of PEFT's adapters, or their gradients, as ours."""
        found = {}
        for name, layer in self.model.named_children():
            own = found[name] = {}
            for path, tensor in layer.named_parameters():
                kind, owner, *rest = path.split(".")
                if owner != adapter:
                    continue
                kind += "_bias" if rest == ["bias"] else ""
                value = (tensor.grad if gradients else tensor).detach().numpy()
                own[kind.replace("embedding_", "")] = jnp.array(LAYOUTS[kind](value, layer))
        return found

    def torch_call(self):
        """PEFT's output, the gradient of its mean square with respect to x left in x."""
        x = torch.tensor(self.x, requires_grad=self.x.dtype == np.float32)
        y = self.model(x)
        y.square().mean().backward()
        return x, y.detach().numpy()

    def call(self):
        """Our gradients with respect to the adapters and x, and our output."""

        def loss(trainable, x):
            adapters = [a.replace(params=p) for a, p in zip(self.adapters, trainable, strict=True)]
            y = peftjax.adapt(self.apply_fn)(self.params, adapters, x)
            return jnp.square(y).mean(), y

        argnums = (0, 1) if self.x.dtype == np.float32 else (0,)
        trainable = [adapter.params for adapter in self.adapters]
        return jax.jit(jax.grad(loss, argnums, has_aux=True))(trainable, self.x)


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    largest = float(np.abs(want).max())
    assert largest > 0
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * largest)


def all_close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(close, got, want)


def agree(both):
    """Outputs and gradients are the same, and not those of the model alone; so is the merge."""
    x, want = both.torch_call()
    gradients, got = both.call()
    close(got, want)
    assert np.abs(want - both.base).max() > 0.1 * np.abs(want).max()
    all_close(gradients[0], [both.arrays(name, gradients=True) for name in both.names])
    if x.requires_grad:
        close(gradients[1], x.grad.numpy())
    merge_alike(both)


def merge_alike(both):
    got = jax.jit(peftjax.merge)(both.params, both.adapters)
    for layer in both.model:
        layer.merge()
    names = dict(both.model.named_children())
    all_close(got, {name: same_weights(names[name].get_base_layer()) for name in names})


def core_by_autograd(*args, scale):
    """PEFT's formula of a core, differentiated by torch instead of by PEFT."""
    nothing = types.SimpleNamespace(save_for_backward=lambda *saved: None)
    return peft.tuners.loha.layer.HadaWeightCP.forward(nothing, *args, scale)


@pytest.mark.parametrize(("config", "fields", "layer"), CASES)
def test_outputs_gradients_and_merged_weights(config, fields, layer, monkeypatch):
    # See test_gradients_beside_a_core.
    monkeypatch.setattr(peft.tuners.loha.layer, "make_weight_cp", core_by_autograd)
    both = Both(config, fields, layer)
    both.draw()
    agree(both)


# PEFT takes a bias of LoRA's own for a broken tensor.
@pytest.mark.filterwarnings("ignore:.*invalid shape")
@pytest.mark.parametrize(("config", "fields", "layer"), CASES)
def test_state_dicts(config, fields, layer):
    """Keys, layouts and bytes are PEFT's, on every kind of module."""
    both = Both(config, fields, layer)
    both.draw()
    (adapter,) = both.adapters
    theirs = peft.get_peft_model_state_dict(both.model, adapter_name="adapter0")
    ours = peftjax.get_peft_model_state_dict(adapter)
    assert ours.keys() == {f"base_model.model.{key}" for key in theirs}
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[f"base_model.model.{key}"], tensor.numpy())

    zeros = adapter.replace(params=jax.tree.map(jnp.zeros_like, adapter.params))
    again = peftjax.set_peft_model_state_dict(zeros, {k: t.numpy() for k, t in theirs.items()})
    chex.assert_trees_all_equal(again.params, adapter.params)


def test_gradients_beside_a_core():
    """PEFT's own backward of LoHa with cores is wrong for two of the six arrays.

    It contracts the gradient of either ``hada_w*_a`` with the core of the other half, so the test
    above leaves the differentiation of PEFT's formula to torch. The other four agree as they are.
    """
    both = Both("LoHaConfig", CORE, "conv")
    both.draw()
    both.torch_call()
    ours = both.call()[0][0][0]["layer"]
    theirs = both.arrays("adapter0", gradients=True)["layer"]
    for name in ("hada_t1", "hada_t2", "hada_w1_b", "hada_w2_b"):
        close(ours[name], theirs[name])
    for name in ("hada_w1_a", "hada_w2_a"):
        assert jnp.abs(ours[name] - theirs[name]).max() > 0.1 * jnp.abs(ours[name]).max()


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
@pytest.mark.parametrize(
    ("config", "fields", "layer"),
    [
        ("LoraConfig", LORA, "linear"),
        ("LoraConfig", LORA, "table"),
        ("LoHaConfig", LOHA, "conv"),
        ("HRAConfig", {"r": 4}, "linear"),
        ("HRAConfig", {"r": 4}, "square"),
        ("IA3Config", {"feedforward_modules": []}, "linear"),
        ("IA3Config", {"feedforward_modules": ["layer"]}, "conv"),
    ],
)
def test_two_adapters(config, fields, layer):
    both = Both(config, fields, layer, count=2)
    both.draw()
    agree(both)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ("LoraConfig", LORA),
        ("LoraConfig", {**LORA, "use_rslora": True}),
        ("LoraConfig", {**LORA, "use_dora": True}),
        ("LoHaConfig", LOHA),
    ],
)
def test_patterns(config, fields):
    patterns = {"rank_pattern": {"next": 2}, "alpha_pattern": {"n.xt": 20, "layer": 30}}
    both = Both(config, {**fields, **patterns}, "linear", "after")
    both.draw()
    agree(both)


def test_feedforward_names_one_of_two_layers():
    both = Both("IA3Config", {"feedforward_modules": ["next"]}, "linear", "after")
    both.draw()
    agree(both)


@pytest.mark.parametrize("layer", ["linear", "square"])
def test_orthonormal_reflections(layer):
    """Ours orthonormalise in two halves, PEFT's all at once: its Q is what loads its numbers."""
    both = Both("HRAConfig", {"r": 4, "apply_GS": True}, layer)
    (adapter,) = both.adapters
    close(peftjax.adapt(both.apply_fn)(both.params, adapter, both.x), both.base)
    # PEFT takes pairs of equal columns for a start, and divides what rounding leaves of the second
    # by its norm: noise of norm 1, or NaN on a processor where nothing is left.
    start = both.torch_call()[1]
    assert not np.allclose(start, both.base, rtol=1e-2, atol=1e-2)

    both.draw()
    (wrapped,) = both.model
    q, _ = np.linalg.qr(wrapped.hra_u["adapter0"].detach().numpy())
    loaded = {"layer": {"hra_u": jnp.array(vectors(q.T, wrapped))}}
    both.adapters = [adapter.replace(params=loaded)]
    close(both.call()[1], both.torch_call()[1])
    merge_alike(both)


RANK = {"r": 16}
STARTS = [
    # A config, its fields, a layer, and whether it starts as the identity.
    ("LoraConfig", RANK, "wide linear", True),
    ("LoraConfig", RANK, "wide conv", True),
    ("LoraConfig", RANK, "wide table", True),
    ("LoraConfig", {**RANK, "lora_bias": True}, "wide linear", True),
    ("LoraConfig", {**RANK, "use_dora": True}, "wide linear", True),
    ("LoraConfig", {**RANK, "use_dora": True}, "wide conv", True),
    ("LoraConfig", {**RANK, "use_dora": True}, "wide table", True),
    ("LoraConfig", {**RANK, "init_lora_weights": "gaussian"}, "wide linear", True),
    ("LoraConfig", {**RANK, "init_lora_weights": "orthogonal"}, "wide linear", True),
    ("LoraConfig", {**RANK, "init_lora_weights": False, "lora_bias": True}, "wide linear", False),
    ("LoraConfig", {**RANK, "init_lora_weights": False}, "wide conv", False),
    ("LoraConfig", {**RANK, "init_lora_weights": False}, "wide table", False),
    ("LoHaConfig", RANK, "wide linear", True),
    ("LoHaConfig", RANK, "wide conv", True),
    ("LoHaConfig", {**RANK, "use_effective_conv2d": True}, "wide conv", True),
    ("LoHaConfig", {**RANK, "use_effective_conv2d": True}, "wide conv1d", True),
    ("LoHaConfig", {**RANK, "init_weights": False}, "wide linear", False),
    (
        "LoHaConfig",
        {**RANK, "init_weights": False, "use_effective_conv2d": True},
        "wide conv",
        False,
    ),
    ("HRAConfig", RANK, "wide linear", True),
    ("HRAConfig", RANK, "wide conv", True),
    ("HRAConfig", {**RANK, "init_weights": False}, "wide linear", False),
    ("IA3Config", {"feedforward_modules": []}, "wide linear", True),
    ("IA3Config", {"feedforward_modules": ["layer"]}, "wide linear", True),
    ("IA3Config", {"feedforward_modules": [], "init_ia3_weights": False}, "wide linear", False),
]


@pytest.mark.parametrize(("config", "fields", "layer", "identity"), STARTS)
def test_starts(config, fields, layer, identity):
    """The same distributions, which the numbers tell by their spread and by their bound."""
    both = Both(config, fields, layer)
    (adapter,) = both.adapters
    theirs = both.arrays("adapter0")
    assert jax.tree.map(jnp.shape, adapter.params) == jax.tree.map(jnp.shape, theirs)
    for name in theirs["layer"]:
        got, want = (np.asarray(each["layer"][name]) for each in (adapter.params, theirs))
        assert got.std() == pytest.approx(want.std(), rel=0.15), name
        # A uniform distribution ends at 1.7 of its spread, and many numbers come close.
        if np.abs(want).max() < 1.8 * want.std():
            assert np.abs(got).max() == pytest.approx(np.abs(want).max(), rel=0.05), name
    for y in (peftjax.adapt(both.apply_fn)(both.params, adapter, both.x), both.torch_call()[1]):
        off = np.abs(y - both.base).max() / np.abs(both.base).max()
        assert off < 1e-5 if identity else off > 1e-4


@pytest.mark.parametrize(
    ("init", "layer"),
    [("pissa", "linear"), ("pissa", "gpt2"), ("pissa_niter_16", "linear"), ("olora", "linear")],
)
def test_starts_out_of_the_weight(init, layer):
    """What is taken out of the weight is the same product; PEFT's weight keeps the rest."""
    both = Both("LoraConfig", {**LORA, "init_lora_weights": init}, layer)
    (adapter,) = both.adapters
    ours, theirs = (each["layer"] for each in (adapter.params, both.arrays("adapter0")))
    product = ours["lora_A"] @ ours["lora_B"]
    close(product, theirs["lora_A"] @ theirs["lora_B"])
    rest = same_weights(both.model[0].get_base_layer())["weight"]
    close(both.params["layer"]["weight"] - adapter.buffers["layer"]["scaling"] * product, rest)
    close(peftjax.adapt(both.apply_fn)(both.params, adapter, both.x), both.base)
    close(both.torch_call()[1], both.base)
