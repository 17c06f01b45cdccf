"""From the grants of a plan to the arrays of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octavo.core.plan import Grant
from octavo.core.want import Hidden
from octavo.ops import Batch


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
        input_ids += grant.token_ids[grant.start : grant.stop]
        positions += range(grant.start, grant.stop)
        slots += [table[p // block_size] * block_size + p % block_size for p in range(grant.start, grant.stop)]
        query_start_loc.append(len(input_ids))
        tables[index, : len(table)] = table
        if grant.each_row is not None:
            wanted += [first + row for row in rows_with_next(grant)]
        last = len(input_ids) - 1
        if grant.want is not None and not isinstance(grant.want, Hidden) and wanted[-1:] != [last]:
            wanted.append(last)
    return Batch(
        input_ids=np.array(input_ids, np.int32),
        positions=np.array(positions, np.int32),
        query_start_loc=np.array(query_start_loc, np.int32),
        seq_lens=np.array([grant.stop for grant in grants], np.int32),
        block_tables=tables,
        slot_mapping=np.array(slots, np.int32),
        logits_indices=np.array(wanted, np.int32),
        block_size=block_size,
    )


def rows_with_next(grant: Grant) -> range:
    """Rows of a grant, from 0, whose next token the sequence already has and whose log-probability may be asked for."""
    first = 0 if grant.each_row is None else max(grant.each_row.start - grant.start, 0)
    return range(first, min(grant.stop, len(grant.token_ids) - 1) - grant.start)
