"""Weights that a model has taken and that are still to be packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Packing(Protocol):
    """All weights since `Ops.defer_packing`. Before one is used they are packed or read, in any thread and while the
    tensors' file is open, and then `end` is called."""

    identity: str  # all that packed bytes depend on besides the tensors and Octavo's own code

    @property
    def nbytes(self) -> int:
        """Of what `write` writes; 0: it can neither write nor read."""
        ...

    def pack(self) -> None: ...

    def write(self, fd: int, offset: int, stop: NDArray[np.uint8]) -> int:
        """Packed weights to a file, from an offset on; a checksum of them. Raises OSError, once `stop` [1] is not 0 as
        well, which another thread may change."""
        ...

    def read(self, fd: int, offset: int) -> int:
        """What `write` wrote; the checksum of what was read. Raises OSError, and then nothing was read."""
        ...

    def release(self) -> None:
        """Forget what was read: it can be packed."""
        ...

    def end(self) -> None:
        """The tensors are needed no more. Weights that come later are packed at once."""
        ...


class InMemory:
    """A Packing that is nothing but packed."""

    identity = ""
    nbytes = 0

    def __init__(self, pack: Callable[[], None] = lambda: None) -> None:
        self.pack = pack

    def write(self, fd: int, offset: int, stop: NDArray[np.uint8]) -> int:
        raise NotImplementedError

    def read(self, fd: int, offset: int) -> int:
        raise NotImplementedError

    def release(self) -> None: ...

    def end(self) -> None: ...
