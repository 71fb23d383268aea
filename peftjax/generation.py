"""Decoding with a KV cache: a prompt is read once, then token follows token in one program."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path
from jaxtyping import Array, Float, Int, PRNGKeyArray

from peftjax.adapt import adapt
from peftjax.adapter import Adapter
from peftjax.attach import as_sequence
from peftjax.engine import compat
from peftjax.first_pass import HiddenStates, routing, xlora_scalings
from peftjax.trees import Static, split


def generate(
    apply_fn: Callable[[Any, Array, Any], tuple[Array, Any]],
    params: Any,
    adapter: Adapter | Sequence[Adapter] | None,
    ids: Int[Array, "batch length"],
    cache: Any,
    *,
    max_new_tokens: int,
    temperature: float | Float[Array, ""] = 0.0,
    key: PRNGKeyArray | None = None,
    top_k: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    token_by_token: bool = False,
    batch_axes: Any = None,
    hidden_states: HiddenStates | None = None,
    return_scalings: bool = False,
) -> (
    Int[Array, "batch new"]
    | tuple[Int[Array, "batch new"], Float[Array, "batch sequence layers experts"]]
):
    """Decodes new tokens with a causal model, its KV cache and any adapters.

    The whole is one compiled program for each ``apply_fn``: define that once, not in each call.
    Other arrays are no new program, be they params, adapters, rows of a bank, prompts of the same
    shape, keys or temperatures above 0. With X-LoRA each of its two passes has a cache of its own,
    so that a token costs two steps and not two runs over all tokens before it.

    Args:
      apply_fn: ``apply_fn(params, ids, cache) -> (logits, cache)``, a pure function that reads the
        next tokens of each row, of shape (batch, length), and gives logits of shape (batch, length,
        vocabulary), or (batch, 1, vocabulary) for the last position alone. Where ``hidden_states``
        is given, it may return more behind these two.
      params: its params.
      adapter: an Adapter, a sequence of them or None; a bank's rows and X-LoRA too.
      ids: the prompts, of one length. Shorter ones are padded on the left, and what is padding is
        the model's own matter: its cache may hold a mask.
      cache: the empty cache, a tree of arrays that keep their shapes, with room for all tokens but
        the last new one; a cache that is too small is nothing that can be seen from outside.
      max_new_tokens: how many tokens to decode for each row.
      temperature: what logits are divided by before a token is drawn; 0 takes the likeliest.
      key: a PRNG key, with a temperature. The i-th token is drawn with ``fold_in(key, i)``.
      top_k: draw from that many of the likeliest tokens alone; of equal ones, from those in front.
      eos_token_id: the token that ends a row, or a sequence of several.
      pad_token_id: what follows it; by default the (first) ``eos_token_id``.
      token_by_token: read the prompt in steps of one token too, as a model needs that takes only
        one with its cache; the attention of Flax with ``decode=True`` is such a one.
      batch_axes: where the rows lie in ids and cache, as ``adapt`` takes it, for a bank's rows in a
        model whose shapes do not tell. All of the cache then needs an axis of rows.
      hidden_states: for X-LoRA, the last hidden states out of what ``apply_fn`` returns, as
        ``adapt`` takes it; needed by a model whose logits are more than the output head gives, such
        as capped ones. Define it once, like ``apply_fn``.
      return_scalings: for X-LoRA, whether to return ``(tokens, scalings)``: besides the tokens the
        weights the experts got, of shape (batch, length + max_new_tokens - 1, layers, experts).

    Returns:
      The new tokens, of shape (batch, max_new_tokens); in the dtype of ``ids``, or int32 where that
      is a narrower one.

    Raises:
      ValueError: an option is out of range, a temperature lacks its key, or ``apply_fn`` does not
        return logits and a cache like the one it got; and whatever ``adapt`` raises.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> def apply_fn(params, ids, total):  # the likeliest token is the sum of all before it
      ...     sums = total[:, None] + jnp.cumsum(ids, axis=1)
      ...     return params["head"]["kernel"][sums % 10], sums[:, -1]
      >>> params, prompts = {"head": {"kernel": jnp.eye(10)}}, jnp.array([[1, 2], [0, 3]])
      >>> cache = jnp.zeros(2, jnp.int32)
      >>> peftjax.generate(apply_fn, params, None, prompts, cache, max_new_tokens=4).tolist()
      [[3, 6, 2, 4], [3, 6, 2, 4]]

      Of a linen module the cache is a collection; in NNX it is the state that is no param:

      >>> def apply_fn(params, ids, cache):  # doctest: +SKIP
      ...     return module.apply({"params": params, **cache}, ids, mutable=["cache"])
      >>> filled = module.init(key, jnp.zeros((batch, room), int))  # doctest: +SKIP
      >>> cache = {"cache": jax.tree.map(jnp.zeros_like, filled["cache"])}  # doctest: +SKIP

      >>> stateful, params = peftjax.from_nnx(model)  # doctest: +SKIP
      >>> def apply_fn(params, ids, cache):  # doctest: +SKIP
      ...     return stateful(params, ids, state=cache)
      >>> cache = stateful.state  # doctest: +SKIP
    """
    adapters = as_sequence(adapter)
    if return_scalings and routing(adapters) is None:
        raise ValueError(
            "return_scalings=True needs an X-LoRA adapter that mixes its experts by itself"
        )
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"ids are integers of shape (batch, length), one token a row at least; got "
            f"{ids.dtype}{list(ids.shape)}"
        )
    if ids.dtype.itemsize < 4:
        # Prompts of few words may be followed by any.
        ids = ids.astype(jnp.int32)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}")
    traced = isinstance(temperature, jax.core.Tracer)
    if not traced and not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, and finite, got {temperature}")
    drawn = traced or bool(temperature != 0)
    if drawn and key is None:
        raise ValueError("to draw tokens at a temperature pass key=, a PRNG key")
    ends = _ends(eos_token_id)
    if pad_token_id is not None and not ends:
        raise ValueError("pad_token_id is what follows an eos_token_id, and there is none")
    arrays, static = split(params)
    tokens, scalings = _decode(
        apply_fn,
        static,
        arrays,
        adapters,
        ids,
        cache,
        jnp.asarray(temperature, jnp.float32) if drawn else None,
        key if drawn else None,
        count=max_new_tokens,
        top_k=top_k,
        ends=ends,
        pad=ends[0] if ends and pad_token_id is None else pad_token_id,
        batch_axes=split(batch_axes)[1],
        hidden_states=hidden_states,
        token_by_token=token_by_token,
        return_scalings=return_scalings,
    )
    return (tokens, scalings) if return_scalings else tokens


@functools.partial(
    jax.jit,
    static_argnums=(0, 1),
    static_argnames=(
        "count",
        "top_k",
        "ends",
        "pad",
        "batch_axes",
        "hidden_states",
        "token_by_token",
        "return_scalings",
    ),
)
def _decode(
    apply_fn: Callable[..., Any],
    static: Static,
    arrays: list[Any],
    adapters: tuple[Adapter, ...],
    ids: Int[Array, "batch length"],
    cache: Any,
    temperature: Float[Array, ""] | None,
    key: PRNGKeyArray | None,
    *,
    count: int,
    top_k: int | None,
    ends: tuple[int, ...],
    pad: int | None,
    batch_axes: Static,
    hidden_states: HiddenStates | None,
    token_by_token: bool,
    return_scalings: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """The new tokens, and X-LoRA's scalings for all tokens that were read."""
    params = static.fill(arrays)
    checked = _checked(apply_fn, more=hidden_states is not None)
    adapted = adapt(checked, batch_axes=batch_axes.fill([]))
    first = xlora_scalings(checked, hidden_states=hidden_states)
    step = _stepping(adapted, first, params, adapters)

    def chosen(
        logits: Float[Array, "batch vocabulary"], place: Any, done: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        token = _pick(logits, temperature, None if key is None else (key, place), top_k)
        token = token.astype(ids.dtype)
        if not ends:
            return token, done
        token = jnp.where(done, jnp.asarray(pad, ids.dtype), token)
        return token, done | (token[:, None] == jnp.asarray(ends, ids.dtype)[None]).any(axis=1)

    def read(caches: Any, token: jax.Array) -> tuple[Any, jax.Array | None]:
        _, scalings, caches = step(token[:, None], caches)
        return caches, scalings

    def follow(carry: Any, place: jax.Array) -> tuple[Any, Any]:
        token, done, caches = carry
        logits, scalings, caches = step(token[:, None], caches)
        token, done = chosen(logits, place, done)
        return (token, done, caches), (token[:, None], scalings)

    caches, seen = (cache, None if routing(adapters) is None else cache), []
    if token_by_token:
        caches, scalings = lax.scan(read, caches, ids[:, :-1].T)
        ids, seen = ids[:, -1:], [_in_order(scalings)]
    logits, scalings, caches = step(ids, caches)
    token, done = chosen(logits, 0, jnp.zeros_like(ids[:, 0], bool))
    _, later = lax.scan(follow, (token, done, caches), jnp.arange(1, count))
    tokens, after = _in_order(later)
    tokens = jnp.concatenate([token[:, None], tokens], axis=1)
    seen = [*seen, scalings, after] if return_scalings else [None]
    return tokens, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *seen)


def _in_order(steps: Any) -> Any:
    """What steps of one token gave, (steps, batch, 1, ...), as (batch, steps, ...)."""
    return jax.tree.map(lambda array: jnp.moveaxis(array[:, :, 0], 0, 1), steps)


def _ends(eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """The tokens that end a row."""
    ends = np.atleast_1d(() if eos_token_id is None else eos_token_id)
    if ends.size and (ends.ndim > 1 or not np.issubdtype(ends.dtype, np.integer)):
        raise ValueError(f"eos_token_id is a token or a sequence of them, got {eos_token_id!r}")
    return tuple(ends.tolist())


def _stepping(
    adapted: Callable[..., Any],
    first: Callable[..., Any],
    params: Any,
    adapters: tuple[Adapter, ...],
) -> Callable[[jax.Array, Any], tuple[jax.Array, jax.Array | None, Any]]:
    """What reads tokens: gives the last position's logits, X-LoRA's scalings and the caches."""
    position = routing(adapters)

    def step(ids: jax.Array, caches: Any) -> tuple[jax.Array, jax.Array | None, Any]:
        (cache, passing), scalings, own = caches, None, list(adapters)
        if position is not None:
            scalings, (_, passing, *_) = first(params, adapters, ids, passing)
            if scalings.shape[:2] != ids.shape:
                raise ValueError(
                    f"X-LoRA's classifier needs a hidden state for every token, and this model's "
                    f"output head reads those of shape {scalings.shape[:2]} for ids of shape "
                    f"{ids.shape}: let it read all of them, or pass token_by_token=True"
                )
            own[position] = adapters[position].with_scalings(scalings)
        logits, cache, *_ = adapted(params, own, ids, cache)
        return logits[:, -1], scalings, (cache, passing)

    return step


def _pick(
    logits: Float[Array, "batch vocabulary"],
    temperature: Float[Array, ""] | None,
    source: tuple[PRNGKeyArray, Any] | None,
    top_k: int | None,
) -> Int[Array, " batch"]:
    """The next token of each row: the likeliest, or one drawn with a key for its place."""
    logits = logits.astype(jnp.float32)
    if temperature is None or source is None:
        return jnp.argmax(logits, axis=-1)
    if top_k is not None:
        spec = compat.explicit_spec(logits)
        whole = compat.place_like(logits, spec and PartitionSpec(spec[0], None), logits)
        values, places = lax.top_k(whole, min(top_k, logits.shape[-1]))
        least, last = values[:, -1:], places[:, -1:]
        # Of tokens as likely as the least of them, those in front are among them.
        tied = (whole == least) & (jnp.arange(logits.shape[-1])[None] <= last)
        logits = jnp.where((whole > least) | tied, whole, -jnp.inf)
    # The likeliest becomes 0, which no temperature makes infinite.
    logits = logits - logits.max(axis=-1, keepdims=True)
    temperature = jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    return jax.random.categorical(jax.random.fold_in(*source), logits / temperature)


def _checked(
    apply_fn: Callable[..., Any], *, more: bool
) -> Callable[[Any, jax.Array, Any], tuple[Any, ...]]:
    """A model that raises a ValueError unless it returns logits and a cache like the one it got."""

    def run(params: Any, ids: jax.Array, cache: Any) -> tuple[Any, ...]:
        out = apply_fn(params, ids, cache)
        if not isinstance(out, tuple | list) or len(out) < 2 or (len(out) > 2 and not more):
            many = isinstance(out, tuple | list)
            kind = "an array" if isinstance(out, jax.Array) else f"a {type(out).__name__}"
            raise ValueError(
                f"apply_fn(params, ids, cache) has to return (logits, cache), got "
                f"{f'{len(out)} values' if many else kind}"
            )
        logits, after, *rest = out
        batch, length = ids.shape
        shape = jnp.shape(logits)
        if len(shape) != 3 or shape[0] != batch or shape[1] not in (1, length):
            raise ValueError(
                f"for ids of shape {ids.shape} the model's logits have to be (batch, length, "
                f"vocabulary), or (batch, 1, vocabulary) for the last position alone, got {shape}"
            )
        old, new = _shapes(cache), _shapes(after)
        changed = [
            f"{name or 'the cache'} from {old.get(name, 'nothing')} to {new.get(name, 'nothing')}"
            for name in (old | new)
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise ValueError(
                f"the cache has to keep its structure and shapes, and this model changes "
                f"{'; '.join(changed[:5])}"
            )
        return logits, after, *rest

    return run


def _shapes(cache: Any) -> dict[str, str]:
    """What the arrays of a cache are like, by their paths."""
    leaves = tree_flatten_with_path(jax.eval_shape(lambda: cache))[0]
    return {keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
