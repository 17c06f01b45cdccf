"""Writing in the Margins as values: the request, what it tells while it runs, and what can be asked of it meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.core.namespace import Namespace
from octavo.core.outputs import RequestMetrics

if TYPE_CHECKING:
    from octavo.core.outputs import CompletionOutput
    from octavo.core.request import RequestSpec


# --- the request ---


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the document."""

    index: int
    start: int  # characters of the document
    stop: int
    first_token: int  # of the document's tokens, without what stands before them
    last_token: int  # the one behind its last


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about the document, as it stands around it."""

    extract: tuple[tuple[int, ...], ...]  # tokens behind each segment that ask for its margin
    classify_before: tuple[int, ...]  # tokens before a margin whose relevance is asked; empty if that is not asked so
    classify_after: str  # the text behind it
    answer_before: str  # text between the document, or the start, and the kept margins
    answer_after: str
    answer_without: str  # text behind the document where no margin is kept
    start: tuple[int, ...] | None = None  # tokens that the final prompt begins with; None: it goes on from the document


@dataclass(frozen=True, slots=True)
class MarginsSpec:
    """Read a document in segments, and answer questions with margins. All ids are inside the vocabulary, and prompts of
    the lengths that `margin.max_tokens` allows fit the model's context."""

    request_id: str
    seed: int
    prefix: tuple[int, ...]  # tokens before the document, and before each window of it
    segments: tuple[Segment, ...]  # at least one
    document: tuple[int, ...]  # tokens of all segments
    windows: tuple[int, ...]  # numbers of segments that are read one after another; there are several if not all fit
    questions: tuple[Question, ...]
    margin: RequestSpec  # how a margin is drawn; without the prompt
    verdict: RequestSpec  # how a verdict is drawn, if it is; without the prompt
    # How an answer is drawn; without the prompt, and with the context as its max_tokens. None: the margins are all.
    answer: RequestSpec | None
    max_answer_tokens: int | None
    classification: str  # "score", "text" or "merged"
    yes: tuple[int, ...] = ()  # tokens that mean YES
    no: tuple[int, ...] = ()
    threshold: float = 0.0
    early_exit_kept: int | None = None
    early_exit_score: float | None = None
    overlap: bool = True
    review: bool = False
    max_branches: int = 8  # margins that are written or judged at once
    margin_before: str = ""  # text around a kept margin; may hold ``{number}``, its segment's
    margin_after: str = ""
    priority: int = 0
    cache_salt: str | None = None
    arrival_time: float = 0.0  # seconds, on the engine's clock

    @property
    def namespace(self) -> Namespace:
        return Namespace(self.cache_salt)

    def tokens_of(self, first: int, last: int) -> tuple[int, ...]:
        """Tokens of the segments [first, last)."""
        return self.document[self.segments[first].first_token : self.segments[last - 1].last_token]


# --- what it tells ---


@dataclass(frozen=True, slots=True)
class SegmentRead:
    """The document is read up to the end of this segment: its margin can be written."""

    segment: Segment
    num_read: int
    num_segments: int


@dataclass(slots=True)
class Margin:
    """What was written at the end of a segment."""

    question: int  # its number; 0 where there is one
    segment: Segment
    text: str
    token_ids: list[int]  # as drawn
    finish_reason: str | None = None  # of CompletionOutput
    kept: bool | None = None  # None: not decided yet, or never, since reading ended before it
    score: float | None = None  # log p(YES) - log p(NO), where the model was asked that way
    judged_by: str | None = None  # "model", "person", or "nobody": it is empty


@dataclass(frozen=True, slots=True)
class MarginWritten:
    """A margin as the model wrote it. It is not known yet whether it is kept."""

    margin: Margin


@dataclass(frozen=True, slots=True)
class MarginDecided:
    """Whether a margin is kept. A person's verdict may come after the model's and takes its place."""

    margin: Margin
    num_decided: int  # margins of this question
    num_segments: int


@dataclass(frozen=True, slots=True)
class ReviewBegun:
    """All margins of this question are decided: its answer waits until a person has judged them."""

    question: int


@dataclass(frozen=True, slots=True)
class AnswerBegun:
    """The final prompt stands: these tokens, of which the first were read already."""

    question: int
    prompt_token_ids: tuple[int, ...]
    num_segments: int  # of the document that are in it, from the first on; 0: none, it rests on the margins alone


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What is new of an answer."""

    question: int
    output: CompletionOutput


MarginsEvent = SegmentRead | MarginWritten | MarginDecided | ReviewBegun | AnswerBegun | AnswerDelta


@dataclass(slots=True)
class MarginsOutput:
    """What comes from the engine: what happened since the last one."""

    request_id: str
    events: list[MarginsEvent]
    finished: bool
    error: str | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))


# --- what can be asked of it ---


@dataclass(frozen=True, slots=True)
class Judge:
    """A person's verdict on a margin: keep it, with other words if `text` is given, or drop it."""

    question: int
    segment: int
    keep: bool
    text: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerNow:
    """Review no more: answer with the margins as they are decided."""


@dataclass(frozen=True, slots=True)
class StopReading:
    """Read no further than the segments that are read, and leave out margins that are not decided yet."""
