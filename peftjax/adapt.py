"""The function transformation: a model with adapters in it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from peftjax.adapter import Adapter
from peftjax.attach import as_sequence, attach, check_fits
from peftjax.changes import wants_tokens
from peftjax.engine.run import mark, run
from peftjax.engine.trace import Trace, Used
from peftjax.trees import Static, leaf_paths, split


def adapt(
    apply_fn: Callable[..., Any],
    *,
    on_fallback: Literal["materialize", "error"] = "materialize",
    on_unused: Literal["error", "ignore"] = "error",
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
    if on_fallback not in ("materialize", "error"):
        raise ValueError(f"on_fallback must be 'materialize' or 'error', got {on_fallback!r}")
    if on_unused not in ("error", "ignore"):
        raise ValueError(f"on_unused must be 'error' or 'ignore', got {on_unused!r}")

    # One jitted function for good: JAX's own caches then know the context as well (precision,
    # mesh, x64), which a cache of ours would miss.
    @functools.partial(jax.jit, static_argnums=0)
    def run_adapted(static: Static, arrays: list[Any], adapters: tuple[Adapter, ...]) -> Any:
        params, _, _ = static.fill(arrays)
        adapters = tuple(a.replace(buffers=_frozen(a.buffers)) for a in adapters)

        def call(arrays: list[Any]) -> Any:
            params, args, kwargs = static.fill(arrays)
            return apply_fn(params, *args, **kwargs)

        leaves = leaf_paths(params)
        check_fits(leaves, adapters)
        tokens = _count_tokens(call, arrays, leaves, adapters)
        leaves, views = attach(leaves, adapters, tokens)
        trace = Trace(list(leaves), strict=on_fallback == "error")
        arrays = [*leaves.values(), *arrays[len(leaves) :]]
        marked = [views.get(path, leaf) for path, leaf in leaves.items()]
        out, _ = run(trace, call, arrays, [*marked, *arrays[len(leaves) :]])
        _check_used(trace, adapters, list(leaves), on_unused)
        return out

    def adapted(
        params: Any, adapter: Adapter | Sequence[Adapter] | None, *args: Any, **kwargs: Any
    ) -> Any:
        adapters = as_sequence(adapter)
        if not adapters:
            return apply_fn(params, *args, **kwargs)
        arrays, static = split((params, args, kwargs))
        return run_adapted(static, arrays, adapters)

    return adapted


def _count_tokens(
    call: Callable[[list[Any]], Any],
    arrays: list[Any],
    leaves: Mapping[str, Any],
    adapters: Sequence[Adapter],
) -> dict[str, int]:
    """How many vectors a call sends through each weight that a method asks about."""
    asked = {
        site.path: site
        for adapter in adapters
        for site in adapter.sites.values()
        if wants_tokens(adapter, site)
    }
    if not asked:
        return {}
    trace, paths = Trace(list(leaves)), list(leaves)

    def count(arrays: list[Any]) -> Any:
        marked = [
            mark(x, i, asked[path].roles) if (path := paths[i]) in asked else x
            for i, x in enumerate(arrays[: len(paths)])
        ]
        return run(trace, call, arrays, [*marked, *arrays[len(paths) :]])[0]

    jax.eval_shape(count, arrays)
    tokens: dict[str, int] = dict.fromkeys(asked, 0)
    for record in trace.records.values():
        if isinstance(record, Used):
            tokens[paths[record.leaf]] += record.tokens
    return tokens


def _check_used(
    trace: Trace, adapters: Sequence[Adapter], paths: list[str], on_unused: str
) -> None:
    """Raises if adapters would go unnoticed."""
    used = {paths[r.leaf] for r in trace.records.values() if isinstance(r, Used)}
    for adapter in adapters:
        idle = [site.name for site in adapter.sites.values() if site.path not in used]
        if not idle or (on_unused == "ignore" and len(idle) < len(adapter.sites)):
            continue
        if len(idle) == len(adapter.sites):
            raise ValueError(
                f"this function uses none of the adapter's {len(idle)} modules ({_some(idle)}): "
                f"it would run without the adapter; pass None for that"
            )
        raise ValueError(
            f"this function does not use {len(idle)} of the adapter's {len(adapter.sites)} "
            f"modules ({_some(idle)}): for a function that runs a part of the model use "
            f"adapt(..., on_unused='ignore')"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


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
