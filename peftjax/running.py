"""One run of a model with adapters in it."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.sharding import PartitionSpec

from peftjax.adapter import Adapter
from peftjax.attach import attach, check_fits
from peftjax.changes import wants_tokens
from peftjax.engine import compat
from peftjax.engine.routes import RouteError, taken
from peftjax.engine.run import mark, run
from peftjax.engine.trace import Trace, Used
from peftjax.routes import Mix, Rows
from peftjax.trees import Static, is_array, leaf_paths


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, and what to do where its adapters do not fit.

    Attributes:
      apply_fn: a pure function of a params tree and whatever else.
      on_fallback: as ``adapt`` takes it.
      on_unused: likewise.
    """

    apply_fn: Callable[..., Any]
    on_fallback: Literal["materialize", "error"] = "materialize"
    on_unused: Literal["error", "ignore"] = "error"

    def __post_init__(self) -> None:
        if self.on_fallback not in ("materialize", "error"):
            raise ValueError(
                f"on_fallback must be 'materialize' or 'error', got {self.on_fallback!r}"
            )
        if self.on_unused not in ("error", "ignore"):
            raise ValueError(f"on_unused must be 'error' or 'ignore', got {self.on_unused!r}")


def run_with(
    model: Model,
    static: Static,
    arrays: list[Any],
    adapters: Sequence[Adapter],
    head: str | None = None,
) -> tuple[Any, jax.Array | None]:
    """Runs a model with adapters.

    Args:
      model: the model.
      static: its params and arguments, without their arrays.
      arrays: those arrays.
      adapters: the adapters, in order.
      head: path of a weight of which the input is wanted too, where its result is an output.

    Returns:
      What the model returns, and that input, its features last; None if there is none.
    """
    _, args, kwargs = static.fill(arrays)
    adapters = [_with_lengths(adapter, (args, kwargs)) for adapter in adapters]
    out, hidden, used = _run(model, static, arrays, adapters, head)
    _check_rows(model, static, arrays, adapters, used)
    return out, hidden


def _run(
    model: Model,
    static: Static,
    arrays: list[Any],
    adapters: Sequence[Adapter],
    head: str | None = None,
) -> tuple[Any, jax.Array | None, dict[str, set[int]]]:
    """As ``run_with``; and, for each weight used, the sizes of the axes taken for its rows."""
    params, _, _ = static.fill(arrays)
    adapters = [_of_its_rows(adapter) for adapter in adapters]
    call = plain_call(model, static)
    leaves = leaf_paths(params)
    check_fits(leaves, adapters)
    tokens = _count_tokens(call, arrays, leaves, adapters)
    leaves, views = attach(leaves, adapters, tokens)
    paths = list(leaves)
    if head is not None:
        own = views.get(head) or mark(leaves[head], paths.index(head), None)
        views[head] = dataclasses.replace(own, tapped=True)
    trace = Trace(paths, strict=model.on_fallback == "error")
    arrays = [*leaves.values(), *arrays[len(leaves) :]]
    marked = [views.get(path, leaf) for path, leaf in leaves.items()]
    out, heads = run(trace, call, arrays, [*marked, *arrays[len(leaves) :]])
    used: dict[str, set[int]] = {}
    for record in trace.records.values():
        if isinstance(record, Used):
            sizes = used.setdefault(paths[record.leaf], set())
            sizes.update(() if record.rows is None else (record.rows,))
    _check_used(used, adapters, model.on_unused)
    return out, None if head is None else heads.get(paths.index(head)), used


def plain_call(model: Model, static: Static) -> Callable[[list[Any]], Any]:
    """The model without adapters, as a function of the arrays among its params and arguments."""

    def call(arrays: list[Any]) -> Any:
        params, args, kwargs = static.fill(arrays)
        return model.apply_fn(params, *args, **kwargs)

    return call


def rows(adapter: Adapter) -> int | None:
    """How many rows an adapter tells apart; None if it treats them all alike."""
    match adapter.route:
        case Rows(index=index):
            return index.shape[0]
        case Mix(weights=weights) if weights.ndim > 1:
            return weights.shape[0]
    return None


def _with_lengths(adapter: Adapter, args: Any) -> Adapter:
    """The adapter with the lengths that rows may have, for axes that hold batch x sequence."""
    route, batch = adapter.route, rows(adapter)
    if route is None or batch is None:
        return adapter
    shapes = [leaf.shape for leaf in jax.tree.leaves(args) if is_array(leaf)]
    found = {shape[1] for shape in shapes if len(shape) > 1 and shape[0] == batch}
    lengths = tuple(sorted(found.union(route.lengths)))
    return adapter.replace(route=dataclasses.replace(route, lengths=lengths))


def _of_its_rows(adapter: Adapter) -> Adapter:
    """The adapter with the experts of its rows alone, where the bank has as many or more.

    So a step costs what its rows cost, however large the bank is.
    """
    route = adapter.route
    arrays = jax.tree.leaves((adapter.params, adapter.buffers))
    if not isinstance(route, Rows) or route.index.shape[0] > arrays[0].shape[0]:
        return adapter

    def own(array: jax.Array) -> jax.Array:
        spec = compat.explicit_spec(array)
        fetch = functools.partial(taken, axis=0)
        laid = lambda shape: spec and PartitionSpec(None, *spec[1:])  # noqa: E731
        return compat.automatic(fetch, array, laid)(array, route.index)

    params, buffers = jax.tree.map(own, (adapter.params, adapter.buffers))
    return adapter.replace(
        params=params, buffers=buffers, route=dataclasses.replace(route, in_order=True)
    )


def _check_rows(
    model: Model,
    static: Static,
    arrays: list[Any],
    adapters: Sequence[Adapter],
    used: Mapping[str, set[int]],
) -> None:
    """Raises a RouteError if other axes were taken for those of the rows.

    Where there are as many rows as positions, or an axis was taken for one of batch x sequence,
    the shapes tell nothing; those of a batch with more rows do.
    """
    routed = [each for each in adapters if rows(each)]
    counts = {count for each in routed if (count := rows(each))}
    lengths = {n for each in routed if each.route for n in each.route.lengths if n}
    sizes = {
        size for each in routed for site in each.sites.values() for size in used.get(site.path, ())
    }
    if len(counts) != 1 or counts == {1} or not (counts & lengths or sizes - counts):
        return
    batch = counts.pop()
    _, args, kwargs = static.fill(arrays)
    first = len(arrays) - sum(map(is_array, jax.tree.leaves((args, kwargs))))
    # As many as leave no axis that stays as it is another way to be batch x sequence.
    more = next(
        n
        for n in itertools.count(batch + 1)
        if all(n * one != batch * other for one in lengths for other in lengths)
    )

    def grown(array: Any) -> jax.ShapeDtypeStruct:
        shape = array.shape
        if shape and shape[0] == batch:
            shape = (more, *shape[1:])
        return jax.ShapeDtypeStruct(shape, array.dtype)

    before, arrays = arrays, [*arrays[:first], *map(grown, arrays[first:])]
    routes = [jax.tree.map(grown, each.route) if rows(each) else each.route for each in adapters]

    def run(arrays: list[Any], routes: list[Any]) -> Any:
        both = zip(adapters, routes, strict=True)
        return _run(model, static, arrays, [each.replace(route=own) for each, own in both])[0]

    try:
        jax.eval_shape(run, arrays, routes)
    except RouteError as error:
        if _keeps_rows(model, static, before, arrays, batch):
            return
        raise RouteError(
            f"an axis that looks like that of {batch} rows, or of their positions, is another one: "
            f"with {more} rows, {error}"
        ) from error
    except Exception:
        # A model of this very batch size cannot be asked.
        return


def _keeps_rows(
    model: Model, static: Static, before: list[Any], after: list[Any], batch: int
) -> bool:
    """Whether a model has this many rows written into it, whatever it is given."""
    call = plain_call(model, static)
    outs = (jax.tree.leaves(jax.eval_shape(call, arrays)) for arrays in (before, after))
    pairs = [(one.shape, other.shape) for one, other in zip(*outs, strict=True)]
    kept = [other.count(batch) >= one.count(batch) for one, other in pairs if batch in one]
    return bool(kept) and all(kept)


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


def _check_used(used: Collection[str], adapters: Sequence[Adapter], on_unused: str) -> None:
    """Raises if adapters would go unnoticed."""
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
