"""The numeric fingerprint: everything besides the request that an answer depends on."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLES = 64
_SAMPLE_BYTES = 1 << 14


def versions_of(files: list[Path]) -> str:
    """16 hex digits over the files' names, sizes, inodes and times of change: these differ after any change of a file,
    and between copies."""
    stats = [
        (path.name, stat.st_size, stat.st_ino, stat.st_mtime_ns) for path in sorted(files) for stat in [path.stat()]
    ]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def fingerprint_of(files: list[Path], *settings: object) -> str:
    """16 hex digits over the files' sizes, beginnings and evenly spaced samples, and the settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in sorted(files):
        total = path.stat().st_size
        digest.update(f"{path.name}:{total}".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES):
                file.seek(index * max(total - _SAMPLE_BYTES, 0) // max(_SAMPLES - 1, 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
