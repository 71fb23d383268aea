"""Trace and compile time of an adapted training gradient, over the base's and over the floor's.

The base's gradient is that of all its params; the floor is the same linen model with a trainable
bias after each adapted weight. All three run in turn, so that a drifting machine moves them alike;
medians of the ratios are printed.

    python -m benchmarks.compile_time [--layers 24] [--rounds 5]
"""

import argparse
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import peftjax

WIDTH, HIDDEN, HEADS = 512, 1376, 8


class Block(nn.Module):
    """One pre-norm transformer block; ``biased`` gives every layer a bias, the frozen floor."""

    biased: bool

    @nn.compact
    def __call__(self, x, _):
        h = nn.RMSNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, use_bias=self.biased)(h)
        h = nn.RMSNorm()(x)
        gate = nn.silu(nn.Dense(HIDDEN, use_bias=self.biased, name="gate")(h))
        up = nn.Dense(HIDDEN, use_bias=self.biased, name="up")(h)
        return x + nn.Dense(WIDTH, use_bias=self.biased, name="down")(gate * up), None


class Model(nn.Module):
    """Blocks, scanned and rematerialised, or unrolled."""

    layers: int
    scanned: bool
    biased: bool = False

    @nn.compact
    def __call__(self, x):
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        block = nn.remat(Block, policy=policy, prevent_cse=not self.scanned)
        if self.scanned:
            stack = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
            )
            return stack(self.biased)(x, None)[0]
        for _ in range(self.layers):
            x = block(self.biased)(x, None)[0]
        return x


def programs(layers, scanned):
    """The gradients of the base, the floor and the adapted model, with abstract arguments."""
    x = jax.ShapeDtypeStruct((4, 256, WIDTH), jnp.float32)
    model, floor = Model(layers, scanned), Model(layers, scanned, biased=True)

    def shapes(module):
        return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(x.shape)))["params"]

    def is_bias(path):
        return path[-1].key == "bias"

    with_biases = shapes(floor)
    biases = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if is_bias(path) else None, with_biases
    )

    def floor_gradient(biases, params, x):
        def loss(biases):
            both = jax.tree_util.tree_map(
                lambda bias, leaf: leaf if bias is None else bias,
                biases,
                params,
                is_leaf=lambda leaf: leaf is None,
            )
            return floor.apply({"params": both}, x).sum()

        return jax.grad(loss)(biases)

    params = shapes(model)
    apply_fn = peftjax.from_linen(model)
    sites = peftjax.find_sites(apply_fn, params, x)
    config = peftjax.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    adapter = jax.eval_shape(lambda: peftjax.init_adapter(jax.random.key(0), config, sites))
    adapted = peftjax.adapt(apply_fn)

    def adapted_gradient(trainable, params, adapter, x):
        return jax.grad(lambda t: adapted(params, adapter.replace(params=t), x).sum())(trainable)

    def base_gradient(params, x):
        return jax.grad(lambda params: apply_fn(params, x).sum())(params)

    return (
        (base_gradient, (params, x)),
        (floor_gradient, (biases, with_biases, x)),
        (adapted_gradient, (adapter.params, params, adapter, x)),
    )


def timed(program):
    """Seconds to trace and seconds to compile, from empty caches."""
    function, args = program
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*args)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    table = Table("layers", "time to", "base", "adapted / base", "adapted / floor")
    for scanned in (True, False):
        three = programs(options.layers, scanned)
        timed(three[0])
        rows = [[timed(program) for program in three] for _ in range(options.rounds)]
        for i, what in enumerate(("trace", "compile")):
            table.add_row(
                "scanned" if scanned else "unrolled",
                what,
                f"{statistics.median(base[i] for base, _, _ in rows):.2f} s",
                f"{statistics.median(own[i] / base[i] for base, _, own in rows):.2f}",
                f"{statistics.median(own[i] / floor[i] for _, floor, own in rows):.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
