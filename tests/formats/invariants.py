"""What must hold of any file that a reader accepts, however it was made. Shared by the tests and the fuzz target."""

from __future__ import annotations

import random
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from octavo.core.errors import ModelFormatError
from octavo.formats import DEQUANTIZABLE, ModelFile, StringArray

# Values at which a length, count, offset, type or dimension is most likely to be mistaken.
EDGES = [0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 33, 255, 256, 257, 65535, 65536]
EDGES += [(1 << bits) + d for bits in (31, 32, 47, 48, 62, 63) for d in (-1, 0, 1)]
EDGES += [(1 << 64) - d for d in (1, 2, 8, 31, 32)]


def opens(reader: type[ModelFile] | Any, path: Path) -> bool:
    """Whether `reader` accepts the file; only ModelFormatError may say no, and then naming path and field."""
    try:
        file = reader(path)
    except ModelFormatError as error:
        assert error.path.startswith(str(path.parent))  # the file, or a shard of it
        assert error.field
        assert str(error).isprintable()
        assert len(str(error)) < len(str(path)) + 1200
        return False
    with file:
        check_file(file, path.stat().st_size)
    return True


def check_file(file: ModelFile, size: int) -> None:
    """Everything can be read, nothing lies outside the file, and no two tensors share bytes."""
    for key, value in file.metadata.items():
        key.encode()
        check_value(value, size)
    spans = []
    for name, tensor in file.tensors.items():
        assert tensor.name == name
        name.encode()
        assert 0 <= tensor.nbytes <= size
        assert tensor.nbytes == tensor.dtype.nbytes(tensor.size)
        assert not tensor.data.flags.writeable
        if tensor.nbytes:
            start = tensor.data.__array_interface__["data"][0]
            spans.append((start, start + tensor.nbytes))
            assert int(tensor.data.sum(dtype=np.int64)) >= 0  # touches every page
        if tensor.dtype in DEQUANTIZABLE:
            assert tensor.dequantize().shape == tensor.shape
    spans.sort()
    for (_, end), (start, _) in pairwise(spans):
        assert end <= start
    if spans:
        assert spans[-1][1] - spans[0][0] <= size


def check_value(value: Any, size: int) -> None:
    if isinstance(value, StringArray):
        strings = value.to_bytes_list()
        assert len(strings) == len(value)
        assert sum(map(len, strings)) + 8 * len(strings) <= size
        assert [s.encode("utf-8", "surrogateescape") for s in value.to_list()] == strings
    elif isinstance(value, np.ndarray):
        assert value.nbytes <= size
        assert len(value.tolist()) == len(value)
    elif isinstance(value, list):
        for item in value:
            check_value(item, size)
    else:
        assert isinstance(value, str | int | float | bool)
        if isinstance(value, str):
            value.encode()


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four random changes: flipped bytes, edge values as little-endian integers, cuts, copies, insertions."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0 | 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 2 | 3:
                width = rng.choice("BHIQQQ")
                edge = rng.choice(EDGES) & ((1 << 8 * struct.calcsize(width)) - 1)
                data[at : at + struct.calcsize(width)] = struct.pack("<" + width, edge)
            case 4:
                del data[at:]
            case 5:
                del data[at : at + rng.randrange(1, 40)]
            case 6:
                data[at:at] = rng.randbytes(rng.randrange(1, 20))
            case 7:
                source = rng.randrange(len(data) + 1)
                data[at:at] = data[source : source + rng.randrange(1, 60)]
        if not data:
            data += b"\0"
    return bytes(data)
