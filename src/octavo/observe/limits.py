"""What the machine can do, measured in a second or so with a backend's own linear.

One row times a float32 matrix several times the size of the last-level cache does nothing but read it: the rate is the
memory bandwidth that kernels can get. Many rows times a matrix that stays in the cache do nothing but multiply: the
rates are those of the arithmetic, conversions of activations included. Each is the best of several repetitions,
because whatever else runs on the machine can only slow one down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from octavo.ops import StoredTensor
from octavo.ops.protocol import Array, Weight

CACHES = 4  # the streamed matrix is so many times the last-level cache: hardly any of it is left from the last time
STREAM_BYTES = (64 << 20, 512 << 20)  # least and most of it, whatever the cache
_STREAM_INPUTS = 4096
_MULTIPLY_SHAPE = (512, 512, 1024)  # rows, outputs, inputs: 2 MiB of float32, less of codes
_CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
_LIKELY_CACHE_BYTES = 32 << 20  # where the system does not tell


class Linears(Protocol):
    """What is measured of a backend."""

    def linear_weight(self, parts: Sequence[StoredTensor]) -> Weight: ...

    def linear(self, x: Array, weight: Weight) -> Array: ...

    def from_numpy(self, values: NDArray[np.float32]) -> Array: ...


class Coding(Enum):
    """How the matrices here are stored: `name` is the format's."""

    F32 = (1, 4)
    Q4_0 = (32, 18)
    Q8_0 = (32, 34)

    def __init__(self, block_size: int, block_bytes: int) -> None:
        self.block_size = block_size  # values
        self.block_bytes = block_bytes


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Rates with one number of threads. A multiply-add is two FLOPs."""

    threads: int
    read_bytes_per_s: float
    integer_macs_per_s: float  # of int8 activations and 4-bit or 8-bit codes, whichever is faster
    float32_macs_per_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Matrix:
    """A StoredTensor that comes from no file."""

    shape: tuple[int, int]
    dtype: Coding
    stored: NDArray[np.uint8]  # [outputs, bytes of a row]
    name: str = "measured"
    order: None = None

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def dequantize(self, rows: slice | None = None) -> NDArray[np.float32]:
        raise TypeError("a backend that is measured takes these formats as they are")


def measure_limits(ops: Linears, threads: int, available_bytes: int, seconds: float = 1.2) -> MachineLimits:
    """Measure `ops`, which runs `threads` threads, for about `seconds`, using at most a quarter of `available_bytes`.

    The backend must compute with integer codes as they are (`cpu` with compute_dtype "auto"). Raises MemoryError if
    there is no room for the streamed matrix.
    """
    each = seconds / 4
    integer = max(_macs_per_s(ops, coding, each) for coding in (Coding.Q4_0, Coding.Q8_0))
    float32 = _macs_per_s(ops, Coding.F32, each)
    return MachineLimits(threads, _read_bytes_per_s(ops, available_bytes, each), integer, float32)


def _read_bytes_per_s(ops: Linears, available_bytes: int, seconds: float) -> float:
    row_bytes = _STREAM_INPUTS * Coding.F32.block_bytes
    num_bytes = min(stream_bytes(last_level_cache_bytes()), available_bytes // 4)
    outputs = num_bytes // row_bytes
    if outputs < 1:
        raise MemoryError(f"{available_bytes} bytes of memory are too few to measure how fast it is read")
    # Zeros that nobody has written take no memory of their own: what is packed from them is all that is allocated.
    zeros = np.zeros((outputs, row_bytes), np.uint8)
    weight = ops.linear_weight([_Matrix((outputs, _STREAM_INPUTS), Coding.F32, zeros)])
    x = ops.from_numpy(np.ones((1, _STREAM_INPUTS), np.float32))
    return outputs * row_bytes / _best(lambda: ops.linear(x, weight), seconds)


def _macs_per_s(ops: Linears, coding: Coding, seconds: float) -> float:
    rows, outputs, inputs = _MULTIPLY_SHAPE
    random = np.random.default_rng(0)
    if coding is Coding.F32:
        data = random.standard_normal((outputs, inputs), np.float32).view(np.uint8)
    else:
        blocks = random.integers(0, 256, (outputs, inputs // coding.block_size, coding.block_bytes), np.uint8)
        blocks[:, :, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)  # the scale stands first in both formats
        data = blocks.reshape(outputs, -1)
    weight = ops.linear_weight([_Matrix((outputs, inputs), coding, data)])
    x = ops.from_numpy(random.standard_normal((rows, inputs), np.float32))
    return rows * outputs * inputs / _best(lambda: ops.linear(x, weight), seconds)


def _best(work: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the repetitions, at least three, that fit into `seconds`."""
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def stream_bytes(cache_bytes: int) -> int:
    """Size of the streamed matrix beside a last-level cache of `cache_bytes`."""
    least, most = STREAM_BYTES
    return min(max(CACHES * cache_bytes, least), most)


def last_level_cache_bytes(folder: Path = _CACHE_FOLDER) -> int:
    """Bytes of the first processor's largest cache."""
    sizes = [_bytes_of(path) for path in folder.glob("index*/size")]
    return max(sizes, default=0) or _LIKELY_CACHE_BYTES


def _bytes_of(path: Path) -> int:
    try:
        text = path.read_text().strip()
        return int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)
    except (OSError, ValueError):
        return 0
