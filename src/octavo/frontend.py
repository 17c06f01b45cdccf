"""From what a user passes to a coordinator: prompts, parameters and limits are checked here, ahead of the engine."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from operator import index
from typing import Any, TypedDict

from octavo.build import BuiltEngine
from octavo.config import EngineConfig
from octavo.coordinators import BeamCoordinator, CompletionRequest, SamplesCoordinator, SingleCoordinator
from octavo.coordinators.generating import GeneratingCoordinator
from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import InvalidRequestError, shown
from octavo.core.outputs import RequestMetrics, RequestOutput
from octavo.core.params import SamplingParams
from octavo.core.protocols import Clock
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


class ChatPrompt(TypedDict):
    """A conversation as the chat template wrote it."""

    prompt: str
    prompt_token_ids: list[int]


# Names of ChatTemplate.render that a template's variables cannot have.
_RENDER_ARGUMENTS = frozenset(
    ["self", "messages", "add_generation_prompt", "continue_final_message", "tools", "documents"]
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine can take."""

    vocab_size: int
    max_model_len: int  # tokens of prompt and output together
    max_logprobs: int
    default_seed: int | None
    priority_allowed: bool


class Frontend:
    """Makes requests for one engine. Thread-safe."""

    def __init__(self, codec: Tokenizer, limits: Limits, system_fingerprint: str | None, clock: Clock) -> None:
        self._codec = codec
        self._templates: dict[str, ChatTemplate] = {}
        self._limits = limits
        self._system_fingerprint = system_fingerprint
        self._clock = clock
        # Not to meet an id that a user chose: those look like "request-0" often enough.
        self._id_prefix = f"request-{secrets.token_hex(4)}"
        self._ids = count()

    def make(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None = None, priority: int = 0
    ) -> GeneratingCoordinator:
        """A coordinator for one prompt. Raises InvalidRequestError naming the field at fault."""
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError("sampling_params", f"must be SamplingParams, not {type(params).__name__}")
        request = self._request(prompt, params, request_id, priority)
        metrics = RequestMetrics(arrival_time=self._clock())
        return (SingleCoordinator if params.n == 1 else SamplesCoordinator)(request, metrics)

    def make_beams(
        self, prompt: Prompt, params: BeamSearchParams, request_id: str | None = None, priority: int = 0
    ) -> BeamCoordinator:
        """A beam search over one prompt. Raises InvalidRequestError naming the field at fault."""
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequestError("params", f"must be BeamSearchParams, not {type(params).__name__}")
        request = self._request(prompt, params.sampling, request_id, priority)
        return BeamCoordinator(request, params, RequestMetrics(arrival_time=self._clock()))

    def _request(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None, priority: int
    ) -> CompletionRequest:
        """Checked against this model."""
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidRequestError("priority", f"must be an integer, not {shown(priority)}")
        if priority and not self._limits.priority_allowed:
            raise InvalidRequestError("priority", 'has an effect only with scheduling_policy="priority"')
        if request_id is not None and (not isinstance(request_id, str) or not request_id):
            raise InvalidRequestError("request_id", f"must be a string, not empty, not {request_id!r}")
        text, token_ids = self.tokens_of(prompt)
        self._check_params(params)
        return CompletionRequest(
            request_id=request_id if request_id is not None else f"{self._id_prefix}-{next(self._ids)}",
            prompt_token_ids=token_ids,
            params=params,
            seed=self._seed(params),
            max_tokens=self._max_tokens(len(token_ids), params),
            eos_token_ids=() if params.ignore_eos else self._codec.eos_token_ids,
            bad_words=self._bad_words(params),
            prompt=text,
            priority=priority,
            cache_salt=cache_salt(prompt),
            codec=self._codec,
            system_fingerprint=self._system_fingerprint,
        )

    def chat_prompt(
        self,
        messages: Messages,
        chat_template: str | None,
        options: Mapping[str, Any],
        variables: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """A conversation as a prompt, by the given template or the model's own.

        `options` are those of ChatTemplate.render, or variables of the template; `variables` only the latter.
        """
        if chat_template is not None and not isinstance(chat_template, str):
            raise InvalidRequestError("chat_template", f"must be a string, not {type(chat_template).__name__}")
        source = chat_template if chat_template is not None else self._codec.chat_template
        if source is None:
            raise InvalidRequestError("messages", "this model has no chat template; give one, or use a plain prompt")
        template = self._templates.get(source)
        if template is None:
            template = ChatTemplate(source, **self._codec.special_tokens)  # type: ignore[arg-type] # mypy: names are unknown
            if chat_template is None:
                self._templates[source] = template
        text = template.render(messages, **_merged(options, variables))
        # The template writes the special tokens itself.
        return {"prompt": text, "prompt_token_ids": self._codec.encode(text, add_special_tokens=False)}

    def name_tokens(self, output: RequestOutput) -> RequestOutput:
        """Fill in `decoded_token` of an output's log-probabilities."""
        rows = [row for completion in output.outputs for row in completion.logprobs or ()]
        rows += [row for row in output.prompt_logprobs or () if row is not None]
        for row in rows:
            for token_id, logprob in row.items():
                if logprob.decoded_token is None:
                    logprob.decoded_token = self._codec.decode([token_id], skip_special_tokens=False)
        return output

    # --- checks ---

    def tokens_of(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Text, if there is one, and token ids of a prompt. Raises InvalidRequestError."""
        text: Any = None
        if isinstance(prompt, str):
            text = prompt
        elif isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
            if unknown or not prompt:
                keys = sorted(map(str, prompt))
                allowed = '"prompt", "prompt_token_ids" and "cache_salt"'
                raise InvalidRequestError("prompt", f"allowed keys are {allowed}, not {keys}")
            text = prompt.get("prompt")
            if "prompt_token_ids" in prompt and (text is None or isinstance(text, str)):
                return text, self._checked_ids(prompt["prompt_token_ids"])
        if not isinstance(text, str):
            kind = type(prompt).__name__
            raise InvalidRequestError(
                "prompt", f'must be a string, {{"prompt": ...}} or {{"prompt_token_ids": [...]}}, not {kind}'
            )
        token_ids = self._codec.encode(text)
        if not text or not token_ids:  # some tokenizers make a BOS token of an empty text
            raise InvalidRequestError("prompt", "is empty")
        self._check_length(len(token_ids))
        return text, token_ids

    def _checked_ids(self, value: Any) -> list[int]:
        if hasattr(value, "tolist"):
            value = value.tolist()  # a NumPy array or a tensor
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise InvalidRequestError("prompt_token_ids", f"must be a list of token ids, not {type(value).__name__}")
        if not value:
            raise InvalidRequestError("prompt_token_ids", "is empty")
        self._check_length(len(value))
        self._check_vocabulary("prompt_token_ids", value)
        return [index(token_id) for token_id in value]

    def _check_length(self, num_tokens: int) -> None:
        most = self._limits.max_model_len
        if num_tokens >= most:
            raise InvalidRequestError(
                "prompt",
                f"has {num_tokens} tokens; with max_model_len={most} at most {most - 1} leave room for an answer",
            )

    def _check_vocabulary(self, field: str, token_ids: Sequence[Any]) -> None:
        vocab_size = self._limits.vocab_size
        for token_id in token_ids:
            is_integer = hasattr(token_id, "__index__") and not isinstance(token_id, bool)
            if not is_integer or not 0 <= index(token_id) < vocab_size:
                allowed = f"token ids must be integers from 0 to {vocab_size - 1}, this model's vocabulary"
                raise InvalidRequestError(field, f"{allowed}, not {shown(token_id)}")

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("stop", "bad_words"):
            for text in getattr(params, name):
                _check_unicode(name, text)
        self._check_vocabulary("stop_token_ids", tuple(params.stop_token_ids or ()))
        self._check_vocabulary("allowed_token_ids", tuple(params.allowed_token_ids or ()))
        self._check_vocabulary("logit_bias", tuple(params.logit_bias or ()))
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and asked > self._limits.max_logprobs:
                raise InvalidRequestError(
                    name, f"must be at most max_logprobs={self._limits.max_logprobs}, not {asked}"
                )

    def _max_tokens(self, prompt_tokens: int, params: SamplingParams) -> int:
        room = self._limits.max_model_len - prompt_tokens
        if params.min_tokens > room:
            raise InvalidRequestError(
                "min_tokens",
                f"{params.min_tokens} do not fit: the prompt has {prompt_tokens} tokens and max_model_len is "
                f"{self._limits.max_model_len}, which leaves {room}",
            )
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def _seed(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        return self._limits.default_seed if self._limits.default_seed is not None else secrets.randbits(64)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Token ids of each bad word, as it is spelt at the start of a text and after a space."""
        spellings: dict[tuple[int, ...], None] = {}
        for word in params.bad_words or ():
            for text in (word, " " + word.lstrip()):
                token_ids = tuple(self._codec.encode(text, add_special_tokens=False))
                if token_ids:
                    spellings[token_ids] = None
        return tuple(spellings)


def _merged(options: Mapping[str, Any], variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of ChatTemplate.render; it checks the rest of the names itself."""
    if not isinstance(variables, Mapping | None):
        raise InvalidRequestError("chat_template_kwargs", f"must be a mapping, not {type(variables).__name__}")
    for key in variables or ():
        if not isinstance(key, str) or key in options or key in _RENDER_ARGUMENTS:
            raise InvalidRequestError(f"chat_template_kwargs.{key}", "this name is reserved")
    return {**options, **(variables or {})}


def cache_salt(prompt: Prompt) -> str | None:
    """A prompt's cache_salt: cached KV is shared among requests with the same one. Raises InvalidRequestError."""
    salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise InvalidRequestError("cache_salt", f"must be a string, not empty, not {shown(salt)}")
    return salt


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InvalidRequestError(field, f"lone surrogate U+{code:04X} at character {error.start}") from None


def make_frontend(config: EngineConfig, built: BuiltEngine) -> Frontend:
    limits = Limits(
        vocab_size=built.model_config.vocab_size,
        max_model_len=built.max_model_len,
        max_logprobs=config.max_logprobs,
        default_seed=config.seed,
        priority_allowed=config.scheduling_policy == "priority",
    )
    return Frontend(built.codec, limits, built.system_fingerprint, built.engine.clock)
