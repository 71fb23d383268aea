"""A small decoder on a mesh, and the collectives of a compiled program."""

import collections
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import normal

# Ranks are 3, 4, 6 and 9: no size of the model and of its shards is, so that the shape of an array
# that is sent says what it is.
LAYERS, WIDTH, HEADS, SIZE, FEED, WORDS = 2, 40, 8, 5, 64, 56
PARAMS = {
    "embed": normal(WORDS, WIDTH),
    "layers": {
        "down": normal(LAYERS, FEED, WIDTH, seed=4),
        "o": normal(LAYERS, HEADS, SIZE, WIDTH, seed=2),
        "q": normal(LAYERS, WIDTH, HEADS, SIZE, seed=1),
        "up": normal(LAYERS, WIDTH, FEED, seed=3),
    },
    "head": normal(WIDTH, WORDS, seed=5),
    "shift": normal(WIDTH, seed=6),
}
# Tensor parallel along "model"; FSDP besides splits the other axis of every weight along "data".
FSDP = {
    "embed": P("model", "data"),
    "layers": {
        "down": P(None, "model", "data"),
        "o": P(None, "model", None, "data"),
        "q": P(None, "data", "model", None),
        "up": P(None, "data", "model"),
    },
    "head": P("data", "model"),
    "shift": P(),
}


def without(spec, axis):
    return P(*[None if part == axis else part for part in spec])


TENSOR = jax.tree.map(lambda spec: without(spec, "data"), FSDP)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, WORDS, (16, 7)), jnp.int32)


def decoder(kind):
    """Attention and a feedforward block, scanned and rematerialised.

    Under Explicit axes it says itself where weights are gathered and where products lie.
    """
    explicit = kind is AxisType.Explicit
    rows = P("data", None, None)
    placed = {"out_sharding": rows} if explicit else {}

    def whole(weight, spec):
        return jax.reshard(weight, without(spec, "data")) if explicit else weight

    def constrained(x):
        return x if explicit or kind is None else lax.with_sharding_constraint(x, rows)

    def apply_fn(params, ids):
        table = whole(params["embed"], FSDP["embed"])
        x = table.at[ids].get(**placed) if explicit else table[ids]
        x = constrained(x + params["shift"][None, None])

        def layer(x, own):
            own = {
                name: whole(weight, P(*FSDP["layers"][name][1:])) for name, weight in own.items()
            }
            h = jnp.tanh(jnp.einsum("bsd,dhk->bshk", x, own["q"]))
            scores = jax.nn.softmax(jnp.einsum("bshk,bthk->bhst", h, h))
            h = jnp.einsum("bhst,bthk->bshk", scores, h)
            x = constrained(x + jnp.einsum("bshk,hkd->bsd", h, own["o"], **placed))
            h = jnp.tanh(jnp.einsum("bsd,df->bsf", x, own["up"]))
            return constrained(x + jnp.einsum("bsf,fd->bsd", h, own["down"], **placed)), None

        x, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
        return jnp.tanh(x) @ whole(params["head"], FSDP["head"])

    return apply_fn


def placed_on(mesh, specs):
    params = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), PARAMS, specs)
    return params, jax.device_put(IDS, NamedSharding(mesh, P("data", None)))


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program: what it is, over which axes of the mesh, and its result."""

    op: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    bytes: int
    times: int
    name: str

    def __str__(self):
        return f"{self.times} x {self.op} {self.axes} {self.shape} {self.name}"


_OPS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "f64": 8}


def collectives(text, mesh):
    """Every collective of a compiled program.

    Those of a loop count once for each turn, and of branches those of the one that sends most.
    """
    bodies, name = {}, None
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = start[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def within(name, times):
        found = []
        for line in bodies[name]:
            found += _sent(line, times, mesh)
            if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                each = [within(branch.strip(" %"), times) for branch in branches[1].split(",")]
                found += max(each, key=lambda sent: sum(one.bytes * one.times for one in sent))
            for key, inner in re.findall(r"(body|to_apply|calls)=%?([\w.\-]+)", line):
                trips = re.search(r'known_trip_count"?:\{"?n"?:"(\d+)"', line)
                assert trips or key != "body", f"how often does this loop turn? {line}"
                found += within(inner, times * (int(trips[1]) if key == "body" else 1))
        return found

    return within(re.search(r"ENTRY %?([\w.\-]+)", text)[1], 1)


def _sent(line, times, mesh):
    """The collectives of one line: several arrays may go in one."""
    op = re.search(rf" ({_OPS})(?:-start)?\(", line)
    if op is None:
        return []
    scope = re.search(r'op_name="([^"]*)"', line)
    axes, name = _axes(line, mesh), scope[1] if scope else ""
    found = []
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", line[: op.start()].partition("=")[2]):
        shape = tuple(int(n) for n in dims.split(",") if n)
        size = math.prod(shape) * _BYTES[dtype]
        found.append(Collective(op[1], axes, shape, size, times, name))
    return found


def _axes(line, mesh):
    """The axes of the mesh along which the devices of one group differ."""
    places = np.empty(mesh.devices.shape, object)
    for index in np.ndindex(places.shape):
        places[index] = index
    where = dict(enumerate(places.ravel()))
    axes = {
        axis
        for group in _groups(line)
        for one in group
        for axis, (a, b) in enumerate(zip(where[group[0]], where[one], strict=True))
        if a != b
    }
    return tuple(mesh.axis_names[axis] for axis in sorted(axes))


def _groups(line):
    """The devices that take part together, in each of the ways that programs spell them."""
    if pairs := re.search(r"source_target_pairs=\{([\d,{}]*)\}", line):
        return [_numbers(each) for each in re.findall(r"\{([\d,]+)\}", pairs[1])]
    text = line.partition("replica_groups=")[2]
    if listed := re.match(r"\{(\{[\d,{}]*\})\}", text):
        return [_numbers(each) for each in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    found = re.match(
        r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text
    )
    assert found, line
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
    ids = _iota(found[2] or str(math.prod(sizes.values())), found[3]).reshape(*sizes.values())
    over = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
    last = np.moveaxis(ids, over, range(-len(over), 0))
    return last.reshape(-1, math.prod(last.shape[-len(over) :])).tolist()


def _numbers(text):
    return [int(n) for n in text.split(",")]


def _iota(dims, order):
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids if order is None else ids.transpose(_numbers(order))


def counted(found):
    """Collectives of one kind, axes and shape together, with how often they run."""
    total = collections.Counter()
    for each in found:
        total[each.op, each.axes, each.shape] += each.times
    return total
