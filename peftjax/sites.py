"""What an adapter can attach to: the weights a function uses linearly, and how it uses them."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.engine.run import mark, run
from peftjax.engine.trace import Biased, Record, Seen, Stray, Trace, Used
from peftjax.engine.views import Kind, Role
from peftjax.trees import leaf_paths, split

NO_SITES = (
    "there is nothing to adapt: no array of params meets a product, a convolution or a lookup in "
    "this function. The call is find_sites(apply_fn, params, *args); from_linen and from_nnx make "
    "apply_fn out of a module"
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a params tree: its dotted path, shape and dtype.

    The path joins the keys from the root: ``encoder.layer.0.query.kernel``. ``site`` is the one
    whose weight or bias the array is, if it is any.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    site: "Site | None" = dataclasses.field(default=None, repr=False, hash=False)

    @property
    def module(self) -> str:
        """The dotted path without the array's own name."""
        return self.path.rpartition(".")[0]

    @property
    def leaf_name(self) -> str:
        """The array's own name: ``kernel``, ``bias``, ``embedding``."""
        return self.path.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class Site:
    """One frozen weight and how the model uses it, as its trace showed it.

    Attributes:
      name: dotted path of the weight's module; where one module holds several weights, the
        weight's own name stays on (``layers.attn.wq``).
      path: dotted path of the weight itself in the params tree.
      shape: shape of the weight.
      dtype: dtype of the weight.
      kind: ``dense`` (a dot product of any shape), ``conv`` or ``lookup`` (an embedding).
      in_axes: axes summed over; the row axis of a lookup.
      out_axes: axes that appear in the result.
      stack_axes: axes along which independent weights are stacked: scanned layers, experts,
        vmapped members. The first is the one that layer indices count.
      bias: dotted path of the bias added to the result, or None.
      bias_stack_axes: the axes of the bias that are stacked, in the order of ``stack_axes``.
      tap_axes: of the in-axes, those along which the taps of a convolution's kernel lie, in the
        order of the image's axes.
      groups: feature groups of a convolution.
      dilated: whether the taps of a convolution's kernel lie apart.
      spread: whether the points of its image do, which makes a transposed convolution.
      uneven: whether its steps or its padding differ between the axes of the image.
      is_head: whether the result reaches an output of the function through views, its bias and
        scalar operations alone.
      is_tied: whether the weight is used both ways round, from its in-axes to its out-axes and
        back: a table that is the output head too, or the two halves of an autoencoder.
      layers: indices selected along the first stack axis; None means all of them.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    kind: Kind
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...] = ()
    bias: str | None = None
    bias_stack_axes: tuple[int, ...] = ()
    tap_axes: tuple[int, ...] = ()
    groups: int = 1
    dilated: bool = False
    spread: bool = False
    uneven: bool = False
    is_head: bool = False
    is_tied: bool = False
    layers: tuple[int, ...] | None = None

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of the in-axes, in the weight's own order."""
        return tuple(self.shape[axis] for axis in self.in_axes)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the out-axes, in the weight's own order."""
        return tuple(self.shape[axis] for axis in self.out_axes)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Shape of the stack axes with only the selected layers counted."""
        full = self.full_stack_shape
        return full if self.layers is None else (len(self.layers), *full[1:])

    @property
    def full_stack_shape(self) -> tuple[int, ...]:
        """Shape of the stack axes, all layers counted."""
        return tuple(self.shape[axis] for axis in self.stack_axes)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The role of each axis."""
        return tuple(
            "in" if axis in self.in_axes else "out" if axis in self.out_axes else "stack"
            for axis in range(len(self.shape))
        )

    @property
    def in_size(self) -> int:
        """Number of inputs: the product of ``in_shape``."""
        return math.prod(self.in_shape)

    @property
    def out_size(self) -> int:
        """Number of outputs: the product of ``out_shape``."""
        return math.prod(self.out_shape)


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight, as one trace saw it.

    Attributes:
      primitive: the JAX primitive that consumed the weight.
      transposed: whether the use maps the out-space to the in-space (a tied head).
      fallback: why the merged weight had to be built for this use; empty on the fast path.
      tokens: how many vectors one call sent through the weight here; of a stack, through each
        member. A lookup sends none.
    """

    primitive: str
    transposed: bool = False
    fallback: str = ""
    tokens: int = 0


def _axes(axes: tuple[int, ...]) -> str:
    return ", ".join(map(str, axes))


def _counted(uses: tuple[Use, ...]) -> str:
    """How often a site is used, and what cannot use its factors."""
    materialised = Counter(use.primitive for use in uses if use.fallback)
    notes = [f"{primitive} materialises" for primitive in materialised]
    return ", ".join([str(len(uses)), *notes])


@dataclasses.dataclass(frozen=True)
class Sites(Mapping[str, Site]):
    """The linear weights of a function, by module path; what ``find_sites`` returns.

    Attributes:
      sites: the sites, in the order of the params tree.
      leaves: every array of the params tree, linear or not.
      uses: what the trace saw of each site, by name.
      others: of an adapter's sites, those of the model that it does not adapt: names in its files
        must not mean them.
      strays: path and primitive of each array that is no site, although two of its axes or more met
        something: a masked kernel meets ``mul``, a table of positions ``add``.
    """

    sites: tuple[Site, ...]
    leaves: tuple[Leaf, ...] = dataclasses.field(default=(), repr=False)
    uses: tuple[tuple[str, tuple[Use, ...]], ...] = dataclasses.field(
        default=(), repr=False, compare=False
    )
    others: tuple[Site, ...] = dataclasses.field(default=(), repr=False, compare=False)
    strays: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False, compare=False)

    def __getitem__(self, name: str) -> Site:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return (site.name for site in self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __hash__(self) -> int:
        return self._hash

    def only(self, chosen: tuple[Site, ...]) -> "Sites":
        """Some of these sites, perhaps with some of their layers, for an adapter to know."""
        adapted = {site.name: site.layers for site in chosen}
        others = []
        for site in self.sites:
            if site.name not in adapted:
                others.append(site)
            elif adapted[site.name] is not None:
                rest = set(range(site.full_stack_shape[0])).difference(adapted[site.name] or ())
                others.append(dataclasses.replace(site, layers=tuple(sorted(rest))))
        return Sites(chosen, others=tuple(others))

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.sites, self.leaves))

    @functools.cached_property
    def _by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    def __str__(self) -> str:
        uses = dict(self.uses)
        columns = ("module", "kind", "shape", "in", "out", "stacked", "bias", "uses")
        rows = [
            (
                site.name,
                "head" if site.is_head else site.kind,
                " x ".join(map(str, site.shape)),
                _axes(site.in_axes),
                _axes(site.out_axes),
                _axes(site.stack_axes),
                (site.bias or "").rpartition(".")[2],
                _counted(uses.get(site.name, ())),
            )
            for site in self.sites
        ]
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (columns, tuple("-" * width for width in widths), *rows)
        ]
        if not self.sites:
            lines.append(NO_SITES)
        if self.strays:
            lines += ["", not_followed(self.strays)]
        return "\n".join(lines)


def not_followed(strays: Sequence[tuple[str, str]], most: int = 8) -> str:
    """Says which arrays no product was seen of, and what each met instead."""
    named = ", ".join(f"{path} ({primitive})" for path, primitive in strays[:most])
    return f"not followed to a product: {named}" + (", ..." if len(strays) > most else "")


def find_sites(apply_fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Sites:
    """Finds every weight that a function uses linearly, by tracing it.

    Nothing is computed: the arguments may be ``jax.ShapeDtypeStruct``s. A weight counts if it has
    two axes or more and meets a dot product, a convolution, a lookup or a ragged dot, directly or
    after transposes, casts, reshapes and slices, anywhere inside jit, scan, while, cond, remat,
    vmap, shard_map and functions with derivative rules of their own.

    Args:
      apply_fn: a pure function of a params tree and whatever else.
      params: the params tree, of arrays or ShapeDtypeStructs.
      *args: further arguments of ``apply_fn``; leaves that are no arrays are static.
      **kwargs: likewise.

    Returns:
      The sites by module path; printing them gives a table, and below it the arrays of two axes or
      more that met something else than a product.

    Example:
      >>> import jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"] + params["dense"]["bias"][None]
      >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 4)))
      >>> sites["dense"].in_axes, sites["dense"].out_axes, sites["dense"].bias
      ((0,), (1,), 'dense.bias')
    """
    if not callable(apply_fn):
        raise TypeError(
            f"the call is find_sites(apply_fn, params, *args), with a function of a params tree: "
            f"apply_fn is of {type(apply_fn).__name__}"
        )
    arrays, static = split((params, args, kwargs))
    leaves = leaf_paths(params)

    def call(arrays: list[Any]) -> Any:
        params, args, kwargs = static.fill(arrays)
        return apply_fn(params, *args, **kwargs)

    def trace(roles: Mapping[int, tuple[Role, ...] | None]) -> tuple[list[Record], set[int]]:
        state = Trace(list(leaves))
        heads: set[int] = set()

        def marked(arrays: list[Any]) -> Any:
            views = [mark(x, i, roles[i]) if i in roles else x for i, x in enumerate(arrays)]
            out, found = run(state, call, arrays, views)
            heads.update(found)
            return out

        jax.make_jaxpr(marked)(arrays)
        return list(state.records.values()), heads

    floats = [
        i for i, x in enumerate(leaves.values()) if x.ndim and jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    every = tuple(Leaf(path, tuple(x.shape), x.dtype) for path, x in leaves.items())
    # The first replay finds what each weight does, the second how each use will be adapted.
    records, heads = trace(dict.fromkeys(floats))
    # In reverse, so that of all that an array met the first stays.
    stops = {r.leaf: r.primitive for r in reversed(records) if isinstance(r, Stray) and r.axes > 1}
    found = {i: s for i in floats if (s := _site(i, every, records, i in heads)) is not None}
    found = dict(zip(found, _named(list(found.values())), strict=True))
    records, _ = trace({i: site.roles for i, site in found.items()})
    uses = {site.name: _uses(i, records) for i, site in found.items()}
    owners = {site.bias: site for site in found.values()} | {s.path: s for s in found.values()}
    every = tuple(dataclasses.replace(leaf, site=owners.get(leaf.path)) for leaf in every)
    strays = tuple(
        (leaf.path, stops[i]) for i, leaf in enumerate(every) if i in stops and not leaf.site
    )
    return Sites(tuple(found.values()), every, tuple(uses.items()), strays=strays)


def _site(leaf: int, leaves: tuple[Leaf, ...], records: list[Record], is_head: bool) -> Site | None:
    """The site that a leaf is, from the linear uses seen of it; a lookup says most."""
    shape = leaves[leaf].shape
    seen = [r for r in records if isinstance(r, Seen) and r.leaf == leaf]
    clear = [r for r in seen if all(role for _, role in r.roles)]
    if len(shape) < 2 or not clear:
        return None
    use = next((r for r in clear if r.kind == "lookup"), clear[0])
    met = dict(use.roles)
    # An axis that was sliced away on the way to the use is a stack of weights.
    roles = [met.get(axis, "stack") for axis in range(len(shape))]
    if "in" not in roles:
        return None
    axes = {
        role: tuple(axis for axis, own in enumerate(roles) if own == role)
        for role in ("in", "out", "stack")
    }
    site = Site(
        name="",
        path=leaves[leaf].path,
        shape=shape,
        dtype=leaves[leaf].dtype,
        kind=use.kind,
        in_axes=axes["in"],
        out_axes=axes["out"],
        stack_axes=axes["stack"],
        tap_axes=tuple(axis for axis in use.taps if axis in axes["in"]),
        groups=use.groups,
        **use.window._asdict(),
        # A table's own rows may be the output; only as a linear map is it a head.
        is_head=is_head and any(r.kind != "lookup" for r in seen),
        is_tied=any({role, roles[axis]} == {"in", "out"} for r in seen for axis, role in r.roles),
    )
    biases = {
        (leaves[r.bias].path, stacked)
        for r in records
        if isinstance(r, Biased)
        and r.leaf == leaf
        and (stacked := _bias_stack(leaves[r.bias].shape, r.kept, site)) is not None
    }
    if len(biases) != 1:
        return site
    bias, stacked = biases.pop()
    return dataclasses.replace(site, bias=bias, bias_stack_axes=stacked)


def _bias_stack(
    shape: tuple[int, ...], kept: tuple[int, ...], site: Site
) -> tuple[int, ...] | None:
    """The stacked axes of a leaf added to the result of a site; None if it is no bias of it."""
    gone = [axis for axis in range(len(shape)) if axis not in kept]
    along = list(kept[: max(len(site.stack_axes) - len(gone), 0)])
    stacked = tuple(gone + along)
    own = [shape[axis] for axis in range(len(shape)) if axis not in stacked and shape[axis] != 1]
    fits = [n for n in site.out_shape if n != 1] == own
    same_stack = tuple(shape[axis] for axis in stacked) == site.stack_shape
    return stacked if fits and same_stack else None


def _named(sites: list[Site]) -> list[Site]:
    """The sites under the names of their modules, where a module holds one weight alone."""
    modules = Counter(site.path.rpartition(".")[0] for site in sites)
    named = []
    for site in sites:
        module = site.path.rpartition(".")[0]
        alone = module and modules[module] == 1
        named.append(dataclasses.replace(site, name=module if alone else site.path))
    return named


def _uses(leaf: int, records: list[Record]) -> tuple[Use, ...]:
    return tuple(
        Use(r.primitive, r.transposed, r.fallback, r.tokens)
        for r in records
        if isinstance(r, Used) and r.leaf == leaf
    )
