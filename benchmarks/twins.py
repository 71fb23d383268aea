"""Models of transformers that exist in torch and in Flax, with the same weights in both.

A few layers of BERT base's width, and of TinyLlama's; a quick one is smaller. Torch runs them as
its users do: eager, with its fused attention.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import peftjax

transformers.logging.set_verbosity_error()


@dataclasses.dataclass(frozen=True)
class Twin:
    """One model in both frameworks, and a batch for it.

    Attributes:
      name: what it is called in tables.
      torch: the model in torch, every weight frozen.
      module: the same model in linen.
      inputs: what the module takes, out of ids.
      apply_fn: the module as a function, logits out of ``params`` and ids.
      shifted: as ``apply_fn``, with a vector added to the embedding of every token.
      params: the weights, as JAX has them.
      sites: where adapters can be.
      names: the rules between the two's names.
      ids: the tokens, (rows, length).
      labels: what is to be predicted.
      targets: modules to adapt, in torch's names, by what the choice is called.
    """

    name: str
    torch: Any
    module: nn.Module
    inputs: Callable[[Any], tuple[Any, ...]]
    apply_fn: Callable[..., Any]
    shifted: Callable[..., Any]
    params: Any
    sites: peftjax.Sites
    names: peftjax.ModuleNames
    ids: np.ndarray
    labels: np.ndarray
    targets: dict[str, list[str]]

    def loss(self, logits: Any) -> jax.Array:
        """Mean cross-entropy, in JAX."""
        logits = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(logits, self.labels[..., None], axis=-1).mean()

    def torch_loss(self, model: Any, **inputs: Any) -> Any:
        """The same in torch, of the model or of one that PEFT made of it."""
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, -2), torch.from_numpy(self.labels).flatten()
        )


def bert(quick: bool) -> Twin:
    """A classifier of tokens, of 3 labels; 4 layers of BERT base's width."""
    layers, shape = (2, (2, 128)) if quick else (4, (8, 128))
    config = transformers.BertConfig(
        hidden_size=768,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=3072,
        vocab_size=8000,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    model = transformers.BertForTokenClassification(config)
    flax = transformers.FlaxBertForTokenClassification(config, _do_init=False)
    labels = np.random.default_rng(1).integers(0, 3, shape)

    def inputs(ids):
        zeros, positions = jnp.zeros_like(ids), jnp.arange(ids.shape[1])[None] + 0 * ids
        return ids, jnp.ones_like(ids), zeros, positions, None

    targets = {"query, value": ["query", "value"], "all linear": ["query", "key", "value", "dense"]}
    return _twin("BERT", model, flax, inputs, "word_embeddings", shape, labels, targets)


def llama(quick: bool) -> Twin:
    """A language model; 2 layers as wide as TinyLlama 1.1B, with grouped queries."""
    width, shape = (1024, (1, 256)) if quick else (2048, (2, 256))
    config = transformers.LlamaConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 512,
        intermediate_size=11 * width // 4,
        vocab_size=8000,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    flax = transformers.FlaxLlamaForCausalLM(config, _do_init=False)
    labels = np.random.default_rng(1).integers(0, config.vocab_size, shape)

    def inputs(ids):
        return ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None] + 0 * ids

    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = {"query, value": ["q_proj", "v_proj"], "all linear": linear}
    return _twin("Llama", model, flax, inputs, "embed_tokens", shape, labels, targets)


def _twin(
    name: str,
    model: Any,
    flax: Any,
    inputs: Callable[[Any], tuple[Any, ...]],
    table: str,
    shape: tuple[int, int],
    labels: np.ndarray,
    targets: dict[str, list[str]],
) -> Twin:
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def apply_fn(params: Any, ids: Any) -> Any:
        return flax.module.apply({"params": params}, *inputs(ids)).logits

    def shifted(shift: Any, params: Any, ids: Any) -> Any:
        def add(call, args, kwargs, context):
            out = call(*args, **kwargs)
            here = context.module.name == table and context.method_name == "__call__"
            return out + shift if here else out

        with nn.intercept_methods(add):
            return apply_fn(params, ids)

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        loaded = type(flax).from_pretrained(directory, from_pt=True)
    params = jax.tree.map(jnp.asarray, loaded.params)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, shape)
    sites = peftjax.find_sites(apply_fn, params, jnp.asarray(ids))
    names = peftjax.module_names(model.config.model_type)
    return Twin(
        name=name,
        torch=model,
        module=flax.module,
        inputs=inputs,
        apply_fn=apply_fn,
        shifted=shifted,
        params=params,
        sites=sites,
        names=names,
        ids=ids,
        labels=labels,
        targets=targets,
    )
