"""Steps of a twin in JAX, compiled: the frozen floor, and an adapter's gradient."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import peftjax
from benchmarks import timing

if TYPE_CHECKING:  # twins need torch, and not all steps do
    from benchmarks.twins import Twin


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step: how to run it, what it took to make in seconds, what it costs a call.

    ``temporary`` is the memory it takes while it runs, in bytes; ``text`` gives its HLO.
    """

    run: Callable[[], Any]
    trace: float
    compile: float
    flops: float
    bytes: float
    temporary: int
    text: Callable[[], str]


def compiled(function: Callable[..., Any], *args: Any) -> Step:
    """A function made for these arguments; it has no loops, of which XLA counts one turn."""
    trace, lowered = timing.seconds_of(lambda: jax.jit(function).lower(*args))
    seconds, program = timing.seconds_of(lowered.compile)
    cost = program.cost_analysis()
    run = lambda: jax.block_until_ready(program(*args))  # noqa: E731
    temporary = program.memory_analysis().temp_size_in_bytes
    counted = (cost["flops"], cost["bytes accessed"], temporary)
    return Step(run, trace, seconds, *counted, program.as_text)


def floor(twin: "Twin") -> Step:
    """The gradient in one vector that is added to the embedding of every token."""

    def loss(shift: Any, params: Any, ids: Any) -> Any:
        return twin.loss(twin.shifted(shift, params, ids))

    shift = jnp.zeros(twin.torch.config.hidden_size)
    return compiled(jax.value_and_grad(loss), shift, twin.params, jnp.asarray(twin.ids))


def adapted(twin: "Twin", adapter: peftjax.Adapter) -> Step:
    """The gradient in an adapter."""
    run = peftjax.adapt(twin.apply_fn, on_fallback="error")

    def loss(trainable: Any, adapter: Any, params: Any, ids: Any) -> Any:
        return twin.loss(run(params, adapter.replace(params=trainable), ids))

    args = (adapter.params, adapter, twin.params, jnp.asarray(twin.ids))
    return compiled(jax.value_and_grad(loss), *args)


def drawn(tree: Any, seed: int) -> Any:
    """A tree with small numbers added, that nothing be zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x + rng.normal(0, 0.02, x.shape), x.dtype), tree)


def chosen(twin: "Twin", targets: str) -> Callable[[peftjax.Site], bool]:
    """The modules of a choice that are in layers, by their last names."""
    names = twin.targets[targets]
    return lambda site: site.name.rpartition(".")[2] in names and ".layer" in site.name
