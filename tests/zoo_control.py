"""Plain JAX models of the zoo: scans, loops, branches, and a layer jitted once."""

import jax
import jax.numpy as jnp
from jax import lax
from zoo_case import case, dense


@case(
    {"up": dense(1, 2, stack=0, bias="up_bias"), "down": dense(1, 2, stack=0), "mix": dense(0, 1)},
    contains=["scan"],
)
def scan_layers(draw):
    params = {
        "up": draw.weight(4, 6, 9),
        "up_bias": draw.weight(4, 9),
        "down": draw.weight(4, 9, 6),
        "mix": draw.weight(6, 6),
    }

    def apply_fn(params, x):
        def layer(x, own):
            up, bias, down = own
            h = jnp.tanh(x @ up + bias[None])
            # Every layer shares this one: it stays outside the stack.
            x = jnp.tanh(x @ params["mix"]) + h @ down
            return x, h.sum(axis=1)

        stack = (params["up"], params["up_bias"], params["down"])
        return lax.scan(layer, x, stack, reverse=True, unroll=2)

    return apply_fn, params, (draw.input(5, 6),)


@case(
    {"closed": dense(0, 1, bias="bias"), "carried": dense(0, 1)},
    contains=["while"],
    autodiff="forward",
)
def while_loop(draw):
    params = {"closed": draw.weight(6, 8), "bias": draw.weight(8), "carried": draw.weight(8, 6)}

    def apply_fn(params, x, steps):
        def step(state):
            i, carried, x = state
            h = jnp.tanh(x @ params["closed"] + params["bias"][None])
            return i + 1, carried, x + h @ carried

        first = (jnp.int32(0), params["carried"], x)
        return lax.while_loop(lambda state: state[0] < steps, step, first)[2]

    return apply_fn, params, (draw.input(5, 6), jnp.int32(3))


@case({"closed": dense(0, 1, bias="bias"), "carried": dense(0, 1)}, contains=["scan"])
def fori_loop(draw):
    params = {"closed": draw.weight(6, 8), "bias": draw.weight(8), "carried": draw.weight(8, 6)}

    def apply_fn(params, x):
        def step(_, state):
            carried, x = state
            h = jnp.tanh(x @ params["closed"] + params["bias"][None])
            return carried, x + h @ carried

        return lax.fori_loop(0, 3, step, (params["carried"], x))[1]

    return apply_fn, params, (draw.input(5, 6),)


@case(
    {"up": dense(1, 2, stack=0), "down": dense(1, 2, stack=0)}, contains=["scan", "dynamic_slice"]
)
def layer_by_number(draw):
    params = {"up": draw.weight(3, 6, 9), "down": draw.weight(3, 9, 6)}

    def apply_fn(params, x):
        def step(i, x):
            up, down = (
                lax.dynamic_index_in_dim(params[k], i, keepdims=False) for k in ("up", "down")
            )
            return x + jnp.tanh(x @ up) @ down

        return lax.fori_loop(0, 3, step, x)

    return apply_fn, params, (draw.input(5, 6),)


@case({"shared": dense(0, 1), "alone": dense(0, 1, bias="bias")}, contains=["cond"])
def cond(draw):
    params = {"shared": draw.weight(6, 8), "alone": draw.weight(6, 8), "bias": draw.weight(8)}

    def apply_fn(params, x, both):
        def alone(x):
            return x @ params["alone"] + params["bias"][None] + x @ params["shared"]

        return lax.cond(both > 0, alone, lambda x: jnp.tanh(x @ params["shared"]), x)

    return apply_fn, params, (draw.input(5, 6), jnp.int32(1))


@case(
    {"experts.0": dense(0, 1), "experts.1": dense(0, 1), "experts.2": dense(0, 1)},
    contains=["cond"],
)
def switch(draw):
    def apply_fn(params, x, chosen):
        branches = [lambda x, w=w: jnp.tanh(x @ w) for w in params["experts"]]
        return [lax.switch(one, branches, x) for one in chosen]

    params = {"experts": [draw.weight(6, 8) for _ in range(3)]}
    return apply_fn, params, (draw.input(5, 6), jnp.array([2, 1], jnp.int32))


@case(
    {f"layers.{i}.up": dense(0, 1, bias=f"layers.{i}.bias") for i in range(3)}
    | {f"layers.{i}.down": dense(0, 1) for i in range(3)},
    contains=["jit"],
)
def jitted_layer(draw):
    @jax.jit
    def layer(own, x):
        return x + jnp.tanh(x @ own["up"] + own["bias"][None]) @ own["down"]

    def apply_fn(params, x):
        for own in params["layers"]:
            x = layer(own, x)
        return x

    def own():
        return {"up": draw.weight(6, 9), "bias": draw.weight(9), "down": draw.weight(9, 6)}

    return apply_fn, {"layers": [own() for _ in range(3)]}, (draw.input(5, 6),)


CASES = [
    scan_layers,
    while_loop,
    fori_loop,
    layer_by_number,
    cond,
    switch,
    jitted_layer,
]
