"""A server that guesses answers as one that does not: fields together at random, many requests at a time, clients that
leave, in a pool too small."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.heads import save_random_head
from tests.server.conftest import Running, serving
from tests.server.test_pairs import CHAT, COMPLETION

ROUNDS = 120
_OF_ITS_OWN = {"id", "created", "system_fingerprint", "metrics", "usage"}  # usage tells how much was cached


def bodies(rng: random.Random) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for _ in range(ROUNDS):
        path, needed, pool = rng.choice(
            [("/v1/completions", "prompt", COMPLETION), ("/v1/chat/completions", "messages", CHAT)]
        )
        names = {needed, *rng.sample(sorted(pool), rng.randint(1, 5))} - {"use_beam_search", "length_penalty"}
        body = {name: rng.choice(pool[name]) for name in sorted(names)}
        found.append((path, body | {"max_tokens": rng.randint(1, 24), "seed": rng.randrange(2**32)}))
    return found


def told(value: Any) -> Any:
    """What an answer says, without what is of one answer alone."""
    if isinstance(value, dict):
        return {name: told(one) for name, one in value.items() if name not in _OF_ITS_OWN}
    return [told(one) for one in value] if isinstance(value, list) else value


def asked(server: Running, path: str, body: dict[str, Any]) -> Any:
    response = server.post(path, body)
    if not body.get("stream") or response.status_code != 200:
        return response.status_code, told(response.json())
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    events = [told(json.loads(line)) for line in lines if line != "[DONE]"]
    # A step of several tokens is one piece: joined they are the same.
    texts: dict[int, list[str]] = {}
    for event in events:
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or choice
            piece = texts.setdefault(choice["index"], ["", ""])
            piece[0] += delta.get("content") or delta.get("text") or ""
            piece[1] = choice.get("finish_reason") or piece[1]
    return texts, [event["error"] for event in events if "error" in event]


@pytest.mark.parametrize("method", ["suffix", "draft_head"])
def test_it_answers_the_same(tiny_dir: Path, tmp_path: Path, method: str) -> None:
    rng = random.Random(method)
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": 4, "adaptive": False}
    if method == "draft_head":
        config["model"] = str(save_random_head(tmp_path / "head.safetensors", tiny_dir))
    everything = bodies(rng)
    with serving(tiny_dir) as plain:
        expected = [asked(plain, path, body) for path, body in everything]
        block_bytes = plain.llm.memory_plan.block_bytes
    with serving(tiny_dir, speculative_config=config, kv_cache_memory_bytes=160 * block_bytes) as server:

        def go_away(path: str, body: dict[str, Any], after: int) -> None:
            with httpx.stream("POST", server.url + path, json=body | {"stream": True}, timeout=60) as response:
                for number, _ in enumerate(response.iter_lines()):
                    if number >= after:
                        return

        with ThreadPoolExecutor(8) as pool:
            going = [pool.submit(go_away, *rng.choice(everything), rng.randint(0, 6)) for _ in range(20)]
            found = list(pool.map(lambda one: asked(server, *one), everything))
            for one in going:
                one.result()
        for (_, body), got, wanted in zip(everything, found, expected, strict=True):
            assert got == wanted, body
        server.until_idle()
        stats = server.llm.speculation_stats
    statuses = [one[0] for one in expected if isinstance(one[0], int)]
    assert statuses.count(200) > ROUNDS // 4
    assert stats is not None and stats.num_draft_tokens > 200
