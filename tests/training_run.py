"""A training run of a small decoder on a mesh, which may span several processes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pod import FSDP, IDS, PARAMS, WORDS, decoder

import peftjax
from peftjax.checkpoint import save_adapter

ROWS, TOKENS = 16, 7
CONFIG = peftjax.LoraConfig(
    r=3,
    lora_alpha=5,
    lora_dropout=0.2,
    init_lora_weights="gaussian",
    target_modules=["q", "o", "up", "down", "head"],
)


def batch_of(step, where):
    """The rows of one step; every process reads its own alone."""
    rows = np.random.default_rng(step).integers(0, WORDS, (ROWS, TOKENS)).astype(np.int32)
    if jax.process_count() == 1:
        return jax.device_put(rows, where)
    own = ROWS // jax.process_count()
    first = jax.process_index() * own
    return jax.make_array_from_process_local_data(where, rows[first : first + own], rows.shape)


def placed(mesh):
    """The base, of which every process makes the shards that it holds."""

    def place(array, spec):
        array = np.asarray(array)
        where = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    return jax.tree.map(place, PARAMS, FSDP)


def train(shape, steps, directory, on_step=None, devices=None):
    """Trains from the last checkpoint in a directory on; gives losses by step and the end."""
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    params = placed(mesh)
    apply_fn = decoder(AxisType.Auto)
    adapted = peftjax.adapt(apply_fn)
    optimizer = optax.adamw(5e-3, eps=1e-3)
    sites = peftjax.find_sites(decoder(None), PARAMS, IDS)

    def start():
        adapter = peftjax.init_adapter(jax.random.key(0), CONFIG, sites)
        return peftjax.init_train_state(adapter, optimizer, jax.random.key(1))

    def loss_fn(params, adapter, ids):
        logits = jax.nn.log_softmax(adapted(params, adapter, ids)[:, :-1])
        return -jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1).mean()

    losses = {}
    # The optimizer relies on promotion.
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(start)
        shardings = peftjax.adapter_shardings(shapes, params)
        step = peftjax.make_train_step(loss_fn, optimizer, accumulate=2, shardings=shardings)
        rows = NamedSharding(mesh, P("data"))
        with peftjax.AdapterCheckpointer(directory, max_to_keep=2) as checkpointer:
            if checkpointer.latest_step() is None:
                state, position = jax.jit(start, out_shardings=shardings)(), 0
            else:
                like = jax.tree.map(
                    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                    *(shapes, shardings),
                )
                state, position = checkpointer.restore(like)
            for n in range(position, steps):
                state, metrics = step(state, params, batch_of(n, rows))
                losses[n] = float(metrics["loss"])
                if n % 2:
                    checkpointer.save(n + 1, state, data_position=n + 1)
                if on_step is not None:
                    on_step(n, losses[n])
        assert int(state.step) == steps
        for _ in range(2):  # the second takes the place of the first
            save_adapter(directory.with_name("adapter"), state.adapter)
    end = jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), state.adapter.params
    )
    return losses, end
