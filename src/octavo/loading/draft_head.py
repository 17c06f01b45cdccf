"""The file of a head that guesses (octavo.models.draft_head): one .safetensors file, checked before anything is used.

Its tensors, in any floating type, are those of DraftHead without `output`, each NAME.weight, and `draft_vocab`, the ids
of the tokens that it can guess, ascending, as I32 or I64; without it, it can guess all. Its `__metadata__` says
``"format": "octavo-draft-head"``. The output matrix is not in it: it is the model's own.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from octavo.core.errors import ModelFormatError
from octavo.formats import DEQUANTIZABLE, QuantType, RawTensor, SafetensorsFile
from octavo.formats.mapping import map_file
from octavo.models.draft_head import DraftHead
from octavo.ops import Ops
from octavo.ops.packing import Packing

FORMAT = "octavo-draft-head"
_MATRICES = ("from_state", "from_token", "down")
_NORMS = ("state_norm", "token_norm")
_VOCAB = "draft_vocab"


class LoadedHead(NamedTuple):
    """A head whose weights are in memory, or on their way there."""

    path: Path
    head: DraftHead
    token_ids: NDArray[np.int32] | None  # that it can guess; None: all
    nbytes: int
    packing: Packing


def load_head(path: Path, output: RawTensor, ops: Ops) -> LoadedHead:
    """`output`: the model's output matrix, [vocabulary, hidden]. Raises ModelFormatError, ModelNotFoundError."""
    if map_file(path)[8:9] != b"{":
        raise ModelFormatError(path, "magic", "does not begin a safetensors file, which a head is")
    with SafetensorsFile(path) as file:
        if file.metadata.get("format") != FORMAT:
            raise ModelFormatError(path, "__metadata__.format", f"must be {FORMAT!r}: this is no head that guesses")
        vocab_size, hidden = output.shape
        tensors = {name: _weight(file, name) for name in (*_NORMS, *_MATRICES)}
        size = tensors["down"].shape[-1] if len(tensors["down"].shape) == 2 else 0
        if not size:
            raise ModelFormatError(
                path, "down.weight", f"has shape {tensors['down'].shape}; it is [{hidden}, any size]"
            )
        expected: dict[str, tuple[int, ...]] = {"down": (hidden, size), **dict.fromkeys(_NORMS, (hidden,))}
        expected |= {"from_state": (2 * size, hidden), "from_token": (2 * size, hidden)}
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                problem = f"has shape {tensors[name].shape}; for this model and down.weight it is {shape}"
                raise ModelFormatError(path, f"{name}.weight", problem)
        left = sorted(set(file.tensors) - {f"{name}.weight" for name in tensors} - {_VOCAB})
        if left:
            raise ModelFormatError(path, left[0], "is no tensor of a head")
        token_ids = _draft_vocab(file, vocab_size)
        if token_ids is not None:
            output = output.select_rows(token_ids)
        matrices = {name: as_q8_0(path, tensors[name]) for name in _MATRICES}
    packing = ops.defer_packing()
    head = DraftHead(
        **{name: ops.vector_weight(tensors[name]) for name in _NORMS},
        **{name: ops.linear_weight([matrix]) for name, matrix in matrices.items()},
        output=ops.linear_weight([output]),
    )
    nbytes = sum(ops.weight_nbytes(one) for one in (*matrices.values(), output))
    return LoadedHead(path, head, token_ids, nbytes, packing)


def save_head(
    path: Path,
    weights: Mapping[str, NDArray[np.floating]],
    token_ids: NDArray[np.integer] | None,
    notes: Mapping[str, str],
) -> None:
    """Write what `load_head` reads: `weights` by the names of DraftHead, as float16. A file that is there is replaced
    at once or not at all. `notes`: further entries of its metadata."""
    arrays = {f"{name}.weight": ("F16", np.asarray(weights[name], np.float16)) for name in (*_NORMS, *_MATRICES)}
    if token_ids is not None:
        arrays[_VOCAB] = "I32", np.asarray(token_ids, np.int32)
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, **notes}}
    at = 0
    for name, (dtype, array) in arrays.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    parts = [
        len(text).to_bytes(8, "little") + text,
        *(np.ascontiguousarray(one).tobytes() for _, one in arrays.values()),
    ]
    path = path.resolve()  # what a link leads to, and not the link
    if path.exists() and not path.is_file():  # a device or a pipe: written to, and never replaced
        with path.open("wb", buffering=0) as file:
            file.write(b"".join(parts))
        return
    written = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with written.open("xb") as file:
            file.writelines(parts)
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def _weight(file: SafetensorsFile, name: str) -> RawTensor:
    tensor = file.tensors.get(f"{name}.weight")
    if tensor is None:
        raise ModelFormatError(file.path, f"{name}.weight", "tensor is missing")
    if tensor.dtype not in DEQUANTIZABLE:
        raise ModelFormatError(file.path, f"{name}.weight", f"is {tensor.dtype.name}; it must be of a floating type")
    if not np.isfinite(tensor.dequantize()).all():
        raise ModelFormatError(file.path, f"{name}.weight", "has values that are not finite")
    return tensor


def _draft_vocab(file: SafetensorsFile, vocab_size: int) -> NDArray[np.int32] | None:
    tensor = file.tensors.get(_VOCAB)
    if tensor is None:
        return None

    def fail(problem: str) -> NoReturn:
        raise ModelFormatError(file.path, _VOCAB, problem)

    if tensor.dtype not in (QuantType.I32, QuantType.I64) or len(tensor.shape) != 1:
        fail(f"is {tensor.dtype.name} of shape {tensor.shape}; it must be one row of I32 or I64")
    token_ids = tensor.view().astype(np.int64)
    if not len(token_ids) or token_ids[0] < 0 or token_ids[-1] >= vocab_size or (np.diff(token_ids) <= 0).any():
        fail(f"must be ids of tokens, from 0 to {vocab_size - 1}, that ascend")
    return token_ids.astype(np.int32)


def as_q8_0(path: Path, tensor: RawTensor) -> RawTensor:
    """Rounded to codes of 8 bits with a scale for each 32, as llama.cpp's Q8_0 has them: half the bytes to read. What
    has no whole groups stays as it is. Raises ModelFormatError for values that are too large for that."""
    if tensor.shape[1] % 32:
        return tensor
    values = tensor.dequantize().reshape(tensor.shape[0], -1, 32)
    exact = np.abs(values).max(-1, keepdims=True) / 127
    if exact.max() > np.finfo(np.float16).max:
        raise ModelFormatError(path, tensor.name, f"has values up to {np.abs(values).max():g}; no head has such")
    scales = exact.astype(np.float16)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scales > 0, np.rint(values / scales.astype(np.float32)), 0)
    stored = np.concatenate([scales.view(np.uint8), np.clip(codes, -127, 127).astype(np.int8).view(np.uint8)], -1)
    return RawTensor(tensor.name, tensor.shape, QuantType.Q8_0, stored.reshape(tensor.shape[0], -1))
