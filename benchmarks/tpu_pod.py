"""A training step of an 8B decoder on a TPU pod, compiled ahead of time on a machine without one.

For each method the whole step (loss, gradients, AdamW) of a Llama-3-8B-shaped linen model is
compiled for a pod's topology, with FSDP x tensor sharding, and what one chip holds, computes and
sends is read off the compiled program. Nothing of the model is ever in memory. It needs
`pip install "jax[tpu]"`, for the compiler alone, and a minute a method.

    python -m benchmarks.tpu_pod --topologies v5e:16x16 v5p:4x4x4 --methods lora hra --json pod.json

The floor of a method is the gradient with respect to one vector that is added to all embeddings:
forward, rematerialised, and backward through every activation, without the gradient of any weight.
X-LoRA's floor has a forward pass more, that of a quantised base has the same quantised base.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

# TPU's compiler asks nobody which machine this is, and several may run side by side.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import optax
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import peftjax
from benchmarks import hlo
from benchmarks.pod_model import SPECS, Decoder, Shape, loss

# Every collective stands in the program once, as what it is: neither cut into the turns of a loop
# around a product nor spread over the fusions it runs beside. That moves when it is sent, not what.
OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    "xla_tpu_enable_async_collective_fusion": False,
}
ALL = "all-linear"
CONFIGS = {
    "lora": peftjax.LoraConfig(r=16, lora_alpha=32, target_modules=ALL),
    "dora": peftjax.LoraConfig(r=16, lora_alpha=32, use_dora=True, target_modules=ALL),
    "ia3": peftjax.IA3Config(target_modules=["k", "v", "down"], feedforward_modules=["down"]),
    "loha": peftjax.LoHaConfig(r=8, alpha=16, target_modules=ALL),
    "adalora": peftjax.AdaLoraConfig(
        init_r=12, target_r=8, total_step=1000, tfinal=100, tinit=100, target_modules=ALL
    ),
    "hra": peftjax.HRAConfig(r=16, target_modules=ALL),
}
EXPERTS = {name: peftjax.LoraConfig(r=8, lora_alpha=16, target_modules=ALL) for name in "abcd"}
KEY = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
OPTIMIZER = optax.adamw(1e-4)


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: a method, the base under it, and the program whose cost is its floor."""

    method: str
    base: str = "bf16"
    floor: str | None = None

    @property
    def name(self) -> str:
        return self.method if self.base == "bf16" else f"{self.method} {self.base}"


CASES = [
    Case("floor"),
    *(Case(method, floor="floor") for method in ("full", *CONFIGS)),
    Case("floor of two passes"),
    Case("xlora", floor="floor of two passes"),
    *(
        case
        for base in ("int8", "nf4")
        for case in (Case("floor", base), Case("lora", base, f"floor {base}"))
    ),
]


@dataclasses.dataclass(frozen=True)
class Pod:
    """A model on a mesh: shapes alone."""

    mesh: Mesh
    apply_fn: Callable[..., Any]
    params: Any
    ids: jax.ShapeDtypeStruct


def pod(topology: str, tensor: int, layers: int, rows: int, length: int) -> Pod:
    """Lays the model out on a topology: each group along "fsdp" gets some rows of the batch."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sizes = (len(devices) // tensor, tensor)
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    mesh = Mesh(placed, ("fsdp", "tensor"))
    model = Decoder(Shape(layers=layers))
    where = NamedSharding(mesh, P("fsdp", None))
    ids = jax.ShapeDtypeStruct((rows * sizes[0], length), jnp.int32, sharding=where)
    with use_abstract_mesh(mesh.abstract_mesh):
        shapes = jax.eval_shape(model.init, KEY, ids)["params"]
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), SPECS)
    return Pod(mesh, peftjax.from_linen(model), _placed(shapes, shardings), ids)


def _placed(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree, with where they lie."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )


def lowered(case: Case, on: Pod) -> tuple[Any, Any, Any]:
    """The step of a case, lowered, and the trees of params it has: the base's and the trained."""
    sites = peftjax.find_sites(on.apply_fn, on.params, on.ids)
    base = on.params
    if case.base != "bf16":
        base = quantized(base, sites, case.base)
    if case.method == "full":
        return full(on), base, base
    if case.method.startswith("floor"):
        return floor(case, on, base), base, None
    adapter, optimizer = adapter_of(case.method, sites, base), OPTIMIZER
    if case.method == "adalora":
        optimizer = peftjax.rank_allocator(optimizer, adapter)
    adapted = peftjax.adapt(on.apply_fn, on_fallback="error")

    def total(params: Any, adapter: Any, ids: Any) -> Any:
        value = loss(adapted(params, adapter, ids), ids)
        return value + peftjax.orthogonality(adapter) if case.method == "adalora" else value

    state = jax.eval_shape(lambda a: peftjax.init_train_state(a, optimizer), adapter)
    shardings = peftjax.adapter_shardings(state, base)
    step: Any = peftjax.make_train_step(total, optimizer, shardings=shardings)
    return step.lower(_placed(state, shardings), base, on.ids), base, adapter.params


def adapter_of(method: str, sites: peftjax.Sites, base: Any) -> Any:
    """The shapes of an adapter."""
    if method != "xlora":
        config = CONFIGS[method]
        return jax.eval_shape(lambda key, p: peftjax.init_adapter(key, config, sites, p), KEY, base)

    def mixture(key: Any) -> Any:
        experts = {name: peftjax.init_adapter(key, own, sites) for name, own in EXPERTS.items()}
        return peftjax.init_xlora(key, peftjax.XLoraConfig(), experts, sites)

    return jax.eval_shape(mixture, KEY)


def quantized(params: Any, sites: peftjax.Sites, qtype: Any) -> Any:
    """The shapes of a quantised base; its integers and scales are split as the weights are."""
    shapes = jax.eval_shape(lambda p: peftjax.quantize_base(p, sites, qtype), params)

    def place(weight: Any, leaf: Any) -> Any:
        return jax.tree.map(functools.partial(_fitting, weight.sharding), leaf)

    return jax.tree.map(place, params, shapes)


def _fitting(where: NamedSharding, x: Any) -> jax.ShapeDtypeStruct:
    """A shape that is split as its weight is, where its sizes are divisible."""
    mesh, axes = where.mesh.shape, [*where.spec, *[None] * (x.ndim - len(where.spec))]
    sizes = zip(axes, x.shape, strict=True)
    spec = P(*[axis if axis and n % mesh[axis] == 0 else None for axis, n in sizes])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(where.mesh, spec))


def full(on: Pod) -> Any:
    """Full fine-tuning with AdamW; gradients and moments lie as the weights do."""
    shardings = jax.tree.map(lambda x: x.sharding, on.params)
    moments = jax.eval_shape(OPTIMIZER.init, on.params)
    whole = NamedSharding(on.mesh, P())
    of_state = optax.tree.map_params(
        OPTIMIZER, lambda _, where: where, moments, shardings, transform_non_params=lambda _: whole
    )

    def step(params: Any, state: Any, ids: Any) -> Any:
        value, grads = jax.value_and_grad(lambda p: loss(on.apply_fn(p, ids), ids))(params)
        grads = jax.lax.with_sharding_constraint(grads, shardings)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=(shardings, of_state, whole))
    return compiled.lower(on.params, _placed(moments, of_state), on.ids)


def floor(case: Case, on: Pod, base: Any) -> Any:
    """The least that training anything before the first layer could cost, with nothing adapted."""
    apply_fn = on.apply_fn
    if case.base != "bf16":
        adapted = peftjax.adapt(apply_fn, on_fallback="error")
        apply_fn = lambda params, *args: adapted(params, None, *args)  # noqa: E731

    def step(shift: Any, params: Any, ids: Any) -> Any:
        if case.method == "floor of two passes":
            hidden = on.apply_fn(params, ids, hidden=True)
            shift = shift + jnp.mean(hidden.astype(jnp.float32)).astype(shift.dtype)
        return jax.value_and_grad(lambda s: loss(apply_fn(params, ids, s), ids))(shift)

    width = on.params["norm"]["scale"].shape
    whole = NamedSharding(on.mesh, P())
    shift = jax.ShapeDtypeStruct(width, jnp.bfloat16, sharding=whole)
    return jax.jit(step).lower(shift, base, on.ids)


def measured(case: Case, on: Pod, keep: pathlib.Path | None) -> dict:
    """Compiles a case; what one chip holds, computes and sends."""
    start = time.perf_counter()
    with use_abstract_mesh(on.mesh.abstract_mesh):
        program, base, trained = lowered(case, on)
        compiled = program.compile(compiler_options=OPTIONS)
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{case.name.replace(' ', '_')}.hlo").write_text(text)
    cost = hlo.cost(text)
    kinds: dict[str, dict[str, int]] = {}
    for one in cost.collectives:
        own = kinds.setdefault(one.kind, {"count": 0, "bytes": 0})
        own["count"] += one.times
        own["bytes"] += one.times * one.bytes
    state = memory.argument_size_in_bytes
    peak = state + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "floor": case.floor,
        "trained_params": _count(trained),
        "base_bytes": _bytes_a_chip(base),
        "argument_bytes": state,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak + memory.temp_size_in_bytes,
        "flops": cost.flops,
        "bytes_accessed": cost.bytes,
        "collective_bytes": sum(own["bytes"] for own in kinds.values()),
        "collectives": dict(sorted(kinds.items())),
        "seconds_to_compile": round(seconds, 1),
    }


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _bytes_a_chip(tree: Any) -> int:
    """Bytes of one device's shard of every array; integers of four bits are half a byte."""
    bits = 0
    for x in jax.tree.leaves(tree):
        size = 1
        for n in x.sharding.shard_shape(x.shape):
            size *= n
        four = jnp.issubdtype(x.dtype, jnp.integer) and "4" in x.dtype.name.replace("64", "")
        bits += size * (4 if four else 8 * x.dtype.itemsize)
    return bits // 8


RATIOS = {"flops": "FLOPs", "peak_bytes": "peak", "collective_bytes": "collectives"}


def ratios(rows: dict[str, dict], name: str) -> dict[str, float] | None:
    """What a case has over its floor, where that was compiled as well."""
    floor = rows.get(rows[name]["floor"] or "")
    return {key: rows[name][key] / floor[key] for key in RATIOS} if floor else None


def table(rows: dict[str, dict], title: str) -> Table:
    """The figures of one topology."""
    heads = ["params", "argument GB", "temp GB", "peak GB", "TFLOP", "bytes TB", "collectives GB"]
    shown = Table("program", *heads, *(f"{name} / floor" for name in RATIOS.values()), title=title)
    for name, row in rows.items():
        own = ratios(rows, name)
        shown.add_row(
            name,
            f"{row['trained_params'] / 1e6:,.1f}M",
            *(f"{row[key] / 1e9:.3f}" for key in ("argument_bytes", "temp_bytes", "peak_bytes")),
            f"{row['flops'] / 1e12:.2f}",
            f"{row['bytes_accessed'] / 1e12:.3f}",
            f"{row['collective_bytes'] / 1e9:.2f}",
            *([f"{own[key]:.4f}" for key in RATIOS] if own else ["", "", ""]),
        )
    return shown


def markdown(result: dict) -> str:
    """The tables of a result, as the README has them."""
    lines = []
    for topology, rows in result["topologies"].items():
        shown = table(rows, topology)
        heads = [str(column.header) for column in shown.columns]
        cells = zip(*(list(column.cells) for column in shown.columns), strict=True)
        lines += [f"\n`{topology}`, one chip:\n", *_markdown(heads, cells)]
        kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row["collectives"]))
        none = {"count": 0, "bytes": 0}
        sent = [
            [
                name,
                *(
                    f"{own['count']:,} x, {own['bytes'] / 1e9:.3f}"
                    for own in (row["collectives"].get(kind, none) for kind in kinds)
                ),
            ]
            for name, row in rows.items()
        ]
        lines += ["\nHow often each kind runs, and the GB it sends:\n"]
        lines += _markdown(["program", *kinds], sent)
    return "\n".join(lines)


def _markdown(heads, rows) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return [*lines, *(f"| {' | '.join(map(str, each))} |" for each in rows)]


def main() -> None:
    """Compiles what was asked for, and writes after each program what is known by then."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topologies", nargs="+", default=["v5e:16x16"], metavar="NAME:SHAPE")
    parser.add_argument(
        "--methods", nargs="+", default=names, choices=names, metavar="NAME",
        help=f"which programs, floors among them: {', '.join(map(repr, names))} (default: all)",
    )  # fmt: skip
    parser.add_argument("--tensor", type=int, default=8, help='chips along "tensor" (%(default)s)')
    parser.add_argument("--layers", type=int, default=32, help="layers (%(default)s)")
    parser.add_argument(
        "--rows", type=int, default=2, help='rows of the batch for each place along "fsdp" (2)'
    )
    parser.add_argument("--length", type=int, default=4096, help="tokens a row (%(default)s)")
    parser.add_argument(
        "--json", type=pathlib.Path, help="where to write all figures, beside those there already"
    )
    parser.add_argument("--hlo", type=pathlib.Path, help="a directory for the programs' HLO")
    options = parser.parse_args()

    sizes = {name: getattr(options, name) for name in ("tensor", "layers", "rows", "length")}
    versions = {name: metadata.version(name) for name in ("jax", "libtpu", "flax")}
    result = _begun(options.json, {**versions, **sizes})
    console = Console()
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    for topology in options.topologies:
        on = pod(topology, **sizes)
        rows = result["topologies"].get(topology, {})
        with Progress(*columns, console=console) as progress:
            for case in CASES:
                if case.name not in options.methods:
                    continue
                task = progress.add_task(f"{topology} {case.name}")
                keep = options.hlo / topology.replace(":", "_") if options.hlo else None
                rows[case.name] = measured(case, on, keep)
                rows = {name: rows[name] for name in names if name in rows}
                result["topologies"][topology] = rows
                progress.stop_task(task)
                if options.json:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps(result, indent=1) + "\n")
        console.print(table(rows, topology))
    print(markdown(result))


def _begun(path: pathlib.Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The result to go on with: that of a file, if its settings were the same."""
    before = json.loads(path.read_text()) if path and path.exists() else {}
    same = all(before.get(name) == value for name, value in settings.items())
    return before if before and same else {**settings, "topologies": {}}


if __name__ == "__main__":
    main()
