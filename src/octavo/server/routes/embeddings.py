"""/v1/embeddings: texts as vectors, pooled of the model's hidden states after its final norm."""

from __future__ import annotations

import array
import asyncio
import base64
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from octavo.core.errors import shown
from octavo.core.pooling import EmbeddingRequestOutput, PoolingParams
from octavo.server.answer_types import Embeddings
from octavo.server.answers import answering, usage
from octavo.server.context import ServerContext
from octavo.server.errors import JSONBytes, invalid
from octavo.server.fields import RequestFields, documented, flag, integer
from octavo.server.generation import Deadline, answer_id, engine_ids, prompts_of, tokenised
from octavo.server.openapi import describes

router = APIRouter()


class EmbeddingRequest(RequestFields):
    """Turn texts into vectors."""

    input: Any = documented(
        "a text, token ids, or a list of these",
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {}}]},
        ...,
    )
    encoding_format: Any = documented("float (default) or base64", {"type": "string", "enum": ["float", "base64"]})
    dimensions: Any = integer("keep so many of the first numbers", minimum=1)
    pooling: Any = documented("mean (default) or last", {"type": "string", "enum": ["mean", "last"]})
    normalize: Any = flag("to length 1; on without")
    user: str | None = Field(None, description="without effect, for compatibility")


@router.post("/v1/embeddings", **describes(EmbeddingRequest, Embeddings, "Turn texts into vectors"))
@answering(EmbeddingRequest)
async def embeddings(request: Request, context: ServerContext, body: EmbeddingRequest, deadline: Deadline) -> Response:
    limits = context.settings.limits
    model = context.model_named(body.model)
    if body.encoding_format not in (None, "float", "base64"):
        raise invalid("encoding_format", f"must be 'float' or 'base64', not {shown(body.encoding_format)}")
    given = {name: getattr(body, name) for name in ("dimensions", "pooling", "normalize")}
    params = PoolingParams(**{name: value for name, value in given.items() if value is not None})
    identity, chosen = answer_id(request, body.request_id, "embd", limits.max_request_id)
    prompts, names = prompts_of(body.input, limits.max_prompts, "input")
    async with deadline.hold():
        tokens = await tokenised(context, prompts, names, body.cache_salt)
        ids = engine_ids(identity, chosen, len(tokens))

        async def one(number: int) -> EmbeddingRequestOutput:
            prompt: dict[str, Any] = {"prompt_token_ids": tokens[number].token_ids}
            if body.cache_salt is not None:
                prompt["cache_salt"] = body.cache_salt
            return await context.llm.embed(prompt, params, ids[number], priority=body.priority)

        total = sum(len(one_prompt.token_ids) for one_prompt in tokens)
        with context.admission.admit(len(tokens), total):
            tasks = [asyncio.ensure_future(one(number)) for number in range(len(tokens))]
            try:
                outputs = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
    cached = sum(output.metrics.num_cached_tokens for output in outputs)
    data = [
        {"object": "embedding", "index": index, "embedding": _written(output.outputs.embedding, body.encoding_format)}
        for index, output in enumerate(outputs)
    ]
    found = usage(total, 0, cached)
    return JSONBytes({"id": identity, "object": "list", "data": data, "model": model, "usage": found})


def _written(embedding: list[float], encoding: object) -> list[float] | str:
    """base64 of float32, the lowest byte first, as OpenAI's clients ask for by themselves."""
    if encoding != "base64":
        return embedding
    values = array.array("f", embedding)
    return base64.b64encode(values.tobytes()).decode()
