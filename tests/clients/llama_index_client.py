"""LlamaIndex's classes for servers like OpenAI's: python llama_index_client.py URL, of a server with the API key
"sk-key" and the model "served"."""

# No annotations from __future__: LlamaIndex makes schemas of them.

import asyncio
import sys
from typing import Any, Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

WHERE: dict[str, Any] = {"api_base": sys.argv[1] + "/v1", "api_key": "sk-key", "max_retries": 0}
MESSAGES = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Hello.")]
QUESTION = "What is the weather in Paris?"


class Person(BaseModel):
    """A person."""

    name: Literal["Ann", "Bob"]
    adult: bool


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Weather in a city."""
    return f"sunny in {city}"


def model(max_tokens: int, *, chats: bool = True) -> OpenAILike:
    return OpenAILike(
        **WHERE,
        model="served",
        temperature=0.8,
        additional_kwargs={"seed": 7},
        max_tokens=max_tokens,
        context_window=4096,
        is_chat_model=chats,
        is_function_calling_model=chats,
    )


def messages() -> None:
    llm = model(12)
    answer = llm.chat(MESSAGES).message.content
    assert answer and "".join(piece.delta or "" for piece in llm.stream_chat(MESSAGES)) == answer
    assert asyncio.run(llm.achat(MESSAGES)).message.content == answer


def tools() -> None:
    tool, llm = FunctionTool.from_defaults(get_weather), model(200)
    answer = llm.chat_with_tools([tool], QUESTION, tool_required=True)
    (call,) = llm.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris"})
    assert str(llm.predict_and_call([tool], QUESTION, tool_required=True)) == "sunny in Paris"


def structured() -> None:
    found = model(200).as_structured_llm(Person).complete("Tell of Ann, who is an adult.").raw
    assert found == Person(name="Ann", adult=True)


def texts() -> None:
    llm = model(5, chats=False)
    answer = llm.complete("the fox").text
    assert answer and "".join(piece.delta or "" for piece in llm.stream_complete("the fox")) == answer


def embeddings() -> None:
    llm = OpenAILikeEmbedding(**WHERE, model_name="served")
    found = llm.get_text_embedding_batch(["the fox", "a dog"])
    assert found[0] == llm.get_query_embedding("the fox") and found[0] != found[1]


for part in (messages, tools, structured, texts, embeddings):
    part()
    print(part.__name__, flush=True)
