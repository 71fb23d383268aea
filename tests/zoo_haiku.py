"""Haiku models of the zoo."""

from collections.abc import Callable

import haiku as hk
import jax
from zoo_case import Draw, Model, case, conv, dense


def functional(body: Callable[..., jax.Array], draw: Draw, *inputs: jax.Array) -> Model:
    model = hk.without_apply_rng(hk.transform(body))
    params = draw.like(jax.eval_shape(model.init, jax.random.key(0), *inputs))
    return model.apply, params, inputs


@case(
    {
        "mlp.~.linear_0": dense(0, 1, bias="mlp.~.linear_0.b"),
        "mlp.~.linear_1": dense(0, 1, bias="mlp.~.linear_1.b"),
        "head": dense(0, 1),
    },
    contains=["dot_general"],
)
def haiku_mlp(draw):
    def body(x):
        return hk.Linear(7, with_bias=False, name="head")(jax.nn.gelu(hk.nets.MLP([8, 9])(x)))

    return functional(body, draw, draw.input(3, 5, 6))


@case(
    {
        "stem": conv((0, 1, 2), 3, bias="stem.b"),
        "depthwise": conv((0, 1, 2), 3, groups=6),
        "head": dense(0, 1, bias="head.b"),
    },
    targets=["stem", "depthwise", "head"],
    contains=["conv_general_dilated"],
)
def haiku_conv(draw):
    def body(x):
        x = jax.nn.gelu(hk.Conv2D(6, (3, 2), stride=2, rate=1, name="stem")(x))
        x = hk.Conv2D(6, 3, feature_group_count=6, with_bias=False, name="depthwise")(x)
        return hk.Linear(8, name="head")(x.mean(axis=(1, 2)))

    return functional(body, draw, draw.input(2, 9, 7, 4))


CASES = [haiku_mlp, haiku_conv]
