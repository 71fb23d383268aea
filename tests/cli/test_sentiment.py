"""Reading, cleaning, splitting and batching labelled texts."""

from pathlib import Path

import numpy as np
import pytest

from peftjax.cli import sentiment
from peftjax.cli.errors import UsageError
from peftjax.cli.sentiment import Corpus, Tokens


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def table(header: str, rows: int = 60, row: str = "text number {n},{label}") -> str:
    lines = [row.format(n=n, label="ab"[n % 2]) for n in range(rows)]
    return "\n".join([header, *lines]) + "\n"


def test_tweets_keep_what_annotators_agreed_on(tmp_path: Path) -> None:
    path = write(
        tmp_path / "tweets.csv",
        "sentiment,confidence,text\r\n"
        "negative,1,late   again\r\n"
        "positive,0.66,doubtful\r\n"
        'neutral,,"two\rlines"\r\n'
        "negative,1,Late again! http://t.co/abc\r\n"
        "positive,1.0,fine\r\n",
    )
    corpus = sentiment.read_tweets(path)
    assert corpus.texts == ("late again", "two lines", "fine")
    assert [corpus.names[label] for label in corpus.labels] == ["negative", "neutral", "positive"]


def test_bytes_that_are_no_utf8_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "tweets.csv"
    path.write_bytes(b"sentiment,confidence,text\nneutral,1,caf\xe9 open\n")
    assert sentiment.read_tweets(path).texts == ("caf\ufffd open",)


@pytest.mark.parametrize(
    "header", ["text,label", "Tweet,SENTIMENT", " review , class", "content,category"]
)
def test_columns_are_found_by_name(tmp_path: Path, header: str) -> None:
    corpus = sentiment.read_csv(write(tmp_path / "data.csv", table(header)))
    assert len(corpus) == 60
    assert corpus.names == ("a", "b")


def test_columns_are_taken_as_told(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", table("words,stars"))
    assert sentiment.read_csv(path, "words", "Stars").texts[0] == "text number 0"


def test_of_two_columns_that_differ_in_case_the_one_told_is_taken(tmp_path: Path) -> None:
    text = table("Text,label,text", row="loud {n},{label},quiet {n}")
    path = write(tmp_path / "data.csv", text)
    for column, want in (("Text", "loud 0"), ("text", "quiet 0"), (None, "quiet 0")):
        assert sentiment.read_csv(path, text_column=column).texts[0] == want


@pytest.mark.parametrize("blank", ["\n\n", "\r\n \r\n"])
def test_blank_lines_before_the_header(tmp_path: Path, blank: str) -> None:
    for text in (table("text,label"), table("\ttext\tlabel", row="x\ttext number {n}\t{label}")):
        corpus = sentiment.read_csv(write(tmp_path / "data.csv", blank + text))
        assert corpus.texts[0] == "text number 0"


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_and_a_byte_order_mark(tmp_path: Path, delimiter: str) -> None:
    text = table(f"text{delimiter}label", row="text, number {n}" + delimiter + "{label}")
    corpus = sentiment.read_csv(write(tmp_path / "data.csv", text, "utf-8-sig"))
    assert corpus.texts[0] == "text, number 0"


def test_rows_without_text_or_label_are_dropped(tmp_path: Path) -> None:
    text = table("text,label") + "only text\n,a\n   ,b\nno label,\n"
    assert len(sentiment.read_csv(write(tmp_path / "data.csv", text))) == 60


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("text,label\n", "0 different labelled texts are too few"),
        (table("text,label", rows=5), "5 different labelled texts are too few"),
        (table("text,label", row="text number {n},same"), "every text has the label 'same'"),
        (table("text,label", row="text number {n},{n}"), "60 different values"),
        (table("a,b"), "no text column among 'a', 'b'.*--text-column"),
        (table("text,b"), "no label column among 'text', 'b'.*--label-column"),
    ],
)
def test_useless_files_are_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "data.csv", content)
    with pytest.raises(UsageError, match=message) as caught:
        sentiment.read_csv(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_unknown_and_doubled_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", table("text,label"))
    with pytest.raises(UsageError, match="no column 'stars' among 'text', 'label'"):
        sentiment.read_csv(path, None, "stars")
    with pytest.raises(UsageError, match="cannot be the text and the label"):
        sentiment.read_csv(path, "text", "text")


def test_a_directory_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        sentiment.read_csv(tmp_path)


def test_broken_csv_is_a_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", 'text,label\n"' + "x" * 200_000 + '",a\n')
    with pytest.raises(UsageError, match="not a readable CSV"):
        sentiment.read_csv(path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("So late!", "so   late"),
        ("see http://t.co/one", "See https://t.co/two"),
        ("RT @a: fine.", "rt @a fine"),
    ],
)
def test_copies_share_a_fingerprint(one: str, other: str) -> None:
    assert sentiment.fingerprint(one) == sentiment.fingerprint(other)


def test_texts_without_words_keep_their_own_fingerprint() -> None:
    assert sentiment.fingerprint(":)") != sentiment.fingerprint(":(")


CORPUS = Corpus(
    tuple(f"text {n}" for n in range(100)), tuple(n % 3 for n in range(100)), tuple("abc")
)


def test_split_is_disjoint_and_seeded() -> None:
    train, held_out = sentiment.split(CORPUS, 50, 20, seed=1)
    assert (len(train), len(held_out)) == (50, 20)
    assert not set(train.texts) & set(held_out.texts)
    assert (train, held_out) == sentiment.split(CORPUS, 50, 20, seed=1)
    assert held_out != sentiment.split(CORPUS, 50, 20, seed=2)[1]
    assert all(
        int(text.split()[1]) % 3 == label
        for text, label in zip(train.texts, train.labels, strict=True)
    )


def test_a_small_corpus_keeps_three_quarters_to_train_on() -> None:
    train, held_out = sentiment.split(CORPUS, 4000, 1500, seed=0)
    assert (len(train), len(held_out)) == (75, 25)


def test_held_out_texts_do_not_depend_on_how_many_train() -> None:
    assert sentiment.split(CORPUS, 10, 20, 0)[1] == sentiment.split(CORPUS, 60, 20, 0)[1]


def numbered(count: int) -> Tokens:
    ids = np.arange(count, dtype=np.int32)[:, None] + np.zeros((1, 4), np.int32)
    return Tokens(ids, np.ones_like(ids), np.arange(count, dtype=np.int32))


def test_batches_see_every_text_before_any_twice() -> None:
    drawn = [batch.labels.tolist() for batch in sentiment.batches(numbered(10), 4, 5, seed=0)]
    assert [len(batch) for batch in drawn] == [4] * 5
    flat = [label for batch in drawn for label in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_batches_may_be_larger_than_the_corpus() -> None:
    (batch,) = sentiment.batches(numbered(3), 8, 1, seed=0)
    assert len(batch) == 8
    assert batch.ids.shape == (8, 4)
    assert set(batch.labels.tolist()) == {0, 1, 2}


def test_batches_are_seeded() -> None:
    def first(seed: int) -> list[int]:
        return next(sentiment.batches(numbered(50), 8, 1, seed)).labels.tolist()

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_tokenise_asks_for_one_width() -> None:
    def tokenizer(texts: list[str], **how: object) -> dict[str, np.ndarray]:
        assert how["padding"] == "max_length"
        assert how["truncation"] is True
        shape = (len(texts), how["max_length"])
        return {"input_ids": np.ones(shape, np.int64), "attention_mask": np.ones(shape, np.int64)}

    tokens = sentiment.tokenise(tokenizer, CORPUS.take([0, 1, 5]), 7)
    assert tokens.ids.shape == tokens.mask.shape == (3, 7)
    assert tokens.ids.dtype == tokens.mask.dtype == tokens.labels.dtype == np.int32
    assert tokens.labels.tolist() == [0, 1, 2]
