"""Decoding with a cache, against runs over the whole sequence without one."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import redraw

from peftjax import (
    LoraConfig,
    XLoraConfig,
    adapt,
    find_sites,
    from_linen,
    from_nnx,
    generate,
    init_adapter,
    init_xlora,
    stack_adapters,
    xlora_scalings,
)

BATCH, WIDTH, HEADS, LAYERS, WORDS, ROOM = 3, 8, 2, 2, 13, 12
HEAD = WIDTH // HEADS
PROMPT, NEW = 4, 6
IDS = jnp.asarray(np.random.default_rng(0).integers(WORDS, size=(BATCH, PROMPT)), jnp.int32)
KEY = jax.random.key(5)


def attended(q, k, v, start):
    """Attention of (batch, length, heads, features) from the position ``start`` on."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5
    places = start + jnp.arange(q.shape[1])
    seen = jnp.arange(k.shape[1])[None] <= places[:, None]
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def written(cached, new, start):
    return lax.dynamic_update_slice(cached, new, (0, start, 0, 0))


class Layer(nn.Module):
    """Heads as axes of their own, and a cache in the collection ``cache``."""

    decode: bool = False

    @nn.compact
    def __call__(self, x, start):
        q, k, v = (nn.DenseGeneral((HEADS, HEAD), name=name)(x) for name in "qkv")
        if self.decode:
            zeros = functools.partial(jnp.zeros, (x.shape[0], ROOM, HEADS, HEAD))
            kept = [self.variable("cache", f"cached_{name}", zeros) for name in "kv"]
            for variable, new in zip(kept, (k, v), strict=True):
                variable.value = written(variable.value, new, start)
            k, v = (variable.value for variable in kept)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="o")(attended(q, k, v, start))
        return x + nn.Dense(WIDTH, name="down")(jnp.tanh(nn.Dense(10, name="up")(x))), None


class Scanned(nn.Module):
    """Layers in one scanned stack, and a tied head."""

    decode: bool = False

    @nn.compact
    def __call__(self, ids):
        start = jnp.int32(0)
        if self.decode:
            place = self.variable("cache", "place", lambda: jnp.int32(0))
            start = place.value
            place.value = start + ids.shape[1]
        embed = nn.Embed(WORDS, WIDTH, name="embed")
        x = embed(ids) + nn.Embed(ROOM, WIDTH, name="where")(start + jnp.arange(ids.shape[1]))[None]
        stack = nn.scan(
            Layer,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=LAYERS,
        )
        x, _ = stack(self.decode, name="layers")(x, start)
        return embed.attend(nn.LayerNorm(name="norm")(x))


class Block(nnx.Module):
    """Heads split by a reshape, and a cache in variables."""

    def __init__(self, rngs, room):
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.o = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 10, rngs=rngs)
        self.down = nnx.Linear(10, WIDTH, rngs=rngs)
        self.kept = room and nnx.Cache(jnp.zeros((2, *room, HEADS, HEAD)))

    def __call__(self, x, start):
        q, k, v = jnp.split(self.qkv(x).reshape(*x.shape[:2], 3 * HEADS, HEAD), 3, axis=2)
        if self.kept is not None:
            new = jnp.stack([k, v])
            self.kept[...] = lax.dynamic_update_slice(self.kept[...], new, (0, 0, start, 0, 0))
            k, v = self.kept[...]
        x = x + self.o(attended(q, k, v, start).reshape(x.shape))
        return x + self.down(jnp.tanh(self.up(x)))


class Listed(nnx.Module):
    """A list of layers; ``room`` is (batch, length) of the cache."""

    def __init__(self, room=None):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs, room) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, WORDS, use_bias=False, rngs=rngs)
        self.place = room and nnx.Cache(jnp.int32(0))

    def __call__(self, ids):
        start = jnp.int32(0)
        if self.place is not None:
            start = self.place[...]
            self.place[...] = start + ids.shape[1]
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, start)
        return self.head(x)


TRACES = []


def plain(params, ids, cache=None):
    """One layer; single tokens are squeezed, and the head reads a row for each of them."""
    TRACES.append(ids.shape)
    start = jnp.int32(0) if cache is None else cache["place"]
    x = params["embed"][ids] + params["where"][start + jnp.arange(ids.shape[1])][None]
    single = ids.shape[1] == 1
    y = x[:, 0] if single else x
    q, k, v = (jnp.einsum("...i,ihd->...hd", y, params["attention"][name]) for name in "qkv")
    q, k, v = (each[:, None] if single else each for each in (q, k, v))
    if cache is not None:
        k, v = (written(cache[name], new, start) for name, new in (("k", k), ("v", v)))
        cache = {"k": k, "v": v, "place": start + ids.shape[1]}
    out = attended(q, k, v, start)
    x = x + jnp.einsum("bqhd,hdo->bqo", out, params["attention"]["o"])
    x = x + jnp.tanh(x.reshape(-1, WIDTH) @ params["up"]).reshape(*ids.shape, -1) @ params["down"]
    logits = x @ params["head"]
    return logits if cache is None else (logits, cache)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model with and without its cache, and the modules to adapt."""

    full: Callable[..., Any]
    step: Callable[..., Any]
    params: Any
    cache: Callable[[int], Any]
    modules: tuple[str, ...]

    @functools.cached_property
    def sites(self):
        return find_sites(self.full, self.params, IDS)


class Attending(nn.Module):
    """Flax's own attention, which takes one token at a time once it has a cache."""

    decode: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(WORDS, WIDTH, name="embed")(ids)
        mask = None if self.decode else nn.make_causal_mask(ids)
        attention = nn.MultiHeadDotProductAttention(HEADS, decode=self.decode, name="attention")
        x = x + attention(x, mask=mask)
        return nn.Dense(WORDS, name="head")(jnp.tanh(x))


def empty(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def linen_decoder(kind, seed, modules):
    params = redraw(jax.eval_shape(kind().init, KEY, IDS)["params"], seed=seed)
    module = kind(decode=True)

    def step(params, ids, cache):
        return module.apply({"params": params, **cache}, ids, mutable=["cache"])

    def cache(batch):
        room = jnp.zeros((batch, ROOM), jnp.int32)
        return {"cache": empty(jax.eval_shape(module.init, KEY, room)["cache"])}

    return Decoder(from_linen(kind()), step, params, cache, modules)


def nnx_decoder():
    full, params = from_nnx(nnx.eval_shape(Listed))
    stateful, _ = from_nnx(nnx.eval_shape(lambda: Listed((BATCH, ROOM))))

    def step(params, ids, cache):
        return stateful(params, ids, state=cache)

    modules = ("qkv", "down", "embed", "head")
    params = redraw(params, seed=60)
    return Decoder(full, step, params, lambda batch: empty(stateful.state), modules)


def plain_decoder():
    shapes = {
        "attention": {
            **dict.fromkeys("qkv", (WIDTH, HEADS, HEAD)),
            "o": (HEADS, HEAD, WIDTH),
        },
        "embed": (WORDS, WIDTH),
        "where": (ROOM, WIDTH),
        "up": (WIDTH, 10),
        "down": (10, WIDTH),
        "head": (WIDTH, WORDS),
    }
    zeros = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))

    def cache(batch):
        empty = jnp.zeros((batch, ROOM, HEADS, HEAD))
        return {"k": empty, "v": empty, "place": jnp.int32(0)}

    modules = ("v", "o", "up", "embed", "head")
    return Decoder(plain, plain, redraw(zeros, seed=80), cache, modules)


lora = functools.partial(LoraConfig, lora_alpha=5, init_lora_weights=False)
MAKERS = {
    "linen": lambda: linen_decoder(Scanned, 30, ("k", "o", "up", "embed")),
    "flax": lambda: linen_decoder(Attending, 40, ("key", "out", "head")),
    "nnx": nnx_decoder,
    "plain": plain_decoder,
}


@functools.cache
def decoder(name):
    return MAKERS[name]()


@functools.cache
def experts(model):
    own = decoder(model)
    configs = {
        "all": lora(r=2, target_modules=list(own.modules)),
        "some": lora(r=3, target_modules=list(own.modules[1:])),
    }

    def made():
        return {name: init_adapter(KEY, each, own.sites) for name, each in configs.items()}

    # All is drawn again, so that only the scales need be computed.
    scales = jax.jit(lambda: {name: each.buffers for name, each in made().items()})()
    return {
        name: each.replace(params=redraw(each.params, seed=20 * i), buffers=scales[name])
        for i, (name, each) in enumerate(jax.eval_shape(made).items())
    }


def mixture(model, **options):
    adapter = init_xlora(KEY, XLoraConfig(**options), experts(model), decoder(model).sites)
    return adapter.replace(params=redraw(adapter.params, seed=90))


def with_passing(adapter, value):
    """The mixture with another scaling of its first pass, which is an array."""
    values = adapter.buffers["xlora_classifier"] | {"scaling_pass_value": jnp.float32(value)}
    return adapter.replace(buffers={**adapter.buffers, "xlora_classifier": values})


def drawn(logits, place, temperature=0.5, key=KEY, top_k=None):
    """A token as ``generate`` says that it draws one."""
    if top_k is not None:
        order = np.argsort(np.argsort(-logits, axis=-1), axis=-1)
        logits = jnp.where(order < top_k, logits, -jnp.inf)
    return jax.random.categorical(jax.random.fold_in(key, place), logits / temperature)


SAMPLED = {"temperature": 0.5, "key": KEY}


def likeliest(logits, place):
    return logits.argmax(axis=-1)


@functools.cache
def uncached_run(model, scalings):
    return jax.jit(adapt(decoder(model).full, return_scalings=scalings))


def uncached(model, adapter, *, scalings=False, choose=drawn):
    """Each token out of a run over all before it; and its logits, and all scalings if wanted."""
    own, run = decoder(model), uncached_run(model, scalings)
    ids, tokens, every = np.zeros((BATCH, PROMPT + NEW - 1), np.int32), [], []
    ids[:, :PROMPT] = IDS
    # What comes later is not seen, so that one program serves all lengths.
    for place in range(NEW):
        out = run(own.params, adapter, ids)
        logits, weights = out if scalings else (out, None)
        every.append(np.asarray(logits[:, PROMPT + place - 1]))
        tokens.append(np.asarray(choose(every[-1], place)))
        ids[:, PROMPT + place : PROMPT + place + 1] = tokens[-1][:, None]
    return np.stack(tokens, axis=1), np.stack(every, axis=1), weights


def decoded(model, adapter, **options):
    own = decoder(model)
    options = {"max_new_tokens": NEW, **SAMPLED, **options}
    return generate(own.step, own.params, adapter, IDS, own.cache(BATCH), **options)


def test_with_an_adapter():
    adapter = experts("nnx")["all"]
    out = decoded("nnx", adapter)
    np.testing.assert_array_equal(out, uncached("nnx", adapter)[0])
    assert out.dtype == IDS.dtype


def test_without_an_adapter():
    out = decoded("plain", None)
    np.testing.assert_array_equal(out, uncached("plain", None)[0])
    assert (out != decoded("plain", experts("plain")["all"])).any()


@pytest.mark.parametrize("model", ["linen", "plain"])
def test_every_row_with_its_own_adapter(model):
    known = experts(model)
    bank = stack_adapters(known)
    out = decoded(model, bank.rows(["some", None, "all"]))
    np.testing.assert_array_equal(out, uncached(model, bank.rows(["some", None, "all"]))[0])
    if model == "plain":
        for row, adapter in enumerate([known["some"], None, known["all"]]):
            np.testing.assert_array_equal(out[row], decoded(model, adapter)[row])
        count = len(TRACES)
        other = decoded(model, bank.rows(["all", "some", "some"]))
        np.testing.assert_array_equal(other[1], decoded(model, known["some"])[1])
        assert len(TRACES) == count


OPTIONS = {
    "linen": {"layerwise_scalings": True, "xlora_size": 5, "xlora_depth": 2},
    "nnx": {"scaling_pass_value": 0.7},
    "plain": {"top_k_lora": 1, "layerwise_scalings": True},
}


@pytest.mark.parametrize("model", OPTIONS)
def test_both_passes_of_xlora_with_a_cache(model):
    adapter = mixture(model, **OPTIONS[model])
    for passing in (0.0, 0.7):
        own = with_passing(adapter, passing)
        tokens, scalings = decoded(model, own, return_scalings=True)
        want, _, weights = uncached(model, own, scalings=True)
        np.testing.assert_array_equal(tokens, want)
        assert scalings.shape == weights.shape
        np.testing.assert_allclose(scalings, weights, atol=1e-5)
        assert np.ptp(scalings, axis=1).max() > 0.01


def test_logits_of_both_passes():
    """Step by step, as ``generate`` runs it, on tokens that are given."""
    model, adapter = decoder("plain"), mixture("plain", **OPTIONS["plain"])
    adapter = with_passing(adapter, 0.7)

    @jax.jit
    def steps(adapter, ids):
        def step(caches, token):
            first = xlora_scalings(model.step)
            scalings, (_, passing) = first(model.params, adapter, token[:, None], caches[0])
            own = adapter.with_scalings(scalings)
            logits, cache = adapt(model.step)(model.params, own, token[:, None], caches[1])
            return (passing, cache), logits[:, 0]

        return lax.scan(step, (model.cache(BATCH), model.cache(BATCH)), ids.T)[1]

    ids = np.random.default_rng(1).integers(WORDS, size=(BATCH, PROMPT + NEW - 1), dtype=np.int32)
    want, _ = uncached_run("plain", True)(model.params, adapter, ids)
    np.testing.assert_allclose(jnp.moveaxis(steps(adapter, ids), 0, 1), want, atol=1e-5)


class TestChoice:
    def test_greedy(self):
        # A key is of no use without a temperature.
        out = decoded("plain", None, temperature=0.0)
        np.testing.assert_array_equal(out, uncached("plain", None, choose=likeliest)[0])

    def test_of_the_likeliest_alone(self):
        choose = functools.partial(drawn, temperature=2.0, top_k=3)
        want, logits, _ = uncached("plain", None, choose=choose)
        got = decoded("plain", None, temperature=2.0, top_k=3)
        np.testing.assert_array_equal(got, want)
        ranks = np.argsort(np.argsort(-logits, axis=-1), axis=-1)
        chosen = np.take_along_axis(ranks, want[..., None], axis=-1)
        assert set(chosen.ravel().tolist()) == {0, 1, 2}

    def test_the_same_key_draws_the_same(self):
        one, again = (decoded("plain", None, temperature=5.0) for _ in range(2))
        other = decoded("plain", None, temperature=5.0, key=jax.random.key(6))
        np.testing.assert_array_equal(one, again)
        assert (one != other).any()

    def test_of_equal_ones_the_first(self):
        def level(params, ids, cache):
            return params["head"][ids], cache

        head = jnp.array([[0, 3, 1, 3, 3, 2.0]] * 6)
        options = {"max_new_tokens": 40, "temperature": 1.0, "key": KEY}
        for top_k, want in ((1, {1}), (2, {1, 3}), (3, {1, 3, 4}), (9, {0, 1, 2, 3, 4, 5})):
            out = generate(level, {"head": head}, None, IDS[:1, :1], {}, top_k=top_k, **options)
            assert set(out.ravel().tolist()) <= want
            assert {1, 3, 4} & want <= set(out.ravel().tolist())

    @pytest.mark.parametrize("top_k", [None, 3])
    def test_next_to_no_temperature_is_none(self, top_k):
        want = decoded("plain", None, temperature=0.0)
        run = functools.partial(decoded, "plain", None, top_k=top_k)
        np.testing.assert_array_equal(run(temperature=1e-39), want)
        traced = jax.jit(lambda temperature: run(temperature=temperature))
        np.testing.assert_array_equal(traced(0.0), want)

    def test_a_row_ends(self):
        free = decoded("plain", None)
        end = int(free[0, 2])
        for ends, pad in ((end, 77), ([end, int(free[1, 0])], None)):
            out = decoded("plain", None, eos_token_id=ends, pad_token_id=pad)
            ends = [end] if pad else ends
            for row, want in zip(np.asarray(out), np.asarray(free), strict=True):
                last = min((list(want).index(e) for e in ends if e in want), default=NEW)
                np.testing.assert_array_equal(row[: last + 1], want[: last + 1])
                assert (row[last + 1 :] == (end if pad is None else pad)).all()


def test_other_arrays_are_no_new_program():
    adapter = experts("plain")["all"]
    decoded("plain", adapter)
    count = len(TRACES)
    scales = {m: {n: 2 * x for n, x in own.items()} for m, own in adapter.buffers.items()}
    other = adapter.replace(params=redraw(adapter.params, seed=3), buffers=scales)
    decoded("plain", other, temperature=0.7, key=jax.random.key(9))
    decoded("plain", adapter, temperature=jnp.float32(2))
    model = decoder("plain")
    params = redraw(model.params, seed=5)
    options = {"max_new_tokens": NEW, **SAMPLED}
    generate(model.step, params, adapter, IDS[::-1], model.cache(BATCH), **options)
    assert len(TRACES) == count

    # A temperature that is traced counts as one above 0.
    run = functools.partial(decoded, "plain", adapter)
    out = jax.eval_shape(lambda temperature: run(temperature=temperature), 0.5)
    assert out.shape == (BATCH, NEW)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32"])
def test_prompts_of_narrow_integers(dtype):
    """The vocabulary may have more tokens than they can count."""

    def next_one(params, ids, cache):
        return params["head"]["kernel"][ids], cache

    params = {"head": {"kernel": jnp.roll(jnp.eye(300), 100, axis=1)}}
    out = generate(
        next_one, params, None, jnp.array([[7, 20]], dtype), {}, max_new_tokens=4, eos_token_id=299
    )
    assert out.tolist() == [[120, 220, 20, 120]]
    assert out.dtype == ("uint32" if dtype == "uint32" else "int32")
    listed = generate(next_one, params, None, [[7, 20]], {}, max_new_tokens=4)
    np.testing.assert_array_equal(listed, out)


def capped(params, ids, cache):
    """The plain model with a cap on its logits, which gives its hidden states too."""
    hidden, cache = plain({**params, "head": jnp.eye(WIDTH)}, ids, cache)
    return 3 * jnp.tanh(hidden @ params["head"] / 3), cache, hidden


def third(out):
    return out[2]


def test_hidden_states_said_by_the_caller():
    """A cap leaves the likeliest what they are, but the head's result is no logits any more."""
    model, adapter = decoder("plain"), mixture("plain")
    options = {"max_new_tokens": NEW, "return_scalings": True}
    run = functools.partial(
        generate, capped, model.params, adapter, IDS, model.cache(BATCH), **options
    )
    got, scalings = run(hidden_states=third)
    want, weights = decoded("plain", adapter, temperature=0.0, return_scalings=True)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(scalings, weights, atol=1e-5)
    with pytest.raises(ValueError, match=r"return \(logits, cache\), got 3 values"):
        run()

    def logits_alone(params, ids, cache):
        return capped(params, ids, cache)[:2]

    with pytest.raises(ValueError, match="hidden_states="):
        generate(logits_alone, model.params, adapter, IDS, model.cache(BATCH), **options)


def test_rows_that_the_shapes_do_not_tell():
    def time_major(params, ids, total):
        h = jnp.tanh(params["embed"][ids.T].reshape(-1, WIDTH) @ params["up"])
        h = jnp.swapaxes(h.reshape(*ids.T.shape, -1), 0, 1)
        sums = total["sum"] + jnp.cumsum(h, axis=1)
        return sums @ params["head"], {"sum": sums[:, -1:]}

    params = {name: decoder("plain").params[name] for name in ("embed", "up", "head")}
    cache = {"sum": jnp.zeros((BATCH, 1, 10))}
    params["head"] = redraw(jnp.zeros((10, WORDS)))
    sites = find_sites(time_major, params, IDS, cache)
    made = init_adapter(KEY, lora(r=2, target_modules=["up"]), sites)
    known = {name: made.replace(params=redraw(made.params, seed=i)) for i, name in enumerate("ab")}
    run = functools.partial(generate, time_major, params, max_new_tokens=NEW, **SAMPLED)
    bank = stack_adapters(known)
    got = run(bank.rows(["b", None, "a"]), IDS, cache, batch_axes=(0, {"sum": 0}))
    want = [run(adapter, IDS, cache) for adapter in (known["b"], None, known["a"])]
    np.testing.assert_array_equal(got, jnp.stack([out[i] for i, out in enumerate(want)]))


def test_a_vocabulary_that_is_split():
    """Under Explicit axes; the rows stay split as they were."""

    def summed(params, ids, total):
        h = params["embed"].at[ids].get(out_sharding=rows)
        sums = total + jnp.cumsum(h, axis=1)
        return jnp.matmul(sums, params["head"]), sums[:, -1:]

    params = redraw({"embed": jnp.zeros((16, 4)), "head": jnp.zeros((4, 16))})
    args = jnp.array([[1, 2, 3], [4, 5, 6]]), jnp.zeros((2, 1, 4))
    options = {"max_new_tokens": 5, "temperature": 2.0, "key": KEY, "top_k": 3}
    rows = None
    want = generate(lambda *args: summed(*args), params, None, *args, **options)
    rows = P("data", None, None)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        where = {"embed": P(), "head": P(None, "model")}, (P("data", None), P("data", None, None))
        params, args = jax.device_put(
            (params, args), jax.tree.map(functools.partial(NamedSharding, mesh), where)
        )
        got = generate(lambda *args: summed(*args), params, None, *args, **options)
    np.testing.assert_array_equal(jax.device_get(got), want)


def test_token_by_token():
    adapter = mixture("flax", scaling_pass_value=0.7)
    tokens, scalings = decoded("flax", adapter, token_by_token=True, return_scalings=True)
    want, _, weights = uncached("flax", adapter, scalings=True)
    np.testing.assert_array_equal(tokens, want)
    np.testing.assert_allclose(scalings, weights, atol=1e-5)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
            ({"temperature": 0.5, "key": None}, "pass key=, a PRNG key"),
            ({"temperature": -1.0}, "temperature must be 0 or more"),
            ({"temperature": float("nan")}, "0 or more, and finite, got nan"),
            ({"temperature": float("inf")}, "0 or more, and finite, got inf"),
            ({"top_k": 0}, "top_k must be 1 or more"),
            ({"eos_token_id": {1, 2}}, r"a token or a sequence of them, got \{1, 2\}"),
            ({"eos_token_id": 2.0}, "a token or a sequence of them, got 2.0"),
            ({"eos_token_id": [[1, 2]]}, "a token or a sequence of them"),
            ({"pad_token_id": 0}, "follows an eos_token_id, and there is none"),
            ({"return_scalings": True}, "needs an X-LoRA adapter"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            decoded("plain", None, **options)

    @pytest.mark.parametrize("ids", [IDS[0], IDS[:, :0], jnp.ones((2, 3))])
    def test_prompts(self, ids):
        model = decoder("plain")
        with pytest.raises(ValueError, match=r"integers of shape \(batch, length\)"):
            generate(model.step, model.params, None, ids, model.cache(BATCH), max_new_tokens=1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda logits, cache: logits, r"return \(logits, cache\), got an array"),
            (lambda logits, cache: (logits, cache, 1), "got 3 values"),
            (lambda logits, cache: (logits[:, -1], cache), r"last position alone, got \(3, 13\)"),
            (lambda logits, cache: (logits[:, :2], cache), r"got \(3, 2, 13\)"),
            (
                lambda logits, cache: (logits, cache | {"k": cache["k"][:, 1:]}),
                r"\['k'\] from float32\[3, 12, 2, 4\] to float32\[3, 11, 2, 4\]",
            ),
            (
                lambda logits, cache: (logits, cache | {"more": logits}),
                r"\['more'\] from nothing to float32",
            ),
        ],
    )
    @pytest.mark.parametrize("adapted", [False, True])
    def test_models(self, change, message, adapted):
        model = decoder("plain")

        def step(params, ids, cache):
            return change(*model.step(params, ids, cache))

        adapter = experts("plain")["all"] if adapted else None
        with pytest.raises(ValueError, match=message):
            generate(step, model.params, adapter, IDS, model.cache(BATCH), max_new_tokens=2)

    def test_the_last_position_alone(self):
        model = decoder("plain")

        def step(params, ids, cache):
            logits, cache = model.step(params, ids, cache)
            return logits[:, -1:], cache

        cache = model.cache(BATCH)
        out = generate(step, model.params, None, IDS, cache, max_new_tokens=1, **SAMPLED)
        np.testing.assert_array_equal(out, decoded("plain", None)[:, :1])

    def test_a_head_that_reads_the_last_token_alone(self):
        """X-LoRA cannot do with that, except where there is but one token."""
        model, adapter = decoder("plain"), mixture("plain")

        def step(params, ids, cache):
            hidden, cache = model.step({**params, "head": jnp.eye(WIDTH)}, ids, cache)
            return hidden[:, -1:] @ params["head"], cache

        run = functools.partial(generate, step, model.params, adapter, IDS, model.cache(BATCH))
        with pytest.raises(ValueError, match=r"shape \(3, 1\) for ids of shape \(3, 4\)"):
            run(max_new_tokens=NEW)
        whole = jax.eval_shape(lambda: run(max_new_tokens=NEW, token_by_token=True))
        assert whole.shape == (BATCH, NEW)
