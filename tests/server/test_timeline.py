"""/debug/timeline: what it shows is what happened, in a form that Perfetto and Chrome read, and bounded."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from itertools import count, groupby, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octavo import LLM
from octavo.core.errors import RequestFailedError
from octavo.core.events import EventKind
from octavo.core.params import SamplingParams
from octavo.core.plan import StepPlan, StepResult
from octavo.core.request import RequestSpec, SessionSpec
from octavo.core.session_calls import ROOT, Call, Extend, Generate
from octavo.server import timeline
from octavo.server.remote import EngineOptions
from octavo.server.served_llm import ServedLLM
from octavo.server.settings import ServerSettings
from octavo.server.timeline import Timeline, chrome_trace
from tests.engine.fake import Harness
from tests.pace import held
from tests.server.conftest import MODEL, Running, error_of, serving
from tests.server.test_serve import LONG
from tests.server.test_streams import PATH, until
from tests.test_margins_pairs import check_home, gave_way, occupied, scarce, together
from tests.test_structured_pairs import SETTINGS, a_request, leave

_ROUNDING = 0.002  # microseconds
PHASES = {"queued", "prefilling", "decoding", "preempted", "idle"}


def checked(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a trace, which is sound: times go up and are inside the window, slices of a track lie in one
    another or apart, asynchronous ones begin and end in pairs, and the phases of a request are all of its time."""
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    meta, events = trace["traceEvents"][:2], trace["traceEvents"][2:]
    assert [one["ph"] for one in meta] == ["M", "M"] and "M" not in [one["ph"] for one in events]
    times = [one["ts"] for one in events]
    assert times == sorted(times)
    window = trace["otherData"]["seconds"] * 1e6
    assert all(0 <= one["ts"] and one["ts"] + one.get("dur", 0) <= window + 1 for one in events)
    assert all({"ph", "name", "ts", "pid", "tid"} <= one.keys() for one in events)
    _check_slices([one for one in events if one["ph"] == "X"])
    for serial in {one["id"] for one in events if one["ph"] in "be"}:
        _check_request([one for one in events if one["ph"] in "be" and one["id"] == serial])
    return events


def _check_slices(slices: list[dict[str, Any]]) -> None:
    around: list[float] = []  # ends of the slices that this one lies in
    for one in slices:
        while around and around[-1] <= one["ts"] + _ROUNDING:
            around.pop()
        end = one["ts"] + one["dur"]
        assert not around or end <= around[-1] + _ROUNDING, one
        assert (one["name"] == "step") == (not around), one
        around.append(end)


def _check_request(events: list[dict[str, Any]]) -> None:
    opened: list[str] = []
    phases: list[tuple[str, float, float]] = []
    begins = 0.0
    for one in events:
        if one["ph"] == "b":
            opened.append(one["name"])
            begins = one["ts"]
            assert len(opened) <= 2
        else:
            assert opened.pop() == one["name"]
            if opened:
                phases.append((one["name"], begins, one["ts"]))
    assert not opened and {name for name, _, _ in phases} <= PHASES
    assert phases[0][1] == events[0]["ts"] and phases[-1][2] == events[-1]["ts"]
    for (_, _, end), (_, start, _) in pairwise(phases):
        assert end == start


def names_of(events: list[dict[str, Any]], request_id: str) -> list[str]:
    """The phases of a request, in their order."""
    (serial,) = [one["id"] for one in events if one["ph"] == "b" and one["name"] == request_id]
    return [one["name"] for one in events if one["ph"] == "b" and one["id"] == serial][1:]


# --- over an engine without a model ---


class Quick(Harness):
    """Time goes on in steps alone."""

    def step(self) -> list[Any]:
        outputs = self.engine.step()
        self.check()
        self.take(outputs)
        return outputs


class Watched:
    """An engine whose steps take a quarter of a second, and its timeline."""

    def __init__(self, **options: Any) -> None:
        self.harness = Quick(**options)
        execute = self.harness.executor.execute

        def slow(plan: StepPlan) -> Any:
            found = execute(plan).result()
            self.harness.now += 0.25
            timings = {"model": 0.125, "sample": 0.0625}
            return SimpleNamespace(result=lambda: StepResult(found.results, timings))

        self.harness.executor.execute = slow  # type: ignore[method-assign]
        self.timeline = Timeline(SimpleNamespace(engine=self.harness.engine))  # type: ignore[arg-type]

    def trace(self, seconds: float = 60.0) -> dict[str, Any]:
        return chrome_trace(self.timeline.snapshot(seconds))


def test_steps() -> None:
    watched = Watched()
    watched.harness.add("a", list(range(40)), max_tokens=3)
    watched.harness.add("b", [7] * 5, max_tokens=4, n=2)
    watched.harness.run()
    events = checked(watched.trace())
    steps = [one for one in events if one["name"] == "step"]
    assert [one["args"]["step"] for one in steps] == list(range(watched.harness.engine.num_steps))
    assert {one["dur"] for one in steps} == {250_000.0}
    told = [one["args"] for one in steps]
    assert sum(one["prefill_tokens"] + one["decode_tokens"] for one in told) == watched.harness.executor.computed
    assert told[0]["prefill_tokens"] == 32 and told[0]["decode_tokens"] == 0 and told[-1]["prefill_tokens"] == 0
    assert told[-1]["decode_tokens"] == told[-1]["rows"] > 0
    assert any(one["copied_blocks"] for one in told), "the samples share no block: the test shows less"
    assert all(0 < one["blocks_in_use"] <= watched.harness.kv.num_blocks for one in told)
    parts = [(one["name"], one["dur"]) for one in events if one["ph"] == "X" and one["name"] != "step"]
    assert parts == [("model", 125_000.0), ("sample", 62_500.0)] * len(steps)
    counters = [one["args"] for one in events if one["ph"] == "C" and one["name"] == "requests"]
    assert {one["running"] for one in counters} >= {1, 2} and len(counters) == len(steps)


def test_requests_and_what_they_are_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queued, prefilling, decoding, preempted and so on, with why each ended."""
    monkeypatch.setattr(timeline, "SECONDS", 1e6)
    watched = Watched(num_blocks=12, max_num_seqs=3)
    for index in range(5):
        watched.harness.add(f"r{index}", [index, 7, 8], max_tokens=30)
    watched.harness.run()
    preempted = {event.request_id for event in watched.harness.engine.events.of(EventKind.PREEMPTED)}
    assert preempted, "nothing was preempted: the test shows nothing"
    events = checked(watched.trace(1e6))
    for index in range(5):
        phases = names_of(events, f"r{index}")
        assert phases[:3] == ["queued", "prefilling", "decoding"] and phases[-1] == "decoding"
        assert ("preempted" in phases) == (f"r{index}" in preempted)
        for before, after in pairwise(phases):
            assert (before, after) in {
                ("queued", "prefilling"),
                ("prefilling", "decoding"),
                ("prefilling", "preempted"),
                ("decoding", "preempted"),
                ("preempted", "prefilling"),
            }
    reasons = {one["args"]["reason"] for one in events if one["ph"] == "e" and "args" in one}
    assert {"length", "no_blocks"} <= reasons
    moments = {one["name"] for one in events if one["ph"] in "ni"}
    assert {"waiting", "cache_hit"} & moments


def test_time_in_which_nothing_is_asked() -> None:
    """Of a session between two calls, while others step or nobody does."""
    watched = Watched()
    harness = watched.harness
    harness.engine.add_request(SessionSpec("s", seed=0))
    numbers = count()

    def generate() -> None:
        turn = RequestSpec("s", (), SamplingParams(max_tokens=3), seed=0, max_tokens=3)
        verbs = Extend((5, 6)), Generate(turn)
        harness.engine.call("s", [Call(next(numbers), ROOT, verb) for verb in verbs])
        while harness.engine.has_unfinished_requests:
            harness.step()

    assert names_of(checked(watched.trace()), "s") == ["idle"]
    harness.now += 5.0
    generate()
    harness.now += 5.0
    assert names_of(checked(watched.trace()), "s") == ["idle", "prefilling", "decoding", "idle"]
    harness.add("other", [1, 2, 3], max_tokens=3)
    while harness.engine.has_unfinished_requests:
        harness.step()
    generate()
    harness.now += 5.0
    harness.engine.abort("s")
    phases = names_of(events := checked(watched.trace()), "s")
    assert phases == ["idle", "prefilling", "decoding", "idle", "prefilling", "decoding", "idle"]
    assert names_of(events, "other") == ["queued", "prefilling", "decoding"]


def test_an_id_that_comes_again() -> None:
    """Is another request, also while the first one's last moments are still told."""
    watched = Watched()
    for _ in range(3):
        watched.harness.add("same", [1, 2, 3], max_tokens=2)
        watched.harness.run()
    watched.harness.add("aborted", [1, 2, 3], max_tokens=20)
    watched.harness.step()
    watched.harness.engine.abort("aborted")
    events = checked(watched.trace())
    assert len({one["id"] for one in events if one["ph"] == "b" and one["name"] == "same"}) == 3
    assert names_of(events, "aborted") == ["queued", "prefilling", "decoding"]
    assert [one["args"]["reason"] for one in events if one["ph"] == "e" and "args" in one][-1] == "abort"


def test_a_window_of_it() -> None:
    """What reaches into the window is told from its beginning on, what goes on up to its end."""
    watched = Watched()
    watched.harness.add("early", [1, 2, 3], max_tokens=2)
    watched.harness.run()
    watched.harness.add("long", [4, 5, 6], max_tokens=100)
    for _ in range(20):
        watched.harness.step()
    trace = watched.trace(4.0)
    events = checked(trace)
    assert trace["otherData"]["seconds"] == 4.0
    assert names_of(events, "long") == ["decoding"] and "early" not in {one["name"] for one in events}
    assert [(one["ph"], one["ts"]) for one in events if one["name"] == "long"] == [("b", 0.0), ("e", 4_000_000.0)]
    assert len([one for one in events if one["name"] == "step"]) in (16, 17)
    assert checked(watched.trace(0.001)) is not None


def test_its_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By number, and by age."""
    monkeypatch.setattr(timeline, "_MOST", 50)
    monkeypatch.setattr(timeline, "SECONDS", 1e6)
    watched = Watched(num_blocks=12, max_num_seqs=3)
    for index in range(60):
        watched.harness.add(f"r{index}", [index, 7, 8], max_tokens=20)
    watched.harness.run()
    kept = watched.timeline
    assert len(kept._steps) == len(kept._phases) == len(kept._moments) == 50 and not kept._now
    assert len(checked(watched.trace(1e6))) < 1000
    monkeypatch.setattr(timeline, "SECONDS", 10.0)
    watched.harness.add("last", [1], max_tokens=60)
    watched.harness.run()
    assert len(kept._steps) == 41 and len(kept._phases) <= 41


def test_a_step_that_stands_still_does_not_hold_it_up() -> None:
    """Which is when it is wanted most. And any thread may ask while the engine's adds to it."""
    watched = Watched()
    begun, go_on = threading.Event(), threading.Event()
    execute = watched.harness.executor.execute

    def stand(plan: StepPlan) -> Any:
        begun.set()
        assert go_on.wait(60)
        return execute(plan)

    watched.harness.executor.execute = stand  # type: ignore[method-assign]
    watched.harness.add("a", [1, 2, 3], max_tokens=300)
    thread = threading.Thread(target=watched.harness.run)
    thread.start()
    assert begun.wait(60)
    assert names_of(checked(watched.trace()), "a") == ["queued", "prefilling"]
    go_on.set()
    for _ in range(50):
        checked(watched.trace())
    thread.join()
    checked(watched.trace())


# --- over an engine with a model ---


@pytest.mark.parametrize("breaks", [None, "_clock", "_steps", "_moments", "_now"])
def test_it_changes_nothing(tiny_gemma3_dir: Path, tmp_path: Path, breaks: str | None) -> None:
    """With it and without it, and if it breaks in the middle, each answer is the same: in a pool too small, with blocks
    in files, and callers who go away, while others look at it."""
    rng = random.Random(5)
    asked = [a_request(rng) for _ in range(16)]
    with LLM(str(tiny_gemma3_dir), **SETTINGS) as llm:
        alone = [ask(llm) for ask in asked]
        settings = SETTINGS | scarce(llm, 256) | {"kv_offload_dir": str(tmp_path / "kv")}
    with LLM(str(tiny_gemma3_dir), **settings) as llm:
        engine, found = llm._engine, dict[int, Any]()
        kept = Timeline(SimpleNamespace(engine=engine))  # type: ignore[arg-type]
        is_over = threading.Event()

        def work(first: int) -> None:
            found.update({number: asked[number](llm) for number in range(first, len(asked), 4)})

        def look() -> None:
            while not is_over.is_set():
                checked(chrome_trace(kept.snapshot(60.0)))
                is_over.wait(0.01)

        def ask_all() -> None:
            try:
                works: list[Callable[[], None]] = [lambda first=first: work(first) for first in range(4)]  # type: ignore[misc]
                together(*works, lambda: leave(llm, random.Random(5)))
            finally:
                is_over.set()

        with occupied(llm, 200), held(engine, lambda: engine.num_requests >= 5):
            if breaks is None:
                together(ask_all, look)
            else:
                setattr(kept, breaks, None)
                ask_all()
        assert [found[number] for number in range(len(asked))] == alone
        assert gave_way(llm), "the pool was large enough for all"
        check_home(llm)
        if breaks is None:
            assert not kept._now and not kept._seen
            assert (len(engine.plan_listeners), len(engine.step_listeners), len(engine.events._listeners)) == (1, 1, 1)
        else:
            left = len(engine.plan_listeners) + len(engine.step_listeners) + len(engine.events._listeners)
            assert left < 3


# --- over HTTP ---


@pytest.fixture(scope="module")
def watching(tiny_llama_dir: Path) -> Iterator[Running]:
    settings = ServerSettings(port=0, served_model_name=(MODEL,), api_key=("k",), enable_debug_routes=True)
    with serving(tiny_llama_dir, settings, ServedLLM, options=EngineOptions(timeline=True)) as running:
        running.client.headers["x-api-key"] = "k"
        yield running


def test_the_route(watching: Running) -> None:
    """Of all kinds of requests, one of which goes on."""
    assert watching.post(PATH, {"prompt": ["the fox", "a dog"], "n": 2, "max_tokens": 5}).status_code == 200
    assert watching.post("/v1/embeddings", {"input": "x"}).status_code == 200
    beams = {"prompt": "b", "beam_width": 3, "max_tokens": 4}
    assert watching.post("/v1/octavo/beam_search", beams).status_code == 200
    margins = {"document": "the fox. " * 20, "question": "q", "segment_tokens": 32, "margin": {"max_tokens": 3}}
    assert watching.post("/v1/octavo/margins", {**margins, "answer": {"max_tokens": 3}}).status_code == 200
    body = {**LONG, "max_tokens": 1900, "request_id": "long"}
    with watching.client.stream("POST", watching.url + PATH, json=body) as response:
        next(response.iter_lines())
        answer = watching.get("/debug/timeline")
    assert answer.headers["content-type"] == "application/json"
    events = checked(answer.json())
    told = [phase for phase in names_of(events, "cmpl-long-0") if phase != "idle"]  # as if, where a machine is slow
    assert [phase for phase, _ in groupby(told)] == ["queued", "prefilling", "decoding"]
    assert len([one for one in events if one["ph"] == "b" and one["name"] == "queued"]) == 6
    assert {one["name"] for one in events if one["ph"] == "X"} == {"step", "model", "sample"}
    until(watching, 0)
    root = "/v1/octavo/sessions"
    session = watching.post(root, {"prompt": "the fox"}).json()["id"]
    assert watching.post(f"{root}/{session}/generate", {"max_tokens": 3}).status_code == 200
    events = checked(watching.get("/debug/timeline").json())
    (name,) = [one["name"] for one in events if one["ph"] == "b" and one["name"].startswith("session")]
    phases = [phase for phase in names_of(events, name) if phase != "idle"]
    assert [phase for phase, _ in groupby(phases)] == ["prefilling", "decoding"]
    watching.client.delete(f"{watching.url}{root}/{session}")
    assert len(checked(watching.get("/debug/timeline?seconds=0.000001").json())) <= 4


def test_who_may_ask_for_it(watching: Running, server: Running, tiny_llama_dir: Path) -> None:
    """Whoever has a key, of a server that offers it."""
    del tiny_llama_dir
    error_of(watching.get("/debug/timeline", headers={"x-api-key": "no"}), 401)
    error_of(watching.post("/debug/timeline", {}), 405)
    error_of(server.get("/debug/timeline"), 404)
    for query in ("seconds=0", "seconds=61", "seconds=nan", "seconds=x", "seconds=", "second=1"):
        error_of(watching.get(f"/debug/timeline?{query}"), 400, query.partition("=")[0])


def test_without_it_nothing_listens(tiny_llama_dir: Path, server: Running) -> None:
    """So that it costs nothing, and asking is an error."""
    assert not EngineOptions().timeline
    assert server.engine.step_listeners == [] and server.engine.events._listeners == []
    with serving(tiny_llama_dir, ServerSettings(port=0, enable_debug_routes=True), ServedLLM) as running:
        assert isinstance(running.llm, ServedLLM)
        with pytest.raises(RequestFailedError, match="no timeline is kept"):
            running.llm.engine.timeline(1.0).result(60)
        assert running.get("/debug/timeline").status_code == 500
