"""One of several processes that train together; ``test_processes.py`` starts them."""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np


def main():
    parser = argparse.ArgumentParser()
    for name in ("port", "processes", "process", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--shape", type=int, nargs=2, required=True)
    parser.add_argument("--hold", type=int, default=None, help="the step after which to wait")
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{args.port}", args.processes, args.process, initialization_timeout=60
    )
    # It makes arrays where it is imported, and JAX may not be in use before it knows the others.
    from training_run import train

    log = args.directory / f"losses-{args.process}.jsonl"

    def on_step(step, loss):
        with log.open("a") as file:
            file.write(json.dumps([step, loss]) + "\n")
        if step == args.hold and args.process == args.processes - 1:
            time.sleep(600)  # to be killed; the others wait for it inside the next step

    _, end = train(tuple(args.shape), args.steps, args.directory / "checkpoints", on_step)
    if args.process == 0:
        arrays = {f"{m} {n}": x for m, own in end.items() for n, x in own.items()}
        np.savez(args.directory / "end.npz", **arrays)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
