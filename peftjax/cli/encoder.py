"""The frozen model: a transformers encoder with a linear classifier on its pooled states."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peftjax.cli.errors import UsageError
from peftjax.cli.sentiment import Tokens

Params = dict[str, Any]

PREDICTION_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A pretrained encoder as transformers built it.

    Attributes:
      model: the untouched Flax model.
      tokenizer: its tokenizer.
      name: where its params sit, by transformers' own word for the family (``bert``).
      longest: the most tokens it takes.
    """

    model: Any
    tokenizer: Any
    name: str
    longest: int

    def pooled(
        self, params: Params, ids: Int[Array, "texts tokens"], mask: Int[Array, "texts tokens"]
    ) -> Float[Array, "texts width"]:
        """The last hidden states, averaged over the tokens that are no padding."""
        return _mean(self.model(ids, mask, params=params).last_hidden_state, mask)

    def classify(
        self, params: Params, ids: Int[Array, "texts tokens"], mask: Int[Array, "texts tokens"]
    ) -> Float[Array, "texts labels"]:
        """The function that is adapted: pooled states through a linear classifier.

        ``params`` holds the encoder's under its name, and ``kernel`` and ``bias`` under
        ``classifier``.
        """
        return self.classify_with_states(params, ids, mask)[0]

    def classify_with_states(
        self, params: Params, ids: Int[Array, "texts tokens"], mask: Int[Array, "texts tokens"]
    ) -> tuple[Float[Array, "texts labels"], Float[Array, "texts tokens width"]]:
        """What ``classify`` gives, and the last hidden states it comes from."""
        states = self.model(ids, mask, params=params[self.name]).last_hidden_state
        head = params["classifier"]
        return _mean(states, mask) @ head["kernel"] + head["bias"], states


def _mean(
    states: Float[Array, "texts tokens width"], mask: Int[Array, "texts tokens"]
) -> Float[Array, "texts width"]:
    """The mean over the tokens that are no padding."""
    weight = mask.astype(states.dtype)[..., None]
    return jnp.sum(states * weight, axis=1) / jnp.sum(weight, axis=1)


def load(directory: Path) -> tuple[Encoder, Params]:
    """Loads model, weights and tokenizer from a directory, without network and without torch.

    Raises:
      UsageError: transformers cannot make a model of what the directory holds.
    """
    import transformers

    with quiet(transformers.utils.logging):
        try:
            model = transformers.FlaxAutoModel.from_pretrained(directory, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            first = str(error).strip().partition("\n")[0]
            raise UsageError(f"transformers cannot load {directory}: {first}") from error
    # RoBERTa's first two positions are no tokens.
    longest = min(model.config.max_position_embeddings - 2, tokenizer.model_max_length)
    return Encoder(model, tokenizer, model.base_model_prefix, longest), model.params


@contextlib.contextmanager
def quiet(logging: Any) -> Iterator[None]:
    """Silences transformers' advice and loading bars for the time of a block."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def predict(
    function: Callable[..., Any],
    data: Tokens,
    advance: Callable[[int], None] = lambda done: None,
) -> Any:
    """Applies a function of (ids, mask) to all of a data set, in batches of one size.

    Args:
      function: maps the inputs of one batch to an array, or a tree of them, of one row a text.
      data: the texts.
      advance: told how many texts are done.

    Returns:
      The rows of all texts: a NumPy array, or a tree of them.
    """
    rows: list[Any] = []
    for start in range(0, len(data), PREDICTION_BATCH):
        # The last batch starts over from the first text: one shape, one compilation.
        batch = data[np.arange(start, start + PREDICTION_BATCH) % len(data)]
        rows.append(jax.tree.map(np.asarray, function(*batch.inputs)))
        advance(min(start + PREDICTION_BATCH, len(data)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(data)], *rows)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of texts whose largest logit is at their label."""
    return float(np.mean(np.argmax(logits, axis=-1) == labels))
