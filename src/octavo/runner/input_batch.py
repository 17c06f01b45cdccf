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
    starts, parents = [-1] * len(grants), list[int]()  # of draft trees
    for index, grant in enumerate(grants):
        table = grant.block_table
        first = len(input_ids)
        input_ids += grant.token_ids
        positions += range(grant.start, grant.stop if not grant.draft_parents else grant.first_draft)
        if grant.draft_parents:
            positions += [grant.position_of_draft(n) for n in range(grant.num_drafts)]
            starts[index] = grant.first_draft
            first_node = first + grant.num_tokens - grant.num_drafts
            nodes = [parent if parent < 0 else first_node + parent for parent in grant.draft_parents]
            parents += [-1] * (len(input_ids) - len(parents) - grant.num_drafts) + nodes
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
        tree_starts=np.array(starts, np.int32) if parents else None,
        tree_parents=np.array(parents + [-1] * (len(input_ids) - len(parents)), np.int32) if parents else None,
    )


def slot_of(grant: Grant, position: int, block_size: int) -> int:
    return grant.block_table[position // block_size] * block_size + position % block_size


def moves_of(grant: Grant, accepted: Sequence[int], block_size: int) -> list[tuple[int, int]]:
    """From which slots to which others K and V of the drafts that came true go."""
    first = grant.first_draft
    return [
        (slot_of(grant, first + number, block_size), slot_of(grant, first + depth, block_size))
        for depth, number in enumerate(accepted)
        if number != depth
    ]


def logits_requests(grants: Sequence[Grant]) -> list[RowRequest]:
    """What is wanted of logits, in the order of the batch's `logits_indices`: a row may be asked several times."""
    requests: list[RowRequest] = []
    number, last = -1, (-1, -1)
    for index, grant in enumerate(grants):
        for start, stop, want in grant.wants:
            if isinstance(want, Hidden):
                continue
            for row in range(start, stop):
                number += last != (index, row)
                last = index, row
                single = want if not isinstance(want, NextLogprobs) else want.of_row(row - start)
                is_node = grant.draft_parents and row >= grant.first_draft
                position = grant.position_of_draft(row - grant.first_draft) if is_node else row
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
