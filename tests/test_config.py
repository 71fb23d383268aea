import dataclasses
import json
import pickle
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftjax.config import AdapterConfig, FrozenMapping, rejects


@rejects(other_config=None, flag=False)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(AdapterConfig):
    peft_type: ClassVar[str] = "TOY"

    pattern: Mapping[str, Any] = FrozenMapping()


def test_containers_become_immutable_and_ordered():
    config = ToyConfig(
        target_modules=["b", "a"],
        exclude_modules={"z", "y", "x"},
        modules_to_save=("head",),
        layers_to_transform=range(3),
        pattern={"b": [1], "a": 2},
    )
    assert config.target_modules == ("b", "a")
    assert config.exclude_modules == ("x", "y", "z")
    assert config.layers_to_transform == (0, 1, 2)
    assert list(config.pattern.items()) == [("b", (1,)), ("a", 2)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.target_modules = ["c"]


def test_configs_are_values():
    make = lambda: ToyConfig(target_modules=["a"], pattern={"x": 1, "y": 2})  # noqa: E731
    config = make()
    assert config == make()
    assert hash(config) == hash(make())
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, target_modules=["b"]).pattern == {"x": 1, "y": 2}
    assert config != ToyConfig(target_modules=["a"], pattern={"y": 2, "x": 1})


@given(st.lists(st.tuples(st.text(), st.integers()), unique_by=lambda item: item[0]))
def test_frozen_mapping_is_a_mapping_whose_order_counts(items):
    mapping = FrozenMapping(items)
    assert list(mapping.items()) == items
    assert mapping == dict(items)
    assert dict(items) == mapping
    assert hash(mapping) == hash(FrozenMapping(dict(items)))
    assert (mapping == FrozenMapping(items[::-1])) == (len(items) < 2)
    assert repr(mapping) == repr(dict(items))
    assert mapping != 1


@pytest.mark.parametrize("target", ["q", "all-linear", lambda site: True, None])
@pytest.mark.parametrize("layers", [0, [], [1, 2]])
def test_layers_need_a_list_of_targets(target, layers):
    if target is None:  # a file may leave the targets to be filled in
        assert ToyConfig(layers_to_transform=layers).target_modules is None
        return
    with pytest.raises(ValueError, match="`layers_to_transform` needs `target_modules` as a list"):
        ToyConfig(target_modules=target, layers_to_transform=layers)
    with pytest.raises(ValueError, match="`layers_pattern` needs `target_modules` as a list"):
        ToyConfig(target_modules=target, layers_pattern="layers")


def test_layers_pattern_needs_layers_to_transform():
    for layers in (None, []):
        with pytest.raises(ValueError, match="without `layers_to_transform`"):
            ToyConfig(target_modules=["q"], layers_pattern="h", layers_to_transform=layers)
    config = ToyConfig(target_modules=["q"], layers_pattern=["h", "g"], layers_to_transform=0)
    assert config.layers_pattern == ("h", "g")


@pytest.mark.parametrize("layers", [-1, [0, -1], ["0"], 1.5])
def test_layers_are_indices(layers):
    with pytest.raises(ValueError, match="layer indices counted from 0"):
        ToyConfig(target_modules=["q"], layers_to_transform=layers)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", 3),
        ("target_modules", [3]),
        ("exclude_modules", [""]),
        ("layers_pattern", 3),
        ("modules_to_save", lambda site: True),
    ],
)
def test_lists_of_names_are_checked(field, value):
    with pytest.raises(TypeError, match=f"`{field}` takes a list of names"):
        ToyConfig(**{field: value})


def test_one_name_where_a_list_is_due_says_what_to_pass():
    with pytest.raises(TypeError, match=r"for one name pass \['classifier'\]"):
        ToyConfig(modules_to_save="classifier")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "q("},
        {"exclude_modules": "q("},
        {"target_modules": ["a"], "layers_to_transform": 0, "layers_pattern": "q("},
        {"target_modules": ["a"], "layers_to_transform": 0, "layers_pattern": ["a", "q("]},
    ],
)
def test_invalid_regular_expressions_name_the_field(fields):
    with pytest.raises(ValueError, match=f"`{list(fields)[-1]}` holds 'q\\('"):
        ToyConfig(**fields)


def test_list_entries_are_no_regular_expressions():
    assert ToyConfig(target_modules=["q("]).target_modules == ("q(",)


def test_dict_is_json_with_pefts_keys():
    config = ToyConfig(
        target_modules={"q", "k"}, pattern={"a": [1]}, task_type="CAUSAL_LM", revision="main"
    )
    data = config.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data == {
        "peft_type": "TOY",
        "target_modules": ["k", "q"],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "base_model_name_or_path": None,
        "revision": "main",
        "task_type": "CAUSAL_LM",
        "pattern": {"a": [1]},
    }
    assert ToyConfig.from_dict(data) == config


names = st.lists(st.text("abc.", min_size=1), max_size=3)


@given(
    target=st.none() | names | st.sampled_from(["all-linear", r".*\.q"]),
    save=st.none() | names,
    pattern=st.dictionaries(st.text("ab"), st.integers()),
)
def test_json_round_trip(target, save, pattern):
    config = ToyConfig(target_modules=target, modules_to_save=save, pattern=pattern)
    again = ToyConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_functions_cannot_be_written(field):
    config = ToyConfig(**{field: lambda site: True})
    with pytest.raises(ValueError, match=f"`{field}` is a function.*init_adapter resolves it"):
        config.to_dict()


def test_unknown_keys_that_are_off_warn_and_are_dropped():
    with pytest.warns(UserWarning, match="ToyConfig has no field 'new_one', 'newer': dropped"):
        config = ToyConfig.from_dict({"newer": None, "new_one": {}, "target_modules": ["q"]})
    assert config == ToyConfig(target_modules=["q"])


def test_unknown_keys_that_are_on_are_refused():
    data = {"newer": 1, "off": False, "new_one": "x", "peft_version": "0.99.0"}
    with pytest.raises(
        ValueError, match=r"no field 'new_one', 'newer', which PEFT 0\.99\.0 wrote: .* delete it"
    ):
        ToyConfig.from_dict(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", 3),
        ("target_modules", ["q", 3]),
        ("layers_to_transform", [1.5]),
        ("layers_to_transform", True),
        ("modules_to_save", "head"),
        ("revision", 7),
        ("pattern", [1]),
    ],
)
def test_values_of_a_wrong_type_are_refused(field, value):
    with pytest.raises((ValueError, TypeError), match=f"`{field}`"):
        ToyConfig.from_dict({field: value})


def test_what_peft_writes_beside_the_weights_is_no_surprise():
    data = {
        "peft_type": "TOY",
        "peft_version": "0.21.2",
        "auto_mapping": {"base_model_class": "M", "parent_library": "m"},
        "inference_mode": True,
    }
    assert ToyConfig.from_dict(data) == ToyConfig()


def test_other_adapter_types_are_refused():
    with pytest.raises(ValueError, match="ToyConfig reads peft_type 'TOY', but the file says 'VE"):
        ToyConfig.from_dict({"peft_type": "VERA"})


def test_subclasses_inherit_unsupported_fields():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Plain(ToyConfig):
        peft_type: ClassVar[str] = "PLAIN"

    @rejects(third=0)
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Decorated(ToyConfig):
        peft_type: ClassVar[str] = "DECORATED"

    for cls in (Plain, Decorated):
        assert cls.from_dict({"flag": False}) == cls()
        with pytest.raises(
            ValueError, match=f"`flag` is not supported by peftjax's {cls.__name__}"
        ):
            cls.from_dict({"flag": True})
    with pytest.raises(TypeError, match="flag"):
        Plain(flag=True)
    for field in ("flag", "third"):
        with pytest.raises(ValueError, match=f"`{field}` is not supported"):
            Decorated(**{field: True})


def test_unsupported_fields_raise_when_set():
    assert ToyConfig(other_config=None, flag=False) == ToyConfig()
    assert ToyConfig.from_dict({"other_config": None, "flag": False}) == ToyConfig()
    assert ToyConfig.from_dict({"flag": None}) == ToyConfig()
    with pytest.raises(ValueError, match="`other_config` is not supported by peftjax's ToyConfig"):
        ToyConfig(other_config={})
    with pytest.raises(ValueError, match="`flag` is not supported"):
        ToyConfig.from_dict({"flag": True})
    with pytest.raises(TypeError, match="no_such_field"):
        ToyConfig(no_such_field=1)
    assert "flag" not in ToyConfig().to_dict()
    assert AdapterConfig.unsupported_fields == {}
