"""Slices of a data set by topic: clusters of texts, and the words that tell them apart."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from peftjax.cli.errors import UsageError

SAMPLE = 1000  # points on which the starts are compared
STARTS = 16
MOST_ITERATIONS = 50

_MENTION = re.compile(r"[@#]\w+|https?://\S+")
_WORD = re.compile(r"[^\W\d_]{3,20}")


@dataclasses.dataclass(frozen=True)
class Slices:
    """Topics that the texts fall into, the largest first.

    Attributes:
      names: a name for each, of two of its words.
      words: its most distinctive words.
      train: the number of its slice for each text to train on.
      held_out: likewise for each held-out text, by the nearest centre.
    """

    names: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    train: np.ndarray
    held_out: np.ndarray

    def sizes(self) -> list[int]:
        """Number of texts to train on in each."""
        return np.bincount(self.train, minlength=len(self.names)).tolist()


def cut(
    texts: Sequence[str], features: tuple[np.ndarray, np.ndarray], count: int, seed: int
) -> Slices:
    """Cuts texts into slices by k-means on the directions of their features.

    Args:
      texts: the texts to train on.
      features: theirs and those of the held-out texts.
      count: number of slices.
      seed: draws where k-means starts.

    Raises:
      UsageError: the texts are not that many different ones.
    """
    train, held_out = (_directions(each) for each in features)
    centres = kmeans(train, count, seed)
    slices = nearest(train, centres)
    order = np.argsort(-np.bincount(slices, minlength=count), kind="stable")
    slices = nearest(train, centres[order])
    words = distinctive_words(texts, slices, count)
    return Slices(_names(words), words, slices, nearest(held_out, centres[order]))


def kmeans(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Unit vectors, each the direction of the mean of the points nearest to it.

    Args:
      points: unit vectors, shape (points, width).
      count: how many to find.
      seed: draws some of the points and starts among them, of which the best goes on with all.

    Raises:
      UsageError: the points do not fall into that many groups.
    """
    generator = np.random.default_rng(seed)
    some = points[generator.permutation(len(points))[:SAMPLE]]
    starts = [_refined(some, _start(generator, some, count)) for _ in range(STARTS)]
    best = max(starts, key=lambda centres: float((some @ centres.T).max(axis=1).sum()))
    centres = _refined(points, best)
    if len(np.unique(nearest(points, centres))) < count:
        raise UsageError(f"--experts {count}: the texts do not fall into that many topics")
    return centres


def _start(generator: np.random.Generator, points: np.ndarray, count: int) -> np.ndarray:
    """k-means++: a point is drawn the likelier the farther it is from those drawn before."""
    centres = points[:0]
    distance = np.ones(len(points))
    while len(centres) < count:
        chosen = generator.choice(len(points), p=distance / distance.sum())
        centres = np.concatenate([centres, points[[chosen]]])
        distance = np.maximum(1 - (points @ centres.T).max(axis=1), 1e-6).astype(np.float64)
    return centres


def _refined(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Moves each centre to the direction of the mean of its points until none moves."""
    for _ in range(MOST_ITERATIONS):
        member = np.eye(len(centres), dtype=points.dtype)[nearest(points, centres)]
        # The little of its own keeps a centre without points where it is.
        moved = _directions(member.T @ points + 1e-6 * centres)
        if np.allclose(moved, centres, atol=1e-4):
            break
        centres = moved
    return centres


def nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The number of the centre nearest to each point."""
    return np.argmax(points @ centres.T, axis=1).astype(np.int32)


def distinctive_words(
    texts: Sequence[str], slices: np.ndarray, count: int, most: int = 6
) -> tuple[tuple[str, ...], ...]:
    """For each slice the words that are in many of its texts and in few of the others.

    Example:
      >>> texts = ["the flight was late", "the late flight", "the car drives", "self driving car"]
      >>> distinctive_words(texts, np.array([0, 0, 1, 1]), 2, most=2)
      (('flight', 'late'), ('car', 'drives'))
    """
    inside: list[Counter[str]] = [Counter() for _ in range(count)]
    for text, place in zip(texts, slices.tolist(), strict=True):
        inside[place].update(set(_WORD.findall(_MENTION.sub(" ", text.lower()))))
    total, sizes = sum(inside, Counter[str]()), np.bincount(slices, minlength=count)

    def score(place: int, word: str) -> float:
        """Its part of the divergence between the slice and the others."""
        own = inside[place][word] / max(sizes[place], 1)
        others = (total[word] - inside[place][word]) / max(len(texts) - sizes[place], 1)
        return float(own * np.log(own / (others + 1 / len(texts))))

    return tuple(
        # Of equally distinctive ones the first in the alphabet.
        tuple(sorted(words, key=lambda word: (-score(place, word), word))[:most])
        for place, words in enumerate(inside)
    )


def _names(words: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """A name of two words for each slice, with a number where another one has it."""
    names: list[str] = []
    for place, own in enumerate(words):
        name = "-".join(own[:2]) or "texts"
        names.append(f"{name}-{place}" if name in names else name)
    return tuple(names)


def _directions(points: np.ndarray) -> np.ndarray:
    """Vectors of length one; a zero stays zero."""
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-30)
