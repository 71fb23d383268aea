"""X-LoRA: the classifier, the two passes, and where the hidden states come from."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import named, normal, redraw

from peftjax import (
    AdaLoraConfig,
    HRAConfig,
    LoHaConfig,
    LoraConfig,
    XLoraConfig,
    adapt,
    convert_to_lora,
    find_sites,
    from_linen,
    init_adapter,
    init_xlora,
    merge,
    stack_adapters,
    xlora_experts,
    xlora_layers,
    xlora_scalings,
)
from peftjax.engine.routes import RouteError

KEY = jax.random.key(4)
LAYERS, WIDTH, WORDS = 3, 8, 11
IDS = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) % WORDS


def decoder(params, ids):
    """Scanned and rematerialised layers between a table and a head."""

    def layer(x, own):
        return x + jnp.tanh(x @ own["up"]["kernel"]) @ own["down"]["kernel"], None

    x, _ = lax.scan(jax.checkpoint(layer), params["embed"]["embedding"][ids], params["layers"])
    return jnp.tanh(x) @ params["head"]["kernel"]


def decoder_params(dtype=jnp.float32):
    return {
        "embed": {"embedding": normal(WORDS, WIDTH, seed=1, std=1, dtype=dtype)},
        "layers": {
            "up": {"kernel": normal(LAYERS, WIDTH, 12, seed=2, dtype=dtype)},
            "down": {"kernel": normal(LAYERS, 12, WIDTH, seed=3, dtype=dtype)},
        },
        "head": {"kernel": normal(WIDTH, WORDS, seed=4, dtype=dtype)},
    }


lora = functools.partial(LoraConfig, lora_alpha=5, init_lora_weights=False)
CONFIGS = {
    "poems": lora(r=2, target_modules=["up", "down"]),
    "code": lora(r=3, target_modules=["up", "embed"], layers_to_transform=None),
    "law": lora(r=1, target_modules=["down", "head"]),
}


def trained(configs, sites):
    return {
        name: (adapter := init_adapter(KEY, config, sites)).replace(
            params=redraw(adapter.params, seed=20 * i)
        )
        for i, (name, config) in enumerate(configs.items())
    }


def mixture(config, params, model=decoder, configs=None, ids=IDS):
    sites = find_sites(model, params, ids)
    adapter = init_xlora(KEY, config, trained(configs or CONFIGS, sites), sites)
    # A classifier that has something to say.
    return adapter.replace(params=redraw(adapter.params, seed=90)), sites


def by_hand(adapter, params, scalings):
    """The second pass of ``decoder``, written out layer by layer; the last features too."""
    experts, layers = xlora_experts(adapter), xlora_layers(adapter)

    def change(module, layer, x):
        name = module if layer is None else f"{module}[{layer}]"
        total = 0
        for place, expert in enumerate(experts.values()):
            if module not in expert.sites:
                continue
            arrays = expert.params[module] | {"s": expert.buffers[module]["scaling"]}
            if layer is not None:
                arrays = jax.tree.map(lambda array: array[layer], arrays)
            rank = arrays["lora_A"][x] if module == "embed" else x @ arrays["lora_A"]
            gate = scalings[:, :, layers.index(name), place, None]
            total = total + gate * (arrays["s"] * rank @ arrays["lora_B"])
        return total

    x = params["embed"]["embedding"][IDS] + change("embed", None, IDS)
    for layer in range(LAYERS):
        up, down = (params["layers"][name]["kernel"][layer] for name in ("up", "down"))
        h = jnp.tanh(x @ up + change("layers.up", layer, x))
        x = x + h @ down + change("layers.down", layer, h)
    hidden = jnp.tanh(x)
    return hidden @ params["head"]["kernel"] + change("head", None, hidden), hidden


def gates_by_hand(config, scalings, weight):
    """Top-k and its softmax, one token and layer at a time."""
    kept = np.zeros_like(scalings)
    for index in np.ndindex(scalings.shape[:-1]):
        own = scalings[index]
        best = np.argsort(-own, kind="stable")[: config.top_k_lora or len(own)]
        best = best[own[best] != 0]
        values = own[best]
        if config.enable_softmax_topk and len(best):
            values = np.exp(values) / np.exp(values).sum()
        kept[index][best] = values
    return kept * weight


OPTIONS = {
    "plain": {},
    "layerwise": {"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 7},
    "topk": {"top_k_lora": 2, "softmax_temperature": 0.6, "layerwise_scalings": True},
    "softmax_topk": {"top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False},
    "passing": {"scaling_pass_value": 0.7, "global_scaling_weight": 1.3, "xlora_depth": 2},
    "passing_topk": {"scaling_pass_value": None, "top_k_lora": 2, "xlora_dropout_p": 0.0},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("option", OPTIONS)
def test_the_two_passes_written_out(option):
    config = XLoraConfig(**OPTIONS[option])
    params = decoder_params(jnp.float64)
    adapter, _ = mixture(config, params)
    config = adapter.config
    out, scalings = jax.jit(adapt(decoder, return_scalings=True))(params, adapter, IDS)

    values = adapter.buffers["xlora_classifier"]
    layers, experts = len(xlora_layers(adapter)), len(config.adapters)
    assert scalings.shape == (2, 5, layers, experts)
    passing = np.full(scalings.shape, float(values["scaling_pass_value"]))
    gates = gates_by_hand(config, passing, config.global_scaling_weight)
    _, hidden = by_hand(adapter, params, gates)
    x, classifier = jax.tree.map(np.asarray, (hidden, adapter.params["xlora_classifier"]))
    numbers = sorted({int(name.split(".")[1]) for name in classifier})
    step = 3 if config.xlora_dropout_p else 2
    assert numbers == list(range(0, step * config.xlora_depth, step))
    for number in numbers:
        x = x @ classifier[f"layers.{number}.weight"] + classifier[f"layers.{number}.bias"]
        x = np.maximum(x, 0) if number != numbers[-1] else x
    x = np.broadcast_to(x.reshape(2, 5, -1, experts), scalings.shape)
    if config.enable_softmax:
        x = np.exp(x / config.softmax_temperature)
        x = x / x.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(scalings, x, atol=1e-10)

    want, _ = by_hand(
        adapter, params, gates_by_hand(config, np.array(scalings), config.global_scaling_weight)
    )
    np.testing.assert_allclose(out, want, atol=1e-10)
    again, _ = jax.jit(xlora_scalings(decoder))(params, adapter, IDS)
    np.testing.assert_array_equal(again, scalings)
    second = jax.jit(adapt(decoder))(params, adapter.with_scalings(scalings), IDS)
    np.testing.assert_allclose(second, out, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_gradients_reach_the_classifier_alone():
    params = decoder_params(jnp.float64)
    adapter, _ = mixture(XLoraConfig(xlora_depth=2, xlora_size=6, scaling_pass_value=0.4), params)

    def loss(trainable):
        return jnp.sin(adapt(decoder)(params, adapter.replace(params=trainable), IDS)).sum()

    def written_out(trainable):
        own = adapter.replace(params=trainable)
        passing = jnp.full((2, 5, len(xlora_layers(adapter)), 3), 0.4)
        hidden = lax.stop_gradient(by_hand(adapter, params, passing)[1])
        scalings = own.config.method.gating.scalings(own, hidden)
        scalings = jnp.broadcast_to(scalings, passing.shape)
        return jnp.sin(by_hand(adapter, params, scalings)[0]).sum()

    got, want = (jax.jit(jax.grad(f))(adapter.params) for f in (loss, written_out))
    assert set(got) == {"xlora_classifier"}
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10 * np.abs(other).max())

    both, _ = mixture(XLoraConfig(use_trainable_adapters=True), params)
    slope = jax.jit(
        jax.grad(lambda own: adapt(decoder)(params, both.replace(params=own), IDS)[0].sum())
    )
    learnt = slope(both.params)
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(learnt["layers.up"]))
    assert set(learnt) == {"xlora_classifier", *both.sites}


def test_other_values_are_no_new_program():
    params = decoder_params()
    adapter, _ = mixture(XLoraConfig(), params)
    traces = []

    @jax.jit
    def run(adapter):
        traces.append(1)
        return adapt(decoder)(params, adapter, IDS)

    outs = [run(adapter)]
    for name, value in (
        ("scaling_pass_value", 0.5),
        ("global_scaling_weight", 0.0),
        ("softmax_temperature", 9.0),
    ):
        values = adapter.buffers["xlora_classifier"] | {name: jnp.float32(value)}
        outs.append(run(adapter.replace(buffers=adapter.buffers | {"xlora_classifier": values})))
    assert len(traces) == 1
    assert all(float(jnp.abs(out - outs[0]).max()) > 1e-4 for out in outs[1:])
    np.testing.assert_allclose(outs[2], decoder(params, IDS), atol=1e-5)
    fewer = dataclasses.replace(adapter.config, top_k_lora=1)
    assert float(jnp.abs(run(adapter.replace(config=fewer)) - outs[0]).max()) > 1e-4
    assert len(traces) == 2


def test_the_first_pass_runs_without_experts():
    """Scans stay scans, and where experts do not take part there is no product but the base's."""
    params = decoder_params()
    adapter, _ = mixture(XLoraConfig(), params)
    jaxpr = jax.make_jaxpr(adapt(decoder))(params, adapter, IDS)
    (choice,) = named(jaxpr, "cond")
    plain, mixed = choice.params["branches"]
    products = len(named(jax.make_jaxpr(decoder)(params, IDS), "dot_general"))
    assert len(named(plain, "dot_general")) == products
    assert len(named(mixed, "dot_general")) > 2 * products
    # The hidden states alone go on: the head is not needed.
    assert [var.aval.shape for var in choice.outvars] == [(2, 5, WIDTH)]
    assert [len(named(branch, "scan")) for branch in (plain, mixed)] == [1, 1]
    assert len(named(jaxpr, "scan")) == 3


def test_dropout_of_the_classifier():
    params = decoder_params()
    adapter, _ = mixture(XLoraConfig(xlora_depth=2, xlora_dropout_p=0.5), params)
    first = jax.jit(xlora_scalings(decoder))
    dry = first(params, adapter, IDS)[0]
    wet = [first(params, adapter.train(jax.random.key(seed)), IDS)[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(wet[0], wet[1])
    assert float(jnp.abs(wet[0] - wet[2]).max()) > 1e-3
    assert float(jnp.abs(wet[0] - dry).max()) > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, alpha=5, target_modules=["up", "embed"]),
        AdaLoraConfig(init_r=3, lora_alpha=5, target_modules=["up", "embed"]),
    ],
    ids=["loha", "adalora"],
)
def test_experts_of_other_families(config):
    params = decoder_params()
    sites = find_sites(decoder, params, IDS)
    experts = trained({"a": config, "b": config}, sites)
    plain = {name: convert_to_lora(expert) for name, expert in experts.items()}
    got, want = (
        adapt(decoder)(params, init_xlora(KEY, XLoraConfig(), each, sites), IDS)
        for each in (experts, plain)
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_experts_come_out_as_they_went_in():
    params = decoder_params()
    sites = find_sites(decoder, params, IDS)
    experts = trained(CONFIGS, sites)
    for trains in (False, True):
        config = XLoraConfig(use_trainable_adapters=trains)
        adapter = init_xlora(KEY, config, experts, sites)
        again = xlora_experts(adapter)
        assert list(again) == list(experts)
        for name, expert in experts.items():
            assert again[name].sites == expert.sites
            assert jax.tree.structure(again[name]) == jax.tree.structure(expert)
            for one, other in zip(
                jax.tree.leaves(again[name]), jax.tree.leaves(expert), strict=True
            ):
                np.testing.assert_array_equal(one, other)


class TestHiddenStates:
    """The input of the output head, wherever it is, for every token."""

    @pytest.fixture
    def params(self):
        return decoder_params()

    def check(self, model, params, hidden_states=None):
        """The scalings are those of ``decoder``, whose hidden states are the same."""
        adapter, _ = mixture(XLoraConfig(), params)
        if hidden_states is None:
            (head,) = [
                site.path for site in find_sites(model, params, IDS).values() if site.is_head
            ]
            adapter = adapter.replace(config=dataclasses.replace(adapter.config, head=head))
        want, _ = xlora_scalings(decoder)(params, adapter, IDS)
        got, _ = xlora_scalings(model, hidden_states=hidden_states)(params, adapter, IDS)
        np.testing.assert_allclose(got, want, atol=1e-5)

    def body(self, params, ids):
        return decoder(params | {"head": {"kernel": jnp.eye(WIDTH)}}, ids)

    def test_inside_jit_and_remat_and_with_a_bias(self, params):
        params["head"]["bias"] = normal(WORDS)

        @jax.jit
        @jax.checkpoint
        def head(own, x):
            return (x @ own["kernel"]).astype(jnp.float32) / 2 + own["bias"][None, None]

        self.check(lambda p, ids: head(p["head"], self.body(p, ids)), params)

    def test_inside_a_scan_over_chunks_of_the_sequence(self, params):
        def model(params, ids):
            chunks = jnp.swapaxes(self.body(params, ids).reshape(2, 5, 1, WIDTH), 0, 1)
            out = lax.map(lambda x: x @ params["head"]["kernel"], chunks)
            return jnp.swapaxes(out, 0, 1).reshape(2, 5, WORDS)

        self.check(model, params)

    def test_flattened_and_on_the_other_side(self, params):
        def flattened(params, ids):
            x = self.body(params, ids).reshape(-1, WIDTH)
            return (x @ params["head"]["kernel"]).reshape(2, 5, WORDS)

        def other_side(params, ids):
            out = jnp.einsum("dv,bsd->vbs", params["head"]["kernel"], self.body(params, ids))
            return jnp.transpose(out, (1, 2, 0))

        self.check(flattened, params)
        self.check(other_side, params)

    def test_of_the_last_token_alone_after_the_head(self, params):
        self.check(lambda params, ids: decoder(params, ids)[:, -1], params)

    def test_said_by_the_caller(self, params):
        def model(params, ids):
            hidden = self.body(params, ids)
            return jax.nn.softmax(hidden @ params["head"]["kernel"]), hidden

        self.check(model, params, hidden_states=lambda out: out[1])

    def test_a_tied_head(self, params):
        def model(params, ids):
            return self.body(params, ids) @ params["embed"]["embedding"].T

        adapter, _ = mixture(
            XLoraConfig(), params, model, {name: CONFIGS[name] for name in ("poems", "code")}
        )
        assert adapter.config.head == "embed.embedding"
        out, scalings = adapt(model, return_scalings=True)(params, adapter, IDS)
        assert out.shape == (2, 5, WORDS)
        want, _ = xlora_scalings(
            lambda params, ids: (model(params, ids), self.body(params, ids)),
            hidden_states=lambda out: out[1],
        )(params, adapter, IDS)
        np.testing.assert_allclose(scalings, want, atol=1e-6)

    def test_what_does_not_show_them(self, params):
        adapter, _ = mixture(XLoraConfig(), params)

        def pooled(params, ids):
            return self.body(params, ids).mean(1) @ params["head"]["kernel"]

        def hidden_away(params, ids):
            return jax.nn.softmax(decoder(params, ids))

        def last(params, ids):
            return self.body(params, ids)[:, -1:] @ params["head"]["kernel"]

        for model, message in (
            (pooled, r"shape \(2, 8\).*pooled.*hidden_states="),
            (hidden_away, "does not show it.*hidden_states="),
        ):
            with pytest.raises(ValueError, match=message):
                adapt(model)(params, adapter, IDS)
        with pytest.raises(RouteError, match=r"tokens of shape \(2, 1\).*before its output head"):
            adapt(last)(params, adapter, IDS)
        headless = adapter.replace(config=dataclasses.replace(adapter.config, head=None))
        with pytest.raises(ValueError, match="no output head"):
            adapt(hidden_away)(params, headless, IDS)
        with pytest.raises(ValueError, match=r"has to give an array.*|hidden_states= gave"):
            adapt(decoder, hidden_states=lambda out: out[0])(params, adapter, IDS)


def test_convolutions_and_flattened_tokens():
    """Tokens along one axis of a convolution, and along batch x sequence."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(WORDS, WIDTH, name="embed")(ids)
            x = jnp.tanh(nn.Conv(WIDTH, (3,), feature_group_count=2, name="conv")(x))
            x = nn.Dense(WIDTH, name="flat")(x.reshape(-1, WIDTH)).reshape(x.shape)
            return nn.Dense(WORDS, name="head")(x)

    module = Model()
    params = redraw(module.init(KEY, IDS)["params"])
    model = from_linen(module)
    sites = find_sites(model, params, IDS)
    targets = ["conv", "flat", "embed"]
    experts = trained(
        {n: lora(r=r, target_modules=targets) for n, r in (("a", 2), ("b", 3))}, sites
    )
    adapter = init_xlora(KEY, XLoraConfig(layerwise_scalings=True), experts, sites)
    weights = jax.nn.softmax(normal(3, 2, seed=5, std=2))  # of each layer and expert
    scalings = jnp.broadcast_to(weights, (2, 5, 3, 2))
    got = adapt(model)(params, adapter.with_scalings(scalings), IDS)
    by_layer = {
        name: adapter.buffers[name]["scaling"] * weights[int(adapter.buffers[name]["place"])]
        for name in targets
    }
    scaled = {
        expert: own.replace(
            buffers={
                name: own.buffers[name] | {"scaling": by_layer[name][place]} for name in targets
            }
        )
        for place, (expert, own) in enumerate(experts.items())
    }
    want = model(merge(params, list(scaled.values())), IDS)
    np.testing.assert_allclose(got, want, atol=1e-5)
    # A token's weights stay with it: another token's change nothing of it before the convolution.
    ids = adapt(
        lambda p, ids: p["embed"]["embedding"][ids] @ p["flat"]["kernel"], on_unused="ignore"
    )
    one = ids(params, adapter.with_scalings(scalings.at[0, 3].set(0)), IDS)
    two = ids(params, adapter.with_scalings(scalings), IDS)
    changed = jnp.abs(one - two).max(-1) > 1e-6
    assert changed.tolist() == (jnp.zeros((2, 5), bool).at[0, 3].set(True)).tolist()


class TestMistakes:
    @pytest.fixture
    def made(self):
        params = decoder_params()
        sites = find_sites(decoder, params, IDS)
        return params, sites, trained(CONFIGS, sites)

    def test_in_the_config(self):
        for fields, message in (
            ({"xlora_depth": 0}, "`xlora_depth`"),
            ({"top_k_lora": 0}, "`top_k_lora`"),
            ({"softmax_temperature": 0.0}, "`softmax_temperature`"),
            ({"xlora_dropout_p": 1.0}, "`xlora_dropout_p`"),
            ({"target_modules": ["up"]}, "what its experts adapt"),
        ):
            with pytest.raises(ValueError, match=message):
                XLoraConfig(**fields)
        with pytest.warns(UserWarning, match="without `top_k_lora`"):
            XLoraConfig(enable_softmax_topk=True, enable_softmax=False)
        with pytest.warns(UserWarning, match="flattens them"):
            XLoraConfig(enable_softmax_topk=True, top_k_lora=1)

    def test_in_the_experts(self, made):
        _, sites, experts = made
        for config, own, message in (
            (XLoraConfig(top_k_lora=4), experts, "`top_k_lora` is 4, and there are 3 experts"),
            (XLoraConfig(adapters={"a": "x"}), experts, "names a, and the experts are poems"),
            (
                XLoraConfig(),
                trained({"a": HRAConfig(r=2, target_modules=["up"])}, sites),
                "HRAConfig.*no sums",
            ),
            (
                XLoraConfig(),
                {"a": init_xlora(KEY, XLoraConfig(), experts, sites)},
                "mixture of experts itself",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                init_xlora(KEY, config, own, sites)
        with pytest.raises(ValueError, match="init_xlora"):
            init_adapter(KEY, dataclasses.replace(XLoraConfig()), sites)

    @pytest.mark.parametrize(
        "field",
        [
            {"target_modules": ["up"]},
            {"exclude_modules": ["up"]},
            {"layers_to_transform": [0]},
            {"modules_to_save": ["head"]},
        ],
        ids=lambda field: next(iter(field)),
    )
    def test_what_the_experts_say(self, field):
        with pytest.raises(ValueError, match=f"experts adapt: leave `{next(iter(field))}` out"):
            XLoraConfig(**field)

    def test_in_the_shapes(self, made):
        params, sites, experts = made
        adapter = init_xlora(KEY, XLoraConfig(), experts, sites)
        wrong = init_xlora(KEY, XLoraConfig(hidden_size=9), experts, sites)
        with pytest.raises(ValueError, match="`hidden_size` is 9, and the hidden states have 8"):
            adapt(decoder)(params, wrong, IDS)
        scalings, _ = xlora_scalings(decoder)(params, adapter, IDS)
        with pytest.raises(ValueError, match="3 experts"):
            adapter.with_scalings(scalings[..., :2])
        with pytest.raises(ValueError, match="8 layers"):
            adapter.with_scalings(scalings[:, :, :4])
        with pytest.raises(RouteError, match=r"tokens of shape \(1, 5\)"):
            adapt(decoder)(params, adapter.with_scalings(scalings[:1]), IDS)
        del adapter.params["xlora_classifier"]
        with pytest.raises(ValueError, match="xlora_classifier"):
            adapt(decoder)(params, adapter, IDS)

    def test_in_the_calls(self, made):
        params, sites, experts = made
        adapter = init_xlora(KEY, XLoraConfig(), experts, sites)
        with pytest.raises(ValueError, match="no merged weight"):
            merge(params, adapter)
        with pytest.raises(ValueError, match="two X-LoRA"):
            adapt(decoder)(params, [adapter, adapter], IDS)
        for call in (adapt(decoder, return_scalings=True), xlora_scalings(decoder)):
            with pytest.raises(ValueError, match="X-LoRA adapter"):
                call(params, experts["law"], IDS)
        with pytest.raises(ValueError, match="only an X-LoRA adapter has scalings"):
            experts["law"].with_scalings(jnp.ones((2, 5, 1, 3)))
        with pytest.raises(ValueError, match="mixture of experts itself"):
            stack_adapters({"a": adapter})
