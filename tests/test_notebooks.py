"""The committed notebooks: run to their ends, clean outputs, links that lead somewhere.

That they run is checked by ``python notebooks/run.py``.
"""

import base64
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"/(?:home|root|tmp|work|usr|opt|Users|private|var)/|[A-Z]:\\\\")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell["outputs"]]


def text(output):
    """All of an output that people read as text."""
    parts = [output.get("text", ""), *output.get("data", {}).values()]
    return "".join(
        "".join(part) if isinstance(part, list) else str(part)
        for part in parts
        if part != output.get("data", {}).get("image/png")
    )


def test_there_are_five():
    assert [path.name[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_"]


def test_every_cell_was_run_once_in_order(notebook):
    counts = [cell["execution_count"] for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_outputs_are_clean(notebook):
    for output in outputs(notebook):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", text(output)
        assert "\x1b" not in text(output)
        assert "widget" not in " ".join(output.get("data", {}))
        assert not MACHINE.search(text(output)), text(output)


def test_there_are_pictures_of_a_modest_size(notebook):
    pictures = [
        base64.b64decode(output["data"]["image/png"])
        for output in outputs(notebook)
        if "image/png" in output.get("data", {})
    ]
    assert pictures
    for picture in pictures:
        assert picture.startswith(PNG)
        assert len(picture) < 200_000


def test_nothing_tells_when_or_where_it_ran(notebook):
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert all("execution" not in cell["metadata"] for cell in notebook["cells"])


def test_links_lead_to_notebooks(notebook):
    words = "".join("".join(cell["source"]) for cell in notebook["cells"])
    names = {path.name for path in NOTEBOOKS}
    assert set(re.findall(r"\]\(([^)]+\.ipynb)\)", words)) <= names
