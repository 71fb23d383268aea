"""A Llama-shaped block of real size, only ever lowered and compiled, never run."""

import jax
import jax.numpy as jnp

WIDTH, HIDDEN, HEADS, TOKENS = 4096, 11008, 32, 8192


def params(dtype=jnp.bfloat16):
    """The shapes of one block's weights."""
    shapes = {
        **{f"{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
        "gate_proj": (WIDTH, HIDDEN),
        "up_proj": (WIDTH, HIDDEN),
        "down_proj": (HIDDEN, WIDTH),
    }
    weights = {n: {"kernel": jax.ShapeDtypeStruct(s, dtype)} for n, s in shapes.items()}
    norms = {n: jax.ShapeDtypeStruct((WIDTH,), dtype) for n in ("attention_norm", "mlp_norm")}
    return {**weights, **norms}


def tokens(dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, TOKENS, WIDTH), dtype)


def block(params, x, biases=None):
    """One block; ``biases`` adds a bias after each weight: the least any adapter could cost."""

    def dense(name, x):
        y = x @ params[name]["kernel"]
        return y if biases is None else y + biases[name].astype(y.dtype)[None, None]

    def norm(name, x):
        square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
        return (x * jax.lax.rsqrt(square + 1e-5).astype(x.dtype)) * params[name][None, None]

    def heads(x):
        return x.reshape(*x.shape[:2], HEADS, -1)

    h = norm("attention_norm", x)
    q, k, v = (heads(dense(f"{name}_proj", h)) for name in "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1]).astype(q.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    x = x + dense("o_proj", mixed.reshape(x.shape))
    h = norm("mlp_norm", x)
    return x + dense("down_proj", jax.nn.silu(dense("gate_proj", h)) * dense("up_proj", h))
