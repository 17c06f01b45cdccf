"""From the grants of a plan to the arrays of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from octavo.core.plan import Grant
from octavo.core.want import Hidden, NextLogprobs
from octavo.ops import Batch
from octavo.ops.rows import RowRequest


def make_batch(grants: Sequence[Grant], block_size: int) -> Batch:
    """Pack the grants' tokens one after the other; see Batch for shapes.

    Lists first: most steps are a few rows, for which NumPy's calls would cost more than their work.
    """
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    wanted: list[int] = []
    query_start_loc = [0]
    width = max((len(grant.block_table) for grant in grants), default=0)
    tables = np.zeros((len(grants), width), np.int32)
    for index, grant in enumerate(grants):
        table = grant.block_table
        first = len(input_ids)
        input_ids += grant.token_ids
        positions += range(grant.start, grant.stop)
        slots += [table[p // block_size] * block_size + p % block_size for p in range(grant.start, grant.stop)]
        query_start_loc.append(len(input_ids))
        tables[index, : len(table)] = table
        for start, stop, want in grant.wants:
            if not isinstance(want, Hidden):
                rows = range(first + start - grant.start, first + stop - grant.start)
                wanted += rows[1:] if wanted[-1:] == [rows[0]] else rows
    return Batch(
        input_ids=np.array(input_ids, np.int32),
        positions=np.array(positions, np.int32),
        query_start_loc=np.array(query_start_loc, np.int32),
        block_tables=tables,
        slot_mapping=np.array(slots, np.int32),
        logits_indices=np.array(wanted, np.int32),
        block_size=block_size,
    )


def logits_requests(grants: Sequence[Grant]) -> list[RowRequest]:
    """What is wanted of logits, in the order of the batch's `logits_indices`: a row may be asked several times."""
    requests: list[RowRequest] = []
    number, last = -1, (-1, -1)
    for index, grant in enumerate(grants):
        for start, stop, want in grant.wants:
            if isinstance(want, Hidden):
                continue
            for position in range(start, stop):
                number += last != (index, position)
                last = index, position
                single = want if not isinstance(want, NextLogprobs) else want.of_row(position - start)
                requests.append(RowRequest(number, position, single))
    return requests


def hidden_rows(grants: Sequence[Grant], batch: Batch) -> dict[int, NDArray[np.int32]]:
    """Rows of the batch whose hidden states are wanted, ascending, by layer."""
    found: dict[int, list[int]] = {}
    for index, grant in enumerate(grants):
        first = int(batch.query_start_loc[index]) - grant.start
        for start, stop, want in grant.wants:
            if isinstance(want, Hidden):
                for layer in dict.fromkeys(want.layers):
                    found.setdefault(layer, []).extend(range(first + start, first + stop))
    return {layer: np.array(rows, np.int32) for layer, rows in found.items()}
