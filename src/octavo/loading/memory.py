"""The memory plan: computed, shown and if need be refused, before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from octavo.core.errors import OutOfMemoryError

# KV memory when kv_cache_memory_bytes is not given: this share of what weights and scratch leave, and at most so much
# unless one sequence of max_model_len needs more.
KV_SHARE = 0.5
KV_MOST_BYTES = 4 << 30
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on the machine, and how many blocks they buy."""

    available_bytes: int
    weights_bytes: int
    scratch_bytes: int  # most that a step needs for activations, scores and logits
    block_bytes: int  # one block, all layers
    num_blocks: int
    block_size: int  # tokens

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.scratch_bytes + self.kv_bytes

    def __str__(self) -> str:
        return (
            f"memory plan: weights {size(self.weights_bytes)} + scratch {size(self.scratch_bytes)} + KV "
            f"{size(self.kv_bytes)} ({self.num_blocks} blocks of {self.block_size} tokens, {size(self.block_bytes)} "
            f"each; {self.num_blocks * self.block_size} tokens) = {size(self.total_bytes)} of "
            f"{size(self.available_bytes)} available"
        )


def plan_memory(
    *,
    available_bytes: int,
    weights_bytes: int,
    scratch_bytes: int,
    block_bytes: int,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    kv_cache_memory_bytes: int | None,
) -> MemoryPlan:
    """Raises OutOfMemoryError, with the arithmetic, if one sequence of `max_model_len` tokens could not run."""
    needed = -(-max_model_len // block_size)
    if kv_cache_memory_bytes is not None:
        num_blocks = kv_cache_memory_bytes // block_bytes
        if num_blocks < needed:
            raise OutOfMemoryError(
                f"kv_cache_memory_bytes: {size(kv_cache_memory_bytes)} are {num_blocks} blocks of {size(block_bytes)}, "
                f"and a sequence of max_model_len={max_model_len} tokens needs {needed} "
                f"({size(needed * block_bytes)}). Give more memory or a smaller max_model_len"
            )
    else:
        left = available_bytes - weights_bytes - scratch_bytes
        affordable = min(int(left * KV_SHARE), KV_MOST_BYTES) // block_bytes
        num_blocks = min(max_num_seqs * needed, max(needed, affordable))
    plan = MemoryPlan(available_bytes, weights_bytes, scratch_bytes, block_bytes, num_blocks, block_size)
    if plan.total_bytes > available_bytes:
        raise OutOfMemoryError(
            f"the model does not fit: {plan}. Give a smaller max_model_len, max_num_batched_tokens or "
            "kv_cache_memory_bytes, or a smaller model"
        )
    return plan


def size(num_bytes: int) -> str:
    """Bytes for people, in binary units."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def available_memory() -> int:
    """Bytes this process may still take: the machine's available memory, or less if a cgroup says so."""
    available = _meminfo()
    for folder, limit_name, used_name, cache_name in (
        (_CGROUP, "memory.max", "memory.current", "inactive_file"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, used = int((folder / limit_name).read_text()), int((folder / used_name).read_text())
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
        # Cached file pages count as used, but make room when memory is wanted.
        used -= min(_statistic(folder / "memory.stat", cache_name), used)
        available = min(available, max(limit - used, 0))
    return min(available, _address_space_left())


def _statistic(path: Path, name: str) -> int:
    try:
        return next(int(value) for key, value in map(str.split, path.read_text().splitlines()) if key == name)
    except (OSError, ValueError, StopIteration):
        return 0


def _address_space_left() -> int:
    """What `ulimit -v` leaves this process; a very large number without one."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return 1 << 62
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        used = 0
    return max(limit - used, 0)


def _meminfo() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
