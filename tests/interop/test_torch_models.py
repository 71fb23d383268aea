"""Adapters of whole models between peftjax and torch PEFT, in both directions.

Transformers' BERT, GPT-2 and Llama, each with its Flax twin; and Llama once more as decoders of our
own. Weights and adapters have a standard deviation of 0.3, and logits a scale of about 5.
"""

import copy
import functools
import json
import re
import types
import warnings

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peftjax
from peftjax.methods.adalora import prune_triplets

HOW = "torch PEFT is the oracle here: pip install -e '.[interop]'"
torch = pytest.importorskip("torch", reason=HOW)
peft = pytest.importorskip("peft", reason=HOW)
transformers = pytest.importorskip("transformers", reason=HOW)
safetensors = pytest.importorskip("safetensors.numpy")
torch.set_num_threads(1)  # two processes of tests share the cores
transformers.logging.set_verbosity_error()

# transformers says that its Flax models are no longer kept up.
pytestmark = pytest.mark.filterwarnings("ignore:.*(Flax|flax|JAX|jax).*")

TOLERANCE = 1e-4
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}


class Twins:
    """One model in torch and in JAX, with the same weights.

    Attributes:
      torch: torch's model.
      apply_fn: the same function in JAX, of ``params``.
      names: the rules between their names.
      parts: what the modules are called that the tests adapt.
    """

    def __init__(self, model, apply_fn, params, names, head, **parts):
        self.torch, self.apply_fn, self.names = model.eval(), apply_fn, names
        self.parts = types.SimpleNamespace(**parts)
        self.ids = np.random.default_rng(1).integers(0, 50, (2, 7))
        self.params = drawn(params, seed=0)
        self.sites = peftjax.find_sites(apply_fn, self.params, self.ids)
        # Logits at a scale of about 5, at which an absolute tolerance means something.
        scale = 5 / np.abs(apply_fn(self.params, self.ids)).max()
        leaf = functools.reduce(lambda tree, name: tree[name], head, self.params)
        leaf["kernel"] = leaf["kernel"] * scale
        if "bias" in leaf:
            leaf["bias"] = leaf["bias"] * scale
        weights = peftjax.base_state_dict(self.params, self.sites, names)
        model.load_state_dict({key: torch.tensor(x) for key, x in weights.items()})
        self.adapted = jax.jit(peftjax.adapt(apply_fn))

    def logits(self, model=None):
        with torch.no_grad():
            out = (model or self.torch)(input_ids=torch.tensor(self.ids))
        return out.logits.numpy()

    def logits_here(self, adapter):
        return np.asarray(self.adapted(self.params, adapter, self.ids))

    def fresh(self):
        return copy.deepcopy(self.torch)


def drawn(tree, seed):
    """A tree of the same shapes with normal numbers of std 0.3."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), tree)


def of_transformers(name, config, head):
    model = getattr(transformers, name)(config)
    flax = getattr(transformers, f"Flax{name}")(config)
    apply_fn = lambda params, ids: flax(ids, params=params).logits  # noqa: E731
    names = peftjax.module_names(config.model_type)
    return functools.partial(Twins, model, apply_fn, flax.params, names, head)


def bert():
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**SIZES, **off, num_labels=5)
    make = of_transformers("BertForSequenceClassification", config, ["classifier"])
    ends = {"targets": ["query", "dense"], "inner": ["dense"], "save": ["classifier"]}
    return make(linear=["query", "dense"], table=["word_embeddings", "value"], **ends)


def gpt2():
    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 20}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **off, tie_word_embeddings=False)
    make = of_transformers("GPT2LMHeadModel", config, ["lm_head"])
    ends = {"targets": ["c_attn", "c_proj"], "inner": ["c_proj"], "save": ["ln_f"]}
    ends["table"] = ["wte", "lm_head"]
    # The only torch.nn.Linear of the model, and PEFT's LoHa and HRA know nothing else.
    return make(linear=["lm_head"], **ends)


def llama_config(**sizes):
    sizes = {**SIZES, "num_key_value_heads": 2, **sizes}
    return transformers.LlamaConfig(**sizes, attention_bias=False, tie_word_embeddings=False)


LLAMA = {
    "targets": ["q_proj", "v_proj", "down_proj"],
    "inner": ["down_proj"],
    "save": ["lm_head"],
    "linear": ["q_proj", "v_proj", "down_proj"],
    "table": ["embed_tokens", "lm_head", "k_proj"],
}


def llama():
    return of_transformers("LlamaForCausalLM", llama_config(), ["lm_head"])(**LLAMA)


def own_decoder(apply_fn, params, names, **parts):
    config = transformers.LlamaConfig(
        **{**SIZES, "num_hidden_layers": decoders.LAYERS, "num_key_value_heads": 2},
        rms_norm_eps=1e-6,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    return Twins(model, apply_fn, params, names, ["head"], **parts)


def scanned():
    model = decoders.Scanned()
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4), int))["params"]
    ends = {"targets": ["q", "v", "down"], "inner": ["down"], "save": ["head", "norm2"]}
    here = {**ends, "linear": ["q", "o", "down"], "table": ["embed", "head", "k"]}
    return own_decoder(peftjax.from_linen(model), params, decoders.SCANNED_NAMES, **here)


def listed():
    apply_fn, params = peftjax.from_nnx(decoders.Listed(nnx.Rngs(0)))
    return own_decoder(
        apply_fn,
        params,
        decoders.LISTED_NAMES,
        **{**LLAMA, "save": ["head"], "table": ["embed", "head", "k_proj"]},
    )


FAMILIES = {each.__name__: each for each in (bert, gpt2, llama, scanned, listed)}


@pytest.fixture(scope="module", autouse=True)
def as_users_have_it():
    """transformers' Flax models count on NumPy's promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def twins(request, as_users_have_it):
    return FAMILIES[request.param]()


LORA = {"r": 3, "lora_alpha": 5}
ADALORA = {"init_r": 4, "target_r": 2, "lora_alpha": 5, "total_step": 10}


def patterns(parts):
    """A rank and an alpha of their own for some modules."""
    first, *_, last = parts.targets
    return {"rank_pattern": {first: 2}, "alpha_pattern": {last: 7}}


# For each method its config and, of the names that a model's parts go by, its fields.
METHODS = {
    "lora": ("LoraConfig", lambda p: {**LORA, "target_modules": p.targets, **patterns(p)}),
    "lora_saving": (
        "LoraConfig",
        lambda p: {
            **LORA,
            "target_modules": p.targets,
            "modules_to_save": p.save,
            "bias": "all",
            "use_rslora": True,
        },
    ),
    "lora_table": ("LoraConfig", lambda p: {**LORA, "target_modules": p.table, "use_dora": True}),
    "dora": (
        "LoraConfig",
        lambda p: {**LORA, "target_modules": p.targets, "use_dora": True, "bias": "lora_only"},
    ),
    "pissa": (
        "LoraConfig",
        lambda p: {**LORA, "target_modules": p.targets, "init_lora_weights": "pissa"},
    ),
    "olora": (
        "LoraConfig",
        lambda p: {**LORA, "target_modules": p.linear, "init_lora_weights": "olora"},
    ),
    "ia3": (
        "IA3Config",
        lambda p: {
            "target_modules": p.targets,
            "feedforward_modules": p.inner,
            "modules_to_save": p.save,
        },
    ),
    "loha": ("LoHaConfig", lambda p: {"r": 3, "alpha": 30, "target_modules": p.linear}),
    "hra": ("HRAConfig", lambda p: {"r": 4, "target_modules": p.linear, "bias": "hra_only"}),
    "adalora": (
        "AdaLoraConfig",
        lambda p: {**ADALORA, "target_modules": p.targets, "bias": "all"},
    ),
    "adalora_pruned": ("AdaLoraConfig", lambda p: {**ADALORA, "target_modules": p.targets}),
}

# torch has its own names for what our decoders call otherwise.
TORCH_PARTS = {"scanned": {**LLAMA, "save": ["lm_head", "post_attention_layernorm"]}}
TORCH_PARTS["listed"] = LLAMA


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def config_of(module, method, parts):
    name, fields = METHODS[method]
    return getattr(module, name)(**fields(parts))


def torch_parts(request, twins):
    own = TORCH_PARTS.get(request.node.callspec.params["twins"])
    return types.SimpleNamespace(**own) if own else twins.parts


def files(directory):
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, safetensors.load_file(directory / "adapter_model.safetensors")


def draw_torch(model):
    """Draws what an adapter of torch's trains with std 0.3; returns where the numbers came from."""
    rng = np.random.default_rng(2)
    for name, tensor in model.named_parameters():
        if "magnitude" in name:
            tensor.data *= torch.tensor(rng.uniform(0.5, 1.5, tensor.shape), dtype=tensor.dtype)
        elif tensor.requires_grad:
            tensor.data = torch.tensor(rng.normal(0, 0.3, tensor.shape), dtype=tensor.dtype)
    return rng


def with_torch_adapter(twins, method, parts):
    """Torch's model with an adapter of random numbers, as PEFT makes it."""
    model = peft.get_peft_model(twins.fresh(), config_of(peft, method, parts)).eval()
    rng = draw_torch(model)
    if method == "adalora_pruned":
        kept = {}
        for name, tensor in model.named_parameters():
            if name.endswith("lora_E.default"):
                mask = rng.integers(0, 2, tensor.shape).astype(bool)
                tensor.data *= torch.tensor(mask)
                path = name.removeprefix("base_model.model.").removesuffix(".default")
                kept[path] = mask[:, 0].tolist()
        model.peft_config["default"].rank_pattern = kept
    return model


@pytest.mark.filterwarnings("ignore:(Setting `save_embedding|fan_in_fan_out|.*invalid shape)")
def test_from_torch(twins, method, request, tmp_path):
    """An adapter that torch PEFT made and saved computes the same here, and is written the same."""
    model = with_torch_adapter(twins, method, torch_parts(request, twins))
    model.save_pretrained(tmp_path / "theirs")
    wanted = twins.logits(model)

    adapter = peftjax.load_pretrained(
        tmp_path / "theirs", twins.sites, twins.params, names=twins.names
    )
    assert np.abs(wanted - twins.logits()).max() > 0.1
    np.testing.assert_allclose(twins.logits_here(adapter), wanted, rtol=0, atol=TOLERANCE)

    peftjax.save_pretrained(tmp_path / "ours", adapter, names=twins.names)
    (config, tensors), (again, same) = (files(tmp_path / name) for name in ("theirs", "ours"))
    if method in ("pissa", "olora"):
        # PEFT also writes what the start left of an adapted head, which follows from the base.
        tensors = {key: x for key, x in tensors.items() if "base_layer" not in key}
    # With bias="all" PEFT writes the biases of modules_to_save three times, and reads one of them.
    copies = (".original_module.", ".modules_to_save.")
    tensors = {key: x for key, x in tensors.items() if not any(part in key for part in copies)}
    assert again.keys() == config.keys()
    assert same.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (same[key].shape, same[key].dtype) == (tensor.shape, tensor.dtype)
        assert same[key].tobytes() == tensor.tobytes(), key


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_to_torch(twins, method, tmp_path):
    """An adapter made here loads in torch PEFT without a word, and computes the same there."""
    config = config_of(peftjax, method, twins.parts)
    adapter = peftjax.init_adapter(jax.random.key(0), config, twins.sites, twins.params)
    lengths = {m: own.get("lora_magnitude_vector") for m, own in adapter.params.items()}
    adapter = adapter.replace(params=drawn(adapter.params, seed=3))
    for module, length in lengths.items():
        if length is not None:
            changed = length * (1 + adapter.params[module]["lora_magnitude_vector"])
            adapter.params[module]["lora_magnitude_vector"] = changed
    if method == "adalora_pruned":
        rng = np.random.default_rng(4)
        kept = {
            name: rng.integers(0, 2, (*site.stack_shape, 4)).astype(bool)
            for name, site in adapter.sites.items()
        }
        adapter = prune_triplets(adapter, kept)
    wanted = twins.logits_here(adapter)
    peftjax.save_pretrained(tmp_path, adapter, names=twins.names)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT says these two of its own files as well: of models with transformers' Conv1D, and of
        # any rank_pattern of AdaLoRA, whose keys it takes for those of LoRA.
        warnings.filterwarnings(
            "ignore", message="fan_in_fan_out|.*rank_pattern keys did not match"
        )
        model = peft.PeftModel.from_pretrained(twins.fresh(), tmp_path, is_trainable=True).eval()
    assert np.abs(wanted - twins.logits()).max() > 0.1
    np.testing.assert_allclose(twins.logits(model), wanted, rtol=0, atol=TOLERANCE)

    _, written = files(tmp_path)
    there = {name.replace(".default", "") for name in model.state_dict()}
    trained = {n.replace(".default", "") for n, p in model.named_parameters() if p.requires_grad}
    # In files PEFT leaves out its wrapper of the modules to save and the end of a name of DoRA's.
    short = re.compile(r"\.modules_to_save|(?<=magnitude_vector)\.weight")
    there = {short.sub("", name) for name in there}
    trained = {short.sub("", name) for name in trained if ".original_module" not in name}
    assert not written.keys() - there, "unexpected"
    assert not trained - written.keys(), "missing"


def test_peft_cannot_run_loha_and_hra_on_conv1d(tmp_path):
    twins = gpt2()
    for method in ("loha", "hra"):
        parts = types.SimpleNamespace(**{**vars(twins.parts), "linear": ["c_attn"]})
        with pytest.raises(TypeError, match="not supported"):
            peft.get_peft_model(twins.fresh(), config_of(peft, method, parts))
        config = config_of(peftjax, method, parts)
        adapter = peftjax.init_adapter(jax.random.key(0), config, twins.sites, twins.params)
        with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn: it is transformers' Conv1D"):
            peftjax.save_pretrained(tmp_path, adapter, names=twins.names)
        assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_lora_on_a_grouped_convolution_is_no_change_of_its_kernel(tmp_path):
    """PEFT's A sees the channels of all groups, so nothing here computes what it computes."""
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2, bias=False))
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path)

    def apply_fn(params, x):
        dims = ("NCHW", "OIHW", "NCHW")
        kernel = params["0"]["kernel"]
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=dims, feature_group_count=2
        )

    params = {"0": {"kernel": jnp.ones((6, 2, 3, 3))}}
    sites = peftjax.find_sites(apply_fn, params, jnp.ones((1, 4, 5, 5)))
    with pytest.raises(ValueError, match=r"0: it is a grouped convolution, where A .* groups"):
        peftjax.load_pretrained(tmp_path, sites)


def test_a_task_for_which_peft_saves_whole_modules(tmp_path):
    """For a classifier PEFT saves modules named so, whole and whether they are there or not."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 49}
    config = transformers.RobertaConfig(**{**SIZES, "max_position_embeddings": 60}, **off)
    make = of_transformers("RobertaForSequenceClassification", config, ["classifier", "out_proj"])
    twins = make(targets=["query", "value"])
    model = peft.get_peft_model(twins.fresh(), peft.LoraConfig(**LORA, task_type="SEQ_CLS")).eval()
    draw_torch(model)
    model.save_pretrained(tmp_path / "theirs")
    adapter = peftjax.load_pretrained(tmp_path / "theirs", twins.sites, names=twins.names)
    assert adapter.config.modules_to_save == ("classifier",)
    assert set(adapter.params) >= {"classifier.dense", "classifier.out_proj"}
    wanted = twins.logits(model)
    np.testing.assert_allclose(twins.logits_here(adapter), wanted, rtol=0, atol=TOLERANCE)

    peftjax.save_pretrained(tmp_path / "ours", adapter, names=twins.names)
    again = peft.PeftModel.from_pretrained(twins.fresh(), tmp_path / "ours").eval()
    assert isinstance(again, peft.PeftModelForSequenceClassification)
    np.testing.assert_allclose(twins.logits(again), wanted, rtol=0, atol=TOLERANCE)
