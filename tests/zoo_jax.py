"""Plain JAX models of the zoo: contractions, lookups, and views of a weight."""

import jax
import jax.numpy as jnp
from jax import lax
from zoo_case import case, conv, dense, lookup


@case(
    {
        "layers.attn.wq": dense(0, (1, 2)),
        # Keys and values in one weight: an out axis on each side of the in axis.
        "layers.attn.wkv": dense(1, (0, 2, 3)),
        "layers.attn.wo": dense((0, 1), 2),
    },
    targets=["wq", "attn.wkv", "layers.attn.wo"],
    contains=["dot_general"],
)
def einsum_attention(draw):
    weights = {
        "wq": draw.weight(6, 3, 4),
        "wkv": draw.weight(2, 6, 3, 4),
        "wo": draw.weight(3, 4, 7),
    }

    def apply_fn(params, x):
        attn = params["layers"]["attn"]
        q = jnp.einsum("bsd,dhk->bshk", x, attn["wq"])
        k, v = jnp.einsum("bsd,cdhk->cbshk", x, attn["wkv"])
        weight = jax.nn.softmax(jnp.einsum("bshk,bthk->bhst", q, k) * 0.5)
        mixed = jnp.einsum("bhst,bthk->bshk", weight, v)
        return jnp.einsum("bshk,hkd->bsd", mixed, attn["wo"])

    return apply_fn, {"layers": {"attn": weights}}, (draw.input(2, 5, 6),)


@case(
    {"first": dense(1, 0), "second": dense((0, 2), 1, bias="second_bias")},
    contains=["dot_general"],
)
def weight_on_the_left(draw):
    params = {
        "first": draw.weight(8, 6),
        "second": draw.weight(4, 7, 2),
        "second_bias": draw.weight(7, 1),
    }

    def apply_fn(params, x):
        h = jnp.tanh(params["first"] @ x).reshape(4, 2, 5)
        return jnp.einsum("hok,hkb->ob", params["second"], h) + params["second_bias"]

    return apply_fn, params, (draw.input(6, 5),)


@case({"gated": dense(0, 1), "mixture": dense((0, 1), 2)}, contains=["dot_general"])
def three_operand_einsum(draw):
    params = {"gated": draw.weight(6, 8), "mixture": draw.weight(3, 8, 7)}

    def apply_fn(params, x, gate, mixing):
        h = jnp.einsum("bsd,bs,dk->bsk", x, gate, params["gated"])
        return jnp.einsum("bsk,bse,eko->bso", h, mixing, params["mixture"])

    return apply_fn, params, (draw.input(2, 5, 6), draw.input(2, 5), draw.input(2, 5, 3))


@case(
    {
        "first": dense(1, 0, bias="first.bias"),
        "second": dense(1, 0, bias="second.bias"),
        "third": dense(1, 0),
    },
    contains=["transpose"],
)
def transposed_kernels(draw):
    params = {
        "first": {"weight": draw.weight(8, 6), "bias": draw.weight(8)},
        "second": {"weight": draw.weight(7, 8), "bias": draw.weight(7)},
        "third": {"weight": draw.weight(9, 7)},
    }

    def apply_fn(params, x):
        first, second, third = params["first"], params["second"], params["third"]
        h = jnp.tanh(x @ first["weight"].T + first["bias"][None])
        # Transposed around the product, and the bias added while it lies on its side.
        h = jnp.tanh((second["weight"] @ h.T + second["bias"][:, None]).T)
        return lax.dot(h, lax.transpose(third["weight"], (1, 0)))

    return apply_fn, params, (draw.input(5, 6),)


@case(
    {
        "moe.gate": dense(0, 1),
        "moe.wi": dense(1, 2, stack=0, bias="moe.bi"),
        "moe.wo": dense(1, 2, stack=0),
    },
    contains=["dot_general"],
)
def moe_einsum(draw):
    moe = {
        "gate": draw.weight(6, 3),
        "wi": draw.weight(3, 6, 9),
        "bi": draw.weight(3, 9),
        "wo": draw.weight(3, 9, 6),
    }

    def apply_fn(params, x):
        moe = params["moe"]
        gate = jax.nn.softmax(x @ moe["gate"])
        own = jnp.einsum("te,td->etd", gate, x)
        h = jnp.einsum("etd,edf->etf", own, moe["wi"]) + moe["bi"][:, None]
        own = jnp.einsum("etf,efd->etd", jax.nn.gelu(h), moe["wo"])
        return jnp.einsum("te,etd->td", gate, own)

    return apply_fn, {"moe": moe}, (draw.input(5, 6),)


@case(
    {"wi": dense(1, 2, stack=0), "wo": dense(1, 2, stack=0)},
    contains=["ragged_dot_general"],
)
def moe_ragged_dot(draw):
    params = {"wi": draw.weight(4, 6, 9), "wo": draw.weight(4, 9, 7)}

    def apply_fn(params, x, sizes):
        h = jax.nn.gelu(lax.ragged_dot(x, params["wi"], sizes))
        return lax.ragged_dot(h, params["wo"], sizes)

    # One expert gets no token.
    return apply_fn, params, (draw.input(10, 6), jnp.array([3, 0, 5, 2], jnp.int32))


@case(
    {
        "layers.up": dense(1, 2, stack=0, bias="layers.up.bias"),
        "layers.down": dense(0, 2, stack=1),
    },
    contains=["slice", "squeeze"],
)
def unrolled_stack(draw):
    layers = {
        "up": {"kernel": draw.weight(3, 6, 9), "bias": draw.weight(3, 9)},
        "down": {"kernel": draw.weight(9, 3, 6)},
    }

    def apply_fn(params, x):
        up, down = params["layers"]["up"], params["layers"]["down"]
        for i in range(3):
            h = jnp.tanh(x @ up["kernel"][i] + up["bias"][i][None])
            x = x + h @ down["kernel"][:, i]
        return x

    return apply_fn, {"layers": layers}, (draw.input(5, 6),)


@case(
    {"split": dense(0, 1), "merged": dense(0, (1, 2)), "out": dense((0, 1), 2)},
    contains=["reshape"],
)
def reshaped_weights(draw):
    params = {
        "split": draw.weight(6, 12),
        "merged": draw.weight(6, 3, 4),
        "out": draw.weight(3, 4, 7),
    }

    def apply_fn(params, x):
        split = jnp.einsum("sd,dhk->shk", x, params["split"].reshape(6, 3, 4))
        merged = x @ params["merged"].reshape(6, 12)
        return (jnp.tanh(split).reshape(5, 12) * merged) @ params["out"].reshape(12, 7)

    return apply_fn, params, (draw.input(5, 6),)


@case({"qkv": dense(0, 1), "out": dense(0, 1)}, contains=["split"])
def split_weight(draw):
    params = {"qkv": draw.weight(6, 24), "out": draw.weight(8, 7)}

    def apply_fn(params, x):
        q, k, v = (x @ part for part in jnp.split(params["qkv"], 3, axis=1))
        return jax.nn.softmax(q @ k.T * 0.3) @ v @ params["out"]

    return apply_fn, params, (draw.input(5, 6),)


@case(
    {"up": dense(0, 1, bias="up.bias"), "down": dense(0, 1)},
    contains=["convert_element_type"],
)
def cast_weights(draw):
    kept = draw.kept_dtype
    params = {
        "up": {"kernel": draw.weight(6, 9, dtype=kept), "bias": draw.weight(9, dtype=kept)},
        "down": {"kernel": draw.weight(9, 7, dtype=kept)},
    }

    def apply_fn(params, x):
        up, down = jax.tree.map(lambda leaf: leaf.astype(x.dtype), (params["up"], params["down"]))
        return jnp.tanh(x @ up["kernel"] + up["bias"][None]) @ down["kernel"]

    return apply_fn, params, (draw.input(5, 6),)


@case({"up": dense(0, 1, bias="up_bias"), "down": dense(0, 1)}, contains=["mul"])
def scaled_weights(draw):
    params = {"up": draw.weight(6, 9), "up_bias": draw.weight(9), "down": draw.weight(9, 7)}

    def apply_fn(params, x):
        h = jnp.tanh(x @ (params["up"] * (2 / 6) ** 0.5) + params["up_bias"][None])
        return h @ (-0.5 * params["down"])

    return apply_fn, params, (draw.input(5, 6),)


@case({"kernel": dense(0, 1, bias="encoded_bias")}, contains=["dot_general"])
def tied_autoencoder(draw):
    params = {
        "kernel": draw.weight(6, 9),
        "encoded_bias": draw.weight(9),
        "decoded_bias": draw.weight(6),
    }

    def apply_fn(params, x):
        h = jnp.tanh(x @ params["kernel"] + params["encoded_bias"][None])
        return h @ params["kernel"].T + params["decoded_bias"][None]

    return apply_fn, params, (draw.input(5, 6),)


@case(
    {"key": dense(0, 1), "value": dense(0, 1), "out": dense(0, 1)},
    fallback=["key", "value"],
    contains=["concatenate"],
)
def concatenated_weights(draw):
    params = {"key": draw.weight(6, 4), "value": draw.weight(6, 5), "out": draw.weight(9, 7)}

    def apply_fn(params, x):
        both = jnp.concatenate([params["key"], params["value"]], axis=1)
        return jnp.tanh(x @ both) @ params["out"]

    return apply_fn, params, (draw.input(3, 6),)


@case({"kernel": dense(0, (1, 2))}, fallback=["kernel"], contains=["dot_general"])
def two_conventions(draw):
    def apply_fn(params, x):
        h = jnp.tanh(jnp.einsum("bi,ijk->bjk", x, params["kernel"]))
        # The middle axis was an output before, and is summed over here.
        return jnp.einsum("bj,ijk->bik", h.sum(axis=2), params["kernel"])

    return apply_fn, {"kernel": draw.weight(6, 4, 5)}, (draw.input(3, 6),)


@case(
    {
        "taken": lookup(0, 1),
        "indexed": lookup(0, 1),
        "columns": lookup(1, 0),
        "blocks": lookup(0, (1, 2)),
    },
    contains=["gather"],
)
def lookups(draw):
    params = {
        "taken": draw.weight(11, 6),
        "indexed": draw.weight(9, 6),
        "columns": draw.weight(6, 8),
        "blocks": draw.weight(7, 2, 3),
    }

    def apply_fn(params, ids, signed):
        taken = jnp.take(params["taken"], ids, axis=0)
        indexed = params["indexed"][signed]
        columns = jnp.moveaxis(jnp.take(params["columns"], ids % 8, axis=1), 0, -1)
        blocks = params["blocks"][ids % 7].reshape(4, 5, 6)
        return jnp.tanh(taken + indexed) * columns + blocks

    return apply_fn, params, (draw.ids(11, 4, 5), draw.ids(9, 4, 5, low=-9))


@case(
    {"rows": lookup(0, 1), "columns": lookup(1, 0), "blocks": lookup(0, (1, 2))},
    contains=["gather", "squeeze"],
)
def lookups_under_vmap(draw):
    """Slices with a start each, which keep the axis that was picked along, with size 1."""
    params = {
        "rows": draw.weight(9, 6),
        "columns": draw.weight(6, 8),
        "blocks": draw.weight(7, 2, 3),
    }

    def one(params, index):
        columns = jax.lax.dynamic_index_in_dim(params["columns"], index % 8, axis=1)
        blocks = params["blocks"][index % 7].reshape(6)
        return jnp.tanh(params["rows"][index]) * columns[:, 0] + blocks

    def apply_fn(params, ids):
        return jax.vmap(jax.vmap(one, (None, 0)), (None, 0))(params, ids)

    return apply_fn, params, (draw.ids(12, 4, 5, low=-12),)


@case({"filled": lookup(0, 1), "clipped": lookup(0, 1)}, contains=["gather"])
def lookups_out_of_range(draw):
    params = {"filled": draw.weight(9, 6), "clipped": draw.weight(8, 6)}

    def apply_fn(params, ids):
        # A missing row is two throughout: what is added to it must be zero, and not two again.
        filled = params["filled"].at[ids].get(mode="fill", fill_value=2)
        clipped = jnp.take(params["clipped"], ids, axis=0, mode="clip")
        return jnp.tanh(filled) * clipped

    return apply_fn, params, (draw.ids(13, 4, 5, low=-13),)


@case({"table": dense(0, 1), "head": dense(0, 1)}, contains=["eq", "dot_general"])
def one_hot_embedding(draw):
    params = {"table": draw.weight(11, 6), "head": draw.weight(6, 7)}

    def apply_fn(params, ids):
        return jax.nn.one_hot(ids, 11, dtype=draw.dtype) @ params["table"] @ params["head"]

    return apply_fn, params, (draw.ids(11, 4, 5),)


@case(
    {"shared.up": dense(0, 1), "shared.down": dense(0, 1), "head": dense(0, 1)},
    targets=["shared.up", "shared.down"],
    contains=["dot_general"],
)
def shared_layers(draw):
    shared = {"up": draw.weight(6, 9), "down": draw.weight(9, 6)}

    def apply_fn(params, x):
        for _ in range(3):
            h = jax.nn.gelu(x @ params["shared"]["up"])
            x = x + h @ params["shared"]["down"]
        # One vector is no matrix: it has no low rank, and so it is no site.
        return x @ params["head"], x @ params["score"]

    params = {"shared": shared, "head": draw.weight(6, 7), "score": draw.weight(6)}
    return apply_fn, params, (draw.input(5, 6),)


@case({"kernel": conv((1, 2), 0, groups=2)}, contains=["conv_general_dilated"])
def dilated_both_ways(draw):
    def apply_fn(params, x):
        return lax.conv_general_dilated(
            x,
            params["kernel"],
            window_strides=(2,),
            padding=[(3, 1)],
            lhs_dilation=(2,),
            rhs_dilation=(3,),
            dimension_numbers=("NCW", "OIW", "NWC"),
            feature_group_count=2,
        )

    return apply_fn, {"kernel": draw.weight(8, 3, 4)}, (draw.input(2, 6, 9),)


CASES = [
    einsum_attention,
    weight_on_the_left,
    three_operand_einsum,
    transposed_kernels,
    moe_einsum,
    moe_ragged_dot,
    unrolled_stack,
    reshaped_weights,
    split_weight,
    cast_weights,
    scaled_weights,
    tied_autoencoder,
    concatenated_weights,
    two_conventions,
    lookups,
    lookups_under_vmap,
    lookups_out_of_range,
    one_hot_embedding,
    shared_layers,
    dilated_both_ways,
]
