"""Several adapters made into one: weighted sums of what they change, exact or sparse."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from peftjax.adapter import Adapter
from peftjax.algebra.lowrank import Pair, best_factors, best_product, plain_lora
from peftjax.algebra.sparsity import SIGNS, SPARSE, Rule
from peftjax.attach import as_sequence
from peftjax.config import AdapterConfig
from peftjax.methods.ia3 import IA3Config
from peftjax.methods.lora import LoraConfig
from peftjax.sites import Leaf, Site, Sites
from peftjax.targeting import exact_names
from peftjax.unstacking import Part, Single, indices, restack, unstack

_TYPES = ("linear", "cat", "svd", *SPARSE, *(f"{rule}_svd" for rule in SPARSE))


def combine_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    key: PRNGKeyArray | None = None,
) -> Adapter:
    r"""Combines LoRA adapters into one, or IA3 adapters, as PEFT's ``add_weighted_adapter`` does.

    Of every weight, each layer of a stack by itself, adapter i changes :math:`s_i A_i B_i`, which
    the combination shall change :math:`w_i` times. With :math:`c_i = w_i s_i`:

    .. math::

      \begin{aligned}
      \texttt{cat}: \quad & A = [c_1 A_1, c_2 A_2, \dots], \quad B = [B_1; B_2; \dots] \\
      \texttt{svd}: \quad & A B \approx \textstyle\sum_i c_i A_i B_i \\
      \texttt{linear}: \quad & A = \textstyle\sum_i \mathrm{sgn}(c_i) \sqrt{|c_i|} A_i, \quad
        B = \textstyle\sum_i \sqrt{|c_i|} B_i
      \end{aligned}

    ``cat`` is exact, at the sum of the ranks. ``svd`` is the best there is at its rank, and no
    matrix of the weight's size is built for it. ``linear`` is a rough sum: products of one
    adapter's A with another's B come in, and ranks must be equal.

    The others make each :math:`A_i` and :math:`B_i` sparse before they are summed as in
    ``linear``, or with ``_svd`` each whole change :math:`s_i A_i B_i`, which is built. They keep a
    share ``density`` of the numbers: ``magnitude_prune`` and ``ties`` the largest, ``dare_linear``
    and ``dare_ties`` random ones, divided by the density. ``ties`` and ``dare_ties`` then elect a
    sign for each number, drop those of the other sign, and divide by how many are left.

    An adapter that does not have a weight counts as one that does not change it. So of IA3
    adapters, whose scales are summed, it counts with scales of one; in PEFT's sum it counts as
    zero. Further unlike PEFT: a ``lora_bias`` is summed too, whole saved leaves are kept, a single
    adapter is combined by the type that was asked for, and ``use_rslora`` of the first adapter does
    not make the sum :math:`\sqrt{r}` times as large.

    Args:
      adapters: LoRA or IA3 adapters of the same model, not traced.
      weights: how much of each, perhaps negative.
      combination_type: ``"linear"``, ``"cat"``, ``"svd"``, ``"ties"``, ``"ties_svd"``,
        ``"dare_linear"``, ``"dare_ties"``, ``"dare_linear_svd"``, ``"dare_ties_svd"``,
        ``"magnitude_prune"`` or ``"magnitude_prune_svd"``. Of IA3 adapters ``"linear"`` alone.
      svd_rank: the largest rank of ``svd`` and ``*_svd``; by default that of the adapters.
      density: the share to keep, in (0, 1], where the type makes something sparse.
      majority_sign_method: elect signs by the ``"total"`` of the numbers or by the
        ``"frequency"`` of their signs.
      key: what ``dare_*`` draws from.

    Returns:
      An adapter of all the weights that one of them has, of scale 1, with a ``rank_pattern`` where
      ranks differ. Saved leaves come as they are from the one adapter that has them.

    Raises:
      ValueError: the adapters do not go together or are no plain LoRA, or an argument is missing,
        out of range, or unused.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.ones((8, 6))}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 8)))
      >>> configs = [peftjax.LoraConfig(r=r, lora_alpha=16, target_modules="dense") for r in (2, 3)]
      >>> adapters = [peftjax.init_adapter(jax.random.key(0), each, sites) for each in configs]
      >>> peftjax.combine_adapters(adapters, [0.7, -0.3], combination_type="cat").config.r
      5

    References:
      Yadav et al., TIES-Merging: Resolving Interference When Merging Models, 2023,
      https://arxiv.org/abs/2306.01708

      Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous Models as a
      Free Lunch, 2023, https://arxiv.org/abs/2311.03099
    """
    adapters, weights = as_sequence(adapters), tuple(weights)
    _check_arguments(combination_type, svd_rank, density, majority_sign_method, key)
    _check_adapters(adapters, weights, combination_type)
    sites = _union(adapters)
    saved, fields = _saved(adapters, sites), _fields(adapters, sites)
    config = adapters[0].config
    if isinstance(config, LoraConfig):
        _check_biases(adapters, sites)
        fields |= {"bias": _bias(adapters), "lora_dropout": config.lora_dropout}
    parts = _parts(adapters, sites)
    if isinstance(config, IA3Config):
        return _ia3(config, sites, parts, weights, saved, fields)

    rule = Rule(combination_type.removesuffix("_svd"), density, majority_sign_method, key)
    if combination_type in ("linear", *SPARSE):
        _check_ranks(parts, combination_type)
    rank = svd_rank or max(_rank(each) for own in parts.values() for each in own.values())
    factors: dict[Part, Pair] = {}
    for part, own in parts.items():
        if combination_type in ("cat", "svd"):
            pair = _side_by_side(own, weights)
            factors[part] = pair if combination_type == "cat" else best_product(*pair, rank)
        elif combination_type.endswith("_svd"):
            dense = {i: _change(each) for i, each in own.items()}
            factors[part] = best_factors(rule.mixed(dense, weights, f"{part} AB"), rank)
        else:
            factors[part] = _factor_by_factor(rule, part, own, weights)
    dtypes = {part: _dtype(own.values()) for part, own in parts.items()}
    biased = any(isinstance(a.config, LoraConfig) and a.config.lora_bias for a in adapters)
    shifts = {part: _shift(own, weights) for part, own in parts.items()} if biased else None
    return plain_lora(sites, factors, dtypes, shifts=shifts, saved=saved, **fields)


Own = Mapping[int, Single]  # by adapter, what those that have one weight hold for it


def _factor_by_factor(rule: Rule, part: Part, own: Own, weights: Sequence[float]) -> Pair:
    """A made of the A, B made of the B; the sign of a weight goes to A alone."""
    scales = {i: weights[i] * _scaling(each) for i, each in own.items()}
    roots = [float(np.sqrt(abs(scales.get(i, 0.0)))) for i in range(len(weights))]
    signed = [float(np.copysign(root, scales.get(i, 0.0))) for i, root in enumerate(roots)]
    a, b = ({i: pair[side] for i, pair in _pairs(own).items()} for side in (0, 1))
    return rule.mixed(a, signed, f"{part} A"), rule.mixed(b, roots, f"{part} B")


def _side_by_side(own: Own, weights: Sequence[float]) -> Pair:
    """Factors whose product is the sum of the weighted changes."""
    pairs = _pairs(own)
    a = [weights[i] * _scaling(own[i]) * pair[0] for i, pair in pairs.items()]
    return np.concatenate(a, axis=1), np.concatenate([b for _, b in pairs.values()], axis=0)


def _pairs(own: Own) -> dict[int, Pair]:
    """A and B as matrices, in double precision."""
    pairs = {}
    for i, each in own.items():
        a, b = (each.params[name].astype(np.float64) for name in ("lora_A", "lora_B"))
        pairs[i] = a.reshape(each.spec.in_size, -1), b.reshape(-1, each.spec.out_size)
    return pairs


def _change(single: Single) -> np.ndarray:
    """What an adapter changes about a weight, which is as large: not in double precision."""
    wide = np.float64 if single.spec.dtype == np.float64 else np.float32
    ((a, b),) = _pairs({0: single}).values()
    return (_scaling(single) * a).astype(wide) @ b.astype(wide)


def _shift(own: Own, weights: Sequence[float]) -> np.ndarray:
    """What is added to the bias of one weight, all adapters together."""
    shift = np.zeros(next(iter(own.values())).spec.out_shape)
    for i, each in own.items():
        if "lora_B_bias" in each.params:
            shift = shift + weights[i] * _scaling(each) * each.params["lora_B_bias"]
    return shift


def _scaling(single: Single) -> float:
    return float(single.buffers["scaling"])


def _rank(single: Single) -> int:
    return single.params["lora_A"].shape[-1]


def _dtype(singles: Iterable[Single]) -> Any:
    """The widest dtype of the arrays."""
    return max((each.spec.dtype for each in singles), key=lambda dtype: dtype.itemsize)


def _ia3(
    config: IA3Config,
    sites: Sites,
    parts: Mapping[Part, Own],
    weights: Sequence[float],
    saved: Mapping[Leaf, Any],
    fields: Mapping[str, Any],
) -> Adapter:
    """The weighted sum of IA3's scales."""
    params = {}
    for part, own in parts.items():
        scales = {i: each.params["ia3_l"] for i, each in own.items()}
        if len({scale.shape for scale in scales.values()}) > 1:
            raise ValueError(
                f"{part[0]} scales its inputs in one adapter and its outputs in another: their sum "
                f"is no IA3; combine what convert_to_lora makes of them"
            )
        ones = np.ones_like(next(iter(scales.values())))
        total = sum(w * scales.get(i, ones).astype(np.float64) for i, w in enumerate(weights))
        params[part] = {"ia3_l": np.asarray(total, _dtype(own.values()))}
    feedforward = dict.fromkeys(
        name for (name, _), own in params.items() if _scales_inputs(own["ia3_l"], sites[name])
    )
    config = dataclasses.replace(config, **fields, feedforward_modules=tuple(feedforward))
    return restack(config, sites, params, saved=saved)


def _scales_inputs(scale: np.ndarray, site: Site) -> bool:
    return max(scale.shape[: len(site.in_axes)]) > 1


def _parts(adapters: Sequence[Adapter], sites: Sites) -> dict[Part, dict[int, Single]]:
    """What each weight has in those adapters that have it."""
    singles = [unstack(adapter) for adapter in adapters]
    return {
        part: {i: own[part] for i, own in enumerate(singles) if part in own}
        for site in sites.values()
        for part in ((site.name, index) for index in indices(site))
    }


def _union(adapters: Sequence[Adapter]) -> Sites:
    """Every site of the adapters, with all the layers that one of them has."""
    found: dict[str, Site] = {}
    for site in (site for adapter in adapters for site in adapter.sites.values()):
        before = found.setdefault(site.name, site)
        if _weight(before) != _weight(site):
            raise ValueError(
                f"{site.name} is {before.path} of shape {before.shape} in one adapter, and "
                f"{site.path} of shape {site.shape}, or used otherwise, in another: combine "
                f"adapters of one model alone"
            )
        layers = None
        if before.layers is not None and site.layers is not None:
            layers = tuple(sorted({*before.layers, *site.layers}))
            layers = None if len(layers) == site.full_stack_shape[0] else layers
        known = before if before.bias is not None else site
        found[site.name] = dataclasses.replace(known, layers=layers)
    every = list(found.values())
    if len(found) > len(adapters[0].sites):
        every.sort(key=lambda site: site.path.split("."))  # the order of a tree of dicts
    others = (site for site in adapters[0].sites.others if site.name not in found)
    return Sites(tuple(every), others=tuple(others))


def _weight(site: Site) -> tuple[Any, ...]:
    """What tells one weight from another of the same name."""
    axes = (site.in_axes, site.out_axes, site.stack_axes, site.tap_axes)
    return site.path, site.shape, site.kind, site.groups, *axes


def _saved(adapters: Sequence[Adapter], sites: Sites) -> dict[Leaf, Any]:
    """The whole leaves of the adapters, none of which two of them have."""
    saved: dict[str, tuple[Leaf, Any]] = {}
    adapted = {site.path for site in sites.values()}
    for adapter in adapters:
        for leaf in adapter.saved:
            if leaf.path in saved or leaf.path in adapted:
                raise ValueError(
                    f"{leaf.path} is trained whole by one adapter (modules_to_save, bias) and "
                    f"trained by another as well, and whole leaves have no sum here: average "
                    f"them yourself, and combine adapters of which one has it"
                )
            saved[leaf.path] = leaf, adapter.params[leaf.module][leaf.leaf_name]
    return dict(saved.values())


_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def _fields(adapters: Sequence[Adapter], sites: Sites) -> dict[str, Any]:
    """The fields that every config has: the first adapter's, but for which modules are meant."""
    configs = [adapter.config for adapter in adapters]
    fields = {f.name: getattr(configs[0], f.name) for f in dataclasses.fields(AdapterConfig)}
    alike = all(getattr(config, name) == fields[name] for config in configs for name in _TARGETING)
    if not alike or any(adapter.sites.sites != sites.sites for adapter in adapters):
        fields |= {**dict.fromkeys(_TARGETING), "target_modules": exact_names(sites.values())}
    whole = dict.fromkeys(name for config in configs for name in config.modules_to_save or ())
    return fields | {"modules_to_save": tuple(whole) or None}


def _bias(adapters: Sequence[Adapter]) -> str:
    """Which biases are trained whole."""
    fields = {getattr(adapter.config, "bias", "none") for adapter in adapters}
    return next((bias for bias in ("all", "lora_only") if bias in fields), "none")


def _check_adapters(adapters: Sequence[Adapter], weights: Sequence[float], kind: str) -> None:
    """Raises a ValueError unless there is a sum of these adapters."""
    if not adapters:
        raise ValueError("there are no adapters to combine: pass one or more")
    if len(adapters) != len(weights):
        raise ValueError(
            f"{len(adapters)} adapters and {len(weights)} weights: pass one weight for each adapter"
        )
    methods = {type(adapter.config).__name__: adapter.config for adapter in adapters}
    first = "convert_to_lora them first"
    if len(methods) > 1:
        raise ValueError(f"{' and '.join(methods)} adapters have no common sum: {first}")
    ((name, config),) = methods.items()
    if isinstance(config, IA3Config) and kind != "linear":
        raise ValueError(
            f"scales of IA3 adapters can only be summed, not combined by {kind!r}: pass "
            f'combination_type="linear"'
        )
    if not isinstance(config, LoraConfig | IA3Config):
        raise ValueError(f"the arrays of {name} adapters cannot be summed: {first}")
    for config in (adapter.config for adapter in adapters):
        if isinstance(config, LoraConfig) and config.use_dora:
            raise ValueError(f"DoRA adapters scale the weight and cannot be summed: {first}")
        if isinstance(config, LoraConfig) and str(config.init_lora_weights)[:5] in _FROM_WEIGHT:
            raise ValueError(
                f"adapters that start from the weight (PiSSA, OLoRA) change it by what they are "
                f"away from their start, and cannot be summed as they are: {first}"
            )


_FROM_WEIGHT = ("pissa", "olora")


def _check_arguments(
    kind: str, svd_rank: int | None, density: float | None, sign: str, key: PRNGKeyArray | None
) -> None:
    """Raises a ValueError for an argument that is unknown, missing, out of range or unused."""
    if kind not in _TYPES:
        raise ValueError(f"`combination_type` must be one of {', '.join(_TYPES)}; got {kind!r}")
    if sign not in SIGNS:
        raise ValueError(f"`majority_sign_method` must be 'total' or 'frequency', got {sign!r}")
    if svd_rank is not None and not kind.endswith("svd"):
        raise ValueError(f"{kind!r} does not use `svd_rank`: leave it out, or take an svd type")
    if svd_rank is not None and (not isinstance(svd_rank, int) or svd_rank < 1):
        raise ValueError(f"`svd_rank` must be an integer of 1 or more, got {svd_rank!r}")
    sparse = kind.removesuffix("_svd") in SPARSE
    if density is not None and not sparse:
        raise ValueError(f"{kind!r} keeps every number: leave `density` out, or take another type")
    if sparse and density is None:
        raise ValueError(f"{kind!r} needs `density`, the share of the numbers to keep, in (0, 1]")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"`density` must be in (0, 1], got {density}")
    if kind.startswith("dare") and key is None:
        raise ValueError(f"{kind!r} keeps numbers at random: pass `key`, as of jax.random.key(0)")


def _check_biases(adapters: Sequence[Adapter], sites: Sites) -> None:
    """Raises a ValueError if a ``lora_bias`` would lack the bias of a site."""
    if not any(getattr(adapter.config, "lora_bias", False) for adapter in adapters):
        return
    if without := [site.name for site in sites.values() if site.bias is None]:
        raise ValueError(
            f"an adapter has `lora_bias`, and {', '.join(without[:5])} of another has no bias, "
            f"which one config cannot say: combine adapters that all have it, or none"
        )


def _check_ranks(parts: Mapping[Part, Own], kind: str) -> None:
    """Raises a ValueError unless all adapters have the same rank wherever they meet."""
    unequal = {}
    for (name, _), own in parts.items():
        ranks = {_rank(each): None for each in own.values()}
        if len(ranks) > 1:
            unequal[name] = " and ".join(map(str, ranks))
    if unequal:
        shown = ", ".join(f"{name} has {ranks}" for name, ranks in list(unequal.items())[:5])
        raise ValueError(
            f"{kind!r} adds factors of equal ranks, and these differ: {shown}; "
            f'take combination_type="cat" or "svd"'
        )
