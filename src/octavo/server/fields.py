"""Fields of requests: what they are called, and what the OpenAPI page says of them.

Ranges and kinds of values are checked where they are used, by `SamplingParams` and its like, in the same words as for
users of the library. Here an unknown name is refused, and null is as if the field were not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from octavo.core.errors import shown
from octavo.core.params import SamplingParams
from octavo.server.errors import ApiError, instead

# Fields that clients of OpenAI's or vLLM's know, and why they are refused.
NOT_SUPPORTED = {
    "best_of": "is not supported: ask for n, and choose",
    "suffix": "is not supported: these models continue texts, and fill no gaps",
    "functions": "is not supported: give tools",
    "function_call": "is not supported: give tools",
    "chat_template": "is not accepted from requests: the model's own is used",
    "store": "is not supported: nothing is kept",
    "service_tier": "is not supported",
    "modalities": "is not supported: there is text alone",
    "audio": "is not supported",
    "prediction": "is not supported",
    "web_search_options": "is not supported",
    "reasoning_effort": "is not supported: templates that know of it take it in chat_template_kwargs",
    "verbosity": "is not supported",
    "guided_json": "is called structured_outputs.json",
    "guided_regex": "is called structured_outputs.regex",
    "guided_choice": "is called structured_outputs.choice",
    "guided_grammar": "is called structured_outputs.grammar",
    "truncate_prompt_tokens": "is not supported: a prompt that is too long is refused",
    "echo": "is not supported here",
}

# Schemas of fields on several routes.
OBJECTS = {"type": "array", "items": {"type": "object"}}
INTEGERS = {"type": "array", "items": {"type": "integer"}}
PROMPT = {"anyOf": [{"type": "string"}, INTEGERS]}

_SAMPLING_FIELDS = frozenset(one.name for one in fields(SamplingParams))


def documented(description: str, schema: dict[str, Any], default: Any = None) -> Any:
    """A field whose value is checked where it is used."""
    return Field(default=default, description=description, json_schema_extra=schema)


def number(description: str, **limits: Any) -> Any:
    return documented(description, {"type": "number", **limits})


def integer(description: str, **limits: Any) -> Any:
    return documented(description, {"type": "integer", **limits})


def flag(description: str) -> Any:
    return documented(description, {"type": "boolean"})


def text(description: str) -> Any:
    return documented(description, {"type": "string"})


def token_ids(description: str, default: Any = None) -> Any:
    return documented(description, INTEGERS, default)


class Body(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)
    null_is_a_value: ClassVar[frozenset[str]] = frozenset()  # names of fields of which null means something
    # Fields that are taken where they ask for nothing, with these values, and else refused, with a reason.
    neutral: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="end with a chunk that tells the usage of tokens")


class RequestFields(Body):
    """What requests to the engine have in common."""

    model: Any = text("name of the model, as /v1/models lists it; the one that is served without")
    priority: Any = documented("less is served first; needs --scheduling-policy priority", {"type": "integer"}, 0)
    cache_salt: Any = text("KV is shared with requests of the same salt alone")
    request_id: Any = text("the answer's id will hold it; not that of another request that is under way")


class OutputParams(Body):
    """How text is made, drawn or searched for, but for the strings that end it."""

    presence_penalty: Any = number("subtracted once for tokens that were generated", minimum=-2, maximum=2)
    frequency_penalty: Any = number("subtracted for each time that a token was generated", minimum=-2, maximum=2)
    repetition_penalty: Any = number("divides logits of tokens in prompt and output", minimum=0.001, maximum=1000)
    stop_token_ids: Any = token_ids("further tokens that end an output")
    include_stop_str_in_output: Any = flag("leave the stop string in the text")
    ignore_eos: Any = flag("go on past the model's end tokens")
    min_tokens: Any = integer("fewest tokens to generate", minimum=0)
    logit_bias: Any = documented(
        "token id -> added to its logit", {"type": "object", "additionalProperties": {"type": "number"}}
    )
    allowed_token_ids: Any = token_ids("no other tokens are generated")
    bad_words: Any = documented(
        "strings that are not completed in the output", {"type": "array", "items": {"type": "string"}}
    )
    skip_special_tokens: Any = flag("leave special tokens out of the text; the default")
    spaces_between_special_tokens: Any = flag("without effect on tokenizers that are supported; both give the same")
    repetition_detection: Any = documented(
        "end an output that repeats itself: max_pattern_size, min_pattern_size, min_count", {"type": "object"}
    )
    structured_outputs: Any = documented(
        "what outputs must look like: one of json, regex, choice, grammar, json_object", {"type": "object"}
    )


class TextParams(OutputParams):
    """How text is made, drawn or searched for."""

    stop: Any = documented(
        "strings that end an output", {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    )


class Draws(Body):
    """How tokens are drawn."""

    temperature: Any = number("0 takes the most probable token always", minimum=0)
    top_p: Any = number("the most probable tokens that reach this probability together are kept", maximum=1)
    top_k: Any = integer("so many of the most probable tokens are kept; 0 and -1: all", minimum=-1)
    min_p: Any = number("tokens at least this probable relative to the most probable are kept", minimum=0, maximum=1)
    seed: Any = integer("of all draws; the same request with the same seed has the same answer", minimum=0)


class DrawParams(Draws, TextParams):
    """How text is drawn."""


class EngineFields(RequestFields):
    """What requests for text ask of the engine."""

    skip_reading_prefix_cache: Any = flag("compute the whole prompt, whatever of it is cached")
    speculative_decoding: Any = flag(
        "false: guess no tokens, where the server does so; answers are the same, and a beam search wants it so"
    )


class TextFields(TextParams, EngineFields):
    """What requests for text have in common, drawn or searched for."""


class SamplingFields(DrawParams, TextFields):
    """What requests for text have in common on OpenAI's older routes."""

    stream: bool | None = Field(None, description="answer with server-sent events, as tokens come")
    stream_options: StreamOptions | None = Field(None, description="of a stream")
    n: Any = integer("outputs of each prompt; with use_beam_search the width of the search as well", minimum=1)
    prompt_logprobs: Any = integer("log-probabilities of the prompt's tokens, and of so many best ones", minimum=0)
    response_format: Any = documented(
        'OpenAI\'s form of it: {"type": "text"}, "json_object", or "json_schema" with a json_schema', {"type": "object"}
    )
    use_beam_search: bool | None = Field(None, description="search for the n most probable outputs")
    length_penalty: Any = number("of a beam search: above 0 favours long outputs")
    return_token_ids: bool | None = Field(None, description="tell token ids of prompt and outputs as well")
    user: str | None = Field(None, description="without effect, for compatibility")
    metadata: dict[str, Any] | None = Field(None, description="without effect, for compatibility")


Parsed = TypeVar("Parsed", bound=Body)


def parsed(kind: type[Parsed], given: dict[str, Any]) -> Parsed:
    """A body as its fields. Raises ApiError (400) naming the first that is at fault."""
    for name, why in NOT_SUPPORTED.items():
        if given.get(name) is not None and name not in kind.model_fields and name not in kind.neutral:
            raise ApiError(400, f"{name}: {why}", name)
    for name, (values, why) in kind.neutral.items():
        value = given.get(name)
        if value is not None and not is_one_of(value, values):
            raise ApiError(400, f"{name}: {why}", name)
    try:
        told = {
            name: value
            for name, value in given.items()
            if name not in kind.neutral and (value is not None or name in kind.null_is_a_value)
        }
        return kind.model_validate(told)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise _as_api_error(first["loc"], first["type"], first["msg"], first["input"], kind) from None


def is_one_of(value: object, values: Iterable[object]) -> bool:
    """Of JSON, where true is not 1."""
    return any(type(value) is type(one) and value == one for one in values)


def _as_api_error(loc: tuple[int | str, ...], kind: str, message: str, value: object, body: type[Body]) -> ApiError:
    name = path_of(loc)
    if kind == "extra_forbidden":
        problem = "is not known here" if name.isprintable() and len(name) <= 80 else "a field is not known here"
        if len(loc) == 1:
            problem += f"; {instead(name, body.model_fields)}"
        name = name if len(name) <= 80 and name.isprintable() else shown(name)
    elif kind == "missing":
        problem = "is missing"
    else:
        problem = f"{message[:1].lower()}{message[1:]}, not {shown(value)}"
    return ApiError(400, f"{name}: {problem}", name)


def path_of(loc: tuple[int | str, ...]) -> str:
    """``("messages", 0, "role")`` -> ``messages[0].role``"""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def sampling_fields(body: Body) -> dict[str, Any]:
    """Those of its fields that are SamplingParams' and were given."""
    return {name: getattr(body, name) for name in body.model_fields_set if name in _SAMPLING_FIELDS}
