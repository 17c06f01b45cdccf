"""Fields together, at random: whatever a request holds, it is answered or refused by name, and never fails."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import httpx

from octavo.core.params import SamplingParams
from tests.server.conftest import Running, error_of

# Values that are right by themselves, and some that are not.
VALUES: dict[str, list[Any]] = {
    "n": [1, 2, 3, 0],
    "temperature": [0, 0.5, 2.0, 1e300, -1],
    "top_p": [0.1, 1.0, 1, 0],
    "top_k": [0, -1, 1, 50],
    "min_p": [0.0, 0.5, 1.0],
    "presence_penalty": [0, 2, -2],
    "frequency_penalty": [0.5, -2],
    "repetition_penalty": [1.0, 1.5, 0.5],
    "seed": [0, 2**64 - 1, None],
    "stop": ["e", ["the", "x"], "<|im_end|>", [], ["\u00e9"]],
    "stop_token_ids": [[5], [], [271]],
    "include_stop_str_in_output": [True],
    "ignore_eos": [True, False],
    "max_tokens": [1, 5, 12, 0],
    "min_tokens": [0, 1, 5],
    "logit_bias": [{"5": 10, "6": -1e6}, {}],
    "allowed_token_ids": [[40, 41, 42], [2]],
    "bad_words": [["a", "the"], []],
    "skip_special_tokens": [False],
    "prompt_logprobs": [0, 3],
    "repetition_detection": [{"max_pattern_size": 3, "min_count": 2}],
    "structured_outputs": [{"regex": "[a-z]{1,4}"}, {"choice": ["yes", "no"]}, {"json": {"type": "integer"}}],
    "response_format": [{"type": "json_object"}, {"type": "text"}],
    "use_beam_search": [True],
    "length_penalty": [0.5, 1.0],
    "cache_salt": ["a"],
    "return_token_ids": [True],
    "stream": [True],
    "stream_options": [{"include_usage": True}],
    "skip_reading_prefix_cache": [True],
    "speculative_decoding": [False],
    "user": ["somebody"],
}
COMPLETION = {
    **VALUES,
    "echo": [True],
    "logprobs": [0, 2, 20],
    "prompt": ["the fox", [5, 6, 7], ["a", "b"], "<|im_end|>"],
}
CHAT = {
    **VALUES,
    "logprobs": [True],
    "top_logprobs": [0, 3],
    "tools": [[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]],
    "tool_choice": ["auto", "none"],
    "continue_final_message": [True],
    "messages": [[{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "so "}]],
}
_OF_CHATS = {"n", "use_beam_search", "length_penalty", "prompt_logprobs", "response_format", "stream_options"}
RESPONSES = {
    **{name: values for name, values in VALUES.items() if name not in {*_OF_CHATS, "max_tokens"}},
    "max_output_tokens": VALUES["max_tokens"],
    "input": ["hi", [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "so "}]],
    "instructions": ["be brief"],
    "include": [["message.output_text.logprobs"]],
    "top_logprobs": [0, 3],
    "text": [{"format": {"type": "json_object"}}, {"format": {"type": "text"}}],
    "tools": [[{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}], []],
    "tool_choice": ["auto", "none", "required"],
    "parallel_tool_calls": [True, False],
    "continue_final_message": [True],
    "store": [False],
}
MESSAGES = {
    **{name: values for name, values in VALUES.items() if name not in {*_OF_CHATS, "stop", "user", "return_token_ids"}},
    "stop_sequences": [["the", "x"], []],
    "messages": [[{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "so "}]],
    "system": ["be brief"],
    "tools": [[{"name": "f", "input_schema": {"type": "object"}, "strict": True}], []],
    "tool_choice": [{"type": "auto", "disable_parallel_tool_use": True}, {"type": "any"}, {"type": "none"}],
    "output_config": [{"format": {"type": "json_schema", "schema": {"type": "integer"}}}],
    "metadata": [{"user_id": "x"}],
}
ROUNDS = int(os.environ.get("HTTP_PAIRS", "100"))


def test_every_field_of_the_library_is_tried() -> None:
    left = {one for one in SamplingParams.__dataclass_fields__ if one not in COMPLETION}
    assert left == {"detokenize", "output_kind", "spaces_between_special_tokens"}


def test_fields_together(server: Running) -> None:
    rng = random.Random(11)
    statuses = {200: 0, 400: 0}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for number in range(ROUNDS):
            path, needed, pool = rng.choice(
                [("/v1/completions", "prompt", COMPLETION), ("/v1/chat/completions", "messages", CHAT)]
            )
            names = {needed, "max_tokens", *rng.sample(sorted(pool), rng.randint(1, 5))}
            body = {name: rng.choice(pool[name]) for name in sorted(names)}
            response = client.post(path, json=body)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            assert response.status_code in (200, 400), (number, body, response.text)
            if response.status_code == 400:
                error = error_of(response, 400)
                assert error["param"] or "no token can be drawn" in error["message"], (body, error)
            elif body.get("stream"):
                lines = [line for line in response.text.split("\n") if line]
                told = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
                whole = lines[-1] == "data: [DONE]"
                assert whole or "no token can be drawn" in told[-1]["error"]["message"], (body, lines[-2:])
                assert not any("error" in one for one in told[:-1])
            else:
                assert all(one["finish_reason"] for one in response.json()["choices"]), (body, response.text)
    assert min(statuses.values()) > ROUNDS // 10, statuses


def test_fields_together_on_the_routes_with_typed_events(hermes_server: Running) -> None:
    """The same; and a stream ends with an event that says how."""
    rng = random.Random(12)
    statuses = {200: 0, 400: 0}
    routes = [("/v1/responses", ("input", "max_output_tokens"), RESPONSES)]
    routes += [("/v1/messages", ("messages", "max_tokens"), MESSAGES)]
    for number in range(ROUNDS):
        path, needed, pool = rng.choice(routes)
        names = {*needed, *rng.sample(sorted(pool), rng.randint(1, 5))}
        body = {name: rng.choice(pool[name]) for name in sorted(names)}
        response = hermes_server.post(path, body)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code in (200, 400), (number, body, response.text)
        if response.status_code == 400:
            error = response.json()["error"]
            assert error["param"] or "no token can be drawn" in error["message"], (body, error)
        elif body.get("stream"):
            last = json.loads(response.text.split("data: ")[-1])
            ends = "response.completed", "response.incomplete", "message_stop"
            assert last["type"] in ends or "no token can be drawn" in response.text, (body, last)
        else:
            found = response.json()
            assert found.get("stop_reason") or found["status"] in ("completed", "incomplete"), (body, found)
    assert min(statuses.values()) > ROUNDS // 10, statuses
    hermes_server.until_idle()
