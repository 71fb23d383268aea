"""The rules between module names here and in torch."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftjax.interop.names import ModuleNames

SEGMENT = st.text(alphabet="ab0_+*([\\^$|", min_size=1, max_size=4)
NAME = st.lists(SEGMENT, min_size=1, max_size=4).map(".".join)
SAME = ("{*rest}", "{*rest}")


@pytest.mark.parametrize(
    ("rule", "name", "expected"),
    [
        (("decoder", "model"), "decoder", "model"),
        (("decoder.{*rest}", "model.{*rest}"), "decoder", "model"),
        (("decoder.{*rest}", "model.{*rest}"), "decoder.mlp.up", "model.mlp.up"),
        (("{*rest}", "model.{*rest}"), "mlp.up", "model.mlp.up"),
        (("model.{*rest}", "{*rest}"), "model.mlp.up", "mlp.up"),
        (("{*head}.kernel", "{*head}.weight"), "kernel", "weight"),
        (("{*head}.kernel", "{*head}.weight"), "a.b.kernel", "a.b.weight"),
        (("{*head}.mlp.{*rest}", "{*head}.ffn.{*rest}"), "mlp", "ffn"),
        (("{*head}.mlp.{*rest}", "{*head}.ffn.{*rest}"), "a.mlp.mlp.b", "a.ffn.mlp.b"),
        (("layers_{n}.{*rest}", "layers.{n}.{*rest}"), "layers_11.up", "layers.11.up"),
        (("{kind}_proj", "proj.{kind}"), "q_proj", "proj.q"),
        (("{a}_{b}.x", "{b}.{a}"), "one_two_three.x", "two_three.one"),
        (("{a}.{*b}.{c}", "{c}.{*b}.{a}"), "x.y", "y.x"),
        (("{a}.{*b}.{c}", "{c}.{*b}.{a}"), "x.1.2.y", "y.1.2.x"),
        (("fc+.(x)", "fc"), "fc+.(x)", "fc"),
    ],
)
def test_words_stand_for_segments(rule: tuple[str, str], name: str, expected: str) -> None:
    assert ModuleNames((rule,)).to_torch(name) == expected


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("decoder", "decoder.mlp"),
        ("decoder", "decoders"),
        ("de.oder", "decoder"),
        ("{word}", "two.segments"),
        ("layers_{n}", "layers_"),
        ("decoder.{*rest}", "decoders.mlp"),
        ("{*head}.kernel", "akernel"),
        ("fc+", "fcc"),
    ],
)
def test_other_names_do_not_fit(pattern: str, name: str) -> None:
    words = "".join(re.findall(r"\{\*?\w+\}", pattern))
    names = ModuleNames(((pattern, f"there.{words}"),))
    with pytest.raises(ValueError, match=f"no rule gives {name!r} a torch name; the rules are "):
        names.to_torch(name)


def test_numbers_of_stacked_layers_stand_where_torch_has_them() -> None:
    names = ModuleNames(
        (
            ("{*head}.experts.{*rest}", "{*head}.{i}.experts.{j}.{*rest}"),
            ("{*head}.cells.{*rest}", "{*head}.{k}.{j}.{i}.{*rest}"),
            ("blocks_{kind}.{*rest}", "layers_{i}.{kind}.{*rest}"),
        )
    )
    assert names.to_torch("moe.experts.up", (3, 1)) == "moe.3.experts.1.up"
    assert names.to_torch("experts", (0, 12)) == "0.experts.12"
    assert names.to_torch("a.cells.b", (1, 2, 3)) == "a.3.2.1.b"
    assert names.to_torch("blocks_even.mlp", (7,)) == "layers_7.even.mlp"


def test_the_first_rule_that_fits_is_used() -> None:
    rules = (("a.{x}", "first.{x}"), ("a.{*rest}", "second.{*rest}"), ("{*rest}", "third.{*rest}"))
    names = ModuleNames(rules)
    torch_names = [names.to_torch(name) for name in ("a.b", "a", "a.b.c", "b")]
    assert torch_names == ["first.b", "second", "second.b.c", "third.b"]
    assert ModuleNames(rules[::-1]).to_torch("a.b") == "third.a.b"
    assert [names.rule(name, 0) for name in ("a.b", "a", "b")] == [0, 1, 2]


def test_rules_for_stacked_modules_are_for_them_alone() -> None:
    names = ModuleNames((("h.{*rest}", "h.{i}.{*rest}"), ("h.{*rest}", "h.{i}.{j}.{*rest}"), SAME))
    assert names.to_torch("h.0.mlp") == "h.0.mlp"
    assert names.to_torch("h.mlp", (4,)) == "h.4.mlp"
    assert names.to_torch("h.mlp", (4, 2)) == "h.4.2.mlp"
    assert [names.rule("h.mlp", depth) for depth in range(4)] == [2, 0, 1, None]
    with pytest.raises(ValueError, match="'wte' is stacked"):
        names.to_torch("wte", (0,))


def test_without_rules_the_names_are_the_same() -> None:
    assert ModuleNames().to_torch("a.b") == "a.b"
    assert ModuleNames().rule("a.b", 0) == -1
    assert ModuleNames().rule("a.b", 1) is None


def test_lists_of_rules_are_kept_as_tuples() -> None:
    names = ModuleNames([["a", "b"]], ["c"], ["d"])  # type: ignore[list-item, arg-type]
    assert names == ModuleNames((("a", "b"),), ("c",), ("d",))
    assert hash(names) == hash(ModuleNames((("a", "b"),), ("c",), ("d",)))


@pytest.mark.parametrize(
    "rule",
    [
        ("a.{*rest}", "b"),
        ("a", "b.{x}"),
        ("a.{x}", "b.{y}"),
        ("a.{*x}.end", "b.{x}.end"),
        ("a.{x}.end", "b.{*x}.end"),
        ("layers_{i}", "layers.{i}"),
        ("layers.{*rest}", "layers.{j}.{*rest}"),
        ("layers.{*rest}", "layers.{i}.{k}.{*rest}"),
    ],
)
def test_a_rule_loses_nothing(rule: tuple[str, str]) -> None:
    with pytest.raises(
        ValueError, match="loses a part of the name: both sides need the same words"
    ):
        ModuleNames((SAME, rule))


@pytest.mark.parametrize("rule", [("{x}.{x}", "{x}"), ("{x}", "{x}.{x}"), ("{*x}.{x}", "{x}")])
def test_a_pattern_has_a_word_once(rule: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"the pattern '.*' has the same word twice"):
        ModuleNames((rule,))


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        (
            "model.layers.mlp.up",
            (0,),
            "'model.layers.mlp.up' is stacked, and torch has a module for each of its layers: say "
            "where the number goes, as in names=ModuleNames("
            '(("model.layers.{*rest}", "model.layers.{i}.{*rest}"), ...))',
        ),
        ("tower.mlp", (2,), '(("tower.{*rest}", "tower.{i}.{*rest}"), ...)'),
        ("h.up", (2, 1), "'h.up' is stacked, 2 stack axes, and torch"),
        ("h.up", (2, 1), '(("h.{*rest}", "h.{i}.{j}.{*rest}"), ...)'),
    ],
)
def test_a_stacked_module_without_a_rule(name: str, index: tuple[int, ...], message: str) -> None:
    for names in (ModuleNames(), ModuleNames((SAME,))):
        with pytest.raises(ValueError, match=re.escape(message)):
            names.to_torch(name, index)


def test_the_rule_that_the_error_proposes_helps() -> None:
    with pytest.raises(ValueError, match="is stacked") as error:
        ModuleNames().to_torch("a.blocks.up", (0, 0))
    pair = re.search(r'\("([^"]+)", "([^"]+)"\)', str(error.value))
    assert pair is not None
    assert ModuleNames((pair.groups(),)).to_torch("a.blocks.up", (5, 6)) == "a.blocks.5.6.up"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("c_attn", True),
        ("h.0.attn.c_attn", True),
        ("h.0.mlp.c_fc", True),
        ("h.x.mlp.c_fc", False),
        ("h.0.attn.xc_attn", False),
        ("h.0.c_attn.inner", False),
        ("lm_head", False),
    ],
)
def test_modules_that_keep_their_inputs_first(name: str, expected: bool) -> None:
    names = ModuleNames((SAME,), ("{*head}.c_attn", "h.{i}.mlp.{kind}"))
    assert names.keeps_inputs_first(name) is expected
    assert not ModuleNames((SAME,)).keeps_inputs_first(name)


IN_ORDER = [
    "embed",
    "layers.0.attn",
    "layers.0.attn.q",
    "layers.0.attn.k",
    "layers.9",
    "layers.9.attn.k",
    "layers.9.mlp.0",
    "layers.9.mlp.10",
    "layers.10.attn.q",
    "layers.10.attn.k.q",
    "layers.10.mlp",
    "head",
]


def test_names_are_sorted_as_torch_registers_the_modules() -> None:
    names = ModuleNames(order=("embed", "layers", "attn", "q", "k", "mlp"))
    for seed in range(20):
        shuffled = random.Random(seed).sample(IN_ORDER, len(IN_ORDER))
        assert sorted(shuffled, key=names.place) == IN_ORDER


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("z x k a", "a k z x"),  # behind those known
        ("a.new.z a.new.k a.k a.k.z", "a.k a.k.z a.new.z a.new.k"),
        ("x.k z.q x.q", "x.k z.q x.q"),  # within them nothing moves
        ("z.10 z.9 10 9", "9 10 z.10 z.9"),
        ("x.y x", "x.y x"),
        ("a.2.z a.1.z a.2.k", "a.1.z a.2.k a.2.z"),
    ],
)
def test_unknown_segments_stay_in_the_order_given(given: str, expected: str) -> None:
    names = ModuleNames(order=("a", "q", "k"))
    assert sorted(given.split(), key=names.place) == expected.split()


def test_without_an_order_nothing_is_sorted() -> None:
    given = ["z.1", "10", "9", "a.10", "a.9", "a", "z.0"]
    assert sorted(given, key=ModuleNames().place) == given


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (("q", "k", "q"), "order has 'q' twice"),
        (("attn.q",), "order has 'attn.q': its entries are single segments"),
        (("layers", "0"), "order has '0': its entries are .* no numbers"),
    ],
)
def test_an_order_has_single_segments_once(order: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModuleNames(order=order)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "blocks.", "dense_"]),
            NAME,
            st.lists(st.integers(0, 12)).map(tuple),
        ),
        unique=True,
    )
)
def test_rules_that_are_one_to_one_give_distinct_names(
    modules: list[tuple[str, str, tuple[int, ...]]],
) -> None:
    names = ModuleNames(
        (
            ("blocks.{*rest}", "model.layers.{i}.{*rest}"),
            ("{*rest}", "model.grid.{i}.{j}.{*rest}"),
            ("{*rest}", "model.others.{i}.{*rest}"),
            ("dense_{n}.{*rest}", "mlp.{n}.{*rest}"),
            ("{*rest}", "top.{*rest}"),
        )
    )
    here = {(head + name, index[:2]) for head, name, index in modules}
    assert len({names.to_torch(*module) for module in here}) == len(here)


@given(NAME, NAME)
def test_a_pattern_without_words_is_one_name(name: str, other: str) -> None:
    names = ModuleNames(((name, "torch"), SAME), (name,))
    assert names.to_torch(name) == "torch"
    assert names.to_torch(other) == ("torch" if other == name else other)
    assert names.keeps_inputs_first(other) == (other == name)
