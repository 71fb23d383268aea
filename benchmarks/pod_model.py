"""A Llama-shaped decoder in linen, as one trains it on a pod: scanned, rematerialised, sharded.

Weights are split along "fsdp" for memory and along "tensor" for their products. Rows of a batch lie
along "fsdp", heads and the hidden units of the feedforward block along "tensor".
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a decoder; the defaults are Llama 3 8B's."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    hidden: int = 14336
    words: int = 128256
    block: int = 1024


# How each weight is split; the first axis of those in layers is their stack.
INTO_HEADS = {"kernel": P(None, "fsdp", "tensor", None)}
INTO_HIDDEN = {"kernel": P(None, "fsdp", "tensor")}
SPECS = {
    "embed": {"embedding": P("tensor", "fsdp")},
    "layers": {
        "attention_norm": {"scale": P()},
        "q": INTO_HEADS,
        "k": INTO_HEADS,
        "v": INTO_HEADS,
        "o": {"kernel": P(None, "tensor", None, "fsdp")},
        "mlp_norm": {"scale": P()},
        "gate": INTO_HIDDEN,
        "up": INTO_HIDDEN,
        "down": {"kernel": P(None, "tensor", "fsdp")},
    },
    "norm": {"scale": P()},
    "head": {"kernel": P("fsdp", "tensor")},
}


def constrained(x: Any, *spec: Any) -> Any:
    """Says where activations lie."""
    return lax.with_sharding_constraint(x, P(*spec))


def whole(variables: Any) -> Any:
    """A layer's weights as they are used: gathered along "fsdp", split along "tensor" alone.

    Without this a weight that is quantised is unpacked where it lies and sent in bfloat16.
    """

    def gathered(spec: P, x: Any) -> Any:
        return constrained(x, *[None if axis == "fsdp" else axis for axis in spec[1:]])

    return {"params": jax.tree.map(gathered, SPECS["layers"], variables["params"])}


def linear(name: str, features: Any, axis: Any = -1) -> nn.Module:
    dtype = jnp.bfloat16
    return nn.DenseGeneral(
        features, axis, use_bias=False, dtype=dtype, param_dtype=dtype, name=name
    )


def norm(name: str) -> nn.Module:
    return nn.RMSNorm(epsilon=1e-5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, name=name)


def rotated(x: Any, base: float = 500_000.0) -> Any:
    """Rotary positions, for (batch, sequence, heads, head size)."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * base ** -(jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attention(q: Any, k: Any, v: Any, block: int) -> Any:
    """Causal attention, a block of queries after the other: scores of all pairs are never held."""
    rows, length, heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(rows, length // block, block, groups, heads // groups, size).swapaxes(0, 1)

    @jax.checkpoint
    def some(own: Any) -> Any:
        start, q = own
        scores = jnp.einsum("bqgrh,bkgh->bgrqk", q, k, preferred_element_type=jnp.float32)
        past = start + jnp.arange(block)[:, None] >= jnp.arange(length)
        scores = jnp.where(past, scores * size**-0.5, -1e30)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        return jnp.einsum("bgrqk,bkgh->bqgrh", weights, v)

    out = lax.map(some, (jnp.arange(0, length, block), q))
    return out.swapaxes(0, 1).reshape(rows, length, heads, size)


class Block(nn.Module):
    """Grouped-query attention and a gated feedforward block."""

    shape: Shape

    @nn.compact
    def __call__(self, x: Any, _: None) -> tuple[Any, None]:
        own = self.shape
        h = norm("attention_norm")(x)
        q = rotated(linear("q", (own.heads, own.head_size))(h))
        k = rotated(linear("k", (own.kv_heads, own.head_size))(h))
        v = linear("v", (own.kv_heads, own.head_size))(h)
        q, k, v = (constrained(each, "fsdp", None, "tensor", None) for each in (q, k, v))
        h = attention(q, k, v, min(own.block, x.shape[1]))
        h = constrained(h, "fsdp", None, "tensor", None)
        x = x + linear("o", own.width, axis=(-2, -1))(h)
        x = constrained(x, "fsdp", None, None)
        h = norm("mlp_norm")(x)
        gate = linear("gate", own.hidden)(h)
        up = linear("up", own.hidden)(h)
        h = constrained(nn.silu(gate) * up, "fsdp", None, "tensor")
        x = x + linear("down", own.width)(h)
        return constrained(x, "fsdp", None, None), None


class Decoder(nn.Module):
    """Token ids to logits; ``shift`` is added to the embeddings."""

    shape: Shape = Shape()

    @nn.compact
    def __call__(self, ids: Any, shift: Any = None, hidden: bool = False) -> Any:
        own = self.shape
        dtype = jnp.bfloat16
        x = nn.Embed(own.words, own.width, dtype=dtype, param_dtype=dtype, name="embed")(ids)
        x = constrained(x if shift is None else x + shift, "fsdp", None, None)
        layers = nn.scan(
            nn.remat(nn.map_variables(Block, "params", whole, init=True), prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=own.layers,
        )
        x, _ = layers(own, name="layers")(x, None)
        x = norm("norm")(x)
        if hidden:
            return x
        return constrained(linear("head", own.words)(x), "fsdp", None, "tensor")


def loss(logits: Any, ids: Any) -> Any:
    """Mean cross-entropy of every next token."""
    logits = logits[:, :-1].astype(jnp.float32)
    # A one-hot product, since the words are split: a lookup would gather them.
    hot = jax.nn.one_hot(ids[:, 1:], logits.shape[-1], dtype=logits.dtype)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits * hot, axis=-1))
