"""The fields every adapter config shares, and their JSON as Hugging Face PEFT writes it."""

import dataclasses
import functools
import re
import types
import typing
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from peftjax.factors import Method
from peftjax.sites import Site

K = TypeVar("K", bound=Hashable)
V = TypeVar("V", covariant=True)
C = TypeVar("C", bound="AdapterConfig")

Targets = str | Sequence[str] | Callable[[Site], bool]

# PEFT puts these in every file; none of them says anything about the weights.
_FILE_ONLY = frozenset({"auto_mapping", "inference_mode", "peft_version"})

_LARGEST = 3.4e38  # of float32; what is beyond is no scale


class FrozenMapping(Mapping[K, V]):
    """An immutable, hashable mapping that keeps its order, and compares by it.

    Order is meaning in a config: the first key of a ``rank_pattern`` that matches wins.
    """

    __slots__ = ("_data",)

    def __init__(self, data: Mapping[K, V] | Iterable[tuple[K, V]] = ()) -> None:
        self._data = dict(data)

    def __getitem__(self, key: K) -> V:
        return self._data[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return list(self.items()) == list(other.items())

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        return repr(self._data)


# What PEFT's LoRA and AdaLoRA configs hold besides, each with its default there.
LORA_FIELDS_OF_PEFT_ALONE: FrozenMapping[str, object] = FrozenMapping(
    {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "loftq_config": FrozenMapping(),
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_qalora": False,
        "velora_config": None,
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The fields every adapter config shares, under PEFT's names.

    A config is an immutable, hashable value: lists become tuples, sets become sorted tuples and
    dicts become :class:`FrozenMapping`, so it can be a static argument of a jitted function.

    Args:
      target_modules: which modules to adapt. A list names modules, exactly or by their last
        segments (``"query"``, ``"attn.query"``); a string is a regular expression for the whole
        path, or ``"all-linear"``; a function takes a :class:`~peftjax.sites.Site` and says yes
        or no.
      exclude_modules: modules not to adapt, by the same rules; wins over ``target_modules``.
      layers_to_transform: the layer indices to adapt, when ``target_modules`` is a list; None or
        an empty list means all.
      layers_pattern: name of the module that a layer index follows (``"layers"``), where the
        first index in a path is not the layer's.
      modules_to_save: modules to train and save whole instead of adapting them.
      base_model_name_or_path: the base model; written for torch PEFT, which loads it by this name.
      revision: the base model's revision; written for torch PEFT.
      task_type: PEFT's task (``"CAUSAL_LM"``); written for torch PEFT, changes nothing here.

    Raises:
      TypeError: a field that takes a list of names got something else.
      ValueError: layer fields that cannot work as given, or an invalid regular expression.
    """

    peft_type: ClassVar[str] = ""
    method: ClassVar[Method]
    unsupported_fields: ClassVar[Mapping[str, object]] = FrozenMapping()
    # What the keys of a ``rank_pattern`` have behind the name of their module.
    pattern_suffix: ClassVar[str] = ""

    target_modules: Targets | None = None
    exclude_modules: Targets | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _freeze(getattr(self, field.name)))
        check_names("target_modules", self.target_modules, or_string=True, or_function=True)
        check_names("exclude_modules", self.exclude_modules, or_string=True, or_function=True)
        check_names("layers_pattern", self.layers_pattern, or_string=True)
        check_names("modules_to_save", self.modules_to_save)
        self._check_layers()
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_regex(name, value)
        if isinstance(self.layers_pattern, tuple):
            for pattern in self.layers_pattern:
                check_regex("layers_pattern", pattern)

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str) or callable(self.target_modules):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` needs `target_modules` as a list of names, got "
                        f"{self.target_modules!r}: pass a list, or select the layers in "
                        "`target_modules` itself"
                    )
        layers = self.layers_to_transform
        if self.layers_pattern and layers in (None, ()):
            raise ValueError(
                "`layers_pattern` does nothing without `layers_to_transform`: say which layers, "
                "or drop it"
            )
        if layers is None:
            return
        for layer in layers if isinstance(layers, tuple) else (layers,):
            if not isinstance(layer, int) or layer < 0:
                raise ValueError(
                    f"`layers_to_transform` takes layer indices counted from 0, got {layer!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns this config as JSON-ready values under PEFT's keys, ``peft_type`` among them.

        Raises:
          ValueError: a function selects the modules; a file can only hold names.
        """
        for name in ("target_modules", "exclude_modules"):
            if callable(getattr(self, name)):
                raise ValueError(
                    f"`{name}` is a function, which cannot be written: init_adapter resolves it "
                    "to module names, so write the adapter's own config"
                )
        fields = {f.name: thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"peft_type": self.peft_type, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads the contents of an ``adapter_config.json``.

        Of fields that the config does not know, those that are off (null, false, empty) are
        dropped with a warning; PEFT drops all of them, and with them what they mean.

        Args:
          data: the parsed JSON object.

        Raises:
          ValueError: the file is of another adapter type, a value is of the wrong type or out of
            range, or a field is set that is not known or not supported here.
        """
        peft_type = data.get("peft_type", cls.peft_type)
        if peft_type != cls.peft_type:
            raise ValueError(
                f"{cls.__name__} reads peft_type {cls.peft_type!r}, but the file says {peft_type!r}"
            )
        known = {f.name for f in dataclasses.fields(cls)} | set(cls.unsupported_fields)
        unknown = set(data) - known - _FILE_ONLY - {"peft_type"}
        if on := sorted(name for name in unknown if data[name]):
            version = data.get("peft_version")
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(map(repr, on))}"
                + (f", which PEFT {version} wrote" if version else "")
                + ": what it means is lost here; delete it from the file if that does not matter"
            )
        if unknown:
            warnings.warn(
                f"{cls.__name__} has no field {', '.join(map(repr, sorted(unknown)))}: dropped",
                UserWarning,
                stacklevel=2,
            )
        fields = _supported(cls, {k: v for k, v in data.items() if k in known})
        hints = typing.get_type_hints(cls)
        for name, value in fields.items():
            # PEFT writes null for what is not given.
            if value is not None and not _conforms(value, hints[name]):
                raise ValueError(f"{cls.__name__}: `{name}` cannot be {value!r}")
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        given = {k: v for k, v in fields.items() if v is not None or defaults[k] is None}
        return cls(**given)


def rejects(**fields: object) -> Callable[[type[C]], type[C]]:
    """Declares PEFT fields a config knows but cannot honour, each with PEFT's default.

    The decorated class accepts such a field while it holds its default, so PEFT's files load,
    and raises when it is set: nothing is ignored in silence. The fields are not part of the
    dataclass, so they show up neither in its repr nor in its JSON. Subclasses inherit them for
    their files, and for their constructor when they are decorated too.

    Args:
      **fields: the unsupported fields and their defaults in PEFT.
    """

    def decorate(cls: type[C]) -> type[C]:
        init = cls.__init__

        @functools.wraps(init)
        def checked_init(self: C, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **_supported(cls, kwargs))

        cls.__init__ = checked_init  # type: ignore[assignment, method-assign]
        cls.unsupported_fields = FrozenMapping({**cls.unsupported_fields, **fields})
        return cls

    return decorate


def _supported(cls: type[AdapterConfig], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields without unsupported ones, which must hold PEFT's default or None."""
    for name, default in cls.unsupported_fields.items():
        value = fields.get(name)
        if value is not None and value != default:
            raise ValueError(
                f"`{name}` is not supported by peftjax's {cls.__name__}: got {value!r}; "
                f"leave it at {default!r}"
            )
    return {name: value for name, value in fields.items() if name not in cls.unsupported_fields}


def check_ranks(r: int, rank_pattern: Mapping[str, int]) -> dict[str, int]:
    """Returns every rank of a config by the field that gives it.

    Raises:
      ValueError: one of them is no positive integer, or a key is no regular expression.
    """
    ranks = {"r": r, **{f"rank_pattern[{key!r}]": rank for key, rank in rank_pattern.items()}}
    for name, rank in ranks.items():
        if not _conforms(rank, int) or rank <= 0:
            raise ValueError(
                f"`{name}` should be a positive integer value but the value passed is {rank}"
            )
    for key in rank_pattern:
        check_regex("rank_pattern", key)
    return ranks


def check_alphas(
    field: str, alpha: float, alpha_pattern: Mapping[str, float] = FrozenMapping()
) -> dict[str, float]:
    """Returns every alpha of a config by the field that gives it.

    Raises:
      ValueError: one of them is no finite number, or a key is no regular expression.
    """
    alphas = {f"alpha_pattern[{key!r}]": each for key, each in alpha_pattern.items()}
    for name, each in {field: alpha, **alphas}.items():
        if not _conforms(each, float):
            raise ValueError(f"`{name}` must be a finite number, got {each!r}")
    for key in alpha_pattern:
        check_regex("alpha_pattern", key)
    return {field: alpha, **alphas}


def check_probability(field: str, value: float) -> None:
    """Raises a ValueError that names the field unless the value is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"`{field}` must be in [0, 1), got {value}")


def check_biases(bias: str, own: str) -> None:
    """Raises a ValueError unless ``bias`` is ``none``, ``all`` or the method's own word."""
    if bias not in ("none", "all", own):
        raise ValueError(f"`bias` must be one of none, all, {own}; got {bias!r}")


def check_regex(field: str, pattern: str) -> None:
    """Raises a ValueError that names the field if the pattern is no regular expression."""
    # A part of a larger expression cannot say everything that a whole one can.
    is_part = field.endswith("_pattern")
    try:
        re.compile(f"({pattern})(?P<index>)" if is_part else pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"`{field}` holds {pattern!r}, which is no valid regular expression: {error}"
        ) from error


def check_names(
    field: str, value: object, *, or_string: bool = False, or_function: bool = False
) -> None:
    """Raises a TypeError unless the value is None, a tuple of strings, or else allowed."""
    if value is None or (or_string and isinstance(value, str)) or (or_function and callable(value)):
        return
    if not isinstance(value, tuple) or not all(isinstance(n, str) and n for n in value):
        hint = f"; for one name pass [{value!r}]" if isinstance(value, str) else ""
        raise TypeError(f"`{field}` takes a list of names, got {value!r}{hint}")


def _freeze(value: Any) -> Any:
    """Returns the value with containers made immutable, hashable and of a fixed order.

    NumPy's numbers and arrays become Python's, which JSON knows.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return FrozenMapping((key, _freeze(item)) for key, item in value.items())
    if isinstance(value, Set):
        return tuple(sorted(value))  # the order of a set changes from run to run
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_freeze(item) for item in value)
    return value


def _conforms(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is what a field takes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_conforms(value, each) for each in arguments)
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(_conforms(v, arguments[0]) for v in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            isinstance(k, str) and _conforms(v, arguments[1]) for k, v in value.items()
        )
    if hint is Any:
        return True
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= _LARGEST
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(hint, type) and isinstance(value, hint)


def thaw(value: Any) -> Any:
    """Returns the value with containers made JSON's: the inverse of ``_freeze``."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    return [thaw(item) for item in value] if isinstance(value, tuple) else value
