"""/v1/completions with OpenAI's own client: every answer is the library's for the same parameters."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from openai import OpenAI

from octavo import LLM, BeamSearchParams, SamplingParams
from octavo.core.outputs import CompletionOutput, RequestOutput
from tests.server.conftest import MODEL, Running, error_of

PROMPT = "the quick brown fox"
DRAWN = {"temperature": 1.0, "seed": 7, "max_tokens": 12}


def close(values: Any) -> Any:
    """What was in the prefix cache differs by rounding on the backend that this model runs on."""
    return pytest.approx(values, abs=1e-5)


def library(llm: LLM, prompt: Any, **params: Any) -> RequestOutput:
    (output,) = llm.generate([prompt], SamplingParams(**params))
    return output


@pytest.mark.parametrize(
    ("fields", "extra"),
    [
        ({}, {}),
        ({"n": 3}, {}),
        ({"temperature": 0.0, "max_tokens": 20}, {}),
        ({"temperature": 0.7, "top_p": 0.8, "presence_penalty": 0.5, "frequency_penalty": -0.5}, {}),
        ({}, {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2}),
        ({"stop": ["e", "qu"]}, {"include_stop_str_in_output": True, "min_tokens": 2}),
        ({"stop": "o"}, {"ignore_eos": True}),
        ({"logit_bias": {"70": 5.0, "71": -5}}, {}),
        ({}, {"allowed_token_ids": [40, 41, 42]}),
        ({}, {"bad_words": ["a", "e"], "stop_token_ids": [60]}),
        ({}, {"skip_special_tokens": False, "spaces_between_special_tokens": False}),
        ({}, {"structured_outputs": {"choice": ["red", "green"]}}),
        ({"max_tokens": 40}, {"repetition_detection": {"max_pattern_size": 4, "min_count": 3}}),
    ],
)
def test_answers_are_the_librarys_streamed_or_not(
    client: OpenAI, llm: LLM, fields: dict[str, Any], extra: dict[str, Any]
) -> None:
    given = {**DRAWN, **fields}
    expected = library(llm, PROMPT, **{**given, **extra}).outputs
    whole = client.completions.create(model=MODEL, prompt=PROMPT, **given, extra_body=extra)
    assert [(one.index, one.text) for one in whole.choices] == [(one.index, one.text) for one in expected]
    assert [one.finish_reason for one in whole.choices] == [one.finish_reason for one in expected]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == sum(len(one.token_ids) for one in expected)
    texts, reasons = ["" for _ in expected], [None for _ in expected]
    for chunk in client.completions.create(model=MODEL, prompt=PROMPT, **given, extra_body=extra, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.finish_reason is not None:
            assert reasons[choice.index] is None, "an output ends once"
            reasons[choice.index] = choice.finish_reason  # type: ignore[call-overload]
    assert texts == [one.text for one in expected]
    assert reasons == [one.finish_reason for one in expected]


@pytest.mark.parametrize("form", ["text", "texts", "ids", "lists of ids"])
@pytest.mark.parametrize("stream", [False, True])
def test_four_forms_of_prompts(client: OpenAI, llm: LLM, form: str, stream: bool) -> None:
    texts = [PROMPT, "a lazy dog", "x"] if form in ("texts", "lists of ids") else [PROMPT]
    ids = [llm.tokenizer.encode(text) for text in texts]
    prompt: Any = {"text": texts[0], "texts": texts, "ids": ids[0], "lists of ids": ids}[form]
    expected = [one.text for text in texts for one in library(llm, text, n=2, **DRAWN).outputs]
    answer: Any = client.completions.create(model=MODEL, prompt=prompt, n=2, **DRAWN, stream=stream)
    found = [""] * len(expected)
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            found[choice.index] += choice.text
    assert found == expected


def test_usage_and_what_was_cached(client: OpenAI, server: Running) -> None:
    server.post("/reset_prefix_cache", None)
    prompt = "one and only " * 8
    first = client.completions.create(model=MODEL, prompt=prompt, max_tokens=3)
    assert first.usage is not None and first.usage.prompt_tokens_details is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    options = {"include_usage": True}
    *chunks, last = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=3, stream=True, stream_options=options
    )
    assert last.choices == [] and last.usage is not None and last.usage.prompt_tokens_details is not None
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.usage.prompt_tokens == first.usage.prompt_tokens > 16
    assert last.usage.prompt_tokens_details.cached_tokens > 0
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def test_logprobs(client: OpenAI, llm: LLM) -> None:
    expected = library(llm, PROMPT, logprobs=3, **DRAWN).outputs[0]
    whole = client.completions.create(model=MODEL, prompt=PROMPT, logprobs=3, **DRAWN).choices[0]
    found = whole.logprobs
    assert found is not None and expected.logprobs is not None
    rows = zip(expected.token_ids, expected.logprobs, strict=True)
    assert found.token_logprobs == close([row[token_id].logprob for token_id, row in rows])
    assert found.tokens is not None and found.top_logprobs is not None and found.text_offset is not None
    assert [len(best) for best in found.top_logprobs] == [len(row) for row in expected.logprobs]
    parts: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in client.completions.create(model=MODEL, prompt=PROMPT, logprobs=3, **DRAWN, stream=True):
        assert chunk.choices[0].logprobs is not None
        for name in parts:
            parts[name] += getattr(chunk.choices[0].logprobs, name)
    for name in ("tokens", "text_offset"):
        assert parts[name] == getattr(found, name)
    assert parts["token_logprobs"] == close(found.token_logprobs)


def test_offsets_point_at_tokens(client: OpenAI, llm: LLM) -> None:
    """Also where a character is several tokens: they begin where it does."""
    answer = client.completions.create(
        model=MODEL, prompt="é€ fox", echo=True, max_tokens=1, logprobs=0, temperature=0
    ).choices[0]
    found = answer.logprobs
    assert found is not None and found.tokens is not None and found.text_offset is not None
    ids = llm.tokenizer.encode("é€ fox")
    spelt = [llm.tokenizer.token_bytes(one) for one in ids]
    expected, seen = [], b""
    for part in spelt:
        expected.append(len(seen.decode(errors="ignore")))
        seen += part
    assert found.text_offset[: len(ids)] == expected
    assert found.tokens[0] == "bytes:\\xc3" and found.token_logprobs is not None
    assert found.token_logprobs[0] is None and all(value <= 0 for value in found.token_logprobs[1:])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 4])
def test_echo(client: OpenAI, llm: LLM, stream: bool, max_tokens: int) -> None:
    """As evaluation harnesses score texts."""
    ids = llm.tokenizer.encode(PROMPT)
    expected = library(llm, PROMPT, temperature=0.0, max_tokens=4, logprobs=2, prompt_logprobs=2)
    new = expected.outputs[0] if max_tokens else CompletionOutput(0, "", [], logprobs=[])
    for prompt in (PROMPT, ids):
        fields: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens, "logprobs": 2, "echo": True}
        answer: Any = client.completions.create(model=MODEL, prompt=prompt, **fields, stream=stream)
        choices = [one for chunk in (answer if stream else [answer]) for one in chunk.choices]
        assert "".join(one.text for one in choices) == PROMPT + new.text
        values = [value for one in choices for value in one.logprobs.token_logprobs]
        assert expected.prompt_logprobs is not None and new.logprobs is not None
        of_prompt = [row[i].logprob for i, row in zip(ids[1:], expected.prompt_logprobs[1:], strict=True) if row]
        of_answer = [row[i].logprob for i, row in zip(new.token_ids, new.logprobs, strict=True)]
        assert values[0] is None and values[1:] == close(of_prompt + of_answer)
        assert choices[-1].finish_reason == (new.finish_reason or "length")


def test_token_ids_and_prompt_logprobs(server: Running, llm: LLM) -> None:
    expected = library(llm, PROMPT, prompt_logprobs=1, **DRAWN)
    body = {"prompt": PROMPT, **DRAWN, "return_token_ids": True, "prompt_logprobs": 1}
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    assert choice["token_ids"] == expected.outputs[0].token_ids
    assert choice["prompt_token_ids"] == expected.prompt_token_ids
    assert choice["prompt_logprobs"][0] is None and expected.prompt_logprobs is not None
    for row, other in zip(choice["prompt_logprobs"][1:], expected.prompt_logprobs[1:], strict=True):
        assert other is not None
        assert {int(key): one["logprob"] for key, one in row.items()} == close({k: v.logprob for k, v in other.items()})


def test_beam_search(client: OpenAI, llm: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=0.5, ignore_eos=True)
    (expected,) = llm.beam_search([PROMPT], params)
    extra = {"use_beam_search": True, "length_penalty": 0.5, "ignore_eos": True}
    answer = client.completions.create(model=MODEL, prompt=PROMPT, n=3, max_tokens=6, extra_body=extra)
    assert [one.text for one in answer.choices] == [one.text for one in expected.outputs]


def test_one_write_a_step(server: Running) -> None:
    """All outputs of a step come in one write, and what is held back makes none."""
    body = {"prompt": PROMPT, **DRAWN, "n": 4, "stream": True, "ignore_eos": True, "min_tokens": 12}
    with server.client.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as response:
        writes = list(response.iter_raw())
    assert response.headers["content-type"].startswith("text/event-stream")
    events = b"".join(writes).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert 12 < len(events) - 2 <= 4 * 12
    assert len(writes) <= 12 + 2, "a write holds what all outputs got in a step"


def test_request_ids(server: Running) -> None:
    answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, headers={"X-Request-Id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1" and answer.json()["id"] == "cmpl-abc-1"
    answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1, "request_id": "mine"})
    assert answer.json()["id"] == "cmpl-mine" and len(answer.headers["x-request-id"]) == 32
    bad = server.post("/v1/completions", {"prompt": "x"}, headers={"X-Request-Id": "a b"})
    error_of(bad, 400, "X-Request-Id")


def test_errors_as_the_client_raises_them(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt=PROMPT, temperature=-1)
    assert bad.value.param == "temperature" and "at least 0" in bad.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt=PROMPT)
    assert missing.value.param == "model"


def test_models_and_version(client: OpenAI, server: Running) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL and client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/one")
    assert server.get("/version").json()["version"]


def test_the_page_documents_every_field(server: Running) -> None:
    page = server.get("/openapi.json").json()
    bodies = "CompletionRequest", "ChatCompletionRequest", "ResponsesRequest", "MessagesRequest"
    for schema in (page["components"]["schemas"][name] for name in bodies):
        assert schema["additionalProperties"] is False
        without = [name for name, one in schema["properties"].items() if not one.get("description")]
        assert without == [] and len(schema["properties"]) > 35
    assert "/v1/octavo/margins/{run_id}/accept" in page["paths"]
    told = json.dumps(page)
    refs = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', told))
    assert refs <= set(page["components"]["schemas"]) and {"CompletionRequest", "Error", "StreamOptions"} <= refs
