"""Clients that go away at any stage, that read slowly or not at all; and streams that end in an error. Real sockets."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from octavo import LLM, SamplingParams
from octavo.server.settings import Limits, ServerSettings
from octavo.server.streams import Outbox, event
from tests.pace import held
from tests.server.broken_streams import FAILING, SECRET, fail, late
from tests.server.conftest import MODEL, Running, error_of, serving

PATH = "/v1/completions"
LONG = {"prompt": "the quick brown fox", "max_tokens": 480, "ignore_eos": True, "seed": 1, "temperature": 1.0}


def connect(
    server: Running, body: dict[str, Any], path: str = PATH, receive_buffer: int | None = None
) -> socket.socket:
    """A connection on which a request was sent, and nothing read."""
    url = urlsplit(server.url)
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((url.hostname, url.port))
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def until(server: Running, num_requests: int) -> None:
    limit = time.monotonic() + 30
    while server.llm.num_unfinished_requests != num_requests:
        assert time.monotonic() < limit
        time.sleep(0.002)


KIND = b"Content-Type: application/json\r\n"
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 480, "ignore_eos": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": (PATH, LONG),
    "stream": (PATH, {**LONG, "stream": True}),
    "n": (PATH, {**LONG, "n": 4, "stream": True}),
    "prompts": (PATH, {**LONG, "prompt": ["a", "b", "c"], "stream": True}),
    "beams": (
        PATH,
        {**{k: v for k, v in LONG.items() if k not in ("seed", "temperature")}, "use_beam_search": True, "n": 3},
    ),
    "chat": ("/v1/chat/completions", {**CHAT, "stream": True}),
    "responses": ("/v1/responses", {"input": "hello", "ignore_eos": True, "stream": True}),
    "response": ("/v1/responses", {"input": "hello", "ignore_eos": True}),
    "messages": ("/v1/messages", {**CHAT, "stream": True}),
    "message": ("/v1/messages", CHAT),
    "margins": (
        "/v1/octavo/margins",
        {"document": "The fox is quick. " * 30, "question": "Who?", "stream": True, "segment_tokens": 50},
    ),
    "ask": ("/v1/octavo/ask", {"question": "fox?", "documents": [{"text": "The fox is quick."}], "stream": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_goes_away_while_it_is_answered(server: Running, kind: str) -> None:
    """Its request ends within a step or two, whatever was left of it: the engine is held until it has ended."""
    path, body = KINDS[kind]
    with held(server.engine, lambda: server.llm.num_unfinished_requests == 0, after=4):
        connection = connect(server, body, path)
        limit = time.monotonic() + 30
        while not server.llm.num_unfinished_requests:
            assert time.monotonic() < limit
            time.sleep(0.002)
        connection.close()
        until(server, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_while_it_waits(server: Running, stream: bool) -> None:
    """In the engine's queue: all places are taken, and nothing moves."""
    with held(server.engine, lambda: False, after=2):
        running = [connect(server, LONG) for _ in range(8)]
        until(server, 8)
        waiting = connect(server, {**LONG, "stream": stream})
        until(server, 9)
        waiting.close()
        until(server, 8)
        for connection in running:
            connection.close()
        until(server, 0)


def test_a_client_that_goes_away_with_another_request_sent(server: Running) -> None:
    """On the same connection, before the first was answered: that it has gone is noticed behind it."""
    with held(server.engine, lambda: server.llm.num_unfinished_requests == 0, after=4):
        connection = connect(server, LONG)
        until(server, 1)
        connection.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.05)  # for it to be read by itself
        connection.close()
        until(server, 0)


def test_requests_that_come_early_are_answered_in_turn(server: Running) -> None:
    with connect(server, {**LONG, "max_tokens": 200}) as connection:
        until(server, 1)
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" + b"x" * 1000000)
        received = b""
        with suppress(ConnectionResetError):  # of what came behind the last request nobody reads the rest
            while part := connection.recv(1 << 16):
                received += part
    first, _, second = received.partition(b'"usage"')
    assert first.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 200 " in second and b'"version"' in second


def test_a_client_that_goes_away_before_its_body(server: Running) -> None:
    url = urlsplit(server.url)
    for sent in (b"", b"POST", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"):
        with socket.create_connection((url.hostname, url.port)) as connection:
            connection.sendall(sent)


def test_a_client_that_goes_away_while_a_template_is_written(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it reaches the engine."""
    entered, leave = threading.Event(), threading.Event()
    write = server.llm.chat_prompt

    def slow(*args: Any, **options: Any) -> Any:
        entered.set()
        leave.wait(30)
        return write(*args, **options)

    monkeypatch.setattr(server.llm, "chat_prompt", slow)
    added = server.engine.num_steps
    connection = connect(server, CHAT, "/v1/chat/completions")
    assert entered.wait(30)
    connection.close()
    limit = time.monotonic() + 30
    while server.context.num_open:
        assert time.monotonic() < limit
        time.sleep(0.002)
    leave.set()
    assert server.llm.num_unfinished_requests == 0 and server.engine.num_steps == added


def test_clients_that_come_and_go_at_random(server: Running, llm: LLM) -> None:
    """The answers of those who stay are their own."""
    rng = random.Random(3)
    (expected,) = llm.generate(
        [LONG["prompt"]], SamplingParams(temperature=1.0, seed=1, max_tokens=60, ignore_eos=True)
    )
    staying: list[str] = []

    def stay() -> None:
        answer = server.post(PATH, {**LONG, "max_tokens": 60}).json()
        staying.append(answer["choices"][0]["text"])

    threads = [threading.Thread(target=stay) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(60):
        path, body = KINDS[rng.choice(list(KINDS))]
        connection = connect(server, body, path)
        if rng.random() < 0.7:
            time.sleep(rng.random() * 0.02)
        connection.close()
    for thread in threads:
        thread.join()
    assert staying == [expected.outputs[0].text] * 4


# --- slow readers ---


def test_pieces_are_merged_for_who_reads_slowly() -> None:
    async def run() -> None:
        outbox: Outbox[str] = Outbox(4, lambda old, new: old + new if old[0] == new[0] else None)

        async def work() -> None:
            for number in range(1000):
                outbox.put("ab"[number % 2])

        outbox.start(work())
        pieces: list[str] = []
        while (taken := await outbox.take(5)) is not None:
            pieces += taken
            assert len(taken) <= 4
        assert len("".join(pieces)) == 1000 and outbox.num_merged == 996

    asyncio.run(run())


def test_the_end_and_errors_come_behind_the_pieces() -> None:
    async def run() -> None:
        outbox: Outbox[int] = Outbox(4, lambda old, new: None)

        async def work() -> None:
            outbox.put(1)
            raise ValueError("late")

        outbox.start(work())
        assert await outbox.take(5) == [1]
        with pytest.raises(ValueError, match="late"):
            await outbox.take(5)
        silent: Outbox[int] = Outbox(4, lambda old, new: None)
        silent.start(asyncio.sleep(60))
        assert await silent.take(0.01) == []
        await silent.close()
        await silent.close()

    asyncio.run(run())


def test_no_character_ends_an_event_early() -> None:
    """Whatever a client takes for the end of a line."""
    text = "".join(map(chr, range(0x3000)))
    (line, *rest) = event({"text": text}).decode().splitlines()
    assert rest == [""] and json.loads(line[6:]) == {"text": text}


@pytest.fixture(scope="module")
def small(tiny_llama_dir: Path) -> Iterator[Running]:
    """A stream holds two pieces, and says something each 50 ms."""
    settings = ServerSettings(
        port=0,
        served_model_name=(MODEL,),
        limits=Limits(stream_buffer=2),
        sse_keep_alive_interval=0.05,
        max_num_queued_reqs=2,
    )
    with serving(tiny_llama_dir, settings, max_model_len=4096, max_num_seqs=4) as running:
        yield running


def test_a_reader_that_does_not_read_holds_up_nobody(small: Running) -> None:
    """Its own request runs to its end, its pieces merged, while others are answered; what it reads late is whole."""
    for listener in small.server.servers[0].sockets:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
    body = {**LONG, "max_tokens": 1000, "stream": True, "logprobs": 20}
    expected = small.post(PATH, {**LONG, "max_tokens": 1000}).json()["choices"][0]["text"]
    connection = connect(small, body, receive_buffer=4096)
    until(small, 1)
    for _ in range(5):
        assert small.post(PATH, {"prompt": "x", "max_tokens": 5}).status_code == 200
    until(small, 0)  # it has finished, though nobody has read
    received = b""
    connection.settimeout(30)
    while not received.endswith(b"0\r\n\r\n"):
        received += connection.recv(1 << 20)
    connection.close()
    # Without the frames of chunks, which may stand anywhere.
    events = [json.loads(one[6:]) for one in unchunked(received).split(b"\n\n") if one.startswith(b"data: {")]
    assert "".join(one["choices"][0]["text"] for one in events) == expected
    assert len(events) < 600
    assert b"data: [DONE]" in received
    small.until_idle()


def test_pieces_do_not_wait_for_acknowledgements(server: Running) -> None:
    """Guards 40 ms for each write: Nagle's algorithm is off."""
    with server.client.stream("POST", server.url + PATH, json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        for connection in list(server.server.server_state.connections):
            own = connection.transport.get_extra_info("socket")
            assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def unchunked(received: bytes) -> bytes:
    body, rest = b"", received.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body


def test_keep_alive_comments(small: Running) -> None:
    """Before the first token, when the engine has nothing to say, and not in the answer."""
    comments = threading.Event()
    with (
        held(small.engine, comments.is_set, after=0),
        small.client.stream(
            "POST", small.url + PATH, json={**LONG, "max_tokens": 5, "stream": True}, timeout=30
        ) as response,
    ):
        assert response.status_code == 200
        lines = response.iter_lines()
        assert [next(lines) for _ in range(4)] == [": keep-alive", "", ": keep-alive", ""]
        comments.set()
        rest = [line for line in lines if line.startswith("data")]
    assert rest[-1] == "data: [DONE]" and len(rest) > 1
    small.until_idle()


@pytest.mark.parametrize(
    ("kind", "first", "later"),
    [
        ("responses", ["response.created", "response.in_progress"], ": keep-alive"),
        ("messages", ["message_start"], "event: ping"),
    ],
)
def test_typed_streams_begin_before_there_is_anything_to_say(
    small: Running, kind: str, first: list[str], later: str
) -> None:
    path, body = KINDS[kind]
    kept = threading.Event()
    with (
        held(small.engine, kept.is_set, after=0),
        small.client.stream("POST", small.url + path, json={**body, "min_tokens": 1}, timeout=30) as response,
    ):
        lines = response.iter_lines()
        for name in first:
            assert next(lines) == f"event: {name}" and next(lines).startswith("data: ") and next(lines) == ""
        assert next(lines) == later
        kept.set()
    small.until_idle()


def test_clients_that_are_given_up(tiny_llama_dir: Path) -> None:
    """One that reads nothing, one whose head never ends, one that sends nothing, and one whose body never ends."""
    settings = ServerSettings(port=0, write_timeout=0.3, body_timeout=0.3)
    with serving(tiny_llama_dir, settings, max_model_len=4096) as running:
        for listener in running.server.servers[0].sockets:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        never = connect(running, {**LONG, "max_tokens": 4000, "stream": True, "logprobs": 20}, receive_buffer=4096)
        until(running, 1)
        running.until_idle()  # though its answer has not been read, nor is whole
        url = urlsplit(running.url)
        for head, answer in (
            (b"", b""),
            (b"GET /live HTTP/1.1\r\nX-A: ", b""),
            (
                b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
                b"408",
            ),
        ):
            with socket.create_connection((url.hostname, url.port), timeout=30) as connection:
                connection.sendall(head)
                received = b"".join(iter(lambda: connection.recv(4096), b""))
                assert received.partition(b" ")[2][:3] == answer
        never.close()
        assert running.get("/live").status_code == 200


# --- errors in the middle ---


def test_an_error_in_the_middle_of_a_stream(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an event of its own, without paths, and the stream ends without [DONE]; others go on."""
    fail(server, monkeypatch, after=20)
    body = {**LONG, "seed": FAILING, "stream": True}
    with server.client.stream("POST", server.url + PATH, json=body, timeout=60) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line.startswith("data")]
    error = json.loads(lines[-1][6:])["error"]
    assert error["code"] == 500 and "bad row" in error["message"]
    assert SECRET not in error["message"] and "line 5" not in error["message"]
    assert len(lines) > 1 and "data: [DONE]" not in lines
    error_of(server.post(PATH, {**LONG, "seed": FAILING}), 500)
    assert server.post(PATH, {**LONG, "max_tokens": 5}).status_code == 200


def test_a_deadline(server: Running) -> None:
    """In time or not at all: a status, or in a stream an error."""
    with held(server.engine, lambda: server.llm.num_unfinished_requests == 0, after=3):
        error_of(server.post(PATH, LONG, headers={"X-Request-Timeout": "0.2"}), 504)
    lines, _ = late(server, PATH, LONG)
    assert json.loads(lines[-1][6:])["error"]["code"] == 504
    for wrong in ("soon", "-1", "0", "nan", "1e9"):
        error_of(server.post(PATH, LONG, headers={"X-Request-Timeout": wrong}), 400, "X-Request-Timeout")


# --- too much at once ---


def test_a_full_queue(small: Running) -> None:
    """Four places and two that wait: the seventh is told when to come again."""
    with held(small.engine, lambda: False, after=2):
        connections = [connect(small, LONG) for _ in range(6)]
        until(small, 6)
        refused = small.post(PATH, LONG)
        error_of(refused, 429)
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        error_of(small.post(PATH, {**LONG, "stream": True}), 429)
        error_of(small.post("/v1/octavo/ask", KINDS["ask"][1]), 429)
        for connection in connections:
            connection.close()
        until(small, 0)
    small.until_idle()
    assert small.post(PATH, {"prompt": "x", "max_tokens": 1}).status_code == 200
