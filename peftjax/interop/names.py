"""Module names here and in torch, and the rules between the two."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

from peftjax.unstacking import Index

# Where along its stack axes a weight lies: placeholders that torch's names alone have.
STACKED = ("i", "j", "k")

# What modules of stacked layers are often called; for an example in an error alone.
_STACKS = ("layers", "layer", "blocks", "block", "h", "experts")

_PLACEHOLDER = re.compile(r"\{(\*?)([A-Za-z]\w*)\}")
_SEVERAL = re.compile(r"\{\*(\w+)\}")  # a segment that stands for any number of them


@dataclasses.dataclass(frozen=True)
class ModuleNames:
    """Rules between the dotted names of a JAX model's modules and those of its torch twin.

    A rule is a pair of patterns, JAX's and torch's. In a pattern ``{word}`` stands for one segment
    or a part of one, ``{*word}`` for any number of whole segments, none included; the same words
    have to stand on both sides, so that nothing of a name is lost. On torch's side ``{i}`` is the
    number of a layer where the layers of the JAX model are stacked in one array, as under
    ``flax.linen.scan``, and ``{j}`` counts along the second stack axis (experts); such a rule is
    for stacked modules alone. The first rule that fits a name is used.

    Args:
      rules: the rules in order. None at all means that the names are the same.
      fan_in_fan_out: patterns of the torch modules that keep their weights as (in, out), as
        transformers' ``Conv1D`` of GPT-2 does and ``torch.nn.Linear`` does not.
      order: the segments of torch's names, without numbers, in the order in which torch registers
        the modules; ``place`` goes by it.

    Raises:
      ValueError: the sides of a rule have different words, or one has a word twice; or ``order``
        has a segment twice, or what is no segment.

    Example:
      >>> import peftjax
      >>> names = peftjax.ModuleNames(
      ...     (
      ...         ("blocks.{*rest}", "model.layers.{i}.{*rest}"),  # scanned
      ...         ("dense_{n}", "mlp.{n}"),
      ...         ("{*rest}", "model.{*rest}"),
      ...     )
      ... )
      >>> names.to_torch("blocks.attn.q_proj", (3,)), names.to_torch("dense_0")
      ('model.layers.3.attn.q_proj', 'mlp.0')
    """

    rules: tuple[tuple[str, str], ...] = ()
    fan_in_fan_out: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple((jax, torch) for jax, torch in self.rules))
        object.__setattr__(self, "fan_in_fan_out", tuple(self.fan_in_fan_out))
        object.__setattr__(self, "order", tuple(self.order))
        for segment in self.order:
            if self.order.count(segment) > 1:
                raise ValueError(f"order has {segment!r} twice: a segment has one place")
            if "." in segment or segment.isdecimal():
                raise ValueError(
                    f"order has {segment!r}: its entries are single segments of torch's names, and "
                    f"no numbers, whose order is known"
                )
        for pattern in self.fan_in_fan_out:
            _words(pattern)
        for rule in self.rules:
            jax, torch = (_words(pattern) for pattern in rule)
            depth = _depth(rule)
            if set(jax) != set(torch) - set(STACKED) or set(STACKED[:depth]) != {
                word for word in torch if word in STACKED
            }:
                raise ValueError(
                    f"the rule {rule} loses a part of the name: both sides need the same words in "
                    f"braces, but for {{i}} and then {{j}}, which torch's side has for stacked "
                    f"modules"
                )

    def to_torch(self, name: str, index: Index = ()) -> str:
        """Torch's name of a module.

        Args:
          name: the module's name here.
          index: where along the stack axes, for one of the modules that are stacked in it.

        Raises:
          ValueError: no rule fits.
        """
        rule = self.rule(name, len(index))
        if rule is None:
            raise ValueError(self._unnamed(name, index))
        if rule < 0:
            return name
        words = _match(self.rules[rule][0], name) or {}
        words |= {word: str(i) for word, i in zip(STACKED, index, strict=False)}
        return _fill(self.rules[rule][1], words)

    def rule(self, name: str, depth: int) -> int | None:
        """Which rule names a module here with that many stack axes; -1 for the same name."""
        for position, rule in enumerate(self.rules):
            if _depth(rule) == depth and _match(rule[0], name) is not None:
                return position
        return None if self.rules or depth else -1

    def before_number(self, name: str, depth: int) -> str | None:
        """What torch's name of a stacked module has before its number; None if it has no name."""
        rule = self.rule(name, depth)
        if not depth or rule is None:
            return None
        words = _match(self.rules[rule][0], name) or {}
        return _fill(self.rules[rule][1].partition("{i}")[0], words)

    def keeps_inputs_first(self, torch_name: str) -> bool:
        """Whether that torch module keeps its weight as (in, out)."""
        return any(_match(pattern, torch_name) is not None for pattern in self.fan_in_fan_out)

    def place(self, torch_name: str) -> tuple[tuple[int, int], ...]:
        """Where torch registers a module: the key to sort torch's names by.

        Torch lists a module before those in it, numbered ones by their numbers and others as
        ``order`` has them. A segment that is not there comes after those that are; all names that
        have such a segment in the same module have the same place, so they stay in the order
        given. Without any ``order`` this holds for all names.

        Args:
          torch_name: torch's name of the module.

        Example:
          >>> import peftjax
          >>> names = peftjax.ModuleNames(order=("layers", "q", "k"))
          >>> sorted(["head", "layers.10.q", "layers.2.k", "layers.2.q"], key=names.place)
          ['layers.2.q', 'layers.2.k', 'layers.10.q', 'head']
        """
        place = []
        for segment in torch_name.split(".") if self.order else ():
            if segment.isdecimal():
                place.append((0, int(segment)))
            elif segment in self.order:
                place.append((1, self.order.index(segment)))
            else:
                place.append((2, 0))
                break
        return tuple(place)

    def _unnamed(self, name: str, index: Index) -> str:
        """Says why a module has no torch name, and what to do."""
        if not index:
            return f"no rule gives {name!r} a torch name; the rules are {self.rules}"
        words = ".".join(f"{{{word}}}" for word in STACKED[: len(index)])
        path = name.split(".")
        usual = (n for n, segment in enumerate(path) if segment in _STACKS)
        head = ".".join(path[: next(usual, 0) + 1])
        example = f'("{head}.{{*rest}}", "{head}.{words}.{{*rest}}")'
        what = f"{len(index)} stack axes, " if len(index) > 1 else ""
        return (
            f"{name!r} is stacked, {what}and torch has a module for each of its layers: say where "
            f"the number goes, as in names=ModuleNames(({example}, ...))"
        )


def _words(pattern: str) -> list[str]:
    """The words in the braces of a pattern, with their stars."""
    words = [match[1] + match[2] for match in _PLACEHOLDER.finditer(pattern)]
    whole = [match[1] for match in map(_SEVERAL.fullmatch, pattern.split(".")) if match]
    if sorted(whole) != sorted(word[1:] for word in words if word.startswith("*")):
        raise ValueError(f"in the pattern {pattern!r} a word with a star is no segment of its own")
    if len(words) != len({word.lstrip("*") for word in words}):
        raise ValueError(f"the pattern {pattern!r} has the same word twice")
    return words


@functools.lru_cache(maxsize=4096)
def _depth(rule: tuple[str, str]) -> int:
    """How many stack axes a module has that a rule is for."""
    return sum(word in STACKED for word in _words(rule[1]))


@functools.lru_cache(maxsize=4096)
def _matcher(pattern: str) -> Callable[[str], re.Match[str] | None]:
    """Matches a name whose every segment ends with a dot."""
    segments = []
    for segment in pattern.split("."):
        if several := _SEVERAL.fullmatch(segment):
            segments.append(rf"(?P<{several[1]}>(?:[^.]+\.)*?)")
            continue
        text, end = "", 0
        for match in _PLACEHOLDER.finditer(segment):
            kind = r"\d+" if match[2] in STACKED else r"[^.]+?"
            text += re.escape(segment[end : match.start()]) + f"(?P<{match[2]}>{kind})"
            end = match.end()
        segments.append(text + re.escape(segment[end:]) + r"\.")
    return re.compile("".join(segments)).fullmatch


def _match(pattern: str, name: str) -> dict[str, str] | None:
    """What the words of a pattern stand for in a name; None if it does not fit."""
    match = _matcher(pattern)(f"{name}.")
    return None if match is None else match.groupdict()


def _fill(pattern: str, words: Mapping[str, str]) -> str:
    """A pattern with its words filled in; those for several segments end with a dot."""
    filled = "".join(
        words[several[1]]
        if (several := _SEVERAL.fullmatch(segment))
        else _PLACEHOLDER.sub(lambda match: words[match[2]], segment) + "."
        for segment in pattern.split(".")
    )
    return filled.removesuffix(".")
