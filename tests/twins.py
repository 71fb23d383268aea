"""A model of every kind of module, its torch twin by hand, and PEFT's formulas in NumPy."""

import functools
import math
import re

import jax.numpy as jnp
import numpy as np
from jax import lax
from models import normal

from peftjax import ModuleNames, find_sites

NAMES = ModuleNames(
    (
        ("layers.{*rest}", "model.layers.{i}.{*rest}"),
        ("moe.{name}", "model.layers.{i}.experts.{j}.{name}"),
        ("{*rest}", "net.{*rest}"),
    )
)

# Shapes of the weights, as JAX keeps them; biases and norms behind them.
SHAPES = {
    "mlp.up.kernel": (6, 9),
    "mlp.up.bias": (9,),
    "mlp.down.kernel": (9, 5),
    "mlp.down.bias": (5,),
    "query.kernel": (6, 3, 4),
    "query.bias": (3, 4),
    "attn.wq": (6, 3, 4),
    "attn.bq": (3, 4),
    "attn.wo": (3, 4, 7),
    "conv1.kernel": (3, 6, 5),
    "conv1.bias": (5,),
    "conv2.kernel": (3, 3, 6, 5),
    "conv2.bias": (5,),
    "wide.kernel": (2, 3, 6, 5),
    "point.kernel": (1, 1, 6, 5),
    "conv3.kernel": (2, 1, 3, 6, 5),
    "grouped.kernel": (3, 3, 3, 4),
    "dilated.kernel": (3, 3, 6, 5),
    "embed.embedding": (11, 6),
    "tied.embedding": (8, 6),
    "norm.scale": (6,),
    "norm.bias": (6,),
    "layers.up.kernel": (4, 6, 9),
    "layers.up.bias": (4, 9),
    "layers.down.kernel": (4, 9, 6),
    "layers.norm.scale": (4, 6),
    "moe.wi": (2, 3, 6, 7),
    "moe.bi": (2, 3, 7),
    "moe.wo": (2, 3, 7, 6),
}

# How torch keeps the weight of a module: the axes of JAX's array in torch's order, and its shape.
TORCH = {
    "mlp.up": ((1, 0), (9, 6)),
    "mlp.down": ((1, 0), (5, 9)),
    "query": ((1, 2, 0), (12, 6)),
    "attn.wq": ((1, 2, 0), (12, 6)),
    "attn.wo": ((2, 0, 1), (7, 12)),
    "conv1": ((2, 1, 0), (5, 6, 3)),
    "conv2": ((3, 2, 0, 1), (5, 6, 3, 3)),
    "wide": ((3, 2, 0, 1), (5, 6, 2, 3)),
    "point": ((3, 2, 0, 1), (5, 6, 1, 1)),
    "conv3": ((4, 3, 0, 1, 2), (5, 6, 2, 1, 3)),
    "grouped": ((3, 2, 0, 1), (4, 3, 3, 3)),
    "dilated": ((3, 2, 0, 1), (5, 6, 3, 3)),
    "embed": ((0, 1), (11, 6)),
    "tied": ((0, 1), (8, 6)),
    "layers.up": ((1, 0), (9, 6)),
    "layers.down": ((1, 0), (6, 9)),
    "moe.wi": ((1, 0), (7, 6)),
    "moe.wo": ((1, 0), (6, 7)),
}
STACKS = {"layers": (4,), "moe": (2, 3)}


def _layer(x, own):
    h = jnp.tanh(x @ own["up"]["kernel"] + own["up"]["bias"][None])
    return (x + h @ own["down"]["kernel"]) * own["norm"]["scale"][None], None


def _experts(x, own):
    h = jnp.tanh(jnp.einsum("ebd,edf->ebf", x, own["wi"]) + own["bi"][:, None])
    return x + jnp.einsum("ebf,efd->ebd", h, own["wo"]), None


def _convolved(x, own, dims, **options):
    y = lax.conv_general_dilated(
        x, own["kernel"], (1,) * (x.ndim - 2), "SAME", dimension_numbers=dims, **options
    )
    return y + own["bias"].reshape(*[1] * (y.ndim - 1), -1) if "bias" in own else y


def apply_fn(params, x, ids):
    """Every module once: x is (2, 6), ids are numbers below 8."""
    line, plane, space = (
        jnp.broadcast_to(x.reshape(2, *[1] * n, 6), (2, *[4] * n, 6)) for n in (1, 2, 3)
    )
    flat = ("NHWC", "HWIO", "NHWC")
    own = params["mlp"]
    h = jnp.tanh(x @ own["up"]["kernel"] + own["up"]["bias"][None])
    q = jnp.einsum("bd,dhk->bhk", x, params["query"]["kernel"]) + params["query"]["bias"][None]
    attn = params["attn"]
    mixed = jnp.einsum("bd,dhk->bhk", x, attn["wq"]) + attn["bq"][None]
    tied = params["tied"]["embedding"]
    return {
        "mlp": h @ own["down"]["kernel"] + own["down"]["bias"][None],
        "query": q * params["temperature"],
        "attn": jnp.einsum("bhk,hko->bo", jnp.tanh(mixed), attn["wo"]),
        "conv1": _convolved(line, params["conv1"], ("NWC", "WIO", "NWC")),
        "conv2": _convolved(plane, params["conv2"], flat),
        "wide": _convolved(plane, params["wide"], flat),
        "point": _convolved(plane, params["point"], flat),
        "conv3": _convolved(space, params["conv3"], ("NDHWC", "DHWIO", "NDHWC")),
        "grouped": _convolved(plane, params["grouped"], flat, feature_group_count=2),
        "dilated": _convolved(plane, params["dilated"], flat, rhs_dilation=(2, 2)),
        "embed": params["embed"]["embedding"][ids] * params["norm"]["scale"][None]
        + params["norm"]["bias"][None],
        "tied": jnp.tanh(tied[ids]) @ tied.T,
        "layers": lax.scan(_layer, x, params["layers"])[0],
        "moe": lax.scan(_experts, jnp.stack([x, -x, 2 * x]), params["moe"])[0],
    }


@functools.cache
def twin(dtype=jnp.float32):
    """The params, the arguments beside them, and the sites."""
    params = {"temperature": normal(seed=99, dtype=dtype)}
    for seed, (path, shape) in enumerate(SHAPES.items()):
        *modules, leaf = path.split(".")
        own = params
        for module in modules:
            own = own.setdefault(module, {})
        own[leaf] = normal(*shape, seed=seed, dtype=dtype)
    args = (normal(2, 6, seed=50, std=1, dtype=dtype), jnp.array([0, 5], jnp.int32))
    return params, args, find_sites(apply_fn, params, *args)


def torch_name(site, index=()):
    """Torch's name of a module, by hand."""
    if site.startswith("layers."):
        return f"model.layers.{index[0]}.{site.removeprefix('layers.')}"
    if site.startswith("moe."):
        return f"model.layers.{index[0]}.experts.{index[1]}.{site.removeprefix('moe.')}"
    return f"net.{site}"


def torch_weights(params):
    """The weights of the torch twin by the names of their modules, in double precision."""
    weights = {}
    for site, (axes, shape) in TORCH.items():
        own = functools.reduce(lambda tree, key: tree[key], site.split("."), params)
        if isinstance(own, dict):
            own = own["embedding" if "embedding" in own else "kernel"]
        for index in np.ndindex(STACKS.get(site.split(".")[0], ())):
            one = np.asarray(own, np.float64)[index]
            weights[torch_name(site, index)] = one.transpose(axes).reshape(shape)
    return weights


def pattern_value(pattern, name, default):
    """PEFT's own lookup in a ``rank_pattern`` or ``alpha_pattern``."""
    found = (v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def scale_of(config, name):
    """The scale that PEFT gives to a module."""
    if config["peft_type"] == "ADALORA":
        alpha = config["lora_alpha"] if config["lora_alpha"] > 0 else float(config["init_r"])
        return alpha / (config["init_r"] + 1e-5)
    own = "alpha" if config["peft_type"] == "LOHA" else "lora_alpha"
    rank = pattern_value(config["rank_pattern"], name, config["r"])
    alpha = pattern_value(config["alpha_pattern"], name, config[own])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def changed(config, name, weight, own):
    """What PEFT makes of a module's weight, from the file's tensors by suffix, in NumPy."""
    own = {key: np.asarray(tensor, np.float64) for key, tensor in own.items()}
    method = config["peft_type"]
    if method in ("LORA", "ADALORA", "LOHA"):
        delta = globals()[f"_{method.lower()}"](weight, own) * scale_of(config, name)
        if config.get("init_lora_weights") in ("pissa", "olora"):
            delta = delta - _start(config, name, weight)
        if "lora_magnitude_vector" not in own:
            return weight + delta
        v, is_table = weight + delta, "lora_embedding_A" in own
        others = 0 if is_table else tuple(range(1, v.ndim))
        m = own["lora_magnitude_vector"].reshape(-1)
        by_output = (1, -1) if is_table else (-1, *[1] * (v.ndim - 1))
        return v * (m / np.sqrt(np.square(v).sum(others))).reshape(by_output)
    if method == "HRA":
        u = own["hra_u"] / np.linalg.norm(own["hra_u"], axis=0)
        turned = weight.reshape(len(weight), -1)
        for column in u.T:
            turned = turned - 2 * np.outer(turned @ column, column)
        return turned.reshape(weight.shape)
    scale, inner = own["ia3_l"], is_inner(config, name)
    return weight * (scale if inner else scale.reshape(-1, *[1] * (weight.ndim - 1)))


def is_inner(config, name):
    """Whether PEFT takes a module for one that scales its inputs."""
    inner = config["feedforward_modules"]
    if isinstance(inner, str):
        return re.fullmatch(inner, name) is not None
    return any(name.endswith(each) for each in inner)


def _lora(weight, own):
    if "lora_embedding_A" in own:
        return (own["lora_embedding_B"] @ own["lora_embedding_A"]).T
    a, b = own["lora_A.weight"], own["lora_B.weight"]
    return np.tensordot(b.reshape(b.shape[:2]), a, 1).reshape(weight.shape)


def _adalora(weight, own):
    return (own["lora_B"] @ (own["lora_A"] * own["lora_E"])).reshape(weight.shape)


def _loha(weight, own):
    halves = []
    for n in (1, 2):
        a, b = own[f"hada_w{n}_a"], own[f"hada_w{n}_b"]
        core = own.get(f"hada_t{n}")
        whole = a @ b if core is None else np.einsum("ijkl,jr,ip->prkl", core, b, a)
        halves.append(whole.reshape(weight.shape))
    return halves[0] * halves[1]


def _start(config, name, weight):
    """What PiSSA and OLoRA take out of a weight of a linear layer at first."""
    rank = pattern_value(config["rank_pattern"], name, config["r"])
    if config["init_lora_weights"] == "olora":
        q, r = np.linalg.qr(weight)
        return scale_of(config, name) * q[:, :rank] @ r[:rank]
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def by_module(tensors):
    """The tensors of a file by module and by what stands behind it."""
    own = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(
            r"base_model\.model\.(.*)\.(lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|lora_[ABE]|"
            r"lora_magnitude_vector|hada_(?:w[12]_[ab]|t[12])|hra_u|ia3_l)",
            key,
        )
        if match:
            own.setdefault(match[1], {})[match[2]] = tensor
    return own
