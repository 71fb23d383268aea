"""How far each method is from the least it could cost, in FLOPs and in bytes, as XLA counts them.

One block of Llama's shape (seven linear layers, hidden 2.75 x width, causal attention over rows of
512 tokens, float32), as it stands in the midst of a model: a step gives its output and the gradient
of its input, which the block below wants, and of the adapter. The floor is the same without the
adapter, everything frozen; X-LoRA's has a forward pass more. So nothing is saved at either end, and
a model of many blocks has the same ratios. Everything is abstract: nothing is ever run.
"""

import dataclasses
import unittest.mock
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

import peftjax
from benchmarks import limit_least as least
from benchmarks import limit_shown
from benchmarks.limit_least import EXPERTS, LENGTH
from peftjax.config import AdapterConfig
from peftjax.factors import WeightSpec
from peftjax.methods import loha

TITLE = "Against the limit"

RANKS, TOKENS, WIDTHS = (4, 16, 64, 256), (512, 2048, 8192, 32768), (1024, 2048, 4096, 8192)
QUICK = ((4, 16), (512, 1024), (256,))

# How far above the closed forms a step may be. FLOPs: operations on each number of the hidden
# state, for XLA makes a sum of two products anew in each fusion that reads it. Of this block that
# is up to 25 more; of DoRA, whose sums are scaled too, 43, and 81 with jax 0.10.0. One thin product
# more of rank 16, on a square weight, would be 32. Bytes, of what is adapted: a factor.
SPARE_FLOPS = dict.fromkeys(least.ADAPTED, 28) | {"dora": 88}
SPARE_BYTES = 1.05


def block(params: Any, x: Any) -> Any:
    """A block of Llama's shape, without what turns queries and keys by their position."""
    heads = max(x.shape[-1] // 128, 1)

    def dense(name: str, x: Any) -> Any:
        return x @ params[name]["kernel"]

    def norm(name: str, x: Any) -> Any:
        squares = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(squares + 1e-6) * params[name]["scale"][None, None]

    h = norm("attention_norm", x)
    q, k, v = (dense(name, h).reshape(*x.shape[:2], heads, -1) for name in "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool)[None, None], scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    x = x + dense("o", mixed.reshape(x.shape))
    h = norm("feedforward_norm", x)
    return x + dense("down", jax.nn.silu(dense("gate", h)) * dense("up", h))


def linear(params: Any, x: Any) -> Any:
    """A single weight."""
    return x @ params["linear"]["kernel"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A function and the shapes of what it takes."""

    apply_fn: Callable[[Any, Any], Any]
    params: Any
    x: Any
    y: Any
    sites: peftjax.Sites


def model(apply_fn: Callable[[Any, Any], Any], shapes: dict[str, Any], x: tuple[int, ...]) -> Model:
    """A model of such weights; those of one axis are scales."""
    params = {
        name: {"kernel" if len(shape) > 1 else "scale": jax.ShapeDtypeStruct(shape, jnp.float32)}
        for name, shape in shapes.items()
    }
    inputs = jax.ShapeDtypeStruct(x, jnp.float32)
    sites = peftjax.find_sites(apply_fn, params, inputs)
    return Model(apply_fn, params, inputs, jax.eval_shape(apply_fn, params, inputs), sites)


def block_of(tokens: int, width: int) -> Model:
    """The block, for rows of as many tokens as there are, 512 at most."""
    length = min(tokens, LENGTH)
    norms = dict.fromkeys(("attention_norm", "feedforward_norm"), (width,))
    shapes = least.weights(width) | norms
    return model(block, shapes, (tokens // length, length, width))


def cost(function: Callable[..., Any], *args: Any) -> least.Cost:
    """FLOPs and bytes of a compiled function."""
    # All that is counted is settled before code is generated; this is the fastest way to that.
    options: Any = {"xla_backend_optimization_level": "0"}
    found: Any = jax.jit(function).lower(*args).compile(compiler_options=options).cost_analysis()
    return least.Cost(found["flops"], found["bytes accessed"])


def step(run: Callable[[Any, Any, Any, Any], Any], own: Model, adapter: Any) -> least.Cost:
    """Output, the gradient of the input, and that of the adapter's params if there is one.

    ``run`` takes the adapter's params, the adapter, the model's params and its input.
    """
    trainable = None if adapter is None else adapter.params

    def pullback(trainable: Any, x: Any, cotangent: Any, adapter: Any, params: Any) -> Any:
        y, vjp = jax.vjp(lambda t, x: run(t, adapter, params, x), trainable, x)
        return y, vjp(cotangent)

    return cost(pullback, trainable, own.x, own.y, adapter, own.params)


def config_of(method: str, rank: int) -> AdapterConfig:
    """What a method of a rank adapts: every linear layer, and IA3 what it is made for."""
    every: dict[str, Any] = {"target_modules": "all-linear"}
    match method:
        case "lora":
            return peftjax.LoraConfig(r=rank, lora_alpha=16, **every)
        case "dora":
            return peftjax.LoraConfig(r=rank, lora_alpha=16, use_dora=True, **every)
        case "adalora":
            return peftjax.AdaLoraConfig(init_r=rank, target_r=rank, **every)
        case "hra":
            return peftjax.HRAConfig(r=rank, **every)
        case "loha":
            return peftjax.LoHaConfig(r=rank, alpha=16, **every)
        case "ia3":
            names = ["k", "v", "down"]
            return peftjax.IA3Config(target_modules=names, feedforward_modules=["down"])
    raise ValueError(f"no method is called {method}")


def adapter_of(method: str, rank: int, own: Model) -> peftjax.Adapter:
    """The shapes of an adapter. X-LoRA's rank is that of its experts together."""

    def make(params: Any) -> peftjax.Adapter:
        if method != "xlora":
            config = config_of(method, rank)
            return peftjax.init_adapter(jax.random.key(0), config, own.sites, params)
        expert = peftjax.init_adapter(
            jax.random.key(0), config_of("lora", rank // EXPERTS), own.sites
        )
        config = peftjax.XLoraConfig(hidden_size=own.x.shape[-1])
        many = {str(i): expert for i in range(EXPERTS)}
        return peftjax.init_xlora(jax.random.key(1), config, many, own.sites)

    return jax.eval_shape(make, own.params)


def adapted(own: Model, method: str, rank: int) -> least.Cost:
    """A step with an adapter."""
    run = peftjax.adapt(
        own.apply_fn,
        on_fallback="error",
        hidden_states=(lambda out: out) if method == "xlora" else None,
    )
    through = lambda t, adapter, params, x: run(params, adapter.replace(params=t), x)  # noqa: E731
    return step(through, own, adapter_of(method, rank, own))


def merging(own: Model, method: str, rank: int) -> least.Cost:
    """A step that builds every changed weight first."""

    def through(t: Any, adapter: peftjax.Adapter, params: Any, x: Any) -> Any:
        return own.apply_fn(peftjax.merge(params, adapter.replace(params=t)), x)

    return step(through, own, adapter_of(method, rank, own))


Way = Literal["adapted", "merged"]
WAYS = {"adapted": (adapted, least.ADAPTED), "merged": (merging, least.MERGED)}


@dataclasses.dataclass(frozen=True)
class Cell:
    """The block at one width and number of tokens, with what it costs frozen.

    Attributes:
      own: the block.
      tokens: how many vectors go through it.
      width: of each.
      forward: what a forward pass costs.
      once: what a step costs.
    """

    own: Model
    tokens: int
    width: int
    forward: least.Cost
    once: least.Cost

    def record(self, what: str, method: str, rank: int, way: Way) -> dict[str, Any]:
        """What a step with an adapter costs over its floor, beside the closed form."""
        make, forms = WAYS[way]
        found = make(self.own, method, rank)
        added = least.added(forms[method], self.tokens, self.width, rank)
        floor = self.once + self.forward if method == "xlora" else self.once
        return {
            "what": what,
            "method": method,
            "way": way,
            "tokens": self.tokens,
            "width": self.width,
            "rank": rank,
            "floor": "two passes" if method == "xlora" else "one pass",
            "floor_flops": floor.flops,
            "floor_bytes": floor.moved,
            "flops_ratio": found.flops / floor.flops,
            "bytes_ratio": found.moved / floor.moved,
            "least_flops_ratio": 1 + added.flops / floor.flops,
            "least_bytes_ratio": 1 + 4 * added.moved / floor.moved,
        }


def cell(tokens: int, width: int) -> Cell:
    """The block, and its floor."""
    own = block_of(tokens, width)
    frozen = step(lambda t, adapter, params, x: own.apply_fn(params, x), own, None)
    return Cell(own, tokens, width, cost(own.apply_fn, own.params, own.x), frozen)


def measure(quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every method at every rank, and both sides of where the closed forms say that lines cross."""
    ranks, all_tokens, widths = QUICK if quick else (RANKS, TOKENS, WIDTHS)
    rows: list[dict[str, Any]] = []
    for width in widths:
        for tokens in all_tokens:
            say(f"width {width:,}, {tokens:,} tokens")
            here = cell(tokens, width)
            for method in least.ADAPTED:
                # IA3 has no rank: any will do.
                every = ranks[:1] if method == "ia3" else ranks
                rows += [here.record("grid", method, rank, "adapted") for rank in every]
            rows += crossings(here)
            for name in ("q", "up"):
                rows += loha_ways(tokens, *least.weights(width)[name])
    return rows


def crossings(here: Cell) -> list[dict[str, Any]]:
    """Where merging every step begins to be cheaper, and where a step is 10% over the floor."""
    rows = []
    ways: dict[str, tuple[Way, ...]] = {"merging": ("adapted", "merged"), "dear": ("adapted",)}
    for method in least.ADAPTED:
        # HRA's reflections come in pairs, X-LoRA's experts are alike.
        among = {"hra": 2, "xlora": EXPERTS}.get(method, 1)
        found = {}
        if method != "ia3":
            found["dear"] = least.dear_rank(method, here.tokens, here.width)
        if method in least.MERGED:
            found["merging"] = least.merged_rank(method, here.tokens, here.width)
        for what, rank in found.items():
            if rank is not None:
                rank = -(-rank // among) * among
                rows += [here.record(what, method, rank, way) for way in ways[what]]
    return rows


def loha_ways(tokens: int, i: int, o: int) -> list[dict[str, Any]]:
    """Both ways of LoHa on one weight, on both sides of where it goes from one to the other."""
    spec = WeightSpec("dense", (i,), (o,), jnp.dtype(jnp.float32))
    rank = least.first_rank(lambda r: loha.fusing_is_cheaper(r, spec, tokens), min(i, o))
    if rank is None:
        return []
    length = min(tokens, LENGTH)
    own = model(linear, {"linear": (i, o)}, (tokens // length, length, i))
    rows = []
    for each in (rank - 1, rank):
        row: dict[str, Any] = {"what": "loha", "tokens": tokens, "in": i, "out": o, "rank": each}
        for way, built in (("factors", False), ("built", True)):
            # Asked about endless tokens, it says whether the number of tokens matters at all.
            forced = lambda r, spec, n, built=built: built or n > tokens  # noqa: E731
            with unittest.mock.patch.object(loha, "fusing_is_cheaper", forced):
                row[f"{way}_flops"] = adapted(own, "loha", each).flops
        rows.append(row | {"chosen_flops": adapted(own, "loha", each).flops})
    return rows


def broken(rows: list[dict[str, Any]]) -> list[str]:
    """Where a step costs more than the closed form allows, or LoHa goes the dearer way."""
    out = []
    for row in rows:
        if row["what"] == "loha":
            most = min(row["factors_flops"], row["built_flops"])
            if row["chosen_flops"] > most:
                out.append(
                    f"LoHa of rank {row['rank']} on ({row['in']}, {row['out']}), {row['tokens']} "
                    f"tokens: {row['chosen_flops'] / most:.4f} x the FLOPs of the other way"
                )
            continue
        who = (
            f"{row['method']} {row['way']}, rank {row['rank']}, width {row['width']}, "
            f"{row['tokens']} tokens"
        )
        spare = SPARE_FLOPS[row["method"]] * row["tokens"] * row["width"] / row["floor_flops"]
        bounds = {"flops": row["least_flops_ratio"] + spare}
        if row["way"] == "adapted":
            bounds["bytes"] = SPARE_BYTES * row["least_bytes_ratio"]
        for what, most in bounds.items():
            if row[f"{what}_ratio"] > most:
                out.append(
                    f"{who}: {row[f'{what}_ratio']:.4f} x the floor's {what}, at most {most:.4f}"
                )
    return out


tables, plots = limit_shown.tables, limit_shown.plots
