"""Block ids, reference counts and the free list."""

from __future__ import annotations


class BlockPool:
    """`num_blocks` blocks, each free or referenced: by tables, and at most once by the radix tree.

    A block freed last is handed out first: its memory is the likeliest to be in a CPU cache still.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def allocate(self) -> int:
        """A free block, now referenced once. Raises IndexError when there is none: callers check `num_free` first."""
        block = self._free.pop()
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> int:
        """One more reference to a block that has some; how many it has now."""
        count = self._ref_counts[block] + 1
        if count < 2:
            raise ValueError(f"block {block} is free and cannot be shared")
        self._ref_counts[block] = count
        return count

    def release(self, block: int) -> int:
        """One reference less; how many are left. Without any the block is free."""
        left = self._ref_counts[block] - 1
        if left < 0:
            raise ValueError(f"block {block} is free already")
        self._ref_counts[block] = left
        if left == 0:
            self._free.append(block)
        return left
