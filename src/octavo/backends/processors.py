"""How many threads this process should compute with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SYSTEM = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def available_processors(
    system: Path = _SYSTEM, cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS, allowed: set[int] | None = None
) -> int:
    """Physical cores among the processors this process may use (default: its affinity), at most its cgroups' quota,
    rounded down; at least 1. Two threads on one core have one core's arithmetic between them."""
    if allowed is None:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    quota = cpu_quota(cgroups, own)
    cores = len({_core(system, processor) for processor in allowed})
    return max(cores if quota is None else min(cores, int(quota)), 1)


def _core(system: Path, processor: int) -> str:
    """The same for all processors of a physical core."""
    for name in ("core_cpus_list", "thread_siblings_list"):
        with suppress(OSError):
            return (system / f"cpu{processor}" / "topology" / name).read_text().strip()
    return str(processor)


def cpu_quota(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> float | None:
    """Processors' worth of time that the process's control groups (version 1 or 2, up to the root) leave it; None: no
    limit. See the kernel's admin-guide/cgroup-v2 (cpu.max) and scheduler/sched-bwc (cpu.cfs_quota_us)."""
    quotas = []
    for folder in _folders(cgroups, own):
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))  # ValueError: "max"
        with suppress(OSError, ValueError, ZeroDivisionError):
            microseconds = int((folder / "cpu.cfs_quota_us").read_text())
            if microseconds > 0:  # -1: no limit
                quotas.append(microseconds / int((folder / "cpu.cfs_period_us").read_text()))
    return min(quotas, default=None)


def _folders(cgroups: Path, own: Path) -> Iterator[Path]:
    """Of the groups that limit processors, from the process's own up to the root as it is seen from here."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    groups = [(cgroups, "/")]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            groups.append((cgroups, path))
        elif "cpu" in controllers.split(","):
            groups += [(cgroups / controllers, path), (cgroups / "cpu", path)]
    for root, path in groups:
        # Inside a container the path may be one of the host, which does not exist here: then the root remains.
        folder = root / path.strip("/")
        yield folder
        while folder != root:
            folder = folder.parent
            yield folder
