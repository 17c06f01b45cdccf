"""Schemas, expressions and grammars, compiled by llguidance against a model's tokens."""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from typing import TYPE_CHECKING, Any

from octavo.core.errors import InvalidRequestError
from octavo.core.grammar import GrammarState
from octavo.core.structured import TOO_MANY, StructuredOutputsParams
from octavo.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

_MAX_CACHED = 128
_DEADLINE = 5.0  # seconds that a grammar may take to compile
# Of Earley's parser, for one mask: some 10 ms, for which all rows of the step wait. What is ambiguous without end takes
# more and more, and ends with an error; schemas and ordinary grammars take a few hundred.
_MAX_ITEMS = 10_000
_MAX_COMPILING = 4  # at once; one that is late goes on until its limits end it
_TURN = 5.0  # seconds that others wait for one of these to end: most take a few milliseconds

_all: weakref.WeakSet[Grammars] = weakref.WeakSet()


class _Vocabulary:
    """A model's tokens as llguidance asks for them."""

    def __init__(self, codec: Tokenizer, eos_token_ids: tuple[int, ...], rows: int) -> None:
        self._codec = codec
        self.tokens = [codec.token_bytes(token_id) for token_id in range(min(rows, codec.vocab_size))]
        special = {token_id for token_id in codec.special_token_ids if token_id < len(self.tokens)}
        self.special_token_ids = sorted(special | set(eos_token_ids))
        self.bos_token_id = None
        if eos_token_ids:
            self.eos_token_id = eos_token_ids[0]
        else:  # a token that no text has and nobody can draw: the output ends where the grammar does
            self.tokens += [b""] * (rows - len(self.tokens))  # a model may have more rows than there are tokens
            self.eos_token_id = len(self.tokens)
            self.tokens.append(b"\xff<end>")
            self.special_token_ids.append(self.eos_token_id)

    def __call__(self, text: str) -> list[int]:
        return self._codec.encode_plain(text)


class Grammars:
    """Of one model. Thread-safe.

    Args:
        rows: of the model, for token ids from 0 on.
    """

    def __init__(self, codec: Tokenizer, eos_token_ids: tuple[int, ...], rows: int) -> None:
        self._codec = codec
        self._eos_token_ids = eos_token_ids
        self._rows = rows
        self._tokenizer: Any = None
        self._cached: OrderedDict[StructuredOutputsParams, LLMatcher] = OrderedDict()
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        """Also after a fork, in the child: the threads that compile are the parent's, and so is who holds the lock."""
        self._lock = threading.Lock()
        self._making_vocabulary = threading.Lock()
        self._compiling: ThreadPoolExecutor | None = None
        self._turns = threading.Semaphore(_MAX_COMPILING)

    def state(self, params: StructuredOutputsParams) -> GrammarState:
        """At the beginning of an output. Raises InvalidRequestError."""
        return GrammarState(self._matcher(params).deep_copy())

    def check(self, params: StructuredOutputsParams) -> None:
        """Compile it, if it is not. Not for the engine's thread. Raises InvalidRequestError for a grammar that is none,
        that admits no output, that is too large, or that takes too long."""
        self._matcher(params)

    def is_compiled(self, params: StructuredOutputsParams) -> bool:
        """Whether `check` has nothing to do."""
        with self._lock:
            return params in self._cached

    def _matcher(self, params: StructuredOutputsParams) -> LLMatcher:
        with self._lock:
            found = self._cached.get(params)
            if found is not None:
                self._cached.move_to_end(params)
                return found
        made = self._in_time(params)
        with self._lock:
            self._cached[params] = made
            while len(self._cached) > _MAX_CACHED:
                self._cached.popitem(last=False)
        return made

    def _in_time(self, params: StructuredOutputsParams) -> LLMatcher:
        field = f"structured_outputs.{params.kind}"
        try:
            self._vocabulary()  # not in the time of the first grammar
        except ImportError:
            needed = "needs the package llguidance: pip install octavo[structured]"
            raise InvalidRequestError("structured_outputs", needed) from None
        if not self._turns.acquire(timeout=_TURN):
            raise InvalidRequestError(field, f"{TOO_MANY}: try it again")
        with self._lock:
            found = self._cached.get(params)  # somebody else's, meanwhile
            if found is not None:
                self._turns.release()
                return found
            if self._compiling is None:
                self._compiling = ThreadPoolExecutor(_MAX_COMPILING, "octavo-compile")
            job = self._compiling.submit(self._compile, params, field)
        try:
            return job.result(_DEADLINE)
        except LateError:
            raise InvalidRequestError(field, f"takes more than {_DEADLINE:g} s to compile") from None

    def _compile(self, params: StructuredOutputsParams, field: str) -> LLMatcher:
        try:
            from llguidance import LLMatcher, LLParserLimits

            limits = LLParserLimits(step_max_items=_MAX_ITEMS)
            matcher = LLMatcher(self._vocabulary(), _source(params), log_level=0, limits=limits)
            if matcher.is_error():
                raise InvalidRequestError(field, _problem(matcher.get_error()))
            admits = any(matcher.compute_bitmask())
            if "limit" in (problem := matcher.get_error()):
                raise InvalidRequestError(field, _problem(problem))
            if not admits or (matcher.is_stopped() and not matcher.is_accepting()):
                raise InvalidRequestError(field, "admits no output")
            return matcher
        except ValueError as error:
            if isinstance(error, InvalidRequestError):
                raise
            raise InvalidRequestError(field, _problem(str(error))) from None
        except BaseException as error:  # a panic of Rust code is no Exception
            raise InvalidRequestError(field, _problem(f"{type(error).__name__}: {error}")) from None
        finally:
            self._turns.release()

    def _vocabulary(self) -> Any:
        """Some 150 ms for 50,000 tokens, the first time."""
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._making_vocabulary:
            if self._tokenizer is None:
                made = _Vocabulary(self._codec, self._eos_token_ids, self._rows)
                ends = list(self._eos_token_ids) or [made.eos_token_id]
                self._tokenizer = LLTokenizer(TokenizerWrapper(made), n_vocab=len(made.tokens), eos_token=ends)
            return self._tokenizer


def _source(params: StructuredOutputsParams) -> str:
    """As llguidance reads it. Raises ValueError."""
    from llguidance import LLMatcher, grammar_from

    whitespace: Any = {"whitespace_flexible": not params.disable_any_whitespace}
    match params.kind:
        case "json":
            assert isinstance(params.json, str)
            return LLMatcher.grammar_from_json_schema(params.json, overrides=whitespace)
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=whitespace)
        case "regex":
            assert params.regex is not None
            return LLMatcher.grammar_from_regex(params.regex)
        case "choice":
            assert params.choice is not None
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_quoted, params.choice)))
    assert params.grammar is not None
    return grammar_from("gbnf" if "::=" in params.grammar else "lark", params.grammar)


def _quoted(text: str) -> str:
    """As a string of Lark's."""
    return json.dumps(text, ensure_ascii=False)


def _problem(told: str) -> str:
    """The first lines of what the library says, which may go on with its state."""
    lines = [line.strip() for line in told.split("<state>", maxsplit=1)[0].strip().split("\n") if line.strip()]
    return "; ".join(lines[:3])[:500] or "cannot be used"


def _after_fork_in_child() -> None:
    for grammars in tuple(_all):
        grammars._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
