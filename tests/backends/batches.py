"""Ragged batches over scattered blocks, for tests of ops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octavo.ops import Batch

UNUSED = 1 << 20  # a block id that no array has: reading the padding of a block table fails


def ragged(
    sequences: Sequence[tuple[int, int]], block_size: int = 4, vocab_size: int = 50, seed: int = 0
) -> tuple[Batch, int]:
    """A batch in which each sequence has (tokens cached before, tokens computed now); and the number of blocks.

    Blocks are dealt in random order. Tables are padded with ids out of range. Zero tokens now is an empty row range.
    """
    random = np.random.default_rng(seed)
    counts = [-(-(old + new) // block_size) for old, new in sequences]
    num_blocks = sum(counts) + 2  # two belong to nobody
    dealt = random.permutation(num_blocks)
    tables = np.full((len(sequences), max(counts, default=0) + 1), UNUSED, np.int32)
    slots, positions, at = [], [], 0
    for index, ((old, new), count) in enumerate(zip(sequences, counts, strict=True)):
        tables[index, :count] = dealt[at : at + count]
        at += count
        for position in range(old, old + new):
            positions.append(position)
            slots.append(int(tables[index, position // block_size]) * block_size + position % block_size)
    starts = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum([new for _, new in sequences], out=starts[1:])
    batch = Batch(
        input_ids=random.integers(0, vocab_size, starts[-1], dtype=np.int32),
        positions=np.array(positions, np.int32),
        query_start_loc=starts,
        block_tables=tables,
        slot_mapping=np.array(slots, np.int32),
        logits_indices=np.array([], np.int32),
        block_size=block_size,
    )
    return batch, num_blocks
