"""Which weights a config means: ``target_modules`` and its companions, as PEFT reads them.

A *stacked* site (the scanned layers of a model, say) is one weight that stands for many. Its layer
``i`` goes by the names an unrolled model would give it: the site's name with ``i`` put in after any
segment. ``layers.attn.query`` answers to ``layers.3.attn.query``, ``layers.attn.3.query`` and
``layers.attn.query.3``. The site's own name means all its layers at once.
"""

import dataclasses
import difflib
import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from peftjax.config import AdapterConfig, Targets
from peftjax.sites import NO_SITES, Leaf, Site, Sites, not_followed

T = TypeVar("T")
Layers = frozenset[int]
Hits = dict[str, dict[str, Layers]]  # entry -> name of each site it names -> the layers it names

_NONE: Layers = frozenset()


class NoMatchingModuleError(ValueError):
    """A config names a module that the function does not have, or leaves nothing to adapt."""


def select_sites(config: AdapterConfig, sites: Sites) -> Sites:
    """Returns the sites that a config selects; of a stacked site, perhaps only some layers.

    Names mean what they mean in PEFT, but mistakes are louder: every entry of a
    ``target_modules`` list must name a site (before exclusion and before layers are filtered),
    where PEFT is content when one entry does. And a layer index counts after the first segment of
    a path too (``layers.1.query``), where PEFT overlooks it.

    ``layers_to_transform`` filters modules named by the end of their path; an entry that is the
    whole name of one layer's module is kept whatever its index, as in PEFT. The index is the one in
    the path; where a stacked site's path holds none, its first stack axis is counted.

    Args:
      config: the config whose targeting fields are read.
      sites: what ``find_sites`` returned.

    Returns:
      The selected sites, in the order of ``sites`` and with all its leaves.

    Raises:
      ValueError: ``target_modules`` is None.
      NoMatchingModuleError: an entry matches nothing, or nothing is left to adapt.
    """
    targets = config.target_modules
    if targets is None:
        raise ValueError(
            "Please specify `target_modules` in the config: a list of names, a regular expression "
            'for whole paths, "all-linear" or a function of a Site; ' + _has(sites)
        )
    if not sites:
        raise NoMatchingModuleError(NO_SITES)
    named, excluded = _hits(targets, sites), _hits(config.exclude_modules, sites)
    if unmatched := [entry for entry in named if not named[entry]]:
        reasons = (_why_unmatched(targets, entry, sites) for entry in unmatched)
        raise NoMatchingModuleError("`target_modules`: " + "\n".join(reasons))
    for entry in (entry for entry in excluded if not excluded[entry]):
        reason = _why_unmatched(config.exclude_modules, entry, sites)
        warnings.warn(f"`exclude_modules`: {reason}", UserWarning, stacklevel=2)
    selected, any_free = _selected(config, sites, named, excluded)
    if not selected:
        raise NoMatchingModuleError(_why_empty(config, any_free))
    return dataclasses.replace(sites, sites=selected)


def targeted(config: AdapterConfig, sites: Sites) -> tuple[Site, ...]:
    """The sites that a config selects, however few: what it names in vain is no error here."""
    named, excluded = (
        _hits(targets, sites) for targets in (config.target_modules, config.exclude_modules)
    )
    return _selected(config, sites, named, excluded)[0]


def _selected(
    config: AdapterConfig, sites: Sites, named: Hits, excluded: Hits
) -> tuple[tuple[Site, ...], bool]:
    """The sites selected, and whether any was before layers were filtered."""
    selected, any_free = [], False
    for site in sites.sites:
        every = _every_layer(site)
        free = every.difference(*(hits.get(site.name, _NONE) for hits in excluded.values()))
        if any(is_within(entry, site.name) for entry in config.modules_to_save or ()):
            free = _NONE
        found = {e: hits[site.name] & free for e, hits in named.items() if site.name in hits}
        layers = _NONE.union(*(_filter_layers(config, *item, site) for item in found.items()))
        any_free |= any(found.values())
        if layers and layers != every:
            site = dataclasses.replace(site, layers=tuple(sorted(layers)))
        if layers:
            selected.append(site)
    return tuple(selected), any_free


def pattern_value(pattern: Mapping[str, T], site: Site, default: T, layer: int | None = None) -> T:
    """Looks up a site in a ``rank_pattern`` or ``alpha_pattern``.

    A key is a regular expression for the end of a path, starting at a dot: ``query`` matches
    ``attn.query`` but not ``xquery``. The first key that matches wins; failing that, a key that is
    the whole path verbatim.

    Args:
      pattern: values by key.
      site: the site to look up.
      default: the value where no key matches.
      layer: layer of a stacked site, which answers to that layer's names as well.
    """
    names = (site.name, *(() if layer is None else layer_names(site, layer)))
    for key, value in pattern.items():
        if any(_at_the_end(key)(name) for name in names):
            return value
    return next((pattern[name] for name in names if name in pattern), default)


def exact_names(sites: Iterable[Site]) -> tuple[str, ...]:
    """The names for ``target_modules`` that mean these sites, and of stacks the selected layers."""
    names: list[str] = []
    for site in sites:
        layers = site.layers
        names += [site.name] if layers is None else [layer_names(site, i)[0] for i in layers]
    return tuple(names)


def exact_key(name: str) -> str:
    """The key of a ``rank_pattern`` or ``alpha_pattern`` that means one module alone."""
    return "^" + re.escape(name)


@functools.lru_cache(maxsize=65536)  # more than re remembers: a pattern may name every module
def _at_the_end(key: str) -> Callable[[str], object]:
    return re.compile(rf"(.*\.)?({key})$").match


def is_named(names: str | Sequence[str], site: Site, layer: int | None = None) -> bool:
    """Whether names, by the rules of ``target_modules``, name a site or one layer of it.

    Args:
      names: a list of names, or a regular expression for the whole path.
      site: the site.
      layer: layer of a stacked site, which answers to that layer's names as well.
    """
    own = (site.name, *(() if layer is None else layer_names(site, layer)))
    if isinstance(names, str):
        return any(re.fullmatch(names, name) for name in own)
    return any(ends_with(entry, name) for entry in names for name in own)


def unmatched_patterns(pattern: Iterable[str], sites: Sites) -> tuple[str, ...]:
    """Returns the keys of a ``rank_pattern`` or ``alpha_pattern`` that match no site's layer."""
    layers = [(site, layer) for site in sites.sites for layer in _every_layer(site)]
    return tuple(
        key
        for key in pattern
        if not any(pattern_value({key: 1}, site, 0, layer) for site, layer in layers)
    )


def saved_leaves(config: AdapterConfig, sites: Sites) -> tuple[Leaf, ...]:
    """Returns every array of the modules that ``modules_to_save`` names, in tree order.

    An entry names a module by the last segments of its path, and means all it holds:
    ``classifier`` saves ``classifier.kernel`` and ``head.classifier.out.bias``. PEFT matches
    without a dot boundary, so that ``b`` finds any name ending in b; here it does not.

    Args:
      config: the config whose ``modules_to_save`` is read.
      sites: what ``find_sites`` returned.

    Raises:
      NoMatchingModuleError: an entry names no module of the params tree.
    """
    # Where one module holds several weights, a site's name goes down to the single weight.
    site_names = {site.path: site.name for site in sites.sites}
    modules = {leaf: site_names.get(leaf.path, leaf.module) for leaf in sites.leaves}
    entries = config.modules_to_save or ()
    for entry in entries:
        if not any(is_within(entry, module) for module in modules.values()):
            every = (itertools.accumulate(m.split("."), "{}.{}".format) for m in modules.values())
            nearest = _nearest(entry, itertools.chain.from_iterable(every))
            raise NoMatchingModuleError(f"`modules_to_save`: no module named {entry!r}; {nearest}")
    return tuple(
        leaf
        for leaf, module in modules.items()
        if any(is_within(entry, module) for entry in entries)
    )


def bias_leaves(bias: str, sites: Sites, selected: Sites) -> tuple[Leaf, ...]:
    """Returns the biases of the base model that a config's ``bias`` field trains, in tree order.

    Args:
      bias: ``"none"``; ``"all"``: every array named ``bias`` and every bias of a site; or
        ``"<method>_only"`` (``"lora_only"``): the biases of the selected sites.
      sites: what ``find_sites`` returned.
      selected: what :func:`select_sites` returned.

    Raises:
      ValueError: ``bias`` is none of these.
    """
    if bias == "none":
        return ()
    if bias != "all" and not bias.endswith("_only"):
        raise ValueError(f"`bias` must be 'none', 'all' or '<method>_only'; got {bias!r}")
    every = bias == "all"
    paths = {site.bias for site in (sites if every else selected).sites}
    named = ("bias",) if every else ()
    return tuple(x for x in sites.leaves if x.path in paths or x.leaf_name in named)


def trained_layers(config: AdapterConfig, selected: Sites, leaf: Leaf) -> Layers | None:
    """The layers of a whole leaf that train, where a config trains only some; None means all.

    A bias of ``"<method>_only"`` trains in the layers that are selected: of several sites that
    share it, in those of any.

    Args:
      config: the config.
      selected: what :func:`select_sites` returned.
      leaf: one of the leaves that the config trains whole.
    """
    using = [site for site in selected.sites if site.bias == leaf.path]
    by_name = any(is_within(entry, leaf.module) for entry in config.modules_to_save or ())
    if by_name or not using or not getattr(config, "bias", "none").endswith("_only"):
        return None
    if any(site.layers is None or not site.bias_stack_axes for site in using):
        return None
    return _NONE.union(*(_every_layer(site) for site in using))


def _hits(targets: Targets | None, sites: Sites) -> Hits:
    """Returns what each entry of ``target_modules`` or ``exclude_modules`` names."""
    if targets is None:
        return {}
    rules: dict[str, Callable[[Site], Layers]] = {}
    if isinstance(targets, str) and targets.lower() != "all-linear":
        rules[targets] = functools.partial(_named_layers, re.compile(targets).fullmatch)
    elif isinstance(targets, Sequence) and not isinstance(targets, str):
        for entry in targets:
            rules[entry] = functools.partial(_named_layers, functools.partial(ends_with, entry))
    else:
        test = all_linear(sites) if isinstance(targets, str) else targets
        rules[""] = lambda site: _every_layer(site) if test(site) else _NONE
    return {
        entry: {site.name: layers for site in sites.sites if (layers := rule(site))}
        for entry, rule in rules.items()
    }


def all_linear(sites: Sites) -> Callable[[Site], bool]:
    """Every site but lookups; where there is a lookup, an output head stays out as well."""
    has_lookup = any(site.kind == "lookup" for site in sites.sites)
    return lambda site: site.kind != "lookup" and not (has_lookup and site.is_head)


def _named_layers(test: Callable[[str], object], site: Site) -> Layers:
    """Returns all layers if the site's own name passes, else those that a name of theirs does."""
    layers = _every_layer(site)
    if test(site.name):
        return layers
    if not site.stack_axes:
        return _NONE
    return frozenset(i for i in layers if any(test(name) for name in layer_names(site, i)))


def _filter_layers(config: AdapterConfig, entry: str, layers: Layers, site: Site) -> Layers:
    """Returns those layers that ``layers_to_transform`` keeps of what an entry names."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == ():
        return layers
    wanted = (wanted,) if isinstance(wanted, int) else wanted
    patterns = config.layers_pattern or ()
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    fixed = _layer_index(site.name, patterns)

    def index(i: int) -> int | None:
        if fixed is not None or not site.stack_axes:
            return fixed
        names = layer_names(site, i)
        return i if any(_layer_index(f"{name}.", patterns) == i for name in names) else None

    return frozenset(i for i in layers if entry in layer_names(site, i) or index(i) in wanted)


def _layer_index(name: str, patterns: Sequence[str]) -> int | None:
    """Returns the first number in the path behind a pattern, by default behind any segment."""
    for pattern in patterns or (r"[^.]*",):
        if match := re.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<index>\d+)\.", name):
            return int(match["index"])
    return None


def _every_layer(site: Site) -> Layers:
    """Returns the layers the site stands for; a site without a stack has one layer, 0."""
    if site.layers is not None:
        return frozenset(site.layers)
    return frozenset(range(site.shape[site.stack_axes[0]] if site.stack_axes else 1))


def layer_names(site: Site, layer: int) -> tuple[str, ...]:
    """Returns the names an unrolled model might give one layer; without a stack, the site's."""
    if not site.stack_axes:
        return (site.name,)
    parts = site.name.split(".")
    cuts = range(1, len(parts) + 1)
    return tuple(".".join((*parts[:cut], str(layer), *parts[cut:])) for cut in cuts)


def ends_with(entry: str, path: str) -> bool:
    """Whether the entry is the path or the segments at its end."""
    return path == entry or path.endswith(f".{entry}")


def is_within(entry: str, path: str) -> bool:
    """Whether the path lies in, or is, a module whose path ends with the entry."""
    return f".{entry}." in f".{path}."


def _why_unmatched(targets: Targets | None, entry: str, sites: Sites) -> str:
    """Says why an entry of ``targets`` names no site, and what would."""
    if not entry:
        return f"it selects no site; {_has(sites)}"
    if isinstance(targets, str):
        nearest = _nearest(entry, sites)
        return f"no whole path matches {entry!r} ([{entry!r}] would match its end); {nearest}"
    if weights := [site.name for site in sites.sites if ends_with(entry, site.path)]:
        return f"{entry!r} is a weight; name its module, {_listing(weights)}"
    if inside := [site.name for site in sites.sites if is_within(entry, site.name)]:
        return f"{entry!r} holds other modules; name those: {_listing(inside)}"
    if leaves := [leaf.path for leaf in sites.leaves if is_within(entry, leaf.path)]:
        strays = [stray for stray in sites.strays if stray[0] in leaves]
        why = f"; {not_followed(strays)}" if strays else ""
        return f"{entry!r} is no linear weight of the function, but only: {_listing(leaves)}{why}"
    return f"no module matched {entry!r}; {_nearest(entry, sites)}"


def _why_empty(config: AdapterConfig, any_free: bool) -> str:
    """Says why no site is left although every entry named some."""
    if not config.target_modules:
        return "`target_modules` is empty: name at least one module"
    if not any_free:
        return "`exclude_modules` or `modules_to_save` excluded all that `target_modules` names"
    follows = repr(config.layers_pattern) if config.layers_pattern else "a segment"
    return (
        f"`layers_to_transform` ({config.layers_to_transform}) has no layer of `target_modules`: a "
        f"layer's index follows {follows} in its path, or counts the first axis of a stack"
    )


def _nearest(entry: str, names: Iterable[str]) -> str:
    """Says which names, or ends of names with as many segments, come near the entry."""
    names = list(names)
    ends = (".".join(name.split(".")[-entry.count(".") - 1 :]) for name in names)
    close = difflib.get_close_matches(entry, dict.fromkeys([*ends, *names]))
    return f"nearest: {_listing(close)}" if close else _has(names)


def _has(names: Iterable[str]) -> str:
    return "there are: " + _listing(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _listing(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")
