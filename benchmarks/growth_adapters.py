"""What a block of Llama's shape costs with many experts, and with many adapters in a batch."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import peftjax
from benchmarks import limit, timing
from benchmarks import limit_least as least
from benchmarks.steps import Step, compiled, drawn

RANK = 4
CONFIG = peftjax.LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear")


def real(own: limit.Model) -> tuple[Any, Any]:
    """Params and an input, where so far there are shapes alone."""
    params = drawn(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), own.params), 0)
    return params, drawn(jnp.zeros(own.x.shape, own.x.dtype), 1)


def many(own: limit.Model, count: int) -> dict[str, peftjax.Adapter]:
    """Adapters of which none is like another."""
    first = peftjax.init_adapter(jax.random.key(0), CONFIG, own.sites)
    return {str(i): first.replace(params=drawn(first.params, i)) for i in range(count)}


def pullback(
    run: Callable[[Any, Any, Any, Any], Any], trainable: Any, adapter: Any, params: Any, x: Any
) -> Step:
    """A step: the gradients of what is trained and of the input, which the block below wants."""

    def step(trainable: Any, x: Any, adapter: Any, params: Any) -> Any:
        y, vjp = jax.vjp(lambda t, x: run(t, adapter, params, x), trainable, x)
        return y, vjp(y)

    return compiled(step, trainable, x, adapter, params)


def experts(
    counts: Sequence[int], tokens: int, width: int, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A training step of X-LoRA, by the number of its experts, over two passes and one back."""
    own = limit.block_of(tokens, width)
    params, x = real(own)
    bare = lambda t, adapter, params, x: own.apply_fn(params, x)  # noqa: E731
    run = peftjax.adapt(own.apply_fn, on_fallback="error", hidden_states=lambda out: out)
    adapted = lambda t, adapter, params, x: run(params, adapter.replace(params=t), x)  # noqa: E731
    jax.clear_caches()
    forward, once = compiled(own.apply_fn, params, x), pullback(bare, None, None, params, x)
    made: dict[str, Step] = {}
    for count in counts:
        say(f"{count} experts")
        config = peftjax.XLoraConfig(hidden_size=width, xlora_dropout_p=0.0)
        adapter = peftjax.init_xlora(jax.random.key(1), config, many(own, count), own.sites)
        jax.clear_caches()
        made[str(count)] = pullback(adapted, adapter.params, adapter, params, x)
    runs = {"floor": lambda: (forward.run(), once.run())}
    seconds = timing.interleaved(runs | {name: step.run for name, step in made.items()}, rounds)
    flops, moved = once.flops + forward.flops, once.bytes + forward.bytes
    return [
        {
            "what": "experts",
            "experts": count,
            "tokens": tokens,
            "width": width,
            "step_s": statistics.median(seconds[str(count)]),
            "step_ratio": timing.ratio(seconds[str(count)], seconds["floor"]),
            "flops_ratio": made[str(count)].flops / flops,
            "bytes_ratio": made[str(count)].bytes / moved,
            "least_flops_ratio": 1 + least_flops(count, tokens, width) / flops,
            # What XLA computes anew in every fusion that reads it, as in benchmarks/limit.py.
            "spare_flops_ratio": limit.SPARE_FLOPS["xlora"] * tokens * width / flops,
            "trace_s": made[str(count)].trace,
            "compile_s": made[str(count)].compile,
            "made_over_floor": (made[str(count)].trace + made[str(count)].compile)
            / (once.trace + once.compile + forward.trace + forward.compile),
        }
        for count in counts
    ]


def least_flops(count: int, tokens: int, width: int) -> float:
    """What so many experts cost by the closed form, and a classifier of so many classes."""
    added = least.added(least.ADAPTED["xlora"], tokens, width, count * RANK)
    return added.flops + 4 * tokens * width * (count - least.EXPERTS)


def block_of(rows: int, tokens: int, width: int) -> limit.Model:
    """The block, for so many rows of so many tokens."""
    norms = dict.fromkeys(("attention_norm", "feedforward_norm"), (width,))
    return limit.model(limit.block, least.weights(width) | norms, (rows, tokens, width))


def batch(rows: int, tokens: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """A batch with an adapter for each of its rows, over one for them all: forward and a step.

    A step gives the gradient of every adapter, against that of the one.
    """
    own = block_of(rows, tokens, width)
    params, x = real(own)
    adapters = many(own, rows)
    numbers = rows * _size(adapters["0"].params)
    bank = peftjax.stack_adapters(adapters)
    each = {"one": adapters["0"], "own": bank.rows(jnp.arange(rows))}
    adapted = peftjax.adapt(own.apply_fn, on_fallback="error")
    through = lambda t, a, params, x: adapted(params, a.replace(params=t), x)  # noqa: E731
    passes = {
        "forward": {who: compiled(adapted, params, a, x) for who, a in each.items()},
        "step": {who: pullback(through, a.params, a, params, x) for who, a in each.items()},
    }
    out = []
    for name, two in passes.items():
        seconds = timing.interleaved({who: step.run for who, step in two.items()}, rounds)
        one, mine = two["one"], two["own"]
        out.append(
            {
                "what": "adapters",
                "pass": name,
                "adapters": rows,
                "tokens": tokens,
                "width": width,
                "seconds": statistics.median(seconds["own"]),
                "time_ratio": timing.ratio(seconds["own"], seconds["one"]),
                "flops_ratio": mine.flops / one.flops,
                "bytes_ratio": mine.bytes / one.bytes,
                "operations_per_number": (mine.flops - one.flops) / numbers,
                "adapters_over_block": numbers / _size(params),
            }
        )
    return out


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def adapters(
    counts: Sequence[int],
    lengths: Sequence[int],
    width: int,
    rounds: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A batch of so many adapters, for rows of so many tokens."""
    rows = []
    for tokens in lengths:
        for count in counts:
            say(f"{count} adapters, {tokens} tokens a row")
            rows += batch(count, tokens, width, rounds if count * tokens <= 4096 else 3)
    return rows


def room(
    capacities: Sequence[int], rows: int, width: int, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A forward pass of so many rows of one token each, by how many adapters their bank has."""
    own = block_of(rows, 1, width)
    params, x = real(own)
    adapted = peftjax.adapt(own.apply_fn, on_fallback="error")
    every, made = many(own, rows), {}
    for capacity in capacities:
        say(f"{rows} rows of a bank with room for {capacity}")
        bank = peftjax.stack_adapters(every, capacity=capacity)
        made[capacity] = compiled(adapted, params, bank.rows(jnp.arange(rows)), x)
    seconds = timing.interleaved({str(n): step.run for n, step in made.items()}, rounds)
    least = capacities[0]
    more = _size(every["0"].params)
    return [
        {
            "what": "room",
            "capacity": capacity,
            "rows": rows,
            "width": width,
            "seconds": statistics.median(seconds[str(capacity)]),
            "time_ratio": timing.ratio(seconds[str(capacity)], seconds[str(least)]),
            "flops_ratio": step.flops / made[least].flops,
            "bytes_ratio": step.bytes / made[least].bytes,
            "operations_per_number": (step.flops - made[least].flops)
            / max((capacity - least) * more, 1),
        }
        for capacity, step in made.items()
    ]


def programs_of_a_growing_bank(capacity: int, tokens: int, width: int) -> dict[str, Any]:
    """How many programs one batch takes, while its bank fills up from one adapter."""
    own = block_of(2, tokens, width)
    params, x = real(own)
    traces: list[int] = []

    def counted(params: Any, x: Any) -> Any:
        traces.append(len(traces))
        return own.apply_fn(params, x)

    adapted = peftjax.adapt(counted, on_fallback="error")
    every = many(own, capacity)
    bank = peftjax.stack_adapters({"0": every["0"]}, capacity=capacity)
    adapted(params, bank.rows(["0", "0"]), x).block_until_ready()
    before = len(traces)
    for name in list(every)[1:]:
        bank = bank.add(name, every[name])
        adapted(params, bank.rows(["0", name]), x).block_until_ready()
    more = len(traces) - before
    return {"what": "bank", "capacity": capacity, "traces": before, "more_traces": more}
