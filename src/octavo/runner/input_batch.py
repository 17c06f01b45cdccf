"""From the grants of a plan to the arrays of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from octavo.core.plan import Grant
from octavo.core.want import Hidden
from octavo.ops import Batch


def make_batch(grants: Sequence[Grant], block_size: int) -> Batch:
    """Pack the grants' tokens one after the other; see Batch for shapes."""
    lengths = np.array([grant.num_tokens for grant in grants], np.int32)
    query_start_loc = np.zeros(len(grants) + 1, np.int32)
    np.cumsum(lengths, out=query_start_loc[1:])
    total = int(query_start_loc[-1])
    input_ids = np.empty(total, np.int32)
    positions = np.empty(total, np.int32)
    slots = np.empty(total, np.int32)
    tables = np.zeros((len(grants), max((len(grant.block_table) for grant in grants), default=0)), np.int32)
    for index, grant in enumerate(grants):
        rows = slice(query_start_loc[index], query_start_loc[index + 1])
        input_ids[rows] = grant.token_ids[grant.start : grant.stop]
        positions[rows] = np.arange(grant.start, grant.stop)
        tables[index, : len(grant.block_table)] = grant.block_table
        blocks, offsets = np.divmod(positions[rows], block_size)
        slots[rows] = tables[index, blocks] * block_size + offsets
    return Batch(
        input_ids=input_ids,
        positions=positions,
        query_start_loc=query_start_loc,
        seq_lens=np.array([grant.stop for grant in grants], np.int32),
        block_tables=tables,
        slot_mapping=slots,
        logits_indices=_wanted_rows(grants, query_start_loc),
        block_size=block_size,
    )


def _wanted_rows(grants: Sequence[Grant], query_start_loc: NDArray[np.int32]) -> NDArray[np.int32]:
    rows: list[int] = []
    for grant, first in zip(grants, query_start_loc[:-1], strict=True):
        wanted = list(rows_with_next(grant)) if grant.each_row is not None else []
        last = grant.num_tokens - 1
        if grant.want is not None and not isinstance(grant.want, Hidden) and (not wanted or wanted[-1] != last):
            wanted.append(last)
        rows += [int(first) + row for row in wanted]
    return np.array(rows, np.int32)


def rows_with_next(grant: Grant) -> range:
    """Rows of a grant, from 0, whose next token the sequence already has."""
    return range(min(grant.stop, len(grant.token_ids) - 1) - grant.start)
