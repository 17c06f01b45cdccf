"""The contract of a coordinator: it owns the sequences of one request and says after every step what each does next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any, NamedTuple

from octavo.core.errors import InvalidRequestError
from octavo.core.events import Reason
from octavo.core.namespace import SHARED

if TYPE_CHECKING:
    from octavo.core.outputs import RequestMetrics, RequestOutput
    from octavo.core.plan import DrawResult, RowResult
    from octavo.core.sequence import Sequence

NewSequence = Callable[[tuple[int, ...]], "Sequence"]  # makes an empty sequence with this stream


class SequenceResult(NamedTuple):
    """A step computed positions [start, stop) of a sequence, already committed.

    Those that the sequence has no tokens for are verified drafts, in front of the last of `rows`' draws: they are to be
    appended before the sequence is asked anything else, or forgotten by `truncate`.
    """

    sequence: Sequence
    start: int
    stop: int
    rows: SequenceOf[RowResult]  # in the order of its wants

    @property
    def draws(self) -> list[DrawResult]:
        """All that was drawn, row by row."""
        return [drawn for row in self.rows for drawn in row.draws]


class Coordinator(ABC):
    """Owner of one request.

    `sequences` are the live ones in an order fixed by the request; the scheduler serves them in that order. All methods
    are called between steps, by the engine's thread.
    """

    lockstep = False  # all its wanted rows in one step, or none
    width = 1  # most sequences alive at once
    max_chunk_tokens: int | None = None  # most tokens of one of its sequences in a step; None: as many as there is room
    namespace = SHARED  # of the prefix cache: what it computes is found by requests of the same
    reads_cache = True  # whether blocks that other requests computed may be used
    keeps_idle = False  # its sequences of which nothing is asked now go on by themselves later: it waits for something

    def __init__(self, request_id: str, priority: int, metrics: RequestMetrics) -> None:
        self.request_id = request_id
        self.priority = priority  # lower is served first
        self.metrics = metrics
        self.sequences: list[Sequence] = []

    @abstractmethod
    def start(self, new_sequence: NewSequence) -> None:
        """Make the first sequences. Called once, when the request is added."""

    @abstractmethod
    def update(self, results: SequenceOf[SequenceResult]) -> None:
        """Take the results of a step, in the order of `sequences`, and call the verbs that say what happens next."""

    @property
    def by_urgency(self) -> SequenceOf[Sequence]:
        """`sequences` in the order in which they are served; they give way in that of `sequences`, the last first."""
        return self.sequences

    def go_on(self) -> None:  # noqa: B027 - most act on results alone
        """Something has changed outside a step: something was asked of it, or the cache had all that it waited for."""

    def call(self, call: Any) -> Any:
        """What is asked of a request under way, such as a Call of a session. Raises InvalidRequestError."""
        raise InvalidRequestError("request_id", f"{self.request_id!r} takes no calls")

    def take_back(self, call: Any) -> None:  # noqa: B027 - only sessions have anything to take back
        """As if it had never been asked."""

    def contain(self, sequence: Sequence, error: str) -> bool:
        """A row of this sequence failed; nothing of it was committed. True: only what asked for it ends, which `update`
        does next; the request goes on. False: the request ends with this error."""
        return False

    def begin_in_fork(self) -> None:  # noqa: B027 - most have nothing to do
        """The process is a forked child: whoever waits for something is in the parent. A request as a whole is ended by
        whoever delivers its outputs."""

    @abstractmethod
    def finish(self, reason: str, error: str | None = None) -> None:
        """End now, with this finish reason for all outputs still running ("abort" or "error")."""

    def least_blocks(self, block_size: int) -> int:
        """KV blocks without which it cannot run to its end, whatever it shares."""
        return 1

    @property
    @abstractmethod
    def finished(self) -> bool: ...

    @property
    @abstractmethod
    def end_reason(self) -> Reason:
        """Why it ended; of several outputs, the last one's."""

    @abstractmethod
    def take_output(self, now: float) -> RequestOutput | None:
        """What is new for the user since the last call, or None. Nothing in it is changed later."""

    def drop(self, sequence: Sequence) -> None:
        """End one sequence."""
        sequence.drop()
        self.sequences.remove(sequence)

    def drop_all(self) -> None:
        for sequence in self.sequences:
            sequence.drop()
        self.sequences.clear()
