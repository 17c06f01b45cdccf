"""ModelConfig from a Hugging Face folder's config.json, in the forms that transformers 4 and 5 write."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.core.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from octavo.core.model_folder import read_file
from octavo.loading.checks import check_config
from octavo.models import family
from octavo.models.families import by_model_type
from octavo.ops import ModelConfig

_MAX_CONFIG_BYTES = 1 << 20
_LARGEST = 1 << 53  # no setting comes near; below it every integer is a float


class ConfigKeys:
    """Implements `octavo.models.keys.HFKeys`."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path = path
        self._values = values

    @property
    def names(self) -> Collection[str]:
        return self._values.keys()

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def value(self, key: str) -> Any:
        return self._values.get(key)

    def _get(self, key: str, kinds: type | tuple[type, ...], *default: Any) -> Any:
        value = self._values.get(key)
        if value is None:
            if default:
                return default[0]
            raise self.malformed(key, "is missing")
        if (isinstance(value, bool) and kinds is not bool) or not isinstance(value, kinds):
            raise self.malformed(key, f"has the wrong type: {value!r}")
        return value

    def integer(self, key: str, *default: int) -> int:
        return int(self._get(key, int, *default))

    def positive(self, key: str, *default: int) -> int:
        value = self.integer(key, *default)
        if not 1 <= value < _LARGEST:
            raise self.malformed(key, f"must be at least 1 and less than {_LARGEST}, not {value}")
        return value

    def number(self, key: str, *default: float) -> float:
        value = self._get(key, (int, float), *default)
        if not 0 < value < _LARGEST:  # nor is NaN
            raise self.malformed(key, f"must be a finite number of more than 0, not {value!r}")
        return float(value)

    def text(self, key: str, *default: str) -> str:
        return str(self._get(key, str, *default))

    def flag(self, key: str, *default: bool) -> bool:
        return bool(self._get(key, bool, *default))

    def entries(self, key: str) -> Sequence[Any] | None:
        found: Sequence[Any] | None = self._get(key, list, None)
        return found

    def table(self, key: str) -> ConfigKeys:
        return ConfigKeys(self._path, self._get(key, dict, {}))

    def over(self, values: Mapping[str, Any]) -> ConfigKeys:
        return ConfigKeys(self._path, {**values, **self._values})

    def under(self, keys: ConfigKeys) -> ConfigKeys:
        return keys.over(self._values)

    def without(self, *keys: str) -> ConfigKeys:
        return ConfigKeys(self._path, {key: value for key, value in self._values.items() if key not in keys})

    def malformed(self, key: str, problem: str) -> ModelFormatError:
        return ModelFormatError(self._path, key, problem)

    def unsupported(self, problem: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._path}: {problem}")


def config_from_folder(folder: Path) -> ModelConfig:
    """Raises ModelNotFoundError without a config.json, ModelFormatError or UnsupportedModelError for what it says."""
    path = folder / "config.json"
    keys = _read(path)
    kind, known = keys.text("model_type"), by_model_type()
    if kind not in known:
        raise keys.unsupported(f"model_type {kind!r} is not supported; supported: {', '.join(sorted(known))}")
    config = family(known[kind]).read_hf(keys)
    check_config(config, path)
    return config


def _read(path: Path) -> ConfigKeys:
    data = read_file(path.parent, path.name, _MAX_CONFIG_BYTES)
    if data is None:
        raise ModelNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(path, "file", f"is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelFormatError(path, "file", "must hold a JSON object")
    return ConfigKeys(path, values)
