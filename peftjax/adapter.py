"""The adapter: a pytree of a few small arrays, and what they belong to."""

import dataclasses
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from peftjax.config import AdapterConfig
from peftjax.engine.compat import automatic
from peftjax.engine.packed import Base, dense, like
from peftjax.factors import Arrays, WeightSpec, accumulation_dtype
from peftjax.routes import Mix, Route
from peftjax.sites import Leaf, Site, Sites
from peftjax.stacks import init_site
from peftjax.targeting import bias_leaves, saved_leaves, select_sites, unmatched_patterns
from peftjax.trees import leaf_paths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Adapter:
    """An adapter of a frozen model: a pytree whose arrays are all it adds.

    Attributes:
      params: the trainable arrays, ``{module: {name: array}}``, under PEFT's names. Take
        gradients with respect to these alone.
      buffers: the frozen arrays: scales, masks, initial factors. New values never recompile.
      key: None, or the PRNG key of a training step, which turns dropout on.
      config: the config. Static.
      sites: the adapted weights. Static.
      saved: whole leaves of the base that are trained too: ``modules_to_save``, ``bias``. Static.
      route: of an adapter of several experts, whose arrays have them on their first axis, which of
        them serve which row or token; None for one that needs no telling, or decides by itself.
    """

    params: dict[str, Arrays]
    buffers: dict[str, Arrays]
    key: PRNGKeyArray | None
    config: AdapterConfig = dataclasses.field(metadata={"static": True})
    sites: Sites = dataclasses.field(metadata={"static": True})
    saved: tuple[Leaf, ...] = dataclasses.field(default=(), metadata={"static": True})
    route: Route | None = None

    def replace(self, **changes: Any) -> Self:
        """This adapter with other values in some of its fields.

        Gradients are taken this way: ``jax.grad(lambda p: loss(adapter.replace(params=p)))``.
        """
        return dataclasses.replace(self, **changes)

    def train(self, key: PRNGKeyArray | None) -> Self:
        """This adapter with dropout on, drawn from ``key``, a new one every step; None: off."""
        if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        return dataclasses.replace(self, key=key)

    def with_scalings(self, scalings: Float[Array, "batch sequence layers experts"]) -> Self:
        """This X-LoRA adapter with its experts mixed so, instead of as its classifier says.

        Args:
          scalings: what ``xlora_scalings`` gave, or one's own; of shape (batch, sequence, 1,
            experts) they are the same for all layers.

        Raises:
          ValueError: the adapter is no X-LoRA, or has other numbers of experts or layers.
        """
        gating = self.config.method.gating
        if gating is None:
            kind = type(self.config).__name__
            raise ValueError(f"only an X-LoRA adapter has scalings, and this one has a {kind}")
        return dataclasses.replace(self, route=Mix(gating.gates(self, scalings)))

    def __repr__(self) -> str:
        size = sum(x.size for x in jax.tree.leaves(self.params))
        kind = type(self.config).__name__.removesuffix("Config")
        mode = "inference" if self.key is None else "training"
        return f"Adapter({kind}, {len(self.sites)} modules, {size:,} parameters, {mode})"


def init_adapter(
    key: PRNGKeyArray,
    config: AdapterConfig,
    sites: Sites,
    params: Any = None,
    *,
    dtype: DTypeLike | None = None,
) -> Adapter:
    """Makes a new adapter for the sites that a config selects.

    Args:
      key: a PRNG key. The numbers of one module depend on its path and this key alone.
      config: the config, such as a ``LoraConfig``.
      sites: what ``find_sites`` found.
      params: the base's params. Needed by ``modules_to_save``, a trained ``bias`` and initial
        values taken from the weights (PiSSA, OLoRA); otherwise only checked.
      dtype: dtype of the adapter's arrays, copies of whole leaves among them; by default the
        weight's or leaf's own, and float32 for those of half precision. (PEFT leaves copies in half
        precision, in which small steps of an optimizer are lost.)

    Returns:
      The adapter, which starts as the identity unless the config says otherwise.

    Raises:
      TypeError: config or sites are something else.
      NoMatchingModuleError: a target or a module to save is not there.
      ValueError: the params are missing or not those of ``sites``, the dtype is not floating, or
        what is adapted or trained whole is not.
    """
    if not isinstance(config, AdapterConfig) or not isinstance(sites, Sites):
        raise TypeError(
            f"the call is init_adapter(key, config, sites, params), with sites from find_sites: "
            f"config is of {type(config).__name__}, sites of {type(sites).__name__}"
        )
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"an adapter's dtype must be floating, got {jnp.dtype(dtype).name}")
    if config.method.gating is not None:
        raise ValueError("an adapter that mixes experts is made of trained ones: use init_xlora")
    chosen = select_sites(config, sites)
    config = _named(config, sites, chosen)
    saved = {leaf.path: leaf for leaf in saved_leaves(config, sites)}
    saved |= {
        leaf.path: leaf for leaf in bias_leaves(getattr(config, "bias", "none"), sites, chosen)
    }
    _check_real(chosen, saved)
    method = config.method
    reads_weight = method.init_reads_weight(config) or method.buffers_read_weight(config)
    leaves: Mapping[str, Any] = {}
    if params is not None:
        leaves = leaf_paths(params)
        check_leaves(leaves, chosen, tuple(saved.values()))
    elif saved or reads_weight:
        what = f"copies of {', '.join(saved)}" if saved else "initial factors out of the weights"
        raise ValueError(f"this config starts from {what}: pass params to init_adapter")

    trainable: dict[str, Arrays] = {}
    frozen: dict[str, Arrays] = {}
    for site in chosen.values():
        own_dtype = _own_dtype(dtype, site.dtype)
        base = leaves[site.path] if reads_weight else None
        own_key = path_key(key, site.path)
        try:
            made = _started(own_key, config, site, weight_spec(site, own_dtype), base)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from error
        trainable[site.name], frozen[site.name] = made
    for path, leaf in saved.items():
        copy = jnp.array(dense(leaves[path]), _own_dtype(dtype, leaf.dtype))
        trainable.setdefault(leaf.module, {})[leaf.leaf_name] = copy
    _warn_unmatched(config, chosen)
    known = sites.only(chosen.sites)
    return Adapter(trainable, frozen, None, config, known, tuple(saved.values()))


def _check_real(chosen: Sites, saved: Mapping[str, Leaf]) -> None:
    """Raises a ValueError for weights and whole leaves that cannot train."""
    for site in chosen.values():
        if not jnp.issubdtype(site.dtype, jnp.floating):
            raise ValueError(
                f"{site.path} is {site.dtype}, and only floating weights can be adapted: name it "
                f"in `exclude_modules`"
            )
    for path, leaf in saved.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{path} is {leaf.dtype}, and only floating arrays can be trained whole: name "
                "what lies beside it in `modules_to_save`, and take another `bias` than 'all' if "
                f"it is called so"
            )


def _own_dtype(dtype: DTypeLike | None, base: np.dtype) -> jnp.dtype:
    """The dtype of arrays that train for one of the base."""
    return jnp.dtype(dtype or accumulation_dtype(base))


def _named(config: AdapterConfig, sites: Sites, chosen: Sites) -> AdapterConfig:
    """The config with names in the place of functions, which no file can hold."""
    if callable(config.target_modules):
        config = dataclasses.replace(config, target_modules=tuple(chosen))
    excludes = config.exclude_modules
    if callable(excludes):
        # A list would also mean modules whose names end so.
        names = [re.escape(site.name) for site in sites.values() if excludes(site)]
        config = dataclasses.replace(config, exclude_modules="|".join(names) or None)
    return config


def _started(
    key: PRNGKeyArray, config: AdapterConfig, site: Site, spec: WeightSpec, base: Base | None
) -> tuple[Arrays, Arrays]:
    """The arrays of one site; those that start from a weight, with its place left to XLA."""
    if base is None:
        return init_site(key, config, site, spec, None)

    def start(key: PRNGKeyArray, base: Base) -> tuple[Arrays, Arrays]:
        return init_site(key, config, site, spec, base)

    def whole(shapes: Any) -> Any:
        return jax.tree.map(lambda _: PartitionSpec(), shapes)

    return automatic(start, like(base), whole)(key, base)


def site_arrays(adapter: Adapter, site: Site) -> tuple[Arrays, Arrays]:
    """The trainable and the frozen arrays of one site that its method made.

    Without leaves saved under its module, and the places of its layers among an X-LoRA's.
    """
    whole = {leaf.leaf_name for leaf in adapter.saved if leaf.module == site.name}
    trained = adapter.params.get(site.name, {})
    own = {name: x for name, x in trained.items() if name not in whole}
    frozen = adapter.buffers[site.name]
    return own, {name: x for name, x in frozen.items() if name != "place"}


def check_single(adapter: Adapter) -> None:
    """Raises a ValueError for an adapter of several experts, which is none to save or combine."""
    if adapter.config.method.gating is not None:
        raise ValueError(
            "an X-LoRA adapter is no single adapter: take its experts, with xlora_experts(adapter)"
        )
    if any("present" in adapter.buffers[site.name] for site in adapter.sites.values()):
        raise ValueError("the adapters of a bank are no single adapter: take one, with bank[name]")


def weight_spec(site: Site, dtype: DTypeLike) -> WeightSpec:
    """What a method is told about the weights of a site."""
    taps = tuple(site.in_axes.index(axis) for axis in site.tap_axes)
    shapes = (site.in_shape, site.out_shape)
    return WeightSpec(site.kind, *shapes, jnp.dtype(dtype), taps, site.groups)


def _warn_unmatched(config: AdapterConfig, chosen: Sites) -> None:
    """Warns of patterns that no adapted module matches, so that they do nothing."""
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field, {})
        if config.pattern_suffix:
            # The name of a tensor, and no end of one.
            known = {name + config.pattern_suffix for name in chosen}
            idle = tuple(key for key in pattern if key not in known)
        else:
            idle = unmatched_patterns(pattern, chosen)
        if idle:
            warnings.warn(
                f"{field}: {', '.join(map(repr, idle))} matches no adapted module",
                UserWarning,
                stacklevel=3,
            )


def check_leaves(leaves: Mapping[str, Any], sites: Sites, saved: Sequence[Leaf] = ()) -> None:
    """Raises a ValueError unless every adapted leaf is there, in the shape the adapter knows."""
    wanted = [(s.path, s.shape, s.name) for s in sites.values()]
    wanted += [(leaf.path, leaf.shape, leaf.path) for leaf in saved]
    problems = []
    for path, shape, name in wanted:
        if path not in leaves:
            problems.append(f"{name}: there is no {path}")
        elif tuple(leaves[path].shape) != shape:
            problems.append(f"{path}: {tuple(leaves[path].shape)} instead of {shape}")
    if problems:
        shown = "\n  ".join(problems[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"this adapter was made for other params; make one with find_sites and init_adapter "
            f"on these, or pass the params it was made for:\n  {shown}{more}"
        )


def path_key(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """A key of its own for every path, the same in every process and with any other targets."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
