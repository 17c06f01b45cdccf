"""/v1/octavo/beam_search: the most probable continuations of a prompt or a conversation."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import shown
from octavo.server.answer_types import BeamSearch
from octavo.server.answers import answering, usage_of
from octavo.server.context import ServerContext
from octavo.server.conversation import under_calls
from octavo.server.errors import JSONBytes, invalid
from octavo.server.fields import PROMPT, TextFields, documented, integer, number
from octavo.server.generation import Deadline, answered, generation_of, tokenised
from octavo.server.logprobs import plain_logprobs
from octavo.server.openapi import describes
from octavo.server.routes.chat import ConversationFields, check_either, written
from octavo.server.sampling import beam_params

router = APIRouter()

_PARAMS = frozenset(one.name for one in fields(BeamSearchParams) if one.init) - {"output_kind", "detokenize"}


class BeamSearchRequest(TextFields, ConversationFields):
    """Search for the most probable continuations."""

    prompt: Any = documented(
        "a text or token ids; or give messages",
        PROMPT,
    )
    beam_width: Any = integer("hypotheses kept in each step; 4 without", minimum=1)
    num_beams: Any = integer("the same", minimum=1)
    num_return_sequences: Any = integer("outputs, best first; the width without", minimum=1)
    max_tokens: Any = integer("most tokens to generate, 16 without", minimum=1)
    length_penalty: Any = number("hypotheses are compared by log-probability / length ** length_penalty")
    early_stopping: Any = documented(
        'when to end: true, false or "never"', {"anyOf": [{"type": "boolean"}, {"const": "never"}]}
    )
    num_beam_groups: Any = integer("groups that search one after the other and differ", minimum=1)
    diversity_penalty: Any = number("subtracted for each time that earlier groups chose a token", minimum=0)
    no_repeat_ngram_size: Any = integer("no n-gram of so many tokens comes twice; 0 is off", minimum=0)
    temperature: Any = number("nothing is drawn: 0 and 1 mean the same")
    logprobs: Any = integer("log-probabilities of tokens, and of so many best ones in their place", minimum=0)


@router.post("/v1/octavo/beam_search", **describes(BeamSearchRequest, BeamSearch, "Search for texts"))
@answering(BeamSearchRequest)
async def beam_search(
    request: Request, context: ServerContext, body: BeamSearchRequest, deadline: Deadline
) -> Response:
    limits = context.settings.limits
    model = context.model_named(body.model)
    params = beam_params({name: getattr(body, name) for name in body.model_fields_set & _PARAMS}, limits)
    names: dict[str, str] = {}
    async with deadline.hold():
        check_either(body, body.prompt)
        if body.messages is not None:
            prompt, use = await written(context, body)
            params, names = under_calls(context, params, use, "structured_outputs")
        else:
            if not isinstance(body.prompt, str | list):
                raise invalid("prompt", f"must be a string or a list of token ids, not {shown(body.prompt)}")
            (prompt,) = await tokenised(context, [body.prompt], ["prompt"], body.cache_salt)
    work = generation_of(request, body, "beams", [prompt], params, names)
    outputs = await answered(context, work, deadline)
    found = [
        {
            "index": one.index,
            "text": one.text,
            "token_ids": one.token_ids,
            "score": one.score,
            "cumulative_logprob": one.cumulative_logprob,
            "logprobs": plain_logprobs(one.logprobs),
            "finish_reason": one.finish_reason,
            "stop_reason": one.stop_reason,
        }
        for one in outputs[0].outputs
    ]
    return JSONBytes(
        {
            "id": work.id,
            "object": "octavo.beam_search",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": context.llm.system_fingerprint,
            "outputs": found,
            "usage": usage_of(work.num_prompt_tokens, outputs),
        }
    )
