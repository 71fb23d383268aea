"""Cost grows as it should, and where it did not that would be seen."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import growth, growth_adapters, growth_layers, growth_shown


def equations_of(layers, form):
    gradients, _ = growth_layers.programs(layers, form)
    return {
        way: growth_layers.equations(jax.jit(function).trace(*args).jaxpr)
        for way, (function, args) in gradients.items()
    }


def layered(form, way, figures):
    """Records of one gradient, by layers: equations and FLOPs."""
    start = {"what": "layers", "form": form, "way": way}
    return [start | {"layers": n, "equations": e, "flops": f} for n, (e, f) in figures.items()]


def straight(last_unrolled=(60, 610.0), last_scanned=(20, 620.0)):
    rows = []
    for way in growth_layers.WAYS:
        rows += layered("unrolled", way, {2: (20, 210.0), 3: (30, 310.0), 6: last_unrolled})
        rows += layered("scanned", way, {2: (20, 220.0), 6: last_scanned})
        rows += layered("scanned, remat", way, {2: (25, 230.0), 6: (25, 670.0)})
    return rows


def test_equations_inside_others_are_counted():
    def function(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) + 1, None), x, length=3)[0]

    # The scan, and the sine and the sum of its body.
    assert growth_layers.equations(jax.make_jaxpr(function)(1.0).jaxpr) == 3
    assert growth_layers.equations(jax.make_jaxpr(jax.jit(function))(1.0).jaxpr) == 4


def test_equations_grow_by_the_same_with_every_layer_unrolled_and_not_at_all_scanned():
    two, three, five = (equations_of(n, "unrolled") for n in (2, 3, 5))
    for way in growth_layers.WAYS:
        assert five[way] - three[way] == 2 * (three[way] - two[way]) > 0
    for form in growth_layers.FORMS[1:]:
        assert equations_of(2, form) == equations_of(5, form)


def test_a_layer_scanned_costs_what_it_costs_unrolled():
    layer = {}
    for form in ("unrolled", "scanned"):
        two, three = (growth_layers.programs(n, form)[0]["adapted"] for n in (2, 3))
        layer[form] = growth_layers.made(three)[0]["flops"] - growth_layers.made(two)[0]["flops"]
    assert layer["scanned"] == layer["unrolled"] > 0


def test_what_is_straight_is_not_reported():
    assert growth.broken(straight()) == []


@pytest.mark.parametrize(
    ("planted", "reported"),
    [
        ({"last_unrolled": (61, 610.0)}, "unrolled, adapted: 10.3333 equations a layer, and 10"),
        ({"last_unrolled": (60, 611.0)}, "unrolled, adapted: 100.333 flops a layer, and 100"),
        ({"last_scanned": (21, 620.0)}, "scanned, adapted: equations grow with layers: [20, 21]"),
        ({"last_scanned": (20, 621.0)}, "scanned, adapted: 1.0025 x the FLOPs of a layer unrolled"),
    ],
)
def test_a_layer_too_dear_is_reported(planted, reported):
    assert reported in growth.broken(straight(**planted))


def test_experts_cost_their_closed_form():
    (row,) = growth_adapters.experts((2,), 256, 128, 1, lambda text: None)
    assert growth.broken([*straight(), row]) == []
    # A classifier of one class more, of as many numbers as a hidden state has.
    spare = row["least_flops_ratio"] + row["spare_flops_ratio"]
    (found,) = growth.broken([*straight(), row | {"flops_ratio": spare + 1e-3}])
    assert found.startswith("2 experts: ")


def test_rows_cost_what_their_adapters_do():
    rows = growth_adapters.batch(2, 16, 64, 1)
    assert [row["pass"] for row in rows] == ["forward", "step"]
    assert growth.broken([*straight(), *rows]) == []
    (found,) = growth.broken([*straight(), rows[0] | {"flops_ratio": 1.031}])
    assert (
        found == "2 adapters, 16 tokens a row, forward: 1.0310 x one adapter's FLOPs, at most 1.03"
    )
    planted = {"tokens": 1, "operations_per_number": 12.5}
    (found,) = growth.broken([*straight(), rows[1] | planted])
    assert "12.50 operations on each number of the adapters, at most 12" in found


def test_a_bank_that_fills_up_is_no_new_program():
    row = growth_adapters.programs_of_a_growing_bank(3, 4, 32)
    assert row["traces"] > 0
    assert growth.broken([*straight(), row]) == []
    (found,) = growth.broken([*straight(), row | {"more_traces": 1}])
    assert found == "a bank that fills up to 3: 1 traces more"


def test_the_exponent_is_that_of_the_upper_half():
    rows = layered("unrolled", "base", {n: (n**2, 0.0) for n in (2, 6, 12, 24)})
    assert growth_shown.exponent(rows, "equations") == pytest.approx(2)
