"""Checkpoints of a training run: the adapter, its optimizer's state, the place in the data."""

import dataclasses
import json
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import jax
import orbax.checkpoint as ocp

from peftjax.adapter import Adapter
from peftjax.array_groups import (
    alike,
    as_stacked,
    check_arrays,
    check_keys,
    key_types,
    stacked,
    unstacked,
)
from peftjax.identity import about, check_about

State = TypeVar("State")
_ADAPTER, _STATE, _ABOUT = "adapter", "state", "about"


class AdapterCheckpointer:
    """Writes and reads the checkpoints of a training run, through Orbax's ``CheckpointManager``.

    A checkpoint is a directory named by its step. It holds the arrays of the adapter and those of
    the rest of the state, nothing of the base, and as JSON the config, the adapted sites and the
    position in the data. It appears under its name only when all of it is written, so that a
    process killed at any moment leaves the last complete one; what was begun is cleared away by the
    first ``save`` of the next. One process alone may save in a directory at a time, and any may
    read. In a run of several processes (``jax.distributed``) each of them has to make every call,
    and writes its own shards.

    Args:
      directory: where the checkpoints are, such as a ``gs://`` bucket that all processes reach;
        made if it does not exist.
      max_to_keep: how many to keep; None keeps all. The best are kept where there is a metric, and
        besides always the newest, to go on from, but none without that metric; otherwise the
        newest.
      best_metric: the metric that says which is best.
      best_mode: whether the largest is best, ``"max"``, or the smallest, ``"min"``.
      save_interval_steps: of the calls of ``save``, those are heeded whose step is a multiple, and
        the first into an empty directory.

    Raises:
      ValueError: a number that is not positive, or another ``best_mode``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax, tempfile
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 4)))
      >>> config = peftjax.LoraConfig(r=2, target_modules=["dense"])
      >>> adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
      >>> state = peftjax.init_train_state(adapter, optax.adam(1e-3), jax.random.key(1))
      >>> with peftjax.AdapterCheckpointer(tempfile.mkdtemp(), max_to_keep=2) as checkpointer:
      ...     saved = checkpointer.save(10, state, data_position={"epoch": 1, "batch": 4})
      ...     again, position = checkpointer.restore(state)
      >>> saved, position
      (True, {'batch': 4, 'epoch': 1})
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        max_to_keep: int | None = None,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
        save_interval_steps: int = 1,
    ):
        if best_mode not in ("max", "min"):
            raise ValueError(f"`best_mode` must be 'max' or 'min', got {best_mode!r}")
        numbers = {"save_interval_steps": save_interval_steps}
        if max_to_keep is not None:
            numbers["max_to_keep"] = max_to_keep
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of 1 or more, got {value!r}")
        self._directory = _located(directory)
        self._best_metric = best_metric
        policies = ocp.checkpoint_managers
        keep: list[policies.PreservationPolicy] = [policies.LatestN(max_to_keep)]
        best: dict[str, Any] = {}
        if best_metric is not None:
            best = {"best_fn": lambda metrics: metrics[best_metric], "best_mode": best_mode}
            worst_first = best_mode == "max"
            keep = [
                policies.LatestN(None if max_to_keep is None else 1),
                policies.BestN(
                    get_metric_fn=best["best_fn"],
                    reverse=not worst_first,
                    n=max_to_keep,
                    # One that has lost its metric was being removed when its process was killed.
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        self._options = ocp.CheckpointManagerOptions(
            save_interval_steps=save_interval_steps,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            **best,
        )
        self._saves = False
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        # What is unfinished may be another's, who saves there now, unless this one saves.
        options = dataclasses.replace(self._options, cleanup_tmp_directories=self._saves)
        return ocp.CheckpointManager(
            self._directory,
            options=options,
            item_handlers={
                _ADAPTER: ocp.StandardCheckpointHandler(),
                _STATE: ocp.StandardCheckpointHandler(),
                _ABOUT: ocp.JsonCheckpointHandler(),
            },
        )

    def _known(self) -> ocp.CheckpointManager:
        """The manager, which then knows what another process has saved."""
        if not self._saves:
            self._manager.reload()
        return self._manager

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        data_position: Any = None,
    ) -> bool:
        """Begins to write a checkpoint, and returns as soon as its arrays are in host memory.

        The next training step may overwrite the state. The files are written meanwhile; ``close``,
        the end of a ``with``, and the next call wait for them.

        Args:
          step: the number of steps taken.
          state: a tree that holds one adapter, such as a ``TrainState``.
          metrics: scalars measured of this state.
          data_position: any JSON value that says where to go on reading the data.

        Returns:
          Whether it is written: only every ``save_interval_steps`` it is.

        Raises:
          ValueError: there is a checkpoint of this step or of a later one; the metric that says
            which is best is missing or not finite; the state does not hold one adapter, or what is
            no array; the position is no JSON value.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"a step is a number of steps, got {step}")
        latest = self.latest_step()
        if latest is not None and latest >= step:
            raise ValueError(
                f"{self._directory} has a checkpoint of step {latest}, and {step} is not after it: "
                f"go on from the newest with restore(), or save into another directory"
            )
        metrics = None if metrics is None else {name: float(x) for name, x in metrics.items()}
        if self._best_metric is not None and self._best_metric not in (metrics or {}):
            raise ValueError(
                f"which checkpoint is best is told by {self._best_metric!r}, which is not among "
                f"metrics={metrics}"
            )
        if metrics and not math.isfinite(metrics.get(self._best_metric or "", 0.0)):
            raise ValueError(
                f"which checkpoint is best is told by {self._best_metric!r}, which is "
                f"{metrics[str(self._best_metric)]} at step {step}: it has to be finite"
            )
        adapter, rest = _parts(state)
        groups = {_ADAPTER: alike(_arrays(adapter)), _STATE: alike(rest)}
        keys = {_ADAPTER: key_types(_arrays(adapter)), _STATE: key_types(rest)}
        said = about(adapter) | {"groups": groups, "keys": keys, "data_position": data_position}
        try:
            said = json.loads(json.dumps(said, sort_keys=True))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`data_position` must be a JSON value: {error}") from error
        if not self._manager.should_save(step):
            return False
        if not self._saves:
            self._saves = True
            self._manager.close()
            self._manager = self._open()
        items = {
            name: ocp.args.StandardSave(stacked(arrays, groups[name]))
            for name, arrays in ((_ADAPTER, _arrays(adapter)), (_STATE, rest))
            if groups[name]
        }
        items[_ABOUT] = ocp.args.JsonSave(said)
        return self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(
        self, like: State, *, step: int | None = None, best: bool = False
    ) -> tuple[State, Any]:
        """Reads a checkpoint.

        Args:
          like: a tree as it was saved, for the same model and config. Its leaves may be
            ``jax.ShapeDtypeStruct``s; where they have a sharding, the result has it too. What is
            bound to no device is placed as JAX places a new array, and goes along with any mesh.
            Floating arrays get their dtype. An adapter alone reads the adapter of a larger state.
          step: which checkpoint; by default the newest complete one.
          best: take the best one instead.

        Returns:
          ``like`` with the arrays from disk, and the position in the data.

        Raises:
          FileNotFoundError: there is no checkpoint, or none of that step.
          ValueError: it is of another config, model or state; the message names what differs.
        """
        step = self._step(step, best)
        read = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        said = read[_ABOUT]
        adapter, rest = _parts(like)
        where = f"the checkpoint of step {step} in {self._directory}"
        check_about(where, said, about(adapter))
        wanted = {_ADAPTER: _arrays(adapter)}
        if not isinstance(like, Adapter):
            wanted[_STATE] = rest
        metadata = self._manager.item_metadata(step)
        shapes, groups = {}, said["groups"]
        for name, arrays in wanted.items():
            shapes[name] = metadata[name].tree if groups[name] else {}
            check_arrays(where, groups[name], shapes[name], arrays)
            check_keys(where, said["keys"][name], key_types(arrays))
        items = {
            name: ocp.args.StandardRestore(as_stacked(shapes[name], arrays, groups[name]))
            for name, arrays in wanted.items()
            if groups[name]
        }
        read = self._manager.restore(step, args=ocp.args.Composite(**items))
        arrays = {
            name: unstacked(read[name] if groups[name] else {}, own, groups[name])
            for name, own in wanted.items()
        }
        return _refilled(like, arrays), said["data_position"]

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._known().latest_step()

    def best_step(self) -> int | None:
        """The step of the best checkpoint by ``best_metric``; None if there is none."""
        return None if self._best_metric is None else self._known().best_step()

    def all_steps(self) -> Sequence[int]:
        """The steps of all complete checkpoints, and of one that is being written."""
        return tuple(sorted(self._known().all_steps()))

    def wait_until_finished(self) -> None:
        """Waits until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until what was saved is on disk, and ends."""
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _step(self, step: int | None, best: bool) -> int:
        """The step to read."""
        self.wait_until_finished()
        if best and step is not None:
            raise ValueError(f"give step={step} or best=True, not both")
        if best and self._best_metric is None:
            raise ValueError("best=True needs a checkpointer with `best_metric`")
        found = step if step is not None else self.best_step() if best else self.latest_step()
        if found is None and self.all_steps():
            raise FileNotFoundError(
                f"no checkpoint in {self._directory} has a metric {self._best_metric!r}, to be the "
                f"best by; take one of the steps {', '.join(map(str, self.all_steps()))}"
            )
        if found is None:
            raise FileNotFoundError(f"no checkpoint in {self._directory}; save() writes one")
        if found not in self.all_steps():
            raise FileNotFoundError(
                f"there is no checkpoint of step {found} in {self._directory}; there are those of "
                f"{', '.join(map(str, self.all_steps())) or 'none'}"
            )
        return found


def _located(directory: str | Path) -> str:
    """A directory as Orbax takes it: with a scheme (``gs://``) as it is, otherwise absolute."""
    return str(directory) if "://" in str(directory) else str(Path(directory).absolute())


def _is_adapter(node: Any) -> bool:
    return isinstance(node, Adapter)


def _parts(state: Any) -> tuple[Adapter, dict[str, Any]]:
    """The one adapter in a tree, and all other leaves by path."""
    flat = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_adapter)
    adapters = [leaf for _, leaf in flat if _is_adapter(leaf)]
    if len(adapters) != 1:
        raise ValueError(f"a checkpoint is of one adapter, and the state holds {len(adapters)}")
    rest = {_path(keys): leaf for keys, leaf in flat if not _is_adapter(leaf)}
    for path, leaf in rest.items():
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise ValueError(
                f"{path!r} is a {type(leaf).__name__}: the leaves of a state have to be JAX "
                f"arrays; what is no array goes into `data_position`"
            )
    return adapters[0], rest


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _arrays(adapter: Adapter) -> dict[str, Any]:
    """All arrays of an adapter by path."""
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(adapter)}


def _refilled(like: Any, arrays: dict[str, dict[str, Any]]) -> Any:
    """The tree with other arrays."""

    def fill(keys: Any, leaf: Any) -> Any:
        if not _is_adapter(leaf):
            return arrays[_STATE][_path(keys)]
        own = arrays[_ADAPTER]
        return jax.tree_util.tree_map_with_path(lambda keys, _: own[_path(keys)], leaf)

    return jax.tree_util.tree_map_with_path(fill, like, is_leaf=_is_adapter)
