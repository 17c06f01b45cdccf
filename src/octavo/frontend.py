"""From what a user passes to a request: prompts, parameters and limits are checked here, ahead of the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, TypedDict

from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import InvalidRequestError, shown
from octavo.core.outputs import CompletionOutput, Logprob, OutputSoFar, RequestOutput
from octavo.core.params import MAX_N, MAX_SEED, OutputKind, SamplingParams, integer
from octavo.core.protocols import Clock
from octavo.core.request import RequestSpec, SessionSpec
from octavo.core.values import (
    MAX_CHARACTERS,
    check_unicode,
    exact_bool,
    exact_dict,
    exact_fields,
    exact_int,
    exact_list,
    exact_record,
    exact_str,
    is_a,
)
from octavo.text.model_tokens import ModelTokens
from octavo.text.named_templates import NamedTemplates
from octavo.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from octavo.core.pooling import PoolingParams, PoolingSpec

Prompt = str | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


class ChatPrompt(TypedDict):
    """A conversation as the chat template wrote it."""

    prompt: str
    prompt_token_ids: list[int]


_MAX_NAME = 4096  # characters of an id or a salt
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
    max_num_seqs: int  # sequences of one request in a step
    num_blocks: int  # of KV
    block_size: int  # tokens
    default_seed: int | None
    priority_allowed: bool
    guesses_tokens: bool = False  # speculative decoding


@dataclass(frozen=True, slots=True)
class Request:
    """What goes to the engine, and the text of its prompt, which does not."""

    spec: RequestSpec
    prompt: str | None  # None: token ids alone were given

    @property
    def output_kind(self) -> OutputKind:
        params = self.spec.params if self.spec.beams is None else self.spec.beams
        return OutputKind(params.output_kind)


class Frontend:
    """Makes requests for one engine. Thread-safe."""

    def __init__(
        self, codec: Tokenizer, tokens: ModelTokens, limits: Limits, system_fingerprint: str | None, clock: Clock
    ) -> None:
        self.codec = codec
        # A template may leave much out of what it writes, but no conversation is a hundred times the context.
        most = min(MAX_CHARACTERS, max(1 << 20, 64 * limits.max_model_len))
        self.templates = NamedTemplates(codec.chat_templates, codec.special_tokens, most)
        self.limits = limits
        self.system_fingerprint = system_fingerprint
        self.clock = clock
        self.tokens = tokens
        # Not to meet an id that a user chose: those look like "request-0" often enough.
        self._id_prefix = os.urandom(4).hex()
        self._ids = count()

    def make(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        priority: int = 0,
        name: str = "prompt",
    ) -> Request:
        """A request for one prompt; errors call it `name`. Raises InvalidRequestError naming the field."""
        params = exact_record("sampling_params", params, SamplingParams)
        return self._request(prompt, params, None, request_id, priority, name)

    def make_beams(
        self,
        prompt: Prompt,
        params: BeamSearchParams,
        request_id: str | None = None,
        priority: int = 0,
        name: str = "prompt",
    ) -> Request:
        """A beam search over one prompt; see `make`."""
        from octavo.coordinators.beams import least_blocks

        params = exact_record("params", params, BeamSearchParams)
        if self.limits.guesses_tokens and params.speculative_decoding:
            raise InvalidRequestError(
                "speculative_decoding",
                "a beam search wants the best tokens of each row, not one that a guess could equal, so guesses save it "
                "nothing: give false, or an engine without speculative_config",
            )
        if params.width > self.limits.max_num_seqs:
            raise InvalidRequestError(
                "beam_width",
                f"all beams run in one step, and max_num_seqs={self.limits.max_num_seqs} is less than {params.width}",
            )
        request = self._request(prompt, params.sampling, params, request_id, priority, name)
        spec, blocks, size = request.spec, self.limits.num_blocks, self.limits.block_size
        if (least := least_blocks(spec, size)) > blocks:
            raise InvalidRequestError(
                "beam_width",
                f"{params.width} beams of {len(spec.prompt_token_ids)} + {spec.max_tokens} tokens take at least "
                f"{least} KV blocks of {size} tokens, and there are {blocks}: give fewer beams, a smaller max_tokens "
                "or more kv_cache_memory_bytes",
            )
        return request

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        beams: BeamSearchParams | None,
        request_id: str | None,
        priority: int,
        name: str,
    ) -> Request:
        """Checked against this model."""
        priority = self.priority(priority)
        request_id = self.request_id(request_id)
        given = _read(prompt, name)
        text, token_ids = self._tokens_of(given, name)
        spec = RequestSpec(
            request_id=request_id,
            prompt_token_ids=tuple(token_ids),
            params=params,
            beams=beams,
            seed=self.seed(params.seed),
            max_tokens=self._max_tokens(len(token_ids), params, name),
            priority=priority,
            cache_salt=given.cache_salt,
            arrival_time=self.clock(),
            **self.checked_fields(params),
        )
        return Request(spec, text)

    def checked_fields(self, params: SamplingParams) -> dict[str, Any]:
        """Of a RequestSpec: what follows from parameters that fit this model, whatever the prompt."""
        self._check_params(params)
        if params.grammar is not None:
            self.tokens.grammars.check(params.grammar)
        return {
            "eos_token_ids": () if params.ignore_eos else self.tokens.eos_token_ids,
            "bad_words": self.tokens.bad_words(params.bad_words or ()),
        }

    def make_pooling(
        self,
        prompt: Prompt,
        params: PoolingParams,
        request_id: str | None = None,
        priority: int = 0,
        name: str = "prompt",
    ) -> PoolingSpec:
        """A request for the embedding of one prompt; see `make`. All of the context may be prompt."""
        from octavo.core.pooling import PoolingParams, PoolingSpec

        params = exact_record("pooling_params", params, PoolingParams)
        priority = self.priority(priority)
        request_id = self.request_id(request_id)
        given = _read(prompt, name)
        _, token_ids = self._tokens_of(given, name, room=0)
        return PoolingSpec(request_id, tuple(token_ids), params, priority, given.cache_salt, self.clock())

    # --- sessions ---

    def make_session(self, seed: int | None, priority: int, salt: str | None) -> SessionSpec:
        """Raises InvalidRequestError naming the field at fault."""
        return SessionSpec(
            request_id=self.new_id("session"),
            seed=self.seed(None if seed is None else integer("seed", seed, 0, MAX_SEED)),
            priority=self.priority(priority),
            cache_salt=checked_salt(salt),
            arrival_time=self.clock(),
        )

    def tokens_after(self, prompt: Prompt, before: Sequence[int], field: str = "prompt") -> list[int]:
        """Token ids to append to those that are there. BOS and the like come only at the very start."""
        given = _read(prompt, field)
        if given.cache_salt is not None:
            raise InvalidRequestError("cache_salt", "belongs to the whole session: LLM.session(cache_salt=...)")
        text = given.text
        if given.token_ids is not None:
            token_ids = self._checked_ids(given.token_ids, field) if given.token_ids else []
        elif text:
            with renaming(field):
                self.tokens.check_beginning(field, text, self.limits.max_model_len)
                token_ids = self.codec.encode_following(before, text) if before else self.codec.encode_open(text)
            self.tokens.check_spelt(field, token_ids)
        else:
            token_ids = []
        self._check_room(field, len(before), len(token_ids))
        return token_ids

    def make_turn(self, session: SessionSpec, params: SamplingParams, num_tokens: int) -> RequestSpec:
        """What one `generate` of a session asks of a branch with so many tokens, without these. Raises
        InvalidRequestError."""
        params = exact_record("sampling_params", params, SamplingParams)
        if params.n != 1:
            raise InvalidRequestError("n", f"must be 1 in a session, not {params.n}: fork the branch")
        if params.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs", "is not for sessions: `select` scores given text")
        if params.skip_reading_prefix_cache:
            raise InvalidRequestError(
                "skip_reading_prefix_cache", "is not for sessions, which go on from what they have"
            )
        fields = self.checked_fields(params)
        self._check_not_empty(num_tokens)
        self._check_room("branch", num_tokens, 1)
        return RequestSpec(
            request_id=session.request_id,
            prompt_token_ids=(),
            params=params,
            seed=session.seed if params.seed is None else params.seed,
            max_tokens=self._max_tokens(num_tokens, params, "branch"),
            priority=session.priority,
            **fields,
        )

    def choices(self, choices: Sequence[Prompt], before: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Text and token ids of what `select` compares, after these tokens. Raises InvalidRequestError."""
        if is_a(choices, (str, Mapping)) or not is_a(choices, Sequence):
            raise InvalidRequestError("choices", f"must be a list of prompts, not {type(choices).__name__}")
        choices = exact_list("choices", choices)
        if not 1 <= len(choices) <= MAX_N:
            raise InvalidRequestError("choices", f"must be from 1 to {MAX_N}, not {len(choices)}")
        self._check_not_empty(len(before))
        found = []
        for number, choice in enumerate(choices):
            token_ids = self.tokens_after(choice, before, f"choices[{number}]")
            if not token_ids:
                raise InvalidRequestError(f"choices[{number}]", "is empty: there is nothing to score")
            text = exact_str("choices", choice) if is_a(choice, str) else self.codec.spelling(token_ids)
            found.append((text, token_ids))
        return found

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Special tokens are spelled out."""
        return self.codec.decode(token_ids, skip_special_tokens=False)

    def _check_not_empty(self, num_tokens: int) -> None:
        if not num_tokens:
            raise InvalidRequestError("branch", "is empty: extend it first")

    def _check_room(self, field: str, num_tokens: int, more: int) -> None:
        most = self.limits.max_model_len
        if num_tokens + more > most:
            raise InvalidRequestError(
                field, f"the branch has {num_tokens} tokens; with max_model_len={most}, {more} more do not fit"
            )

    # --- chat ---

    def chat_prompt(
        self,
        messages: Messages,
        chat_template: str | None,
        options: Mapping[str, Any],
        variables: Mapping[str, Any] | None = None,
        name: str = "messages",
    ) -> ChatPrompt:
        """A conversation, which errors call `name`, as a prompt, by the given template, the model's one of that name,
        or the model's own.

        `options` are those of ChatTemplate.render, or variables of the template; `variables` only the latter.
        """
        arguments = _merged(options, variables)
        for flag in ("add_generation_prompt", "continue_final_message"):
            if arguments.get(flag) is not None:
                arguments[flag] = exact_bool(flag, arguments[flag])
        template = self.templates.choose(chat_template, arguments.get("tools"))
        try:
            text = template.render(messages, **arguments)
        except InvalidRequestError as error:
            part = error.field.removeprefix("messages")
            if part == error.field:
                raise
            raise InvalidRequestError(name + part, error.problem) from None
        with renaming(name):
            self.tokens.check_beginning(name, text, self.limits.max_model_len)
            token_ids = self.codec.encode(text, add_special_tokens=False)  # the template writes special tokens itself
        self.tokens.check_spelt(name, token_ids)
        return {"prompt": text, "prompt_token_ids": token_ids}

    def is_own_template(self, chat_template: Any) -> bool:
        """Whether that is one of the model's: by None, or by a name."""
        return chat_template is None or self.templates.has(chat_template)

    def _name_tokens(self, output: RequestOutput) -> None:
        """Fill in `decoded_token` and `bytes` of an output's log-probabilities."""
        rows = [row for completion in output.outputs for row in completion.logprobs or ()]
        rows += [row for row in output.prompt_logprobs or () if row is not None]
        self._name(rows)

    def reader(self, request: Request) -> Callable[[RequestOutput], RequestOutput]:
        """For one request: from what the engine gives, always what is new and without the prompt, to what its user
        asked for. Called where the user waits, so that the engine's thread copies nothing twice."""
        shown_prompt = list(request.spec.prompt_token_ids)  # the user's to change
        so_far = OutputSoFar() if request.output_kind is OutputKind.CUMULATIVE else None

        def read(output: RequestOutput) -> RequestOutput:
            output.prompt, output.prompt_token_ids = request.prompt, shown_prompt
            output.system_fingerprint = self.system_fingerprint
            self._name_tokens(output)
            return output if so_far is None else so_far.merge(output)

        return read

    def name_completion(self, completion: CompletionOutput) -> CompletionOutput:
        """The same of one output."""
        self._name(completion.logprobs or ())
        return completion

    def _name(self, rows: Sequence[dict[int, Logprob]]) -> None:
        for row in rows:
            for token_id, logprob in row.items():
                if logprob.decoded_token is None:
                    logprob.decoded_token = self.codec.spelling([token_id])
                    logprob.bytes = list(self.codec.token_bytes(token_id))

    # --- checks ---

    def new_id(self, kind: str = "request") -> str:
        return f"{kind}-{self._id_prefix}-{next(self._ids)}"

    def request_id(self, given: str | None) -> str:
        """The user's, or a new one."""
        return self.new_id() if given is None else _filled("request_id", given)

    def priority(self, given: int) -> int:
        priority = integer("priority", given, -(2**63), 2**63 - 1)
        if priority and not self.limits.priority_allowed:
            raise InvalidRequestError("priority", 'has an effect only with scheduling_policy="priority"')
        return priority

    def _tokens_of(self, given: _Given, name: str, room: int = 1) -> tuple[str | None, list[int]]:
        """Text, if there is one, and token ids of a prompt behind which there is to be room for so many. Raises
        InvalidRequestError."""
        text = given.text
        if given.token_ids is not None:
            return text, self._checked_ids(given.token_ids, name, room)
        with renaming(name):
            self.tokens.check_beginning(name, text or "", self.limits.max_model_len)
            token_ids = self.codec.encode(text or "")
        if not text or not token_ids:  # some tokenizers make a BOS token of an empty text
            raise InvalidRequestError(name, "is empty")
        self.tokens.check_spelt(name, token_ids)
        self._check_length(len(token_ids), name, room)
        return text, token_ids

    def cache_key(self, prompt: Prompt) -> tuple[list[int], str | None]:
        """What a prompt's KV is cached under: token ids and salt. Raises InvalidRequestError."""
        given = _read(prompt, "prompt")
        _, token_ids = self._tokens_of(given, "prompt")
        return token_ids, given.cache_salt

    def _checked_ids(self, value: list[Any], name: str, room: int = 1) -> list[int]:
        field = _key("prompt_token_ids", name)
        if not value:
            raise InvalidRequestError(field, "is empty")
        self._check_length(len(value), name, room)
        return self._in_vocabulary(field, value)

    def _check_length(self, num_tokens: int, name: str, room: int) -> None:
        most = self.limits.max_model_len
        if num_tokens > most - room:
            fit = f"at most {most - room} leave room for an answer" if room else "no more fit"
            raise InvalidRequestError(name, f"has {num_tokens} tokens; with max_model_len={most} {fit}")

    def _in_vocabulary(self, field: str, token_ids: Iterable[Any]) -> list[int]:
        """Each read once: what is checked is what is used."""
        vocab_size = self.limits.vocab_size
        allowed = f"token ids must be integers from 0 to {vocab_size - 1}, this model's vocabulary"
        read = [exact_int(field, token_id, allowed) for token_id in token_ids]
        for token_id in read:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(field, f"{allowed}, not {shown(token_id)}")
        return read

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("stop", "bad_words"):
            for text in getattr(params, name):
                check_unicode(name, text)
        if params.skip_special_tokens:
            for text in params.stop or ():
                self.tokens.check_stop(text)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._in_vocabulary(name, getattr(params, name) or ())
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and asked > self.limits.max_logprobs:
                raise InvalidRequestError(name, f"must be at most max_logprobs={self.limits.max_logprobs}, not {asked}")

    def _max_tokens(self, prompt_tokens: int, params: SamplingParams, name: str) -> int:
        room = self.limits.max_model_len - prompt_tokens
        if params.min_tokens > room:
            raise InvalidRequestError(
                "min_tokens",
                f"{params.min_tokens} do not fit: {name} has {prompt_tokens} tokens and max_model_len is "
                f"{self.limits.max_model_len}, which leaves {room}",
            )
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def seed(self, seed: int | None) -> int:
        if seed is not None:
            return seed
        return self.limits.default_seed if self.limits.default_seed is not None else int.from_bytes(os.urandom(8))


def _key(key: str, name: str) -> str:
    """What errors call a key of a prompt: of one prompt its own name, of several which one's it is."""
    return f"{name}.{key}" if name.endswith("]") else key


@contextmanager
def renaming(name: str) -> Iterator[None]:
    """The tokenizer knows only that a text is at fault, not which."""
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(name, error.problem) from None


def _list_of_ids(value: Any, name: str) -> list[Any]:
    field, what = _key("prompt_token_ids", name), "must be a list of token ids"
    if hasattr(type(value), "tolist"):  # a NumPy array or a tensor
        try:
            value = value.tolist()
        except Exception as error:
            problem = f"{what}: reading it raised {type(error).__name__}: {shown(str(error))}"
            raise InvalidRequestError(field, problem) from None
    if is_a(value, (str, bytes)) or not is_a(value, Sequence):
        raise InvalidRequestError(field, f"{what}, not {type(value).__name__}")
    return exact_list(field, value, what)


def _merged(options: Mapping[str, Any], variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of ChatTemplate.render; it checks the rest of the names itself."""
    taken = {}
    for given, value in ({} if variables is None else exact_dict("chat_template_kwargs", variables)).items():
        key = exact_str("chat_template_kwargs", given, "every name must be a string")
        if key in options or key in _RENDER_ARGUMENTS:
            raise InvalidRequestError(f"chat_template_kwargs.{key}", "this name is reserved")
        taken[key] = value
    return {**options, **taken}


@dataclass(frozen=True, slots=True)
class _Given:
    """A prompt, read once."""

    text: str | None
    token_ids: list[Any] | None  # not checked yet
    cache_salt: str | None = None  # cached KV is shared among requests with the same one


def _read(prompt: Any, name: str) -> _Given:
    """Raises InvalidRequestError; it calls the prompt `name`."""
    if is_a(prompt, str):
        return _Given(exact_str(name, prompt), None)
    if not is_a(prompt, Mapping):
        allowed = 'must be a string, {"prompt": ...} or {"prompt_token_ids": [...]}'
        raise InvalidRequestError(name, f"{allowed}, not {type(prompt).__name__}")
    given = exact_fields(name, prompt)
    if not given or given.keys() - {"prompt", "prompt_token_ids", "cache_salt"}:
        allowed = '"prompt", "prompt_token_ids" and "cache_salt"'
        raise InvalidRequestError(name, f"allowed keys are {allowed}, not {shown(list(given))}")
    text = given.get("prompt")
    if text is not None:
        text = exact_str(name, text, "its text must be a string")
    token_ids = _list_of_ids(given["prompt_token_ids"], name) if "prompt_token_ids" in given else None
    if text is None and token_ids is None:
        raise InvalidRequestError(name, 'must have a "prompt", which is text, or "prompt_token_ids"')
    return _Given(text, token_ids, checked_salt(given.get("cache_salt"), _key("cache_salt", name)))


def checked_salt(salt: Any, field: str = "cache_salt") -> str | None:
    """Raises InvalidRequestError."""
    return None if salt is None else _filled(field, salt)


def _filled(field: str, value: Any) -> str:
    text = exact_str(field, value, "must be a string, not empty")
    if not text:
        raise InvalidRequestError(field, "must be a string, not empty, not ''")
    if len(text) > _MAX_NAME:
        raise InvalidRequestError(field, f"may have at most {_MAX_NAME} characters, not {len(text)}")
    check_unicode(field, text)
    return text
