"""Streams that do not come to their end: the sampler fails, the deadline is over, the client goes, or the engine."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import httpx
import pytest

from tests.pace import held
from tests.server.conftest import Running

FAILING = 666  # the seed of requests that fail
SECRET = "somebody"  # stands in the error, and is not to be told


def fail(server: Running, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Requests of the seed that fails do, once so many rows of theirs were drawn."""
    ops = server.engine._executor._runner._ops
    sample, rows = ops.sample, 0

    def failing(logits: Any, requests: Any) -> Any:
        nonlocal rows
        meant = any(request.want.draws[0].seed == FAILING for request in requests)
        rows += meant
        if meant and rows > after:
            raise ArithmeticError(f"bad row in /home/{SECRET}/octavo/ops.py\nline 5")
        return sample(logits, requests)

    monkeypatch.setattr(ops, "sample", failing)


def late(server: Running, path: str, body: dict[str, Any]) -> tuple[list[str], httpx.Response]:
    """The lines of a stream that has begun when its time is over, without those that are empty."""
    with held(server.engine, lambda: server.llm.num_unfinished_requests == 0, after=6):
        headers, asked = {"X-Request-Timeout": "0.5"}, {**body, "stream": True}
        with server.client.stream("POST", server.url + path, json=asked, headers=headers) as response:
            return [line for line in response.iter_lines() if line], response


def left(server: Running, path: str, body: dict[str, Any]) -> httpx.Response:
    """The answer to a client that goes away in the middle of it."""
    with server.client.stream("POST", server.url + path, json=body, timeout=60) as response:
        next(response.iter_lines())
    return response


def killed(server: Running, path: str, body: dict[str, Any]) -> httpx.Response:
    """One whose engine is killed in the middle of it."""
    with server.client.stream("POST", server.url + path, json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(server.llm._loop.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        list(lines)
    return response


def until_answered(server: Running, path: str, body: dict[str, Any]) -> None:
    """Until there is an engine again."""
    limit = time.monotonic() + 60
    while server.post(path, body).status_code != 200:
        assert time.monotonic() < limit
