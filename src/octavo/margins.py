"""Writing in the Margins for users: what is told while a document is read, what can be said to it, and the result."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from octavo.core.errors import InvalidRequestError, RequestFailedError
from octavo.core.margins import (
    AnswerBegun,
    AnswerDelta,
    AnswerNow,
    Judge,
    Margin,
    MarginDecided,
    MarginsEvent,
    MarginWritten,
    Segment,
    StopReading,
)
from octavo.core.outputs import CompletionOutput, RequestMetrics, joined_outputs
from octavo.core.params import integer
from octavo.core.prompts import MAX_PROMPT
from octavo.core.values import exact_bool, exact_str

if TYPE_CHECKING:
    from concurrent.futures import Future

    from octavo.core.engine_client import EngineClient
    from octavo.frontend import Frontend
    from octavo.margins_request import MarginsRequest


@dataclass(slots=True)
class MarginsAnswer:
    """The answer to one question."""

    question: str
    margins: list[Margin]  # in the order of their segments; those of segments that were not read are missing
    output: CompletionOutput  # empty, with no finish_reason, where no answer was wanted
    prompt_token_ids: list[int]  # of the final prompt; `generate` answers it with the same tokens
    num_segments: int = 0  # of the document that are in this prompt; 0: none, it rests on the margins alone

    @property
    def text(self) -> str:
        return self.output.text

    @property
    def kept(self) -> list[Margin]:
        """The margins that are in the final prompt."""
        return [margin for margin in self.margins if margin.kept]


@dataclass(slots=True)
class MarginsResult:
    """What reading a document with notes in its margins has given."""

    request_id: str
    answers: list[MarginsAnswer]  # one a question
    segments: list[Segment]
    seed: int
    system_fingerprint: str | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))

    @property
    def answer(self) -> MarginsAnswer:
        """The first question's."""
        return self.answers[0]

    @property
    def text(self) -> str:
        return self.answer.text


@dataclass(frozen=True, slots=True)
class MarginsDone:
    """All is answered."""

    result: MarginsResult


class BaseMarginsRun:
    """What the blocking and the asynchronous run share: the result so far, and the checks of what is said to it."""

    def __init__(self, loop: EngineClient, frontend: Frontend, request: MarginsRequest) -> None:
        spec = request.spec
        self._loop = loop
        self._frontend = frontend
        self._spec = spec
        self._margins: list[dict[int, Margin]] = [{} for _ in request.questions]
        self._begun = self._done = False
        self._result = MarginsResult(
            spec.request_id,
            [MarginsAnswer(question, [], CompletionOutput(0, "", []), []) for question in request.questions],
            list(spec.segments),
            spec.seed,
            frontend.system_fingerprint,
        )

    @property
    def request_id(self) -> str:
        return self._spec.request_id

    @property
    def segments(self) -> list[Segment]:
        """Of the document, as it was cut."""
        return list(self._spec.segments)

    def take(self, output: Any) -> Iterator[MarginsEvent | MarginsDone]:
        """What is told, taken into the result. Raises RequestFailedError."""
        if isinstance(output, Exception):
            raise output
        if output.error is not None:
            raise RequestFailedError(output.error)
        for event in output.events:
            self._note(event)
            yield event
        if output.finished:
            self._result.metrics = output.metrics
            for number, answer in enumerate(self._result.answers):
                if answer.output.finish_reason is None and self._spec.answer is not None:
                    answer.output.finish_reason = "abort"  # before it was begun
                answer.output.index = number
            self._done = True
            yield MarginsDone(self._result)

    def _note(self, event: MarginsEvent) -> None:
        answers = self._result.answers
        if isinstance(event, MarginWritten | MarginDecided):
            margins = self._margins[event.margin.question]
            margins[event.margin.segment.index] = event.margin
            answers[event.margin.question].margins = [margin for _, margin in sorted(margins.items())]
        elif isinstance(event, AnswerBegun):
            answers[event.question].prompt_token_ids = list(event.prompt_token_ids)
            answers[event.question].num_segments = event.num_segments
        elif isinstance(event, AnswerDelta):
            new, answer = self._frontend.name_completion(event.output), answers[event.question]
            answer.output = joined_outputs(answer.output, new)

    # --- what is said to it ---

    def _ask(self, verb: Judge | AnswerNow | StopReading) -> Future[list[Any]]:
        return self._loop.call(self.request_id, [verb])

    def _whole(self) -> MarginsResult:
        if not self._done:
            raise RequestFailedError("there is no result: the run failed, or was closed before its end")
        return self._result

    def _check(self, answers: list[Any]) -> None:
        if not answers:
            raise InvalidRequestError("request_id", "has ended" if self._begun else "begins with its first event")
        if isinstance(answers[0], InvalidRequestError):
            raise answers[0]

    def _judging(self, segment: int, question: int, keep: bool, text: str | None = None) -> Judge:
        question = integer("question", question, 0, len(self._result.answers) - 1)
        segment = integer("segment", segment, 0, len(self._spec.segments) - 1)
        if text is not None:
            text = exact_str("text", text).strip()
            if len(text) > MAX_PROMPT:
                raise InvalidRequestError("text", f"may have at most {MAX_PROMPT} characters, not {len(text)}")
            if not text:
                raise InvalidRequestError("text", "is empty: reject the margin instead")
            with_text = self._frontend.codec.encode_inside(text)
            if len(with_text) > self._spec.margin.max_tokens:
                most = self._spec.margin.max_tokens
                problem = f"has {len(with_text)} tokens, and there is room for {most}, those of margin.max_tokens"
                raise InvalidRequestError("text", problem)
        return Judge(question, segment, exact_bool("keep", keep), text)


class MarginsRun(BaseMarginsRun):
    """A document being read: an iterator of what happens, the last of it MarginsDone.

    The request starts with the first `next`; closing the run ends it and frees its blocks. All other methods may be
    called between two events or from another thread. Iterating raises RequestFailedError if the request failed inside
    the engine, EngineClosedError if the LLM was closed; the methods InvalidRequestError for what comes too late.
    """

    def __init__(self, loop: EngineClient, frontend: Frontend, request: MarginsRequest) -> None:
        super().__init__(loop, frontend, request)
        self._events = self._run()

    def _run(self) -> Iterator[MarginsEvent | MarginsDone]:
        outputs = self._loop.run([self._spec])
        self._begun = True
        try:
            for output in outputs:
                yield from self.take(output)
        finally:
            outputs.close()

    def __iter__(self) -> Iterator[MarginsEvent | MarginsDone]:
        return self._events

    def __next__(self) -> MarginsEvent | MarginsDone:
        return next(self._events)

    def result(self) -> MarginsResult:
        """Whatever is left of it, up to the end."""
        for _ in self._events:
            pass
        return self._whole()

    def accept(self, segment: int, question: int = 0) -> None:
        """Keep the margin of a segment, whatever the model said."""
        self._check(self._ask(self._judging(segment, question, True)).result())

    def reject(self, segment: int, question: int = 0) -> None:
        """Leave the margin of a segment out."""
        self._check(self._ask(self._judging(segment, question, False)).result())

    def edit(self, segment: int, text: str, question: int = 0) -> None:
        """Keep the margin of a segment with these words."""
        self._check(self._ask(self._judging(segment, question, True, text)).result())

    def answer_now(self) -> None:
        """Review no more: margins that were not judged stand as the model decided."""
        self._check(self._ask(AnswerNow()).result())

    def stop_reading(self) -> None:
        """Read no further: answer with the segments that are read and the margins that are decided."""
        self._check(self._ask(StopReading()).result())

    def close(self) -> None:
        try:
            self._events.close()  # type: ignore[attr-defined]
        except ValueError:  # another thread waits for an event
            self._loop.abort([self.request_id])

    def __enter__(self) -> MarginsRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncMarginsRun(BaseMarginsRun):
    """`MarginsRun` for asyncio: an asynchronous iterator, and methods to await."""

    def __init__(self, loop: EngineClient, frontend: Frontend, request: MarginsRequest, outputs: Any) -> None:
        """`outputs`: of this request, an asynchronous generator."""
        super().__init__(loop, frontend, request)
        self._outputs = outputs
        self._events = self._run()

    async def _run(self) -> AsyncIterator[MarginsEvent | MarginsDone]:
        self._begun = True
        try:
            async for output in self._outputs:
                for event in self.take(output):
                    yield event
        finally:
            await self._outputs.aclose()

    def __aiter__(self) -> AsyncIterator[MarginsEvent | MarginsDone]:
        return self._events

    async def __anext__(self) -> MarginsEvent | MarginsDone:
        return await self._events.__anext__()

    async def result(self) -> MarginsResult:
        async for _ in self._events:
            pass
        return self._whole()

    async def _say(self, verb: Judge | AnswerNow | StopReading) -> None:
        import asyncio

        self._check(await asyncio.wrap_future(self._ask(verb)))

    async def accept(self, segment: int, question: int = 0) -> None:
        await self._say(self._judging(segment, question, True))

    async def reject(self, segment: int, question: int = 0) -> None:
        await self._say(self._judging(segment, question, False))

    async def edit(self, segment: int, text: str, question: int = 0) -> None:
        await self._say(self._judging(segment, question, True, text))

    async def answer_now(self) -> None:
        await self._say(AnswerNow())

    async def stop_reading(self) -> None:
        await self._say(StopReading())

    async def close(self) -> None:
        await self._events.aclose()  # type: ignore[attr-defined]

    async def __aenter__(self) -> AsyncMarginsRun:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
