"""The least that adapters add to a frozen block of a transformer: closed forms, nothing measured.

Each form lists the products and sums of one weight of i inputs and o outputs, for n tokens and rank
r, forward and backward. A product of (m, k) and (k, p) takes 2 m k p FLOPs. For bytes, each of them
reads what it takes and writes what it gives once; XLA needs less where it makes a sum while reading
its parts for something else. In FLOPs, without the elementwise terms:

    low-rank factors     6 n r (i + o)                          LoRA, AdaLoRA, X-LoRA
    DoRA                 6 n r (i + o) + 2 r i o + 2 i o        for the lengths of its columns
    HRA                  6 n r (i + o) + 4 r i o                for V^T W and its gradient
    LoHa                 6 n r^2 (i + o), or as built every step, whichever is less
    IA3                  nothing but elementwise

and as built in every step, W' and with it the gradient of W':

    LoRA, AdaLoRA        2 n i o + 6 r i o
    DoRA                 2 n i o + 8 r i o
    HRA                  2 n i o + 10 r i o
    LoHa                 2 n i o + 12 r i o

X-LoRA's factors are in two forward passes, and its frozen experts need no gradient: 6 n r (i + o)
again. (Its first pass runs without experts by default, but XLA counts the dearer way of a choice.)
"""

import bisect
from collections.abc import Callable, Mapping
from typing import NamedTuple

LENGTH = 512
EXPERTS = 4


class Cost(NamedTuple):
    """FLOPs, and how many numbers are read and written."""

    flops: float = 0
    moved: float = 0

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(self.flops + other.flops, self.moved + other.moved)

    def times(self, often: int) -> "Cost":
        return Cost(often * self.flops, often * self.moved)


Form = Callable[[int, int, int, int], Cost]


def product(m: int, k: int, p: int) -> Cost:
    """One matrix product."""
    return Cost(2 * m * k * p, m * k + k * p + m * p)


def elementwise(size: int, operations: int = 1, moved: int = 3) -> Cost:
    """Operations on each of so many numbers; a sum reads two of them and writes one."""
    return Cost(operations * size, moved * size)


def weights(width: int) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers of a block of Llama's shape."""
    hidden = 11 * width // 4
    square = dict.fromkeys(("q", "k", "v", "o"), (width, width))
    return {**square, "gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}


def through(n: int, i: int, o: int, r: int) -> Cost:
    """Tokens through two factors and added to what the weight gives; forward and the input's
    gradient."""
    forward = product(n, i, r) + product(n, r, o) + elementwise(n * o)
    return forward + product(n, o, r) + product(n, r, i) + elementwise(n * i)


def factors(n: int, i: int, o: int, r: int) -> Cost:
    """The same, and the gradients of the factors."""
    return through(n, i, o, r) + product(i, n, r) + product(r, n, o)


def lora(n: int, i: int, o: int, r: int) -> Cost:
    """Factors, one of which is scaled."""
    return factors(n, i, o, r) + elementwise(r * o, moved=2).times(2)


def adalora(n: int, i: int, o: int, r: int) -> Cost:
    """LoRA whose other factor is scaled too, rank by rank; the scale has a gradient."""
    return lora(n, i, o, r) + elementwise(r * i, 4, 6)


def _lengths(i: int, o: int, r: int) -> Cost:
    """Of the columns of a changed weight, out of the frozen one: no gradient."""
    read = product(r, i, o) + Cost(2 * i * o, i * o)
    return read + product(r, i, r) + product(r, r, o) + elementwise(r * o, 5, 3)


def dora(n: int, i: int, o: int, r: int) -> Cost:
    """LoRA whose outputs are scaled; the scale has a gradient."""
    scaled = elementwise(n * o, moved=2).times(2) + elementwise(n * o, 2, 2)
    return lora(n, i, o, r) + _lengths(i, o, r) + scaled


def _reflected(i: int, o: int, r: int) -> Cost:
    """HRA's factors out of its vectors, and the vectors' gradient out of theirs."""
    read = product(r, i, o) + product(i, o, r)
    small = (product(r, i, r) + product(r, r, o)).times(3)
    return read + small + product(r, r, r) + elementwise(r * i, 16, 12)


def hra(n: int, i: int, o: int, r: int) -> Cost:
    """Factors that are made of vectors and of the weight."""
    return factors(n, i, o, r) + _reflected(i, o, r)


def loha_factors(n: int, i: int, o: int, r: int) -> Cost:
    """Factors of rank r^2, each made of two of rank r."""
    return factors(n, i, o, r * r) + elementwise(r * r * (i + o), 6, 6)


def xlora(n: int, i: int, o: int, r: int) -> Cost:
    """Frozen factors in two passes, gated in the second; r is the rank of all experts.

    They are scaled, weighted and laid side by side in each.
    """
    first = product(n, i, r) + product(n, r, o) + elementwise(n * o)
    return first + through(n, i, o, r) + elementwise(n * r, 4, 8) + elementwise(r * o, 7, 4)


def xlora_last(n: int, i: int, o: int, r: int) -> Cost:
    """The same, and the classifier of what the block gives, with its gradient."""
    return xlora(n, i, o, r) + product(n, o, EXPERTS) + product(o, n, EXPERTS)


def ia3_in(n: int, i: int, o: int, r: int) -> Cost:
    """Scaled inputs."""
    return elementwise(n * i, 4, 6)


def ia3_out(n: int, i: int, o: int, r: int) -> Cost:
    """Scaled outputs."""
    return elementwise(n * o, 4, 6)


def _built(n: int, i: int, o: int) -> Cost:
    """A change added to the weight, and the gradient of the sum.

    For that, XLA on a CPU lays out anew what comes back, made of two parts.
    """
    return elementwise(i * o) + product(i, n, o) + elementwise(n * o, 0)


def merged_lora(n: int, i: int, o: int, r: int) -> Cost:
    """A product, and its two factors' gradients."""
    made = product(i, r, o) + product(r, i, o) + product(i, o, r)
    return _built(n, i, o) + made + elementwise(r * o, moved=2).times(2)


def merged_adalora(n: int, i: int, o: int, r: int) -> Cost:
    """As LoRA, with the other factor scaled too."""
    return merged_lora(n, i, o, r) + elementwise(r * i, 4, 6)


def merged_dora(n: int, i: int, o: int, r: int) -> Cost:
    """As LoRA, then scaled column by column; the scale has a gradient."""
    return merged_lora(n, i, o, r) + _lengths(i, o, r) + elementwise(i * o, 4, 6)


def merged_hra(n: int, i: int, o: int, r: int) -> Cost:
    """The product of its factors, with their gradients."""
    made = product(i, r, o) + product(r, i, o) + product(i, o, r) + elementwise(r * i, 3)
    return _built(n, i, o) + made + _reflected(i, o, r)


def merged_loha(n: int, i: int, o: int, r: int) -> Cost:
    """Two products, multiplied and scaled, with the gradients of their factors."""
    made = product(i, r, o) + product(r, i, o) + product(i, o, r)
    return _built(n, i, o) + made.times(2) + elementwise(i * o, 6, 7)


def loha(n: int, i: int, o: int, r: int) -> Cost:
    """Whichever takes fewer FLOPs."""
    return min(loha_factors(n, i, o, r), merged_loha(n, i, o, r))


def _everywhere(form: Form) -> dict[str, Form]:
    return dict.fromkeys(weights(4), form)


# By method, what a weight costs as it is adapted, and as it is built in every step. LoHa's is built
# where that is cheaper; X-LoRA's tokens have each a mix of their own, which no weight has in it.
ADAPTED: dict[str, Mapping[str, Form]] = {
    "lora": _everywhere(lora),
    "adalora": _everywhere(adalora),
    "dora": _everywhere(dora),
    "hra": _everywhere(hra),
    "loha": _everywhere(loha),
    "ia3": {"k": ia3_out, "v": ia3_out, "down": ia3_in},
    "xlora": _everywhere(xlora) | {"down": xlora_last},
}
MERGED: dict[str, Mapping[str, Form]] = {
    "lora": _everywhere(merged_lora),
    "adalora": _everywhere(merged_adalora),
    "dora": _everywhere(merged_dora),
    "hra": _everywhere(merged_hra),
}


def added(forms: Mapping[str, Form], tokens: int, width: int, rank: int) -> Cost:
    """What a block costs more than the frozen one."""
    shapes = weights(width)
    costs = [form(tokens, *shapes[name], rank) for name, form in forms.items()]
    return sum(costs[1:], costs[0])


def floor(tokens: int, width: int, passes: int = 1) -> float:
    """FLOPs of the frozen block's products: forward passes, and the gradient of its input."""
    linear = 2 * tokens * sum(i * o for i, o in weights(width).values())
    attention = 4 * tokens * LENGTH * width
    return (passes + 1) * linear + (passes + 2) * attention


def first_rank(holds: Callable[[int], bool], most: int) -> int | None:
    """The first rank from which on something holds; None if up to the last it does not."""
    found = bisect.bisect_left(range(1, most + 1), True, key=holds) + 1
    return found if found <= most else None


def fused_rank(tokens: int, i: int, o: int) -> int | None:
    """The rank from which on LoHa's change is cheaper built than as factors."""

    def cheaper(r: int) -> bool:
        return merged_loha(tokens, i, o, r).flops < loha_factors(tokens, i, o, r).flops

    return first_rank(cheaper, min(i, o))


def merged_rank(method: str, tokens: int, width: int) -> int | None:
    """The rank from which on building all weights in every step is cheaper than factors.

    None where that is above half the width, of which a square weight's factors are as large as it.
    """

    def cheaper(r: int) -> bool:
        both = (added(forms[method], tokens, width, r) for forms in (MERGED, ADAPTED))
        return next(both).flops < next(both).flops

    return first_rank(cheaper, width // 2)


def dear_rank(method: str, tokens: int, width: int, over: float = 0.1) -> int | None:
    """The rank from which on a step costs so much more than the floor."""
    most = over * floor(tokens, width, passes=2 if method == "xlora" else 1)
    return first_rank(lambda r: added(ADAPTED[method], tokens, width, r).flops > most, width)


def reading_tokens(method: str, width: int) -> float:
    """Tokens below which DoRA's or HRA's products with the weight cost more than LoRA's own."""
    shapes = weights(width).values()
    a_rank = {"dora": 2, "hra": 4}[method] * sum(i * o for i, o in shapes)
    return a_rank / (6 * sum(i + o for i, o in shapes))
