"""A batch whose rows use many adapters, over the same batch with one adapter.

A transformer block with LoRA on every linear layer runs forward in three ways, in turn, so that a
drifting machine moves them alike: without an adapter, with one for all rows, and with one for each
row. Medians of the ratios are printed, and FLOPs and bytes as XLA counts them.

    python -m benchmarks.rows [--rows 64] [--rounds 15] [--width 1024]
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import peftjax

HEADS = 16


def block(params, x):
    """One block, in plain JAX."""

    def dense(name, x):
        return x @ params[name]["kernel"]

    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5)

    def heads(x):
        return x.reshape(*x.shape[:2], HEADS, -1)

    q, k, v = (heads(dense(name, norm(x))) for name in ("q_proj", "k_proj", "v_proj"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    x = x + dense("o_proj", mixed.reshape(x.shape))
    gate, up = (dense(name, norm(x)) for name in ("gate_proj", "up_proj"))
    return x + dense("down_proj", jax.nn.silu(gate) * up)


def programs(rows, tokens, width):
    """The three programs, compiled, each with its arguments."""
    hidden = 11 * width // 4
    shapes = {f"{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {"gate_proj": (width, hidden), "up_proj": (width, hidden)}
    shapes |= {"down_proj": (hidden, width)}
    key = jax.random.key(0)
    params = {
        name: {"kernel": jax.random.normal(jax.random.fold_in(key, i), shape) / shape[0] ** 0.5}
        for i, (name, shape) in enumerate(shapes.items())
    }
    x = jax.random.normal(key, (rows, tokens, width))
    sites = peftjax.find_sites(block, params, x)
    config = peftjax.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    adapters = {
        str(i): peftjax.init_adapter(jax.random.fold_in(key, i), config, sites) for i in range(rows)
    }
    bank = peftjax.stack_adapters(adapters)
    adapted = peftjax.adapt(block, on_fallback="error")
    calls = {
        "none": (block, (params, x)),
        "one": (adapted, (params, adapters["0"], x)),
        "each row its own": (adapted, (params, bank.rows(jnp.arange(rows)), x)),
    }
    return {
        name: (jax.jit(function).lower(*args).compile(), args)
        for name, (function, args) in calls.items()
    }


def seconds(program):
    compiled, args = program
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    table = Table("tokens a row", "none", "one / none", "own / one", "FLOPs own / one", "bytes")
    for tokens in (1, 16, 64):
        three = programs(options.rows, tokens, options.width)
        for program in three.values():
            seconds(program)
        rounds = [[seconds(each) for each in three.values()] for _ in range(options.rounds)]
        _, one, own = (program[0].cost_analysis() for program in three.values())
        table.add_row(
            str(tokens),
            f"{1000 * statistics.median(none for none, _, _ in rounds):.1f} ms",
            f"{statistics.median(one / none for none, one, _ in rounds):.2f}",
            f"{statistics.median(own / one for _, one, own in rounds):.2f}",
            f"{own['flops'] / one['flops']:.4f}",
            f"{own['bytes accessed'] / one['bytes accessed']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
