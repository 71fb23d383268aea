"""A training step on a mesh: as on one device, and what it sends that the frozen model does not."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType
from models import redraw
from pod import (
    FEED,
    FSDP,
    IDS,
    LAYERS,
    PARAMS,
    TENSOR,
    WIDTH,
    collectives,
    counted,
    decoder,
    placed_on,
)

from peftjax import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    XLoraConfig,
    adapt,
    adapter_shardings,
    find_sites,
    init_adapter,
    init_train_state,
    init_xlora,
    make_train_step,
    rank_allocator,
)

TARGETS = ["q", "o", "up", "down", "head"]
KEY = jax.random.key(0)
CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS),
    "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=TARGETS),
    "loha": LoHaConfig(r=2, alpha=5, target_modules=TARGETS),
    "loha_fused": LoHaConfig(r=9, alpha=5, target_modules=TARGETS),
    "hra": HRAConfig(r=6, target_modules=TARGETS),
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=["down", "o"]),
    "adalora": AdaLoraConfig(init_r=3, target_r=1, total_step=4, target_modules=TARGETS),
}
METHODS = [*CONFIGS, "xlora"]
SPECS = {"fsdp": FSDP, "tensor": TENSOR}


@functools.cache
def sites():
    return find_sites(decoder(None), PARAMS, IDS)


def made(method):
    if method != "xlora":
        adapter = init_adapter(KEY, CONFIGS[method], sites(), PARAMS)
        return adapter.replace(params=redraw(adapter.params))
    experts = {
        name: init_adapter(KEY, CONFIGS["lora"], sites()).replace(params=own)
        for name in "ab"
        for own in [redraw(init_adapter(KEY, CONFIGS["lora"], sites()).params, seed=ord(name))]
    }
    config = XLoraConfig(layerwise_scalings=True, use_trainable_adapters=True, xlora_dropout_p=0.0)
    return init_xlora(KEY, config, experts, sites())


def optimizer_of(method, adapter):
    sgd = optax.sgd(0.1)
    return rank_allocator(sgd, adapter) if method == "adalora" else sgd


def mean(logits):
    return jnp.sin(3 * logits).mean()


def stepper(method, kind):
    adapter = made(method)
    optimizer = optimizer_of(method, adapter)
    adapted = adapt(decoder(kind), on_fallback="error")

    def loss(params, adapter, ids):
        return mean(adapted(params, adapter, ids))

    def step(**where):
        return make_train_step(loss, optimizer, **where)

    return init_train_state(adapter, optimizer), step


@functools.cache
def alone(method):
    """The loss and the adapter after one step on a single device."""
    state, step = stepper(method, None)
    state, metrics = step()(state, PARAMS, IDS)
    return jax.device_get((metrics["loss"], state.adapter.params))


@functools.cache
def frozen(shape, kind, layout):
    """What the frozen model sends, forwards, and with the gradients of what it starts from."""
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))
    params, ids = placed_on(mesh, SPECS[layout])
    model = decoder(kind)

    def loss(shift, params, ids):
        return mean(model({**params, "shift": shift}, ids))

    with jax.set_mesh(mesh):
        once, both = (
            jax.jit(function).lower(params["shift"], params, ids).compile().as_text()
            for function in (loss, jax.value_and_grad(loss))
        )
    return counted(collectives(once, mesh)), counted(collectives(both, mesh))


def on_mesh(method, shape, kind, layout):
    """The state before a step and after it, its metrics, and all that it sent."""
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))
    params, ids = placed_on(mesh, SPECS[layout])
    with jax.set_mesh(mesh):
        state, step = stepper(method, kind)
        shardings = adapter_shardings(state, params)
        state = jax.device_put(state, shardings)
        sizes = jax.tree.map(lambda x: x.addressable_shards[0].data.nbytes, state.adapter)
        compiled = step(shardings=shardings).lower(state, params, ids).compile()
        state, metrics = compiled(state, params, ids)
    return sizes, state, metrics, collectives(compiled.as_text(), mesh)


def small(shape):
    """Whether an array has a rank or the classifier's scalings, or one side of a weight alone."""
    scalings = 2 * (LAYERS * 4 + 1)
    return bool({3, 4, 6, 9, scalings}.intersection(shape)) or math.prod(shape) <= LAYERS * FEED


def sides(layout, shape):
    """How many rows in and out each weight has on a device, and how many weights are stacked."""
    split = dict(zip(("data", "model"), shape, strict=True))
    specs = leaf_specs(layout)
    for site in sites().values():
        if site.path.rpartition(".")[2] not in TARGETS:
            continue
        spec = (*specs[site.path], *[None] * len(site.shape))
        ins, outs = (
            math.prod(site.shape[axis] // split.get(spec[axis], 1) for axis in axes)
            for axes in (site.in_axes, site.out_axes)
        )
        yield ins, outs, math.prod(site.stack_shape)


def leaf_specs(layout):
    flat = jax.tree_util.tree_flatten_with_path(SPECS[layout])[0]
    return {".".join(key.key for key in keys): spec for keys, spec in flat}


def reduced(method, sizes, layout, shape):
    """Bytes of the sums over the batch that gradients are made of.

    Those of an adapter's arrays, where these are the factors of its change. Where factors are
    computed from arrays, those of the factors; of a change that is built, those of the weight.
    """
    rows = list(sides(layout, shape))
    match method:
        case "hra":
            return 4 * sum(6 * (ins + outs) * stack for ins, outs, stack in rows)
        case "loha":
            return 4 * sum(2**2 * (ins + outs) * stack for ins, outs, stack in rows)
        case "loha_fused":
            return 4 * sum(ins * outs * stack for ins, outs, stack in rows)
        case "adalora":
            own = sizes.params.values()
            return sum(each["lora_A"] + each["lora_B"] for each in own)
    return sum(jax.tree.leaves(sizes.params))


A, E = AxisType.Auto, AxisType.Explicit
EVERY = [
    (method, shape, kind, layout)
    for layout in SPECS
    for method in METHODS
    for shape in ((8, 1), (2, 4), (1, 8))
    for kind in (A, E)
]
# Each method, and each mesh at least twice; EVERY takes four minutes.
SOME = [
    ("lora", (2, 4), A, "tensor"),
    ("hra", (2, 4), A, "tensor"),
    ("loha_fused", (2, 4), A, "tensor"),
    ("loha", (8, 1), A, "tensor"),
    ("adalora", (8, 1), A, "tensor"),
    ("dora", (2, 4), E, "fsdp"),
    ("xlora", (2, 4), A, "fsdp"),
    ("ia3", (1, 8), A, "fsdp"),
    ("ia3", (1, 8), E, "fsdp"),
]


@pytest.mark.parametrize(("method", "shape", "kind", "layout"), SOME)
def test_a_step_is_as_on_one_device_and_sends_the_adapter_alone(method, shape, kind, layout):
    sizes, state, metrics, sent = on_mesh(method, shape, kind, layout)
    got = jax.device_get((metrics["loss"], state.adapter.params))
    chex.assert_trees_all_close(got, alone(method), rtol=1e-5, atol=1e-5)

    once, both = frozen(shape, kind, layout)
    more = counted(sent) - both
    if method == "xlora":
        more -= once  # the pass that the mix is computed from
    if method == "dora" and shape[1] > 1:
        # The slope of a length needs the product itself, which remat computes again.
        more["all-reduce", ("model",), (len(IDS) // shape[0], IDS.shape[1], WIDTH)] -= LAYERS
    large = {key: n for key, n in more.items() if n and not small(key[2])}
    if layout == "tensor" and shape[0] > 1:
        summed = sum(each.bytes * each.times for each in sent if "data" in each.axes)
        loss = 4
        assert summed == reduced(method, sizes, layout, shape) + loss
        assert {each.op for each in sent if "data" in each.axes} == {"all-reduce"}
    if method == "loha_fused" and shape[0] > 1:
        # The gradient of the change that was built, summed over the batch, and nothing else.
        assert {key[:2] for key in large} == {("all-reduce", ("data",))}
    else:
        assert not large, "\n".join(str(each) for each in sent if not small(each.shape))


def test_what_is_counted():
    """Loops, groups as each version of XLA spells them, and pairs of devices."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(A, A))
    groups = {
        "replica_groups={{0,4},{1,5},{2,6},{3,7}}": ("data",),
        "replica_groups={{0,1,2,3},{4,5,6,7}}": ("model",),
        "replica_groups=[2,4]<=[8]": ("model",),
        "replica_groups=[4,2]<=[2,4]T(1,0)": ("data",),
        "replica_groups=[1,8]<=[8]": ("data", "model"),
        "replica_groups=mesh['a'=2,'b'=4] {'b'}": ("model",),
        "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}": ("data",),
        "source_target_pairs={{0,0},{1,2},{2,1}}": ("model",),
    }
    for text, axes in groups.items():
        line = f"  %x = (f32[3,2]{{1,0}}, bf16[5]{{0}}) all-reduce(%a, %b), {text}, to_apply=%add"
        found = collectives(PROGRAM.replace("LINE", line), mesh)
        assert {each.axes for each in found} == {axes}
        assert [(each.shape, each.bytes, each.times) for each in found] == [
            ((3, 2), 24, 1),
            ((5,), 10, 1),
            ((3, 2), 24, 7),
            ((5,), 10, 7),
            ((3, 2), 24, 7),
            ((5,), 10, 7),
        ]


PROGRAM = """
add (a: f32[]) -> f32[] {
  %z = f32[] add(%a, %a)
}
%more.1 (p: f32[]) -> f32[] {
LINE
}
body (p: f32[]) -> f32[] {
LINE
  %c = f32[] conditional(%p, %p, %p), branch_computations={%add, %more.1}
}
ENTRY %main (p: f32[]) -> f32[] {
LINE
  %w = f32[] while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"7"}}
}
"""
