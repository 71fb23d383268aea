import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftjax.config import AdapterConfig
from peftjax.sites import Leaf, Site, Sites
from peftjax.targeting import (
    NoMatchingModuleError,
    bias_leaves,
    pattern_value,
    saved_leaves,
    select_sites,
    unmatched_patterns,
)

FLOAT = np.dtype("float32")


def site(name, *, stack=None, path=None, **fields):
    """A dense site; ``stack`` is the number of layers stacked on its first axis."""
    shape = (4, 4) if stack is None else (stack, 4, 4)
    return Site(
        name=name,
        path=path or f"{name}.kernel",
        shape=shape,
        dtype=FLOAT,
        in_axes=(len(shape) - 2,),
        out_axes=(len(shape) - 1,),
        stack_axes=() if stack is None else (0,),
        **{"kind": "dense", **fields},
    )


def leaf(path):
    return Leaf(path, (4,), FLOAT)


def tree(*sites, leaves=()):
    """Sites by name or by value, each with its weight and bias among the leaves."""
    sites = tuple(site(s) if isinstance(s, str) else s for s in sites)
    paths = [path for s in sites for path in (s.path, s.bias) if path]
    return Sites(sites, tuple(map(leaf, [*paths, *leaves])))


def select(sites, targets, **fields):
    """What a config selects: names, and for partly selected stacks the layers."""
    selected = select_sites(AdapterConfig(target_modules=targets, **fields), sites)
    assert selected.leaves == sites.leaves
    return {s.name: s.layers for s in selected.sites}


def layers(n, *names):
    return tree(*(f"layers.{i}.{name}" for i in range(n) for name in names))


STACK = tree(site("layers.attn.query", stack=4), site("layers.mlp.up", stack=4), "head")


# target_modules: lists, strings, all-linear, functions


def test_list_entries_match_exactly_or_behind_a_dot():
    sites = tree("q_proj", "a.q_proj", "a.xq_proj", "q_proj.out")
    assert list(select(sites, ["q_proj"])) == ["q_proj", "a.q_proj"]
    with pytest.raises(NoMatchingModuleError):
        select(tree("xq_proj"), ["q_proj"])


def test_list_entries_may_have_several_segments():
    sites = layers(11, "q_proj")
    assert list(select(sites, ["0.q_proj"])) == ["layers.0.q_proj"]


def test_list_entries_are_no_regular_expressions():
    with pytest.raises(NoMatchingModuleError):
        select(layers(2, "q_proj"), [".*q_proj"])


def test_string_is_a_regular_expression_for_the_whole_path():
    sites = layers(2, "q_proj", "k_proj")
    with pytest.raises(NoMatchingModuleError, match=r"\(\['q_proj'\] would match its end\)"):
        select(sites, "q_proj")
    assert list(select(tree("q_proj", "a.q_proj"), "q_proj")) == ["q_proj"]
    assert list(select(sites, r".*\.1\.[qk]_proj")) == ["layers.1.q_proj", "layers.1.k_proj"]


def test_order_is_that_of_the_sites():
    assert list(select(tree("b", "c", "a"), ["a", "b"])) == ["b", "a"]


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-Linear"])
def test_all_linear_takes_all_but_lookups(spelling):
    dense = [site("dense"), site("conv", kind="conv"), site("out", is_head=True)]
    assert list(select(tree(*dense), spelling)) == ["dense", "conv", "out"]
    language_model = tree(site("embed", kind="lookup"), *dense)
    assert list(select(language_model, spelling)) == ["dense", "conv"]


def test_all_linear_without_linear_sites():
    with pytest.raises(NoMatchingModuleError, match="selects no site; there are: 'embed'"):
        select(tree(site("embed", kind="lookup")), "all-linear")


def test_lists_name_lookups_and_heads_too():
    sites = tree(site("embed", kind="lookup"), "dense", site("head", is_head=True))
    assert list(select(sites, ["embed", "head"])) == ["embed", "head"]


def test_function_of_a_site():
    sites = tree("a", site("b", kind="conv"), site("c", stack=3))
    assert select(sites, lambda s: s.kind == "conv") == {"b": None}
    assert select(sites, lambda s: bool(s.stack_axes)) == {"c": None}
    with pytest.raises(NoMatchingModuleError, match="selects no site; there are: 'a', 'b', 'c'"):
        select(sites, lambda s: False)


def test_no_targets_says_what_to_specify():
    with pytest.raises(
        ValueError, match=r"Please specify `target_modules`.*there are: 'a'"
    ) as info:
        select(tree("x.a"), None)
    assert not isinstance(info.value, NoMatchingModuleError)


# exclusion


@pytest.mark.parametrize("exclude", [["0.q"], r"layers\.0\.q", lambda s: ".0." in s.name])
def test_excluded_modules_win(exclude):
    assert list(select(layers(2, "q"), ["q"], exclude_modules=exclude)) == ["layers.1.q"]


@pytest.mark.parametrize("exclude", [["kk"], "k", lambda s: False])
def test_exclusion_of_nothing_warns(exclude):
    with pytest.warns(UserWarning, match="`exclude_modules`: "):
        assert len(select(layers(2, "q", "k"), ["q"], exclude_modules=exclude)) == 2


def test_each_useless_exclusion_is_named():
    with pytest.warns(UserWarning, match="no module matched 'kk'; nearest: 'k'") as warned:
        chosen = select(layers(2, "q", "k"), ["q"], exclude_modules=["kk", "0.q"])
    assert len(warned) == 1
    assert list(chosen) == ["layers.1.q"]


def test_modules_to_save_are_never_targets():
    sites = tree("enc.dense", "classifier.dense", "classifier.out.dense", "myclassifier.dense")
    chosen = select(sites, ["dense"], modules_to_save=["classifier"])
    assert list(chosen) == ["enc.dense", "myclassifier.dense"]
    assert list(select(sites, ["dense"], modules_to_save=["classifier.out"])) == [
        "enc.dense",
        "classifier.dense",
        "myclassifier.dense",
    ]


@pytest.mark.parametrize("fields", [{"exclude_modules": ["q"]}, {"modules_to_save": ["q"]}])
def test_all_excluded_is_told_from_no_match(fields):
    with pytest.raises(NoMatchingModuleError, match="`exclude_modules` or `modules_to_save` exc"):
        select(layers(2, "q"), ["q"], **fields)


def test_empty_targets():
    with pytest.raises(NoMatchingModuleError, match="`target_modules` is empty"):
        select(layers(2, "q"), [])


# errors


def test_every_entry_must_match_and_each_failure_is_named():
    sites = layers(2, "q_proj", "v_proj")
    with pytest.raises(NoMatchingModuleError) as info:
        select(sites, ["q_prj", "v_proj", "layers.1.v_prj"])
    assert isinstance(info.value, ValueError)
    first, second = str(info.value).splitlines()
    assert "no module matched 'q_prj'; nearest: 'q_proj'" in first
    assert "'layers.1.v_prj'; nearest: 'layers.1.v_proj'" in second


def test_without_a_near_name_the_names_are_listed():
    with pytest.raises(NoMatchingModuleError, match=r"there are: 'query', 'value'$"):
        select(layers(2, "query", "value"), ["zzz"])
    many = tree(*(f"m.{chr(97 + i)}" for i in range(20)))
    with pytest.raises(NoMatchingModuleError, match=r"'h', \.\.\.$"):
        select(many, ["zzz"])


def test_entry_that_is_no_linear_module():
    sites = tree("layers.0.q", leaves=["layers.0.norm.scale", "layers.0.norm.bias"])
    for entry in ("norm", "layers.0.norm", "norm.scale"):
        with pytest.raises(NoMatchingModuleError, match=r"is no linear weight.*0.norm.scale"):
            select(sites, [entry])


def test_entry_that_is_a_weight_or_a_container():
    sites = layers(2, "attn.q")
    with pytest.raises(NoMatchingModuleError, match=r"is a weight; name its module, 'layers.1.at"):
        select(sites, ["layers.1.attn.q.kernel"])
    with pytest.raises(NoMatchingModuleError, match=r"holds other modules; name those: 'layers.0"):
        select(sites, ["attn"])


# layers_to_transform and layers_pattern, unrolled


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(0, [0]), (2, [2]), ([1, 3], [1, 3]), ([3, 1], [1, 3]), ([], [0, 1, 2, 3]), ([2, 9], [2])],
)
def test_layers_to_transform(chosen, expected):
    for sites, at in (
        (tree(*(f"model.layers.{i}.q" for i in range(4))), "model.layers.{}.q"),
        (layers(4, "q"), "layers.{}.q"),  # at the root, where PEFT finds no index
    ):
        names = list(select(sites, ["q"], layers_to_transform=chosen))
        assert names == [at.format(i) for i in expected]


def test_whole_names_ignore_layers_to_transform():
    sites = layers(4, "q")
    assert list(select(sites, ["layers.2.q"], layers_to_transform=0)) == ["layers.2.q"]
    assert list(select(sites, ["layers.2.q", "q"], layers_to_transform=0)) == [
        "layers.0.q",
        "layers.2.q",
    ]


def test_layer_index_is_the_first_number_behind_a_segment():
    sites = tree("enc.1.block.0.q", "enc.0.block.1.q", "head.q", "enc.q.1")
    assert list(select(sites, ["q"], layers_to_transform=1)) == ["enc.1.block.0.q"]
    assert list(select(sites, ["q"], layers_to_transform=1, layers_pattern="block")) == [
        "enc.0.block.1.q"
    ]
    with pytest.raises(NoMatchingModuleError, match=r"`layers_to_transform` \(1\) has no layer"):
        select(sites, ["q.1"], layers_to_transform=1)  # no index: the number ends the path


def test_layers_patterns_are_tried_in_order_and_at_the_root():
    sites = tree("h.1.q", "m.g.1.q", "m.f.1.q", "m.xh.1.q")
    chosen = select(sites, ["q"], layers_to_transform=[1], layers_pattern=["h", "g"])
    assert list(chosen) == ["h.1.q", "m.g.1.q"]


def test_no_layer_left_is_told_from_no_match():
    with pytest.raises(NoMatchingModuleError, match=r"`layers_to_transform` \(9\) has no layer"):
        select(layers(2, "q"), ["q"], layers_to_transform=9)
    with pytest.raises(NoMatchingModuleError, match="follows 'h' in its path"):
        select(layers(2, "q"), ["q"], layers_to_transform=1, layers_pattern="h")
    with pytest.raises(NoMatchingModuleError, match="no module matched 'k'"):
        select(layers(2, "q"), ["q", "k"], layers_to_transform=1)


# stacked sites


@pytest.mark.parametrize("targets", [["query"], ["attn.query"], ["layers.attn.query"], ".*query"])
def test_own_name_of_a_stack_means_all_layers(targets):
    assert select(STACK, targets) == {"layers.attn.query": None}


@pytest.mark.parametrize(
    "name", ["layers.3.attn.query", "layers.attn.3.query", "layers.attn.query.3", "3.attn.query"]
)
def test_names_of_layers_mean_those_layers(name):
    assert select(STACK, [name]) == {"layers.attn.query": (3,)}
    assert select(STACK, f".*{re.escape(name)}") == {"layers.attn.query": (3,)}


def test_an_index_never_stands_first_nor_beyond_the_stack():
    for name in ("3.layers.attn.query", "layers.4.attn.query"):
        with pytest.raises(NoMatchingModuleError, match=r"nearest: 'layers.attn.query'"):
            select(STACK, [name])


def test_layers_of_several_entries_add_up():
    assert select(STACK, ["layers.3.attn.query", "layers.0.attn.query"]) == {
        "layers.attn.query": (0, 3)
    }
    assert select(STACK, ["layers.3.attn.query", "query"]) == {"layers.attn.query": None}
    assert select(STACK, r"layers\.\d\.mlp\.up") == {"layers.mlp.up": None}
    assert select(STACK, r"layers\.[0-2]\.mlp\.up") == {"layers.mlp.up": (0, 1, 2)}


def test_layers_are_excluded_one_by_one():
    exclude = ["layers.0.attn.query", "up"]
    assert select(STACK, ["query", "up"], exclude_modules=exclude) == {
        "layers.attn.query": (1, 2, 3)
    }


def test_layers_to_transform_counts_the_stack():
    assert select(STACK, ["query"], layers_to_transform=0) == {"layers.attn.query": (0,)}
    assert select(STACK, ["query"], layers_to_transform=[3, 1, 9]) == {"layers.attn.query": (1, 3)}
    assert select(STACK, ["query"], layers_to_transform=[]) == {"layers.attn.query": None}
    assert select(STACK, ["query"], layers_to_transform=range(4)) == {"layers.attn.query": None}
    with pytest.raises(NoMatchingModuleError, match="counts the first axis of a stack"):
        select(STACK, ["query"], layers_to_transform=4)


def test_layers_to_transform_with_whole_names_of_a_stack():
    # The whole name of one layer is exempt; the whole name of the stack names no single layer.
    name = "layers.attn.query"
    assert select(STACK, [name], layers_to_transform=1) == {name: (1,)}
    assert select(STACK, ["layers.2.attn.query"], layers_to_transform=1) == {name: (2,)}
    assert select(STACK, ["layers.2.attn.query", "query"], layers_to_transform=1) == {name: (1, 2)}
    with pytest.raises(NoMatchingModuleError, match="has no layer"):
        select(STACK, ["2.attn.query"], layers_to_transform=1)


def test_an_index_in_the_path_comes_before_the_stack():
    experts = tree(*(site(f"layers.{i}.experts.up", stack=3) for i in range(2)))
    assert select(experts, ["up"], layers_to_transform=1) == {"layers.1.experts.up": None}
    assert select(experts, ["layers.0.experts.2.up"], layers_to_transform=1) == {
        "layers.0.experts.up": (2,)
    }
    chosen = select(experts, ["up"], layers_to_transform=1, layers_pattern="experts")
    assert chosen == {"layers.0.experts.up": (1,), "layers.1.experts.up": (1,)}


@pytest.mark.parametrize(
    "pattern", ["layers", "attn", "query", "layers.attn", "lay.*", ["x", "attn"]]
)
def test_layers_pattern_is_where_the_index_could_stand(pattern):
    chosen = select(STACK, ["query"], layers_to_transform=1, layers_pattern=pattern)
    assert chosen == {"layers.attn.query": (1,)}


@pytest.mark.parametrize("pattern", ["h", "ayers", "mlp"])
def test_layers_pattern_elsewhere_selects_nothing(pattern):
    with pytest.raises(NoMatchingModuleError, match="has no layer"):
        select(STACK, ["query"], layers_to_transform=1, layers_pattern=pattern)


def test_stacks_that_are_narrowed_already_stay_so():
    narrow = tree(dataclasses.replace(STACK["layers.attn.query"], layers=(1, 2)))
    assert select(narrow, ["query"]) == {"layers.attn.query": (1, 2)}
    assert select(narrow, ["query"], layers_to_transform=[0, 1]) == {"layers.attn.query": (1,)}


def test_layers_count_the_first_stack_axis():
    two = dataclasses.replace(
        site("m.up"), shape=(4, 3, 4, 2), in_axes=(0,), out_axes=(2,), stack_axes=(1, 3)
    )
    assert select(tree(two), ["m.2.up"]) == {"m.up": (2,)}
    with pytest.raises(NoMatchingModuleError):
        select(tree(two), ["m.3.up"])


segments = st.sampled_from(["a", "b", "layers"])


@given(
    names=st.lists(st.lists(segments, min_size=2, max_size=4), min_size=1, max_size=4),
    entry=st.lists(segments, min_size=1, max_size=3).map(".".join),
    depth=st.integers(1, 3),
    count=st.integers(1, 3),
    chosen=st.none() | st.lists(st.integers(0, 3), max_size=2),
)
def test_a_stack_selects_as_its_unrolled_model(names, entry, depth, count, chosen):
    def unrolled(name, i):
        cut = min(depth, len(name) - 1)
        return ".".join((*name[:cut], str(i), *name[cut:]))

    names = list(dict.fromkeys(map(tuple, names)))
    stacked = tree(*(site(".".join(name), stack=count) for name in names))
    flat = {unrolled(name, i): (".".join(name), i) for name in names for i in range(count)}

    def pairs(sites, decode):
        try:
            return decode(select(sites, [entry], layers_to_transform=chosen))
        except NoMatchingModuleError:
            return set()

    got = pairs(
        stacked,
        lambda s: {(n, i) for n, at in s.items() for i in (range(count) if at is None else at)},
    )
    want = pairs(tree(*flat), lambda s: {flat[name] for name in s})
    # An entry across the index (layers.a for layers.0.a) matches only where the index is not seen.
    assert want <= got
    if "." not in entry:
        assert got == want


# rank_pattern and alpha_pattern


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ({"lin0": 1}, "lin0", 1),
        ({"lin0": 1}, "foo.lin0", 1),
        ({"lin0": 1}, "xlin0", 0),
        ({"foo": 1}, "foo.lin0", 0),
        ({"^lin0": 1}, "lin0", 1),
        ({"^lin0": 1}, "foo.lin0", 0),
        ({"lin0|lin1": 1}, "foo.lin1", 1),
        ({r"layers\.[01]\.q": 1}, "model.layers.1.q", 1),
        ({"q": 1, "layers.0.q": 2}, "layers.0.q", 1),
        ({"layers.0.q": 2, "q": 1}, "layers.0.q", 2),
        ({"a[0].q": 3}, "a[0].q", 3),
        ({"k": 1}, "q", 0),
        ({}, "q", 0),
    ],
)
def test_pattern_value(pattern, name, expected):
    assert pattern_value(pattern, site(name), 0) == expected


def test_pattern_value_of_a_layer():
    stacked = STACK["layers.attn.query"]
    pattern = {"layers.3.attn.query": 4, "query": 2}
    assert [pattern_value(pattern, stacked, 8, layer) for layer in (2, 3)] == [2, 4]
    assert pattern_value(pattern, stacked, 8) == 2
    assert pattern_value(dict(reversed(pattern.items())), stacked, 8, 3) == 2
    assert pattern_value({r"layers\.[0-1]\..*": 4}, stacked, 8, 1) == 4
    assert pattern_value({"layers.3.attn.query": 4}, stacked, 8) == 8


def test_unmatched_patterns():
    pattern = {"query": 1, "xquery": 1, "layers.3.mlp.up": 1, "layers.4.mlp.up": 1, "head": 0}
    assert unmatched_patterns(pattern, STACK) == ("xquery", "layers.4.mlp.up")
    assert unmatched_patterns({}, STACK) == ()
    narrow = select_sites(AdapterConfig(target_modules=["layers.0.mlp.up"]), STACK)
    assert unmatched_patterns(pattern, narrow) == (
        "query",
        "xquery",
        "layers.3.mlp.up",
        "layers.4.mlp.up",
        "head",
    )


# modules_to_save and bias

LEAVES = tree(
    site("enc.0.q", bias="enc.0.q.bias"),
    site("enc.0.wo", path="enc.0.wo", bias="enc.0.bo"),
    site("classifier.out", bias="classifier.out.bias"),
    leaves=["enc.0.norm.scale", "enc.0.norm.bias", "classifier.scale", "myclassifier.scale"],
)


def saved(*names):
    config = AdapterConfig(target_modules=["q"], modules_to_save=names or None)
    return [leaf.path for leaf in saved_leaves(config, LEAVES)]


def test_saved_leaves_are_all_that_a_module_holds():
    assert saved() == []
    assert saved("classifier") == [
        "classifier.out.kernel",
        "classifier.out.bias",
        "classifier.scale",
    ]
    assert saved("norm", "enc.0.q") == [
        "enc.0.q.kernel",
        "enc.0.q.bias",
        "enc.0.norm.scale",
        "enc.0.norm.bias",
    ]
    assert saved("0.norm") == ["enc.0.norm.scale", "enc.0.norm.bias"]


def test_a_weight_that_is_its_own_site_is_saved_and_excluded_alike():
    assert saved("wo") == ["enc.0.wo"]
    assert list(select(LEAVES, ["q", "wo"], modules_to_save=["wo"])) == ["enc.0.q"]


@pytest.mark.parametrize("name", ["b", "kernel", "scale", "classifie"])
def test_modules_to_save_are_bounded_by_dots_and_name_modules(name):
    with pytest.raises(NoMatchingModuleError, match=f"`modules_to_save`: no module named '{name}'"):
        saved(name)


def test_modules_to_save_names_the_nearest_module():
    with pytest.raises(NoMatchingModuleError, match="nearest: 'classifier', 'myclassifier'"):
        saved("clasifier")


def test_bias_leaves():
    selected = select_sites(AdapterConfig(target_modules=["wo", "out"]), LEAVES)

    def paths(bias):
        return [leaf.path for leaf in bias_leaves(bias, LEAVES, selected)]

    assert paths("none") == []
    assert paths("lora_only") == paths("hra_only") == ["enc.0.bo", "classifier.out.bias"]
    assert paths("all") == ["enc.0.q.bias", "enc.0.bo", "classifier.out.bias", "enc.0.norm.bias"]
    with pytest.raises(ValueError, match="`bias` must be 'none', 'all' or '<method>_only'"):
        paths("some")


def test_sites_without_a_bias_have_no_bias_leaves():
    assert bias_leaves("lora_only", STACK, STACK) == ()
