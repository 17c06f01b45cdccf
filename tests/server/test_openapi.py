"""The OpenAPI page says what there is: requests made of it at random, right ones and wrong ones, are answered as it
says, and never by an error of the server's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi import checks

from tests.server.conftest import MODEL, Running
from tests.server.test_octavo_routes import ASKING, READING

load_all_checks()
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.missing_required_header,
]


def hold(case: Any) -> None:
    case.headers.pop("X-Request-Timeout", None)  # what is late is answered by a 504
    if isinstance(case.body, dict):
        # How long an answer takes is not what is looked at.
        case.body.update(
            {name: 3 for name in ("max_tokens", "max_completion_tokens", "max_output_tokens") if name in case.body}
        )
    case.call_and_validate(checks=CHECKS, timeout=60)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("examples", [4, pytest.param(300, marks=pytest.mark.slow)])
def test_every_route(server: Running, mode: GenerationMode, examples: int) -> None:
    page = schemathesis.openapi.from_url(server.url + "/openapi.json")
    operations = [found.ok() for found in page.get_all_operations()]
    assert len(operations) > 30
    for operation in operations:
        check = settings(
            max_examples=examples, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
        )(given(operation.as_strategy(generation_mode=mode))(hold))
        check()


@pytest.fixture(autouse=True)
def no_session_is_left(server: Running) -> Iterator[None]:
    yield
    for one in server.get("/v1/octavo/sessions").json()["data"]:
        server.client.delete(f"{server.url}/v1/octavo/sessions/{one['id']}")


PROMPT = {"prompt": "the fox", "max_tokens": 3}
MESSAGES = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
INPUT = {"input": [{"role": "user", "content": "hi"}], "max_output_tokens": 3, "return_token_ids": True}
RIGHT: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/v1/completions", PROMPT),
    ("POST", "/v1/completions", {**PROMPT, "logprobs": 2, "echo": True, "n": 2, "return_token_ids": True}),
    ("POST", "/v1/completions", {**PROMPT, "prompt_logprobs": 1}),
    ("POST", "/v1/completions", {**PROMPT, "use_beam_search": True, "n": 2}),
    ("POST", "/v1/completions", {**PROMPT, "stream": True}),
    ("POST", "/v1/chat/completions", MESSAGES),
    ("POST", "/v1/chat/completions", {**MESSAGES, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
    ("POST", "/v1/chat/completions", {**MESSAGES, "prompt_logprobs": 1}),
    ("POST", "/v1/chat/completions", {**MESSAGES, "stream": True}),
    ("POST", "/v1/responses", {"input": "hi", "max_output_tokens": 3}),
    ("POST", "/v1/responses", {**INPUT, "include": ["message.output_text.logprobs"], "top_logprobs": 2}),
    ("POST", "/v1/responses", {**INPUT, "text": {"format": {"type": "json_object"}}}),
    ("POST", "/v1/responses", {**INPUT, "stream": True}),
    ("POST", "/v1/messages", MESSAGES),
    ("POST", "/v1/messages", {**MESSAGES, "system": "be brief"}),
    ("POST", "/v1/messages", {**MESSAGES, "stream": True}),
    ("POST", "/v1/messages/count_tokens", {"messages": MESSAGES["messages"]}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/{model}", None),
    ("POST", "/tokenize", {"prompt": "the fox", "return_token_strs": True}),
    ("POST", "/tokenize", {"messages": MESSAGES["messages"]}),
    ("POST", "/detokenize", {"tokens": [40, 41]}),
    ("GET", "/live", None),
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("GET", "/version", None),
    ("GET", "/v1/octavo/stats", None),
    ("POST", "/reset_prefix_cache", None),
    ("POST", "/v1/embeddings", {"input": ["a", "b"]}),
    ("POST", "/v1/embeddings", {"input": [5, 6], "encoding_format": "base64"}),
    ("POST", "/v1/octavo/beam_search", {**PROMPT, "beam_width": 2, "logprobs": 1}),
    ("POST", "/v1/octavo/margins", {**READING, "answer": {"max_tokens": 3, "logprobs": 1}}),
    ("POST", "/v1/octavo/margins", {**READING, "stream": True}),
    ("POST", "/v1/octavo/ask", {**ASKING, "margins": {"segment_tokens": 60, "margin": {"max_tokens": 3}}}),
    ("POST", "/v1/octavo/sessions", {"prompt": "the fox"}),
    ("GET", "/v1/octavo/sessions", None),
    ("GET", "/v1/octavo/sessions/{session_id}", None),
    ("GET", "/v1/octavo/sessions/{session_id}/branches/{branch}", None),
    ("POST", "/v1/octavo/sessions/{session_id}/renew", {}),
    ("POST", "/v1/octavo/sessions/{session_id}/extend", {"prompt": " jumps"}),
    ("POST", "/v1/octavo/sessions/{session_id}/fork", {"n": 2}),
    ("POST", "/v1/octavo/sessions/{session_id}/generate", {"branches": [0, 1], "max_tokens": 3, "logprobs": 1}),
    ("POST", "/v1/octavo/sessions/{session_id}/select", {"choices": [" a", " b"], "extend": True}),
    ("POST", "/v1/octavo/sessions/{session_id}/truncate", {"num_tokens": 2}),
    ("POST", "/v1/octavo/sessions/{session_id}/drop", {"branch": 1}),
    ("DELETE", "/v1/octavo/sessions/{session_id}", None),
]
# A review needs a document that is being read: see test_octavo_routes; /metrics an engine in a process of its own.
ELSEWHERE = {"/metrics"} | {
    f"/v1/octavo/margins/{{run_id}}/{verb}" for verb in ("accept", "reject", "edit", "answer_now", "stop_reading")
}


def test_answers_are_of_the_form_that_the_page_tells(server: Running) -> None:
    """Of every route that is on it."""
    page = schemathesis.openapi.from_url(server.url + "/openapi.json")
    names = {"model": MODEL, "branch": "0", "session_id": ""}
    for method, path, body in RIGHT:
        operation = page[path][method]
        parameters = {name: value for name, value in names.items() if f"{{{name}}}" in path}
        more = {} if body is None else {"body": body, "media_type": "application/json"}
        case = operation.Case(path_parameters=parameters, **more)
        response = case.call(timeout=60)
        assert response.status_code == 200, (path, response.text)
        case.validate_response(response, checks=CHECKS)
        if (method, path) == ("POST", "/v1/octavo/sessions"):
            names["session_id"] = response.json()["id"]
    assert {path for _, path, _ in RIGHT} | ELSEWHERE == set(page.raw_schema["paths"])
