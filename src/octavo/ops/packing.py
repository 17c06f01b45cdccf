"""Weights that a model has taken and that are still to be packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class PackedBytes(Protocol):
    """Weights as they lie in memory once they are packed, to a file and back."""

    identity: str  # all that these bytes depend on besides the tensors and Octavo's own code

    @property
    def nbytes(self) -> int: ...

    def write(self, fd: int, offset: int, stop: NDArray[np.uint8]) -> int:
        """To a file, from an offset on; a checksum. Raises OSError, once `stop` [1] is not 0 as well, which another
        thread may change."""
        ...

    def read(self, fd: int, offset: int) -> int:
        """What `write` wrote, instead of packing; the checksum of what was read. Raises OSError, and then nothing was
        read."""
        ...

    def release(self) -> None:
        """Forget what was read: it can be packed."""
        ...


class Packing(NamedTuple):
    """All weights since `Ops.defer_packing`. Before one is used they are packed, or their bytes are read, in any thread
    and while the tensors' file is open, and then `end` is called."""

    pack: Callable[[], None]
    end: Callable[[], None]  # the tensors are needed no more; weights that come later are packed at once
    packed: PackedBytes | None = None  # None: this backend keeps none
