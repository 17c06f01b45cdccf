"""What strangers send: the right status, in the one envelope, naming the field; and the engine goes on, with all blocks
back (the fixture `server` looks)."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.server.conftest import Running, error_of

PATH = "/v1/completions"
JSON = {"Content-Type": "application/json"}


def post(server: Running, content: Any, headers: dict[str, str] | None = None, path: str = PATH) -> httpx.Response:
    return server.client.post(server.url + path, content=content, headers={**JSON, **(headers or {})})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"prompt"',
        b"null",
        b"5",
        b'{"prompt": "x",}',
        b"{'prompt': 'x'}",
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": -Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "prompt": "y"}',
        b'{"prompt": "x", "logit_bias": {"1": 1, "1": 2}}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "stop": ["\\udfff"]}',
        b'{"prompt": "\x00"}',
        b'\xef\xbb\xbf{"prompt": "x"}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 1000000 + b"]" * 1000000 + b"}",
        b'{"prompt": "x", "metadata": ' + b'{"a":' * 70 + b"1" + b"}" * 71,
        b'{"prompt": [' + b"0," * (1 << 22) + b"0]}",
        b'"' * 300001,
        b'{"a":"' + b'\\"' * 3000000,
    ],
)
def test_bodies_that_are_no_json(server: Running, content: bytes) -> None:
    error_of(post(server, content), 400)


def test_what_json_allows(server: Running) -> None:
    """The strictness is not stricter than JSON: NUL as an escape, whole surrogate pairs, depth up to the limit."""
    deep = '{"a":' * 62 + "1" + "}" * 62
    body = '{"prompt": "\\u0000 \\ud83d\\ude00 x", "max_tokens": 1, "metadata": ' + deep + "}"
    assert post(server, body).status_code == 200


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"Content-Type": "text/plain"}, "Content-Type"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, "Content-Type"),
        ({"Content-Type": ""}, "Content-Type"),
        ({"Content-Type": "application/json; charset=utf-16"}, "Content-Type"),
        ({"Content-Encoding": "gzip"}, "Content-Encoding"),
        ({"Content-Encoding": "br"}, "Content-Encoding"),
    ],
)
def test_what_kind_of_body(server: Running, headers: dict[str, str], param: str) -> None:
    content = gzip.compress(b'{"prompt": "' + b"a" * 1000000 + b'"}') if "Content-Encoding" in headers else b"{}"
    error_of(post(server, content, headers), 415, param)


def test_bodies_that_are_too_large(server: Running) -> None:
    """By what they say, and by what comes: without a length, one of 100 MB is not kept."""
    most = server.context.settings.limits.max_body_bytes
    length = {"Content-Length": str(100 << 20)}
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port), timeout=30) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall((head + f"Content-Length: {length['Content-Length']}\r\n\r\n").encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        while sent < 100 << 20:
            sent += 1 << 20
            yield b" " * (1 << 20)

    with suppress(httpx.TransportError):  # it may go on to write to a connection that was closed
        error_of(httpx.post(server.url + PATH, content=chunks(), headers=JSON, timeout=60), 413)
    assert sent < most + (40 << 20)


def test_a_body_that_does_not_come(server: Running) -> None:
    """A client that sends a byte now and then holds up nobody."""
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port), timeout=30) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b"{")
        for _ in range(3):
            connection.sendall(b" ")
            assert server.post(PATH, {"prompt": "x", "max_tokens": 1}).status_code == 200


def raw(server: Running, request: bytes) -> httpx.Response:
    """What is answered to these bytes, and whether the connection ends with it."""
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
        connection.sendall(request)
        received = b""
        while part := connection.recv(4096):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x00\xa5\x01\r\n\r\n",
        b"GET /live HTTP/1.1\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost : x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_http(server: Running, request_bytes: bytes) -> None:
    """Has the one envelope too, and the connection ends."""
    error_of(raw(server, request_bytes), 400)


def test_two_lengths_of_one_body(server: Running) -> None:
    """A proxy that goes by the other one would take the rest for a request of somebody else's."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4\r\n"
    body = b'{"prompt": "x", "max_tokens": 1}'
    chunks = f"Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    error_of(raw(server, head.encode() + chunks), 400, "Transfer-Encoding")


@pytest.mark.parametrize("part", [b"GET /live?%s HTTP/1.1\r\nHost: x", b"GET /live HTTP/1.1\r\nHost: x\r\nX: %s"])
def test_heads_that_are_too_large(server: Running, part: bytes) -> None:
    """Whether they come whole or do not end."""
    most = server.context.settings.limits.max_header_bytes
    error_of(raw(server, part % (b"a" * most) + b"\r\n\r\n"), 431)
    error_of(raw(server, (part % (b"a" * most))[: most + 1]), 431)


@pytest.mark.parametrize("size", [100_000, 10_000_000])
def test_huge_headers(server: Running, size: int) -> None:
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port), timeout=30) as connection:
        try:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Junk: " + b"a" * size + b"\r\n\r\n")
            answer = connection.recv(4096)
        except (ConnectionResetError, BrokenPipeError):
            answer = b""
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([""], "prompt[0]"),
        (["x", ""], "prompt[1]"),
        ([[]], "prompt[0]"),
        ([-1], "prompt"),
        ([272], "prompt"),
        ([2**31], "prompt"),
        ([2**70], "prompt"),
        ([True], "prompt"),
        ([1.5], "prompt"),
        ([1, "x"], "prompt"),
        ([[1], "x", [None]], "prompt[2]"),
        (["x", 5], "prompt[1]"),
        ([[1], [-1]], "prompt[1]"),
        (["x"] * 100000, "prompt"),
        (5, "prompt"),
        ({"prompt": "x"}, "prompt"),
        ("x " * 2100, "prompt"),
        ([1] * 2048, "prompt"),
        ("x" * 3000000, "prompt"),
    ],
)
def test_prompts(server: Running, prompt: Any, param: str) -> None:
    error_of(server.post(PATH, {"prompt": prompt}), 400, param)


def test_a_prompt_of_special_tokens(server: Running) -> None:
    body = {"prompt": "<|im_start|><|im_end|><|endoftext|>", "max_tokens": 2}
    assert server.post(PATH, body).json()["usage"]["prompt_tokens"] == 3


BIG = 10**6


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 2},
        {"top_k": -2},
        {"top_k": 2**40},
        {"min_p": 1.5},
        {"n": 0},
        {"n": 129},
        {"n": BIG},
        {"n": 1.5},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 2**63},
        {"max_tokens": 1.0},
        {"min_tokens": 20, "max_tokens": 10},
        {"min_tokens": -1},
        {"seed": 2**64},
        {"seed": -1},
        {"logit_bias": {"300": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"1": 1e9}},
        {"logit_bias": {"1": "much"}},
        {"logit_bias": {str(n): 1 for n in range(2000)}},
        {"logit_bias": [1]},
        {"stop": [""]},
        {"stop": ["a"] * 10000},
        {"stop": "a" * 1000000},
        {"stop": [5]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [300]},
        {"bad_words": ["a"] * 1000},
        {"bad_words": ["ab" * 2000] * 100},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [272]},
        {"presence_penalty": 3},
        {"frequency_penalty": "x"},
        {"repetition_penalty": 0},
        {"logprobs": 21},
        {"logprobs": -1},
        {"logprobs": True},
        {"prompt_logprobs": 272},
        {"prompt_logprobs": 1, "stream": True},
        {"use_beam_search": True, "n": 2, "stream": True},
        {"use_beam_search": True, "n": 2, "top_p": 0.5},
        {"use_beam_search": True, "n": 0},
        {"use_beam_search": True, "n": 64},
        {"length_penalty": 2.0},
        {"stream_options": {"include_usage": True}},
        {"stream": "yes"},
        {"stream": 1},
        {"echo": "x"},
        {"priority": 1},
        {"priority": 2**70},
        {"priority": "high"},
        {"cache_salt": ""},
        {"cache_salt": 5},
        {"request_id": ""},
        {"request_id": "a/b"},
        {"request_id": "a" * 200},
        {"best_of": 2},
        {"suffix": "x"},
        {"store": True},
        {"temprature": 1},
        {"": 1},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": {}, "regex": "a"}},
        {"structured_outputs": {"shape": "round"}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"json": {"enum": []}}},
        {"structured_outputs": {"json": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}}},
        {"structured_outputs": {"grammar": "start: nothing"}},
        {"structured_outputs": {"grammar": "x" * (10 << 20)}},
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        {"repetition_detection": {"max_pattern_size": -1}},
    ],
    ids=lambda fields: ",".join(f"{name}={str(value)[:20]}" for name, value in fields.items()),
)
@pytest.mark.parametrize("stream", [False, True])
def test_parameters(server: Running, fields: dict[str, Any], stream: bool) -> None:
    """The same whether a stream was asked for: nothing has been sent yet."""
    body = {"prompt": "x", **fields}
    if stream and "stream" not in fields and "stream_options" not in fields:
        body["stream"] = True
    first = next(iter(fields))
    error = error_of(server.post(PATH, body), 400)
    names = {*fields, "stream", "stream_options"} | ({"n", "structured_outputs", "''"} if first else {"''", ""})
    assert error["param"].split(".")[0] in names, error


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"max_tokns": 4}, "max_tokns", "did you mean max_tokens?"),
        ({"qqq": 4}, "qqq", "allowed are allowed_token_ids, "),
        ({"stream_options": {"usage": True}}, "stream_options.usage", "is not known here"),
        ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format", "did you mean json_schema?"),
        ({"user": 5}, "user", "should be a valid string, not 5"),
        ({"metadata": "x"}, "metadata", "should be a valid dictionary, not 'x'"),
    ],
)
def test_names_that_are_not_known(server: Running, fields: dict[str, Any], param: str, told: str) -> None:
    body = {"prompt": "A", **fields}
    assert told in error_of(server.client.post(server.url + PATH, json=body), 400, param)["message"]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"oneOf": [{"type": "string"}] * 50},
        {"type": "string", "pattern": "(a+)+b(c|c)*$"},
        {"type": "string", "format": "no-such-format"},
        {"not": {}},
    ],
)
def test_schemas_that_are_odd(server: Running, schema: Any) -> None:
    """Taken or refused by name; never more than that."""
    response = server.post(PATH, {"prompt": "x", "structured_outputs": {"json": schema}, "max_tokens": 5})
    if response.status_code != 200:
        error_of(response, 400)


def test_what_is_extreme_but_allowed(server: Running) -> None:
    fields = {
        "temperature": 1e300,
        "top_k": 2**31 - 1,
        "logprobs": 20,
        "min_p": 1.0,
        "max_tokens": 2**31 - 1,
        "seed": 0,
    }
    body = {"prompt": [1] * 500, **fields, "prompt_logprobs": 20}
    assert server.post(PATH, body).status_code == 200
    bias = {str(n): -1e6 for n in range(272)}
    assert server.post(PATH, {"prompt": "x", "logit_bias": bias, "max_tokens": 2}).status_code == 200


def test_features_together(server: Running) -> None:
    """Beams × schema × stop × log-probabilities."""
    body = {
        "prompt": "x",
        "use_beam_search": True,
        "n": 3,
        "max_tokens": 8,
        "stop": ["z"],
        "logprobs": 2,
        "structured_outputs": {"regex": "[a-z]{2,6}"},
    }
    choices = server.post(PATH, body).json()["choices"]
    assert choices and all(one["text"].isalpha() for one in choices)


@pytest.mark.parametrize(
    "path", ["//v1/models", "/v1/../v1/models", "/v1/models/", "/V1/models", "/nowhere", "/v1/%2e%2e/x"]
)
def test_routes_that_there_are_not(server: Running, path: str) -> None:
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port), timeout=30) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 ") and json.loads(body)["error"]["type"] == "NotFoundError"


def test_methods(server: Running) -> None:
    error_of(server.get(PATH), 405)
    error_of(server.get("/reset_prefix_cache"), 405)
    error_of(httpx.delete(server.url + "/v1/models"), 405)


def test_model_names(server: Running) -> None:
    error_of(server.post(PATH, {"prompt": "x", "model": "other"}), 404, "model")
    error_of(server.post(PATH, {"prompt": "x", "model": 5}), 400, "model")
    error_of(server.post(PATH, {"prompt": "x", "model": "a\r\nb" * 1000}), 404, "model")


def test_ids_that_are_in_use(server: Running) -> None:
    """The first goes on."""
    body = {"prompt": "x", "request_id": "same", "stream": True, "ignore_eos": True, "max_tokens": 500}
    with server.client.stream("POST", server.url + PATH, json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        error_of(server.post(PATH, {**body, "stream": False}), 400, "request_id")
        assert list(lines)[-2] == "data: [DONE]"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": "the fox"}, 200),
        ({"prompt": ""}, 200),
        ({"prompt": "x", "add_special_tokens": False, "return_token_strs": True}, 200),
        ({"messages": [{"role": "user", "content": "hi"}]}, 200),
        ({"prompt": 5}, 400),
        ({}, 400),
        ({"prompt": "x", "messages": []}, 400),
        ({"prompt": "x", "tools": []}, 400),
        ({"prompt": "x" * 3000000}, 400),
        ({"messages": [{"role": "user", "content": "hi"}], "add_special_tokens": True}, 400),
    ],
)
def test_tokenize(server: Running, body: dict[str, Any], status: int) -> None:
    response = server.post("/tokenize", body)
    if status == 400:
        error_of(response, 400)
        return
    found = response.json()
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == server.llm.max_model_len
    text = server.post("/detokenize", {"tokens": found["tokens"]}).json()["prompt"]
    assert text == body.get("prompt", text)


@pytest.mark.parametrize("tokens", [None, "x", [-1], [272], [2**70], [True], [1.0], [[1]]])
def test_detokenize(server: Running, tokens: Any) -> None:
    error_of(server.post("/detokenize", {"tokens": tokens}), 400)


def test_grammars_of_others(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good request for which there is no turn to compile its grammar may come again, and is no bad one."""
    grammars = server.llm._frontend.tokens.grammars
    monkeypatch.setattr("octavo.text.grammars._TURN", 0.0)
    body = {"prompt": "x", "max_tokens": 3, "structured_outputs": {"choice": ["nobody asked for this"]}}
    taken = 0
    while grammars._turns.acquire(blocking=False):
        taken += 1
    try:
        answer = server.post(PATH, body)
        error_of(answer, 429, "structured_outputs.choice")
        assert int(answer.headers["retry-after"]) >= 1
    finally:
        grammars._turns.release(taken)
    assert server.post(PATH, body).status_code == 200
