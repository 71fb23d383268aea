"""What a compiled program does, read off its HLO text: loop bodies count once for every turn.

XLA's own cost analysis takes the body of a loop once, and says nothing of collectives.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16}
_BITS |= {"f32": 32, "s32": 32, "u32": 32, "f64": 64, "s64": 64, "u64": 64, "c64": 64, "c128": 128}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
_NESTED = {"while", "conditional", "call"}


Arrays = tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      name: its name.
      opcode: what it does.
      arrays: dtype and shape of each array of its result.
      near: which of them lie in the memory beside the cores, not in the chip's main memory.
      operands: names of its operands.
      text: what follows them.
      is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: Arrays
    near: tuple[bool, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """Bytes of its result."""
        return _size(self.arrays)

    @property
    def far_bytes(self) -> int:
        """Bytes of its result in the chip's main memory."""
        pairs = zip(self.arrays, self.near, strict=True)
        return _size(tuple(array for array, near in pairs if not near))

    def named(self, attribute: str) -> list[str]:
        """The computations that an attribute names."""
        found = re.search(rf"\b{attribute}=(?:%([\w.-]+)|{{([^}}]*)}})", self.text)
        if not found:
            return []
        return [found[1]] if found[1] else re.findall(r"%([\w.-]+)", found[2])

    @property
    def origin(self) -> str:
        """The scope in the model that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: what it does.
      arrays: dtype and shape of each array of its result.
      bytes: of its result or of its operands, the larger, on one device, each time.
      times: how often it runs.
      groups: which devices talk to each other, as HLO writes it.
      origin: the scope in the model that it comes from.
    """

    kind: str
    arrays: Arrays
    bytes: int
    times: int
    groups: str
    origin: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in one run of a program.

    Attributes:
      flops: of matrix products and convolutions.
      bytes: read from and written to its main memory by instructions outside fusions, and by
        fusions as a whole.
      collectives: all of them.
    """

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]


Computations = dict[str, list[Instruction]]


def _size(arrays: Arrays) -> int:
    return sum(_BITS.get(dtype, 8) * math.prod(shape) for dtype, shape in arrays) // 8


def cost(text: str) -> Cost:
    """Reads the cost of a program off its HLO text, as ``compiled.as_text()`` gives it."""
    computations, entry = parse(text)
    flops, moved = 0.0, 0.0
    found: dict[tuple, Collective] = {}
    inside = functools.cache(lambda name: _flops(computations, name))
    for name, times in _times(computations, entry, inside).items():
        for one in computations[name]:
            if one.opcode in _NESTED:
                continue
            flops += times * (_own_flops(one, computations[name]) + sum(map(inside, _fused(one))))
            moved += times * _bytes(computations, one, computations[name])
        for one, sizes in _with_fused(computations, name):
            kind = one.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            # One collective may be spread over several fusions, to run beside what they compute.
            channel = re.search(r"channel_id=(\d+)", one.text)
            key = (name, kind, channel[1] if channel else one.name)
            groups = re.search(r"(?:replica_groups|source_target_pairs)=(.*?), \w+=", one.text)
            arrays = _received(one, kind)
            size = max(_size(arrays), sum(sizes.get(name, 0) for name in one.operands))
            made = Collective(kind, arrays, size, times, groups[1] if groups else "", one.origin)
            if key not in found or found[key].bytes < made.bytes:
                found[key] = made
    return Cost(flops, moved, tuple(found.values()))


def parse(text: str) -> tuple[Computations, str]:
    """The computations of a program by name, and the name of the first."""
    computations: Computations = {}
    entry, current = "", ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{", line)
        if head:
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif current and (one := _instruction(line)):
            computations[current].append(one)
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*)", line)
    if not found:
        return None
    rest = re.sub(r"/\*.*?\*/", "", found[3])
    result, rest = _result(rest)
    opcode, _, rest = rest.strip().partition("(")
    operands, text = _closed(rest)
    each = [
        (dtype, tuple(int(n) for n in shape.split(",") if n), "S(1)" in layout)
        for dtype, shape, layout in re.findall(r"\b(\w+)\[([\d,]*)\]({[^}]*})?", result)
        if dtype in _BITS or dtype.startswith("f8") or dtype.startswith("f4")
    ]
    arrays, near = tuple((d, s) for d, s, _ in each), tuple(near for *_, near in each)
    names = tuple(re.findall(r"%([\w.-]+)", operands))
    own = text if opcode != "constant" else f"value={operands}{text}"
    own = own if opcode != "parameter" else f"number={operands}{text}"
    return Instruction(found[2], opcode, arrays, near, names, own, bool(found[1]))


def _result(text: str) -> tuple[str, str]:
    """The type at the start of a line, which may be a tuple, and the rest."""
    if not text.startswith("("):
        result, _, rest = text.partition(" ")
        return result, rest
    inner, rest = _closed(text[1:])
    return inner, rest


def _closed(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes, and what behind it."""
    depth = 1
    for i, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            return text[:i], text[i + 1 :]
    return text, ""


def _times(computations: Computations, entry: str, flops: Callable[[str], float]) -> dict[str, int]:
    """How often each computation runs that is no fusion; of branches the dearest alone."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for one in computations[name]:
            if one.opcode == "while":
                turns = _turns(computations, one)
                visit(one.named("body")[0], count * turns)
            elif one.opcode == "conditional":
                branches = one.named("branch_computations") or [
                    *one.named("true_computation"),
                    *one.named("false_computation"),
                ]
                visit(max(branches, key=flops), count)
            elif one.opcode == "call":
                visit(one.named("to_apply")[0], count)

    visit(entry, 1)
    return times


def _turns(computations: Computations, loop: Instruction) -> int:
    """How often a loop runs that counts up from zero to a constant."""
    known = re.search(r"known_trip_count[^0-9]*(\d+)", loop.text)
    if known:
        return int(known[1])
    condition = computations[loop.named("condition")[0]]
    constants = [
        int(value[1])
        for one in condition
        if one.opcode == "constant" and (value := re.match(r"value=(\d+)(?!\S*\.)", one.text))
    ]
    if len(constants) != 1:
        raise ValueError(f"{loop.name}: how often it runs cannot be read off its condition")
    return constants[0]


def _fused(one: Instruction) -> list[str]:
    """The computations inside a fusion or an asynchronous call."""
    if one.opcode in ("fusion", "async-start"):
        return one.named("calls")
    return []


def _with_fused(
    computations: Computations, name: str
) -> Iterator[tuple[Instruction, dict[str, int]]]:
    """The instructions of a computation and of its fusions, each with the sizes around it."""
    sizes = {each.name: each.bytes for each in computations[name]}
    for one in computations[name]:
        yield one, sizes
        for inner in _fused(one):
            yield from _with_fused(computations, inner)


def _received(one: Instruction, kind: str) -> Arrays:
    """The arrays a collective gives; a start gives its operands as well, and counters."""
    arrays = tuple((d, s) for d, s in one.arrays if not (d in ("u32", "s32") and not s))
    if not one.opcode.endswith("-start") or kind == "all-reduce":
        return arrays
    return arrays[len(arrays) // 2 :]


def _flops(computations: Computations, name: str) -> float:
    """FLOPs of the products in a computation and in all that it calls, each once."""
    own = computations[name]
    total = sum(_own_flops(one, own) for one in own)
    for one in own:
        for inner in _fused(one):
            total += _flops(computations, inner)
        if one.opcode == "while":
            turns = _turns(computations, one)
            total += turns * _flops(computations, one.named("body")[0])
        elif one.opcode == "call":
            total += _flops(computations, one.named("to_apply")[0])
    return total


def _own_flops(one: Instruction, computation: list[Instruction]) -> float:
    if one.opcode not in ("dot", "convolution"):
        return 0.0
    shapes = {each.name: each.arrays[0][1] for each in computation if each.arrays}
    (_, out), *_ = one.arrays
    if one.opcode == "dot":
        left = shapes[one.operands[0]]
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.text)
        summed = [int(n) for n in found[1].split(",") if n] if found else []
        return 2.0 * math.prod(out) * math.prod(left[axis] for axis in summed)
    return _convolution(one, shapes[one.operands[0]], shapes[one.operands[1]], out)


def _convolution(
    one: Instruction, image: tuple[int, ...], kernel: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """FLOPs of a convolution, without those on padding and on holes."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.text)
    assert labels
    of_image, of_kernel, of_out = labels.groups()
    spatial = sorted(set(of_out) - {"b", "f"})
    window = re.search(r"window=\{([^}]*)\}", one.text)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def numbers(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    total = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * kernel[of_kernel.index("i")]
    settings = zip(
        spatial,
        numbers("pad", "0_0"),
        numbers("stride", "1"),
        numbers("lhs_dilate", "1"),
        numbers("rhs_dilate", "1"),
        strict=True,
    )
    for axis, pad, stride, holes, apart in settings:
        size = image[of_image.index(axis)]
        places = np.arange(out[of_out.index(axis)]) * int(stride) - int(pad.split("_")[0])
        taps = np.arange(kernel[of_kernel.index(axis)]) * int(apart)
        met = places[:, None] + taps[None]
        inside = (met >= 0) & (met % int(holes) == 0) & (met // int(holes) < size)
        total *= int(inside.sum())
    groups = re.search(r"batch_group_count=(\d+)", one.text)
    return total / (int(groups[1]) if groups else 1)


def _bytes(computations: Computations, one: Instruction, computation: list[Instruction]) -> float:
    """What an instruction reads and writes: of what it slices, the slice alone."""
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return 0.0
    if any(f'"{name}"' in one.text for name in _FREE_CALLS):
        return 0.0
    by_name = {each.name: each for each in computation}
    if one.opcode in ("copy-start", "slice-start"):
        # The result has the operand in it as well, in the one first, in the other last.
        place = 0 if one.opcode == "copy-start" else 1
        size = _size(one.arrays[place : place + 1])
        source = by_name.get(one.operands[0])
        return size * (bool(source and source.far_bytes) + (not one.near[place]))
    read = (_read(computations, one, i, by_name) for i in range(len(one.operands)))
    return sum(read) + _written(computations, one, by_name)


def _read(
    computations: Computations, one: Instruction, number: int, by_name: dict[str, Instruction]
) -> float:
    """What an instruction reads of one of its operands."""
    if one.opcode in ("dynamic-slice", "slice", "gather") and number == 0:
        return one.bytes
    if one.opcode == "dynamic-update-slice" and number == 0:
        return 0.0
    made = by_name.get(one.operands[number])
    whole = made.far_bytes if made else 0
    if one.opcode != "fusion":
        return whole
    inner = computations[one.named("calls")[0]]
    names = {each.name: each for each in inner}
    start = next(
        each
        for each in inner
        if each.opcode == "parameter" and re.match(rf"number={number}\b", each.text)
    )
    return min(whole, _read_in(computations, inner, start.name, names))


def _read_in(
    computations: Computations, inner: list[Instruction], name: str, names: dict[str, Instruction]
) -> float:
    """What a fusion reads of an array, through bitcasts and fusions inside it."""
    total = 0.0
    for each in inner:
        for number, operand in enumerate(each.operands):
            if operand == name and each.opcode == "bitcast":
                total += _read_in(computations, inner, each.name, names)
            elif operand == name:
                total += _read(computations, each, number, names)
    return total


def _written(
    computations: Computations, one: Instruction, by_name: dict[str, Instruction]
) -> float:
    """What an instruction writes; of an array updated in place, the update."""
    if one.opcode == "dynamic-update-slice":
        update = by_name.get(one.operands[1])
        return update.far_bytes if update else 0
    if one.opcode != "fusion":
        return one.far_bytes
    inner = computations[one.named("calls")[0]]
    names = {each.name: each for each in inner}
    root = next(each for each in inner if each.is_root)
    roots = [names[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for each in roots:
        while each.opcode == "bitcast" and each.operands[0] in names:
            each = names[each.operands[0]]
        total += _written(computations, each, names)
    return min(one.far_bytes, total)
