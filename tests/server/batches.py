"""What tests of batches share: requests of every kind, and answers without what differs each time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MODEL = "tiny"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
# Of an answer: when, and under which name; and what was cached then.
_VOLATILE = {
    "id",
    "request_id",
    "created",
    "created_at",
    "completed_at",
    "cached_tokens",
    "input_tokens",
    "cache_read_input_tokens",
}

_HELLO = [{"role": "user", "content": "hello there"}]
_DRAWN = {"max_tokens": 12, "temperature": 0.9, "seed": 7}
_TEXT = "The quick brown fox jumps over the lazy dog. " * 12
_TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}

# Every route that a batch may ask, with bodies that are answered and some that are refused.
BODIES: dict[str, list[dict[str, Any]]] = {
    CHAT: [
        {"messages": _HELLO, "model": MODEL, **_DRAWN},
        {"messages": _HELLO, **_DRAWN, "n": 3, "logprobs": True, "top_logprobs": 2},
        {"messages": _HELLO, **_DRAWN, "response_format": {"type": "json_object"}, "max_tokens": 40},
        {"messages": _HELLO, **_DRAWN, "stream": False, "return_token_ids": True, "prompt_logprobs": 1},
        {"messages": [{"role": "user", "content": "\u00e9\U0001f98a\u2028\x00"}], **_DRAWN},
        {"messages": []},
        {"messages": _HELLO, "model": "other"},
        {"messages": _HELLO, "tools": [_TOOL], "tool_choice": "required"},
        {"messages": _HELLO, "temperature": -1},
        {"messages": _HELLO, "stream_options": {"include_usage": True}},
    ],
    COMPLETIONS: [
        {"prompt": "the fox", **_DRAWN},
        {"prompt": ["the fox", [40, 41, 42], "dog"], **_DRAWN, "n": 2, "echo": True, "logprobs": 2},
        {"prompt": "the fox", "max_tokens": 8, "n": 3, "use_beam_search": True},
        {"prompt": "the fox", **_DRAWN, "structured_outputs": {"choice": ["red", "green"]}},
        {"prompt": "the fox", **_DRAWN, "stop": ["e"], "logit_bias": {"40": 3.5}},
        {"prompt": "x" * 9000},
        {"prompt": "the fox", "best_of": 2},
    ],
    "/v1/responses": [
        {"input": "hello there", "max_output_tokens": 12, "temperature": 0.9, "seed": 7},
        {"input": "hello there", "max_tokens": 12},
    ],
    "/v1/messages": [
        {"messages": _HELLO, "model": MODEL, **_DRAWN},
        {"messages": _HELLO, "model": MODEL},
    ],
    "/v1/embeddings": [
        {"input": ["the fox", "dog"], "dimensions": 8},
        {"input": [40, 41], "pooling": "last", "encoding_format": "base64"},
        {"input": []},
    ],
    "/v1/octavo/beam_search": [{"prompt": "the fox", "beam_width": 3}, {"messages": _HELLO, "num_beams": 2}, {}],
    "/v1/octavo/margins": [
        {"document": _TEXT, "question": "Who?", "segment_tokens": 90, "seed": 5, "margin": {"max_tokens": 5}},
        {"document": _TEXT, "question": "Who?", "review": True},
    ],
    "/v1/octavo/ask": [
        {"question": "Who?", "documents": [{"id": "a", "text": "The dog."}], "answer": {"max_tokens": 5}, "seed": 3},
        {"question": "Who?"},
    ],
}


def request(custom_id: object, body: Any = None, url: str = COMPLETIONS, **more: Any) -> dict[str, Any]:
    body = {"prompt": "the fox", **_DRAWN} if body is None else body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more}


def all_kinds() -> list[dict[str, Any]]:
    return [
        request(f"{url} {number}", body, url) for url, bodies in BODIES.items() for number, body in enumerate(bodies)
    ]


def as_lines(requests: Iterable[object]) -> str:
    return "".join(json.dumps(one) + "\n" for one in requests)


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def plain(answer: Any) -> Any:
    """An answer without what is another each time."""
    if isinstance(answer, dict):
        return {name: plain(value) for name, value in answer.items() if name not in _VOLATILE}
    return [plain(one) for one in answer] if isinstance(answer, list) else answer


def by_id(path: Path) -> dict[str, Any]:
    """Custom id -> id, status and body, or error; each must be there once."""
    found: dict[str, Any] = {}
    for one in answers(path):
        assert sorted(one) == ["custom_id", "error", "id", "response"]
        assert (one["response"] is None) != (one["error"] is None)
        assert one["custom_id"] not in found
        told = one["error"] or (one["response"]["status_code"], plain(one["response"]["body"]))
        found[one["custom_id"]] = (one["id"], told)
    return found
