"""Model files: memory-mapped, hardened readers of GGUF and safetensors, and the block formats of their weights."""

from __future__ import annotations

import os
from pathlib import Path

from octavo.core.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from octavo.core.model_folder import check_inside
from octavo.formats.gguf import MAGIC as _GGUF_MAGIC
from octavo.formats.gguf import GGUFFile
from octavo.formats.mapping import ModelFile, map_file
from octavo.formats.quants import DEQUANTIZABLE, QuantType, dequantize
from octavo.formats.safetensors import (
    SafetensorsFile,
    SafetensorsModel,
    find_in_folder,
    list_folder,
    open_safetensors,
)
from octavo.formats.strings import StringArray
from octavo.formats.tensor import RawTensor

__all__ = [
    "DEQUANTIZABLE",
    "GGUFFile",
    "ModelFile",
    "QuantType",
    "RawTensor",
    "SafetensorsFile",
    "SafetensorsModel",
    "StringArray",
    "dequantize",
    "open_safetensors",
    "open_weights",
]


def open_weights(path: str | os.PathLike[str]) -> GGUFFile | SafetensorsModel:
    """Open the weights at `path`: a .gguf file, a .safetensors file or index, or a folder with one model.

    A file is taken for what it begins with, not for what it is called. In a folder, safetensors go before GGUF.

    Raises ModelNotFoundError if there is nothing that can be opened, ModelFormatError if a file is not sound or the
    choice is not clear, UnsupportedModelError for a model split over several GGUF files.
    """
    path = Path(path)
    if os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir, False for a path that cannot be looked at
        if find_in_folder(path) is not None:
            return open_safetensors(path)
        return _open_gguf(_only_gguf(path))
    head = map_file(path)[:9]
    if head[:4] == _GGUF_MAGIC:
        return _open_gguf(path)
    if path.suffix == ".json" or head[8:9] == b"{":
        return open_safetensors(path)
    raise ModelFormatError(path, "magic", f"{head[:4]!r} begins neither a GGUF nor a safetensors file")


def _open_gguf(path: Path) -> GGUFFile:
    file = GGUFFile(path)
    parts = file.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedModelError(f"{path}: split.count: the model is in {parts} GGUF files; merge them first")
    return file


def _only_gguf(folder: Path) -> Path:
    names = list_folder(folder, ".gguf")
    if not names:
        raise ModelNotFoundError(f"{folder}: the folder has no .safetensors and no .gguf file")
    if len(names) > 1:
        raise ModelFormatError(folder, "file name", f"the folder has {len(names)} .gguf files; name one of them")
    return check_inside(folder, names[0])
