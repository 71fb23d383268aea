"""Adapters on disk: what goes in comes out, and what does not fit is refused by name."""

import dataclasses
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import peftjax
from peftjax import checkpoint
from peftjax.adapter import Adapter


def apply_fn(params: dict[str, Any], x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["up"]["kernel"])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"][None]


def adapter_of(
    width: int = 6, rank: int = 2, targets: tuple[str, ...] = ("up", "down"), alpha: int = 5
) -> Adapter:
    keys = jax.random.split(jax.random.key(3), 2)
    params = {
        "up": {"kernel": jax.random.normal(keys[0], (4, width))},
        "down": {"kernel": jax.random.normal(keys[1], (width, 5)), "bias": jnp.zeros(5)},
    }
    sites = peftjax.find_sites(apply_fn, params, jnp.ones((3, 4)))
    config = peftjax.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    return peftjax.init_adapter(jax.random.key(0), config, sites, params)


def mixture_of(order: tuple[str, ...] = ("poems", "code"), **fields: Any) -> Adapter:
    """An X-LoRA adapter, with experts in an order of their own."""
    made = {"poems": adapter_of(rank=3), "code": adapter_of(targets=("up",))}
    experts = {name: made[name] for name in order}
    config = peftjax.XLoraConfig(hidden_size=6, **fields)
    return peftjax.init_xlora(jax.random.key(1), config, experts, made["poems"].sites)


def trained(adapter: Adapter) -> Adapter:
    """The adapter with other numbers than it was made with."""
    return adapter.replace(params=jax.tree.map(lambda array: array + 0.5, adapter.params))


def assert_same(found: Adapter, expected: Adapter) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_round_trip(tmp_path: Path) -> None:
    adapter = trained(adapter_of())
    place = checkpoint.save_adapter(tmp_path / "adapter", adapter)
    assert_same(checkpoint.restore_adapter(place, adapter_of()), adapter)


def test_what_is_known_of_a_site_comes_back(tmp_path: Path) -> None:
    """How a convolution moves its kernel too."""

    def upsampled(params: dict[str, Any], x: jax.Array) -> jax.Array:
        return jax.lax.conv_transpose(x, params["up"]["kernel"], (2,), "SAME")

    params = {"up": {"kernel": jnp.ones((3, 4, 5))}}
    sites = peftjax.find_sites(upsampled, params, jnp.ones((2, 6, 4)))
    config = peftjax.LoraConfig(r=2, lora_alpha=5, target_modules=["up"])
    adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
    assert adapter.sites["up"].spread
    checkpoint.save_adapter(tmp_path, adapter)
    assert_same(checkpoint.restore_adapter(tmp_path), adapter)


def test_shapes_are_enough_to_restore(tmp_path: Path) -> None:
    adapter = trained(adapter_of())
    checkpoint.save_adapter(tmp_path, adapter)
    like = jax.eval_shape(adapter_of)
    assert_same(checkpoint.restore_adapter(tmp_path, like), adapter)


def test_half_precision_comes_back(tmp_path: Path) -> None:
    adapter = adapter_of()
    adapter = adapter.replace(
        params=jax.tree.map(lambda array: array.astype(jnp.bfloat16), adapter.params)
    )
    checkpoint.save_adapter(tmp_path, adapter)
    assert_same(checkpoint.restore_adapter(tmp_path, adapter), adapter)


def test_sharding_of_like_is_the_sharding_of_the_result(tmp_path: Path) -> None:
    adapter = adapter_of()
    checkpoint.save_adapter(tmp_path, adapter)
    there = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    like = adapter.replace(params=jax.device_put(adapter.params, there))
    found = checkpoint.restore_adapter(tmp_path, like)
    assert all(leaf.sharding == there for leaf in jax.tree.leaves(found.params))


def test_saving_again_replaces_and_leaves_the_rest(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.save_adapter(tmp_path, adapter_of())
    adapter = trained(adapter_of())
    checkpoint.save_adapter(tmp_path, adapter)
    assert_same(checkpoint.restore_adapter(tmp_path, adapter_of()), adapter)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_saving_on_and_on_leaves_one_adapter(tmp_path: Path) -> None:
    adapter = adapter_of()
    for n in range(3):
        adapter = trained(adapter)
        checkpoint.save_adapter(tmp_path, adapter)
        assert_same(checkpoint.restore_adapter(tmp_path), adapter)
        assert listed(tmp_path) == ["adapter.json", "arrays-2" if n % 2 else "arrays"]


@pytest.mark.parametrize("end", ["arrays", "text", "names"])
def test_a_save_that_ends_early_leaves_the_old_adapter(
    tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, new = adapter_of(), trained(adapter_of(rank=3))
    checkpoint.save_adapter(tmp_path, adapter)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    places = {
        "arrays": (ocp.StandardCheckpointer, "wait_until_finished"),
        "text": (Path, "write_text"),
        "names": (Path, "replace"),
    }
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(*places[end], full)
            with pytest.raises(OSError, match="No space"):
                checkpoint.save_adapter(tmp_path, new)
        assert_same(checkpoint.restore_adapter(tmp_path), adapter)
    checkpoint.save_adapter(tmp_path, new)
    assert_same(checkpoint.restore_adapter(tmp_path), new)
    assert listed(tmp_path) == ["adapter.json", "arrays-2"]


def test_a_config_that_is_no_json_loses_nothing(tmp_path: Path) -> None:
    adapter = adapter_of()
    checkpoint.save_adapter(tmp_path, adapter)
    config = dataclasses.replace(adapter.config, target_modules=lambda site: True)
    with pytest.raises((TypeError, ValueError)):
        checkpoint.save_adapter(tmp_path, dataclasses.replace(adapter, config=config))
    assert_same(checkpoint.restore_adapter(tmp_path), adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sites: sites[0].update(in_axes=[7]), "axes of down are not those of its shape"),
        (lambda sites: sites[0].update(tap_axes=[7]), "axes of down are not those of its shape"),
        (lambda sites: sites[0].update(layers=[9]), r"down has no layers \(9,\) in its shape"),
        (lambda sites: sites.pop(0), "its sites and its arrays differ: down"),
        (lambda sites: sites.clear(), "its sites and its arrays differ: down, up"),
    ],
)
def test_sites_that_cannot_be_are_no_adapter(tmp_path: Path, change: Any, message: str) -> None:
    checkpoint.save_adapter(tmp_path, adapter_of())
    path = tmp_path / "adapter.json"
    said = json.loads(path.read_text())
    change(said["sites"])
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=f"adapter.json does not say .*{message}"):
        checkpoint.restore_adapter(tmp_path)


@pytest.mark.parametrize("gone", ["_METADATA", "manifest.ocdbt", "."])
def test_half_an_adapter_is_said_to_be(tmp_path: Path, gone: str) -> None:
    checkpoint.save_adapter(tmp_path, adapter_of())
    path = tmp_path / "arrays" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for like in (None, adapter_of()):
        with pytest.raises(ValueError, match=r"arrays.*: save the adapter again"):
            checkpoint.restore_adapter(tmp_path, like)


def test_arrays_without_a_name_are_no_adapter(tmp_path: Path) -> None:
    checkpoint.save_adapter(tmp_path, adapter_of())
    (tmp_path / "adapter.json").unlink()
    for like in (None, adapter_of()):
        with pytest.raises(FileNotFoundError, match=r"no adapter.json, so its save did not end"):
            checkpoint.restore_adapter(tmp_path, like)


def test_buckets_are_for_the_checkpointer() -> None:
    with pytest.raises(ValueError, match="AdapterCheckpointer saves into buckets"):
        checkpoint.save_adapter("gs://bucket/adapter", adapter_of())
    with pytest.raises(ValueError, match="AdapterCheckpointer saves into buckets"):
        checkpoint.restore_adapter("gs://bucket/adapter")


def test_config_lies_beside_the_arrays(tmp_path: Path) -> None:
    adapter = adapter_of()
    checkpoint.save_adapter(tmp_path, adapter)
    found = json.loads((tmp_path / "adapter.json").read_text())["config"]
    assert found["r"] == 2
    assert found["lora_alpha"] == 5


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (lambda: adapter_of(width=7), r"another model: down is .*\[6, 5\].* and .*\[7, 5\]"),
        (lambda: adapter_of(rank=3), r"another config: r is 2 in it and 3 here"),
        (lambda: adapter_of(targets=("up",)), r"another config: target_modules is"),
        (lambda: adapter_of(alpha=7), r"another config: lora_alpha is 5 in it and 7 here"),
    ],
)
def test_another_adapter_is_refused_by_name(tmp_path: Path, like: Any, message: str) -> None:
    checkpoint.save_adapter(tmp_path, adapter_of())
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.restore_adapter(tmp_path, like())
    assert "init_adapter" in str(caught.value)


@pytest.mark.parametrize("missing", ["in it", "here"])
def test_a_missing_module_is_named(tmp_path: Path, missing: str) -> None:
    adapter = adapter_of()
    half = adapter.replace(params={"up": adapter.params["up"]})
    saved, like = (half, adapter) if missing == "in it" else (adapter, half)
    checkpoint.save_adapter(tmp_path, saved)
    message = "has no 'params/down/" if missing == "in it" else "also has 'params/down/"
    with pytest.raises(ValueError, match=message):
        checkpoint.restore_adapter(tmp_path, like)


def test_another_shape_by_hand_is_named(tmp_path: Path) -> None:
    adapter = adapter_of()
    checkpoint.save_adapter(tmp_path, adapter)
    up = adapter.params["up"] | {"lora_A": adapter.params["up"]["lora_A"][:, :1]}
    with pytest.raises(ValueError, match=r"'params/up/lora_A' has shape \(4, 2\) in"):
        checkpoint.restore_adapter(tmp_path, adapter.replace(params=adapter.params | {"up": up}))


def scanned(params: dict[str, Any], x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])[0]


def test_what_only_the_config_tells_apart_is_refused(tmp_path: Path) -> None:
    """The arrays have the same shapes and mean something else."""
    params = {"layers": {"kernel": jnp.ones((4, 4, 4))}}
    sites = peftjax.find_sites(scanned, params, jnp.ones((2, 4)))
    lora = {"r": 2, "target_modules": ["layers"]}
    hra = {"r": 2, "target_modules": ["layers"], "apply_GS": True}
    for saved, other, differing in (
        (peftjax.HRAConfig(**hra), peftjax.HRAConfig(**hra | {"apply_GS": False}), "apply_GS"),
        (
            peftjax.LoraConfig(**lora, layers_to_transform=[0, 1]),
            peftjax.LoraConfig(**lora, layers_to_transform=[2, 3]),
            "layers_to_transform",
        ),
    ):
        adapter, like = (
            peftjax.init_adapter(jax.random.key(0), config, sites, params)
            for config in (saved, other)
        )
        checkpoint.save_adapter(tmp_path, adapter)
        with pytest.raises(ValueError, match=f"is of another config: {differing} is"):
            checkpoint.restore_adapter(tmp_path, like)
        assert_same(checkpoint.restore_adapter(tmp_path, adapter), adapter)


def test_a_model_in_half_precision_is_the_same(tmp_path: Path) -> None:
    checkpoint.save_adapter(tmp_path, adapter_of())
    like = adapter_of()
    half = tuple(
        dataclasses.replace(site, dtype=np.dtype(jnp.bfloat16)) for site in like.sites.sites
    )
    like = dataclasses.replace(like, sites=dataclasses.replace(like.sites, sites=half))
    assert checkpoint.restore_adapter(tmp_path, like).sites == like.sites


def test_what_is_not_adapted_is_not_forgotten(tmp_path: Path) -> None:
    """Names in PEFT's files must not mean it."""

    def queries(params: dict[str, Any], x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["query"]["kernel"]) @ params["dec"]["query"]["kernel"]

    params = {"query": {"kernel": jnp.ones((4, 4))}, "dec": {"query": {"kernel": jnp.ones((4, 4))}}}
    sites = peftjax.find_sites(queries, params, jnp.ones((2, 4)))
    config = peftjax.LoraConfig(r=2, target_modules="query")
    adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
    found = checkpoint.restore_adapter(checkpoint.save_adapter(tmp_path / "adapter", adapter))
    assert found.sites.others == adapter.sites.others
    for name, each in (("before", adapter), ("after", found)):
        peftjax.save_pretrained(tmp_path / name, each)
        assert list(peftjax.load_pretrained(tmp_path / name, sites).sites) == ["query"]
    before, after = (tmp_path / name / "adapter_config.json" for name in ("before", "after"))
    assert before.read_text() == after.read_text()


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    adapter = adapter_of()
    checkpoint.save_adapter(tmp_path, adapter)
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), adapter.params)
    with pytest.raises(ValueError, match=r"is float32 .* bfloat16 is expected"):
        checkpoint.restore_adapter(tmp_path, adapter.replace(params=half))


def test_an_empty_directory_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="save_adapter"):
        checkpoint.restore_adapter(tmp_path, adapter_of())


def test_nothing_is_logged_as_a_warning(tmp_path: Path) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.WARNING)
    for name in (None, "absl"):
        logging.getLogger(name).addHandler(handler)
    try:
        checkpoint.save_adapter(tmp_path, adapter_of())
        checkpoint.restore_adapter(tmp_path, adapter_of())
    finally:
        for name in (None, "absl"):
            logging.getLogger(name).removeHandler(handler)
    assert stream.getvalue() == ""


def test_an_adapter_comes_back_without_its_model(tmp_path: Path) -> None:
    adapter = trained(adapter_of())
    checkpoint.save_adapter(tmp_path, adapter)
    assert_same(checkpoint.restore_adapter(tmp_path), adapter)


def test_stacks_whole_leaves_and_empty_arrays_come_back_without_a_model(tmp_path: Path) -> None:
    params = {"layers": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.zeros((3, 4))}}

    def scanned(params: dict[str, Any], x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, own: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ own["kernel"] + own["bias"][None]), None

        return jax.lax.scan(layer, x, params["layers"])[0]

    sites = peftjax.find_sites(scanned, params, jnp.ones((2, 4)))
    config = peftjax.AdaLoraConfig(
        init_r=2,
        target_modules=["layers"],
        layers_to_transform=[0, 2],
        bias="all",
        rank_pattern={"layers.lora_E": [[False, False], [False, False]]},
    )
    adapter = peftjax.init_adapter(jax.random.key(0), config, sites, params)
    checkpoint.save_adapter(tmp_path, adapter)
    found = checkpoint.restore_adapter(tmp_path)
    assert_same(found, adapter)
    assert found.params["layers"]["lora_E"].shape == (2, 0)


@pytest.mark.parametrize("broken", ["{", "[]", '{"sites": [{"name": 1}]}'])
def test_a_broken_structure_is_no_adapter(tmp_path: Path, broken: str) -> None:
    checkpoint.save_adapter(tmp_path, adapter_of())
    (tmp_path / "adapter.json").write_text(broken)
    with pytest.raises(ValueError, match=r"adapter.json does not say what the adapter is"):
        checkpoint.restore_adapter(tmp_path)
    checkpoint.save_adapter(tmp_path, adapter_of())
    assert_same(checkpoint.restore_adapter(tmp_path), adapter_of())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 3},
        {"use_trainable_adapters": True, "scaling_pass_value": None},
    ],
)
def test_a_mixture_of_experts_comes_back(tmp_path: Path, fields: dict[str, Any]) -> None:
    adapter = trained(mixture_of(**fields))
    checkpoint.save_adapter(tmp_path, adapter)
    for found in (
        checkpoint.restore_adapter(tmp_path, mixture_of(**fields)),
        checkpoint.restore_adapter(tmp_path),
    ):
        assert_same(found, adapter)
        assert tuple(found.config.adapters) == ("poems", "code")
        for name, expert in peftjax.xlora_experts(adapter).items():
            assert_same(peftjax.xlora_experts(found)[name], expert)
        assert peftjax.xlora_layers(found) == peftjax.xlora_layers(adapter)


def test_a_mixture_in_another_order_is_refused(tmp_path: Path) -> None:
    checkpoint.save_adapter(tmp_path, mixture_of())
    with pytest.raises(ValueError, match=r"adapters is \['poems', 'code'\] in it and"):
        checkpoint.restore_adapter(tmp_path, mixture_of(("code", "poems")))


def test_a_mixture_without_its_experts_is_no_adapter(tmp_path: Path) -> None:
    checkpoint.save_adapter(tmp_path, mixture_of())
    path = tmp_path / "adapter.json"
    structure = json.loads(path.read_text())
    del structure["experts"]
    path.write_text(json.dumps(structure))
    with pytest.raises(ValueError, match=r"KeyError: 'experts'"):
        checkpoint.restore_adapter(tmp_path)
