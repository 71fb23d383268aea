"""Where the time of a step goes: the frozen floor's beside an adapter's, by what is computed.

    python -m benchmarks.profiled [--model bert] [--targets "all linear"] [--method lora]

Times are those of XLA's own instructions, as its profiler sees them, on an otherwise idle machine.
"""

import collections
import math
import re
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import against_torch, hlo, memory, steps, twins
from benchmarks.tables import markdown

Method = Literal["lora", "ia3", "adalora", "hra", "loha", "dora", "xlora"]
KINDS = ("products with weights", "thin products", "products of activations", "all the rest")
THIN = 64  # at most: of the rank, and of anything else that is no axis of a model


def profiled(
    model: Annotated[Literal["bert", "llama"], tyro.conf.arg(help="whose shape")] = "bert",
    targets: Annotated[str, tyro.conf.arg(help="the modules, as in the tables")] = "all linear",
    method: Annotated[Method, tyro.conf.arg(help="the method")] = "lora",
    repeats: Annotated[int, tyro.conf.arg(help="how many steps are averaged")] = 10,
    keep_freed: Annotated[bool, tyro.conf.arg(help="as benchmarks/memory.py has it")] = True,
) -> int:
    """Runs the floor and an adapter's step under the profiler, and prints where time went."""
    if keep_freed:
        memory.keep_freed()
    twin = {"bert": twins.bert, "llama": twins.llama}[model](False)
    adapter = against_torch.adapter_of(twin, method, targets)
    both = {"floor": steps.floor(twin), method: steps.adapted(twin, adapter)}
    spent = {name: by_kind(step.text(), seconds(step.run, repeats)) for name, step in both.items()}
    lines = [
        [kind, *(f"{1e3 * own[kind]:.0f}" for own in spent.values()), _more(spent, kind)]
        for kind in KINDS
    ]
    temporary = [f"{step.temporary / 1e6:.0f}" for step in both.values()]
    lines.append(["MB of temporary memory", *temporary, ""])
    used = [usage(step.run, repeats) for step in both.values()]
    lines += [[what, *(f"{own[what]:,.0f}" for own in used), ""] for what in used[0]]
    heads = [f"{twin.name}, {targets}", *(f"{name}, ms" for name in both), "more"]
    Console().print(Markdown(markdown(heads, lines)))
    return 0


def _more(spent: dict[str, dict[str, float]], kind: str) -> str:
    """How much more an adapter takes for it, of the floor's whole time."""
    floor, own = spent.values()
    return f"{100 * (own[kind] - floor[kind]) / sum(floor.values()):+.1f}%"


def seconds(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Seconds of each instruction in one step."""
    run()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(repeats):
                run()
        (path,) = Path(directory).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    spent: dict[str, float] = collections.Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name is not None:
                    spent[str(name)] += event.duration_ns / 1e9 / repeats
    return spent


def usage(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """What the system does for one step, on all cores."""
    run()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(repeats):
        run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "pages touched for the first time": (after.ru_minflt - before.ru_minflt) / repeats,
        "ms of all cores in the system": 1e3 * (after.ru_stime - before.ru_stime) / repeats,
        "ms of all cores in the program": 1e3 * (after.ru_utime - before.ru_utime) / repeats,
    }


def by_kind(text: str, spent: dict[str, float]) -> dict[str, float]:
    """Seconds by what is computed, of the instructions of a program."""
    computations, _ = hlo.parse(text)
    kinds = {
        one.name: kind_of(computations, one, own) for own in computations.values() for one in own
    }
    total = dict.fromkeys(KINDS, 0.0)
    for name, taken in spent.items():
        total[kinds.get(name, KINDS[-1])] += taken
    return total


def kind_of(computations: Any, one: hlo.Instruction, around: list[hlo.Instruction]) -> str:
    """What an instruction computes: the product in it, if there is one."""
    inner = [each for name in one.named("calls") for each in computations.get(name, ())]
    for product, own in [(one, around), *((each, inner) for each in inner)]:
        if product.opcode == "dot":
            return _of_product(product, own)
    return KINDS[-1]


def _of_product(product: hlo.Instruction, own: list[hlo.Instruction]) -> str:
    if axes_of(product.text, "lhs_batch_dims"):
        return KINDS[2]
    shapes = {each.name: each.arrays[0][1] for each in own if each.arrays}
    left, ((_, out), *_) = shapes[product.operands[0]], product.arrays
    summed = math.prod(left[axis] for axis in axes_of(product.text, "lhs_contracting_dims"))
    kept = math.prod(left) // summed
    return KINDS[1] if min(summed, kept, math.prod(out) // kept) <= THIN else KINDS[0]


def axes_of(text: str, name: str) -> list[int]:
    """The axes that an attribute of a product names."""
    found = re.search(rf"{name}={{([\d,]*)}}", text)
    return [int(axis) for axis in found[1].split(",") if axis] if found else []


if __name__ == "__main__":
    sys.exit(tyro.cli(profiled, description=__doc__))
