"""X-LoRA's scalings, collected over calls, and pictures of them."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from peftjax.report import save_figure
from peftjax.scalings_page import Row, scalings_figure, scalings_page


class ScalingsEntry(NamedTuple):
    """What one call of a model logged.

    Attributes:
      scalings: a weight for every token, layer and expert, float32; it cannot be written to.
      texts: the tokens of each row; None where they were not given.
    """

    scalings: Float[np.ndarray, "batch seq layers experts"]
    texts: tuple[tuple[str, ...], ...] | None

    def row(self, row: int) -> tuple[Float[np.ndarray, "tokens layers experts"], tuple[str, ...]]:
        """Scalings and names of the real tokens of one row, numbers where there are no names."""
        scalings = self.scalings[row]
        if self.texts is None:
            return scalings, tuple(str(position) for position in range(len(scalings)))
        return scalings[: len(self.texts[row])], self.texts[row]


class ScalingsLog:
    """The scalings an X-LoRA model gave, call by call, on the host.

    Example:
      >>> import jax.numpy as jnp
      >>> log = ScalingsLog(["physics", "biology"], layers=["query", "value"])
      >>> log.append(jnp.full((1, 3, 2, 2), 0.5), texts=[["a", "cell", "divides"]])
      >>> log.append(jnp.full((2, 4, 2, 2), 0.25))
      >>> {length: array.shape for length, (_, array) in log.by_length().items()}
      {3: (1, 3, 2, 2), 4: (2, 4, 2, 2)}

    Args:
      experts: names of the experts, in the order of the last axis.
      layers: names of the adapted layers, in the order of the axis before; numbers if left out.

    Attributes:
      experts: names of the experts.
      latest: scalings of the last call.
      entries: all that was logged, in order.
      layers: names of the layers; empty as long as none are known.

    Raises:
      ValueError: no expert, or a name twice.

    References:
      Eric Buehler and Markus Buehler, X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible
      Framework for Large Language Models, 2024, https://arxiv.org/abs/2402.07148
    """

    def __init__(self, experts: Sequence[str], layers: Sequence[str] = ()) -> None:
        self.experts = tuple(experts)
        self._names = tuple(layers)
        self._entries: list[ScalingsEntry] = []
        if not self.experts:
            raise ValueError("experts is empty: pass the experts' names, in order")
        for what, names in (("experts", self.experts), ("layers", self._names)):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(
                    f"{what} has {', '.join(twice)} twice: give each a name of its own"
                )

    def append(
        self,
        scalings: Float[Array | np.ndarray, "batch seq layers experts"],
        texts: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Logs a copy of the scalings of one call.

        Args:
          scalings: what ``adapt(apply_fn, return_scalings=True)`` returned.
          texts: the tokens of each row. A row with fewer tokens than positions is padded: the
            positions beyond are left out of pictures and means.

        Raises:
          TypeError: inside of a JAX transformation, where there are no numbers to log; or texts
            that are not lists of tokens.
          ValueError: shapes that do not fit; nothing is kept then.
        """
        if isinstance(scalings, jax.core.Tracer):
            raise TypeError(
                f"append got {scalings.aval}, a tracer without numbers: return the scalings from "
                f"the transformed function (jit, grad with has_aux=True) and append them outside"
            )
        kept = np.array(scalings, np.float32)
        self._check_scalings(kept.shape)
        rows = None if texts is None else _checked_texts(texts, kept.shape)
        kept.flags.writeable = False
        self._entries.append(ScalingsEntry(kept, rows))

    def __len__(self) -> int:
        """Number of calls logged."""
        return len(self._entries)

    @property
    def entries(self) -> tuple[ScalingsEntry, ...]:
        """All that was logged, in order."""
        return tuple(self._entries)

    @property
    def latest(self) -> Float[np.ndarray, "batch seq layers experts"]:
        """Scalings of the last call."""
        return self._logged()[-1].scalings

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers; empty as long as none are known."""
        if self._names or not self._entries:
            return self._names
        return tuple(str(layer) for layer in range(self.latest.shape[2]))

    def by_length(
        self,
    ) -> dict[int, tuple[tuple[int, ...], Float[np.ndarray, "rows seq layers experts"]]]:
        """Scalings of calls with equally long sequences, joined along the batch.

        Returns:
          By sequence length, shortest first: the positions of the calls in ``entries``, and a new
          array of their scalings in that order.
        """
        buckets: dict[int, list[int]] = {}
        for position, entry in enumerate(self._entries):
            buckets.setdefault(entry.scalings.shape[1], []).append(position)
        return {
            length: (
                tuple(positions),
                np.concatenate([self._entries[position].scalings for position in positions]),
            )
            for length, positions in sorted(buckets.items())
        }

    def mean(self) -> Float[np.ndarray, "layers experts"]:
        """Mean scaling of each expert in each layer, over all tokens that are no padding.

        Returns:
          A row for each layer.

        Raises:
          ValueError: there is no token in the log.
        """
        rows = [entry.row(row)[0] for entry in self._logged() for row in range(len(entry.scalings))]
        tokens = sum(map(len, rows))
        if not tokens:
            raise ValueError("all texts in the log are empty: append one with tokens first")
        total = np.sum([row.sum(axis=0, dtype=np.float64) for row in rows], axis=0)
        return (total / tokens).astype(np.float32)

    def clear(self) -> None:
        """Forgets all entries, and the number of layers if they have no names."""
        self._entries.clear()

    def plot(
        self, path: str | Path, entry: int = -1, row: int = 0, layer: int | str | None = None
    ) -> Path:
        """Draws the scalings of one text: a heat map, expert by token.

        Args:
          path: the file to write, a PNG unless its suffix is that of another format, such as
            ``.pdf`` or ``.svg``; its directory is made if it does not exist.
          entry: which call.
          row: which text of it.
          layer: number or name of a layer; the mean over all layers if None.

        Returns:
          The path of the picture.

        Raises:
          IndexError: no such entry or row.
          ValueError: nothing is logged, no such layer, or a text without tokens.
        """
        entries = self._logged()
        entry = _position(entry, len(entries), "entry")
        row = _position(row, len(entries[entry].scalings), "row")
        scalings, tokens = entries[entry].row(row)
        if not tokens:
            raise ValueError(f"row {row} of entry {entry} has no token: choose another row")
        if layer is None and len(self.layers) > 1:
            grid, name = scalings.mean(axis=1), f"mean over {len(self.layers)} layers"
        else:
            number = self._layer(0 if layer is None else layer)
            grid, name = scalings[:, number], f"layer {self.layers[number]}"
        named = entries[entry].texts is not None
        figure = scalings_figure(
            grid,
            self.experts,
            tokens if named else None,
            title=f"X-LoRA scalings: entry {entry}, row {row}\n{name}",
        )
        return save_figure(figure, path)

    def write_html(self, path: str | Path, title: str = "") -> Path:
        """Writes every logged text as one HTML page, its tokens coloured by their experts.

        The page needs no network. Layers can be chosen on it unless there are over a million
        scalings; then it shows their mean.

        Args:
          path: the file to write; its directory is made if it does not exist.
          title: heading of the page.

        Returns:
          The path of the page.

        Raises:
          ValueError: nothing is logged.
        """
        rows = [
            Row(f"entry {position}, row {row}", *entry.row(row), named=entry.texts is not None)
            for position, entry in enumerate(self._logged())
            for row in range(len(entry.scalings))
        ]
        page = scalings_page(title or "X-LoRA scalings", self.experts, self.layers, rows)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
        return path

    def _logged(self) -> list[ScalingsEntry]:
        if not self._entries:
            raise ValueError("the log is empty: append the scalings of a call first")
        return self._entries

    def _check_scalings(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4:
            raise ValueError(
                f"scalings have shape {shape}: they need the 4 axes (batch, seq, layers, experts), "
                f"as adapt(apply_fn, return_scalings=True) returns them"
            )
        if shape[3] != len(self.experts):
            raise ValueError(
                f"scalings of shape {shape} are for {shape[3]} experts, but the log has "
                f"{len(self.experts)}, {', '.join(self.experts)}: name every expert in ScalingsLog"
            )
        if not shape[2] or (self.layers and shape[2] != len(self.layers)):
            raise ValueError(
                f"scalings of shape {shape} are for {shape[2]} layers, but the log has "
                f"{len(self.layers) or 'at least 1'}: keep a ScalingsLog for each adapter, with "
                f"the names of all its layers or none"
            )

    def _layer(self, layer: int | str) -> int:
        if isinstance(layer, str):
            if layer in self.layers:
                return self.layers.index(layer)
            near = difflib.get_close_matches(layer, self.layers, n=3, cutoff=0.0)
            raise ValueError(f"there is no layer {layer!r}: choose from log.layers, as {near}")
        if not -len(self.layers) <= layer < len(self.layers):
            last = len(self.layers) - 1
            raise ValueError(f"there is no layer {layer}: choose one from 0 to {last}")
        return layer % len(self.layers)


def _checked_texts(
    texts: Sequence[Sequence[str]], shape: tuple[int, ...]
) -> tuple[tuple[str, ...], ...]:
    if isinstance(texts, str) or any(isinstance(text, str) for text in texts):
        raise TypeError(
            "texts holds whole strings: pass a list of tokens for each row, as a tokenizer's "
            "convert_ids_to_tokens gives it"
        )
    rows = tuple(tuple(text) for text in texts)
    if not all(isinstance(token, str) for row in rows for token in row):
        raise TypeError("texts holds tokens that are no strings: convert ids to tokens first")
    if len(rows) != shape[0]:
        raise ValueError(
            f"texts has {len(rows)} rows, but scalings of shape {shape} have {shape[0]}: pass a "
            f"list of tokens for each row of the batch"
        )
    longest = max(map(len, rows), default=0)
    if longest > shape[1]:
        raise ValueError(
            f"texts has a row of {longest} tokens, but scalings of shape {shape} have {shape[1]} "
            f"positions: cut the tokens as the model's input was cut"
        )
    return rows


def _position(index: int, length: int, what: str) -> int:
    if not -length <= index < length:
        raise IndexError(f"there is no {what} {index}: choose one from 0 to {length - 1}")
    return index % length
