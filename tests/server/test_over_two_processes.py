"""The same application over an engine in a process of its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo import LLM, SamplingParams
from octavo.server.served_llm import ServedLLM
from tests.server.conftest import Running, error_of, serving
from tests.server.test_completions import DRAWN, PROMPT
from tests.server.test_streams import KINDS, LONG, PATH, connect, until


@pytest.fixture(scope="module")
def apart(tiny_llama_dir: Path) -> Iterator[Running]:
    with serving(tiny_llama_dir, kind=ServedLLM) as running:
        yield running


def test_answers_are_the_librarys(apart: Running, llm: LLM) -> None:
    (expected,) = llm.generate([PROMPT], SamplingParams(n=2, **DRAWN))  # type: ignore[arg-type]
    answer = apart.post(PATH, {"prompt": PROMPT, "n": 2, **DRAWN}).json()
    assert [one["text"] for one in answer["choices"]] == [one.text for one in expected.outputs]
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    assert apart.post("/v1/chat/completions", chat).status_code == 200
    error_of(apart.post(PATH, {"prompt": PROMPT, "logit_bias": {"999": 1}}), 400, "logit_bias")
    for path in ("/health", "/ready"):
        assert apart.get(path).status_code == 200


def test_metrics(apart: Running, server: Running) -> None:
    """Of a server that keeps some."""
    assert apart.post(PATH, {"prompt": PROMPT, "max_tokens": 3}).status_code == 200
    told = apart.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'octavo_generation_tokens_total{model_name="tiny"}' in told.text
    error_of(server.get("/metrics"), 404)


def test_sessions_are_measured(apart: Running) -> None:
    opened = apart.post("/v1/octavo/sessions", {"prompt": PROMPT}).json()["id"]
    assert apart.post(f"/v1/octavo/sessions/{opened}/fork", {"n": 2}).status_code == 200
    told = apart.get("/metrics").text
    assert 'octavo_num_sessions{model_name="tiny"} 1.0' in told
    assert 'octavo_num_session_branches{model_name="tiny"} 3.0' in told
    assert apart.client.delete(f"{apart.url}/v1/octavo/sessions/{opened}").status_code == 200
    assert 'octavo_num_sessions{model_name="tiny"} 0.0' in apart.get("/metrics").text


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_goes_away(apart: Running, kind: str) -> None:
    path, body = KINDS[kind]
    connection = connect(apart, body, path)
    limit = time.monotonic() + 30
    while not apart.context.admission.num_requests and time.monotonic() < limit:
        time.sleep(0.001)
    connection.close()
    until(apart, 0)


def test_an_engine_that_is_killed(apart: Running) -> None:
    """Who was being answered is told, and later ones are answered again."""
    with apart.client.stream(
        "POST", apart.url + PATH, json={**LONG, "max_tokens": 1900, "stream": True}, timeout=60
    ) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(apart.llm._loop.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        told = [line for line in lines if line.startswith("data: ")]
    assert '"error"' in told[-1] and '"code":5' in told[-1]
    limit = time.monotonic() + 30
    while apart.post(PATH, {"prompt": "x", "max_tokens": 2}).status_code != 200:
        assert time.monotonic() < limit
