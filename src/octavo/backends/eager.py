"""`Ops.capture` of backends that run each op when it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from octavo.ops import Ops
    from octavo.ops.protocol import Array, BatchHandle, Replay


def run_eagerly(ops: Ops, function: Callable[[BatchHandle], Iterator[Array]]) -> Replay:
    """Call the function for each batch anew, and `ops.take_rows` where rows are wanted."""

    def replay(
        batch: BatchHandle, wanted: Mapping[int, NDArray[np.int32]] | None = None
    ) -> tuple[Array, dict[int, Array]]:
        taken: dict[int, Array] = {}
        for number, state in enumerate(function(batch)):
            if wanted and number in wanted:
                taken[number] = ops.take_rows(state, wanted[number])
        return state, taken

    return replay
