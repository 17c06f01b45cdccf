"""The log: no line that a client can forge, no prompt and no key in it, the same form for both processes, a line for
each request, and nobody who is held up by a log that nobody reads."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.core.errors import ConfigError
from octavo.server import logs
from octavo.server.logs import JSONFormatter, LogFormat, QueuedHandler, TextFormatter, line_of, logging_to, with_fields
from octavo.server.records import request_teller
from octavo.server.served_llm import ServedLLM
from octavo.server.settings import ServerSettings
from tests.server.broken_streams import killed, left, until_answered
from tests.server.conftest import Lines, Running, serving
from tests.server.test_serve import LONG, SOURCE, ended, served
from tests.server.test_streams import PATH

CHAT = "/v1/chat/completions"
STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO octavo: ")


def record(message: str, error: BaseException | None = None, **fields: Any) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    made = logging.LogRecord("octavo.x", logging.INFO, "", 1, message, None, info)
    made.__dict__.update(with_fields(**fields))
    return made


# --- forms ---

NASTY = st.text(st.sampled_from("ab \r\n\t\x00\x1b[31m\x7f\x85\x9b\u2028\u202e\ud800\"\\={}'é€")) | st.text()


@given(NASTY, NASTY, NASTY)
def test_a_line_of_text_cannot_be_forged(message: str, value: str, problem: str) -> None:
    """Whatever stands in a message, a field or an error: one line, and a traceback's behind it, which are indented."""
    try:
        raise ValueError(problem)
    except ValueError as error:
        text = TextFormatter("octavo").format(record(message, error, field=value, many=[value, 1], of={value: value}))
    first, *rest = text.split("\n")
    assert STAMP.match(first)
    assert rest and all(line.startswith("    ") for line in rest)
    assert all(one.isprintable() or one == "\t" for line in (first, *rest) for one in line)


@given(NASTY, NASTY, NASTY)
def test_a_line_of_json_cannot_be_forged(message: str, value: str, problem: str) -> None:
    try:
        raise ValueError(problem)
    except ValueError as error:
        text = JSONFormatter("octavo").format(record(message, error, field=value, many=[value, 1], of={value: value}))
    assert text.isprintable()
    told = json.loads(text)
    assert list(told) == ["time", "level", "process", "logger", "message", "field", "many", "of", "traceback"]
    assert told["level"] == "info" and told["process"] == "octavo" and told["logger"] == "octavo.x"
    if message.isprintable():
        assert told["message"] == message
    datetime.fromisoformat(told["time"])


@given(NASTY, NASTY)
def test_a_field_ends_where_the_next_begins(first: str, second: str) -> None:
    line = TextFormatter("octavo").format(record("done", a=first, b=second))
    found = re.fullmatch(r'.* done a=("(?:[^"\\]|\\.)*"|[^" ]+) b=("(?:[^"\\]|\\.)*"|[^" ]+)', line)
    assert found, line
    for text, word in ((first, found[1]), (second, found[2])):
        if text.isprintable():
            assert (json.loads(word) if word[0] == '"' else word) == text


def test_fields() -> None:
    text = TextFormatter("octavo").format(record("m", a=None, b=0, c=1.23456789, d=True, e="x y", f=["p", "q"], g=""))
    assert text.endswith(' octavo: m b=0 c=1.235 d=True e="x y" f=p,q g=""')
    told = json.loads(JSONFormatter("octavo").format(record("m", a=None, b=0, c=1.23456789, level="other", f=["p"])))
    assert told["b"] == 0 and told["c"] == 1.234568 and told["f"] == ["p"] and "a" not in told
    assert told["level"] == "info"  # a field takes no name of the form's own


def test_what_is_told_outside_the_log() -> None:
    told = json.loads(line_of(LogFormat("json", "error"), "serving", url="http://x"))
    assert (told["message"], told["url"], told["level"]) == ("serving", "http://x", "info")
    for fields in ({"format": "xml"}, {"level": "loud"}):
        with pytest.raises(ConfigError):
            LogFormat(**fields)


# --- who writes ---


class Kept:
    """A file that takes a few bytes at a time, and now and then none."""

    def __init__(self, hold: threading.Event | None = None) -> None:
        self.data = b""
        self._calls = 0
        self._hold = hold

    def write(self, data: bytes, /) -> int | None:
        if self._hold is not None:
            self._hold.wait(60)
            self.data += data
            return len(data)
        self._calls += 1
        if self._calls % 7 == 0:
            return None
        self.data += data[:5]
        return min(5, len(data))


def test_lines_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_POLL", 0)
    target = Kept()
    with logging_to(target, LogFormat("json", "info")):
        for number in range(50):
            logging.getLogger("octavo.x").info("n %d", number)
    assert [json.loads(line)["message"] for line in target.data.splitlines()] == [f"n {i}" for i in range(50)]


def test_a_log_that_nobody_reads_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines beyond those that may wait are dropped, and how many is told when it is read again."""
    monkeypatch.setattr(logs, "_WAITING", 10)
    read = threading.Event()
    target = Kept(read)
    handler = QueuedHandler(target, JSONFormatter("octavo"))
    for number in range(100):
        handler.emit(record(f"n {number}"))
    read.set()
    handler.close()
    told = [json.loads(line)["message"] for line in target.data.splitlines()]
    dropped = [line for line in told if "were dropped" in line]
    kept = [line for line in told if line.startswith("n ")]
    assert len(dropped) == 1 and dropped[0].startswith(f"{100 - len(kept)} lines") and 10 <= len(kept) <= 11
    assert kept == [f"n {i}" for i in range(len(kept))]


def test_a_log_that_is_never_read_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_END_SECONDS", 0.05)
    monkeypatch.setattr(logs, "_WAITING", 2)
    read = threading.Event()
    with logging_to(Kept(read), LogFormat("text", "info")):
        for _ in range(10):
            logging.getLogger("octavo.x").info("n")
    read.set()


def test_what_else_is_told(recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings of libraries, and Python's, and what threads die of; and afterwards all is as it was."""
    monkeypatch.setattr(logs, "_POLL", 0)
    target = Kept()
    root, ours = logging.getLogger(), logging.getLogger("octavo")
    before = root.handlers[:], root.level, ours.handlers[:], ours.level, threading.excepthook
    with logging_to(target, LogFormat("json", "debug")):
        ours.debug("ours")
        logging.getLogger("library").warning("theirs")
        logging.getLogger("library").info("not")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        thread = threading.Thread(target=lambda: 1 / 0, name="worker")
        thread.start()
        thread.join()
    assert before == (root.handlers[:], root.level, ours.handlers[:], ours.level, threading.excepthook)
    told = [json.loads(line) for line in target.data.splitlines()]
    assert [one["message"] for one in told[:2]] == ["ours", "theirs"]
    assert "old" in told[2]["message"] and told[2]["logger"] == "py.warnings"
    assert told[3]["message"] == "the thread worker died" and "ZeroDivisionError" in told[3]["traceback"]
    assert len(told) == 4


# --- a line for each request ---


@pytest.fixture(scope="module")
def apart(tiny_llama_dir: Path) -> Iterator[Running]:
    with serving(tiny_llama_dir, kind=ServedLLM) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion(apart: Running, lines: Lines, stream: bool) -> None:
    fox = "the fox and the dog " * 4
    body = {"prompt": [fox, fox], "max_tokens": 5, "n": 2, "temperature": 0, "stream": stream}
    if not stream:
        apart.post(PATH, body)  # cached from now on
    mine = f"mine-{stream}"
    told = lines.answered(apart.post(PATH, body, headers={"X-Request-Id": mine}))
    assert (told["request_id"], told["method"], told["route"], told["status"]) == (mine, "POST", PATH, 200)
    assert told["prompt_tokens"] == 2 * len(apart.llm.tokenizer.encode(fox))
    assert 0 < told["generated_tokens"] <= 20 and {*told["finish_reason"].split(",")} <= {"length", "stop"}
    assert told["model"] == "tiny" and told["level"] == "INFO" and "path" not in told and "failed" not in told
    assert 0 <= told["queue_time"] <= told["time_to_first_token"] <= told["duration"]
    assert told["cached_tokens"] >= (1 if not stream else 0)


def test_other_routes(apart: Running, lines: Lines) -> None:
    """Their templates, whatever the names in them are; what has no tokens tells of none."""
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    margins = {"document": "the fox and the dog. " * 9, "question": "who?", "segment_tokens": 64}
    margins |= {"margin": {"max_tokens": 3}, "answer": {"max_tokens": 3}}
    for path, body, tokens in (
        (CHAT, chat, True),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 3}, True),
        ("/v1/messages", {"model": "tiny", **chat}, True),
        ("/v1/embeddings", {"input": ["a", "b"]}, True),
        ("/v1/octavo/beam_search", {"prompt": "a", "beam_width": 2, "max_tokens": 3}, True),
        ("/v1/octavo/margins", margins, True),
        ("/v1/octavo/ask", {"question": "who?", "documents": [{"text": "the fox"}], "answer": {"max_tokens": 3}}, True),
        ("/tokenize", {"prompt": "a"}, False),
    ):
        answer = apart.post(path, body)
        assert answer.status_code == 200, answer.text
        told = lines.answered(answer)
        assert told["route"] == path and ("prompt_tokens" in told) == tokens and told["status"] == 200
        if tokens:
            assert told["prompt_tokens"] > 0 and told["generated_tokens"] >= (0 if "embed" in path else 1)
            assert ("time_to_first_token" in told) == ("embed" not in path)
    for path, template in (("/v1/models/tiny", "/v1/models/{model}"), ("/v1/models", "/v1/models")):
        told = lines.answered(apart.get(path))
        assert told["route"] == template and told["level"] == "INFO" and "prompt_tokens" not in told


def test_sessions(apart: Running, lines: Lines) -> None:
    """What their branches generate is counted, by the model's name and without their text."""
    root = "/v1/octavo/sessions"
    session = apart.post(root, {"prompt": "the fox"}).json()["id"]
    apart.post(f"{root}/{session}/fork", {"n": 1})
    for body, tokens in (({"branches": [0, 1]}, 6), ({}, 3)):
        body |= {"max_tokens": 3, "ignore_eos": True, "temperature": 0}
        told = lines.answered(apart.post(f"{root}/{session}/generate", body))
        assert told["route"] == root + "/{session_id}/generate" and told["generated_tokens"] == tokens
        assert told["model"] == "tiny" and told["finish_reason"] == "length" and "prompt_tokens" not in told
    apart.client.delete(f"{apart.url}{root}/{session}")


def test_what_machines_ask_is_told_at_level_debug(apart: Running, lines: Lines) -> None:
    for path in ("/live", "/ready", "/health", "/metrics", "/v1/octavo/stats", "/", "/page/main.js"):
        told = lines.answered(apart.get(path))
        assert told["status"] == 200 and told["level"] == "DEBUG" and told["route"] == path


def test_requests_that_are_refused(apart: Running, lines: Lines) -> None:
    told = lines.answered(apart.post(PATH, {"prompt": "x", "temperature": "SECRET"}))
    assert (told["status"], told["route"], told["level"]) == (400, PATH, "INFO")
    told = lines.answered(apart.get("/v1/nowhere/%0d%0aSECRET?key=sekret"))
    assert told["status"] == 404 and told["path"] == "/v1/nowhere/\r\nSECRET" and "route" not in told
    assert "sekret" not in str([one.__dict__ for one in lines.records])
    assert len(lines.answered(apart.get("/" + "x" * 3000))["path"]) == 200


def test_a_client_that_goes_away(apart: Running, lines: Lines) -> None:
    told = lines.answered(left(apart, PATH, {**LONG, "max_tokens": 1900}))
    assert told["finish_reason"] == "abort" and told["status"] == 200 and told["generated_tokens"] >= 1


def test_an_engine_that_is_killed(apart: Running, lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of an answer, which is told as one that failed, and so is why."""
    told = lines.answered(killed(apart, PATH, {**LONG, "max_tokens": 1900}))
    assert told["failed"] is True and told["finish_reason"] == "error" and told["level"] == "WARNING"
    (failed,) = [one for one in caplog.records if one.getMessage().startswith("a request failed: ")]
    assert failed.octavo_fields["request_id"] == told["request_id"]  # type: ignore[attr-defined]
    until_answered(apart, PATH, {"prompt": "x", "max_tokens": 2})


# --- prompts ---


def test_prompts_are_told_when_asked_for(apart: Running, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """With parameters that are not the default, and as the model sees them."""
    assert isinstance(apart.llm, ServedLLM)
    monkeypatch.setattr(apart.llm, "tell_request", request_teller(apart.llm.tokenizer.decode, 12))
    answer = apart.post(PATH, {"prompt": ["the quick fox\njumps", "x"], "max_tokens": 2, "stop": ["zzz"]})
    apart.post("/v1/octavo/margins", {"document": "all of it", "question": "q", "answer": None})
    apart.post("/v1/octavo/beam_search", {"prompt": "b", "beam_width": 2, "max_tokens": 3})
    apart.post("/v1/embeddings", {"input": "e", "pooling": "last"})
    *two, margins, beams, embeddings = lines.of("received", 5)
    assert sorted(one["prompt"] for one in two) == ["the quick fo...", "x"]
    for one in two:
        assert one["params"]["max_tokens"] == 2 and list(one["params"]["stop"]) == ["zzz"]
        assert "temperature" not in one["params"] and one["engine_id"].startswith("cmpl-")
        assert one["request_id"] == answer.headers["x-request-id"]
    assert margins["prompt"] == "all of it" and "margin" in margins
    assert beams["beams"]["beam_width"] == 2 and embeddings["params"] == {"pooling": "last"}


def test_what_is_asked_of_sessions_is_told_too(tiny_llama_dir: Path, lines: Lines) -> None:
    settings = ServerSettings(port=0, enable_log_requests=True, max_log_len=6)
    root = "/v1/octavo/sessions"
    with serving(tiny_llama_dir, settings) as running:
        session = running.post(root, {"prompt": "open it"}).json()["id"]
        running.post(f"{root}/{session}/extend", {"prompt": " and extend"})
        running.post(f"{root}/{session}/select", {"choices": ["a", "b"]})
        opened, extended, selected = lines.of("received", 3)
    assert {one["session"] for one in (opened, extended, selected)} == {session}
    assert [one["verb"] for one in (opened, extended, selected)] == ["open", "extend", "select"]
    assert opened["params"] == {"prompt": "open i..."} and extended["params"] == {"prompt": " and e..."}
    assert selected["params"] == {"choices": "['a', ..."}


# --- the program ---

MARKER = "sekretprompt"


def test_the_program(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """All that both processes tell at level debug is JSON; in it is no prompt, no key, and a line for each request."""
    (tmp_path / "keys").write_text("sekret-in-file\n")
    flags = ["--log-format", "json", "--api-key", "sekret-key", "--api-key-file", str(tmp_path / "keys")]
    variables = {"OCTAVO_API_KEY": "sekret-variable", "OCTAVO_LOG_LEVEL": "debug"}
    with served(tiny_llama_dir, *flags, **variables) as (process, url):
        for key, status in (("sekret-key", 200), ("sekret-variable", 200), ("sekret-in-file", 200), ("sekret-no", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            body = {"prompt": MARKER, "max_tokens": 2, "stop": [MARKER], "cache_salt": MARKER}
            assert httpx.post(url + PATH, json=body, headers=headers, timeout=60).status_code == status
        headers = {"x-api-key": "sekret-key"}
        for body in (
            {"messages": [{"role": "user", "content": MARKER}], "max_tokens": 2, "stream": True},
            {"messages": [{"role": MARKER, "content": MARKER}]},
            {"messages": [{"role": "user", "content": MARKER}], "response_format": {"type": MARKER}},
            {"messages": [{"role": "user", "content": MARKER}], "tools": [{"type": MARKER}], "user": MARKER},
        ):
            httpx.post(url + CHAT, json=body, headers=headers, timeout=60)
        httpx.post(url + CHAT, content=MARKER, headers=headers)
        httpx.get(url + "/v1/models?key=sekret-key", headers={"x-api-key": "sekret-key", "X-Request-Id": "a\tb"})
        process.send_signal(signal.SIGTERM)
        code, err = ended(process)
    told = [json.loads(line) for line in err.splitlines()]
    assert code == 0 and {one["process"] for one in told} == {"octavo", "octavo engine"}
    assert MARKER not in err and "sekret" not in err
    answered = [one for one in told if one["message"] == "answered"]
    assert [one["status"] for one in answered] == [200, 200, 200, 401, 200, 400, 400, 400, 415, 400]
    assert len({one["request_id"] for one in answered}) == 10
    assert [one for one in told if one["message"].startswith("SIGTERM")]


def test_the_program_with_nobody_who_reads_its_log(tiny_llama_dir: Path) -> None:
    """Guards a server whose requests wait for a full pipe."""
    with served(tiny_llama_dir) as (process, url), httpx.Client(timeout=60) as client:
        for _ in range(700):  # of more than 200 bytes each: a pipe has 64 KiB
            assert client.get(url + "/v1/models").status_code == 200
        assert process.stderr is not None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    lines = err.splitlines()
    assert sum(" answered " in line for line in lines) == 700
    form = re.compile(STAMP.pattern.replace("INFO octavo", "(INFO|WARNING) octavo( engine)?"))
    assert all(map(form.match, lines))


def test_the_program_that_cannot_start(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """What the engine's process says is told once, in the form that was asked for."""
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (model / "config.json").write_text("{}")
    for flags, start in ((["--log-format", "json"], "{"), ([], "octavo: error: ")):
        code, out, err = run("serve", str(model), "--port", "0", *flags)
        (line,) = err.splitlines()
        assert code == 2 and out == "" and line.startswith(start) and "config.json" in line
        if start == "{":
            assert json.loads(line)["level"] == "error"


def run(*arguments: str) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "octavo.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr
