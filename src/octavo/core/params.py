"""What a user asks of a request, validated where it enters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, Literal

from octavo.core.errors import InvalidRequestError, shown
from octavo.core.structured import StructuredOutputsParams, structured_outputs
from octavo.core.values import (
    exact_bool,
    exact_dict,
    exact_fields,
    exact_float,
    exact_int,
    exact_list,
    exact_record,
    exact_str,
    is_a,
)

MAX_N = 1024
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 4096
MAX_BAD_WORDS = 1024
MAX_SEED = 2**64 - 1
_MAX_TOKEN_ID, _MAX_ID_DIGITS = 2**31 - 1, 10
# Further out, a logit would overflow float32 and one token decide everything.
REPETITION_PENALTY = (1e-3, 1e3)
MAX_LOGIT_BIAS = 1e6
GREEDY_TEMPERATURE = 1e-5  # below this the best token's probability is 1 in any arithmetic
MAX_PATTERN_SIZE = 4096  # it is looked for after every token


class LogitBias(dict[int, float]):
    """Token ids and what is added to their logits: a dict that is a value, which nobody changes."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("it cannot be changed: make parameters anew, as with `but`")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return LogitBias, (dict(self),)

    def __copy__(self) -> LogitBias:
        return self

    def __deepcopy__(self, memo: object) -> LogitBias:
        return self


class OutputKind(StrEnum):
    """What each streamed RequestOutput carries."""

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


@dataclass(frozen=True, slots=True)
class RepetitionDetectionParams:
    """When an output repeats itself: it ends with one pattern of tokens, so many times in a row. Names are vLLM's.

    Every field is checked on construction; a bad one raises InvalidRequestError naming it.

    Attributes:
        max_pattern_size: most tokens of a pattern, at most 4096; 0 looks for none.
        min_pattern_size: fewest tokens of a pattern; 0 is 1. A shorter one is found as a longer one that holds it
            several times.
        min_count: how many times in a row it must stand there, at least 2.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        name = "repetition_detection"
        most = integer(f"{name}.max_pattern_size", self.max_pattern_size, 0, MAX_PATTERN_SIZE)
        least = integer(f"{name}.min_pattern_size", self.min_pattern_size, 0, MAX_PATTERN_SIZE)
        if least > most:
            raise InvalidRequestError(f"{name}.min_pattern_size", f"{least} is more than max_pattern_size={most}")
        count = integer(f"{name}.min_count", self.min_count, 2 if most else 0, 2**31 - 1)
        for field, value in (("max_pattern_size", most), ("min_pattern_size", least), ("min_count", count)):
            _set(self, field, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw tokens and when to stop. Names and defaults are vLLM's.

    Every field is checked on construction; a bad one raises InvalidRequestError naming it. Checks that need the model
    (token ids inside the vocabulary, lengths inside the context) happen when the request is added.

    Attributes:
        n: number of outputs; they share the prompt's KV blocks.
        presence_penalty, frequency_penalty: in [-2, 2]; subtracted from the logits of tokens already generated, once or
            per occurrence.
        repetition_penalty: in [0.001, 1000]; logits of tokens in prompt or output are divided by it if positive, else
            multiplied (Keskar et al., 2019).
        temperature: >= 0; 0 is greedy, and so is anything below 1e-5.
        top_p: in (0, 1]; the smallest set of tokens whose probability reaches it is kept (Holtzman et al., 2020).
        top_k: keep the k most probable tokens; 0 or -1 is off.
        min_p: in [0, 1]; keep tokens at least this probable relative to the most probable.
        seed: in [0, 2**64); None draws one, which the output reports.
        stop: strings that end an output; they may span tokens. Not part of the text unless
            `include_stop_str_in_output`. One may be a special token, also where these are not shown.
        stop_token_ids: further token ids that end an output.
        ignore_eos: go on past the model's own end tokens.
        max_tokens: most tokens to generate; None is up to the model's context.
        min_tokens: end tokens and stop strings do nothing before this many.
        logprobs: per generated token, its log-probability and those of this many best tokens; of the raw logits.
        prompt_logprobs: the same for every prompt token but the first.
        detokenize: whether text is made at all.
        skip_special_tokens, spaces_between_special_tokens: how text is made.
        logit_bias: token id -> value added to its logit, in [-1e6, 1e6].
        allowed_token_ids: when given, no other token can be drawn.
        bad_words: strings whose tokens may not be completed in the output.
        output_kind: what streamed outputs carry.
        skip_reading_prefix_cache: compute the whole prompt, whatever of it is cached.
        repetition_detection: end an output that repeats itself, with finish_reason "repetition"; None never does. A
            mapping of RepetitionDetectionParams' fields will do. Not before min_tokens.
        structured_outputs: what the output must look like: StructuredOutputsParams, or a mapping of its fields. It ends
            where nothing may follow, whatever min_tokens says. Needs the package llguidance.
        speculative_decoding: whether tokens may be guessed where the engine does so (speculative_config); answers are
            the same either way.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    output_kind: OutputKind | Literal["cumulative", "delta", "final_only"] = OutputKind.CUMULATIVE
    skip_reading_prefix_cache: bool = False
    repetition_detection: RepetitionDetectionParams | Mapping[str, int] | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    speculative_decoding: bool = True

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_flags()
        _set(self, "stop", _strings("stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS))
        _set(self, "bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_STOP_STRING_CHARS))
        _set(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise InvalidRequestError("allowed_token_ids", "is empty: no token could be drawn")
            _set(self, "allowed_token_ids", tuple(sorted(set(allowed))))
        _set(self, "logit_bias", _logit_bias(self.logit_bias))
        _set(self, "repetition_detection", _repetition_detection(self.repetition_detection))
        if self.structured_outputs is not None:
            _set(self, "structured_outputs", structured_outputs(self.structured_outputs))
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop", "stop strings need detokenize=True")
        what = f"must be one of {', '.join(kind.value for kind in OutputKind)}"
        kind = exact_str("output_kind", self.output_kind, what)
        if kind not in list(OutputKind):
            raise InvalidRequestError("output_kind", f"{what}, not {shown(kind)}")
        _set(self, "output_kind", OutputKind(kind))

    def _check_numbers(self) -> None:
        _set(self, "n", integer("n", self.n, 1, MAX_N))
        _set(self, "presence_penalty", number("presence_penalty", self.presence_penalty, -2.0, 2.0))
        _set(self, "frequency_penalty", number("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        penalty = number("repetition_penalty", self.repetition_penalty, *REPETITION_PENALTY)
        _set(self, "repetition_penalty", penalty)
        _set(self, "temperature", number("temperature", self.temperature, 0.0, math.inf))
        _set(self, "top_p", number("top_p", self.top_p, 0.0, 1.0, open_low=True))
        _set(self, "top_k", integer("top_k", self.top_k, -1, 2**31 - 1))
        _set(self, "min_p", number("min_p", self.min_p, 0.0, 1.0))
        if self.seed is not None:
            _set(self, "seed", integer("seed", self.seed, 0, MAX_SEED))
        if self.max_tokens is not None:
            _set(self, "max_tokens", integer("max_tokens", self.max_tokens, 1, 2**31 - 1))
        _set(self, "min_tokens", integer("min_tokens", self.min_tokens, 0, 2**31 - 1))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError("min_tokens", f"{self.min_tokens} is more than max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _set(self, name, integer(name, value, 0, 2**31 - 1))

    def _check_flags(self) -> None:
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
            "skip_reading_prefix_cache",
            "speculative_decoding",
        ):
            _set(self, name, exact_bool(name, getattr(self, name)))

    @property
    def repetition(self) -> RepetitionDetectionParams | None:
        """`repetition_detection`, as which a mapping is kept too; None when it looks for nothing."""
        found = self.repetition_detection
        return found if isinstance(found, RepetitionDetectionParams) and found.max_pattern_size else None

    @property
    def grammar(self) -> StructuredOutputsParams | None:
        """`structured_outputs`, as which a mapping is kept too."""
        return self.structured_outputs  # type: ignore[return-value]

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def num_outputs(self) -> int:
        return self.n

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def but(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


def _set(params: object, name: str, value: object) -> None:
    object.__setattr__(params, name, value)  # frozen: normalised once, in __post_init__


def integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int; NumPy's integers are welcome, bools are not."""
    number = exact_int(name, value)
    if not low <= number <= high:
        raise InvalidRequestError(name, f"must be between {low} and {high}, not {shown(number)}")
    return number


def number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """`value` as a float; NumPy's numbers are welcome, bools are not."""
    number = exact_float(name, value)
    allowed = f"must be {'more than' if open_low else 'at least'} {low:g}" + (
        f" and at most {high:g}" if high != math.inf else " and finite"
    )
    if not math.isfinite(number) or number < low or number > high or (open_low and number == low):
        raise InvalidRequestError(name, f"{allowed}, not {shown(value)}")
    return number


def _strings(name: str, value: object, most: int, most_chars: int) -> tuple[str, ...]:
    if value is None:
        return ()
    what = "must be a string or a list of strings"
    if not is_a(value, (str, list, tuple)):
        raise InvalidRequestError(name, f"{what}, not {shown(value)}")
    given = [value] if is_a(value, str) else exact_list(name, value, what)
    if len(given) > most:
        raise InvalidRequestError(name, f"at most {most} strings are allowed, not {len(given)}")
    strings = tuple(exact_str(name, string, what) for string in given)
    for string in strings:
        if not string:
            raise InvalidRequestError(name, "an empty string is not allowed")
        if len(string) > most_chars:
            raise InvalidRequestError(name, f"a string may have at most {most_chars} characters, not {len(string)}")
    return strings


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(token_id(name, item) for item in exact_list(name, value, "must be a list of token ids"))


def token_id(name: str, value: object) -> int:
    """`value` as an int that some vocabulary may have."""
    what = "a token id must be an integer of at least 0"
    number = exact_int(name, value, what)
    if not 0 <= number <= _MAX_TOKEN_ID:
        raise InvalidRequestError(name, f"{what}, not {shown(number)}")
    return number


def _repetition_detection(value: object) -> RepetitionDetectionParams | None:
    name = "repetition_detection"
    if value is None:
        return None
    if is_a(value, RepetitionDetectionParams):
        return exact_record(name, value, RepetitionDetectionParams)
    given = exact_fields(name, value, "must be RepetitionDetectionParams or a mapping")
    allowed = [field.name for field in fields(RepetitionDetectionParams)]
    for field in given:
        if field not in allowed:
            at = f"{name}.{field}" if field.isidentifier() and len(field) <= 40 else name
            raise InvalidRequestError(at, f"{shown(field)} is not a field; allowed are {', '.join(allowed)}")
    return RepetitionDetectionParams(**given)


def _logit_bias(value: object) -> LogitBias:
    if value is None:
        return LogitBias()
    bias: dict[int, float] = {}
    for given, amount in exact_dict("logit_bias", value, "must map token ids to numbers").items():
        key = given
        if is_a(given, str):  # JSON's keys are strings
            text = exact_str("logit_bias", given)
            key = int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_ID_DIGITS else text
        number_of = token_id("logit_bias", key)
        try:
            bias[number_of] = number("logit_bias", amount, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        except InvalidRequestError as error:
            raise InvalidRequestError("logit_bias", f"of token {shown(number_of)} {error.problem}") from None
    return LogitBias(bias)
