"""Times of several functions in one run, side by side, so that a slow minute is slow for all."""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    tell: Callable[[], None] = lambda: None,
    patience: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each function in each round; a round calls all of them, in an order drawn anew.

    Each is called once before, for what is done once. A function returns when its work is done:
    one of JAX blocks until its result is ready. ``tell`` is called after every call. A function
    that has taken ``patience`` seconds in all is called no more: it has fewer rounds.
    """
    for function in functions.values():
        function()
        tell()
    order, rng = list(functions), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            if sum(seconds[name]) > patience:
                continue
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
            tell()
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratio within each round that both have."""
    return statistics.median(a / b for a, b in zip(over, under, strict=False))


def seconds_of(function: Callable[[], Any]) -> tuple[float, Any]:
    """How long one call takes, and what it gives."""
    start = time.perf_counter()
    out = function()
    return time.perf_counter() - start, out
