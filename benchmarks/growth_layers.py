"""What a model of many layers costs to trace and to compile, with and without an adapter.

The base's gradient is that of all its params, the floor's that of a vector added to the input. The
width is small: this is about how many equations there are, not about what they compute.
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import peftjax
from benchmarks import hlo, timing

FORMS = ("unrolled", "scanned", "scanned, remat")
WAYS = ("floor", "base", "adapted")
WIDTH, HIDDEN, HEADS = 128, 344, 4
CONFIG = peftjax.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


class Block(nn.Module):
    """One pre-norm transformer block, of seven linear layers."""

    @nn.compact
    def __call__(self, x: Any, _: Any) -> tuple[Any, None]:
        h = nn.RMSNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, use_bias=False)(h)
        h = nn.RMSNorm()(x)
        gate = nn.silu(nn.Dense(HIDDEN, use_bias=False, name="gate")(h))
        up = nn.Dense(HIDDEN, use_bias=False, name="up")(h)
        return x + nn.Dense(WIDTH, use_bias=False, name="down")(gate * up), None


class Model(nn.Module):
    """Blocks one after another: unrolled, scanned, or scanned and rematerialised."""

    layers: int
    form: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        if self.form == "unrolled":
            for _ in range(self.layers):
                x = Block()(x, None)[0]
            return x
        block: Any = Block
        if self.form == "scanned, remat":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        scan = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        return scan()(x, None)[0]


Program = tuple[Callable[..., Any], tuple[Any, ...]]


def programs(layers: int, form: str) -> tuple[dict[str, Program], dict[str, Callable[[], Any]]]:
    """Three gradients with abstract arguments, and what is done once for a model."""
    x = jax.ShapeDtypeStruct((2, 64, WIDTH), jnp.float32)
    model = Model(layers, form)
    apply_fn = peftjax.from_linen(model)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(x.shape)))["params"]
    sites = peftjax.find_sites(apply_fn, params, x)
    init = lambda: peftjax.init_adapter(jax.random.key(0), CONFIG, sites)  # noqa: E731
    adapter = jax.eval_shape(init)
    adapted = peftjax.adapt(apply_fn, on_fallback="error")

    def of_adapter(trainable: Any, params: Any, adapter: Any, x: Any) -> Any:
        return jax.grad(lambda t: adapted(params, adapter.replace(params=t), x).sum())(trainable)

    def of_base(params: Any, x: Any) -> Any:
        return jax.grad(lambda params: apply_fn(params, x).sum())(params)

    def of_floor(shift: Any, params: Any, x: Any) -> Any:
        return jax.grad(lambda shift: apply_fn(params, x + shift[None, None]).sum())(shift)

    shift = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
    gradients: dict[str, Program] = {
        "floor": (of_floor, (shift, params, x)),
        "base": (of_base, (params, x)),
        "adapted": (of_adapter, (adapter.params, params, adapter, x)),
    }
    once = {
        "find_sites": lambda: peftjax.find_sites(apply_fn, params, x),
        "init_adapter": lambda: jax.block_until_ready(init().params),
    }
    return gradients, once


def equations(jaxpr: Any) -> int:
    """How many equations a jaxpr has, those inside others with them."""
    total = 0
    for equation in jaxpr.eqns:
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        total += 1 + sum(
            equations(getattr(each, "jaxpr", each)) for each in inner if _is_jaxpr(each)
        )
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def made(program: Program) -> tuple[dict[str, float], dict[str, float]]:
    """What a program is and what it took to make.

    Returns:
      What does not depend on the machine: equations, FLOPs and bytes, loops times their turns; and
      seconds to trace and lower, and to compile, from empty caches.
    """
    function, args = program
    jax.clear_caches()
    tracing, traced = timing.seconds_of(lambda: jax.jit(function).trace(*args))
    lowering, lowered = timing.seconds_of(traced.lower)
    compiling, compiled = timing.seconds_of(lowered.compile)
    cost = hlo.cost(compiled.as_text())
    counts = {"equations": equations(traced.jaxpr), "flops": cost.flops, "bytes": cost.bytes}
    return counts, {"trace": tracing + lowering, "compile": compiling}


def measure(
    layers: Mapping[int, int], forms: tuple[str, ...], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A record for each number of layers, form and gradient; ``layers`` says how many rounds."""
    rows: list[dict[str, Any]] = []
    for form in forms:
        for count, rounds in layers.items():
            say(f"{count} layers, {form}")
            rows += measured(count, form, rounds)
    return rows


def measured(layers: int, form: str, rounds: int) -> list[dict[str, Any]]:
    """The three gradients of one model, made in turns."""
    gradients, once = programs(layers, form)
    rows: dict[str, dict[str, float]] = {}
    times: dict[str, list[dict[str, float]]] = {way: [] for way in gradients}
    first: dict[str, list[float]] = {name: [] for name in once}
    for _ in range(rounds):
        for way, program in gradients.items():
            rows[way], seconds = made(program)
            times[way].append(seconds)
        for name, function in once.items():
            jax.clear_caches()
            first[name].append(timing.seconds_of(function)[0])
    for way, row in rows.items():
        for what in ("trace", "compile"):
            own = [each[what] for each in times[way]]
            row[f"{what}_s"] = statistics.median(own)
            for under in ("base", "floor"):
                row[f"{what}_over_{under}"] = timing.ratio(own, [e[what] for e in times[under]])
    for name, each in first.items():
        rows["adapted"][f"{name}_s"] = statistics.median(each)
    start = {"what": "layers", "form": form, "layers": layers}
    return [start | {"way": way} | row for way, row in rows.items()]
