"""The processes that templates run in: ended from outside, left behind by a fork, not to be had at all."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from octavo.core.errors import RequestFailedError
from octavo.text.template_process import MAX_PROCESSES, Allowance, LimitExceededError, TemplateProcesses

TURNING = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def request(source: str, **variables: Any) -> dict[str, Any]:
    return {
        "source": source,
        "variables": variables,
        "now": "2024-02-29T13:00:00",
        "characters": 1 << 20,
        "memory": 64 << 20,
    }


@pytest.fixture
def processes() -> Iterator[TemplateProcesses]:
    own = TemplateProcesses(MAX_PROCESSES, kept=2)
    yield own
    own.close()


def ids(processes: TemplateProcesses) -> list[int]:
    return [process._process.pid for process in processes._idle]


def test_one_process_serves_many_requests(processes: TemplateProcesses) -> None:
    processes.prepare()
    first = ids(processes)
    for n in range(20):
        assert processes.ask(request("{{ n }}", n=n), Allowance(5)) == {"text": str(n)}
        assert ids(processes) == first


def test_what_one_request_asks_shares_its_time(processes: TemplateProcesses) -> None:
    allowance = Allowance(0.2)
    with pytest.raises(LimitExceededError, match=r"more than 0\.2 s"):
        for _ in range(10_000):  # each takes a millisecond at the least
            processes.ask(request("{% for a in range(99999) %}{% endfor %}"), allowance)
    with pytest.raises(LimitExceededError, match=r"more than 0\.2 s"):
        processes.ask(request("a"), allowance)
    assert processes.ask(request("a"), Allowance(0.2)) == {"text": "a"}


def test_who_waits_too_long_for_a_turn_is_refused() -> None:
    own = TemplateProcesses(1, kept=0)
    turn = own._turns  # taken as if a template were at work
    with turn, pytest.raises(RequestFailedError, match="too many chat templates"):
        own.ask(request("a"), Allowance(5, waiting=0.01))
    assert own.ask(request("a"), Allowance(5)) == {"text": "a"}


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_was_ended_while_idle_is_replaced(processes: TemplateProcesses, kill: signal.Signals) -> None:
    assert processes.ask(request("a"), Allowance(5)) == {"text": "a"}
    first = ids(processes)
    os.kill(first[0], kill)
    os.waitid(os.P_PID, first[0], os.WEXITED | os.WNOWAIT)
    assert processes.ask(request("b"), Allowance(5)) == {"text": "b"}
    assert ids(processes) != first


def test_one_that_used_up_its_time_is_gone(processes: TemplateProcesses) -> None:
    processes.prepare()
    first = ids(processes)
    with pytest.raises(LimitExceededError, match=r"more than 0\.1 s"):
        processes.ask(request(TURNING), Allowance(0.1))
    assert ids(processes) == []
    assert not Path(f"/proc/{first[0]}").exists()


def test_one_that_ran_out_of_memory_is_gone(processes: TemplateProcesses) -> None:
    reply = processes.ask(request("{% set x = [1] * 10**8 %}"), Allowance(5))
    assert reply == {"error": "limit", "message": "it used too much memory"}
    assert ids(processes) == []


def test_texts_larger_than_a_pipe_holds(processes: TemplateProcesses) -> None:
    text = "ä😀\ud800" * 300_000
    reply = processes.ask(request("{{ text }}", text=text) | {"characters": 1 << 24, "memory": 1 << 29}, Allowance(5))
    assert reply == {"text": text}


def test_an_interrupted_caller_leaves_no_process(processes: TemplateProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    processes.prepare()
    (process,) = processes._idle

    def interrupted(*_: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        processes.ask(request("a"), Allowance(5))
    assert process._process.returncode is not None
    assert processes.ask(request("b"), Allowance(5)) == {"text": "b"}


def test_more_threads_than_processes(processes: TemplateProcesses) -> None:
    barrier = threading.Barrier(3 * MAX_PROCESSES)

    def ask(n: int) -> dict[str, Any]:
        barrier.wait()
        return processes.ask(request("{{ n }}", n=n), Allowance(5))

    with ThreadPoolExecutor(barrier.parties) as pool:
        assert list(pool.map(ask, range(barrier.parties))) == [{"text": str(n)} for n in range(barrier.parties)]
    assert 1 <= len(ids(processes)) <= 2


def test_a_fork_has_processes_of_its_own(processes: TemplateProcesses) -> None:
    processes.prepare()
    first = ids(processes)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            alone = ids(processes) == []
            status = 0 if alone and processes.ask(request("child"), Allowance(5)) == {"text": "child"} else 2
            processes.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert processes.ask(request("parent"), Allowance(5)) == {"text": "parent"}
    assert ids(processes) == first


@pytest.mark.parametrize("executable", ["", "/nonexistent/python", "/bin/false"])
def test_where_none_can_be_started(
    processes: TemplateProcesses, monkeypatch: pytest.MonkeyPatch, executable: str
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(RequestFailedError, match="chat templates"):
        processes.ask(request("a"), Allowance(5))


def test_it_knows_no_secrets_and_may_do_little(processes: TemplateProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_API_KEY", "secret")
    assert processes.ask(request("a"), Allowance(5)) == {"text": "a"}
    (process,) = ids(processes)
    folder = Path(f"/proc/{process}")
    assert b"secret" not in (folder / "environ").read_bytes()
    limits = {line[:25].strip(): line[25:].split()[1] for line in (folder / "limits").read_text().splitlines()}
    assert limits["Max processes"] == limits["Max file size"] == limits["Max core file size"] == "0"
    assert limits["Max open files"] == "16"
