"""Sessions over HTTP: what they answer is what the library's sessions answer, and each ends with its lease."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM
from octavo.server.served_llm import ServedLLM
from octavo.server.settings import Limits, ServerSettings
from tests.pace import held
from tests.server.conftest import MODEL, Running, error_of, serving

PATH = "/v1/octavo/sessions"
PROMPT = "the quick brown fox"
KEYS = {"a": {"Authorization": "Bearer a"}, "b": {"x-api-key": "b"}}


class Client:
    """A session, as a client has it."""

    def __init__(self, server: Running, **body: Any) -> None:
        self.server = server
        self.told = server.post(PATH, body).json()
        self.path = f"{PATH}/{self.told['id']}"

    def __call__(self, verb: str, **body: Any) -> Any:
        answer = self.server.post(f"{self.path}/{verb}", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, verb: str, status: int = 400, param: str | None = None, **body: Any) -> dict[str, Any]:
        return error_of(self.server.post(f"{self.path}/{verb}", body), status, param)

    def close(self) -> None:
        assert self.server.client.delete(self.server.url + self.path).json()["deleted"] is True


@pytest.fixture
def session(server: Running) -> Iterator[Callable[..., Client]]:
    opened: list[Client] = []

    def opening(**body: Any) -> Client:
        opened.append(Client(server, **body))
        return opened[-1]

    yield opening
    for one in opened:
        server.client.delete(server.url + one.path)


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_verbs_are_the_librarys(session: Callable[..., Client], llm: LLM) -> None:
    asked = {"max_tokens": 7, "temperature": 0.9, "logprobs": 2}
    with llm.session(seed=4) as expected:
        expected.extend(PROMPT)
        mine = session(prompt=PROMPT, seed=4)
        assert mine.told["seed"] == 4 and mine.told["branches"] == [{"branch": 0, "num_tokens": expected.num_tokens}]
        first, second = expected.fork(2)
        numbers = [one["branch"] for one in mine("fork", n=2)["branches"]]
        outputs = expected.generate_all([first, second], **asked)  # type: ignore[arg-type]
        found = mine("generate", branches=numbers, **asked)["outputs"]
        assert [(one["text"], one["token_ids"]) for one in found] == [(one.text, one.token_ids) for one in outputs]
        assert [one["num_tokens"] for one in found] == [first.num_tokens, second.num_tokens]
        assert found[0]["text"] != found[1]["text"] and len(found[0]["logprobs"][0]) >= 2
        first.truncate(5)
        assert mine("truncate", branch=numbers[0], num_tokens=5) == {"branch": numbers[0], "num_tokens": 5}
        chosen = first.select([" dog", " lazy fox"], by="total", extend=True)
        picked = mine("select", branch=numbers[0], choices=[" dog", " lazy fox"], by="total", extend=True)
        assert picked["choices"][picked["best"]]["text"] == chosen.best.text
        assert [one["logprobs"] for one in picked["choices"]] == [one.logprobs for one in chosen.choices]
        first.extend(" jumps")
        mine("extend", branch=numbers[0], prompt=" jumps")
        shown = mine.server.get(f"{mine.path}/branches/{numbers[0]}").json()
        assert (shown["text"], shown["token_ids"]) == (first.text, first.token_ids)
        again = expected.generate(max_tokens=3)
        assert mine("generate", max_tokens=3)["outputs"][0]["token_ids"] == again.token_ids
    assert mine("drop", branch=numbers[1]) == {"branch": numbers[1], "dropped": True}
    left = [one["branch"] for one in mine.server.get(mine.path).json()["branches"]]
    assert left == [0, numbers[0]]


def test_a_conversation_and_a_grammar(session: Callable[..., Client], llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    mine = session(messages=messages, seed=1)
    assert mine.told["branches"][0]["num_tokens"] == len(llm.chat_prompt(messages)["prompt_token_ids"])
    (output,) = mine("generate", structured_outputs={"choice": ["red", "green"]})["outputs"]
    assert output["text"] in ("red", "green") and output["finish_reason"] == "stop"


def test_ids_renewal_and_the_list(session: Callable[..., Client], server: Running) -> None:
    mine = session(request_id="mine", lease=30)
    assert mine.told["id"] == "session-mine" and mine.told["lease"] == 30
    error_of(server.post(PATH, {"request_id": "mine"}), 400, "request_id")
    assert mine("renew")["lease"] == 30 and mine("renew", lease=50)["lease"] == 50
    assert [one["id"] for one in server.get(PATH).json()["data"]] == ["session-mine"]
    mine.close()
    assert server.get(PATH).json()["data"] == []
    error_of(server.client.delete(server.url + mine.path), 404, "id")
    for path in ("", "/branches/0"):
        error_of(server.get(mine.path + path), 404, "id")
    mine.refused("extend", 404, "id", prompt="x")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, None),  # like extending by nothing
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": [99999999]}, "prompt"),
        ({"prompt": "fox " * 9000}, "prompt"),
        ({"prompt": "a", "messages": []}, "prompt"),
        ({"tools": []}, "tools"),
        ({"lease": 0}, "lease"),
        ({"lease": 3601}, "lease"),
        ({"lease": True}, "lease"),
        ({"lease": "5"}, "lease"),
        ({"seed": -1}, "seed"),
        ({"priority": 5}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"model": "gpt"}, "model"),
        ({"temperature": 1}, "temperature"),
        ({"request_id": "a b"}, "request_id"),
    ],
)
def test_sessions_that_are_refused(server: Running, body: dict[str, Any], param: str | None) -> None:
    answer = server.post(PATH, body)
    if param is None:
        assert server.client.delete(f"{server.url}{PATH}/{answer.json()['id']}").status_code == 200
    else:
        error_of(answer, 404 if param == "model" else 400, param)
    assert server.get(PATH).json()["data"] == []


@pytest.mark.parametrize(
    ("verb", "body", "param"),
    [
        ("extend", {}, "prompt"),
        ("extend", {"prompt": {"a": 1}}, "prompt"),
        ("extend", {"prompt": "fox " * 9000}, "prompt"),
        ("extend", {"prompt": "x", "branch": 7}, "branch"),
        ("extend", {"prompt": "x", "branch": True}, "branch"),
        ("extend", {"prompt": "x", "branch": "0"}, "branch"),
        ("extend", {"prompt": "x", "branch": -1}, "branch"),
        ("generate", {"branches": []}, "branches"),
        ("generate", {"branches": 0}, "branches"),
        ("generate", {"branches": [0, 0]}, "branches[1]"),
        ("generate", {"branches": [0, 9]}, "branches[1]"),
        ("generate", {"branches": [0], "branch": 0}, "branches"),
        ("generate", {"n": 2}, "n"),
        ("generate", {"stream": True}, "stream"),
        ("generate", {"temperature": -1}, "temperature"),
        ("generate", {"prompt_logprobs": 1}, "prompt_logprobs"),
        ("generate", {"stop": ["a"] * 100}, "stop"),
        ("generate", {"max_tokens": 0}, "max_tokens"),
        ("generate", {"max_tokens": "5"}, "max_tokens"),
        ("generate", {"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ("select", {}, "choices"),
        ("select", {"choices": "abc"}, "choices"),
        ("select", {"choices": []}, "choices"),
        ("select", {"choices": ["a", 5]}, "choices[1]"),
        ("select", {"choices": ["a", ""]}, "choices[1]"),
        ("select", {"choices": ["a"], "by": "feeling"}, "by"),
        ("select", {"choices": ["a"], "extend": 1}, "extend"),
        ("fork", {"n": 0}, "n"),
        ("fork", {"n": 256}, "n"),
        ("fork", {"n": True}, "n"),
        ("truncate", {}, "num_tokens"),
        ("truncate", {"num_tokens": 10**6}, "num_tokens"),
        ("truncate", {"num_tokens": -1}, "num_tokens"),
        ("drop", {"branch": 3}, "branch"),
        ("renew", {"lease": -1}, "lease"),
        ("renew", {"branch": 0}, "branch"),
    ],
)
def test_calls_that_are_refused(session: Callable[..., Client], verb: str, body: dict[str, Any], param: str) -> None:
    """They change nothing."""
    mine = session(prompt=PROMPT)
    mine.refused(verb, 400, param, **body)
    assert mine.server.get(mine.path).json() == mine.told


def test_a_verb_there_is_not(session: Callable[..., Client]) -> None:
    mine = session()
    mine.refused("steal", 404)
    mine.refused("generate", 400, "branch")  # it is empty
    error_of(mine.server.get(mine.path + "/generate"), 405)
    for branch in ("1", "x", "-1", "0x0", "9" * 30):
        error_of(mine.server.get(f"{mine.path}/branches/{branch}"), 400, "branch")


# --- ends ---


@pytest.fixture(scope="module")
def strict(tiny_llama_dir: Path) -> Iterator[Running]:
    """With keys, and little room."""
    limits = Limits(max_sessions=3, max_sessions_per_key=2, max_branches=4, max_choice_tokens=50)
    settings = ServerSettings(
        port=0, served_model_name=(MODEL,), api_key=("a", "b"), limits=limits, max_session_lease=100
    )
    with serving(tiny_llama_dir, settings) as running:
        yield running


def test_a_lease_ends(server: Running) -> None:
    mine = Client(server, prompt=PROMPT, lease=0.01)
    until(lambda: server.get(mine.path).status_code == 404)
    server.until_idle()


def test_no_lease_ends_while_there_is_a_call(server: Running) -> None:
    mine = Client(server, prompt=PROMPT)
    answers: list[Any] = []
    body = {"max_tokens": 30, "ignore_eos": True}
    thread = threading.Thread(target=lambda: answers.append(mine("generate", **body)))
    may_go_on = threading.Event()
    with held(server.engine, may_go_on.is_set):
        thread.start()
        until(lambda: bool(server.context.admission.num_requests))
        mine("renew", lease=0.001)
        time.sleep(0.1)  # far longer than the lease
        may_go_on.set()
        thread.join(60)
    assert len(answers[0]["outputs"][0]["token_ids"]) == 30
    until(lambda: server.get(mine.path).status_code == 404)


def test_others_sessions_do_not_exist(strict: Running) -> None:
    told = strict.post(PATH, {"prompt": "x"}, headers=KEYS["a"]).json()
    path = f"{PATH}/{told['id']}"
    error_of(strict.get(path), 401)
    error_of(strict.get(path, headers=KEYS["b"]), 404, "id")
    error_of(strict.post(f"{path}/generate", {}, headers=KEYS["b"]), 404, "id")
    error_of(strict.client.delete(strict.url + path, headers=KEYS["b"]), 404, "id")
    assert strict.get(PATH, headers=KEYS["b"]).json()["data"] == []
    assert strict.client.delete(strict.url + path, headers=KEYS["a"]).status_code == 200


def test_room_for_sessions_and_branches(strict: Running) -> None:
    opened = [strict.post(PATH, {"lease": 90}, headers=KEYS["a"]).json()["id"] for _ in range(2)]
    of_this_key = strict.post(PATH, {}, headers=KEYS["a"])
    error_of(of_this_key, 429)
    assert "2 sessions of this key are open" in of_this_key.text
    other = strict.post(PATH, {"lease": 90}, headers=KEYS["b"]).json()["id"]
    answer = strict.post(PATH, {}, headers=KEYS["b"])
    error_of(answer, 429)
    assert "3 sessions are open" in answer.text
    assert 1 <= int(answer.headers["retry-after"]) <= 90
    assert strict.client.delete(f"{strict.url}{PATH}/{other}", headers=KEYS["b"]).status_code == 200
    verbs = f"{PATH}/{opened[0]}"
    assert strict.post(f"{verbs}/fork", {"n": 3}, headers=KEYS["a"]).status_code == 200
    error_of(strict.post(f"{verbs}/fork", {}, headers=KEYS["a"]), 400, "n")
    assert strict.post(f"{verbs}/drop", {"branch": 0}, headers=KEYS["a"]).status_code == 200
    assert strict.post(f"{verbs}/fork", {"branch": 1}, headers=KEYS["a"]).status_code == 200
    verbs = f"{PATH}/{opened[1]}"
    assert strict.post(f"{verbs}/extend", {"prompt": "the"}, headers=KEYS["a"]).status_code == 200
    assert strict.post(f"{verbs}/select", {"choices": [[5] * 30, [6] * 20]}, headers=KEYS["a"]).status_code == 200
    error_of(strict.post(f"{verbs}/select", {"choices": [[5] * 30, [6] * 21]}, headers=KEYS["a"]), 400, "choices")
    for one in opened:
        assert strict.client.delete(f"{strict.url}{PATH}/{one}", headers=KEYS["a"]).status_code == 200
    assert strict.post(PATH, {"lease": 0.01}, headers=KEYS["b"]).status_code == 200
    strict.until_idle()


def test_a_session_that_is_deleted_under_a_call(server: Running) -> None:
    mine = Client(server, prompt=PROMPT)
    answers: list[Any] = []

    def generate() -> None:
        answers.append(server.post(f"{mine.path}/generate", {"max_tokens": 1900, "ignore_eos": True}))

    thread = threading.Thread(target=generate)
    with held(server.engine, lambda: False, after=5):
        thread.start()
        until(lambda: bool(server.context.admission.num_requests))
        mine.close()
    thread.join(60)
    error_of(answers[0], 404, "id")


def test_clients_that_go_away(session: Callable[..., Client], server: Running) -> None:
    """In the middle of a generate, at random moments: the branch is what it was, and can be used."""
    rng = random.Random(1)
    mine = session(prompt=PROMPT, seed=2)
    expected = mine.server.get(f"{mine.path}/branches/0").json()["token_ids"]
    for _ in range(12):
        with held(server.engine, lambda: False, after=rng.randrange(60)), pytest.raises(Exception, match="timed out"):
            body = {"max_tokens": 1900, "ignore_eos": True}
            server.post(f"{mine.path}/generate", body, timeout=rng.uniform(0.001, 0.1))
        until(lambda: not server.context.admission.num_requests)
    assert mine.server.get(f"{mine.path}/branches/0").json()["token_ids"] == expected
    assert len(mine("generate", max_tokens=5, ignore_eos=True)["outputs"][0]["token_ids"]) == 5


def test_no_text_is_taken_while_too_much_waits(tiny_llama_dir: Path) -> None:
    """What a session begins with is computed at once, like what it is extended by: both are refused then."""
    settings = ServerSettings(port=0, max_num_queued_reqs=0)
    with serving(tiny_llama_dir, settings) as running:
        empty = Client(running)
        with running.context.admission.admit(running.context.admission.places, 0):
            empty.refused("extend", 429, prompt=PROMPT)
            error_of(running.post(PATH, {"prompt": PROMPT}), 429)
            assert len(running.get(PATH).json()["data"]) == 1
        Client(running, prompt=PROMPT).close()
        empty.close()
        running.until_idle()


def test_forks_at_once_have_no_more_room(tiny_llama_dir: Path) -> None:
    """While the engine stands still: a second fork counts what the first one will add."""
    settings = ServerSettings(port=0, limits=Limits(max_branches=4))
    with serving(tiny_llama_dir, settings, kind=ServedLLM) as running:
        mine = Client(running, prompt=PROMPT)
        mine("fork")
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(mine("fork", n=2)))
        pid = running.llm._loop.pid  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGSTOP)
        try:
            thread.start()
            (held_one,) = running.context.sessions.of(None)
            until(lambda: bool(held_one.num_calls))
            mine.refused("fork", 400, "n", branch=1, n=2)
        finally:
            os.kill(pid, signal.SIGCONT)
        thread.join(60)
        assert len(answers[0]["branches"]) == 2
        mine.refused("fork", 400, "n")
        mine("drop", branch=1)
        mine("fork")
        mine.close()


def test_an_engine_that_ends_leaves_room(tiny_llama_dir: Path) -> None:
    """Its sessions are gone for everybody, long before their leases end."""
    settings = ServerSettings(port=0, limits=Limits(max_sessions=2))
    with serving(tiny_llama_dir, settings, kind=ServedLLM) as running:
        first, second = (Client(running, prompt=PROMPT, lease=900) for _ in range(2))
        error_of(running.post(PATH, {}), 429)
        os.kill(running.llm._loop.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        until(lambda: running.llm._loop.num_restarts == 1)  # type: ignore[attr-defined]
        first.refused("renew", 404, "id")
        error_of(running.get(f"{second.path}/branches/0"), 404, "id")
        assert running.get(PATH).json()["data"] == []
        Client(running, prompt=PROMPT).close()


def test_an_engine_that_ends(tiny_llama_dir: Path) -> None:
    """Its sessions are gone, which their clients are told; new ones are opened."""
    with serving(tiny_llama_dir, kind=ServedLLM) as running:
        mine = Client(running, prompt=PROMPT, seed=3)
        before = mine("generate", max_tokens=5, ignore_eos=True)
        os.kill(running.llm._loop.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        until(lambda: running.post(f"{mine.path}/generate", {"max_tokens": 1}).status_code == 404)
        until(lambda: running.get("/health").status_code == 200)
        assert running.get(PATH).json()["data"] == []
        again = Client(running, prompt=PROMPT, seed=3)
        assert again("generate", max_tokens=5, ignore_eos=True) == before
