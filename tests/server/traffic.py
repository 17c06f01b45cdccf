"""Clients of all kinds, asking one thing after the other: what a server is put under in tests of faults, and soaks."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

PATIENCE = 120.0  # seconds after which an answer is taken never to come
_LAST = "done", "response.completed", "response.incomplete", "message_stop"  # types of events that end a stream
WORDS = "the quick brown fox jumps over the lazy dog while a captain of old ships looks at the white sea ".split()
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class RefusedError(Exception):
    """An answer with an error, in a status or in a stream."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Traffic:
    """Counts how each request ended, in `ends`: by "ok", by the code of an error, or by "gone" for a connection that
    broke. Whatever ends otherwise, or never, is raised.

    Args:
        kinds: of `Traffic.KINDS`.
    """

    KINDS = ("chat", "completion", "schema", "beams", "margins", "ask", "embeddings", "session", "leaver", "lease")
    KINDS += ("response", "message")

    def __init__(self, url: str, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> None:
        self._url = url
        self._seed = seed
        self._kinds = kinds
        self.num_begun = 0
        self.ends: Counter[str] = Counter()
        self.kinds_ok: Counter[str] = Counter()

    @property
    def num_ended(self) -> int:
        return sum(self.ends.values())

    async def run(self, num_clients: int, until: Callable[[], bool]) -> None:
        """Ask until the condition holds; then what is under way is waited for."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_clients)
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=PATIENCE, limits=limits) as client,
            asyncio.TaskGroup() as group,
        ):
            for number in range(num_clients):
                group.create_task(self._client(client, random.Random(f"{self._seed} {number}"), until))

    async def _client(self, client: httpx.AsyncClient, rng: random.Random, until: Callable[[], bool]) -> None:
        while not until():
            kind = rng.choice(self._kinds)
            self.num_begun += 1
            try:
                async with asyncio.timeout(PATIENCE):
                    await getattr(self, f"_{kind}")(client, rng)
                end = "ok"
                self.kinds_ok[kind] += 1
            except RefusedError as error:
                end = str(error.code)
            except httpx.TransportError as error:
                assert not isinstance(error, httpx.TimeoutException), f"a request of kind {kind} was never answered"
                end = "gone"
            self.ends[end] += 1
            if end != "ok":
                await asyncio.sleep(rng.random() * 0.1)  # as who was told to come again

    # --- what they ask ---

    async def _chat(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        messages = [{"role": "system", "content": "Be brief and kind."}, {"role": "user", "content": _text(rng, 30)}]
        body = {"messages": messages, "max_tokens": rng.randint(1, 40), "stream_options": {"include_usage": True}}
        told = [one async for one in _events(client, "/v1/chat/completions", {**body, "stream": True})]
        assert told[-1]["usage"]["completion_tokens"] >= 1
        assert [one["choices"][0]["finish_reason"] for one in told if one["choices"]][-1] in ("stop", "length")

    async def _response(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        body = {"input": _text(rng, 30), "instructions": "Be kind.", "max_output_tokens": rng.randint(1, 40)}
        told = [one async for one in _events(client, "/v1/responses", {**body, "stream": True})]
        assert told[-1]["response"]["usage"]["output_tokens"] >= 1

    async def _message(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        body = {"messages": [{"role": "user", "content": _text(rng, 30)}], "max_tokens": rng.randint(1, 40)}
        told = [one async for one in _events(client, "/v1/messages", {**body, "system": "Be kind.", "stream": True})]
        assert told[-2]["usage"]["output_tokens"] >= 1

    async def _completion(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        body = {"prompt": [_text(rng, 20), _text(rng, 60)], "n": 2, "max_tokens": rng.randint(1, 40), "logprobs": 1}
        answer = await _post(client, "/v1/completions", body)
        assert [one["finish_reason"] in ("stop", "length") for one in answer["choices"]] == [True] * 4

    async def _schema(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        schema = {**SCHEMA, "title": rng.choice("abcdefgh")}
        body = {"prompt": _text(rng, 10), "max_tokens": 60, "structured_outputs": {"json": schema}}
        (choice,) = (await _post(client, "/v1/completions", body))["choices"]
        if choice["finish_reason"] == "stop":
            assert sorted(json.loads(choice["text"])) == ["age", "name"]

    async def _beams(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        body = {"prompt": _text(rng, 30), "beam_width": 4, "max_tokens": rng.randint(1, 20)}
        assert len((await _post(client, "/v1/octavo/beam_search", body))["outputs"]) == 4

    async def _margins(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        body = {
            "document": _text(rng, 90, " ") + ". " + _text(rng, 90),
            "question": "Who?",
            "segment_tokens": 150,
            "margin": {"max_tokens": 8},
            "answer": {"max_tokens": 8},
            "stream": True,
        }
        told = [one async for one in _events(client, "/v1/octavo/margins", body)]
        assert told[-1]["type"] == "done"

    async def _ask(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        documents = [{"id": str(number), "text": _text(rng, 40)} for number in range(3)]
        body = {"question": "Where is the fox?", "documents": documents, "answer": {"max_tokens": 8}}
        assert "citations" in await _post(client, "/v1/octavo/ask", body)

    async def _embeddings(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        answer = await _post(client, "/v1/embeddings", {"input": [_text(rng, 30), _text(rng, 5)]})
        assert len(answer["data"]) == 2

    async def _session(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        session = await _post(client, "/v1/octavo/sessions", {"prompt": _text(rng, 20)})
        path = f"/v1/octavo/sessions/{session['id']}"
        try:
            await _post(client, f"{path}/fork", {"n": 2})
            answer = await _post(client, f"{path}/generate", {"branches": [0, 1, 2], "max_tokens": 10})
            assert len(answer["outputs"]) == 3
            await _post(client, f"{path}/select", {"choices": [" yes", " no"], "extend": True})
        finally:
            response = await client.delete(path)
            assert response.status_code in (200, 404, 503)

    async def _lease(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        """A session that is left to its end."""
        await _post(client, "/v1/octavo/sessions", {"prompt": _text(rng, 20), "lease": 0.2})

    async def _leaver(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        """Goes away in the middle."""
        stays = rng.randint(1, 10)
        body = {"prompt": _text(rng, 20), "max_tokens": 200, "ignore_eos": True, "stream": True}
        async for _ in _events(client, "/v1/completions", body):
            stays -= 1
            if stays == 0:
                return


def _text(rng: random.Random, words: int, between: str = " ") -> str:
    return between.join(rng.choice(WORDS) for _ in range(rng.randint(1, words)))


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    response = await client.post(path, json=body)
    answer = response.json()
    if response.status_code != 200:
        raise RefusedError(response.status_code, answer["error"]["message"])
    return answer


async def _events(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Of a stream, up to its end, which must be a right one."""
    whole = False
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            error = json.loads(await response.aread())["error"]
            raise RefusedError(response.status_code, error["message"])
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                whole = True
                continue
            told = json.loads(line[6:])
            if "error" in told:
                raise RefusedError(told["error"]["code"], told["error"]["message"])
            if told.get("type") == "response.failed":
                raise RefusedError(500, told["response"]["error"]["message"])
            whole = whole or told.get("type") in _LAST
            yield told
    assert whole, "a stream ended without an end"
