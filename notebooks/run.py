"""Runs the notebooks, each in a fresh kernel and an empty directory.

``python notebooks/run.py`` fails where a cell fails or a notebook takes over three minutes.
``python notebooks/run.py --write 2_*.ipynb`` also keeps the new outputs of those named.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

HERE = Path(__file__).resolve().parent
LIMIT = 180  # seconds


def run(path: Path, write: bool) -> str | None:
    """Runs one notebook and says what is wrong with it, if anything is."""
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as empty:
        # Without its clock, a run that changes nothing leaves the file as it was.
        client = NotebookClient(
            notebook,
            timeout=LIMIT,
            kernel_name="python3",
            record_timing=False,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": empty}},
        )
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError) as error:
            return str(error)
    seconds = time.monotonic() - start
    print(f"{path.name}: {seconds:.0f} s", flush=True)
    if seconds > LIMIT:
        return f"{seconds:.0f} s is over the limit of {LIMIT} s"
    if write:
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, path)
    return None


def main() -> int:
    """Runs the notebooks asked for, all of them unless some are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of them if none is named")
    parser.add_argument("--write", action="store_true", help="keep the new outputs")
    arguments = parser.parse_args()
    failures = 0
    for path in arguments.notebooks or sorted(HERE.glob("*.ipynb")):
        if wrong := run(path, arguments.write):
            failures += 1
            print(f"{path.name} failed: {wrong}", file=sys.stderr, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
