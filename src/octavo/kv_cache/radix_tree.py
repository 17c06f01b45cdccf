"""The radix tree of the prefix cache: token ids -> block ids, block by block (Zheng et al., 2024, RadixAttention).

An edge is one full block of token ids, so a node stands for a prefix of whole blocks and owns the block that holds the
last of them. Tokens are compared, never hashes alone: an edge is found by its tuple of tokens in a dict.

The tree holds one reference to each of its blocks. A node whose block nobody else refers to is idle. Whoever refers to
a block refers to all blocks before it, so the idle nodes are whole subtrees, and leaves of them can be evicted until
none is left.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import count

from octavo.core.namespace import SHARED, Namespace

Key = tuple[int, ...]  # the tokens of one block


class Node:
    """One block of a cached prefix."""

    __slots__ = (
        "block",
        "children",
        "depth",
        "digest",
        "idle",
        "key",
        "last_used",
        "parent",
        "prefix_hash",
        "request_id",
        "since",
    )

    def __init__(
        self, parent: Node | None, key: Key, block: int, request_id: str, since: float, prefix_hash: int
    ) -> None:
        self.parent = parent  # None: a root, or a node that is no longer in the tree
        self.key = key
        self.block = block  # -1: a root
        self.children: dict[Key, Node] = {}
        self.depth: int = 0 if parent is None else parent.depth + 1  # blocks from the root to here
        self.request_id = request_id  # whose computation this block is
        self.since = since  # seconds, when it came into the tree
        self.prefix_hash = prefix_hash  # of the namespace and all tokens up to here; for explanations alone
        self.digest: bytes | None = None  # names the prefix in a tier; made when it is needed
        self.idle = False
        self.last_used = 0  # tick of the tree's own clock

    @property
    def namespace(self) -> Namespace:
        """Its root's. In time of its depth."""
        node = self
        while node.parent is not None:
            node = node.parent
        return node._namespace if isinstance(node, Root) else SHARED  # of what has left the tree

    def path(self) -> Iterator[Node]:
        """This node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class Root(Node):
    """The empty prefix of a namespace."""

    __slots__ = ("_namespace",)

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(None, (), -1, "", 0.0, hash(namespace))
        self._namespace = namespace

    @property
    def namespace(self) -> Namespace:
        return self._namespace


class RadixTree:
    """Prefixes in namespaces; a block can be found only from the root of its own."""

    def __init__(self) -> None:
        self._roots: dict[Namespace, Root] = {}
        self._of_block: dict[int, Node] = {}
        self._idle_leaves: list[tuple[int, int, Node]] = []  # a heap by last use; entries may be out of date
        self._ticks = count(1)
        self.num_idle = 0

    @property
    def num_nodes(self) -> int:
        return len(self._of_block)

    def root(self, namespace: Namespace) -> Node | None:
        """None while nothing of the namespace is cached."""
        return self._roots.get(namespace)

    def node_of(self, block: int) -> Node | None:
        return self._of_block.get(block)

    def nodes(self) -> Iterator[Node]:
        return iter(tuple(self._of_block.values()))

    def walk(self, node: Node | None, token_ids: Sequence[int], block_size: int) -> Iterator[Node]:
        """The nodes below `node` that hold the next full blocks of `token_ids`, which begin with `node`'s prefix."""
        start = 0 if node is None else node.depth * block_size
        while node is not None and start + block_size <= len(token_ids):
            node = node.children.get(tuple(token_ids[start : start + block_size]))
            if node is not None:
                yield node
            start += block_size

    def insert(
        self, parent: Node | None, namespace: Namespace, key: Key, block: int, request_id: str, now: float
    ) -> Node:
        """A new child of `parent`, or of the namespace's root. Its block is in use: the caller's table refers to it."""
        if parent is None:
            parent = self._roots.setdefault(namespace, Root(namespace))
        node = Node(parent, key, block, request_id, now, hash((parent.prefix_hash, key)))
        parent.children[key] = node
        self._of_block[block] = node
        return node

    # --- idle and evicted ---

    def set_idle(self, node: Node) -> None:
        """Nobody but the tree refers to the node's block any more."""
        node.idle = True
        node.last_used = next(self._ticks)
        self.num_idle += 1
        if not node.children:
            self._push(node)

    def set_used(self, node: Node) -> None:
        node.idle = False
        self.num_idle -= 1

    def _push(self, node: Node) -> None:
        heapq.heappush(self._idle_leaves, (node.last_used, node.block, node))
        if len(self._idle_leaves) > 2 * len(self._of_block) + 64:
            # Prefixes that are used again and again leave old entries behind.
            self._idle_leaves = [
                (n.last_used, n.block, n) for n in self._of_block.values() if n.idle and not n.children
            ]
            heapq.heapify(self._idle_leaves)

    def least_recent(self) -> Node:
        """The idle leaf that was used longest ago, to be removed now: O(log n). IndexError when nothing is idle."""
        while True:
            last_used, block, node = heapq.heappop(self._idle_leaves)
            if node.idle and not node.children and node.last_used == last_used and self._of_block.get(block) is node:
                return node

    def remove(self, node: Node) -> None:
        """Take a leaf out of the tree."""
        parent = node.parent
        if parent is None or node.children:
            raise ValueError("only a leaf can be removed")
        del parent.children[node.key]
        del self._of_block[node.block]
        node.parent = None
        if node.idle:
            self.set_used(node)
        if parent.children:
            return
        if isinstance(parent, Root):
            del self._roots[parent.namespace]
        elif parent.idle:
            self._push(parent)

    def merge(self, source: Namespace, target: Namespace) -> list[int]:
        """Let all that is cached in one namespace, none of it in use, be the other's. Returns the blocks for which the
        other had one already: they are in the tree no longer."""
        root = self._roots.pop(source, None)
        if root is None:
            return []
        left: list[Node] = []
        pairs: list[tuple[Node, Node]] = [(root, self._roots.setdefault(target, Root(target)))]
        for old, new in pairs:  # grows while it is read
            for key, child in tuple(old.children.items()):
                there = new.children.setdefault(key, child)
                if there is child:
                    child.parent, child.digest = new, None
                    child.prefix_hash = hash((new.prefix_hash, key))
                else:
                    left.append(child)
                pairs.append((child, there))
        for node in left:
            self.set_used(node)
            del self._of_block[node.block]
            node.parent, node.children = None, {}
        return [node.block for node in left]

    def below(self, namespace: Namespace) -> list[Node]:
        """All nodes of a namespace, each before those below it."""
        root = self._roots.get(namespace)
        nodes: list[Node] = [] if root is None else [root]
        for node in nodes:  # grows while it is read
            nodes.extend(node.children.values())
        return nodes[1:]
