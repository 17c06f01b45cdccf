"""ModelConfig from a GGUF file's metadata. Keys are those of the GGUF specification and of llama.cpp's converter."""

from __future__ import annotations

from typing import Any

from octavo.core.errors import ModelFormatError, UnsupportedModelError, shown
from octavo.formats import GGUFFile
from octavo.loading.checks import check_config
from octavo.models import family
from octavo.models.families import by_gguf_architecture
from octavo.ops import ModelConfig, StoredTensor

_MAX_INTEGER = 2**31 - 1


class MetadataKeys:
    """Implements `octavo.models.keys.GGUFKeys`."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._path = file.path
        self.architecture = str(self._get("general.architecture", str))

    def _full(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _get(self, key: str, kind: type, *default: Any) -> Any:
        value = self._file.metadata.get(key, default[0] if default else None)
        if value is None:
            raise self.malformed(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, kind):
            raise self.malformed(key, f"must be of type {kind.__name__}, not {type(value).__name__}")
        return value

    def has(self, key: str) -> bool:
        return self._full(key) in self._file.metadata

    def integer(self, key: str, *default: int) -> int:
        value = int(self._get(self._full(key), int, *default))
        if not 0 <= value <= _MAX_INTEGER:
            raise self.malformed(self._full(key), f"must be between 0 and {_MAX_INTEGER}, not {value}")
        return value

    def number(self, key: str, *default: float) -> float:
        value = self._file.metadata.get(self._full(key), default[0] if default else None)
        if value is None:
            raise self.malformed(self._full(key), "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.malformed(self._full(key), "must be a number")
        return float(value)

    def text(self, key: str, *default: str) -> str:
        return str(self._get(self._full(key), str, *default))

    def refuse_if_set(self, key: str) -> None:
        value = self._file.metadata.get(self._full(key))
        if value is not None and not (isinstance(value, int | float) and value == 0):
            raise self.unsupported(f"{self._full(key)}={shown(value)} is not supported")

    def tensor(self, name: str) -> StoredTensor | None:
        return self._file.tensors.get(name)

    def malformed(self, key: str, problem: str) -> ModelFormatError:
        return ModelFormatError(self._path, key, problem)

    def unsupported(self, problem: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._path}: {problem}")


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Raises ModelFormatError for missing or contradictory metadata, UnsupportedModelError for what is not built."""
    keys, known = MetadataKeys(file), by_gguf_architecture()
    if keys.architecture not in known:
        raise keys.unsupported(
            f"general.architecture: {keys.architecture!r} is not supported; supported: {', '.join(sorted(known))}"
        )
    config = family(known[keys.architecture]).read_gguf(keys)
    check_config(config, file.path)
    return config
