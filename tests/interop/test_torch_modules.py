"""Single modules of torch's under torch PEFT: what it computes is what is computed here."""

import types
import warnings

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import normal
from naive import drawn

import peftjax

HOW = "torch PEFT is the oracle here: pip install -e '.[interop]'"
torch = pytest.importorskip("torch", reason=HOW)
peft = pytest.importorskip("peft", reason=HOW)
nn = torch.nn
torch.set_num_threads(1)  # two processes of tests share the cores


def of_conv(**options):
    """A convolution over two axes, channels first on both sides, and its twin."""
    layer = nn.Conv2d(4, 6, **{"kernel_size": 3, "bias": False, **options})

    def apply_fn(params, x):
        return lax.conv_general_dilated(
            x,
            params["m"]["kernel"],
            layer.stride,
            [(n, n) for n in layer.padding],
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            feature_group_count=layer.groups,
        )

    return of(layer, apply_fn, "kernel", normal(*layer.weight.shape), normal(2, 4, 7, 6, std=1))


def of_table():
    ids = jnp.array([[1, 2, 6], [0, 0, 3]])
    return of(nn.Embedding(8, 6), lambda p, i: p["m"]["kernel"][i], "kernel", normal(8, 6), ids)


def of_linear():
    apply_fn = lambda p, x: x @ p["m"]["kernel"].T  # noqa: E731
    return of(nn.Linear(6, 5, False), apply_fn, "kernel", normal(5, 6), normal(2, 6, std=1))


def of(layer, apply_fn, leaf, weight, x):
    layer.weight.data = torch.tensor(np.array(weight))
    model = nn.ModuleDict({"m": layer})
    model.forward = lambda x: model.m(x)
    params = {"m": {leaf: weight}}
    sites = peftjax.find_sites(apply_fn, params, x)
    twins = types.SimpleNamespace(**locals())
    np.testing.assert_allclose(there(twins, model), apply_fn(params, x), atol=1e-5)
    return twins


def there(twins, model):
    """What a model of torch's computes."""
    with torch.no_grad():
        return model(torch.tensor(np.array(twins.x))).numpy()


def check_export(twins, adapter, directory):
    """Torch PEFT reads the file without a word and computes the same."""
    wanted = peftjax.adapt(twins.apply_fn)(twins.params, adapter, twins.x)
    peftjax.save_pretrained(directory, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.PeftModel.from_pretrained(twins.model, directory).eval()
    assert np.abs(wanted - twins.apply_fn(twins.params, twins.x)).max() > 0.1
    np.testing.assert_allclose(there(twins, model), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("make", [of_table, of_conv])
def test_converted_starts(make, init, tmp_path):
    twins = make()
    config = peftjax.LoraConfig(r=2, lora_alpha=5, init_lora_weights=init, target_modules=["m"])
    adapter = drawn(config, twins.sites, twins.params)
    check_export(twins, peftjax.convert_to_lora(adapter, 1.0, twins.params), tmp_path)


@pytest.mark.parametrize("init", ["orthogonal", "gaussian"])
@pytest.mark.parametrize("make", [of_table, of_conv, of_linear])
def test_starts_that_leave_no_trace(make, init, tmp_path):
    twins = make()
    config = peftjax.LoraConfig(r=2, lora_alpha=5, init_lora_weights=init, target_modules=["m"])
    check_export(twins, drawn(config, twins.sites), tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"stride": 2, "padding": 1}, {"kernel_size": 1}, {"stride": (1, 2)}, {"padding": (1, 0)}],
    ids=str,
)
def test_hra_on_convolutions(options, tmp_path):
    """PEFT takes the first step and the first padding for those of all axes."""
    twins = of_conv(**options)
    adapter = drawn(peftjax.HRAConfig(r=2, target_modules=["m"]), twins.sites)
    if not twins.sites["m"].uneven:
        check_export(twins, adapter, tmp_path)
        return
    peftjax.save_pretrained(tmp_path, adapter, allow_foreign=True)
    model = peft.PeftModel.from_pretrained(twins.model, tmp_path).eval()
    wanted = peftjax.adapt(twins.apply_fn)(twins.params, adapter, twins.x)
    assert there(twins, model).shape != wanted.shape


@pytest.mark.parametrize("gs", [False, True])
@pytest.mark.parametrize("make", [of_linear, of_conv])
def test_padded_chains_of_hra(make, gs, tmp_path):
    """A column of zeros is no reflection here, and NaN in PEFT."""
    twins = make()
    config = peftjax.HRAConfig(r=2, apply_GS=gs, target_modules=["m"])
    padded = peftjax.pad_ranks(drawn(config, twins.sites), 4)
    check_export(twins, padded, tmp_path)
    assert peftjax.load_pretrained(tmp_path, twins.sites).config.r == 4


def test_a_chain_with_one_empty_place_is_refused(tmp_path):
    twins = of_linear()
    padded = peftjax.pad_ranks(drawn(peftjax.HRAConfig(r=2, target_modules=["m"]), twins.sites), 3)
    with pytest.raises(ValueError, match=r"m: .* 2 cannot become 3, .* padded too, be even"):
        peftjax.save_pretrained(tmp_path / "new", padded)
    assert not (tmp_path / "new").exists()


def of_stack():
    """Three linear layers that JAX scans."""

    def apply_fn(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["q"]["kernel"])[0]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"q": nn.Linear(4, 4, bias=False)}) for _ in range(3)
            )
            for layer, weight in zip(self.layers, kernel, strict=True):
                layer["q"].weight.data = torch.tensor(np.array(weight.T))

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer["q"](x))
            return x

    kernel, x = normal(3, 4, 4), normal(2, 4, std=1)
    params = {"layers": {"q": {"kernel": kernel}}}
    names = peftjax.ModuleNames((("layers.{name}", "layers.{i}.{name}"),))
    sites = peftjax.find_sites(apply_fn, params, x)
    return types.SimpleNamespace(**locals(), model=Model())


def test_ia3_on_the_inputs_of_some_layers(tmp_path):
    twins = of_stack()
    config = peft.IA3Config(target_modules=["layers.2.q"], feedforward_modules=["layers.2.q"])
    model = peft.get_peft_model(twins.model, config)
    model.base_model.model.layers[2]["q"].ia3_l["default"].data = torch.tensor([[2.0, 0.5, -1, 3]])
    model.save_pretrained(tmp_path / "theirs")
    adapter = peftjax.load_pretrained(tmp_path / "theirs", twins.sites, names=twins.names)
    got = peftjax.adapt(twins.apply_fn)(twins.params, adapter, twins.x)
    np.testing.assert_allclose(got, there(twins, model), rtol=0, atol=2e-5)
    assert adapter.sites["layers.q"].layers == (2,)

    peftjax.save_pretrained(tmp_path / "ours", adapter, names=twins.names)
    again = peft.PeftModel.from_pretrained(of_stack().model, tmp_path / "ours").eval()
    np.testing.assert_allclose(there(twins, again), got, rtol=0, atol=2e-5)
    own = peftjax.load_pretrained(tmp_path / "ours", twins.sites, names=twins.names)
    chex.assert_trees_all_equal(own.params, adapter.params)


def test_a_start_that_peft_ignores_for_a_table(tmp_path):
    """Which is why such a file is refused, and not read with a start that PEFT did not take."""
    twins = of_table()
    config = peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights="pissa", target_modules=["m"])
    model = peft.get_peft_model(twins.model, config)
    assert not model.base_model.model.m.lora_embedding_A["default"].any()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"m: it is no linear layer, and torch PEFT takes 'pissa'"):
        peftjax.load_pretrained(tmp_path, twins.sites, twins.params)
