"""The contract: every adapter method on every model of the zoo, against merging.

``apply_fn(merge(params, adapter), ...)`` is the oracle. A new method is a new row of METHODS, a new
way of using a weight is a new case of the zoo.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from models import EverythingConfig
from zoo import CASES, Case, Expected

from peftjax import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    ModuleNames,
    Sites,
    adapt,
    find_sites,
    init_adapter,
    load_pretrained,
    merge,
    save_pretrained,
    unmerge,
)
from peftjax.targeting import select_sites

KEY = jax.random.key(2)


class Method(NamedTuple):
    """One row of the contract.

    Attributes:
      name: names the method in test ids.
      config: a config for given ``target_modules``.
      accepts: whether the method can be used on a site.
      identity: whether an adapter changes nothing at the start.
      everywhere: whether it runs on every case, or on one of each kind.
      seldom: whether it is another start of a row above, or does what such rows do in another
        way, and runs on few kinds.
      invertible: whether the merged weights hold what it takes to unmerge them.
      std: of the numbers drawn for an adapter; a product of many small ones would vanish.
      layouts: whether PEFT has the method.
    """

    name: str
    config: Callable[..., Any]
    accepts: Callable[[Expected], bool] = lambda site: True
    identity: bool = True
    everywhere: bool = False
    seldom: bool = False
    invertible: bool = True
    std: float = 0.3
    layouts: bool = True


# alpha never equals r: a forgotten scale must show.
lora = functools.partial(LoraConfig, r=3, lora_alpha=5)

loha = functools.partial(LoHaConfig, r=2, alpha=5)
hra = functools.partial(HRAConfig, r=4)

METHODS = [
    Method("lora", lora),
    Method("lora_pissa", functools.partial(lora, init_lora_weights="pissa"), seldom=True),
    Method(
        "lora_bias",
        functools.partial(lora, lora_bias=True, use_rslora=True),
        accepts=lambda site: site.bias is not None,
    ),
    Method(
        "lora_gaussian",
        functools.partial(lora, init_lora_weights="gaussian", use_rslora=True),
        seldom=True,
    ),
    # No method of its own, but every part of the factors at once.
    Method("everything", EverythingConfig, identity=False, everywhere=True, layouts=False),
    Method("dora", functools.partial(lora, use_dora=True), invertible=False),
    Method(
        "dora_olora",
        functools.partial(lora, use_dora=True, init_lora_weights="olora"),
        invertible=False,
        seldom=True,
    ),
    Method("loha", functools.partial(loha, r=1), std=0.6),
    Method("loha_fused", functools.partial(loha, r=6), std=0.6),
    Method(
        "loha_core",
        functools.partial(loha, use_effective_conv2d=True),
        accepts=lambda site: site.kind == "conv",
        std=1,
    ),
    Method(
        "adalora", functools.partial(AdaLoraConfig, init_r=3, target_r=2, lora_alpha=5), seldom=True
    ),
    Method("hra", hra),
    Method("hra_gs", functools.partial(hra, apply_GS=True), seldom=True),
    Method("ia3", functools.partial(IA3Config, feedforward_modules=[]), seldom=True),
    Method("ia3_feedforward", functools.partial(IA3Config, feedforward_modules=".*")),
]

# One of each kind of site and of each framework: where a method runs that need not run on every
# case. The row that does uses every part of the factors.
KINDS = {
    "linen_dense",
    "linen_grouped_conv",
    "linen_tied_embedding",
    "linen_scan_axis1_remat",
    "nnx_scan_remat",
    "haiku_conv",
    "equinox_conv",
    "einsum_attention",
    "moe_ragged_dot",
    "vmap_members",
}
HALF_KINDS = {"haiku_conv", "nnx_scan_remat"}
FILE_KINDS = {"haiku_conv", "nnx_scan_remat"}
# What is left of each for a method that runs on few.
FEW_KINDS = {"linen_dense", "haiku_conv", "nnx_scan_remat"}


def few(kinds: set[str]) -> set[str]:
    """The kinds on which a method runs that does what others do."""
    return FEW_KINDS if kinds is KINDS else {"haiku_conv"}


def rows(everywhere: Callable[[Method], bool], kinds: set[str]) -> list[Any]:
    return [
        pytest.param(method, case, id=f"{method.name}-{case.name}")
        for method in METHODS
        for case in CASES
        if any(map(method.accepts, case.sites.values()))
        if everywhere(method) or case.name in (few(kinds) if method.seldom else kinds)
    ]


class Numbers(NamedTuple):
    """What one adapter makes of a model, on both ways."""

    base: Any
    adapted: Any
    adapted_slope: Any
    merged: Any
    merged_slope: Any
    merged_params: Any
    unmerged_params: Any


def normal(tree: Any, std: float) -> Any:
    """Arrays of a tree's shapes; always the same ones."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(std * rng.normal(size=x.shape), x.dtype), tree)


def cast(tree: Any, dtype: Any) -> Any:
    def one(leaf):
        # In NumPy, which compiles nothing.
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(np.asarray(leaf).astype(dtype)) if floating else leaf

    return jax.tree.map(one, tree)


def error(got: Any, want: Any) -> float:
    """The largest difference of two trees, relative to the largest value of the second."""
    got, want = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (got, want)
    )
    assert np.isfinite(want).all()
    return np.abs(got - want).max() / np.abs(want).max()


def prepare(method: Method, case: Case, dtype: Any):
    """A model, and the method's adapter for it."""
    apply_fn, params, args = case.build(jax.random.key(1), dtype)
    targets = case.targets
    if not all(method.accepts(site) for site in case.sites.values()):
        names = {name for name, site in case.sites.items() if method.accepts(site)}
        targets = lambda site: site.name in names  # noqa: E731
    sites = find_sites(apply_fn, params, *args)
    config = method.config(target_modules=targets)
    return apply_fn, params, args, init_adapter(KEY, config, sites, params)


def differentiate(case: Case, function: Callable[[Any], Any], trainable: Any) -> tuple[Any, Any]:
    """Outputs of a function, and their derivative in every trainable number."""
    if case.autodiff == "forward":
        return jax.jvp(function, (trainable,), (normal(trainable, 1),))

    def projection(trainable):
        outputs = function(trainable)
        products = jax.tree.map(lambda x, w: jnp.sum(x * w), outputs, normal(outputs, 1))
        return sum(jax.tree.leaves(products)), outputs

    slope, outputs = jax.grad(projection, has_aux=True)(trainable)
    return outputs, slope


def comparison(method: Method, case: Case, apply_fn: Callable[..., Any]) -> Callable[..., Numbers]:
    """All that one row compares, in one function that may be traced once."""
    adapted = adapt(apply_fn)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def compare(params, adapter, args):
        def on_the_fly(trainable):
            return adapted(params, adapter.replace(params=trainable), *args)

        def by_merging(trainable):
            return apply_fn(merge(params, adapter.replace(params=trainable)), *args)

        merged_params = merge(params, adapter)
        return Numbers(
            apply_fn(params, *args),
            *differentiate(case, on_the_fly, adapter.params),
            *differentiate(case, by_merging, adapter.params),
            merged_params,
            unmerge(merged_params, adapter) if method.invertible else params,
        )

    # chex counts by source line, and every row has this one.
    chex.clear_trace_counter()
    return compare


def primitives(jaxpr: Any) -> set[str]:
    inner = [jex.jaxprs_in_params(eqn.params) for eqn in jaxpr.eqns]
    own = {eqn.primitive.name for eqn in jaxpr.eqns}
    return own.union(*(primitives(getattr(one, "jaxpr", one)) for some in inner for one in some))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sites(case):
    # In half precision even the casts of a mixed-precision model are in its trace.
    with case.rules():
        apply_fn, *inputs = case.build(jax.random.key(0), jnp.bfloat16)
        params, args = jax.eval_shape(lambda: inputs)
        missing = set(case.contains) - primitives(jax.make_jaxpr(apply_fn)(params, *args).jaxpr)
        assert not missing, "the case is not what it says it is"
        sites = find_sites(apply_fn, params, *args)
    found = {
        name: Expected(s.kind, s.in_axes, s.out_axes, s.stack_axes, s.bias, s.groups)
        for name, s in sites.items()
    }
    assert found == case.sites
    reasons = {name: [use.fallback for use in uses if use.fallback] for name, uses in sites.uses}
    assert {name for name, some in reasons.items() if some} == case.fallback, reasons


def check(method: Method, case: Case, dtype: Any, tolerance: float):
    """Holds an adapter against merging, as it starts and with every trainable number drawn."""
    apply_fn, params, args, adapter = prepare(method, case, dtype)
    compare = comparison(method, case, apply_fn)

    start = compare(params, adapter, args)
    if method.identity:
        assert error(start.adapted, start.base) < tolerance
    assert error(start.adapted_slope, start.merged_slope) < tolerance

    drawn = compare(params, adapter.replace(params=normal(adapter.params, method.std)), args)
    assert error(drawn.adapted, drawn.merged) < tolerance
    assert error(drawn.adapted_slope, drawn.merged_slope) < tolerance
    assert error(drawn.adapted, drawn.base) > 0.05, "an adapter that does nothing agrees too"
    # What is left of a weight is what rounding left of the sum.
    scale = error(drawn.merged_params, params) + 1
    assert error(drawn.unmerged_params, params) < tolerance * scale
    return compare, adapter


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("method", "case"), rows(lambda method: method.everywhere, KINDS))
def test_double_precision(method, case):
    with case.rules():
        check(method, case, jnp.float64, 1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["linen_conv2d", "linen_tied_embedding", "linen_scan_axis1_remat"])
def test_a_sequence_of_every_method(name):
    """Each sees the weight as those before it left it, and all of them learn at once."""
    (case,) = (case for case in CASES if case.name == name)
    order = ["ia3_feedforward", "dora", "hra", "loha_fused", "ia3"]
    methods = [next(m for m in METHODS if m.name == each) for each in order]
    with case.rules():
        apply_fn, params, args = case.build(jax.random.key(1), jnp.float64)
        sites = find_sites(apply_fn, params, *args)
        adapters = [
            init_adapter(KEY, m.config(target_modules=case.targets), sites, params) for m in methods
        ]
        drawn = [normal(a.params, m.std) for a, m in zip(adapters, methods, strict=True)]

        def project(function):
            def scalar(trainable):
                both = zip(adapters, trainable, strict=True)
                out = function([a.replace(params=own) for a, own in both])
                return jax.tree.reduce(jnp.add, jax.tree.map(lambda x: jnp.sin(x).sum(), out))

            return jax.jit(jax.value_and_grad(scalar))(drawn)

        got = project(lambda adapters: adapt(apply_fn)(params, adapters, *args))
        want = project(lambda adapters: apply_fn(merge(params, adapters), *args))
    for own, by_merging in zip(got, want, strict=True):
        assert error(own, by_merging) < 1e-10


# A wrong formula shows in double precision. What less of it can break is how the engine handles
# types, and the first method proves that on every case.
@pytest.mark.parametrize(("method", "case"), rows(lambda method: method is METHODS[0], HALF_KINDS))
def test_single_and_half_precision(method, case):
    with case.rules():
        compare, single = check(method, case, jnp.float32, 1e-5)

        apply_fn, params, args = case.build(jax.random.key(1), jnp.bfloat16)
        sites = select_sites(single.config, find_sites(apply_fn, params, *args))
        drawn = normal(single.params, method.std)
        adapter = single.replace(params=drawn, sites=Sites(sites.sites))
        half = comparison(method, case, apply_fn)(params, adapter, args)
        exact = compare(*cast((params, single.replace(params=drawn), args), jnp.float32))

    # One rounding is 2^-9, and a model of a few layers makes some more of it. Merging makes its
    # own, in the merged weight, so both are held against the same numbers in single precision.
    for got, merged, truth in (
        (half.adapted, half.merged, exact.merged),
        (half.adapted_slope, half.merged_slope, exact.merged_slope),
    ):
        assert error(got, truth) < max(3e-2, 2 * error(merged, truth))


# In torch every layer of a stack is a module of its own.
TORCH_NAMES = ModuleNames(
    (
        ("{*path}", "torch.{*path}"),
        ("{*path}", "torch.{*path}.{i}"),
        ("{*path}", "torch.{*path}.{i}.{j}"),
    )
)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "case"), [row for row in rows(lambda m: False, FILE_KINDS) if row.values[0].layouts]
)
def test_files_of_hugging_face(method, case, tmp_path):
    """What is written comes back: bit by bit, or what is written otherwise to the same effect."""
    with case.rules():
        apply_fn, params, args, adapter = prepare(method, case, jnp.float64)
        adapter = adapter.replace(params=normal(adapter.params, method.std))
        # PEFT has no tables for most methods, and so on: that is for the tests of those files.
        save_pretrained(tmp_path, adapter, names=TORCH_NAMES, allow_foreign=True)
        again = load_pretrained(
            tmp_path, find_sites(apply_fn, params, *args), params, names=TORCH_NAMES
        )
        if method.name == "hra_gs":
            assert error(merge(params, again), merge(params, adapter)) < 1e-10
        else:
            chex.assert_trees_all_equal(again.params, adapter.params)
            chex.assert_trees_all_equal(again.buffers, adapter.buffers)
