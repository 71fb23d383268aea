"""Frozen weights in fewer bits: what QLoRA does to a base, for any adapter."""

import functools
import importlib
from typing import Any, Literal

import jax

from peftjax.adapter import check_leaves
from peftjax.attach import refill
from peftjax.engine.packed import Packed
from peftjax.sites import Site, Sites
from peftjax.targeting import all_linear
from peftjax.trees import leaf_paths

QType = Literal["int8", "int4", "nf4"]
_QTYPES = ("int8", "int4", "nf4")
_BLOCK = 64


def quantize_base(params: Any, sites: Sites, qtype: QType) -> Any:
    r"""Quantises the linear weights of a frozen base.

    Every output has scales of its own: with ``int8`` one, with four bits one for every 64 inputs,
    or for the most that divide their number. ``nf4`` has the levels that suit normally distributed
    weights. A weight becomes

    .. math::
      W \approx s \odot \operatorname{level}(q)

    and is unpacked where a product needs it, once forward and once backward; neither the rest of
    the tree nor any other layer of a scanned stack is unpacked with it. ``find_sites``,
    ``init_adapter`` and ``adapt`` take the quantised params as they would the others; so does
    ``adapt(apply_fn)(params, None, ...)``, which the plain ``apply_fn`` cannot.

    On a mesh that splits weights to save memory (FSDP), a model that says where a weight is whole,
    with ``jax.lax.with_sharding_constraint`` or ``jax.reshard``, has its integers sent there;
    otherwise XLA may unpack each shard first, and send that.

    Args:
      params: the base's params.
      sites: what ``find_sites`` found in them. Those are quantised that
        ``target_modules="all-linear"`` selects: all but lookups, and the output head of a model
        that has a lookup.
      qtype: ``"int8"``, ``"int4"`` or ``"nf4"``.

    Returns:
      The params, with a ``qwix.QArray`` for each quantised weight, whose scales have the dtype that
      the weight had.

    Raises:
      ImportError: qwix is not installed.
      ValueError: another ``qtype``, other params than those of ``sites``, or one of the weights is
        quantised already.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (128, 64))}}
      >>> x = jnp.ones((2, 128))
      >>> sites = peftjax.find_sites(apply_fn, params, x)
      >>> small = peftjax.quantize_base(params, sites, "nf4")
      >>> small["dense"]["kernel"].qvalue.dtype.name, small["dense"]["kernel"].scale.shape
      ('uint4', (2, 64))
      >>> config = peftjax.LoraConfig(r=2, target_modules=["dense"])
      >>> adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
      >>> peftjax.adapt(apply_fn)(small, adapter, x).shape
      (2, 64)

    References:
      Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023,
      https://arxiv.org/abs/2305.14314
    """
    if qtype not in _QTYPES:
        raise ValueError(f"`qtype` must be one of {', '.join(_QTYPES)}, got {qtype!r}")
    try:
        qwix = importlib.import_module("qwix")
    except ImportError as error:
        raise ImportError(
            "quantize_base makes arrays of qwix: pip install 'peftjax[quant]'"
        ) from error
    chosen = tuple(filter(all_linear(sites), sites.values()))
    leaves = leaf_paths(params)
    check_leaves(leaves, Sites(chosen))
    for site in chosen:
        if isinstance(leaves[site.path], Packed):
            raise ValueError(f"{site.path} is quantised already")
    made = {site.path: _quantized(qwix, site, leaves[site.path], qtype) for site in chosen}
    return refill(params, leaves | made)


def _quantized(qwix: Any, site: Site, weight: jax.Array, qtype: QType) -> Any:
    """One weight of a site, or a stack of them, quantised."""
    whole = [*site.stack_axes, *site.out_axes]
    tiles: dict[int, int] = {}
    if qtype != "int8":
        *rest, last = site.in_axes
        whole += rest
        tiles = {last: max(n for n in range(1, _BLOCK + 1) if site.shape[last] % n == 0)}
    quantize = functools.partial(
        qwix.quantize, qtype=qtype, channelwise_axes=tuple(whole), tiled_axes=tiles
    )
    return jax.jit(quantize)(weight)
