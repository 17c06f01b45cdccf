"""Sessions over HTTP beside what they meet: a pool too small, windows of layers, blocks in files, priority, structured
outputs, chats, searches, margins, clients who go away at any moment, leases that end, and an engine in a process of its
own. What is answered is what the library's sessions answer alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo import LLM, SamplingParams
from octavo.async_llm import AsyncLLM
from octavo.server.served_llm import ServedLLM
from octavo.server.settings import ServerSettings
from tests.pace import held
from tests.server.conftest import MODEL, Running, serving
from tests.test_margins import a_document
from tests.test_margins_pairs import gave_way, scarce, together
from tests.test_structured import KINDS

PATH = "/v1/octavo/sessions"
WORDS = "The white whale far under the sea, a captain of old sails "
SETTINGS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 48, "kv_cache_dtype": "int8"}
CONTEXT = 512  # tokens
CLIENTS = 6
Step = tuple[str, int, dict[str, Any]]  # a verb, which of the branches that there are, and what else is given


def a_plan(rng: random.Random) -> dict[str, Any]:
    """A session, and what is done to it in turn."""
    steps: list[Step] = []
    for _ in range(rng.randint(4, 9)):
        verb = rng.choice(["fork", "generate", "generate", "generate", "select", "truncate", "extend", "drop", "leave"])
        given: dict[str, Any] = {}
        if verb == "fork":
            given = {"n": rng.randint(1, 2)}
        elif verb == "generate":
            given = {"max_tokens": rng.randint(1, 25), "logprobs": 1, "temperature": rng.choice([0, 0.8, 1.3])}
            if rng.random() < 0.5:
                given["structured_outputs"] = rng.choice(KINDS)
        elif verb == "select":
            given = {"choices": [" yes", " no", " perhaps not"], "extend": rng.random() < 0.5}
        elif verb == "extend":
            given = {"prompt": rng.choice([" and then", " but the sea", "."])}
        elif verb == "truncate":
            given = {"less": rng.randint(1, 9)}
        steps.append((verb, rng.randrange(6), given))
    prompt = f"{rng.randrange(1000)} {WORDS * rng.randint(2, 4)}"
    return {"prompt": prompt, "seed": rng.randrange(100), "steps": steps}


def alone(llm: LLM, plan: dict[str, Any]) -> list[Any]:
    """What the library answers."""
    found: list[Any] = []
    with llm.session(seed=plan["seed"]) as session:
        session.extend(plan["prompt"])
        branches: list[Any] = [session]
        for verb, which, given in plan["steps"]:
            branch = branches[which % len(branches)]
            if verb == "fork":
                branches += branch.fork(given["n"])
            elif verb == "generate":
                several = branches[: which + 1]
                outputs = session.generate_all(several, SamplingParams(**given))
                told = [(one.text, one.token_ids, one.finish_reason) for one in outputs]
                found.append((told, [one.num_tokens for one in several]))
            elif verb == "select":
                result = branch.select(given["choices"], extend=given["extend"])
                found.append([(one.token_ids, one.logprobs) for one in result.choices])
            elif verb == "truncate":
                branch.truncate(max(branch.num_tokens - given["less"], 1))
            elif verb == "extend":
                branch.extend(given["prompt"])
            elif verb == "drop" and len(branches) > 1:
                branches.pop().drop()
            elif verb == "leave":
                (left,) = branch.fork(1)
                left.drop()
        found.append([one.token_ids for one in branches])
    return found


class Caller:
    """One who asks over HTTP."""

    def __init__(self, server: Running, rng: random.Random) -> None:
        self.client = httpx.Client(base_url=server.url, timeout=120, limits=httpx.Limits(max_keepalive_connections=1))
        self.rng = rng

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, (path, body, answer.text)
        return answer.json()

    def go_away(self, path: str, body: dict[str, Any]) -> None:
        """Ask, and hang up at some moment before the answer."""
        with suppress(httpx.TimeoutException):
            self.client.post(
                path, json=body, timeout=httpx.Timeout(120, read=self.rng.choice([0.001, 0.01, 0.05, 0.2]))
            )

    def play(self, plan: dict[str, Any], **opening: Any) -> list[Any]:
        """The same as `alone`; and in between one goes away in the middle of a call."""
        found: list[Any] = []
        session = self.post(PATH, {"prompt": plan["prompt"], "seed": plan["seed"], **opening})
        path = f"{PATH}/{session['id']}"
        branches = [0]
        for verb, which, given in plan["steps"]:
            branch = branches[which % len(branches)]
            if verb == "fork":
                told = self.post(f"{path}/fork", {"branch": branch, **given})
                branches += [one["branch"] for one in told["branches"]]
            elif verb == "generate":
                several = branches[: which + 1]
                outputs = self.post(f"{path}/generate", {"branches": several, **given})["outputs"]
                told = [(one["text"], one["token_ids"], one["finish_reason"]) for one in outputs]
                found.append((told, [one["num_tokens"] for one in outputs]))
            elif verb == "select":
                choices = self.post(f"{path}/select", {"branch": branch, **given})["choices"]
                found.append([(one["token_ids"], one["logprobs"]) for one in choices])
            elif verb == "truncate":
                has = self.client.get(f"{path}/branches/{branch}").json()["num_tokens"]
                self.post(f"{path}/truncate", {"branch": branch, "num_tokens": max(has - given["less"], 1)})
            elif verb == "extend":
                self.post(f"{path}/extend", {"branch": branch, **given})
            elif verb == "drop" and len(branches) > 1:
                self.post(f"{path}/drop", {"branch": branches.pop()})
            elif verb == "leave":
                (left,) = self.post(f"{path}/fork", {"branch": branch})["branches"]
                asked = {"branch": left["branch"], "max_tokens": 60, "ignore_eos": True}
                self.go_away(f"{path}/generate", asked)
                self.post(f"{path}/drop", {"branch": left["branch"]})
        found.append([self.client.get(f"{path}/branches/{one}").json()["token_ids"] for one in branches])
        shown = self.client.get(path).json()["branches"]
        assert [one["branch"] for one in shown] == sorted(branches)
        assert self.client.delete(path).json()["deleted"] is True
        return found

    def leave_sessions(self) -> None:
        """Whose leases end, some with a call that nobody waits for."""
        for _ in range(4):
            session = self.post(PATH, {"prompt": WORDS, "lease": self.rng.choice([0.001, 0.02, 0.1])})
            if self.rng.random() < 0.7:
                asked = {"max_tokens": 60, "ignore_eos": True, "structured_outputs": self.rng.choice([None, *KINDS])}
                self.go_away(f"{PATH}/{session['id']}/generate", asked)


# --- what is asked beside sessions ---


def a_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    text, seed = WORDS * rng.randint(1, 3), rng.randrange(100)
    messages = [{"role": "user", "content": text}]
    drawn = {"seed": seed, "temperature": 1.0}
    kind = rng.randrange(6)
    if kind == 0:
        return "/v1/chat/completions", {"messages": messages, "max_tokens": 20, "n": rng.randint(1, 3), **drawn}
    if kind == 1:
        return "/v1/octavo/beam_search", {"prompt": text, "beam_width": 3, "max_tokens": rng.randint(1, 15)}
    if kind == 2:
        body = {"document": a_document(seed % 3, 5), "question": "Who?", "segment_tokens": 90, "seed": seed}
        return "/v1/octavo/margins", {**body, "margin": {"max_tokens": 9}, "answer": {"max_tokens": 9}}
    if kind == 3:
        return "/v1/responses", {"input": text, "max_output_tokens": 20, **drawn}
    if kind == 4:
        return "/v1/messages", {"messages": messages, "max_tokens": 20, **drawn}
    given = {"structured_outputs": rng.choice(KINDS), "max_tokens": 60, **drawn}
    return "/v1/completions", {"prompt": [text, "The sea"], **given}


_ITS_OWN = {"id", "created", "created_at", "completed_at", "usage", "metrics", "request_id", "num_cached_tokens"}


def without_ids(answer: Any) -> Any:
    """What is to be the same another time."""
    if isinstance(answer, dict):
        return {name: without_ids(value) for name, value in answer.items() if name not in _ITS_OWN}
    return [without_ids(one) for one in answer] if isinstance(answer, list) else answer


def num_tokens_of_all(server: Running) -> int:
    found = list(server.engine._coordinators.values())
    return sum(sequence.num_tokens for coordinator in found for sequence in coordinator.sequences)


def until_all_is_home(server: Running) -> None:
    limit = time.monotonic() + 60
    while len(server.context.sessions) or server.context.num_open or server.llm.num_unfinished_requests:
        assert time.monotonic() < limit, "a session or a request was left"
        time.sleep(0.005)
    while (now := server.llm.figures())["requests"] or now["available_blocks"] < now["blocks"]:
        assert time.monotonic() < limit, "blocks were left"
        time.sleep(0.005)
    assert server.context.admission.num_requests == server.context.admission.num_tokens == 0
    assert server.context.bodies.held == 0
    assert server.context.runs == {}


@pytest.mark.parametrize("kind", [AsyncLLM, ServedLLM])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("seed", [0, 1])
def test_storm(tiny_gemma3_dir: Path, tmp_path: Path, kind: type[AsyncLLM], policy: str, seed: int) -> None:
    rng = random.Random(seed)
    plans = [a_plan(rng) for _ in range(18)]
    requests = [a_request(rng) for _ in range(18)]
    with LLM(str(tiny_gemma3_dir), max_model_len=CONTEXT, **SETTINGS, enable_prefix_caching=False) as llm:
        expected = [alone(llm, plan) for plan in plans]
        settings = SETTINGS | scarce(llm, CONTEXT)
    of_server = ServerSettings(port=0, served_model_name=(MODEL,), max_num_queued_reqs=1000)
    with serving(tiny_gemma3_dir, of_server, **SETTINGS | {"max_model_len": CONTEXT}) as roomy:
        answers = [without_ids(Caller(roomy, rng).post(*request)) for request in requests]
    settings |= {"kv_offload_dir": str(tmp_path / "kv"), "scheduling_policy": policy}
    with serving(tiny_gemma3_dir, of_server, kind, **settings) as server:
        found: dict[Any, Any] = {}

        def client(first: int) -> None:
            caller = Caller(server, random.Random(f"{seed} {first}"))
            for number in range(first, len(plans), CLIENTS):
                urgent = {"priority": caller.rng.randint(-2, 2)} if policy == "priority" else {}
                found["session", number] = caller.play(plans[number], **urgent)
                path, body = requests[number]
                found["request", number] = without_ids(caller.post(path, {**body, **urgent}))
                caller.go_away(*requests[caller.rng.randrange(len(requests))])

        def leaser() -> None:
            Caller(server, random.Random(f"{seed} leaser")).leave_sessions()

        works: list[Callable[[], None]] = [lambda first=first: client(first) for first in range(CLIENTS)]  # type: ignore[misc]
        if kind is AsyncLLM:
            with held(server.engine, lambda: num_tokens_of_all(server) > CONTEXT + 100):
                together(*works, leaser)
            assert gave_way(server.llm), "the pool was large enough for all"  # type: ignore[arg-type]
        else:
            together(*works, leaser)
        assert [found["session", number] for number in range(len(plans))] == expected
        assert [found["request", number] for number in range(len(requests))] == answers
        until_all_is_home(server)
