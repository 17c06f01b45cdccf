"""LangChain's classes for OpenAI: python langchain_client.py URL, of a server with the API key "sk-key" and the model
"served"."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

import openai
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

WHERE: dict[str, Any] = {"base_url": sys.argv[1] + "/v1", "api_key": "sk-key", "model": "served", "max_retries": 0}
MESSAGES = [SystemMessage("Be brief."), HumanMessage("Hello.")]
QUESTION = "What is the weather in Paris?"


class Person(BaseModel):
    """A person."""

    name: Literal["Ann", "Bob"]
    adult: bool


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Weather in a city."""
    return f"sunny in {city}"


@tool
def get_time(city: Literal["Paris", "Rome"]) -> str:
    """Time in a city."""
    return f"noon in {city}"


TOOLS: dict[str, Any] = {"get_weather": get_weather, "get_time": get_time}


def chat(**more: Any) -> ChatOpenAI:
    return ChatOpenAI(**WHERE, temperature=0.8, seed=7, **more)


def joined(chunks: Any) -> Any:
    """What the pieces of a stream add up to."""
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole


def messages() -> None:
    model = chat(max_tokens=12)
    answer = model.invoke(MESSAGES)
    assert answer.content and answer.usage_metadata["output_tokens"] > 0
    assert joined(model.stream(MESSAGES)).content == answer.content
    assert joined(model.stream(MESSAGES, stream_usage=True)).usage_metadata == {
        **answer.usage_metadata,
        "input_token_details": joined(model.stream(MESSAGES, stream_usage=True)).usage_metadata["input_token_details"],
    }
    found = model.batch([MESSAGES, "Hi!", MESSAGES])
    assert found[0].content == found[2].content == answer.content

    async def asynchronous() -> None:
        assert (await model.ainvoke(MESSAGES)).content == answer.content
        pieces = [piece.content async for piece in model.astream(MESSAGES)]
        assert "".join(pieces) == answer.content and len(pieces) > 2

    asyncio.run(asynchronous())
    told = chat(max_tokens=3).bind(logprobs=True, top_logprobs=2).invoke("x").response_metadata["logprobs"]
    assert len(told["content"]) == 3


def tools() -> None:
    for choice in ("any", "get_weather", "auto"):
        for strict in (True, None):
            bound = chat(max_tokens=200).bind_tools([get_weather, get_time], tool_choice=choice, strict=strict)
            answer = bound.invoke(QUESTION)
            calls = [(call["name"], call["args"]) for call in answer.tool_calls]
            streamed = joined(bound.stream(QUESTION))
            assert [(call["name"], call["args"]) for call in streamed.tool_calls] == calls
            assert choice == "auto" or calls[0] == ("get_weather", {"city": "Paris"})
            results: list[Any] = [TOOLS[call["name"]].invoke(call) for call in answer.tool_calls]
            assert all(isinstance(one, ToolMessage) for one in results)
            assert bound.bind(tool_choice="none").invoke([HumanMessage(QUESTION), answer, *results]).content is not None


def structured() -> None:
    question = "Tell of Ann, who is an adult, in JSON with name and adult."
    for method in ("json_schema", "function_calling", "json_mode"):
        model = chat(max_tokens=300).with_structured_output(Person, method=method, include_raw=True)
        found = model.invoke(question)
        assert found["parsed"] == Person(name="Ann", adult=True), found
    *_, last = chat(max_tokens=300).with_structured_output(Person, method="json_schema").stream(question)
    assert last == Person(name="Ann", adult=True)


def texts() -> None:
    model = OpenAI(**WHERE, temperature=0, max_tokens=5)
    answer = model.invoke("the fox")
    assert answer and "".join(model.stream("the fox")) == answer
    assert model.batch(["the fox", "a dog"])[0] == answer


def embeddings() -> None:
    # It would else count tokens by tables that it fetches from OpenAI's.
    model = OpenAIEmbeddings(**WHERE, check_embedding_ctx_length=False)
    found = model.embed_documents(["the fox", "a dog"])
    assert found[0] == model.embed_query("the fox") and found[0] != found[1]
    short = OpenAIEmbeddings(**WHERE, check_embedding_ctx_length=False, dimensions=8)
    assert len(short.embed_query("the fox")) == 8


def errors() -> None:
    def refused(kind: type[Exception], model: ChatOpenAI) -> Any:
        try:
            model.invoke("x")
        except kind as error:
            return error
        raise AssertionError("it was answered")

    assert refused(openai.BadRequestError, chat(max_tokens=0)).param == "max_completion_tokens"
    refused(openai.NotFoundError, ChatOpenAI(**{**WHERE, "model": "other"}))
    refused(openai.AuthenticationError, ChatOpenAI(**{**WHERE, "api_key": "wrong"}))


for part in (messages, tools, structured, texts, embeddings, errors):
    part()
    print(part.__name__, flush=True)
