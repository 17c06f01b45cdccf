"""The numeric fingerprint: everything besides the request that an answer depends on."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

_SAMPLES = 64
_SAMPLE_BYTES = 1 << 14


def model_files(model: Path) -> list[Path]:
    """All files that a model is made of."""
    if model.is_file():
        return [model]
    # Regular files: what else somebody may have put there is not read, and a pipe would be waited for.
    return [p for p in model.iterdir() if p.suffix in (".safetensors", ".json", ".gguf") and p.is_file()]


def code_files() -> list[Path]:
    """The file of the compiled kernels, if there is one."""
    found = find_spec("octavo._C")
    return [Path(found.origin)] if found is not None and found.origin is not None else []


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
