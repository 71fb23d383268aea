"""X-LoRA's scalings: what the log keeps and refuses, and the pictures of it."""

import json
import struct
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax import scalings_page
from peftjax.scalings_log import ScalingsLog

EXPERTS = ["physics", "biology", "law"]
LAYERS = ["query", "value"]


def scalings(batch: int, seq: int, layers: int = 2, experts: int = 3, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(size=(batch, seq, layers, experts))
    return (values / values.sum(-1, keepdims=True)).astype(np.float32)


def test_entries_come_back_in_order() -> None:
    log = ScalingsLog(EXPERTS, LAYERS)
    first, second = scalings(2, 4), scalings(1, 3, seed=1)
    log.append(jnp.asarray(first))
    log.append(second, texts=[["a", "cell"]])
    assert len(log) == len(log.entries) == 2
    np.testing.assert_array_equal(log.entries[0].scalings, first)
    assert log.entries[0].texts is None
    assert log.entries[1].texts == (("a", "cell"),)
    np.testing.assert_array_equal(log.latest, second)


def test_the_log_keeps_copies() -> None:
    log = ScalingsLog(EXPERTS, LAYERS)
    mine, tokens = scalings(1, 3), ["a", "b", "c"]
    want = mine.copy()
    log.append(mine, texts=[tokens])
    mine[:] = -1
    tokens[0] = "z"
    np.testing.assert_array_equal(log.latest, want)
    assert log.entries[0].texts == (("a", "b", "c"),)
    with pytest.raises(ValueError, match="read-only"):
        log.latest[0, 0, 0, 0] = 7
    log.by_length()[3][1][:] = -1
    np.testing.assert_array_equal(log.latest, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_every_precision_is_kept_as_float32(dtype: jnp.dtype) -> None:
    log = ScalingsLog(EXPERTS)
    given = jnp.asarray(scalings(1, 3), dtype)
    log.append(given)
    assert isinstance(log.latest, np.ndarray)
    assert log.latest.dtype == np.float32
    np.testing.assert_array_equal(log.latest, given.astype(jnp.float32))


def test_values_that_are_not_finite_are_kept() -> None:
    log = ScalingsLog(EXPERTS)
    given = scalings(1, 2)
    given[0, 0, 0] = [np.nan, np.inf, -np.inf]
    log.append(given)
    np.testing.assert_array_equal(log.latest, given)


def test_buckets_join_equal_lengths() -> None:
    log = ScalingsLog(EXPERTS)
    given = [scalings(2, 5, seed=0), scalings(1, 3, seed=1), scalings(3, 5, seed=2)]
    for each in given:
        log.append(each)
    buckets = log.by_length()
    assert list(buckets) == [3, 5]
    assert [positions for positions, _ in buckets.values()] == [(1,), (0, 2)]
    np.testing.assert_array_equal(buckets[3][1], given[1])
    np.testing.assert_array_equal(buckets[5][1], np.concatenate([given[0], given[2]]))
    assert ScalingsLog(EXPERTS).by_length() == {}


def test_mean_leaves_padding_out() -> None:
    log = ScalingsLog(EXPERTS)
    padded, whole = scalings(2, 4), scalings(1, 3, seed=1)
    log.append(padded, texts=[["a", "b"], ["a", "b", "c"]])
    log.append(whole)
    tokens = np.concatenate([padded[0, :2], padded[1, :3], whole[0]])
    np.testing.assert_allclose(log.mean(), tokens.mean(axis=0), rtol=1e-6)
    assert log.mean().shape == (2, 3)


def test_clear_forgets_all_but_names() -> None:
    numbered, named = ScalingsLog(EXPERTS), ScalingsLog(EXPERTS, LAYERS)
    assert numbered.layers == ()
    for log in (numbered, named):
        log.append(scalings(1, 3))
    assert numbered.layers == ("0", "1")
    for log in (numbered, named):
        log.clear()
        assert len(log) == 0
        assert log.entries == ()
    numbered.append(scalings(1, 3, layers=5))
    assert len(numbered.layers) == 5
    assert named.layers == ("query", "value")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 2, 3), r"\(3, 2, 3\): they need the 4 axes \(batch, seq, layers, experts\)"),
        ((1, 3, 2, 4), r"\(1, 3, 2, 4\) are for 4 experts.*name every expert"),
        ((1, 3, 5, 3), r"\(1, 3, 5, 3\) are for 5 layers.*a ScalingsLog for each adapter"),
        ((1, 3, 0, 3), r"\(1, 3, 0, 3\) are for 0 layers.*a ScalingsLog for each adapter"),
    ],
)
@pytest.mark.parametrize("layers", [LAYERS, []])
def test_shapes_that_do_not_fit_are_refused(
    shape: tuple[int, ...], message: str, layers: list[str]
) -> None:
    log = ScalingsLog(EXPERTS, layers)
    log.append(scalings(1, 3))
    with pytest.raises(ValueError, match=message):
        log.append(np.zeros(shape))
    assert len(log) == 1


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([["a"]], ValueError, r"1 rows, but scalings of shape \(2, 3, 2, 3\).*for each row"),
        ([["a"], list("abcd")], ValueError, r"4 tokens.*\(2, 3, 2, 3\) have 3 positions: cut"),
        (["ab", "c"], TypeError, "whole strings: pass a list of tokens"),
        ("ab", TypeError, "whole strings: pass a list of tokens"),
        ([[1], [2]], TypeError, "no strings: convert ids to tokens"),
    ],
)
def test_texts_that_do_not_fit_are_refused(
    texts: list, error: type[Exception], message: str
) -> None:
    log = ScalingsLog(EXPERTS)
    with pytest.raises(error, match=message):
        log.append(scalings(2, 3), texts=texts)
    assert len(log) == 0
    log.append(scalings(2, 3, layers=4))  # nor is the number of layers kept


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad])
def test_tracers_are_refused(transform) -> None:
    log = ScalingsLog(EXPERTS)

    def logging(array):
        log.append(array)
        return array.sum()

    given = jnp.zeros((2, 1, 3, 2, 3) if transform is jax.vmap else (1, 3, 2, 3))
    with pytest.raises(TypeError, match=r"\[1,3,2,3\], a tracer.*return the scalings from"):
        transform(logging)(given)
    assert len(log) == 0


def test_names_must_tell_apart() -> None:
    with pytest.raises(ValueError, match="pass the experts' names"):
        ScalingsLog([])
    with pytest.raises(ValueError, match="experts has law twice: give each a name"):
        ScalingsLog(["law", "physics", "law"])
    with pytest.raises(ValueError, match="layers has query twice: give each a name"):
        ScalingsLog(EXPERTS, ["query", "query"])


def test_an_empty_log_says_what_to_do(tmp_path: Path) -> None:
    log = ScalingsLog(EXPERTS)
    calls = [
        lambda: log.latest,
        log.mean,
        lambda: log.plot(tmp_path / "map.png"),
        lambda: log.write_html(tmp_path / "page.html"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="the log is empty: append"):
            call()
    assert not list(tmp_path.iterdir())
    log.append(scalings(1, 3), texts=[[]])
    with pytest.raises(ValueError, match="append one with tokens"):
        log.mean()


# Heat maps


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", header[16:24])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that ``plot`` draws."""
    pytest.importorskip("matplotlib")
    drawn = []

    def draw(*args, **options):
        drawn.append(scalings_page.scalings_figure(*args, **options))
        return drawn[-1]

    monkeypatch.setattr("peftjax.scalings_log.scalings_figure", draw)
    return drawn


def test_a_heat_map_shows_one_text(tmp_path: Path, figures: list) -> None:
    log = ScalingsLog(EXPERTS, LAYERS)
    given = scalings(2, 6)
    log.append(given, texts=[["x"], ["a", "$b$", "##c", "d"]])
    path = tmp_path / "deep" / "map.png"
    assert log.plot(path, row=1) == path
    assert log.plot(path, row=-1, layer="value") == path
    assert log.plot(path, row=1, layer=-2) == path
    for figure, want, name in zip(
        figures,
        [given[1, :4].mean(axis=1), given[1, :4, 1], given[1, :4, 0]],
        ["mean over 2 layers", "layer value", "layer query"],
        strict=True,
    ):
        axes, bar = figure.axes
        np.testing.assert_allclose(axes.images[0].get_array(), want.T, rtol=1e-6)
        assert [label.get_text() for label in axes.get_yticklabels()] == EXPERTS
        assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "$b$", "##c", "d"]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("token", "expert")
        assert bar.get_ylabel() == "scaling"
        assert name in figure.get_suptitle()
        assert "entry 0, row 1" in figure.get_suptitle()
    np.testing.assert_allclose(png_size(path), figures[-1].get_size_inches() * 150, atol=1)


def test_a_heat_map_is_written_under_its_name(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = ScalingsLog(EXPERTS)
    log.append(scalings(1, 3))
    for name in ("out", "v1.2"):
        path = log.plot(tmp_path / name)
        assert path == tmp_path / name
        assert png_size(path)


@pytest.mark.parametrize("named", [True, False])
def test_long_texts_number_their_tokens(tmp_path: Path, figures: list, named: bool) -> None:
    log = ScalingsLog(EXPERTS)
    log.append(scalings(1, 300), texts=[["word"] * 300] if named else None)
    width, _ = png_size(log.plot(tmp_path / "map.png", layer=0))
    assert width == 12 * 150
    axes = figures[0].axes[0]
    assert axes.get_xlabel() == "position of the token"
    ticks = axes.get_xticks()
    assert 5 < len(ticks) < 15
    np.testing.assert_array_equal(ticks, np.round(ticks))


def test_signs_put_zero_in_the_middle_of_the_colours() -> None:
    pytest.importorskip("matplotlib")
    for grid, want in [
        ([[0.2, 0.5]], (0, 0.5)),
        ([[-2.0, 1.0]], (-2, 2)),
        ([[0.0, 0.0]], (0, 1)),
        ([[np.nan, 0.25]], (0, 0.25)),
    ]:
        figure = scalings_page.scalings_figure(np.array(grid), ["a", "b"])
        assert figure.axes[0].images[0].get_clim() == want


def test_what_is_not_there_cannot_be_drawn(tmp_path: Path) -> None:
    log = ScalingsLog(EXPERTS, LAYERS)
    log.append(scalings(2, 3), texts=[["a"], []])
    path = tmp_path / "map.png"
    with pytest.raises(IndexError, match="no entry 1: choose one from 0 to 0"):
        log.plot(path, entry=1)
    with pytest.raises(IndexError, match="no row -3: choose one from 0 to 1"):
        log.plot(path, row=-3)
    with pytest.raises(ValueError, match="no layer 2: choose one from 0 to 1"):
        log.plot(path, layer=2)
    with pytest.raises(ValueError, match=r"no layer 'valu': choose from log\.layers, as .*value"):
        log.plot(path, layer="valu")
    with pytest.raises(ValueError, match="row 1 of entry 0 has no token: choose another"):
        log.plot(path, row=1)
    assert not path.exists()


# Pages

VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """A page whose tags must be balanced, taken apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[list[str]] = []  # of each text
        self.lines: list[str] = []  # each text as it reads
        self.options: list[str] = []
        self.all: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if ("class", "text") in attrs:
            self.words.append([])
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open:
            return
        self.all.setdefault(self.open[-1], []).append(data)
        if "article" in self.open and "h2" not in self.open and "p" in self.open:
            self.lines[-1] += data
            if self.open[-1] == "span":
                self.words[-1].append(data)

    @property
    def data(self) -> dict:
        return json.loads(self.all["script"][0])


def page_of(log: ScalingsLog, tmp_path: Path, title: str = "") -> Page:
    path = tmp_path / "deep" / "page.html"
    assert log.write_html(path, title) == path
    return Page(path.read_text(encoding="utf-8"))


def test_a_page_holds_every_token_and_number(tmp_path: Path) -> None:
    log = ScalingsLog(EXPERTS, LAYERS)
    first, second = scalings(2, 5), scalings(1, 3, seed=1)
    log.append(first, texts=[["the", "cat", "##s"], ["law", "of", "the", "land", "."]])
    log.append(second)
    page = page_of(log, tmp_path)
    assert page.lines == ["the cats", "law of the land .", "0 1 2"]
    assert page.words[0] == ["the", "cat", "s"]
    assert page.all["h2"] == ["entry 0, row 0", "entry 0, row 1", "entry 1, row 0"]
    assert page.all["option"] == ["mean over 2 layers", *LAYERS]
    assert page.data["experts"] == EXPERTS
    rows = [first[0, :3], first[1], second[0]]
    for kept, row in zip(page.data["scalings"], rows, strict=True):
        np.testing.assert_allclose(kept, row.swapaxes(0, 1), atol=5.1e-4)


def test_a_page_needs_no_network(tmp_path: Path) -> None:
    log = ScalingsLog(EXPERTS)
    log.append(scalings(1, 3))
    page = page_of(log, tmp_path)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert not any("url(" in text or "//" in text.replace("// ", "") for text in page.all["style"])
    assert "http" not in (tmp_path / "deep" / "page.html").read_text()


def test_nothing_logged_can_break_out_of_a_page(tmp_path: Path) -> None:
    evil = '</script><script>alert("1")</script><!--&amp;$title${data}'
    log = ScalingsLog([evil, "b", "c"], [evil, "value"])
    log.append(scalings(1, 3), texts=[[evil, "<b>", "&lt;"]])
    page = page_of(log, tmp_path, title=evil)
    assert page.words == [[evil, "<b>", "&lt;"]]
    assert page.all["title"] == page.all["h1"] == [evil]
    assert page.all["option"][1] == evil
    assert page.data["experts"][0] == evil
    assert len(page.all["script"]) == 2
    assert page.open == []


@pytest.mark.parametrize(
    ("tokens", "line"),
    [
        ("[CLS] un ##believ ##able ##", "[CLS] unbelievable ##"),
        ("▁un believ able ▁# ## ▁", "unbelievable ### ▁"),
        ("Hello , Ġworld Ċ Ċ Ġ ##", "Hello, world⏎⏎ Ġ##"),
    ],
)
def test_tokens_join_to_words(tmp_path: Path, tokens: str, line: str) -> None:
    log = ScalingsLog(EXPERTS)
    log.append(scalings(1, 9), texts=[tokens.split()])
    page = page_of(log, tmp_path)
    assert page.lines == [line]
    assert len(page.words[0]) == len(tokens.split())


def test_tokens_decoded_one_by_one_join_too(tmp_path: Path) -> None:
    log = ScalingsLog(EXPERTS)
    log.append(scalings(1, 4), texts=[["It", " is", "n't", "\n"]])
    assert page_of(log, tmp_path).lines == ["It isn't⏎"]


def test_what_is_not_finite_is_null_on_a_page(tmp_path: Path) -> None:
    log = ScalingsLog(EXPERTS, ["only"])
    log.append(np.array([[[[np.nan, np.inf, 0.5]]]]))
    page = page_of(log, tmp_path)
    assert page.data["scalings"] == [[[[None, None, 0.5]]]]
    assert page.all["option"] == ["only"]


def test_large_logs_show_the_mean_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalings_page, "_MOST_SCALINGS", 10)
    log = ScalingsLog(EXPERTS)
    given = scalings(1, 3)
    log.append(given)
    page = page_of(log, tmp_path)
    assert page.all["option"] == ["mean over 2 layers"]
    want = given.mean(axis=2)
    np.testing.assert_allclose(page.data["scalings"], want[:, None], atol=5.1e-4)


def test_colours_repeat_after_ten(tmp_path: Path) -> None:
    log = ScalingsLog([f"expert {number}" for number in range(12)])
    log.append(scalings(1, 3, experts=12))
    colours = page_of(log, tmp_path).data["colours"]
    assert len(set(colours[:10])) == 10
    assert colours[10:] == colours[:2]
