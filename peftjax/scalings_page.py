"""Pictures of X-LoRA's scalings: a heat map of one text, and a page of many."""

import json
from collections.abc import Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Safe for colour-blind eyes: Matthew A. Petroff, Accessible Color Sequences for Data Visualization,
# 2021, https://arxiv.org/abs/2107.02270
COLOURS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
_LABELLED_TOKENS = 64  # of longer texts the heat map numbers the positions
_MOST_SCALINGS = 1_000_000  # about 6 MB of text
_SPACES = ("▁", "Ġ", " ")  # SentencePiece, byte-level BPE, tokens decoded one by one


def scalings_figure(
    grid: Float[np.ndarray, "tokens experts"],
    experts: Sequence[str],
    tokens: Sequence[str] | None = None,
    *,
    title: str = "",
) -> "Figure":
    """A heat map of scalings, expert by token.

    Args:
      grid: a scaling for each token and expert.
      experts: names of the experts.
      tokens: names of the tokens. Left out, and for long texts, positions are numbered.
      title: heading of the figure.

    Returns:
      The figure; ``savefig`` writes it.
    """
    # A Figure of its own, without pyplot: no backend is chosen and no global state is touched.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if tokens is not None and len(tokens) > _LABELLED_TOKENS:
        tokens = None
    figure = Figure(
        figsize=(
            float(np.clip(3 + 0.32 * len(grid), 6.5, 12)),
            1.8 + 0.32 * max(len(experts), 3) + (0.5 if tokens else 0),
        ),
        layout="constrained",
    )
    axes = figure.subplots()
    finite = grid[np.isfinite(grid)]
    low, high = finite.min(initial=0.0), finite.max(initial=0.0)
    if low < 0:  # without a softmax scalings have signs
        high = max(high, -low)
        colours = {"cmap": "RdBu_r", "vmin": -high, "vmax": high}
    else:
        colours = {"cmap": "viridis", "vmin": 0.0, "vmax": high or 1.0}
    image = axes.imshow(grid.T, aspect="auto", interpolation="nearest", **colours)
    axes.set_facecolor("#d0d3d8")  # what is not finite
    axes.set_yticks(range(len(experts)), experts, parse_math=False)
    axes.set_ylabel("expert")
    if tokens:
        names = [_shortened(token) for token in tokens]
        size = 9 if len(names) <= 40 else 8
        rotation: dict[str, Any] = {"rotation": 50, "ha": "right", "rotation_mode": "anchor"}
        if len(names) > 30:
            rotation = {"rotation": 90}
        axes.set_xticks(range(len(names)), names, fontsize=size, parse_math=False, **rotation)
        axes.set_xlabel("token")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlabel("position of the token")
    if len(grid) <= _LABELLED_TOKENS:
        axes.set_xticks(np.arange(0.5, len(grid) - 1), minor=True)
        axes.set_yticks(np.arange(0.5, len(experts) - 1), minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="scaling", pad=0.02).outline.set_visible(False)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


class Row(NamedTuple):
    """One text on the page.

    Attributes:
      caption: what the text is.
      scalings: a weight for every token, layer and expert.
      tokens: the text.
      named: whether the tokens are words, not the numbers of their positions.
    """

    caption: str
    scalings: Float[np.ndarray, "tokens layers experts"]
    tokens: Sequence[str]
    named: bool = True


def scalings_page(
    title: str, experts: Sequence[str], layers: Sequence[str], rows: Sequence[Row]
) -> str:
    """A whole HTML page without links, from which the script reads scalings of three digits.

    Args:
      title: heading of the page.
      experts: names of the experts.
      layers: names of the layers.
      rows: the texts.
    """
    scalings = [row.scalings for row in rows]
    if sum(array.size for array in scalings) > _MOST_SCALINGS:
        scalings = [array.mean(axis=1, keepdims=True) for array in scalings]
        layers = [f"mean over {len(layers)} layers"]
    data = {
        "experts": list(experts),
        "colours": [COLOURS[expert % len(COLOURS)] for expert in range(len(experts))],
        "layers": list(layers),
        "scalings": [_rounded(array.swapaxes(0, 1)) for array in scalings],
    }
    words = [row.tokens for row in rows if row.named]
    marks = {token[0] for text in words for token in text if token.startswith(_SPACES)}
    return _PAGE.substitute(
        title=escape(title),
        layers="".join(
            f'<option value="{number}">{escape(name)}</option>'
            for number, name in [(-1, f"mean over {len(layers)} layers"), *enumerate(layers)]
        )
        if len(layers) > 1
        else f'<option value="0">{escape(layers[0])}</option>',
        texts="\n".join(
            f'<article><h2>{escape(row.caption)}</h2><p class="text" dir="auto">'
            f"{_spans(row.tokens, marks if row.named else set())}</p></article>"
            for row in rows
        ),
        # No "<" in the data: nothing in it can end the script.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _rounded(array: np.ndarray) -> list:
    """Nested lists of three digits, with None for what is not finite."""
    digits = np.round(array.astype(np.float64), 3).astype(object)
    digits[~np.isfinite(array)] = None
    return digits.tolist()


def _spans(tokens: Sequence[str], marks: set[str]) -> str:
    """Tokens as elements, with spaces where the text has them.

    Example:
      >>> _spans(["un", "##like", "<s>"], set())
      '<span>un</span><span>like</span> <span>&lt;s&gt;</span>'
      >>> _spans(["▁un", "like", "▁it"], {"▁"})
      '<span>un</span><span>like</span> <span>it</span>'
    """
    parts = []
    for token in tokens:
        # Where one token marks its space, one without a mark follows directly.
        if marks:
            apart, shown = token[:1] in marks, token[1:] if token[:1] in marks else token
        else:
            apart = not (token.startswith("##") and len(token) > 2)
            shown = token if apart else token[2:]
        if "Ġ" in marks:
            shown = shown.replace("Ġ", " ").replace("Ċ", "\n")
        shown = (shown if shown.strip(" ") else token).replace("\n", "⏎")
        parts.append(f"{' ' if apart else ''}<span>{escape(shown)}</span>")
    return "".join(parts).lstrip()


def _shortened(token: str, length: int = 16) -> str:
    token = token.replace("\n", "\\n").replace("\t", "\\t")
    return token if len(token) <= length else token[: length - 1] + "…"


_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #fff; --ink: #1c1f24; --soft: #5c6470; --line: #d8dce2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171c; --ink: #e9ecf0; --soft: #a3abb8; --line: #39404b; }
}
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  max-width: 56rem; margin: 0 auto; padding: 1.5rem 1rem 6rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: .8rem; font-weight: 500; color: var(--soft); margin: 1.5rem 0 .25rem; }
header p { color: var(--soft); margin: 0; font-size: .9rem; }
nav { position: sticky; top: 0; z-index: 1; background: var(--page); padding: .75rem 0 .5rem;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; }
ul, #tip { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: .25rem 1.25rem; font-size: .9rem; }
b { display: inline-block; min-width: 1.2rem; margin-right: .4rem; border-radius: 3px;
  font-size: .75rem; line-height: 1.2rem; text-align: center; }
i { font-style: normal; font-variant-numeric: tabular-nums; color: var(--soft);
  margin-left: .5rem; }
select { font: inherit; font-size: .9rem; max-width: 100%; }
.text { margin: 0; line-height: 2.3; overflow-wrap: anywhere; }
.text span { padding: .2em .14em .42em; margin: 0 1px; border-radius: 3px; cursor: default;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.text span:hover, .text span:focus { outline: 2px solid var(--ink); }
.many span::after { content: attr(data-top); font-size: .65em; vertical-align: super; }
#tip { position: fixed; z-index: 2; flex-direction: column; padding: .5rem .75rem; max-width: 22rem;
  background: var(--page); border: 1px solid var(--line); border-radius: 6px;
  box-shadow: 0 4px 16px #0004; pointer-events: none; }
#tip[hidden] { display: none; }
#tip li { display: flex; } #tip i { margin-left: auto; padding-left: 1rem; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>The bar below a token is the mix of its experts, its background the strongest of them.
Hover over a token, or focus it and use the arrow keys, for its scalings.</p>
</header>
<nav>
<label>layer <select id="layer">$layers</select></label>
<ul id="legend" aria-label="mean mix of the experts"></ul>
</nav>
<noscript><p>Colours and numbers need JavaScript.</p></noscript>
<main>
$texts
</main>
<ul id="tip" role="status" hidden></ul>
<script id="data" type="application/json">$data</script>
<script>
const {experts, colours, scalings} = JSON.parse(document.getElementById("data").textContent);
const [layer, legend, tip] = ["layer", "legend", "tip"].map(id => document.getElementById(id));
const texts = [...document.querySelectorAll(".text")].map(text => [...text.children]);
const place = new Map();
texts.forEach((spans, row) => spans.forEach((span, token) => place.set(span, [row, token])));

// A light colour takes black letters, a dark one white letters.
const ink = hex => {
  const [r, g, b] = [1, 3, 5].map(at => (parseInt(hex.slice(at, at + 2), 16) / 255) ** 2.2);
  return .2126 * r + .7152 * g + .0722 * b > .179 ? "#000" : "#fff";
};
const sum = values => values.reduce((total, value) => total + value, 0);
function scaling(span) {
  const [row, token] = place.get(span);
  const chosen = layer.value < 0 ? scalings[row] : [scalings[row][layer.value]];
  return experts.map((_, e) => sum(chosen.map(each => each[token][e] ?? NaN)) / chosen.length);
}
function shares(values) {
  const kept = values.map(value => value > 0 ? value : 0), total = sum(kept) || 1;
  return kept.map(value => value / total);
}
function list(place, values) {
  place.replaceChildren(...experts.map((name, e) => {
    const [item, chip, value] = ["li", "b", "i"].map(tag => document.createElement(tag));
    chip.textContent = e + 1;
    chip.style.cssText = `background:$${colours[e]};color:$${ink(colours[e])}`;
    value.textContent = values[e];
    item.append(chip, name, value);
    return item;
  }));
}
function paint() {
  const total = experts.map(() => 0);
  for (const span of place.keys()) {
    const mix = shares(scaling(span)), most = Math.max(...mix), top = mix.indexOf(most);
    mix.forEach((share, e) => total[e] += share);
    let at = 0;
    const stops = mix.map((share, e) =>
      `$${colours[e]} $${100 * at}% $${100 * (at += share)}%`);
    const tint = Math.round(255 * (.06 + .3 * most)).toString(16).padStart(2, "0");
    span.style.background = most ? `linear-gradient(90deg,$${stops}) 0 100%/100% 5px no-repeat,` +
      colours[top] + tint : "none";
    span.dataset.top = most ? top + 1 : "";
  }
  list(legend, shares(total).map(share => (100 * share).toFixed(1) + "%"));
}
function show(event) {
  const span = event.target;
  tip.hidden = !place.has(span);
  if (tip.hidden) return;
  list(tip, scaling(span).map(value => value.toFixed(3)));
  const box = span.getClientRects()[0], {offsetWidth: width, offsetHeight: height} = tip;
  const below = box.bottom + 6, above = box.top - height - 6;
  const fits = below + height < innerHeight || above > 0;
  const left = fits ? box.left : box.right + 6;
  tip.style.left = Math.max(4, Math.min(left, innerWidth - width - 4)) + "px";
  tip.style.top = (below + height < innerHeight ? below : Math.max(4, above)) + "px";
}
function step(event) {
  const to = {ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling"}[event.key];
  const span = to && place.has(event.target) && event.target[to];
  if (span) { event.preventDefault(); span.focus(); }
}
texts.forEach(spans => spans.forEach((span, token) => span.tabIndex = token ? -1 : 0));
// Colours repeat after ten: then each token wears the number of its strongest expert.
document.body.classList.toggle("many", new Set(colours).size < colours.length);
document.addEventListener("pointerover", show);
document.addEventListener("focusin", show);
document.addEventListener("keydown", step);
document.addEventListener("scroll", () => tip.hidden = true, {passive: true});
layer.addEventListener("change", paint);
paint();
</script>
</body>
</html>
""")
