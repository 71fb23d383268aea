"""The function transformation: a model with adapters in it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from peftjax.adapter import Adapter
from peftjax.attach import as_sequence
from peftjax.by_row import run_by_row
from peftjax.engine.packed import Packed
from peftjax.engine.routes import RouteError
from peftjax.first_pass import HiddenStates, first_pass, for_every_layer, routing
from peftjax.running import Model, rows, run_with
from peftjax.trees import Static, leaves_of, split


def adapt(
    apply_fn: Callable[..., Any],
    *,
    on_fallback: Literal["materialize", "error"] = "materialize",
    on_unused: Literal["error", "ignore"] = "error",
    batch_axes: Any = None,
    hidden_states: HiddenStates | None = None,
    return_scalings: bool = False,
) -> Callable[..., Any]:
    r"""Turns a function of params into the same function with adapters in it.

    The function is traced, and its program is written out again with every linear use
    :math:`y = x W` of an adapted weight replaced by

    .. math::
      y = s_{out} \odot ((s_{in} \odot x) W + (x A) B).

    No merged weight is built where JAX's own matrix products, convolutions and lookups meet the
    weight; elsewhere the use gets the merged weight, which is slower and still exact. The result
    equals ``apply_fn(merge(params, adapter), ...)`` and can be jitted, differentiated, mapped,
    scanned and rematerialised like any function.

    Args:
      apply_fn: a pure function of a params tree and whatever else.
      on_fallback: what to do about a use that needs the merged weight: ``"materialize"`` or
        ``"error"``.
      on_unused: what to do about an adapted weight that this function does not use: ``"error"``,
        or ``"ignore"`` for functions that run a part of the model, such as an encoder alone.
      batch_axes: for a bank's rows, where the rows of the batch lie in the arguments after params
        and adapter, as ``jax.vmap`` takes it in ``in_axes``. Then each row runs by itself, under
        ``jax.vmap``. By default rows are told by the shapes at each use: what it keeps of x has to
        be (batch, ...) or (batch x sequence, ...), the positions of a row next to each other. A
        model that flattens (sequence, batch, ...) has the same shapes and needs ``batch_axes``;
        without them its rows are mixed up, which cannot be checked.
      hidden_states: for X-LoRA, the last hidden states, of shape (batch, sequence, features), out
        of what ``apply_fn`` returns. By default they are the input of its output head.
      return_scalings: for X-LoRA, whether to return ``(out, scalings)``: besides what ``apply_fn``
        returns, the weights of shape (batch, sequence, layers, experts) that the classifier gives
        the experts, of which ``top_k_lora`` then keeps the largest.

    Returns:
      ``adapted(params, adapter, *args, **kwargs)``, where ``adapter`` is an Adapter, a sequence of
      them, applied in order, or None for the model without any. Arrays among the arguments are
      traced, everything else (flags, numbers, strings, modules) is static.

    Raises:
      ValueError: when called with an adapter that belongs to other params, or that this function
        does not use.
      FallbackError: when a use needs the merged weight and may not have it.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["dense"]["kernel"])
      >>> params, x = {"dense": {"kernel": jnp.ones((4, 3))}}, jnp.ones((2, 4))
      >>> sites = peftjax.find_sites(apply_fn, params, x)
      >>> config = peftjax.LoraConfig(r=2, lora_alpha=4, target_modules=["dense"])
      >>> adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
      >>> adapted = peftjax.adapt(apply_fn)
      >>> adapted(params, adapter, x).shape
      (2, 3)
    """
    model = Model(apply_fn, on_fallback, on_unused)

    # One jitted function for good: JAX's own caches then know the context as well (precision,
    # mesh, x64), which a cache of ours would miss.
    @functools.partial(jax.jit, static_argnums=0)
    def run_adapted(static: Static, arrays: list[Any], adapters: tuple[Adapter, ...]) -> Any:
        adapters = tuple(a.replace(buffers=_frozen(a.buffers)) for a in adapters)
        position = routing(adapters)
        if position is None and batch_axes is not None and any(map(rows, adapters)):
            return run_by_row(model, batch_axes, static, arrays, adapters)
        if position is None:
            return run_with(model, static, arrays, adapters)[0]
        own = adapters[position]
        scalings, _ = first_pass(model, hidden_states, static, arrays, adapters, with_out=False)
        mixed = (*adapters[:position], own.with_scalings(scalings), *adapters[position + 1 :])
        try:
            out, _ = run_with(model, static, arrays, mixed)
        except RouteError as error:
            raise RouteError(
                f"{error} The weights come from hidden states for tokens of shape "
                f"{scalings.shape[:2]}: a model that keeps only some of them before its output "
                f"head has to show them all, with hidden_states=."
            ) from error
        return (out, for_every_layer(scalings, own)) if return_scalings else out

    def adapted(
        params: Any, adapter: Adapter | Sequence[Adapter] | None, *args: Any, **kwargs: Any
    ) -> Any:
        adapters = as_sequence(adapter)
        if return_scalings and routing(adapters) is None:
            raise ValueError(
                "return_scalings=True needs an X-LoRA adapter that mixes its experts by itself"
            )
        if not adapters and not any(isinstance(leaf, Packed) for leaf in leaves_of(params)):
            return apply_fn(params, *args, **kwargs)
        arrays, static = split((params, args, kwargs))
        return run_adapted(static, arrays, adapters)

    return adapted


@jax.custom_jvp
def _frozen(buffers: Any) -> Any:
    """The buffers themselves; differentiating with respect to them is an error."""
    return buffers


@_frozen.defjvp
def _no_gradient(primals: tuple[Any], tangents: tuple[Any]) -> Any:
    raise TypeError(
        "an adapter's buffers are frozen, and the gradient is being taken with respect to them: "
        "differentiate with respect to adapter.params alone, as in "
        "jax.grad(lambda p: loss(adapter.replace(params=p)))(adapter.params)"
    )
