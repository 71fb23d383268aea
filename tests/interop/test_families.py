"""The names of transformers' Flax models against the torch models that they are twins of."""

import dataclasses
import functools
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import redraw

import peftjax
from peftjax.interop.base import base_state_dict
from peftjax.interop.families import module_names
from peftjax.interop.names import ModuleNames
from peftjax.trees import leaf_paths

HOW = "transformers' torch models are the oracle here: pip install -e '.[interop]'"
torch = pytest.importorskip("torch", reason=HOW)
transformers = pytest.importorskip("transformers", reason=HOW)
Conv1D = pytest.importorskip("transformers.pytorch_utils", reason=HOW).Conv1D
flax_classes = pytest.importorskip("transformers.models.auto.modeling_flax_auto", reason=HOW)
torch.set_num_threads(1)  # two processes of tests share the cores

SEQUENCE = {"vocab_size": 50, "max_position_embeddings": 16}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2}
WIDTHS = {**HEADS, "hidden_size": 16, "intermediate_size": 24}
BERT = {**SEQUENCE, **WIDTHS, "num_labels": 3}
GPT2 = {**SEQUENCE, "n_embd": 16, "n_layer": 2, "n_head": 2}
LLAMA = {**BERT, "num_key_value_heads": 1}
IMAGE = {**WIDTHS, "image_size": 8, "patch_size": 4, "num_labels": 3}
TEXT = {**BERT, "eos_token_id": 2}
BART = {
    **SEQUENCE,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
DISTIL = {**SEQUENCE, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "num_labels": 3}

# For each family the sizes of a small model and the classes to hold against torch's; behind
# some stands whether the head is a matrix of its own, not the table of the embeddings, or both.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "albert": (
        {**BERT, "embedding_size": 8, "num_hidden_groups": 2},
        "AlbertForSequenceClassification AlbertForMaskedLM/both",
    ),
    "bart": (
        BART,
        "BartForConditionalGeneration/both BartForSequenceClassification BartForCausalLM",
    ),
    "bert": (
        BERT,
        "BertForSequenceClassification BertForPreTraining BertForMaskedLM/both",
    ),
    "big_bird": (
        {**BERT, "attention_type": "original_full"},
        "BigBirdForSequenceClassification BigBirdForPreTraining",
    ),
    "blenderbot": (BART, "BlenderbotForConditionalGeneration"),
    "blenderbot-small": (BART, "BlenderbotSmallForConditionalGeneration"),
    "bloom": (
        {"vocab_size": 50, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        "BloomForCausalLM/both",
    ),
    "clip": (
        {
            "text_config": TEXT,
            "vision_config": {**IMAGE, "num_hidden_layers": 3},
            "projection_dim": 12,
        },
        "CLIPModel",
    ),
    "clip_text_model": (TEXT, "CLIPTextModel CLIPTextModelWithProjection"),
    "clip_vision_model": (IMAGE, "CLIPVisionModel"),
    "dinov2": (IMAGE, "Dinov2ForImageClassification"),
    "distilbert": (
        DISTIL,
        "DistilBertForSequenceClassification DistilBertForMaskedLM/both",
    ),
    "electra": (
        {**BERT, "embedding_size": 8},
        "ElectraForPreTraining ElectraForSequenceClassification ElectraForMaskedLM/both",
    ),
    "gemma": ({**LLAMA, "head_dim": 8}, "GemmaForCausalLM/both"),
    "gpt2": (GPT2, "GPT2Model GPT2LMHeadModel/both"),
    "gpt_neo": (
        {
            **SEQUENCE,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
        "GPTNeoForCausalLM/both",
    ),
    "gptj": ({**GPT2, "rotary_dim": 4}, "GPTJForCausalLM/untied"),
    "llama": (LLAMA, "LlamaModel LlamaForCausalLM/untied"),
    "marian": (BART, "MarianMTModel"),
    "mbart": (BART, "MBartForConditionalGeneration"),
    "mistral": (LLAMA, "MistralForCausalLM/untied"),
    "opt": (
        {**SEQUENCE, **HEADS, "hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 8},
        "OPTForCausalLM/both",
    ),
    "pegasus": (BART, "PegasusForConditionalGeneration"),
    "roberta": (BERT, "RobertaForSequenceClassification RobertaForMaskedLM/both"),
    "roberta-prelayernorm": (BERT, "RobertaPreLayerNormForMaskedLM"),
    # The Flax model knows no embeddings of another width.
    "roformer": (
        {**BERT, "embedding_size": 16},
        "RoFormerForSequenceClassification RoFormerForMaskedLM",
    ),
    "vit": (IMAGE, "ViTModel ViTForImageClassification"),
    "whisper": (
        {**BART, "num_mel_bins": 6, "max_source_positions": 8, "max_target_positions": 16},
        "WhisperForConditionalGeneration/both WhisperForAudioClassification",
    ),
    "xglm": (
        {**SEQUENCE, "d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24},
        "XGLMForCausalLM/both",
    ),
    "xlm-roberta": (BERT, "XLMRobertaForSequenceClassification XLMRobertaForMaskedLM"),
}
CASES = [
    (family, kind, tied)
    for family, (_, kinds) in FAMILIES.items()
    for kind, _, head in (kind.partition("/") for kind in kinds.split())
    for tied in {"": [True], "untied": [False], "both": [True, False]}[head]
]


def each(cases: list[tuple[str, str, bool]]) -> pytest.MarkDecorator:
    ids = [kind if tied else f"{kind}-untied" for _, kind, tied in cases]
    return pytest.mark.parametrize(("family", "kind", "tied"), cases, ids=ids)


@pytest.fixture(autouse=True)
def as_jax_comes() -> Iterator[None]:
    """transformers relies on JAX's ordinary promotion, which the other tests forbid."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@dataclasses.dataclass(frozen=True)
class Twins:
    """A Flax model, redrawn, and a torch model that has still to get its weights."""

    flax: Any
    torch: Any
    inputs: dict[str, np.ndarray]
    names: ModuleNames
    params: Any
    sites: peftjax.Sites

    def apply(self, params: Any, inputs: dict[str, Any]) -> dict[str, jax.Array]:
        outputs = self.flax(**inputs, params=params)
        return {name: out for name, out in outputs.items() if isinstance(out, jax.Array)}


@functools.cache
def twins(family: str, kind: str, tied: bool) -> Twins:
    sizes, _ = FAMILIES[family]
    config = transformers.CONFIG_MAPPING[family](**sizes, tie_word_embeddings=tied)
    flax = getattr(transformers, f"Flax{kind}")(config, _do_init=False)
    params = redraw(flax.params_shape_tree)
    found = Twins(
        flax=flax,
        torch=getattr(transformers, kind)(config).eval(),
        inputs=inputs_of(config, kind),
        names=module_names(config.model_type),
        params=params,
        sites=peftjax.Sites(()),
    )
    return dataclasses.replace(found, sites=peftjax.find_sites(found.apply, params, found.inputs))


def inputs_of(config: Any, kind: str) -> dict[str, np.ndarray]:
    """Inputs under the names that both sides have for them."""
    rng = np.random.default_rng(5)
    ids = rng.integers(5, 50, (2, 7), dtype=np.int32)
    ids[:, -1] = 2  # where BART's classifier looks
    features = rng.normal(size=(2, 6, 16)).astype(np.float32)
    pixels = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    family = config.model_type
    if family in ("vit", "dinov2", "clip_vision_model"):
        return {"pixel_values": pixels}
    if family == "whisper":
        inputs = {"input_features": features}
    elif family == "clip":
        inputs = {"input_ids": ids, "pixel_values": pixels}
    else:
        inputs = {"input_ids": ids}
    if "Conditional" in kind or family == "marian":
        inputs["decoder_input_ids"] = ids[:, ::-1].copy()
    if family == "electra":
        inputs["token_type_ids"] = np.zeros_like(ids)  # else Flax takes ones, torch zeros
    return inputs


def torch_shape(site: peftjax.Site, inputs_first: bool) -> tuple[int, ...]:
    r"""The shape of a weight in torch: (out, in, \*taps), of Conv1D and of tables (in, out)."""
    taps = tuple(site.shape[axis] for axis in site.tap_axes)
    channels = site.in_size // math.prod(taps)
    if inputs_first or site.kind == "lookup":
        return channels, site.out_size
    return site.out_size, channels, *taps


@each(CASES)
def test_every_array_is_a_tensor_of_torch(family: str, kind: str, tied: bool) -> None:
    both = twins(family, kind, tied)
    modules, tensors = dict(both.torch.named_modules()), both.torch.state_dict()
    first = {name for name in modules if both.names.keeps_inputs_first(name)}
    assert first == {name for name, module in modules.items() if isinstance(module, Conv1D)}
    for site in both.sites.values():
        name = both.names.to_torch(site.name)
        assert tuple(modules[name].weight.shape) == torch_shape(site, name in first), name

    renamed = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    keys = []
    for leaf in both.sites.leaves:
        module = both.names.to_torch(leaf.module) + "." if leaf.module else ""
        keys.append(module + renamed.get(leaf.leaf_name, leaf.leaf_name))
        if leaf.site is None:
            assert tuple(tensors[keys[-1]].shape) == leaf.shape, leaf.path
    assert len(set(keys)) == len(keys) > len(both.sites) > 0


@each(CASES)
def test_torch_computes_the_same_with_the_weights(family: str, kind: str, tied: bool) -> None:
    both = twins(family, kind, tied)
    state = base_state_dict(both.params, both.sites, both.names)
    loaded = both.torch.load_state_dict(jax.tree.map(torch.tensor, state), strict=False)
    assert not loaded.unexpected_keys
    tensors = both.torch.state_dict(keep_vars=True)
    known = {id(tensors[key]) for key in state}
    for key in loaded.missing_keys:
        # Tied to one that was loaded, or constant.
        assert id(tensors[key]) in known or not tensors[key].requires_grad, key

    inputs = {name: torch.tensor(array) for name, array in both.inputs.items()}
    with torch.no_grad():
        outputs = both.torch(**inputs).items()
    there = {name: out.numpy() for name, out in outputs if isinstance(out, torch.Tensor)}
    here = both.apply(both.params, both.inputs)
    assert here.keys() == there.keys() != set()
    for name, expected in there.items():
        atol = 1e-4 * np.abs(expected).max()
        assert atol > 1e-6, name
        np.testing.assert_allclose(here[name], expected, atol=atol, rtol=0, err_msg=name)


def is_list(tree: Any) -> bool:
    """Whether a tree holds a list of layers, by their numbers."""
    return isinstance(tree, dict) and set(tree) == {str(n) for n in range(len(tree))}


def stack(tree: Any) -> Any:
    """A params tree with the arrays of each list of layers stacked."""
    if is_list(tree):
        layers = [tree[str(n)] for n in range(len(tree))]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    return {key: stack(own) for key, own in tree.items()} if isinstance(tree, dict) else tree


def unstack(tree: Any, like: Any) -> Any:
    """A tree that ``stack`` made, as it was."""
    if is_list(like):
        return {n: jax.tree.map(lambda array, n=n: array[int(n)], tree) for n in like}
    if isinstance(like, dict):
        return {key: unstack(tree[key], own) for key, own in like.items()}
    return tree


# One class for each family. ALBERT's layers share their weights: none are stacked.
@each(list({case[0]: case for case in CASES if case[0] != "albert"}.values()))
def test_stacked_layers_are_modules_of_torch(family: str, kind: str, tied: bool) -> None:
    both = twins(family, kind, tied)
    params = stack(both.params)
    assert len(leaf_paths(params)) < len(leaf_paths(both.params))

    def apply_fn(params: Any, inputs: dict[str, Any]) -> dict[str, jax.Array]:
        return both.apply(unstack(params, both.params), inputs)

    sites = peftjax.find_sites(apply_fn, params, both.inputs)
    found = base_state_dict(params, sites, both.names)
    expected = base_state_dict(both.params, both.sites, both.names)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key], tensor, err_msg=key)


def every_kind(family: str) -> list[str]:
    """All classes of a family that both sides have, those for other tasks too."""
    tables = [own for name, own in vars(flax_classes).items() if re.match("FLAX_.*_NAMES", name)]
    others = {table[family].removeprefix("Flax") for table in tables if family in table}
    kinds = others | {kind for own, kind, _ in CASES if own == family}
    return sorted(kind for kind in kinds if hasattr(transformers, kind))


@pytest.mark.parametrize(
    ("family", "more"),
    [*((family, {}) for family in FAMILIES), ("dinov2", {"use_swiglu_ffn": True})],
    ids=[*FAMILIES, "dinov2-swiglu"],
)
def test_the_order_is_that_of_torch(family: str, more: dict[str, Any]) -> None:
    more = {"num_labels": 2, "is_decoder": True, "add_cross_attention": True, **more}
    config = transformers.CONFIG_MAPPING[family](**{**FAMILIES[family][0], **more})
    layers = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, Conv1D)
    for kind in every_kind(family):
        model = getattr(transformers, kind)(config)
        expected = [name for name, module in model.named_modules() if isinstance(module, layers)]
        shuffled = random.Random(7).sample(expected, len(expected))
        assert sorted(shuffled, key=module_names(family).place) == expected, kind


def test_an_unknown_family_lists_the_known_ones() -> None:
    known = ", ".join(FAMILIES)
    with pytest.raises(ValueError, match=rf"'t5', only for {known};.*ModuleNames\(\)"):
        module_names("t5")
