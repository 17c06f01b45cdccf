"""The metadata of one ragged batch. It is handed to the backend once a step (`Ops.prepare`).

Sequences' tokens are packed one after the other without padding. T = num_tokens, S = num_seqs, R = rows that something
wants. All arrays are int32 and C-contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Batch:
    input_ids: Ints  # [T] token ids
    positions: Ints  # [T] position of each token in its sequence
    query_start_loc: Ints  # [S + 1] sequence s has the rows [query_start_loc[s], query_start_loc[s + 1])
    block_tables: Ints  # [S, max blocks] block ids; entries past a sequence's blocks are 0 and never read
    slot_mapping: Ints  # [T] block * block_size + offset: where a token's K and V go
    logits_indices: Ints  # [R] rows that something wants, ascending
    block_size: int
    # Draft trees, or None where no sequence has one. Node i of a tree lies in a slot of its own; it sees the positions
    # before the tree and its ancestors and itself, in the order of their positions. A node follows its parent.
    tree_starts: Ints | None = None  # [S] position of a sequence's first drafts; -1: it has no tree
    tree_parents: Ints | None = None  # [T] row of a node's parent; -1: it is one of the first, or no node

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.query_start_loc) - 1
