"""The cost read off HLO text, against XLA's own analysis and against programs without loops."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo

LAYERS, ROWS, WIDTH, HIDDEN = 3, 16, 24, 40


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def shape(*sizes, where=None):
    return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=where)


def by_kind(cost):
    """How often each kind of collective runs on arrays of each shape, and its bytes."""
    total: dict[tuple, int] = {}
    for one in cost.collectives:
        for array in one.arrays:
            total[one.kind, array] = total.get((one.kind, array), 0) + one.times
    return total, sum(one.times * one.bytes for one in cost.collectives)


def layer(x, own):
    into, out = own
    return x + jnp.tanh(x @ into) @ out


def scanned(weights, x):
    return lax.scan(lambda x, own: (layer(x, own), None), x, weights)[0]


def unrolled(weights, x):
    for i in range(LAYERS):
        x = layer(x, [weight[i] for weight in weights])
    return x


def placed():
    """Weights split along both axes of a mesh, and rows of x along one."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    into = shape(LAYERS, WIDTH, HIDDEN, where=NamedSharding(mesh, P(None, "data", "model")))
    out = shape(LAYERS, HIDDEN, WIDTH, where=NamedSharding(mesh, P(None, "model", "data")))
    return (into, out), shape(ROWS, WIDTH, where=NamedSharding(mesh, P("data", None)))


def test_a_scanned_model_costs_what_an_unrolled_one_does():
    weights, x = placed()
    loop = hlo.cost(compiled(scanned, weights, x).as_text())
    flat = hlo.cost(compiled(unrolled, weights, x).as_text())
    # Four groups of rows, and each product split in two.
    assert loop.flops == flat.flops == LAYERS * 2 * 2 * ROWS * WIDTH * HIDDEN / 8
    assert by_kind(loop) == by_kind(flat)
    kinds = {one.kind for one in loop.collectives}
    assert {"all-gather", "all-reduce"} <= kinds
    assert {one.times for one in loop.collectives} == {LAYERS}
    assert {one.times for one in flat.collectives} == {1}


def test_the_gradient_of_a_scanned_model_costs_three_times_its_products():
    weights, x = shape(LAYERS, WIDTH, HIDDEN), shape(ROWS, WIDTH)
    weights = weights, shape(LAYERS, HIDDEN, WIDTH)
    loop, flat = (
        hlo.cost(compiled(jax.grad(lambda w, x, f=f: f(w, x).sum(), (0, 1)), weights, x).as_text())
        for f in (scanned, unrolled)
    )
    # Unrolled, XLA sees that the last layer's output is not needed for the gradient of a sum.
    products = LAYERS * 2 * 2 * ROWS * WIDTH * HIDDEN
    assert flat.flops == 3 * products - products / LAYERS / 2
    assert loop.flops == 3 * products


def test_nested_loops_multiply():
    def nested(weights, x):
        return lax.fori_loop(0, 5, lambda _, x: scanned(weights, x), x)

    weights = shape(LAYERS, WIDTH, HIDDEN), shape(LAYERS, HIDDEN, WIDTH)
    cost = hlo.cost(compiled(nested, weights, shape(ROWS, WIDTH)).as_text())
    assert cost.flops == 5 * LAYERS * 2 * 2 * ROWS * WIDTH * HIDDEN


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [("ab,bc->ac", (7, 8), (8, 9)), ("abc,adc->abd", (3, 4, 5), (3, 6, 5))],
)
def test_products_are_counted_as_xla_does(equation, left, right):
    program = compiled(lambda x, y: jnp.einsum(equation, x, y), shape(*left), shape(*right))
    analysis, cost = program.cost_analysis(), hlo.cost(program.as_text())
    assert (cost.flops, cost.bytes) == (analysis["flops"], analysis["bytes accessed"])


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": "SAME"},
        {"padding": "VALID", "window_strides": (2, 3)},
        {"padding": [(2, 1), (0, 3)], "lhs_dilation": (2, 3)},
        {"padding": "SAME", "rhs_dilation": (2, 1)},
        {"padding": "SAME", "feature_group_count": 2},
    ],
)
def test_convolutions_are_counted_as_xla_does(settings):
    settings = {"window_strides": (1, 1), **settings}
    x, kernel = shape(2, 4, 9, 11), shape(6, 4 // settings.get("feature_group_count", 1), 3, 3)
    program = compiled(lambda x, k: lax.conv_general_dilated(x, k, **settings), x, kernel)
    assert "convolution(" in program.as_text()
    assert hlo.cost(program.as_text()).flops == program.cost_analysis()["flops"]


def test_a_loop_reads_of_a_stack_one_layer_a_turn():
    """Its stack, once all turns are taken together, and not once a turn."""
    weights, x = shape(64, WIDTH, WIDTH), shape(1, WIDTH)

    def products(weights, x):
        return lax.scan(lambda x, own: (jnp.tanh(x @ own), None), x, weights)[0]

    stack = 4 * 64 * WIDTH * WIDTH
    moved = hlo.cost(compiled(products, weights, x).as_text()).bytes
    # Slices may be written and read once more before their product.
    assert stack < moved < 4 * stack


ASYNCHRONOUS = """
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%condition (state: (s32[], bf16[8,4])) -> pred[] {
  %state = (s32[], bf16[8,4]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %last = s32[] constant(7)
  ROOT %more = pred[] compare(%turn, %last), direction=LT
}

%body (state: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %state = (s32[], bf16[8,4]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %begun = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%x), GROUP, dimensions={0}
  %whole = bf16[32,4]{1,0} all-gather-done(%begun)
  %part = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} reduce-scatter(%whole), to_apply=%add
  ROOT %next = (s32[], bf16[8,4]{1,0}) tuple(%turn, %part)
}

ENTRY %main (x: bf16[8,4]) -> (s32[], bf16[8,4]) {
  %x = bf16[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,4]{1,0}) tuple(%zero, %x)
  ROOT %loop = (s32[], bf16[8,4]{1,0}) while(%start), condition=%condition, body=%body
}
""".replace("GROUP", 'channel_id=1, replica_groups={{0,1,2,3}}, metadata={op_name="layers/up"}')


def test_asynchronous_collectives_in_a_loop_that_only_its_condition_bounds():
    gathered, scattered = hlo.cost(ASYNCHRONOUS).collectives
    assert (gathered.kind, gathered.arrays) == ("all-gather", (("bf16", (32, 4)),))
    assert (gathered.bytes, gathered.times, gathered.origin) == (256, 7, "layers/up")
    assert (scattered.kind, scattered.arrays) == ("reduce-scatter", (("bf16", (8, 4)),))
    assert (scattered.bytes, scattered.times) == (256, 7)


def test_a_loop_of_unknown_length_is_refused():
    def search(x):
        return lax.while_loop(lambda x: x.sum() < 1.5, lambda x: x * 2, x)

    with pytest.raises(ValueError, match="how often it runs"):
        hlo.cost(compiled(search, shape(4)).as_text())
