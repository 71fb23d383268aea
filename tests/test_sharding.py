"""Where an adapter's arrays and its optimizer's lie, and that they start the same anywhere."""

import dataclasses
import functools
import operator

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
import qwix
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import normal, redraw

from peftjax import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    XLoraConfig,
    adapter_shardings,
    find_sites,
    from_linen,
    from_nnx,
    init_adapter,
    init_train_state,
    init_xlora,
    rank_allocator,
    stack_adapters,
)

KEY = jax.random.key(0)
X = jax.ShapeDtypeStruct((2, 8), jnp.float32)
SHAPES = {
    "conv": {"kernel": (3, 3, 8, 16)},
    "dense": {"kernel": (8, 16), "bias": (16,)},
    "experts": (8, 8, 16),
    "heads": (8, 4, 8),
    "layers": {"a": (8, 8, 8), "b": (8, 8, 8)},
    "norm": {"scale": (8,)},
    "out": (4, 8, 8),
    "table": (16, 8),
}
SPECS = {
    "conv": {"kernel": P(None, None, "data", "model")},
    "dense": {"kernel": P("data", "model"), "bias": P("model")},
    "experts": P("model", "data"),
    "heads": P("data", None, "model"),
    "layers": {"a": P("model", None, "data"), "b": P("model", None, "data")},
    "norm": {"scale": P("data")},
    "out": P(None, "model", "data"),
    "table": P(("data", "model"), None),
}
WHERE = functools.partial(jax.tree.map, is_leaf=lambda leaf: isinstance(leaf, tuple))


def house(params, x):
    """Every kind of weight; ``layers.a`` is stacked along axis 0 and ``layers.b`` along axis 1."""

    def layer(x, own):
        return jnp.tanh(x @ own[0]) @ own[1], None

    stacked = params["layers"]["a"], jnp.moveaxis(params["layers"]["b"], 1, 0)
    x, _ = lax.scan(layer, x * params["norm"]["scale"][None], stacked)
    h = jnp.einsum("bi,ihk->bhk", x, params["heads"])
    x = jnp.einsum("bhk,hki->bi", h, params["out"])
    image = jnp.broadcast_to(x[:, None, None], (x.shape[0], 4, 4, x.shape[1]))
    dims = ("NHWC", "HWIO", "NHWC")
    image = lax.conv_general_dilated(
        image, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=dims
    )
    spread = jnp.broadcast_to(x[None], (8, *x.shape))
    mixed = jnp.einsum("ebi,eio->ebo", spread, params["experts"])
    rows = params["table"][jnp.arange(3)]
    return image, mixed, rows, x @ params["dense"]["kernel"] + params["dense"]["bias"][None]


def shapes():
    return WHERE(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES)


@functools.cache
def sites():
    return find_sites(house, shapes(), X)


def mesh_of(shape=(2, 4), kind=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))


def abstract(config):
    """An adapter's shapes alone."""
    return jax.eval_shape(lambda params: init_adapter(KEY, config, sites(), params), shapes())


def placed(tree):
    """The specs of a tree of shardings that split anything, by module and name."""
    found = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        assert isinstance(leaf, NamedSharding)
        spec = tuple(leaf.spec)
        while spec and spec[-1] is None:
            spec = spec[:-1]
        if spec:
            assert found.setdefault((keys[-2].key, keys[-1].key), P(*spec)) == P(*spec)
    return found


def shardings_of(config, adapter=None):
    with jax.set_mesh(mesh_of()):
        return adapter_shardings(adapter or abstract(config), SPECS)


def every(config, **fields):
    return dataclasses.replace(config, target_modules=list(sites()), **fields)


def named(table):
    """The same specs under the names of a method's in factor and out factor."""
    return lambda ins, outs: {
        (module, name): spec
        for module, (inner, outer) in table.items()
        for names, spec in ((ins, inner), (outs, outer))
        for name in names
        if spec is not None
    }


FACTORS = named(
    {
        "conv": (P(None, None, "data"), P(None, "model")),
        "dense": (P("data"), P(None, "model")),
        "experts": (P("model", "data"), P("model")),
        "heads": (P("data"), P(None, None, "model")),
        "layers.a": (P("model"), P("model", None, "data")),
        # Behind the stack, axis 1, comes the in-axis, axis 0 of the weight.
        "layers.b": (P(None, "model"), P(None, None, "data")),
        "out": (P(None, "model"), P(None, "data")),
        "table": (P(("data", "model")), None),
    }
)
VALUES = {(module, "lora_E"): P("model") for module in ("experts", "layers.a")}
OUTS = {
    "conv": P("model"),
    "dense": P("model"),
    "experts": P("model"),
    "heads": P(None, "model"),
    "layers.a": P("model", "data"),
    "layers.b": P(None, "data"),
    "out": P("data"),
}
LORA = FACTORS(["lora_A"], ["lora_B"])
WHOLE = {("norm", "scale"): P("data"), ("dense", "bias"): P("model")}


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (LoraConfig(r=4), LORA),
        (
            LoraConfig(r=4, use_dora=True),
            LORA | {(module, "lora_magnitude_vector"): spec for module, spec in OUTS.items()},
        ),
        (
            LoraConfig(r=4, init_lora_weights="pissa"),
            FACTORS(["lora_A", "lora_A_init"], ["lora_B", "lora_B_init"]),
        ),
        (AdaLoraConfig(init_r=4), LORA | VALUES),
        (
            LoHaConfig(r=4),
            FACTORS(["hada_w1_b", "hada_w2_b"], ["hada_w1_a", "hada_w2_a"]),
        ),
        (
            LoHaConfig(r=4, use_effective_conv2d=True),
            FACTORS(["hada_w1_b", "hada_w2_b"], ["hada_w1_a", "hada_w2_a"])
            | {("conv", f"hada_w{half}_b"): P("data") for half in (1, 2)},
        ),
        (HRAConfig(r=4), FACTORS(["hra_u"], [])),
        (LoraConfig(r=4, bias="lora_only", modules_to_save=["norm"]), LORA | WHOLE),
        (LoraConfig(r=4, rank_pattern={"layers.0.a": 2}), LORA),
    ],
    ids=["lora", "dora", "pissa", "adalora", "loha", "tucker", "hra", "whole", "ragged"],
)
def test_specs_of_every_kind_of_weight(config, want):
    assert placed(shardings_of(every(config))) == want


def test_some_layers_alone_are_on_every_device():
    config = every(LoraConfig(r=4, layers_to_transform=[0, 2, 5]))
    config = dataclasses.replace(config, target_modules=["a", "b"])
    assert abstract(config).params["layers.a"]["lora_A"].shape == (3, 8, 4)
    assert placed(shardings_of(config)) == {
        ("layers.a", "lora_B"): P(None, None, "data"),
        ("layers.b", "lora_A"): P(None, "model"),
        ("layers.b", "lora_B"): P(None, None, "data"),
    }


def test_scales_lie_along_what_they_scale():
    ins = ["conv", "dense", "layers.a", "out"]
    config = every(IA3Config(feedforward_modules=ins), exclude_modules=["table"])
    assert placed(shardings_of(config)) == {
        ("conv", "ia3_l"): P(None, None, "data"),
        ("dense", "ia3_l"): P("data"),
        ("experts", "ia3_l"): P("model"),
        ("heads", "ia3_l"): P(None, None, "model"),
        ("layers.a", "ia3_l"): P("model"),
        ("layers.b", "ia3_l"): P(None, None, "data"),
        ("out", "ia3_l"): P(None, "model"),
    }


def experts():
    """Two of one family, of other ranks and on other modules."""
    chosen = {"a": (2, ["dense", "layers.a"]), "b": (4, ["dense", "out"])}
    return {
        name: init_adapter(KEY, LoraConfig(r=r, target_modules=modules), sites())
        for name, (r, modules) in chosen.items()
    }


AHEAD = {
    ("dense", "lora_A"): P(None, "data"),
    ("dense", "lora_B"): P(None, None, "model"),
    ("layers.a", "lora_A"): P(None, "model"),
    ("layers.a", "lora_B"): P(None, "model", None, "data"),
    ("out", "lora_A"): P(None, None, "model"),
    ("out", "lora_B"): P(None, None, "data"),
}


def test_experts_lie_along_an_axis_before_all_others():
    bank = stack_adapters(experts(), capacity=4)
    assert placed(shardings_of(None, bank.adapter)) == AHEAD
    assert placed(shardings_of(None, bank.rows(["a", None]))) == AHEAD
    assert placed(shardings_of(None, bank.mix([0.3, 0.7, 0, 0]))) == AHEAD
    kernels = LoHaConfig(r=8, use_effective_conv2d=True, target_modules=["conv"])
    bank = stack_adapters({"a": init_adapter(KEY, kernels, sites())}, capacity=3)
    assert bank.adapter.params["conv"]["hada_w1_b"].shape == (3, 8, 8)
    assert placed(shardings_of(None, bank.adapter)) == {
        ("conv", f"hada_w{half}_{part}"): P(None, *spec)
        for half in (1, 2)
        for part, spec in {"a": (None, "model"), "b": ("data",)}.items()
    }


def test_a_classifier_is_on_every_device():
    def decoder(params, ids):
        x = jnp.tanh(params["table"][ids] @ params["inner"])
        return x @ params["head"]

    params = {"table": normal(16, 8), "inner": normal(8, 8), "head": normal(8, 16)}
    specs = {"table": P("data"), "inner": P("data", "model"), "head": P(None, "model")}
    found = find_sites(decoder, params, jnp.zeros((2, 3), jnp.int32))
    both = {
        name: init_adapter(KEY, LoraConfig(r=r, target_modules=["inner"]), found)
        for name, r in (("a", 2), ("b", 4))
    }
    config = XLoraConfig(xlora_depth=2, xlora_size=8, use_trainable_adapters=True)
    mixture = init_xlora(KEY, config, both, found)
    assert mixture.params["xlora_classifier"]
    with jax.set_mesh(mesh_of()):
        state = adapter_shardings(init_train_state(mixture, optax.adam(1e-3)), specs)
    assert placed(state) == {
        ("inner", "lora_A"): P(None, "data"),
        ("inner", "lora_B"): P(None, None, "model"),
    }


def like_params(shardings, tree):
    """Whether a part of an optimizer's state lies as the params do."""
    chex.assert_trees_all_equal_structs(tree, shardings.adapter.params)
    return jax.tree.leaves(tree) == jax.tree.leaves(shardings.adapter.params)


CHAIN = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@pytest.mark.parametrize(
    ("optimizer", "averages"),
    [
        (CHAIN, lambda state: (state[1][0].mu, state[1][0].nu)),
        (
            optax.MultiSteps(CHAIN, 3),
            lambda state: (state.acc_grads, state.inner_opt_state[1][0].mu),
        ),
        (
            optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9),
            lambda s: (s.inner_state[0].trace,),
        ),
    ],
    ids=["adamw", "multisteps", "momentum"],
)
def test_an_optimizer_lies_as_its_adapter(optimizer, averages):
    adapter = abstract(every(LoraConfig(r=4, bias="lora_only", modules_to_save=["norm"])))
    state = jax.eval_shape(lambda a: init_train_state(a, optimizer, KEY), adapter)
    shardings = shardings_of(None, state)
    chex.assert_trees_all_equal_structs(shardings, state)
    assert placed(shardings.adapter) == LORA | WHOLE
    assert shardings.step.spec == shardings.key.spec == P()
    assert all(like_params(shardings, tree) for tree in averages(shardings.opt_state))


def test_an_optimizer_of_some_arrays_alone():
    adapter = abstract(every(LoraConfig(r=4)))
    only = {m: {name: name == "lora_B" for name in own} for m, own in adapter.params.items()}
    optimizer = optax.masked(optax.adam(1e-3), only)
    state = jax.eval_shape(optimizer.init, adapter.params)
    _, shardings = shardings_of(None, (adapter, state))
    want = {key: spec for key, spec in LORA.items() if key[1] == "lora_B"}
    assert placed(shardings.inner_state[0].mu) == placed(shardings.inner_state[0].nu) == want


def test_an_optimizer_that_keeps_rows_and_columns():
    """Their shapes are not the arrays', so they are on every device."""
    adapter = abstract(every(LoraConfig(r=4)))
    optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=4)
    state = jax.eval_shape(optimizer.init, adapter.params)
    factored = {key for key, leaf in by_name(state[0].v).items() if leaf.shape == (1,)}
    assert ("dense", "lora_A") in factored
    _, shardings = shardings_of(None, (adapter, state))
    assert placed(shardings[0].v_row) == placed(shardings[0].v_col) == {}
    assert placed(shardings[0].v) == {k: spec for k, spec in LORA.items() if k not in factored}


def by_name(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {(keys[-2].key, keys[-1].key): leaf for keys, leaf in flat}


def test_the_averages_of_the_rank_allocator():
    fields = {"total_step": 9, "target_modules": ["dense", "a"]}
    adapter = init_adapter(KEY, AdaLoraConfig(init_r=4, target_r=2, **fields), sites())
    state = init_train_state(adapter, rank_allocator(optax.adam(1e-3), adapter))
    shardings = shardings_of(None, state)
    own = shardings.opt_state
    for tree in (own.sensitivity, own.uncertainty, own.inner[0].mu, own.inner[0].nu):
        assert like_params(shardings, tree)
    for leaf in jax.tree.leaves((own.kept, own.budget, own.step)):
        assert leaf.spec == P()


DENSE = {("dense", "lora_A"): P("data"), ("dense", "lora_B"): P(None, "model")}
SMALL = LoraConfig(r=4, target_modules=["dense"])


def spelled(mesh):
    """Ways to say where params lie that need no ``jax.set_mesh``."""
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    likes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes(), where
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes())
    half_said = jax.device_put(zeros["dense"]["kernel"], where["dense"]["kernel"])
    return where, likes, jax.device_put(zeros, where), {"dense": {"kernel": half_said, "b": None}}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_ways_to_say_where_the_params_lie(kind):
    mesh = mesh_of(kind=kind)
    for params in spelled(mesh):
        shardings = adapter_shardings(abstract(SMALL), params)
        assert placed(shardings) == DENSE
        assert {leaf.mesh for leaf in jax.tree.leaves(shardings)} == {mesh}
    with jax.set_mesh(mesh):
        own = adapter_shardings(abstract(SMALL), SPECS)
        assert jax.tree.all(jax.tree.map(operator.eq, own, shardings))
        replicated = {"dense": {"kernel": None}}
        assert placed(adapter_shardings(abstract(SMALL), replicated)) == {}


def test_shapes_that_were_traced_under_explicit_axes():
    """They name axes of the mesh and not its devices."""
    mesh = mesh_of(kind=AxisType.Explicit)

    def make():
        return {"dense": {"kernel": jnp.zeros((8, 16), out_sharding=P("data", "model"))}}

    with jax.set_mesh(mesh):
        likes = jax.eval_shape(make)
        shardings = adapter_shardings(abstract(SMALL), likes)
    assert placed(shardings) == DENSE
    assert {leaf.mesh for leaf in jax.tree.leaves(shardings)} == {mesh}
    with pytest.raises(ValueError, match=r"lie on no mesh.*jax\.set_mesh"):
        adapter_shardings(abstract(SMALL), likes)


class Linen(nn.Module):
    """One dense layer whose kernel says where it lies, by axes of the mesh or by logical names."""

    boxed: object
    names: tuple

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, kernel_init=self.boxed(nn.initializers.ones, self.names), name="dense")(
            x
        )


def linen(boxed, names):
    module = Linen(boxed, names)
    params = jax.eval_shape(module.init, KEY, X)["params"]
    config = dataclasses.replace(SMALL, target_modules=["dense"])
    found = find_sites(from_linen(module), params, X)
    return params, jax.eval_shape(lambda: init_adapter(KEY, config, found))


def test_linen_boxes():
    params, adapter = linen(nn.with_partitioning, ("data", "model"))
    assert isinstance(params["dense"]["kernel"], nn.Partitioned)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        assert placed(adapter_shardings(adapter, params)) == DENSE
        assert placed(adapter_shardings(adapter, nn.get_partition_spec(params))) == DENSE
    assert placed(adapter_shardings(adapter, nn.get_sharding(params, mesh))) == DENSE
    where = nn.get_sharding(params, mesh)
    lies = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), params), out_shardings=where
    )()
    assert isinstance(lies["dense"]["kernel"], nn.Partitioned)
    assert placed(adapter_shardings(adapter, lies)) == DENSE


def test_linen_boxes_with_logical_names():
    params, adapter = linen(nn.with_logical_partitioning, ("embed", "mlp"))
    rules = (("embed", "data"), ("mlp", "model"))
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        with nn.logical_axis_rules(rules):
            assert placed(adapter_shardings(adapter, params)) == DENSE
        with nn.logical_axis_rules((("embed", None), ("mlp", "model"))):
            got = placed(adapter_shardings(adapter, params))
        assert got == {("dense", "lora_B"): P(None, "model")}
    where = nn.logical_to_mesh_sharding(nn.get_partition_spec(params), mesh, rules)
    assert placed(adapter_shardings(adapter, where)) == DENSE


def test_linen_boxes_with_rules_of_their_own():
    def boxed(init, names):
        return nn.with_logical_partitioning(init, names, rules=(("x", "data"), ("y", "model")))

    params, adapter = linen(boxed, ("x", "y"))
    with jax.set_mesh(mesh_of()):
        assert placed(adapter_shardings(adapter, params)) == DENSE


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_nnx(kind):
    """Variables, traced or real, their specs and shardings, and the pure dict of their arrays."""
    init = nnx.with_partitioning(nnx.initializers.ones_init(), ("data", "model"))

    class Model(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0))

        def __call__(self, x):
            # The place of the result is what Explicit axes cannot guess.
            out = P() if kind is AxisType.Explicit else None
            return jnp.matmul(x, self.dense.kernel[...], out_sharding=out)

    mesh = mesh_of(kind=kind)
    with jax.set_mesh(mesh):
        state = nnx.state(Model(), nnx.Param)
        likes = nnx.state(nnx.eval_shape(Model), nnx.Param)
        apply_fn, pure = from_nnx(Model())
        found = find_sites(apply_fn, pure, X)
        adapter = jax.eval_shape(lambda: init_adapter(KEY, SMALL, found))
        spelled = [likes, state, nnx.get_partition_spec(state), nnx.get_named_sharding(state, mesh)]
        for params in [*spelled, pure]:
            assert placed(adapter_shardings(adapter, params)) == DENSE
    for params in (state, nnx.get_named_sharding(state, mesh), pure):
        assert placed(adapter_shardings(adapter, params)) == DENSE


def test_a_quantised_base():
    """Its integers lie as the weight did; their scales may lie elsewhere."""
    mesh = mesh_of()
    kernel = qwix.quantize(drawn()["dense"]["kernel"], "int8", channelwise_axes=(1,))
    place = {4: NamedSharding(mesh, P()), 1: NamedSharding(mesh, P("data", "model"))}
    kernel = jax.tree.map(lambda x: jax.device_put(x, place[x.dtype.itemsize]), kernel)
    params = {"dense": {"kernel": kernel}}
    assert placed(adapter_shardings(abstract(SMALL), params)) == DENSE
    where = jax.tree.map(lambda x: x.sharding, params)
    assert placed(adapter_shardings(abstract(SMALL), where)) == DENSE
    with jax.set_mesh(mesh):
        specs = jax.tree.map(lambda x: x.sharding.spec, params)
        assert placed(adapter_shardings(abstract(SMALL), specs)) == DENSE


def test_errors():
    adapter, mesh = abstract(SMALL), mesh_of()
    here, there = (NamedSharding(m, P()) for m in (mesh, mesh_of((8, 1))))
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match="holds one adapter, found 0"):
            adapter_shardings(adapter.params, SPECS)
        with pytest.raises(ValueError, match="holds one adapter, found 2"):
            adapter_shardings([adapter, adapter], SPECS)
        with pytest.raises(
            ValueError, match=r"^dense.kernel: the adapter adapts it, and it is not"
        ):
            adapter_shardings(adapter, {"other": P()})
        saved = abstract(LoraConfig(r=4, target_modules=["out"], modules_to_save=["norm"]))
        with pytest.raises(ValueError, match=r"^norm\.scale: the adapter adapts it"):
            adapter_shardings(saved, {"out": P()})
    with pytest.raises(ValueError, match="these params lie on no mesh: pass arrays or"):
        adapter_shardings(adapter, SPECS)
    with pytest.raises(ValueError, match="these params lie on no mesh"):
        adapter_shardings(adapter, {"dense": {"kernel": jnp.zeros((8, 16))}})
    with pytest.raises(ValueError, match=r"several meshes, dense.bias on .* and dense.kernel on "):
        adapter_shardings(adapter, {"dense": {"kernel": here, "bias": there}})


EVERY = ["conv", "dense", "experts", "heads", "a", "b", "out"]
STARTS = {
    "lora": LoraConfig(
        r=4, init_lora_weights=False, target_modules=EVERY, modules_to_save=["norm"]
    ),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["dense", "b"]),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa", target_modules=["a"]),
    "olora": LoraConfig(r=4, init_lora_weights="olora", target_modules=["heads"]),
    "loha": LoHaConfig(r=4, use_effective_conv2d=True, target_modules=["conv", "b"]),
    "adalora": AdaLoraConfig(init_r=4, target_modules=["experts", "a"]),
    "hra": HRAConfig(r=4, target_modules=["out", "b"]),
    "ia3": IA3Config(
        target_modules=["dense", "a"], feedforward_modules=["dense"], init_ia3_weights=False
    ),
}


def drawn():
    """The base, all of it drawn with std 0.3."""
    return redraw(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes()))


def start(params, names=tuple(STARTS)):
    """An adapter of every method, and what one optimizer keeps for it."""
    made = {}
    for name in names:
        config = STARTS[name]
        adapter = init_adapter(KEY, config, sites(), params)
        made[name] = init_train_state(adapter, optax.adam(1e-3), KEY)
    return made


@functools.cache
def started():
    return jax.device_get(jax.jit(lambda p: strip(start(p)))(drawn()))


def strip(made):
    """Arrays alone, as one tree."""
    return {
        name: (state.adapter.params, state.adapter.buffers, state.opt_state)
        for name, state in made.items()
    }


# What a uniform draw or a copy gives is the same to the bit; a normal one is computed from it.
EXACT = ("lora", "loha")


@pytest.mark.parametrize(
    ("shape", "kind", "names"),
    [
        ((8, 1), AxisType.Auto, tuple(STARTS)),
        ((2, 4), AxisType.Auto, tuple(STARTS)),
        ((2, 4), AxisType.Explicit, tuple(STARTS)),
        ((1, 8), AxisType.Explicit, tuple(STARTS)),
    ],
)
def test_a_start_is_the_same_on_every_mesh(shape, kind, names):
    mesh = mesh_of(shape, kind)
    params = jax.device_put(drawn(), jax.tree.map(lambda s: NamedSharding(mesh, s), SPECS))
    with jax.set_mesh(mesh):
        likes = jax.eval_shape(lambda params: start(params, names), params)
        shardings = {name: adapter_shardings(like, params) for name, like in likes.items()}
        made = jax.jit(start, static_argnums=1, out_shardings=shardings)(params, names)
    for name, state in made.items():
        for array, where in zip(*map(jax.tree.leaves, (state, shardings[name])), strict=True):
            assert array.sharding.is_equivalent_to(where, array.ndim)
    if "lora" in names:
        shards = [made["lora"].adapter.params[m]["lora_B"] for m in ("dense", "layers.b")]
        sizes = [x.addressable_shards[0].data.size for x in shards]
        assert sizes == [4 * 16 // shape[1], 8 * 4 * 8 // shape[0]]
    for name, got in strip(made).items():
        if name in EXACT:
            chex.assert_trees_all_equal(got, started()[name])
        else:
            chex.assert_trees_all_close(got, started()[name], rtol=1e-5, atol=1e-6)
