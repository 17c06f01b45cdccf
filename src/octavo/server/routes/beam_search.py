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
from octavo.server.answers import body_of, route, usage_of
from octavo.server.context import ServerContext
from octavo.server.errors import JSONBytes, invalid
from octavo.server.fields import documented, flag, integer, number, text, token_ids
from octavo.server.generation import Deadline, Generation, answer_id, answered, engine_ids, tokenised
from octavo.server.logprobs import plain_logprobs
from octavo.server.openapi import describes
from octavo.server.routes.chat import ConversationFields, written
from octavo.server.sampling import beam_params
from octavo.server.streams import unless_gone

router = APIRouter()

_PARAMS = frozenset(one.name for one in fields(BeamSearchParams) if one.init) - {"output_kind", "detokenize"}


class BeamSearchRequest(ConversationFields):
    """Search for the most probable continuations."""

    model: Any = text("name of the model")
    prompt: Any = documented(
        "a text or token ids; or give messages",
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
    )
    beam_width: Any = integer("hypotheses kept in each step; 4 without", minimum=1)
    num_beams: Any = integer("the same", minimum=1)
    num_return_sequences: Any = integer("outputs, best first; the width without", minimum=1)
    max_tokens: Any = integer("most tokens to generate, 16 without", minimum=1)
    min_tokens: Any = integer("fewest tokens to generate", minimum=0)
    ignore_eos: Any = flag("go on past the model's end tokens")
    length_penalty: Any = number("hypotheses are compared by log-probability / length ** length_penalty")
    early_stopping: Any = documented(
        'when to end: true, false or "never"', {"anyOf": [{"type": "boolean"}, {"const": "never"}]}
    )
    num_beam_groups: Any = integer("groups that search one after the other and differ", minimum=1)
    diversity_penalty: Any = number("subtracted for each time that earlier groups chose a token", minimum=0)
    no_repeat_ngram_size: Any = integer("no n-gram of so many tokens comes twice; 0 is off", minimum=0)
    temperature: Any = number("nothing is drawn: 0 and 1 mean the same")
    presence_penalty: Any = number("subtracted once for tokens that were generated", minimum=-2, maximum=2)
    frequency_penalty: Any = number("subtracted for each time that a token was generated", minimum=-2, maximum=2)
    repetition_penalty: Any = number("divides logits of tokens in prompt and output", minimum=0.001, maximum=1000)
    stop: Any = documented(
        "strings that end an output", {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    )
    stop_token_ids: Any = token_ids("further tokens that end an output")
    include_stop_str_in_output: Any = flag("leave the stop string in the text")
    logprobs: Any = integer("log-probabilities of tokens, and of so many best ones in their place", minimum=0)
    skip_special_tokens: Any = flag("leave special tokens out of the text; the default")
    spaces_between_special_tokens: Any = flag("without effect on tokenizers that are supported")
    logit_bias: Any = documented(
        "token id -> added to its logit", {"type": "object", "additionalProperties": {"type": "number"}}
    )
    allowed_token_ids: Any = token_ids("no other tokens are generated")
    bad_words: Any = documented("strings that are not completed", {"type": "array", "items": {"type": "string"}})
    skip_reading_prefix_cache: Any = flag("compute the whole prompt, whatever of it is cached")
    repetition_detection: Any = documented("a hypothesis that repeats itself is finished", {"type": "object"})
    structured_outputs: Any = documented("what each output must look like", {"type": "object"})
    priority: Any = integer("less is served first; needs --scheduling-policy priority")
    cache_salt: Any = text("KV is shared with requests of the same salt alone")
    request_id: Any = text("the answer's id will hold it")


@router.post("/v1/octavo/beam_search", **describes(BeamSearchRequest, "Search for texts", streams=False))
@route
async def beam_search(request: Request, context: ServerContext) -> Response:
    deadline = Deadline(request, context)
    body = await body_of(request, context, BeamSearchRequest)
    return await unless_gone(request, _answer(request, context, body, deadline))


async def _answer(request: Request, context: ServerContext, body: BeamSearchRequest, deadline: Deadline) -> Response:
    limits = context.settings.limits
    model = context.model_named(body.model)
    params = beam_params({name: getattr(body, name) for name in body.model_fields_set & _PARAMS}, limits)
    identity, chosen = answer_id(request, body.request_id, "beams", limits.max_request_id)
    async with deadline.hold():
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt", "give either prompt or messages")
        if body.messages is not None:
            prompt = (await written(context, body))[0]
        else:
            for name in body.model_fields_set & set(ConversationFields.model_fields):
                raise invalid(name, "has no effect without messages")
            if not isinstance(body.prompt, str | list):
                raise invalid("prompt", f"must be a string or a list of token ids, not {shown(body.prompt)}")
            (prompt,) = await tokenised(context, [body.prompt], ["prompt"], body.cache_salt)
    work = Generation(
        identity,
        engine_ids(identity, chosen, 1),
        (prompt,),
        params,
        0 if body.priority is None else body.priority,
        body.cache_salt,
    )
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
            "id": identity,
            "object": "octavo.beam_search",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": context.llm.system_fingerprint,
            "outputs": found,
            "usage": usage_of(work.num_prompt_tokens, outputs),
        }
    )
