"""Octavo's own routes: beam search, Writing in the Margins with review, questions over documents."""

from __future__ import annotations

import json
from typing import Any

import pytest

from octavo import LLM, AskParams, BeamSearchParams, MarginsParams, SamplingParams
from tests.pace import held
from tests.server.conftest import MODEL, Running, error_of

DOCUMENT = "The quick brown fox jumps over the lazy dog. " * 12
SHORT = {"temperature": 0.8, "max_tokens": 9}
PARAMS = {"segment_tokens": 90, "seed": 5}
READING = {"document": DOCUMENT, "question": "Who jumps?", **PARAMS, "margin": SHORT, "answer": SHORT}
ASKING = {
    "question": "Who is lazy?",
    "documents": [{"id": "a", "title": "Dogs", "text": "The dog is lazy."}, {"id": "b", "text": "The fox jumps."}],
    "answer": {"max_tokens": 12, "ignore_eos": True},
    "seed": 3,
}


def events(server: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a stream, each under its name."""
    with server.client.stream("POST", server.url + path, json={**body, "stream": True}, timeout=60) as response:
        assert response.status_code == 200, response.read()
        found = []
        for block in response.read().decode().split("\n\n"):
            if block and not block.startswith(":"):
                name, _, data = block.partition("\ndata: ")
                found.append(json.loads(data))
                assert name == f"event: {found[-1]['type']}"
    return found


# --- beams ---


@pytest.mark.parametrize(
    "fields",
    [
        {"beam_width": 4, "max_tokens": 8},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.3, "early_stopping": "never"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "no_repeat_ngram_size": 2},
        {"beam_width": 2, "structured_outputs": {"choice": ["red", "green"]}, "logprobs": 2},
    ],
)
def test_beam_search(server: Running, llm: LLM, fields: dict[str, Any]) -> None:
    (expected,) = llm.beam_search(["the fox"], BeamSearchParams(**fields))
    answer = server.post("/v1/octavo/beam_search", {"prompt": "the fox", "model": MODEL, **fields}).json()
    found = answer["outputs"]
    assert [(one["text"], one["token_ids"]) for one in found] == [(one.text, one.token_ids) for one in expected.outputs]
    assert [one["score"] for one in found] == pytest.approx([one.score for one in expected.outputs], abs=1e-5)
    assert all(len(one["logprobs"] or one["token_ids"]) == len(one["token_ids"]) for one in found)
    assert answer["usage"]["completion_tokens"] == sum(len(one["token_ids"]) for one in found)


def test_beam_search_of_a_conversation(server: Running, llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (expected,) = llm.beam_search([llm.chat_prompt(messages)], BeamSearchParams(beam_width=2, max_tokens=4))
    body = {"messages": messages, "beam_width": 2, "max_tokens": 4}
    found = server.post("/v1/octavo/beam_search", body).json()["outputs"]
    assert [one["text"] for one in found] == [one.text for one in expected.outputs]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ["x"]}, "prompt"),
        ({"prompt": "x", "messages": []}, "prompt"),
        ({"prompt": "x", "beam_width": 0}, "beam_width"),
        ({"prompt": "x", "beam_width": 9}, "beam_width"),
        ({"prompt": "x", "beam_width": 1000}, "beam_width"),
        ({"prompt": "x", "beam_width": 2, "num_beams": 3}, "num_beams"),
        ({"prompt": "x", "temperature": 0.5}, "temperature"),
        ({"prompt": "x", "stream": True}, "stream"),
        ({"prompt": "x", "top_p": 0.5}, "top_p"),
        ({"prompt": "x", "tools": []}, "tools"),
    ],
)
def test_beam_search_that_is_refused(server: Running, body: dict[str, Any], param: str) -> None:
    error_of(server.post("/v1/octavo/beam_search", body), 400, param)


# --- margins ---


def test_margins(server: Running, llm: LLM) -> None:
    sampling = SamplingParams(**SHORT)
    expected = llm.margins(DOCUMENT, "Who jumps?", MarginsParams(**PARAMS, margin=sampling, answer=sampling))
    whole = server.post("/v1/octavo/margins", READING).json()
    (answer,) = whole["answers"]
    assert answer["text"] == expected.text and answer["token_ids"] == expected.answer.output.token_ids
    assert [one["text"] for one in answer["margins"]] == [one.text for one in expected.answer.margins]
    assert [one["kept"] for one in answer["margins"]] == [one.kept for one in expected.answer.margins]
    told = events(server, "/v1/octavo/margins", READING)
    assert told[0]["type"] == "begun" and len(told[0]["segments"]) == len(expected.segments) > 2
    kinds = [one["type"] for one in told]
    assert kinds.count("segment_read") == kinds.count("margin_decided") == len(expected.segments)
    assert "".join(one["output"]["text"] for one in told if one["type"] == "answer_delta") == expected.text
    assert told[-1]["type"] == "done"
    result = told[-1]["result"]
    assert (result["segments"], result["seed"]) == (whole["segments"], 5)
    assert result["answers"][0]["token_ids"] == answer["token_ids"]


def test_several_questions_and_no_answer(server: Running) -> None:
    body = {**READING, "question": ["Who?", "What?"], "answer": None, "windows": False}
    answers = server.post("/v1/octavo/margins", body).json()["answers"]
    assert [one["question"] for one in answers] == ["Who?", "What?"]
    assert all(one["margins"] and not one["text"] for one in answers)


def test_a_review(server: Running) -> None:
    """Notes are rejected, edited and accepted while the document is read; the answer waits for it."""
    body = {**READING, "review": True, "stream": True, "request_id": "r1"}
    path = "/v1/octavo/margins"
    with server.client.stream("POST", server.url + path, json=body, timeout=60) as response:
        blocks = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
        begun = json.loads(next(blocks))
        assert begun["id"] == "margins-r1"
        while json.loads(next(blocks))["type"] != "review_begun":
            pass
        verbs = f"{path}/{begun['id']}"
        last = len(begun["segments"]) - 1
        assert server.post(f"{verbs}/edit", {"segment": 0, "text": "the fox"}).json() == {"status": "ok"}
        for number in range(1, last):
            assert server.post(f"{verbs}/reject", {"segment": number}).status_code == 200
        error_of(server.post(f"{verbs}/accept", {"segment": 999}), 400, "segment")
        error_of(server.post(f"{verbs}/accept", {}), 400, "segment")
        error_of(server.post(f"{verbs}/edit", {"segment": 0, "text": "word " * 100}), 400, "text")
        error_of(server.post(f"{verbs}/edit", {"segment": 0}), 400, "text")
        error_of(server.post(f"{verbs}/answer_now", {"now": True}), 400, "now")
        error_of(server.post(path, {**body, "stream": True}), 400, "request_id")
        assert server.post(f"{verbs}/reject", {"segment": last, "question": 0}).status_code == 200
        told = [json.loads(block) for block in blocks]
    margins = told[-1]["result"]["answers"][0]["margins"]
    assert [one["kept"] for one in margins] == [True] + [False] * last
    assert margins[0]["text"] == "the fox" and margins[0]["judged_by"] == "person"
    error_of(server.post(f"{verbs}/accept", {"segment": 0}), 404)


def test_a_review_while_the_server_drains(server: Running) -> None:
    """It is under way, and so is what a person says to it; another document is refused."""
    body = {**READING, "review": True, "stream": True, "request_id": "r3"}
    path = "/v1/octavo/margins"
    with server.client.stream("POST", server.url + path, json=body, timeout=60) as response:
        blocks = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
        while json.loads(next(blocks))["type"] != "review_begun":
            pass
        server.server._state.draining = True
        try:
            error_of(server.post(path, READING), 503)
            error_of(server.post(f"{path}/margins-other/answer_now", {}), 404, "id")
            assert server.post(f"{path}/margins-r3/reject", {"segment": 0}).status_code == 200
            assert server.post(f"{path}/margins-r3/answer_now", {}).status_code == 200
            told = [json.loads(block) for block in blocks]
        finally:
            server.server._state.draining = False
    assert told[-1]["type"] == "done" and told[-1]["result"]["answers"][0]["margins"][0]["kept"] is False


def test_reading_is_stopped(server: Running) -> None:
    body = {**READING, "stream": True, "request_id": "r2"}
    with (
        held(server.engine, lambda: False, after=6),
        server.client.stream("POST", server.url + "/v1/octavo/margins", json=body, timeout=60) as response,
    ):
        blocks = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
        next(blocks)
        assert server.post("/v1/octavo/margins/margins-r2/stop_reading", {}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"document": ""}, "document"),
        ({"document": None}, "document"),
        ({"document": 5}, "document"),
        ({"document": "fox " * 4000}, "document"),
        ({"question": []}, "question"),
        ({"question": [""]}, "question[0]"),
        ({"segment_tokens": 0}, "segment_tokens"),
        ({"margin": 5}, "margin"),
        ({"margin": {"n": 2}}, "margin.n"),
        ({"margin": {"temperature": -1}}, "margin.temperature"),
        ({"margin": {"stop": ["a"] * 100}}, "margin.stop"),
        ({"margin": {"seed": 1}}, "margin.seed"),
        ({"answer": {"logprobs": 1000}}, "answer.logprobs"),
        ({"classification": "feeling"}, "classification"),
        ({"review": True}, "review"),
        ({"prompts": {"extract": 5}}, "prompts.extract"),
        ({"prompts": {"poem": "x"}}, "prompts"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages"),
        ({"docs": "/etc"}, "docs"),
        ({"priority": 5}, "priority"),
    ],
)
def test_margins_that_are_refused(server: Running, fields: dict[str, Any], param: str) -> None:
    error_of(server.post("/v1/octavo/margins", {**READING, **fields}), 400, param)


# --- questions over documents ---


def test_ask(server: Running, llm: LLM) -> None:
    params = AskParams(answer=SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), seed=3)
    expected = llm.ask("Who is lazy?", documents=ASKING["documents"], params=params)  # type: ignore[arg-type]
    whole = server.post("/v1/octavo/ask", ASKING).json()
    assert (whole["text"], whole["token_ids"]) == (expected.text, expected.output.token_ids)
    assert [one["text"] for one in whole["sources"]] == [one.text for one in expected.sources]
    told = events(server, "/v1/octavo/ask", ASKING)
    assert told[0]["type"] == "retrieved" and [one["document"] for one in told[0]["passages"]] == ["a", "b"]
    assert "".join(one["output"]["text"] for one in told if one["type"] == "answer_delta") == expected.text
    assert told[-1]["type"] == "done" and told[-1]["result"]["text"] == expected.text


def test_ask_with_margins(server: Running) -> None:
    reading = {"segment_tokens": 60, "margin": {"max_tokens": 5}, "threshold": -1000.0}
    told = events(server, "/v1/octavo/ask", {**ASKING, "margins": reading})
    assert {"document_event", "retrieved", "done"} <= {one["type"] for one in told}
    assert any(one["event"]["type"] == "margin_written" for one in told if one["type"] == "document_event")
    assert len(told[-1]["result"]["readings"]) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": None}, "documents"),
        ({"documents": []}, "documents"),
        ({"documents": "/etc/passwd"}, "documents"),
        ({"documents": [{"path": "/etc/passwd"}]}, "documents[0]"),
        ({"documents": [{"text": "a", "id": "x"}, {"text": "b", "id": "x"}]}, "documents[1].id"),
        ({"docs": "/etc"}, "docs"),
        ({"index_path": "/tmp/x"}, "index_path"),
        ({"question": ""}, "question"),
        ({"num_passages": 0}, "num_passages"),
        ({"order": "random"}, "order"),
        ({"answer": {"n": 2}}, "answer.n"),
        ({"margins": {"review": True}}, "margins.review"),
        ({"margins": {"margin": {"top_p": 5}}}, "margins.margin.top_p"),
        ({"margins": 5}, "margins"),
    ],
)
def test_questions_that_are_refused(server: Running, fields: dict[str, Any], param: str) -> None:
    error = error_of(server.post("/v1/octavo/ask", {**ASKING, **fields}), 400, param)
    assert "root:" not in error["message"]
