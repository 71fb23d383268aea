"""Labelled texts: reading, cleaning, splitting and tokenising them."""

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from peftjax.cli.errors import UsageError

TEXT_COLUMNS = ("text", "tweet", "sentence", "review", "content", "message", "comment", "body")
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "category", "target", "topic", "y")
FEWEST_TEXTS = 40

_LINK = re.compile(r"https?://\S*")
_NOT_WORD = re.compile(r"\W+")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts with one label each.

    Attributes:
      texts: the texts.
      labels: index into ``names`` for each text.
      names: the labels, sorted.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> "Corpus":
        """The texts at the given places, with all label names kept."""
        return dataclasses.replace(
            self,
            texts=tuple(self.texts[index] for index in indices),
            labels=tuple(self.labels[index] for index in indices),
        )


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tokenised corpus: what the model is fed.

    Attributes:
      ids: token ids, shape (texts, tokens).
      mask: 1 for a token, 0 for padding, same shape.
      labels: label of each text, shape (texts,).
      experts: number of the expert that serves each text, shape (texts,), where one alone does.
    """

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    experts: np.ndarray | None = None

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        """All but the labels: ids, mask and, where they are told, the experts."""
        told = () if self.experts is None else (self.experts,)
        return (self.ids, self.mask, *told)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: slice | np.ndarray) -> "Tokens":
        experts = None if self.experts is None else self.experts[chosen]
        return Tokens(self.ids[chosen], self.mask[chosen], self.labels[chosen], experts)


def read_tweets(path: Path) -> Corpus:
    """Reads the bundled tweets: those whose annotators agreed, each text once.

    A row carries a confidence of 1, a smaller one, or none at all where a single label was given.
    """
    _, rows = _read_table(path)
    agreed = [row for row in rows if (row["confidence"].strip() or "1") in ("1", "1.0")]
    return clean((row["text"], row["sentiment"]) for row in agreed)


def read_csv(path: Path, text_column: str | None = None, label_column: str | None = None) -> Corpus:
    """Reads the user's own table: one column of text, one of labels.

    Args:
      path: a CSV file with a header line; comma, semicolon or tab between the fields.
      text_column: header of the text column; None finds it by name.
      label_column: header of the label column; None finds it by name.

    Raises:
      UsageError: the file cannot be used; the message says what was found and what to change.
    """
    header, rows = _read_table(path)
    text = _column(path, header, "text", text_column, TEXT_COLUMNS)
    label = _column(path, header, "label", label_column, LABEL_COLUMNS)
    if text == label:
        raise UsageError(f"{path}: '{text}' cannot be the text and the label at once")
    corpus = clean((row[text], row[label]) for row in rows)
    if len(corpus) < FEWEST_TEXTS:
        raise UsageError(
            f"{path}: {len(corpus)} different labelled texts are too few; {FEWEST_TEXTS} or more "
            "are needed"
        )
    if len(corpus.names) < 2:
        raise UsageError(
            f"{path}: every text has the label '{corpus.names[0]}'; two or more labels are needed"
        )
    if len(corpus.names) > len(corpus) // 10:
        raise UsageError(
            f"{path}: column '{label}' has {len(corpus.names):,} different values in "
            f"{len(corpus):,} texts; labels must repeat (--label-column names another column)"
        )
    return corpus


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a CSV file, every missing field an empty string."""
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    text = re.sub(r"\A\s*[\r\n]", "", text)  # blank lines before the header
    first = text.partition("\n")[0]
    if not first.strip():
        raise UsageError(f"{path} is empty; a header line and labelled texts are needed")
    delimiter = max(",;\t", key=first.count)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval="")
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        return header, list(reader)
    except csv.Error as error:
        raise UsageError(f"{path} is not a readable CSV file: {error}") from error


def _column(
    path: Path, header: Sequence[str], role: str, wanted: str | None, usual: Sequence[str]
) -> str:
    """The header of the column that plays a role."""
    for name in (wanted,) if wanted is not None else usual:
        # Another column may differ in case alone.
        for found in (name, *header):
            if found in header and found.lower() == name.lower():
                return found
    asked = f"no column '{wanted}'" if wanted is not None else f"no {role} column"
    raise UsageError(
        f"{path}: {asked} among {', '.join(repr(name) for name in header)}; "
        f"say which one holds it with --{role}-column NAME"
    )


def fingerprint(text: str) -> str:
    """What two copies of one text share: its words, without case, links and punctuation."""
    words = _NOT_WORD.sub(" ", _LINK.sub(" ", text.lower())).strip()
    return words or text


def clean(rows: Iterator[tuple[str, str]]) -> Corpus:
    """Drops rows without text or label, evens out white space and keeps one copy of each text.

    A text that came back with another link or in other case counts as a copy: one of the two on
    the held-out side would be known from training.
    """
    kept: dict[str, tuple[str, str]] = {}
    for text, label in rows:
        text, label = " ".join(text.split()), label.strip()
        if text and label:
            kept.setdefault(fingerprint(text), (text, label))
    names = tuple(sorted({label for _, label in kept.values()}))
    index = {name: position for position, name in enumerate(names)}
    return Corpus(
        tuple(text for text, _ in kept.values()),
        tuple(index[label] for _, label in kept.values()),
        names,
    )


def split(corpus: Corpus, texts: int, held_out: int, seed: int) -> tuple[Corpus, Corpus]:
    """Draws texts to train on and others to measure on.

    Args:
      corpus: what to draw from.
      texts: the most to train on.
      held_out: the most to measure on; never over a quarter of the corpus.
      seed: the same seed draws the same texts.

    Returns:
      The training and the held-out corpus.
    """
    order = np.random.default_rng(seed).permutation(len(corpus)).tolist()
    count = min(held_out, len(corpus) // 4)
    return corpus.take(order[count : count + texts]), corpus.take(order[:count])


def tokenise(
    tokenizer: Callable[..., dict[str, np.ndarray]], corpus: Corpus, length: int
) -> Tokens:
    """Turns texts into arrays of one width, cut or padded to ``length`` tokens."""
    encoded = tokenizer(
        list(corpus.texts),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="np",
    )
    return Tokens(
        np.asarray(encoded["input_ids"], np.int32),
        np.asarray(encoded["attention_mask"], np.int32),
        np.asarray(corpus.labels, np.int32),
    )


def batches(data: Tokens, size: int, steps: int, seed: int) -> Iterator[Tokens]:
    """Gives ``steps`` batches of one size, in a new random order each time around."""
    generator = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        while len(order) < size:
            order = np.concatenate([order, generator.permutation(len(data))])
        yield data[order[:size]]
        order = order[size:]
