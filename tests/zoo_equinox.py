"""Equinox models of the zoo: weights are (out, in), a params tree is a module with holes."""

from collections.abc import Callable

import equinox as eqx
import jax
from zoo_case import Draw, Model, case, conv, dense, lookup


def functional(
    make: Callable[[jax.Array], eqx.Module], draw: Draw, axes: int, x: jax.Array
) -> Model:
    """A model mapped over the leading axes of its input; what is no array is None in params."""
    params, static = eqx.partition(
        eqx.filter_eval_shape(make, jax.random.key(0)),
        lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
    )

    def apply_fn(params, x):
        model = eqx.combine(params, static)
        for _ in range(axes):
            model = jax.vmap(model)
        return model(x)

    return apply_fn, draw.like(params), (x,)


@case(
    {
        "layers.0": dense(1, 0, bias="layers.0.bias"),
        "layers.1": dense(1, 0, bias="layers.1.bias"),
        "layers.2": dense(1, 0),
    },
    contains=["dot_general"],
)
def equinox_mlp(draw):
    def make(key):
        options = {"use_final_bias": False, "dtype": draw.dtype, "key": key}
        return eqx.nn.MLP(6, 7, 9, depth=2, activation=jax.nn.gelu, **options)

    return functional(make, draw, 2, draw.input(3, 5, 6))


@case(
    {
        "layers.0": conv((1, 2, 3), 0, bias="layers.0.bias"),
        "layers.2": conv((1, 2, 3), 0, bias="layers.2.bias", groups=2),
    },
    targets=["0", "layers.2"],
    contains=["conv_general_dilated"],
)
def equinox_conv(draw):
    def make(key):
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dtype=draw.dtype, key=key),
                eqx.nn.Lambda(jax.nn.gelu),
                eqx.nn.Conv2d(6, 8, 3, groups=2, padding=1, dtype=draw.dtype, key=key),
            ]
        )

    return functional(make, draw, 1, draw.input(2, 4, 9, 7))


class TiedDecoder(eqx.Module):
    embed: eqx.nn.Embedding
    layer: eqx.nn.Linear

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids)
        return jax.numpy.tanh(jax.vmap(self.layer)(x)) @ self.embed.weight.T


@case({"embed": lookup(0, 1), "layer": dense(1, 0)}, contains=["gather", "dot_general"])
def equinox_tied_embedding(draw):
    def make(key):
        embed = eqx.nn.Embedding(11, 6, dtype=draw.dtype, key=key)
        return TiedDecoder(embed, eqx.nn.Linear(6, 6, use_bias=False, dtype=draw.dtype, key=key))

    return functional(make, draw, 1, draw.ids(11, 3, 5))


CASES = [equinox_mlp, equinox_conv, equinox_tied_embedding]
