"""How benchmarks are timed, and how what they measured gets into the README."""

import resource
import subprocess
import sys

import pytest

from benchmarks import run, timing
from benchmarks.tables import markdown


def test_every_function_runs_once_a_round_and_once_before():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.interleaved(functions, rounds=4)
    assert {name: len(own) for name, own in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [calls[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1, "always in one order"


def test_a_ratio_is_that_within_rounds():
    """A slow round is slow for both."""
    assert timing.ratio([2, 20, 2.2], [1, 10, 1]) == 2


def test_a_function_beyond_patience_has_fewer_rounds():
    """And is compared in those it has."""
    seconds = timing.interleaved({"a": lambda: None}, rounds=4, patience=0)
    assert len(seconds["a"]) == 1
    assert timing.ratio([2, 30], [1]) == 2


def test_a_section_takes_the_place_of_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HERE", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- torch -->\nold\n<!-- end of torch -->\nafter\n")
    result = {"versions": {"jax": "1.2"}, "machine": "2 cores, one", "seconds": 3}
    table = markdown(["a", "b"], [[1, r"\g<0>"]])
    text = run.section("torch", result, table, [tmp_path / "one.png"])
    for _ in range(2):
        run.into_readme("torch", text)
        written = readme.read_text()
        assert written.startswith(
            "before\n<!-- torch -->\n```sh\npython -m benchmarks.run --only t"
        )
        assert written.endswith("![one](results/one.png)\n<!-- end of torch -->\nafter\n")
        assert "old" not in written
        assert "jax 1.2; 2 cores, one; 3 s." in written
        assert "| a | b |\n|---|---|\n| 1 | \\g<0> |" in written
    with pytest.raises(ValueError, match="has no place for it: <!-- qwix -->"):
        run.into_readme("qwix", text)
    with pytest.raises(ValueError, match="has no place for it: <!-- b/torch -->"):
        run.run(only=("torch",), output=tmp_path / "results" / "b")
    assert not (tmp_path / "results").exists(), "said after the work"


def test_another_processor_has_a_place_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HERE", tmp_path)
    assert run.place_of("torch", tmp_path / "elsewhere") is None
    assert run.place_of("torch", tmp_path / "results") == "torch"
    place = run.place_of("torch", tmp_path / "results" / "b")
    assert place == "b/torch"
    result = {"versions": {"jax": "1.2"}, "machine": "2 cores, one", "seconds": 3}
    text = run.section(place, result, "", [tmp_path / "results" / "b" / "one.png"])
    assert "benchmarks.run --only torch --output benchmarks/results/b\n" in text
    assert text.endswith("![one](results/b/one.png)")


def test_the_readme_has_a_place_for_every_benchmark():
    readme, results = (run.HERE / "README.md").read_text(), run.HERE / "results"
    elsewhere = [run.place_of(path.stem, path.parent) for path in results.glob("*/*.json")]
    assert "amd_epyc/torch" in elsewhere
    for name in (*run.MODULES, *elsewhere, "quality"):
        assert readme.count(f"<!-- {name} -->\n") == readme.count(f"\n<!-- end of {name} -->") == 1


def test_machine_and_versions():
    assert "cores" in run.machine()
    assert {"python", "jax", "flax"} <= run.versions().keys()


def test_what_is_freed_stays_with_the_process():
    # In a process of its own: these options last.
    code = (
        "import resource\n"
        "from benchmarks import memory\n"
        "kept = memory.keep_freed()\n"
        "fill = lambda: bytearray(b'x') * 2**26\n"
        "fill()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "fill()\n"
        "print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, pages = out.stdout.split()
    assert kept == "False" or int(pages) < 2**26 // resource.getpagesize() // 10
