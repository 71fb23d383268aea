"""X-LoRA of whole models against torch PEFT: its scalings, logits, gradients and files.

The models are those of ``test_torch_models``: Llama with layers in a list and scanned, three of
them and twelve. Every expert and classifier has a standard deviation of 0.3.
"""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import test_torch_models as models
from safetensors.numpy import load_file
from test_torch_models import as_users_have_it, drawn, peft, torch  # noqa: F401

import peftjax
from peftjax.methods.xlora import CLASSIFIER

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(Flax|flax|JAX|jax).*",
    "ignore:`enable_softmax_topk`",  # both libraries say it of a few cases here
)

TOLERANCE = models.TOLERANCE  # of logits at a scale of 5, and of scalings
GRADIENT = 1e-4  # of the largest entry
NAMES = ("poems", "code", "law", "tables", *(f"more{i}" for i in range(7)))
# The fields of each expert, with the names of modules as torch's Llama has them.
EXPERTS = (
    {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
    {
        "r": 4,
        "lora_alpha": 3,
        "target_modules": ["k_proj", "down_proj"],
        "rank_pattern": {"k_proj": 2},
    },
    {"r": 1, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
    *[{"r": 1, "target_modules": ["v_proj"]}] * 7,
)
HERE = {
    "scanned": {f"{name}_proj": name for name in ("q", "k", "v", "down")}
    | {"embed_tokens": "embed"},
    "listed": {"embed_tokens": "embed"},
}


class Model:
    """A model in torch and here, with experts for it.

    Attributes:
      twins: the model.
      names: its names, with torch's order.
      expert: makes an expert, by its number.
      cotangent: what gradients are taken of, along the logits.
    """

    def __init__(self, name, twins):
        self.twins = twins
        twins.torch.config.use_cache = False  # PEFT insists on it
        order = peftjax.module_names("llama").order
        self.names = dataclasses.replace(twins.names, order=order)
        self.here = HERE[name]
        self.expert = functools.cache(self.new_expert)
        shape = (*twins.ids.shape, 50)
        self.cotangent = np.random.default_rng(3).normal(0, 1, shape).astype(np.float32)
        self.adapted = peftjax.adapt(twins.apply_fn, return_scalings=True)
        self.run = jax.jit(jax.grad(self.product, has_aux=True))

    def new_expert(self, i):
        fields = dict(EXPERTS[i])
        fields["target_modules"] = [self.here.get(name, name) for name in fields["target_modules"]]
        if pattern := fields.get("rank_pattern"):
            fields["rank_pattern"] = {self.here.get(n, n): r for n, r in pattern.items()}
        config = peftjax.LoraConfig(**fields)
        adapter = naive.drawn(config, self.twins.sites)
        return adapter.replace(params=drawn(adapter.params, seed=10 + i))

    def xlora(self, n, names=None, **fields):
        """An X-LoRA adapter of the first experts, drawn."""
        experts = {name: self.expert(i) for i, name in enumerate(NAMES[:n])}
        adapter = peftjax.init_xlora(
            jax.random.key(0),
            peftjax.XLoraConfig(**fields),
            experts,
            self.twins.sites,
            names=names or self.names,
        )
        return adapter.replace(params=drawn(adapter.params, seed=4))

    def product(self, params, adapter):
        """The logits along a direction; and they and the scalings."""
        out, scalings = self.adapted(
            self.twins.params, adapter.replace(params=params), self.twins.ids
        )
        return (out * self.cotangent).sum(), (out, scalings)

    def in_torch(self, directory):
        """PEFT's model with an X-LoRA adapter out of a directory."""
        model = peft.PeftModel.from_pretrained(self.twins.fresh(), directory, is_trainable=True)
        classifier = model.base_model.internal_xlora_classifier
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "internal_xlora_classifier" in name
        model.enable_scalings_logging()
        return model.eval(), classifier

    def compare(self, adapter, directory, gradients=True):
        """Holds an adapter against what PEFT makes of its files; reads them again."""
        peftjax.save_pretrained(directory, adapter, names=self.names)
        model, classifier = self.in_torch(directory)
        wanted = model(input_ids=torch.tensor(self.twins.ids)).logits
        (wanted * torch.tensor(self.cotangent)).sum().backward()
        if gradients:
            found, (out, scalings) = self.run(adapter.params, adapter)
            self.compare_gradients(adapter.replace(params=found), classifier)
        else:
            out, scalings = self.adapted(self.twins.params, adapter, self.twins.ids)
        wanted = wanted.detach().numpy()
        assert np.abs(wanted - self.twins.logits()).max() > 0.1
        np.testing.assert_allclose(out, wanted, rtol=0, atol=TOLERANCE)
        theirs = model.get_latest_scalings().detach().numpy()
        if adapter_in_torch_order(adapter, self.names):
            np.testing.assert_allclose(scalings, theirs, rtol=0, atol=TOLERANCE)
        (logged,) = model.get_scalings_log()
        np.testing.assert_array_equal(logged.detach().numpy(), theirs)
        again = peftjax.load_pretrained(directory, self.twins.sites, names=self.names)
        return model, again

    def compare_gradients(self, gradients, classifier):
        """Holds the gradients of a classifier against those of torch's."""
        ours = peftjax.get_peft_model_state_dict(gradients, names=self.names)
        theirs = {
            f"base_model.internal_xlora_classifier.{key}": parameter.grad.numpy()
            for key, parameter in classifier.named_parameters()
        }
        assert ours.keys() == theirs.keys()
        for key, wanted in theirs.items():
            atol = GRADIENT * np.abs(wanted).max()
            np.testing.assert_allclose(ours[key], wanted, rtol=0, atol=atol)


def adapter_in_torch_order(adapter, names):
    """Whether the layers of an adapter are where torch has them."""
    layers = [layer.replace("]", "").split("[") for layer in peftjax.xlora_layers(adapter)]
    torch_names = [names.to_torch(name, tuple(map(int, index))) for name, *index in layers]
    return torch_names == sorted(torch_names, key=names.place)


def assert_same(one, other):
    """Two adapters hold the same arrays."""
    chex.assert_trees_all_equal((one.params, one.buffers), (other.params, other.buffers))


@pytest.fixture(scope="module")
def scanned():
    return Model("scanned", models.scanned())


# For each case the number of experts and the fields.
CASES = {
    "shallow": (2, {}),
    "layerwise": (3, {"layerwise_scalings": True}),
    "deep": (4, {"xlora_depth": 2, "xlora_size": 9, "softmax_temperature": 0.6}),
    "deeper": (
        4,
        {
            "xlora_depth": 3,
            "xlora_size": 9,
            "layerwise_scalings": True,
            "scaling_pass_value": 0.4,
            "global_scaling_weight": 1.7,
        },
    ),
    "no_dropout": (3, {"xlora_depth": 3, "xlora_size": 9, "xlora_dropout_p": 0.0}),
    # PEFT's first pass picks some of equal scalings, and of three experts the first two.
    "top_of_equal": (3, {"top_k_lora": 2, "scaling_pass_value": 0.3}),
    "softmax_of_top": (
        4,
        {
            "top_k_lora": 2,
            "enable_softmax": False,
            "enable_softmax_topk": True,
            "layerwise_scalings": True,
        },
    ),
    "two_softmaxes": (3, {"top_k_lora": 2, "enable_softmax_topk": True, "softmax_temperature": 2}),
    "no_softmax": (4, {"enable_softmax": False, "top_k_lora": 1, "layerwise_scalings": True}),
    "eleven": (11, {"layerwise_scalings": True, "scaling_pass_value": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_like_torch(case, scanned, tmp_path):
    """PEFT makes the same of our files, and so do we."""
    n, fields = CASES[case]
    adapter = scanned.xlora(n, **fields)
    _, again = scanned.compare(adapter, tmp_path)
    assert_same(again, adapter)
    assert tuple(again.config.adapters) == NAMES[:n]
    assert peftjax.xlora_layers(again) == peftjax.xlora_layers(adapter)


def test_values_are_those_of_the_arrays(scanned, tmp_path):
    """What was changed since the adapter was made is what is written."""
    adapter = scanned.xlora(3, layerwise_scalings=True)
    names = ("softmax_temperature", "global_scaling_weight", "scaling_pass_value")
    for i, values in enumerate([(0.5, 1.3, 0.0), (2.0, 0.7, 0.25)]):
        changed = dict(zip(names, map(jnp.float32, values), strict=True))
        adapter = adapter.replace(buffers=adapter.buffers | {CLASSIFIER: changed})
        model, again = scanned.compare(adapter, tmp_path / str(i))
        assert_same(again, adapter)
        config = model.peft_config["default"]
        np.testing.assert_allclose([getattr(config, n) for n in names], values, rtol=1e-7)


def test_layers_in_another_order(scanned, tmp_path):
    """An adapter made without names has its layers in its own order, and is written in torch's."""
    unordered = peftjax.ModuleNames(scanned.names.rules)
    adapter = scanned.xlora(3, unordered, layerwise_scalings=True)
    assert not adapter_in_torch_order(adapter, scanned.names)
    _, again = scanned.compare(adapter, tmp_path)
    assert adapter_in_torch_order(again, scanned.names)
    again = again.replace(config=adapter.config)  # no other program
    outs = [scanned.run(each.params, each)[1][0] for each in (adapter, again)]
    np.testing.assert_allclose(*outs, rtol=0, atol=TOLERANCE)
    state = peftjax.get_peft_model_state_dict(adapter, scanned.names)
    assert_same(peftjax.set_peft_model_state_dict(again, state, scanned.names), again)
    zero = adapter.replace(params=jax.tree.map(jnp.zeros_like, adapter.params))
    assert_same(peftjax.set_peft_model_state_dict(zero, state, scanned.names), adapter)


def test_trained_experts(scanned, tmp_path):
    """Experts that learn are written as they are now."""
    adapter = scanned.xlora(3, use_trainable_adapters=True)
    before = scanned.twins.fresh()
    peftjax.save_pretrained(tmp_path / "before", scanned.xlora(3), names=scanned.names)
    before = peft.PeftModel.from_pretrained(before, tmp_path / "before").eval()
    peftjax.save_pretrained(tmp_path / "after", adapter, names=scanned.names)
    after = peft.PeftModel.from_pretrained(scanned.twins.fresh(), tmp_path / "after").eval()
    wanted = scanned.twins.logits(after)
    assert np.abs(wanted - scanned.twins.logits(before)).max() > 0.1
    out, _ = scanned.adapted(scanned.twins.params, adapter, scanned.twins.ids)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=TOLERANCE)


def test_ties_in_the_first_pass(scanned, tmp_path, monkeypatch):
    """Of equal scalings torch's top-k keeps any, and we the first: told so, PEFT does the same."""
    assert torch.topk(torch.full((4,), 0.3), 2).indices.tolist() != [0, 1]

    def topk(x, k, dim):
        values, indices = torch.sort(x, dim=dim, descending=True, stable=True)
        return values[..., :k], indices[..., :k]

    monkeypatch.setattr(torch, "topk", topk)
    scanned.compare(scanned.xlora(4, top_k_lora=2, scaling_pass_value=0.3), tmp_path)


@pytest.mark.parametrize(("name", "layers"), [("listed", 3), ("scanned", 12)])
def test_other_models(name, layers, tmp_path, monkeypatch):
    """Layers of a list; and twelve of them, in the order of their numbers."""
    monkeypatch.setattr(models.decoders, "LAYERS", layers)
    model = Model(name, getattr(models, name)())
    adapter = model.xlora(3, layerwise_scalings=True)
    _, again = model.compare(adapter, tmp_path, gradients=False)
    assert_same(again, adapter)
    tail = peftjax.xlora_layers(adapter)[-1]
    assert tail == {"listed": "blocks.2.down_proj", "scanned": "layers.down[11]"}[name]


def test_what_torch_writes(scanned, tmp_path):
    """PEFT loses layers of the classifier and of experts: said so, and put right as we say."""
    adapter = scanned.xlora(3, xlora_depth=2, xlora_size=9)
    peftjax.save_pretrained(tmp_path / "ours", adapter, names=scanned.names)
    model, _ = scanned.in_torch(tmp_path / "ours")
    theirs = tmp_path / "theirs"
    model.save_pretrained(theirs)
    here = {"sites": scanned.twins.sites, "names": scanned.names}
    with pytest.raises(
        ValueError, match=r"torch PEFT loses layers(.|\n)*layers\.0\.weight"
    ) as error:
        peftjax.load_pretrained(theirs, **here)
    assert str(theirs) in str(error.value)

    # What the error says to do.
    state = model.state_dict()
    whole = {k: v for k, v in state.items() if "internal_xlora_classifier" in k}
    from safetensors.torch import save_file

    save_file(whole, theirs / "adapter_model.safetensors")
    again = peftjax.load_pretrained(theirs, **here)
    assert_same(again, adapter)
    again = peftjax.load_pretrained(
        theirs, **here, experts={1: tmp_path / "ours" / "experts" / "code"}
    )
    assert_same(again, adapter)

    # Of the experts beside it only those are whole that no other's number is in the names of.
    for expert, name in enumerate(NAMES[:3]):
        stored = load_file(theirs / str(expert) / "adapter_model.safetensors")
        assert any("base_layer" in key or key.endswith("norm.weight") for key in stored)
        with pytest.raises(ValueError, match="loses tensors of layers with the numbers of other"):
            peftjax.load_pretrained(theirs / str(expert), **here)
        with pytest.raises(ValueError, match="take the expert's own directory"):
            peftjax.load_pretrained(theirs, **here, experts={name: theirs / str(expert)})


def test_an_expert_that_torch_wrote_whole(scanned, tmp_path):
    """Only LoRA's tensors are taken of what PEFT writes as an expert."""
    sites, names = scanned.twins.sites, scanned.names
    config = peftjax.LoraConfig(r=2, lora_alpha=3, target_modules=["embed"])
    tables = [
        (each := peftjax.init_adapter(jax.random.key(0), config, sites)).replace(
            params=drawn(each.params, seed)
        )
        for seed in (20, 21)
    ]
    adapter = peftjax.init_xlora(
        jax.random.key(0),
        peftjax.XLoraConfig(layerwise_scalings=True),
        {"a": tables[0], "b": tables[1]},
        sites,
        names=names,
    )
    peftjax.save_pretrained(tmp_path / "ours", adapter, names=names)
    model, _ = scanned.in_torch(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for number, wanted in enumerate(tables):
        again = peftjax.load_pretrained(tmp_path / "theirs" / str(number), sites, names=names)
        assert_same(again, wanted)
    # The paths of the config are gone: then it is those beside it.
    (tmp_path / "ours").rename(tmp_path / "moved")
    (tmp_path / "moved" / "adapter_model.safetensors").rename(
        tmp_path / "theirs" / "adapter_model.safetensors"
    )
    assert_same(peftjax.load_pretrained(tmp_path / "theirs", sites, names=names), adapter)


def test_what_torch_cannot_read(scanned, tmp_path):
    """PEFT reads no expert on an output head, which lies in no module `model`."""
    config = peftjax.LoraConfig(r=2, target_modules=["head"])
    head = peftjax.init_adapter(jax.random.key(0), config, scanned.twins.sites)
    adapter = peftjax.init_xlora(
        jax.random.key(0),
        peftjax.XLoraConfig(),
        {"poems": scanned.expert(0), "head": head},
        scanned.twins.sites,
        names=scanned.names,
    )
    with pytest.raises(ValueError, match="lm_head: it does not lie right in a module `model`"):
        peftjax.save_pretrained(tmp_path, adapter, names=scanned.names)
    assert not list(tmp_path.iterdir())
    peftjax.save_pretrained(tmp_path, adapter, names=scanned.names, allow_foreign=True)
    with pytest.raises(ValueError, match=r"unexpected_keys=\['model\.model\.lm_head"):
        scanned.in_torch(tmp_path)
    again = peftjax.load_pretrained(tmp_path, scanned.twins.sites, names=scanned.names)
    assert_same(again, adapter)


def test_every_field_is_pefts(scanned, tmp_path):
    """The config has PEFT's fields, all of them and no other."""
    peftjax.save_pretrained(tmp_path, scanned.xlora(2), names=scanned.names)
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    assert ours.keys() == peft.XLoraConfig.from_pretrained(tmp_path).to_dict().keys()
