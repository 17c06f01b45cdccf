"""What happens to a server under load: engines that are killed, stopped or without memory, disks that are full, many
clients who come and go. The program itself, seen from outside: everything that was asked ends, with an answer or an
error, and no block is lost."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.server.processes import engines_of
from tests.server.test_serve import ended, served
from tests.server.traffic import Traffic

FLAGS = ("--max-num-seqs", "6", "--max-model-len", "1024", "--max-num-batched-tokens", "64", "--backend", "cpu")
LIMIT = 120.0  # seconds, for what must come


class Program:
    """`octavo serve` that runs."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    @property
    def engine(self) -> int:
        """The process that steps; 0 while there is none."""
        return next(iter(engines_of(self.process.pid)), 0)

    def stats(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/v1/octavo/stats").json())

    def until_idle(self) -> None:
        """No request is left, and all blocks are home."""

        def idle() -> bool:
            stats, load = self.stats(), httpx.get(f"{self.url}/server_info").json()["load"]
            nothing = stats["requests"] == load["num_requests"] == load["num_tokens"] == 0
            return nothing and stats["available_blocks"] == stats["blocks"] and load["num_open"] == 1  # this one

        until(idle)


def until(condition: Callable[[], Any]) -> None:
    limit = time.monotonic() + LIMIT
    while True:
        with suppress(httpx.HTTPError, KeyError):
            if condition():
                return
        assert time.monotonic() < limit, "it does not come"
        time.sleep(0.01)


@contextmanager
def program(model: Path, *flags: str) -> Iterator[Program]:
    with served(model, *FLAGS, "--enable-debug-routes", *flags) as (process, url):
        yield Program(process, url)


def under_load(running: Program, fault: Callable[[], None], seed: int) -> Traffic:
    """What came of clients who asked before a fault, meanwhile, and after it until all kinds were answered again."""
    traffic = Traffic(running.url, seed)
    since = 0

    async def strike() -> None:
        nonlocal since
        while traffic.ends["ok"] < 20:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(fault)
        traffic.kinds_ok.clear()
        since = traffic.ends["ok"]

    def well_again() -> bool:
        return bool(since) and len(traffic.kinds_ok) == len(Traffic.KINDS)

    async def run() -> None:
        async with asyncio.timeout(2 * LIMIT), asyncio.TaskGroup() as group:
            group.create_task(strike())
            group.create_task(traffic.run(9, well_again))

    asyncio.run(run())
    assert traffic.num_begun == traffic.num_ended
    return traffic


@pytest.mark.parametrize("fault", ["killed", "stopped", "killed twice"])
def test_an_engine_that_ends(tiny_dir: Path, fault: str) -> None:
    with program(tiny_dir, "--hang-timeout", "3") as running:

        def strike() -> None:
            for _ in range(2 if fault == "killed twice" else 1):
                first = running.engine
                os.kill(first, signal.SIGSTOP if fault == "stopped" else signal.SIGKILL)
                until(lambda: running.engine not in (0, first))  # noqa: B023
            assert httpx.get(f"{running.url}/live").status_code == 200

        traffic = under_load(running, strike, seed=1)
        # Sessions that were open are gone: 404.
        assert set(traffic.ends) <= {"ok", "500", "503", "404"}
        running.until_idle()
        assert running.stats()["restarts"] >= 1


@pytest.mark.parametrize("who", ["server", pytest.param("both", marks=pytest.mark.slow)])
def test_a_server_that_is_stopped_for_a_while(tiny_dir: Path, who: str) -> None:
    """By Ctrl-Z or a container that is paused: it goes on as if nothing had been, and its engine lives."""
    with program(tiny_dir, "--hang-timeout", "6") as running:

        def strike() -> None:
            stopped = [running.process.pid] + ([running.engine] if who == "both" else [])
            for sig in (signal.SIGSTOP, signal.SIGCONT):
                for pid in stopped:
                    os.kill(pid, sig)
                time.sleep(8 if sig == signal.SIGSTOP else 0)

        traffic = under_load(running, strike, seed=7)
        # Leases of sessions may have ended, and connections that nobody had used for so long.
        assert set(traffic.ends) <= {"ok", "404", "gone"}
        running.until_idle()
        assert running.stats()["restarts"] == 0


def test_an_engine_without_memory(tiny_dir: Path) -> None:
    """Whatever it cannot do, it says so, or ends and is started again; with memory all is well."""
    with program(tiny_dir) as running:

        def strike() -> None:
            engine = running.engine
            size = next(line for line in Path(f"/proc/{engine}/status").read_text().splitlines() if "VmSize" in line)
            used = int(size.split()[1]) * 1024
            _limit(engine, resource.RLIMIT_AS, used)
            time.sleep(1)
            _limit(engine, resource.RLIMIT_AS, resource.RLIM_INFINITY)

        traffic = under_load(running, strike, seed=2)
        assert set(traffic.ends) <= {"ok", "500", "503", "404"}
        running.until_idle()


def test_a_disk_that_is_full(tiny_dir: Path, tmp_path: Path) -> None:
    """The file tier keeps less: nobody's answer fails."""
    flags = ("--kv-offload-dir", str(tmp_path / "kv"), "--kv-cache-memory-bytes", "1000000")
    with program(tiny_dir, *flags) as running:
        traffic = under_load(running, lambda: _limit(running.engine, resource.RLIMIT_FSIZE, 0), seed=3)
        assert set(traffic.ends) == {"ok"}
        running.until_idle()
        assert running.stats()["restarts"] == 0


def _limit(pid: int, what: int, most: int) -> None:
    with suppress(ProcessLookupError):
        _, hard = resource.prlimit(pid, what)
        resource.prlimit(pid, what, (most, hard))


@pytest.mark.parametrize("signals", [1, 2])
def test_an_end_under_load(tiny_dir: Path, signals: int) -> None:
    """Each request ends: with its answer, with 503, or is not taken any more."""
    with program(tiny_dir) as running:
        traffic = Traffic(running.url, seed=4)

        def is_over() -> bool:
            if traffic.ends["ok"] >= 20 and running.process.poll() is None and not sent:
                for _ in range(signals):
                    running.process.send_signal(signal.SIGTERM)
                    sent.append(time.sleep(0.05))
            return running.process.poll() is not None

        sent: list[None] = []
        asyncio.run(traffic.run(9, is_over))
        assert traffic.num_begun == traffic.num_ended and set(traffic.ends) <= {"ok", "503", "500", "404", "gone"}
        code, _ = ended(running.process)
        assert code in ((0,) if signals == 1 else (0, 130))


def test_many_connections(tiny_dir: Path) -> None:
    """2,000 that say nothing, and 500 that come and go at any moment: who asks is answered meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"a process may have {hard} files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    rng = random.Random(5)
    with program(tiny_dir) as running:
        address = (urlsplit(running.url).hostname, urlsplit(running.url).port)
        idle = [socket.create_connection(address, timeout=LIMIT) for _ in range(2000)]  # type: ignore[arg-type]
        try:
            body = b'{"prompt": "the fox", "max_tokens": 500, "ignore_eos": true, "stream": %s}'
            for number in range(500):
                content = body % rng.choice([b"true", b"false"])
                head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                request = head + b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
                with socket.create_connection(address, timeout=LIMIT) as connection:  # type: ignore[arg-type]
                    connection.sendall(request[: rng.choice([0, rng.randrange(len(request)), len(request)])])
                    if rng.random() < 0.3:
                        time.sleep(rng.random() * 0.01)
                if number % 100 == 0:
                    answer = httpx.post(f"{running.url}/v1/completions", json={"prompt": "x", "max_tokens": 2})
                    assert answer.status_code in (200, 429)
            running.until_idle()
            answer = httpx.post(f"{running.url}/v1/completions", json={"prompt": "x", "max_tokens": 2})
            assert answer.status_code == 200
        finally:
            for connection in idle:
                connection.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
