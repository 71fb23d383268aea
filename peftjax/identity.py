"""What an adapter on disk is one of: its config and its sites, to hold against another's."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from peftjax.adapter import Adapter
from peftjax.methods import XLoraConfig
from peftjax.sites import Leaf, Site


def about(adapter: Adapter) -> dict[str, Any]:
    """The config and the sites of an adapter, as JSON has them.

    Two adapters may differ in more than this without harm: in the dtype of the model, in the names
    that its sites have besides their paths, in what it holds that is not adapted, and in their
    arrays.
    """
    config = adapter.config
    mixture: dict[str, Any] = {}
    if isinstance(config, XLoraConfig):
        # The arrays of the experts lie in this order; an object of JSON has none.
        mixture = {"adapters": list(config.adapters), "head": config.head}
        for name, expert in zip(config.adapters, config.experts, strict=True):
            mixture[f"expert {name}"] = expert.to_dict()
    said = {
        "config": config.to_dict() | mixture,
        "sites": {site.name: _fingerprint(site) for site in adapter.sites.values()},
        "saved": {leaf.path: list(leaf.shape) for leaf in adapter.saved},
    }
    return json.loads(json.dumps(said, sort_keys=True))


_OF_NO_ACCOUNT = {"name", "dtype", "is_head", "is_tied", "dilated", "spread", "uneven"}


def _fingerprint(of: Site | Leaf) -> dict[str, Any]:
    """What of a site its adapter depends on, as far as it is not as usual."""
    return {
        field.name: getattr(of, field.name)
        for field in dataclasses.fields(of)
        if field.name not in _OF_NO_ACCOUNT and getattr(of, field.name) != field.default
    }


def check_about(where: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a ValueError that names how a saved adapter and another differ.

    Args:
      where: what was saved and where, for the message.
      saved: what ``about`` said of it.
      wanted: what ``about`` says of the adapter to restore into.
    """
    words = {"config": "config", "sites": "model", "saved": "choice of whole leaves"}
    for part, kind in words.items():
        ours, theirs = wanted[part], saved[part]
        names = [n for n in dict.fromkeys([*theirs, *ours]) if ours.get(n) != theirs.get(n)]
        if names:
            name, *more = names
            in_it, here = _differing(theirs.get(name), ours.get(name))
            others = f", and so do {', '.join(more[:4])}" if more else ""
            raise ValueError(
                f"{where} is of another {kind}: {name} is {in_it} in it and {here} here{others}; "
                f"restore it into what init_adapter makes for the same model with the same config"
            )


def _differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Two values, of dicts what differs alone."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return ("not there" if one is None else one), ("not there" if other is None else other)
    names = [n for n in {**one, **other} if one.get(n) != other.get(n)]
    return {n: one.get(n) for n in names}, {n: other.get(n) for n in names}
