"""Restoring forks shared: what siblings had in common before a preemption is computed once, by the first of them."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from octavo.core.coordinator import Coordinator
from octavo.core.events import EventKind, EventRing, Reason
from octavo.core.sequence import Sequence
from octavo.kv_cache import KVCacheManager


def common_prefix(a: list[int], b: list[int]) -> int:
    """Number of leading tokens that two lists share. Bisects on slices, which compare at C speed."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def remember_shares(sequences: SequenceOf[Sequence], only: Sequence | None = None) -> None:
    """Before their blocks go: let each sequence know the earlier sibling with the longest common prefix."""
    for index, sequence in enumerate(sequences):
        if only is not None and sequence is not only:
            continue
        best: tuple[Sequence, int] | None = None
        for earlier in sequences[:index]:
            length = common_prefix(earlier.token_ids, sequence.token_ids)
            if length and (best is None or length > best[1]):
                best = (earlier, length)
        sequence.share = best


def settle_shares(coordinator: Coordinator, kv: KVCacheManager, events: EventRing) -> None:
    """Fork siblings' blocks where they are computed by now; a sequence's `share` stays set while they are not.

    Called before anything of the request is granted in a step, since a grant may move a sibling to copied blocks.
    """
    for sequence in coordinator.sequences:
        if sequence.share is None:
            continue
        sibling, length = sequence.share
        if (
            sibling.dropped
            or sequence.each_row is not None  # it wants rows, not only KV
            or sibling.token_ids[:length] != sequence.token_ids[:length]
        ):
            sequence.share = None  # what was to be shared is gone: compute it
            continue
        usable = min(length, sequence.num_tokens - 1)  # the last row is the sequence's own to compute
        if sibling.num_computed < usable and (sibling.num_pending or sibling.share is not None):
            continue
        usable = min(usable, sibling.num_computed)
        sequence.share = None
        if usable > sequence.num_computed:
            kv.free(sequence.block_table)
            sequence.block_table = kv.fork(sibling.block_table, usable)
            sequence.num_computed = usable
            detail = f"sequence {sequence.id}: {usable} tokens"
            events.emit(EventKind.RESTORED, coordinator.request_id, Reason.SHARED_FORK, detail)
