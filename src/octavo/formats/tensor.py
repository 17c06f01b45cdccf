"""A tensor as it lies in a model file."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from octavo.core.errors import UnsupportedModelError
from octavo.formats.quants import CHUNK_VALUES, DEQUANTIZABLE, QuantType, dequantize


@dataclass(frozen=True, slots=True, eq=False)
class RawTensor:
    """Packed values of one tensor, normally a read-only view on the file's mapping (which the view keeps alive).

    The data of a GGUF tensor is aligned to at least 8 bytes; that of a safetensors tensor may have any alignment.
    """

    name: str
    shape: tuple[int, ...]  # outermost first: a linear weight is [out_features, in_features]
    dtype: QuantType
    stored: NDArray[np.uint8]  # [rows, bytes_per_row]; rows = product of the leading dims, the last dim is in blocks
    order: NDArray[np.intp] | None = None  # row i of the tensor is the stored row order[i]; None: they are in order

    @property
    def data(self) -> NDArray[np.uint8]:
        """The packed rows in the tensor's order; a copy where they are stored in another."""
        return self.stored if self.order is None else self.stored[self.order]

    @property
    def nbytes(self) -> int:
        """Packed size in bytes."""
        return self.stored.nbytes if self.order is None else self.stored.shape[1] * len(self.order)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def dequantize(self, rows: slice | ArrayLike | None = None) -> NDArray[np.float32]:
        """Values as float32, of `shape`, or only the given leading rows of a matrix, [n, in_features].

        `rows` is a slice or a 1-D array of row numbers, in any order, repeats allowed.

        Raises UnsupportedModelError for types without values of their own (integers, booleans, 8-bit floats),
        ValueError if `rows` is given and the tensor is no matrix, IndexError for a row number out of range.
        """
        if self.dtype not in DEQUANTIZABLE:
            supported = ", ".join(t.name for t in QuantType if t in DEQUANTIZABLE)
            raise UnsupportedModelError(
                f"tensor {self.name!r}: {self.dtype.name} weights cannot be dequantised; supported: {supported}"
            )
        if rows is None:
            return dequantize(self.data, self.dtype).reshape(self.shape)
        if len(self.shape) != 2:
            raise ValueError(f"tensor {self.name!r}: rows can be taken of a matrix only, and its shape is {self.shape}")
        if isinstance(rows, slice):
            return dequantize(self.stored[rows if self.order is None else self.order[rows]], self.dtype)
        index = self._row_index(rows, self.shape[0])
        if self.order is not None:
            index = self.order[index]
        out = np.empty((len(index), self.shape[1]), dtype=np.float32)
        step = max(1, CHUNK_VALUES // max(1, self.shape[1]))
        for start in range(0, len(index), step):
            dequantize(self.stored[index[start : start + step]], self.dtype, out[start : start + step])
        return out

    def select_rows(self, index: ArrayLike) -> RawTensor:
        """The packed rows `index` (1-D, in any order) of a matrix: values stay as they are, bit for bit.

        Rows of a matrix are not copied before they are used. A vector of a plain (not block-quantised) type is taken
        value by value, so that the bias of a linear follows its weight. Raises ValueError for any other shape and
        IndexError for a number out of range.
        """
        ndim = len(self.shape)
        if ndim == 2:
            checked = self._row_index(index, self.shape[0])
            order = checked if self.order is None else self.order[checked]
            return RawTensor(self.name, (len(checked), self.shape[1]), self.dtype, self.stored, order)
        if ndim == 1 and not self.dtype.is_quantized:
            checked = self._row_index(index, self.shape[0])
            values = self.data.reshape(self.shape[0], self.dtype.block_bytes)[checked]
            return RawTensor(self.name, (len(checked),), self.dtype, values.reshape(1, -1))
        raise ValueError(f"tensor {self.name!r}: {self.dtype.name} of shape {self.shape} has no rows to select")

    def view(self) -> NDArray[np.generic]:
        """The stored values without conversion or copy, of `shape`, for types that NumPy has.

        Raises UnsupportedModelError for BF16, 8-bit floats and block formats.
        """
        if self.dtype.numpy_dtype is None:
            raise UnsupportedModelError(f"tensor {self.name!r}: NumPy has no type for {self.dtype.name}")
        return self.data.reshape(-1).view(self.dtype.numpy_dtype).reshape(self.shape)

    def _row_index(self, rows: ArrayLike, limit: int) -> NDArray[np.intp]:
        index = np.asarray(rows)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise ValueError(f"tensor {self.name!r}: row numbers must be a 1-D array of integers")
        # Compared before the cast: a uint64 above 2^63 must not wrap into the range.
        if index.size and (index.min() < 0 or index.max() >= limit):
            raise IndexError(f"tensor {self.name!r}: row numbers must be in 0..{limit - 1}")
        return index.astype(np.intp)
