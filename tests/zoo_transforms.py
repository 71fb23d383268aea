"""Plain JAX models of the zoo: remat, custom and inner gradients, vmap, meshes, kernels."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from zoo_case import case, conv, dense, lookup


@case({"up": dense(0, 1), "down": dense(0, 1)}, contains=["remat2", "name"])
def remat_saving_names(draw):
    params = {"up": draw.weight(6, 9), "down": draw.weight(9, 7)}

    def apply_fn(params, x):
        def block(x):
            h = checkpoint_name(x @ params["up"], "hidden")
            return jnp.tanh(h) @ params["down"]

        policy = jax.checkpoint_policies.save_only_these_names("hidden")
        return jax.checkpoint(block, policy=policy)(x)

    return apply_fn, params, (draw.input(5, 6),)


@jax.custom_jvp
def rounded(x):
    return jnp.tanh(x)


@rounded.defjvp
def _(primals, tangents):
    return rounded(*primals), 0.5 * tangents[0]


@jax.custom_vjp
def clipped(x):
    return jnp.sin(x)


# The gradients above and below are wrong on purpose: only a replay that keeps them agrees.
clipped.defvjp(lambda x: (jnp.sin(x), None), lambda _, g: (jnp.clip(0.7 * g, -1, 1),))


@case(
    {"first": dense(0, 1, bias="bias"), "second": dense(0, 1), "third": dense(0, 1)},
    contains=["custom_jvp_call", "custom_vjp_call"],
)
def custom_activations(draw):
    params = {
        "first": draw.weight(6, 9),
        "bias": draw.weight(9),
        "second": draw.weight(9, 8),
        "third": draw.weight(8, 7),
    }

    def apply_fn(params, x):
        h = rounded(x @ params["first"] + params["bias"][None])
        return clipped(h @ params["second"]) @ params["third"]

    return apply_fn, params, (draw.input(5, 6),)


@jax.custom_vjp
def damped_matmul(x, kernel):
    return x @ kernel


damped_matmul.defvjp(
    lambda x, kernel: (x @ kernel, (x, kernel)),
    lambda saved, g: (g @ saved[1].T, 0.5 * saved[0].T @ g),
)


@case(
    {"damped": dense(0, 1), "plain": dense(0, 1)},
    fallback=["damped"],
    contains=["custom_vjp_call"],
)
def custom_vjp_of_weight(draw):
    params = {"damped": draw.weight(6, 9), "plain": draw.weight(9, 7)}

    def apply_fn(params, x):
        return jnp.tanh(damped_matmul(x, params["damped"])) @ params["plain"]

    return apply_fn, params, (draw.input(5, 6),)


@case({"up": dense(0, 1, bias="bias"), "down": dense(0, 1)}, contains=["dot_general"])
def energy_and_force(draw):
    params = {"up": draw.weight(6, 9), "bias": draw.weight(9), "down": draw.weight(9, 7)}

    def apply_fn(params, x):
        def energy(x):
            h = jnp.tanh(x @ params["up"] + params["bias"][None])
            return jnp.sum(jnp.square(h @ params["down"]))

        return jax.value_and_grad(energy)(x)

    return apply_fn, params, (draw.input(5, 6),)


@case({"up": dense(0, 1), "down": dense(0, 1)}, contains=["dot_general"])
def inner_vjp(draw):
    params = {"up": draw.weight(6, 9), "down": draw.weight(9, 7)}

    def apply_fn(params, x, cotangent):
        y, pull = jax.vjp(lambda x: jnp.tanh(x @ params["up"]) @ params["down"], x)
        return y, pull(cotangent)

    return apply_fn, params, (draw.input(5, 6), draw.input(5, 7))


@case({"up": dense(0, 1, bias="bias"), "down": dense(0, 1)}, contains=["dot_general"])
def inner_jvp(draw):
    params = {"up": draw.weight(6, 9), "bias": draw.weight(9), "down": draw.weight(9, 7)}

    def apply_fn(params, x, tangent):
        def model(x):
            return jnp.tanh(x @ params["up"] + params["bias"][None]) @ params["down"]

        return jax.jvp(model, (x,), (tangent,))

    return apply_fn, params, (draw.input(5, 6), draw.input(5, 6))


def two_devices() -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])


@case(
    {"columns": dense(0, 1, bias="bias"), "rows": dense(0, 1)},
    contains=["shard_map", "psum_invariant"],
)
def shard_map(draw):
    params = {"columns": draw.weight(6, 8), "bias": draw.weight(8), "rows": draw.weight(8, 7)}

    def apply_fn(params, x):
        # The first weight is split along its out-axis, the second along its in-axis.
        @jax.shard_map(
            mesh=two_devices(),
            in_specs=(P(None, "model"), P("model"), P("model", None), P()),
            out_specs=P(),
        )
        def block(columns, bias, rows, x):
            return lax.psum(jnp.tanh(x @ columns + bias[None]) @ rows, "model")

        return block(params["columns"], params["bias"], params["rows"], x)

    return apply_fn, params, (draw.input(5, 6),)


@case(
    {"up": dense(0, 1), "down": dense(0, 1)},
    contains=["sharding_constraint"],
)
def sharding_constraint(draw):
    params = {"up": draw.weight(6, 8), "down": draw.weight(8, 7)}

    def apply_fn(params, x):
        sharding = NamedSharding(two_devices(), P(None, "model"))
        with jax.named_scope("block"):
            h = lax.with_sharding_constraint(x @ params["up"], sharding)
            with jax.named_scope("down"):
                return jnp.tanh(h) @ params["down"]

    return apply_fn, params, (draw.input(5, 6),)


@case(
    {"dense": dense(0, 1, bias="bias"), "conv": conv((0, 1), 2)}, contains=["conv_general_dilated"]
)
def vmap_shared(draw):
    params = {"dense": draw.weight(6, 8), "bias": draw.weight(8), "conv": draw.weight(3, 8, 7)}

    def apply_fn(params, x):
        def one(x):
            h = jnp.tanh(x @ params["dense"] + params["bias"][None])
            return lax.conv_general_dilated(
                h[None], params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )[0]

        return jax.vmap(one)(x)

    return apply_fn, params, (draw.input(2, 5, 6),)


@case(
    {
        "fan": dense(1, (0, 2), bias="fan_bias"),
        "member": dense(1, 2, stack=0, bias="member_bias"),
    },
    contains=["dot_general"],
)
def vmap_members(draw):
    params = {
        "fan": draw.weight(4, 6, 8),
        "fan_bias": draw.weight(4, 8),
        "member": draw.weight(4, 8, 7),
        "member_bias": draw.weight(4, 7),
    }

    def apply_fn(params, x):
        # All members see one x, so the first weight fans out: its member axis is free.
        def member(own):
            h = jnp.tanh(x @ own["fan"] + own["fan_bias"][None])
            return h @ own["member"] + own["member_bias"][None]

        return jax.vmap(member)(params)

    return apply_fn, params, (draw.input(5, 6),)


# vmap folds the members into the out-axis of one grouped kernel, so they share the factor A.
@case({"kernel": conv((1, 2), (0, 3), groups=3)}, contains=["conv_general_dilated"])
def vmap_member_convs(draw):
    def apply_fn(params, x):
        def member(kernel, x):
            return lax.conv_general_dilated(
                x, kernel, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )

        return jax.vmap(member)(params["kernel"], x)

    return apply_fn, {"kernel": draw.weight(3, 4, 5, 6)}, (draw.input(3, 2, 9, 5),)


@case({"table": lookup(1, 2, stack=0)}, contains=["gather"])
def vmap_member_lookups(draw):
    def apply_fn(params, ids):
        return jax.vmap(lambda table, ids: table[ids])(params["table"], ids)

    return apply_fn, {"table": draw.weight(3, 9, 6)}, (draw.ids(9, 3, 5),)


@case({"up": dense(0, 1, bias="bias"), "layers": dense(1, 2, stack=0)}, contains=["scan"])
def mapped(draw):
    params = {"up": draw.weight(6, 8), "bias": draw.weight(8), "layers": draw.weight(3, 8, 7)}

    def apply_fn(params, x):
        h = lax.map(lambda row: jnp.tanh(row @ params["up"] + params["bias"]), x)
        return lax.map(lambda kernel: h @ kernel, params["layers"])

    return apply_fn, params, (draw.input(5, 6),)


@case(
    {"plain": dense(0, 1), "hidden": dense(0, 1)},
    fallback=["hidden"],
    contains=["pallas_call"],
    autodiff="forward",
)
def pallas_kernel(draw):
    params = {"plain": draw.weight(6, 8), "hidden": draw.weight(8, 7)}

    def kernel(x, weight, out):
        out[...] = jnp.dot(x[...], weight[...], preferred_element_type=out.dtype)

    def apply_fn(params, x):
        h = jnp.tanh(x @ params["plain"])
        shape = jax.ShapeDtypeStruct((5, 7), x.dtype)
        hidden = pallas.pallas_call(kernel, out_shape=shape, interpret=True)(h, params["hidden"])
        # A kernel does not say which axes of its weight go in and which go out; a product does.
        return jnp.tanh(hidden) + jnp.square(h) @ params["hidden"]

    x = draw.input(5, 6)
    # The first lowering of a kernel imports what adds to JAX's settings: all is traced anew.
    jax.jit(apply_fn).lower(params, x)
    return apply_fn, params, (x,)


CASES = [
    remat_saving_names,
    custom_activations,
    custom_vjp_of_weight,
    energy_and_force,
    inner_vjp,
    inner_jvp,
    shard_map,
    sharding_constraint,
    vmap_shared,
    vmap_members,
    vmap_member_convs,
    vmap_member_lookups,
    mapped,
    pallas_kernel,
]
