"""/tokenize, /detokenize and /tokenizer_info, in vLLM's forms."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from octavo.core.errors import shown
from octavo.server.answer_types import Text, TokenizerInfo, Tokens
from octavo.server.answers import body_of, route
from octavo.server.context import ServerContext
from octavo.server.errors import JSONBytes, invalid
from octavo.server.fields import Body, text, token_ids
from octavo.server.generation import Deadline
from octavo.server.openapi import describes
from octavo.server.routes.chat import ConversationFields, check_either, written
from octavo.server.streams import unless_gone

router = APIRouter()
info_router = APIRouter()  # which is offered only where somebody wants it

_MOST = 16  # contexts of the model that a text may have, about, in tokens


class TokenizeRequest(ConversationFields):
    """A text, or a conversation as the chat template writes it."""

    model: Any = text("name of the model")
    prompt: Any = text("the text; or give messages")
    add_special_tokens: bool | None = Field(None, description="of a text: such as BOS; on without")
    return_token_strs: bool | None = Field(None, description="spell each token as well")


class DetokenizeRequest(Body):
    """Tokens to become text."""

    model: Any = text("name of the model")
    tokens: Any = token_ids("token ids", ...)


@router.post("/tokenize", **describes(TokenizeRequest, Tokens, "Turn text into tokens"))
@route
async def tokenize(request: Request, context: ServerContext) -> Response:
    deadline = Deadline(request, context)
    body = await body_of(request, context, TokenizeRequest)
    context.model_named(body.model)
    check_either(body, body.prompt)
    async with deadline.hold():
        ids = await unless_gone(request, _ids_of(context, body))
    spelling = context.llm.tokenizer.spelling
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": context.llm.max_model_len, "tokens": ids}
    answer["token_strs"] = [spelling([one]) for one in ids] if body.return_token_strs else None
    return JSONBytes(answer)


async def _ids_of(context: ServerContext, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        if body.add_special_tokens:
            raise invalid("add_special_tokens", "is not for messages: the chat template writes these itself")
        prompt, _ = await written(context, body)
        return prompt.token_ids
    if not isinstance(body.prompt, str):
        raise invalid("prompt", f"must be a string, not {shown(body.prompt)}")
    return await asyncio.to_thread(_encode, context, body.prompt, body.add_special_tokens is not False)


def _encode(context: ServerContext, prompt: str, specials: bool) -> list[int]:
    llm = context.llm
    # Time and memory are those of so many tokens, however long the text.
    llm._frontend.tokens.check_beginning("prompt", prompt, _MOST * llm.max_model_len)
    return llm.tokenizer.encode(prompt, add_special_tokens=specials)


@router.post("/detokenize", **describes(DetokenizeRequest, Text, "Turn tokens into text"))
@route
async def detokenize(request: Request, context: ServerContext) -> Response:
    body = await body_of(request, context, DetokenizeRequest)
    context.model_named(body.model)
    prompt = await unless_gone(request, asyncio.to_thread(_decode, context, body.tokens))
    return JSONBytes({"prompt": prompt})


def _decode(context: ServerContext, tokens: object) -> str:
    tokenizer = context.llm.tokenizer
    if not isinstance(tokens, list):
        raise invalid("tokens", f"must be a list of token ids, not {shown(tokens)}")
    most = tokenizer.vocab_size
    for number, one in enumerate(tokens):
        if type(one) is not int or not 0 <= one < most:
            raise invalid(f"tokens[{number}]", f"must be an integer from 0 to {most - 1}, not {shown(one)}")
    return tokenizer.decode(tokens, skip_special_tokens=False)


@info_router.get("/tokenizer_info", **describes(None, TokenizerInfo, "Tell of the tokenizer"))
@route
async def tokenizer_info(request: Request, context: ServerContext) -> Response:
    del request
    tokenizer = context.llm.tokenizer
    return JSONBytes(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": None,
            "eos_token": None,
            **tokenizer.special_tokens,
            "chat_template": tokenizer.chat_template,
            "model_max_length": context.llm.max_model_len,
        }
    )
