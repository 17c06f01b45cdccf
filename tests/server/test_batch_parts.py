"""The parts of a batch: what is kept of an output, how much is read and asked at once, and what memory that takes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from octavo.core.errors import InvalidRequestError
from octavo.server.app import make_app
from octavo.server.batch.answers import BatchAnswer, BatchError, BatchResponse, Output, as_line, open_output
from octavo.server.batch.ledger import Ledger, open_ledger
from octavo.server.batch.requests import BadLine, BatchInput, BatchRequest
from octavo.server.batch.runner import BatchRunner
from octavo.server.settings import Limits, ServerSettings
from tests.server.batches import as_lines, request
from tests.server.conftest import Running

BODY = {"object": "text_completion", "text": 'é "\n', "system_fingerprint": "octavo-1"}


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with open_ledger() as ledger:
        yield ledger


def answered(custom_id: str, status: int = 200, body: Any = BODY) -> bytes:
    response = BatchResponse(status, "0", msgspec.Raw(json.dumps(body).encode()))
    return as_line(BatchAnswer(f"batch_req_{custom_id}", custom_id, response, None))


REFUSED = as_line(BatchAnswer("batch_req_x", None, None, BatchError("invalid_line", "line 3 is nothing")))


def kept(path: Path, ledger: Ledger) -> bytes:
    """What is there when a batch goes on."""
    output = open_output(str(path))
    try:
        output.find(ledger)
        output.begin()
        output.put(BatchAnswer("batch_req_new", "new", None, BatchError("a", "b")))
    finally:
        output.close()
    content = path.read_bytes()
    new = as_line(BatchAnswer("batch_req_new", "new", None, BatchError("a", "b")))
    assert content.endswith(new)
    return content.removesuffix(new)


# --- output ---


def test_a_file_cut_off_anywhere(tmp_path: Path) -> None:
    """Every line that is whole stays, and nothing else."""
    path = tmp_path / "out.jsonl"
    lines = [answered("a"), answered("b")]
    whole = b"".join(lines)
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        with open_ledger() as ledger:
            assert kept(path, ledger) == whole[: whole[:end].rfind(b"\n") + 1]
            assert ledger.answer("a") == (None if end < len(lines[0]) else "batch_req_a")
            assert ledger.answer("b") == (None if end < len(whole) else "batch_req_b")


def test_only_what_has_succeeded_is_kept(tmp_path: Path, ledger: Ledger) -> None:
    """In a file that takes the place of the old one, with its rights, and behind its link."""
    path, link = tmp_path / "out.jsonl", tmp_path / "link"
    failed = [answered(f"{status}", status, {"error": {"message": "x"}}) for status in (400, 404, 429, 500, 503)]
    path.write_bytes(answered("a") + b"".join(failed) + REFUSED + answered("b") + answered("c")[:-1])
    path.chmod(0o640)
    link.symlink_to(path)
    output = open_output(str(link))
    output.find(ledger)
    assert output.num_answered == 2
    before = path.read_bytes()
    output.close()
    assert path.read_bytes() == before  # until it begins
    with open_ledger() as other:
        assert kept(link, other) == answered("a") + answered("b")
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "out.jsonl"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"precious notes", "was not written by octavo run-batch: see line 1"),
        (b"precious notes\n", "see line 1"),
        (b"\x00" * 5000, "see line 1"),
        (b"\n", "see line 1"),
        (as_lines([request("a")]).encode(), "see line 1"),
        (answered("a") + b"notes", "see line 2"),
        (answered("a") + b"\n", "see line 2"),
        (answered("a") + answered("b").replace(b'"error":null', b'"error":null,"more":1'), "see line 2"),
        (answered("a")[:-3] + b"\n" + answered("b"), "see line 1"),
        (answered("a").replace(b"batch_req_", b"vllm-"), "see line 1"),
        (answered("a") + answered("b") + answered("a"), "answers 'a' a second time in line 3"),
    ],
)
def test_what_is_not_ours_is_left_alone(tmp_path: Path, ledger: Ledger, content: bytes, problem: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    output = open_output(str(path))
    with pytest.raises(InvalidRequestError, match=problem):
        output.find(ledger)
    output.close()
    assert path.read_bytes() == content
    output = open_output(str(path), overwrite=True)
    with open_ledger() as other:
        output.find(other)
    output.begin()
    output.close()
    assert path.read_bytes() == b""


def test_answers_of_another_model(tmp_path: Path, ledger: Ledger) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(answered("a", body={"data": []}) + answered("b"))
    output = open_output(str(path))
    output.find(ledger)
    output.check_fingerprint("octavo-1")
    with pytest.raises(InvalidRequestError, match="another model or version, by the system_fingerprint octavo-1"):
        output.check_fingerprint("octavo-2")
    with pytest.raises(InvalidRequestError, match="is being written by another program"):
        open_output(str(path))
    output.close()


def test_a_disk_that_is_full(tmp_path: Path, ledger: Ledger) -> None:
    """What is whole by then is found when the batch goes on."""
    import resource

    path = tmp_path / "out.jsonl"
    output = open_output(str(path))
    output.find(ledger)
    output.begin()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InvalidRequestError, match=r"out.jsonl cannot be written: File too large"):
            for number in range(100):
                output.put(msgspec.json.decode(answered(str(number)), type=BatchAnswer))
    finally:
        output.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.stat().st_size == 1000 and not path.read_bytes().endswith(b"\n")
    assert kept(path, ledger) == b"".join(answered(str(number)) for number in range(number))


# --- input ---


def test_an_input_takes_no_memory(ledger: Ledger) -> None:
    """However long it is: it is read as it is asked for, and what is known of it is on a disk."""

    class Endless(io.RawIOBase):
        """Many requests."""

        def __init__(self) -> None:
            self.num_read = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            if self.num_read == 10_000:
                return 0
            line = as_lines([request(f"a request of some length {self.num_read}", {"prompt": "x" * 100})]).encode()
            self.num_read += 1
            buffer[: len(line)] = line
            return len(line)

    raw = Endless()
    source = BatchInput("x", io.BufferedReader(raw), ledger, Limits())
    items = iter(source)
    assert isinstance(next(items), BatchRequest) and raw.num_read < 100
    for _ in range(1000):
        next(items)
    tracemalloc.start()
    size = 0
    for item in items:
        size += item.size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.num_requests == 10_000 and size > 1.5e6
    assert peak < 4e5
    assert ledger.num_unasked == 0 and not ledger.note_asked("a request of some length 7")


def test_lines_without_an_end(ledger: Ledger) -> None:
    """One that is too long is told, and not kept; the last needs no end."""
    limits = Limits(max_body_bytes=1000)
    most = 1000 + (1 << 16)
    good = json.dumps(request("good")).encode()
    fits = good + b" " * (most - len(good) - 1) + b"\n"
    lines = [b" " * (3 * most) + b"\n", good.replace(b"good", b"fine") + b"\n", b"x" * (most + 1) + b"\n", fits, good]
    file = io.BytesIO(b"".join(lines[:4]) + b"x" * most + good)
    items = list(BatchInput("x", file, ledger, limits))
    assert [type(one) for one in items] == [BadLine, BatchRequest, BadLine, BatchRequest, BadLine]
    assert [one.number for one in items] == [1, 2, 3, 4, 5]
    assert sum(one.size for one in items) == len(file.getvalue())


def ids(*lines: str) -> list[str]:
    with open_ledger() as ledger:
        file = io.BytesIO("\n".join(lines).encode())
        return [one.id for one in BatchInput("x", file, ledger, Limits())]


def test_ids_are_the_requests() -> None:
    """The same for the same, however it is written; another for any other."""
    (expected,) = ids(json.dumps(request("a", {"prompt": "\u00e9", "n": 1})))
    same = json.dumps(request("a", {"prompt": "\u00e9", "n": 1}), separators=(" ,", " : "), ensure_ascii=False)
    assert ids("", same) == [expected]
    bodies = {"prompt": "\u00e9", "n": 2}, {"prompt": "\u00e9", "n": 1.0}, {"prompt": "\u00e9"}
    others = [request("b", {"prompt": "\u00e9", "n": 1}), *(request("a", body) for body in bodies)]
    found = [ids(json.dumps(one))[0] for one in others]
    assert len({expected, *found, *ids("x", "y")}) == len(found) + 3


# --- on its way ---


class Kept(Output):
    """In memory."""

    def __init__(self) -> None:
        super().__init__("memory", io.BytesIO())
        self.answers: list[BatchAnswer] = []

    def put(self, answer: BatchAnswer) -> None:
        self.answers.append(answer)


def run(server: Running, file: Any, settings: ServerSettings | None = None, watch: Any = None) -> list[BatchAnswer]:
    """Through an application over the server's engine."""
    settings = settings or ServerSettings(max_num_queued_reqs=2**31 - 1, max_num_queued_tokens=2**31 - 1)
    output = Kept()

    async def answer() -> None:
        app = make_app(server.llm, settings)
        if watch is not None:
            app.add_middleware(watch)
        with open_ledger() as ledger:
            source = BatchInput("x", file, ledger, settings.limits)
            runner = BatchRunner(app, iter(source), output, lambda *_: None)
            assert await runner.run()

    asyncio.run(answer())
    return output.answers


def statuses(answers: list[BatchAnswer]) -> list[int]:
    return [one.response.status_code for one in answers if one.response is not None]


class Watch:
    """Counts requests under way, and the bytes of their bodies."""

    most = most_bytes = num = num_bytes = 0

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = type(self)
        size = int(dict(scope["headers"])[b"content-length"]) if scope["type"] == "http" else 0
        kind.num, kind.num_bytes = kind.num + 1, kind.num_bytes + size
        kind.most, kind.most_bytes = max(kind.most, kind.num), max(kind.most_bytes, kind.num_bytes)
        try:
            await self.app(scope, receive, send)
        finally:
            kind.num, kind.num_bytes = kind.num - 1, kind.num_bytes - size


def test_so_many_at_once(server: Running) -> None:
    """As many as keep the engine busy, no more, and no line is read long before."""

    class Counted(Watch):
        pass

    class Lines(io.BytesIO):
        ahead = num = 0

        def readline(self, size: int | None = -1) -> bytes:
            Lines.num += 1
            Lines.ahead = max(Lines.ahead, Lines.num - len(ended))
            return super().readline(size)

    ended: list[int] = []

    class Ended(Counted):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await super().__call__(scope, receive, send)
            ended.append(1)

    source = as_lines([request(str(number)) for number in range(100)]).encode()
    answers = run(server, Lines(source), watch=Ended)
    assert statuses(answers) == [200] * 100
    places = 2 * server.context.admission.places
    assert Ended.most == places and Lines.ahead <= places + 3


def test_so_many_bytes_at_once(server: Running) -> None:
    """Bodies that would not be received together wait for one another; one that is larger than all goes alone."""

    class Counted(Watch):
        pass

    limits = Limits(max_buffered_bytes=2500)
    settings = ServerSettings(limits=limits, max_num_queued_reqs=1000, max_num_queued_tokens=2**31 - 1)
    bodies = [{"prompt": "the fox", "max_tokens": 2, "metadata": {"x": "x" * size}} for size in [1000] * 9 + [4000] * 2]
    source = as_lines([request(str(number), body) for number, body in enumerate(bodies)]).encode()
    answers = run(server, io.BytesIO(source), settings, Counted)
    assert statuses(answers) == [200] * 11
    assert 4000 < Counted.most_bytes < 4200 and 2 <= Counted.most <= 3


def test_what_may_succeed_is_tried_again(server: Running) -> None:
    """One by one, and three times in all; what is wrong is not."""
    tried: dict[str, list[int]] = {}
    alone = []

    class Failing(Watch):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await self.app(scope, receive, send)
                return
            message = await receive()
            prompt = json.loads(message["body"])["prompt"]
            times, status = map(int, prompt.split())
            count = tried.setdefault(prompt, [])
            count.append(1)
            if len(count) > 1:
                alone.append(1)
                assert len(alone) == 1
                await asyncio.sleep(0.001)
                alone.pop()
            if len(count) <= times:
                headers = [(b"x-request-id", b"0"), (b"content-type", b"application/json"), (b"retry-after", b"0")]
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": b'{"error":{"message":"x"}}'})
                return
            messages = [message]

            async def again() -> Any:
                return messages.pop() if messages else await receive()

            await self.app(scope, again, send)

    prompts = ["0 500", "1 500", "2 503", "3 500", "1 429", "9 504", "1 400", "1 404"]
    source = as_lines([request(one, {"prompt": one, "max_tokens": 1}) for one in prompts]).encode()
    answers = run(server, io.BytesIO(source), watch=Failing)
    found = {one.custom_id: one.response.status_code for one in answers if one.response is not None}
    assert found == dict(zip(prompts, [200, 200, 200, 500, 200, 504, 400, 404], strict=True))
    assert {one: len(count) for one, count in tried.items()} == dict(
        zip(prompts, [1, 2, 3, 3, 2, 3, 1, 1], strict=True)
    )


def test_a_reader_that_fails(server: Running) -> None:
    """It is told, and what is under way ends."""

    class Broken(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            line = super().readline(size)
            if not line:
                raise OSError(5, os.strerror(5))
            return line

    body = {"prompt": "the fox", "max_tokens": 1500, "ignore_eos": True}
    with pytest.raises(InvalidRequestError, match="--input-file: x cannot be read: Input/output error"):
        run(server, Broken(as_lines([request("a", body)]).encode()))
