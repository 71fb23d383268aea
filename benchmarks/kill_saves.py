"""Kills a process at random moments while it saves checkpoints, and looks at what is left.

    python -m benchmarks.kill_saves --kills 100
    python -m benchmarks.kill_saves --kills 100 --way adapter

A child trains nothing: it saves one checkpoint after the other, the arrays of each told by its
step, and goes on from the newest it finds; or one adapter over the other in the same place. After
every kill the newest has to be there, at least as new as the last that the child knew to be
complete, with the arrays of its step to the last bit. The moments are drawn evenly over a few
saves.
"""

import argparse
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import pathlib
import random
import tempfile
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

import peftjax
from peftjax.checkpoint import restore_adapter, save_adapter

WIDTH, LAYERS, RANK = 256, 12, 16
MOST = 60  # saves of one child
SAVES = 3  # over how many saves the moments are spread


@functools.cache
def shapes() -> peftjax.TrainState:
    """A state, by the shapes of its arrays."""
    params = {"layers": {"kernel": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)}}

    def apply_fn(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"]["kernel"])[0]

    sites = peftjax.find_sites(apply_fn, params, jax.ShapeDtypeStruct((2, WIDTH), jnp.float32))
    config = peftjax.LoraConfig(r=RANK, lora_alpha=5, target_modules=["layers"])

    def start():
        adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
        return peftjax.init_train_state(adapter, optax.adam(1e-3))

    return jax.eval_shape(start)


def state_at(step: int) -> peftjax.TrainState:
    """A state whose every array is told by its step."""
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 1000, x.shape), x.dtype), shapes())


def adapter_at(step: int) -> peftjax.Adapter:
    """An adapter told by its step, which its config says as well."""
    adapter = state_at(step).adapter
    return dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, lora_alpha=step))


def save_checkpoints(directory: str, told: multiprocessing.connection.Connection) -> None:
    """What the child does until it is killed: one checkpoint after the other."""
    with peftjax.AdapterCheckpointer(directory, max_to_keep=3) as checkpointer:
        step = checkpointer.latest_step()
        if step is not None:
            checkpointer.restore(shapes())
        states = {n: state_at(n) for n in range((step or 0) + 1, (step or 0) + MOST)}
        told.send(("ready", step))
        for n, state in states.items():
            told.send(("begins", n))
            checkpointer.save(n, state, data_position=n)
            checkpointer.wait_until_finished()
            told.send(("complete", n))


def newest_checkpoint(directory: str) -> "Found":
    """What a directory of checkpoints holds."""
    with peftjax.AdapterCheckpointer(directory, max_to_keep=3) as checkpointer:
        step = checkpointer.latest_step()
        if step is None:
            return Found(None, False)
        got, position = checkpointer.restore(shapes())
    return Found(step, position == step and same(got, state_at(step)))


def save_adapters(directory: str, told: multiprocessing.connection.Connection) -> None:
    """What the child does until it is killed: one adapter over the other."""
    step = newest_adapter(directory).step
    adapters = {n: adapter_at(n) for n in range((step or 0) + 1, (step or 0) + MOST)}
    told.send(("ready", step))
    for n, adapter in adapters.items():
        told.send(("begins", n))
        save_adapter(directory, adapter)
        told.send(("complete", n))


def newest_adapter(directory: str) -> "Found":
    """What the directory of an adapter holds."""
    try:
        got = restore_adapter(directory)
    except FileNotFoundError:
        return Found(None, False)
    step = got.config.lora_alpha
    return Found(step, same(got, adapter_at(step)))


def same(got, want) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), got, want)))


class Found(NamedTuple):
    """The step of the newest thing saved, None if there is none; and whether it is that step's."""

    step: int | None
    intact: bool


class Way(NamedTuple):
    """A way to save: what the child does, and how to look at what it left."""

    save_on_and_on: Callable[[str, multiprocessing.connection.Connection], None]
    newest: Callable[[str], Found]


WAYS = {
    "checkpoints": Way(save_checkpoints, newest_checkpoint),
    "adapter": Way(save_adapters, newest_adapter),
}


@dataclasses.dataclass(frozen=True)
class Kill:
    """What one kill met.

    Attributes:
      inside: whether a save had begun and was not known to be complete.
      complete: the last step that was known to be.
      found: the newest checkpoint afterwards; None if there was none.
      intact: whether its arrays and its position in the data are those of its step.
    """

    inside: bool
    complete: int | None
    found: int | None
    intact: bool

    @property
    def lost_nothing(self) -> bool:
        if self.complete is None and self.found is None:
            return True
        return self.intact and self.found is not None and self.found >= (self.complete or 0)


def kill_once(directory: pathlib.Path, rng: random.Random, seconds: float, way: Way) -> Kill:
    """Starts a child, kills it after at most so many seconds of saving, and looks."""
    context = multiprocessing.get_context("forkserver")
    preload = ["peftjax.checkpointer", "peftjax.checkpoint", "rich.progress"]
    context.set_forkserver_preload(preload)
    told, tells = context.Pipe(duplex=False)
    child = context.Process(target=way.save_on_and_on, args=(str(directory), tells), daemon=True)
    child.start()
    tells.close()
    if not told.poll(120):
        raise RuntimeError("the child did not start")
    _, complete = told.recv()
    child.join(rng.uniform(0, seconds))
    child.kill()
    child.join()
    inside = False
    try:
        while told.poll():
            what, step = told.recv()
            inside = what == "begins"
            complete = step if what == "complete" else complete
    except EOFError:
        pass
    found = way.newest(str(directory))
    return Kill(inside, complete, found.step, found.intact)


def seconds_of_a_save(directory: pathlib.Path) -> float:
    """How long the first save of a process takes here, for the moments to be spread over some."""
    with peftjax.AdapterCheckpointer(directory) as checkpointer:
        state = state_at(1)
        start = time.perf_counter()
        checkpointer.save(1, state)
        checkpointer.wait_until_finished()
        return time.perf_counter() - start


def kills(
    directory: pathlib.Path,
    count: int,
    seed: int,
    way: Literal["checkpoints", "adapter"] = "checkpoints",
):
    """The kills, one after the other in one directory."""
    seconds = SAVES * seconds_of_a_save(directory / "measure")
    rng = random.Random(seed)
    for _ in range(count):
        yield kill_once(directory / "run", rng, seconds, WAYS[way])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--way", choices=WAYS, default="checkpoints", help="what is saved")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as directory:
        every = kills(pathlib.Path(directory), options.kills, options.seed, options.way)
        met = list(track(every, "Killing", total=options.kills, console=console))
    lost = [kill for kill in met if not kill.lost_nothing]
    newest = max((kill.found or 0 for kill in met), default=0)
    console.print(
        f"{len(met)} kills, {sum(kill.inside for kill in met)} of them inside a save; "
        f"{newest} saves were completed; {len(lost)} kills lost something"
    )
    for kill in lost:
        console.print(kill)
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
