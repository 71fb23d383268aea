"""Several processes that train together: as one process, and one of them killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from training_run import train

from peftjax.checkpoint import restore_adapter

WORKER = Path(__file__).with_name("process_worker.py")
STEPS, HOLD, SECONDS = 8, 5, 120


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture
def launch(tmp_path):
    """Starts processes that train together, and ends those that still run after the test."""
    running = []

    def start(shape, *options, processes=2):
        # Of a flag given twice the last counts.
        environment = {
            **os.environ,
            "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        port = free_port()
        for process in range(processes):
            numbers = {"port": port, "processes": processes, "process": process, "steps": STEPS}
            command = [sys.executable, str(WORKER), str(tmp_path), *options, "--shape", *shape]
            for name, value in numbers.items():
                command += [f"--{name}", str(value)]
            output = (tmp_path / f"output-{process}").open("w")
            running.append(
                subprocess.Popen(
                    list(map(str, command)), env=environment, stdout=output, stderr=output
                )
            )
            output.close()
        return running

    yield start
    for process in running:
        process.kill()
        process.wait(SECONDS)


def said(directory):
    """What the processes wrote, to show where they fail."""
    return "\n".join(path.read_text()[-2000:] for path in sorted(directory.glob("output-*")))


def logged(directory, process=0):
    path = directory / f"losses-{process}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(map(json.loads, lines))


def arrays(directory):
    with np.load(directory / "end.npz") as found:
        params = {}
        for key in found.files:
            module, name = key.split(" ")
            params.setdefault(module, {})[name] = found[key]
    return params


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process, on four devices: its losses and its end."""
    return train((2, 2), STEPS, tmp_path_factory.mktemp("alone"), devices=jax.devices()[:4])


def close(got, want):
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def written_by(checkpoint):
    """The processes that wrote arrays of a checkpoint."""
    return {path.name for path in checkpoint.glob("adapter/ocdbt.process_*")}


def test_two_processes_train_as_one(launch, tmp_path, alone):
    for process in launch((4, 1)):
        assert process.wait(SECONDS) == 0, said(tmp_path)
    losses, end = alone
    close(arrays(tmp_path), end)
    for process in (0, 1):
        close(logged(tmp_path, process), losses)
    assert losses[STEPS - 1] < losses[0]
    last = tmp_path / "checkpoints" / str(STEPS)
    assert written_by(last) == {"ocdbt.process_0", "ocdbt.process_1"}
    saved = tmp_path / "adapter"
    assert sorted(path.name for path in saved.iterdir()) == ["adapter.json", "arrays-2"]
    close(restore_adapter(saved).params, end)


def test_a_killed_run_goes_on_from_its_last_checkpoint_on_another_mesh(launch, tmp_path, alone):
    running = launch((2, 2), "--hold", HOLD)
    limit = time.monotonic() + SECONDS
    while not all(HOLD in logged(tmp_path, process) for process in (0, 1)):
        assert time.monotonic() < limit, said(tmp_path)
        assert all(process.poll() is None for process in running), said(tmp_path)
        time.sleep(0.1)
    # The other one is inside the next step, and waits there for it.
    running[1].send_signal(signal.SIGKILL)
    running[0].kill()
    assert [process.wait(SECONDS) for process in running] == [-signal.SIGKILL] * 2
    before = logged(tmp_path)
    assert max(before) == HOLD
    want, end = alone
    losses, params = train((1, 2), STEPS, tmp_path / "checkpoints", devices=jax.devices()[:2])
    # Not from the start: the checkpoint after the step before the last, or the one before.
    assert min(losses) in (HOLD - 1, HOLD + 1)
    close({**before, **losses}, want)
    close(params, end)
