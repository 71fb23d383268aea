"""The Llama architecture written twice here, to be held against transformers' torch model.

Once in linen with its layers scanned and its projections keeping heads as axes of their own, once
in NNX with a list of layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import peftjax

WIDTH, HEADS, KV_HEADS, INNER, LAYERS, VOCAB = 32, 4, 2, 40, 3, 50
HEAD = WIDTH // HEADS


def rotated(x):
    """Rotary positions for (batch, seq, heads, head_dim)."""
    steps = jnp.arange(x.shape[1])
    rates = 10000.0 ** (-jnp.arange(0, HEAD, 2) / HEAD)
    angles = jnp.tile(steps[:, None] * rates[None], (1, 2))[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return x * jnp.cos(angles) + jnp.concatenate([-second, first], axis=-1) * jnp.sin(angles)


def attended(q, k, v):
    """Causal attention of (batch, seq, heads, head_dim), with fewer heads for keys and values."""
    q, k = rotated(q), rotated(k)
    k, v = (jnp.repeat(each, HEADS // KV_HEADS, axis=2) for each in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        heads = lambda n, name: nn.DenseGeneral((n, HEAD), use_bias=True, name=name)  # noqa: E731
        y = nn.RMSNorm(epsilon=1e-6, name="norm1")(x)
        q, k, v = heads(HEADS, "q")(y), heads(KV_HEADS, "k")(y), heads(KV_HEADS, "v")(y)
        out = nn.DenseGeneral(WIDTH, axis=(-2, -1), name="o")
        x = x + out(attended(q, k, v))
        y = nn.RMSNorm(epsilon=1e-6, name="norm2")(x)
        inner = nn.silu(nn.Dense(INNER, use_bias=False, name="gate")(y))
        inner = inner * nn.Dense(INNER, use_bias=False, name="up")(y)
        return x + nn.Dense(WIDTH, use_bias=False, name="down")(inner), None


class Scanned(nn.Module):
    """The decoder with all layers in one scanned stack."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(ids)
        stack = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = stack(name="layers")(x, None)
        x = nn.RMSNorm(epsilon=1e-6, name="norm")(x)
        return nn.Dense(VOCAB, use_bias=False, name="head")(x)


SCANNED_NAMES = peftjax.ModuleNames(
    (
        ("layers.norm1", "model.layers.{i}.input_layernorm"),
        ("layers.norm2", "model.layers.{i}.post_attention_layernorm"),
        *((f"layers.{p}", f"model.layers.{{i}}.self_attn.{p}_proj") for p in "qkvo"),
        ("layers.{name}", "model.layers.{i}.mlp.{name}_proj"),
        ("embed", "model.embed_tokens"),
        ("norm", "model.norm"),
        ("head", "lm_head"),
    )
)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.RMSNorm(WIDTH, epsilon=1e-6, rngs=rngs)
        self.norm2 = nnx.RMSNorm(WIDTH, epsilon=1e-6, rngs=rngs)
        self.q_proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.k_proj = nnx.Linear(WIDTH, KV_HEADS * HEAD, rngs=rngs)
        self.v_proj = nnx.Linear(WIDTH, KV_HEADS * HEAD, rngs=rngs)
        self.o_proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        for name in ("gate_proj", "up_proj"):
            setattr(self, name, nnx.Linear(WIDTH, INNER, use_bias=False, rngs=rngs))
        self.down_proj = nnx.Linear(INNER, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        y = self.norm1(x)
        split = lambda z: z.reshape(*z.shape[:2], -1, HEAD)  # noqa: E731
        q, k, v = split(self.q_proj(y)), split(self.k_proj(y)), split(self.v_proj(y))
        x = x + self.o_proj(attended(q, k, v).reshape(x.shape))
        y = self.norm2(x)
        return x + self.down_proj(nnx.silu(self.gate_proj(y)) * self.up_proj(y))


class Listed(nnx.Module):
    """The decoder with a list of layers."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, epsilon=1e-6, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


LISTED_NAMES = peftjax.ModuleNames(
    (
        ("blocks.{n}.norm1", "model.layers.{n}.input_layernorm"),
        ("blocks.{n}.norm2", "model.layers.{n}.post_attention_layernorm"),
        *((f"blocks.{{n}}.{p}_proj", f"model.layers.{{n}}.self_attn.{p}_proj") for p in "qkvo"),
        ("blocks.{n}.{name}", "model.layers.{n}.mlp.{name}"),
        ("embed", "model.embed_tokens"),
        ("norm", "model.norm"),
        ("head", "lm_head"),
    )
)
