"""Single modules of torch's under torch PEFT: what it computes is what is computed here."""

import types
import warnings

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
    if not twins.sites["m"].window.uneven:
        check_export(twins, adapter, tmp_path)
        return
    peftjax.save_pretrained(tmp_path, adapter, allow_foreign=True)
    model = peft.PeftModel.from_pretrained(twins.model, tmp_path).eval()
    wanted = peftjax.adapt(twins.apply_fn)(twins.params, adapter, twins.x)
    assert there(twins, model).shape != wanted.shape


def test_a_start_that_peft_ignores_for_a_table(tmp_path):
    """Which is why such a file is refused, and not read with a start that PEFT did not take."""
    twins = of_table()
    config = peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights="pissa", target_modules=["m"])
    model = peft.get_peft_model(twins.model, config)
    assert not model.base_model.model.m.lora_embedding_A["default"].any()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"m: it is no linear layer, and torch PEFT takes 'pissa'"):
        peftjax.load_pretrained(tmp_path, twins.sites, twins.params)
