"""The first of X-LoRA's two passes: from hidden states to the mix of experts."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from peftjax.adapter import Adapter
from peftjax.attach import as_sequence
from peftjax.routes import Mix
from peftjax.running import Model, run_with
from peftjax.trees import Static, split

HiddenStates = Callable[[Any], Float[Array, "batch sequence features"]]


def xlora_scalings(
    apply_fn: Callable[..., Any], *, hidden_states: HiddenStates | None = None
) -> Callable[..., tuple[Float[Array, "batch sequence layers experts"], Any]]:
    r"""Turns a function of params into the first pass of X-LoRA over it.

    ``adapt`` makes this pass by itself. It is for those who want to see or to change the scalings
    before the second one, or whose model carries a state: with a KV cache each pass has a cache
    of its own.

    Args:
      apply_fn: a pure function of a params tree and whatever else.
      hidden_states: gives the last hidden states, of shape (batch, sequence, features), out of
        what ``apply_fn`` returns; needed by a model whose output head does not show them.

    Returns:
      ``first(params, adapter, *args, **kwargs) -> (scalings, out)``: the weight of each expert for
      each token and layer, of shape (batch, sequence, layers, experts), and what the model
      returns in this pass. ``adapter`` may be a sequence with one X-LoRA adapter in it. Gradients
      flow from the scalings to the classifier, not into the pass.

    Raises:
      ValueError: when called without an X-LoRA adapter, or on a model that does not show one
        hidden state for every token.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> def apply_fn(params, ids):
      ...     return jnp.tanh(params["embed"]["embedding"][ids] @ params["dense"]["kernel"]) @ (
      ...         params["head"]["kernel"]
      ...     )
      >>> shapes = {"embed": (9, 4), "dense": (4, 5), "head": (5, 9)}
      >>> names = {"embed": "embedding", "dense": "kernel", "head": "kernel"}
      >>> params = {name: {names[name]: jnp.ones(shape)} for name, shape in shapes.items()}
      >>> ids = jnp.array([[1, 2, 3], [4, 5, 6]])
      >>> sites = peftjax.find_sites(apply_fn, params, ids)
      >>> config = peftjax.LoraConfig(r=2, target_modules=["dense"], init_lora_weights=False)
      >>> experts = {
      ...     name: peftjax.init_adapter(jax.random.key(i), config, sites)
      ...     for i, name in enumerate(["poems", "code"])
      ... }
      >>> adapter = peftjax.init_xlora(
      ...     jax.random.key(2), peftjax.XLoraConfig(), experts, sites
      ... )
      >>> scalings, _ = peftjax.xlora_scalings(apply_fn)(params, adapter, ids)
      >>> peftjax.adapt(apply_fn)(params, adapter.with_scalings(scalings), ids).shape
      (2, 3, 9)

    References:
      Buehler and Buehler, X-LoRA: Mixture of Low-Rank Adapter Experts, 2024,
      https://arxiv.org/abs/2402.07148
    """
    model = Model(apply_fn)

    @functools.partial(jax.jit, static_argnums=0)
    def run(
        static: Static, arrays: list[Any], adapters: tuple[Adapter, ...]
    ) -> tuple[jax.Array, Any]:
        scalings, out = first_pass(model, hidden_states, static, arrays, adapters, with_out=True)
        position = routing(adapters)
        assert position is not None
        return for_every_layer(scalings, adapters[position]), out

    def first(
        params: Any, adapter: Adapter | Sequence[Adapter], *args: Any, **kwargs: Any
    ) -> tuple[jax.Array, Any]:
        adapters = as_sequence(adapter)
        if routing(adapters) is None:
            raise ValueError(
                "there is no X-LoRA adapter here that mixes its experts by itself: make one with "
                "init_xlora"
            )
        arrays, static = split((params, args, kwargs))
        return run(static, arrays, adapters)

    return first


def routing(adapters: Sequence[Adapter]) -> int | None:
    """Which of the adapters still has to be told how to mix its experts; None if none does.

    Raises:
      ValueError: there are two of them.
    """
    some = [
        i for i, each in enumerate(adapters) if each.config.method.gating and each.route is None
    ]
    if len(some) > 1:
        raise ValueError(
            "two X-LoRA adapters would each need a pass before the other's: give one of them its "
            "scalings, with adapter.with_scalings"
        )
    return some[0] if some else None


def for_every_layer(
    scalings: Float[Array, "batch sequence _ experts"], adapter: Adapter
) -> Float[Array, "batch sequence layers experts"]:
    """The scalings with an entry for each adapted layer."""
    layers = sum(adapter.buffers[name]["place"].size for name in adapter.sites)
    batch, sequence, _, experts = scalings.shape
    return jnp.broadcast_to(scalings, (batch, sequence, layers, experts))


def first_pass(
    model: Model,
    hidden_states: HiddenStates | None,
    static: Static,
    arrays: list[Any],
    adapters: Sequence[Adapter],
    *,
    with_out: bool,
) -> tuple[Float[Array, "batch sequence _ experts"], Any]:
    """The scalings, and what the model returns without them, if that is wanted.

    The experts take part only if their weights in this pass are not zero.
    """
    position = routing(adapters)
    assert position is not None
    own = adapters[position]
    gating = own.config.method.gating
    assert gating is not None
    # Nothing is differentiated: the classifier learns from the second pass.
    held, others = lax.stop_gradient((arrays, list(adapters)))
    head = None if hidden_states else gating.head(own.config)
    if hidden_states is None and head is None:
        raise ValueError(
            "X-LoRA's classifier reads the last hidden state of every token, and this model has no "
            "output head that shows it: say where it is, with hidden_states=, a function of what "
            "the model returns"
        )

    def run(adapters: Sequence[Adapter]) -> tuple[Any, jax.Array]:
        out, hidden = run_with(model, static, held, adapters, head)
        hidden = _checked(hidden_states(out) if hidden_states else hidden, head)
        return (out if with_out else None), hidden

    weights = lax.stop_gradient(gating.first_pass(own))

    def plain() -> tuple[Any, jax.Array]:
        return run([each for i, each in enumerate(others) if i != position])

    def mixed() -> tuple[Any, jax.Array]:
        passing = others[position].replace(route=Mix(weights))
        return run([passing if i == position else each for i, each in enumerate(others)])

    out, hidden = lax.cond(jnp.any(weights != 0), mixed, plain)
    return gating.scalings(own, lax.stop_gradient(hidden)), out


def _checked(hidden: Any, head: str | None) -> jax.Array:
    """The hidden states, if there is one for every token."""
    if head is None:
        remedy = "hidden_states= has to give an array of shape (batch, sequence, features)"
    else:
        remedy = (
            "say where the hidden states are, with hidden_states=, a function of what the model "
            "returns"
        )
    if hidden is None:
        raise ValueError(
            f"X-LoRA's classifier reads the input of {head}, and this function does not show it: "
            f"its result does not reach an output through views alone, or only out of a "
            f"shard_map, a cond or a while loop; {remedy}"
        )
    if jnp.ndim(hidden) != 3:
        what = "hidden_states= gave" if head is None else f"{head} is applied to"
        raise ValueError(
            f"X-LoRA's classifier needs a hidden state for every token, and {what} an array of "
            f"shape {jnp.shape(hidden)}, as of a pooled or flattened sequence: {remedy}"
        )
    return hidden
