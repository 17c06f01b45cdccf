"""What the engine is handed and never builds itself: text codec, executor, clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from concurrent.futures import Future

    from octavo.core.grammar import GrammarState
    from octavo.core.plan import StepPlan, StepResult
    from octavo.core.structured import StructuredOutputsParams


class SequenceState(Protocol):
    """State of a sequence that its tokens alone do not give cheaply (detokeniser, penalty counts, grammar matcher).

    It is attached to a sequence; the verbs call these three methods and nobody else does.
    """

    def fork(self) -> SequenceState:
        """An independent copy, for a forked sequence."""
        ...

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take in tokens appended to the sequence."""
        ...

    def rollback(self, num_tokens: int) -> None:
        """Undo the last `num_tokens` tokens."""
        ...


@runtime_checkable
class TextStream(SequenceState, Protocol):
    """Incremental text of one output: detokenises, holds back what could become a stop string, and finds stop strings.

    Only tokens given to `advance` produce text; the prompt tokens given when it was made are context for detokenising.
    """

    @property
    def text(self) -> str:
        """All text released so far: never ends in half a character, nor in a possible beginning of a stop string."""
        ...

    def text_after(self, start: int) -> str:
        """`text` from this character on, in time of its own length if all before it was asked for already."""
        ...

    @property
    def stop_reason(self) -> str | None:
        """The stop string that was found, or None. Once set, `text` is final and further tokens are ignored."""
        ...

    def fork(self) -> TextStream: ...

    def finish(self) -> None:
        """End of output: release what was held back (incomplete UTF-8 becomes U+FFFD)."""
        ...


class TextCodec(Protocol):
    """What the engine's side needs of a model's tokenizer."""

    def encode_rest(self, before: Sequence[int], text: str) -> list[int]:
        """Token ids of what is left of a token that was cut, as what follows `before`; only ids that a model's rows
        have."""
        ...

    def encode_around(self, before: Sequence[int], head: str, plain: str, tail: str) -> list[int]:
        """The same of a text of three parts. In the second, special tokens written out are text."""
        ...

    def grammar_state(self, params: StructuredOutputsParams) -> GrammarState:
        """Where an output begins. Raises InvalidRequestError."""
        ...

    def text_stream(
        self,
        prompt_token_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop_after: int = 0,
    ) -> TextStream:
        """`stop_after`: a stop string that ends in the text of so many first tokens does not count (min_tokens)."""
        ...


class Background(Protocol):
    """Does beside the engine what would hold up its steps."""

    def submit(self, request_id: str, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Carry out `job`, for this request; then, between two steps, `done` with what it returned or raised."""
        ...


class Handle(Protocol):
    """A step under way. `result` blocks until it is done and raises what the step raised."""

    def result(self) -> StepResult: ...


class Executor(Protocol):
    """Runs steps. One per engine; a group of ranks looks like one."""

    def execute(self, plan: StepPlan) -> Handle: ...

    def close(self) -> None: ...


class BlockTier(Protocol):
    """Where KV blocks go when they leave memory. Called by the engine's thread, between steps; none of it waits for a
    disk, and none of it raises."""

    def save(self, key: bytes, token_ids: tuple[int, ...], block: int) -> None:
        """Keep the KV of a block, if there is room. `key` names it: 32 bytes over all it depends on."""
        ...

    def has(self, key: bytes) -> bool:
        """Whether something is kept under this key, as far as is known without looking into it."""
        ...

    def load(
        self, key: bytes, token_ids: tuple[int, ...], compute_seconds: float | None
    ) -> Future[bytes | None] | None:
        """Begin to read the KV that was kept under this key; it comes verified, or as None if it is not sound. Returns
        None if nothing is kept, or computing it, which takes so long as far as is known, is predicted to be faster."""
        ...

    def keep(self, blocks: Sequence[tuple[bytes, tuple[int, ...], int]]) -> None:
        """The engine closes: keep these blocks (key, tokens, block), the last of them above all. Waits until they are
        written."""
        ...

    def clear(self) -> None:
        """Forget everything that these keys could name."""
        ...

    def close(self) -> None: ...


class Clock(Protocol):
    """Seconds, monotonic. Tests hand the engine one they turn by hand."""

    def __call__(self) -> float: ...
