"""Traffic of all kinds, half as much again as the server takes, for a while: nothing grows, nothing fails, and what
came in went out."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.test_faults import Program, program
from tests.server.traffic import Traffic

PLACES, QUEUE = 8, 8
CLIENTS = (PLACES + QUEUE) * 3 // 2


def resident(pid: int) -> int:
    """Bytes of memory."""
    line = next(one for one in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if one.startswith("Rss:"))
    return int(line.split()[1]) * 1024


def counted(running: Program, name: str) -> float:
    """Of /metrics, over all labels."""
    families = text_string_to_metric_families(httpx.get(f"{running.url}/metrics").text)
    return sum(one.value for family in families for one in family.samples if one.name == name)


@pytest.mark.parametrize("seconds", [60, pytest.param(1200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_soak(tiny_dir: Path, tmp_path: Path, seconds: int) -> None:
    flags = ["--max-num-seqs", str(PLACES), "--max-num-queued-reqs", str(QUEUE), "--limits", '{"max_sessions": 100}']
    flags += [
        "--kv-cache-memory-bytes",
        "1500000",
        "--kv-offload-dir",
        str(tmp_path / "kv"),
        "--kv-offload-bytes",
        "4000000",
    ]
    with program(tiny_dir, *flags) as running:
        traffic = Traffic(running.url, seed=6)
        pids = {"server": running.process.pid, "engine": running.engine}
        most: dict[str, list[int]] = {name: [0, 0] for name in pids}  # bytes, in the first half and in the second
        ends_at: list[float] = []  # when it does, once caches are full

        def is_over() -> bool:
            return bool(ends_at) and time.monotonic() > ends_at[0]

        async def watch() -> None:
            await until_it_grows_no_more(list(pids.values()))
            ends_at.append(time.monotonic() + seconds)
            while not is_over():
                half = time.monotonic() > ends_at[0] - seconds / 2
                for name, pid in pids.items():
                    most[name][half] = max(most[name][half], resident(pid))
                await asyncio.sleep(0.25)

        async def run() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(watch())
                group.create_task(traffic.run(CLIENTS, is_over))

        asyncio.run(run())
        running.until_idle()
        assert traffic.num_begun == traffic.num_ended
        assert set(traffic.ends) == {"ok", "429"}, traffic.ends
        assert set(traffic.kinds_ok) == set(Traffic.KINDS)
        assert running.stats()["restarts"] == 0 and running.engine == pids["engine"]
        assert counted(running, "octavo_admission_rejections_total") == traffic.ends["429"]
        until_no_session(running)
        for name, (before, after) in most.items():
            assert after <= before * 1.02, f"the {name}'s process grows: {before} to {after} bytes"


async def until_it_grows_no_more(pids: list[int]) -> None:
    """Until caches are full, however fast the machine is: for 10 s nothing grows by 0.7 %. Two minutes at most."""
    before = [0] * len(pids)
    for _ in range(12):
        now = [resident(pid) for pid in pids]
        if all(new <= old * 1.007 for new, old in zip(now, before, strict=True)):
            return
        before = now
        await asyncio.sleep(10)


def until_no_session(running: Program) -> None:
    """Leases end."""
    limit = time.monotonic() + 60
    while httpx.get(f"{running.url}/v1/octavo/sessions").json()["data"]:
        assert time.monotonic() < limit
        time.sleep(0.05)
