"""The block table of one sequence."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.kv_cache.radix_tree import Node


class BlockTable(list[int]):
    """Block ids; block i holds positions [i * block_size, ...). Changed by the manager alone.

    The first `node.depth` blocks are those of the radix tree on the way from its root to `node`.
    """

    __slots__ = ("awaits", "indexes", "namespace", "node", "request_id")

    def __init__(self, namespace: Hashable = None, request_id: str = "") -> None:
        super().__init__()
        self.namespace = namespace  # of the radix tree
        self.request_id = request_id
        self.node: Node | None = None  # None: at the root, which is made when it is needed
        self.indexes = True  # whether blocks that fill up still go into the tree
        self.awaits: bytes | None = None  # digest of the next block, if the tier was asked for it when last matched

    @property
    def num_indexed(self) -> int:
        """Blocks that are the tree's."""
        return 0 if self.node is None else self.node.depth
