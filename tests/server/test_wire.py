"""Values between the server's processes: they come out as they went in, and nothing else comes out."""

from __future__ import annotations

import pickle
import queue
import random
import socket
import threading
import time
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

import msgspec
import pytest

from octavo import (
    BeamSearchParams,
    ConfigError,
    InvalidRequestError,
    ModelFormatError,
    RequestFailedError,
    SamplingParams,
)
from octavo.core.margins import Margin, MarginDecided, MarginsOutput, Segment
from octavo.core.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from octavo.core.params import OutputKind
from octavo.core.request import RequestSpec
from octavo.core.session_calls import Call, Extend, Generate
from octavo.server import connection, wire
from octavo.server.wire import dumps, loads

PARAMS = SamplingParams(
    temperature=0.5,
    logit_bias={3: 1.5},
    stop=["a"],
    repetition_detection={"max_pattern_size": 4, "min_count": 2},
    structured_outputs={"choice": ["a", "b"]},
    output_kind="delta",
    seed=2**64 - 1,
)
SPEC = RequestSpec("r", (1, 2, 3), PARAMS, 2**64 - 1, 5, beams=BeamSearchParams(), bad_words=((1, 2), (3,)))
MARGIN = Margin(0, Segment(0, 0, 5, 0, 2), "t", [1], "stop", True, 0.5, "model")
VALUES: list[Any] = [
    None,
    True,
    -(2**63),
    2**64 - 1,
    1.5,
    float("inf"),
    "Grün \U0001f600",
    b"\x00\xff",
    [],
    (),
    {},
    [1, (2, [3.5, None]), {"a": (1,), 3: [True]}],
    frozenset([3, 1]),
    list(range(10_000)),
    PARAMS,
    SPEC,
    Call(1, 2, Extend((1, 2))),
    Call(1, 2, Generate(SPEC)),
    RequestOutput(
        "r",
        None,
        [],
        [CompletionOutput(0, "x", [1], -0.5, [{1: Logprob(-0.5, 1)}], "stop", "a")],
        True,
        metrics=RequestMetrics(1.0, 2.0),
    ),
    MarginsOutput(
        "r", [MarginDecided(Margin(0, Segment(0, 0, 5, 0, 2), "t", [1], "stop", True, 0.5, "model"), 1, 2)], False
    ),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_round_trip(value: Any) -> None:
    found = loads(dumps(value))
    assert found == value and type(found) is type(value)


def test_parameters_are_what_they_were() -> None:
    found = loads(dumps(SPEC))
    assert found.params.output_kind is OutputKind.DELTA and hash(found.params) == hash(PARAMS)
    assert found.params.grammar == PARAMS.grammar and found.params.repetition == PARAMS.repetition
    with pytest.raises(TypeError, match="cannot be changed"):
        found.params.logit_bias[3] = 2.0


def test_every_record_of_the_contract_is_known() -> None:
    """Guards against a new event or call that a server would fail on when it first comes."""
    from octavo.core import margins, session_calls

    for module in (margins, session_calls):
        for name, kind in vars(module).items():
            if (
                isinstance(kind, type)
                and kind.__module__ == module.__name__
                and (is_dataclass(kind) or hasattr(kind, "_fields"))
            ):
                assert kind in wire._RECORDS, name


def test_fields_are_values() -> None:
    """A record's fields are all packed: none is left out."""
    for kind in wire._RECORDS:
        if is_dataclass(kind):
            assert wire._FIELDS[kind] == tuple(one.name for one in fields(kind))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequestError("top_k", "must be"), InvalidRequestError),
        (ModelFormatError("/a", "b", "c"), ModelFormatError),
        (ConfigError("x: y"), ConfigError),
        (RequestFailedError("x"), RequestFailedError),
        (ZeroDivisionError("x"), RequestFailedError),
    ],
)
def test_errors(error: Exception, kind: type) -> None:
    found = loads(dumps(error))
    assert type(found) is kind and str(error) in str(found)
    if isinstance(error, InvalidRequestError):
        assert (found.field, found.problem) == (error.field, error.problem)


@pytest.mark.parametrize("value", [object(), {1, 2}, print, SamplingParams, bytearray(b"a"), 1j])
def test_nothing_else_goes(value: Any) -> None:
    with pytest.raises(TypeError, match="is no value between processes"):
        dumps(value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        pickle.dumps(SPEC),
        msgspec.msgpack.encode([99999]),
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode([16]),
        msgspec.msgpack.encode([6, "SystemExit", 1]),
        msgspec.msgpack.encode([9, 1]),
        msgspec.msgpack.encode([2, 1]),
        msgspec.msgpack.encode([4, "sometimes"]),
        msgspec.msgpack.encode({"a": 1}) + b"x",
    ],
)
def test_nothing_else_comes(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a message of this version"):
        loads(data)


def test_noise() -> None:
    rng = random.Random(1)
    data = bytearray(dumps(VALUES))
    for _ in range(3000):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        with suppress(ValueError, RecursionError):
            loads(broken)


def test_a_message_that_cannot_be_sent_leaves_the_connection_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_MESSAGE_BYTES", 1000)
    ours, theirs = socket.socketpair()
    end, other = connection.Connection(ours, "one"), connection.Connection(theirs, "other")
    try:
        told: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        for message in (object(), "\ud800", 1 << 70, "a" * 2000):
            end.send(message, told.put)
        end.send(object())
        end.send(["fine"])
        assert other.receive() == ["fine"]
        kinds = [type(told.get(timeout=30)) for _ in range(4)]
        assert kinds == [TypeError, UnicodeEncodeError, OverflowError, ValueError]
    finally:
        end.close()
        other.close()


def test_who_makes_messages_waits_for_who_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what nobody reads would fill memory; and whoever waits goes on when the other end has gone."""
    monkeypatch.setattr(connection, "_MOST_WAITING", 8)
    ours, theirs = socket.socketpair()
    sender, receiver, sent = connection.Connection(ours, "ours"), connection.Connection(theirs, "theirs"), 0

    def send() -> None:
        nonlocal sent
        for number in range(5000):
            sender.wait_for_room()
            sender.send((number, b"x" * 1000))
            sent += 1

    thread = threading.Thread(target=send)
    thread.start()
    before = -1
    while before != sent:
        before = sent
        time.sleep(0.2)
    assert 8 <= sent < 5000  # what the system and the queue hold
    assert [receiver.receive()[0] for _ in range(3000)] == list(range(3000))
    receiver.close()
    thread.join(60)
    assert sent == 5000
    sender.close()
