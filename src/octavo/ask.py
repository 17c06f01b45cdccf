"""Questions over documents for users: what is told while one is answered, and the result."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from octavo.ask_request import AskMaker, AskOptions, Composed, GivenDocument, given_documents
from octavo.core.ask import Citation, DocumentEvent, IndexProgress, Retrieved, Source
from octavo.core.ask_params import AskParams
from octavo.core.errors import InvalidRequestError, RequestFailedError
from octavo.core.margins import AnswerBegun, AnswerDelta
from octavo.core.outputs import CompletionOutput, RequestMetrics, RequestOutput, joined_outputs
from octavo.core.values import exact_record, is_a
from octavo.margins import BaseMarginsRun, MarginsDone, MarginsResult

if TYPE_CHECKING:
    from octavo.core.engine_client import EngineClient
    from octavo.core.margins import MarginsSpec
    from octavo.core.request import RequestSpec
    from octavo.documents.index import DocumentIndex
    from octavo.documents.readers import Document, Section
    from octavo.frontend import Frontend
    from octavo.margins_request import MarginsRequest

# Numbers in brackets, with what models write beside them: [3], [3, 14], [passages 3 and 14], [3-5], [3, p. 4].
_ONE = (
    r"(?:(?:passages?|notes?|sources?|nos?\.?|#)\s*)?(?<![\w.])\d{1,18}(?:\s*[-\u2013]\s*\d{1,18})?"
    r"(?:,?\s*pp?\.\s*[\d-]+)?"
)
_CITATION = re.compile(rf"[\[\u3010]\s*({_ONE}(?:\s*(?:[,;&]|,?\s*and)\s*{_ONE})*)\s*[\]\u3011]", re.IGNORECASE)
_NUMBER = re.compile(r"pp?\.\s*[\d-]+|(\d+)(?:\s*[-\u2013]\s*(\d+))?", re.IGNORECASE)
_MAX_RANGE = 64  # sources that are cited by their first and last
NOTHING_FOUND = "nothing_found"


@dataclass(slots=True)
class AskResult:
    """The answer to a question over documents.

    Its `output` has the finish_reason "nothing_found", and no text, where no passage of a folder has a word of the
    question, or no note of several documents was kept: the model was not asked then.
    """

    request_id: str
    question: str
    output: CompletionOutput = field(default_factory=lambda: CompletionOutput(0, "", []))
    sources: list[Source] = field(default_factory=list)  # what the answer may rest on, in the order of the prompt
    citations: list[Citation] = field(default_factory=list)  # as they stand in the text, checked to exist or not
    prompt_token_ids: list[int] = field(default_factory=list)
    passages: list[Source] = field(default_factory=list)  # that were found, best first
    num_left_out: int = 0  # sources that did not fit the model's context
    problems: list[tuple[str, str]] = field(default_factory=list)  # files that cannot be read, and why
    readings: list[tuple[str, MarginsResult]] = field(default_factory=list)  # documents read in the margins way
    seed: int = 0
    system_fingerprint: str | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))  # from the question to the answer

    @property
    def text(self) -> str:
        return self.output.text

    @property
    def cited(self) -> list[Source]:
        """Sources that the answer cites, each once, in the order in which it does."""
        found = {one.number: one.source for one in self.citations if one.source is not None}
        return list(found.values())


@dataclass(frozen=True, slots=True)
class AskDone:
    """All is answered."""

    result: AskResult


AskEvent = IndexProgress | Retrieved | DocumentEvent | AnswerBegun | AnswerDelta | AskDone


def citations_in(text: str, sources: Sequence[Source]) -> list[Citation]:
    """Numbers in brackets, such as [3], [3, 14] or [3-5], and which of the sources they are."""
    by_number = {source.number: source for source in sources}
    found = []
    for group in _CITATION.finditer(text):
        for match in _NUMBER.finditer(group[1]):
            if match[1] is None:
                continue  # a page
            start, stop = group.start(1) + match.start(), group.start(1) + match.end()
            first = int(match[1])
            last = first if match[2] is None else int(match[2])
            numbers = range(first, last + 1) if 0 <= last - first < _MAX_RANGE else (first, last)
            found += [Citation(start, stop, number, by_number.get(number)) for number in numbers]
    return found


# --- what the steps ask of whoever runs them ---


class _Work(NamedTuple):
    """Call this where it may take a while, and send what it returns."""

    call: Callable[[], Any]


class _Begin(NamedTuple):
    """Add these requests; ended when the run is."""

    specs: Sequence[RequestSpec | MarginsSpec]


class _Next(NamedTuple):
    """Send the next output of what was begun last; None behind the last one."""


_Steps = Generator[AskEvent | _Work | _Begin | _Next, Any, None]


class _Whole(NamedTuple):
    """A document that is read from its beginning to its end."""

    name: str
    document: Document


class BaseAskRun:
    """What the blocking and the asynchronous run share: all but how they wait.

    Args:
        docs: a folder, or a file.
        documents: instead of it, ``[{"id": ..., "title": ..., "text": ...}]``.
        index_path: of the folder's index, if not in the folder.
        update_index: bring it up to date first.

    Raises InvalidRequestError.
    """

    def __init__(
        self,
        loop: EngineClient,
        frontend: Frontend,
        question: str,
        params: AskParams | None,
        *,
        docs: str | Path | None,
        documents: Any,
        index_path: str | Path | None,
        update_index: bool,
        request_id: str | None,
        options: AskOptions,
    ) -> None:
        self._loop = loop
        self._frontend = frontend
        self._params = AskParams() if params is None else exact_record("params", params, AskParams)
        if (docs is None) == (documents is None):
            raise InvalidRequestError("docs", "give either docs, a folder or a file, or documents")
        self._given: list[GivenDocument] = [] if documents is None else given_documents(documents)
        self._docs = None if docs is None else _path("docs", docs)
        self._index_path = None if index_path is None else _path("index_path", index_path)
        if self._index_path is not None and (self._docs is None or not self._docs.is_dir()):
            raise InvalidRequestError("index_path", "has no effect without a folder")
        self._update_index = update_index
        self._maker = AskMaker(frontend, question, self._params, options)
        self._cache_salt = self._maker.salt
        self._began = frontend.clock()
        self._result = AskResult(
            frontend.request_id(request_id),
            self._maker.question,
            seed=self._maker.seed,
            system_fingerprint=frontend.system_fingerprint,
            metrics=RequestMetrics(self._began),
        )
        self._done = False
        self._closed = False
        self._running: list[str] = []  # ids of requests

    @property
    def request_id(self) -> str:
        return self._result.request_id

    def stop(self) -> None:
        """End it from anywhere: whoever iterates gets no more. Idempotent, and waits for nothing."""
        self._closed = True
        self._loop.abort(self._running)

    def _goes_on(self) -> bool:
        """Raises EngineClosedError."""
        self._loop.check_open()
        return not self._closed

    def _whole(self) -> AskResult:
        if not self._done:
            raise RequestFailedError("there is no result: the run failed, or was closed before its end")
        return self._result

    # --- from the question to the answer ---

    def _steps(self) -> _Steps:
        only = yield _Work(self._only_document)
        if only is not None and self._params.margins is not None:
            yield from self._read_and_answer(only)
        else:
            found = yield from self._retrieve(only)
            yield Retrieved(tuple(self._result.passages), tuple(self._result.problems))
            if found and self._params.margins is not None:
                documents = yield _Work(partial(self._documents_of, self._result.passages))
                found = yield from self._read_all(documents)
            if found:
                yield from self._answer(found)
            else:
                self._result.output.finish_reason = NOTHING_FOUND
        result = self._result
        result.citations = citations_in(result.text, result.sources)
        result.metrics.finished_time = self._frontend.clock()
        self._done = True
        yield AskDone(result)

    def _only_document(self) -> _Whole | None:
        """The document, where there is one and no folder."""
        if self._docs is not None and not self._docs.is_dir():
            from octavo.documents.index import name_of
            from octavo.documents.readers import read

            return _Whole(name_of(Path(self._docs.name)), read(self._docs))
        return self._given_document(self._given[0]) if len(self._given) == 1 else None

    @staticmethod
    def _given_document(given: GivenDocument) -> _Whole:
        from octavo.documents.readers import Document, Section, shortened_heading

        title = shortened_heading(given.title)
        return _Whole(given.id, Document(title, (Section(given.text, (title,) if title else ()),)))

    # --- retrieval ---

    def _retrieve(self, only: _Whole | None) -> Generator[Any, Any, list[Source]]:
        index: DocumentIndex = yield _Work(partial(self._open_index, only))
        try:
            updates = index.updates() if self._update_index else iter(())
            while (progress := (yield _Work(partial(next, updates, None)))) is not None:
                yield progress
            self._result.problems = yield _Work(index.problems)
            self._result.passages = yield _Work(partial(self._search, index))
        finally:
            index.close()
        return self._result.passages

    def _open_index(self, only: _Whole | None) -> DocumentIndex:
        from octavo.documents.index import DocumentIndex

        folder = self._docs if only is None else None
        index = DocumentIndex(
            folder,
            self._frontend.codec,
            self._params.passage_tokens,
            self._index_path,
            update=self._update_index,
        )
        wholes = [self._given_document(one) for one in self._given] if only is None else [only]
        try:
            for whole in wholes:
                index.add(whole.name, whole.document)
        except BaseException:
            index.close()
            raise
        return index

    def _search(self, index: DocumentIndex) -> list[Source]:
        most = self._params.num_passages
        found = index.search(self._maker.question, most)
        if index.folder is None and len(found) < most:  # documents that were given are meant
            known = {passage.number for passage in found}
            found += [one for one in index.first(most) if one.number not in known][: most - len(found)]
        return found

    # --- the margins way ---

    def _documents_of(self, passages: Sequence[Source]) -> list[_Whole]:
        """The documents that the best passages are from."""
        from octavo.documents.index import path_of
        from octavo.documents.readers import DocumentError, read

        by_id = {one.id: one for one in self._given}
        found = []
        for name in list(dict.fromkeys(one.document for one in passages))[: self._params.num_documents]:
            if self._docs is None:
                found.append(self._given_document(by_id[name]))
                continue
            try:
                path = path_of(str(self._docs / name))
                if not path.resolve().is_relative_to(self._docs.resolve()):
                    raise DocumentError(path, "is not in the folder")  # an index may hold anything
                found.append(_Whole(name, read(path)))
            except DocumentError as error:  # since the index was made
                self._result.problems.append((name, error.problem))
        return found

    def _read_and_answer(self, whole: _Whole) -> Generator[Any, Any, None]:
        """One document: the answer goes on from it."""
        (run,), (sections,) = yield from self._begin_reading([whole], alone=True)
        while (output := (yield _Next())) is not None:
            for event in run.take(output):
                if isinstance(event, MarginsDone):
                    answer = event.result.answer
                    self._result.sources = _notes(whole, event.result, sections)
                    self._result.output = answer.output
                    self._result.prompt_token_ids = answer.prompt_token_ids
                    self._result.readings.append((whole.name, event.result))
                    self._result.metrics = replace(event.result.metrics, arrival_time=self._began)
                else:
                    told = isinstance(event, AnswerBegun | AnswerDelta)
                    yield event if told else DocumentEvent(whole.name, event)

    def _read_all(self, wholes: Sequence[_Whole]) -> Generator[Any, Any, list[Source]]:
        """Several documents, side by side: the notes that were kept, the best first."""
        if not wholes:
            return []
        runs, starts = yield from self._begin_reading(wholes, alone=False)
        number_of = {run.request_id: number for number, run in enumerate(runs)}
        results: dict[int, MarginsResult] = {}
        while (output := (yield _Next())) is not None:
            if isinstance(output, Exception):
                raise output
            number = number_of[output.request_id]
            for event in runs[number].take(output):
                if isinstance(event, MarginsDone):
                    results[number] = event.result
                else:
                    yield DocumentEvent(wholes[number].name, event)
        notes: list[Source] = []
        for number, whole in enumerate(wholes):
            self._result.readings.append((whole.name, results[number]))
            self._add_metrics(results[number].metrics)
            for note in _notes(whole, results[number], starts[number]):
                notes.append(replace(note, number=len(notes) + 1))
        return notes

    def _begin_reading(
        self, wholes: Sequence[_Whole], *, alone: bool
    ) -> Generator[Any, Any, tuple[list[BaseMarginsRun], list[list[tuple[int, Section]]]]]:
        runs, starts, specs = [], [], []
        for whole in wholes:
            text, sections = whole.document.written()
            request: MarginsRequest = yield _Work(partial(self._make_reading, whole, text, alone))
            runs.append(BaseMarginsRun(self._loop, self._frontend, request))
            starts.append(sections)
            specs.append(request.spec)
        yield self._begin(specs)
        return runs, starts

    def _begin(self, specs: Sequence[RequestSpec | MarginsSpec]) -> _Begin:
        self._running = [spec.request_id for spec in specs]
        return _Begin(specs)

    def _make_reading(self, whole: _Whole, text: str, alone: bool) -> MarginsRequest:
        try:
            return self._maker.read(text, alone=alone, request_id=self.request_id if alone else None)
        except InvalidRequestError as error:
            if error.field == "document":
                raise InvalidRequestError(f"document {whole.name}", error.problem) from None
            raise

    def _add_metrics(self, of_reading: RequestMetrics) -> None:
        metrics = self._result.metrics
        metrics.num_cached_tokens += of_reading.num_cached_tokens
        metrics.num_generated_tokens += of_reading.num_generated_tokens

    # --- the answer ---

    def _answer(self, found: Sequence[Source]) -> Generator[Any, Any, None]:
        composed: Composed = yield _Work(partial(self._compose, found))
        request, result = composed.request, self._result
        result.sources, result.num_left_out = list(composed.sources), composed.num_left_out
        result.prompt_token_ids = list(request.spec.prompt_token_ids)
        read = self._frontend.reader(request)
        yield self._begin([request.spec])
        yield AnswerBegun(0, request.spec.prompt_token_ids, 0)
        output: RequestOutput | Exception | None
        while (output := (yield _Next())) is not None:
            if isinstance(output, Exception):
                raise output
            if output.error is not None:
                raise RequestFailedError(output.error)
            new = read(output).outputs[0]
            result.output = joined_outputs(result.output, new)
            yield AnswerDelta(0, new)
            if output.finished:
                self._add_metrics(output.metrics)
                for name in ("first_scheduled_time", "first_token_time"):
                    setattr(result.metrics, name, getattr(output.metrics, name))

    def _compose(self, found: Sequence[Source]) -> Composed:
        order = None
        if self._params.order == "cache":

            def order(prefix: Sequence[int], parts: Sequence[Sequence[int]]) -> list[int]:
                asked = self._loop.cache_order(prefix, parts, self._cache_salt)
                return asked.result()

        return self._maker.answer(found, order, self.request_id)


def _path(field_name: str, value: Any) -> Path:
    if not is_a(value, (str, Path)):
        raise InvalidRequestError(field_name, f"must be a path, not {type(value).__name__}")
    if not str(value):
        raise InvalidRequestError(field_name, "is empty")
    path = Path(value)
    if "\0" in str(path):
        raise InvalidRequestError(field_name, "must not hold a NUL character")
    try:
        path.exists()
    except OSError as error:
        raise InvalidRequestError(field_name, f"cannot be looked at: {error.strerror or error}") from None
    return path


def _notes(whole: _Whole, result: MarginsResult, sections: Sequence[tuple[int, Section]]) -> list[Source]:
    """The margins that were kept, as sources: each is from where its segment begins."""
    starts = [start for start, _ in sections]
    found = []
    for margin in result.answer.kept:
        segment = margin.segment
        section = sections[max(bisect_right(starts, segment.start) - 1, 0)][1]
        found.append(
            Source(
                segment.index + 1,
                "note",
                whole.name,
                whole.document.title,
                section.headings,
                section.page,
                segment.index,
                margin.text,
                margin.score,
            )
        )
    return found


class AskRun(BaseAskRun):
    """A question being answered: an iterator of what happens, the last of it AskDone.

    Nothing happens before the first `next`; closing the run ends it and frees its blocks. Iterating raises
    DocumentError where documents cannot be read or the index cannot be used, InvalidRequestError for what does not fit
    the model, RequestFailedError if a request failed inside the engine, EngineClosedError if the LLM was closed.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._events = self._run()

    def _run(self) -> Iterator[AskEvent]:
        steps = self._steps()
        outputs: Any = None
        answer: Any = None
        try:
            while self._goes_on():
                try:
                    step = steps.send(answer)
                except StopIteration:
                    return
                answer = None
                if isinstance(step, _Work):
                    answer = step.call()
                elif isinstance(step, _Begin):
                    outputs = self._loop.run(step.specs)
                elif isinstance(step, _Next):
                    answer = next(outputs, None)
                else:
                    yield step
        finally:
            if outputs is not None:
                outputs.close()
            steps.close()

    def __iter__(self) -> Iterator[AskEvent]:
        return self._events

    def __next__(self) -> AskEvent:
        return next(self._events)

    def result(self) -> AskResult:
        """Whatever is left of it, up to the end."""
        for _ in self._events:
            pass
        return self._whole()

    def close(self) -> None:
        try:
            self._events.close()  # type: ignore[attr-defined]
        except ValueError:  # another thread waits for an event
            self.stop()

    def __enter__(self) -> AskRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncAskRun(BaseAskRun):
    """`AskRun` for asyncio: an asynchronous iterator, and methods to await."""

    def __init__(self, *args: Any, outputs_of: Callable[..., Any], **options: Any) -> None:
        """`outputs_of`: requests, an asynchronous generator."""
        super().__init__(*args, **options)
        self._outputs_of = outputs_of
        self._events = self._run()

    async def _run(self) -> AsyncIterator[AskEvent]:
        steps = self._steps()
        outputs: Any = None
        answer: Any = None
        try:
            while self._goes_on():
                try:
                    step = steps.send(answer)
                except StopIteration:
                    return
                answer = None
                if isinstance(step, _Work):
                    answer = await _in_thread(step.call)
                elif isinstance(step, _Begin):
                    outputs = self._outputs_of(*step.specs)
                elif isinstance(step, _Next):
                    answer = await anext(outputs, None)
                else:
                    yield step
        finally:
            if outputs is not None:
                await outputs.aclose()
            steps.close()

    def __aiter__(self) -> AsyncIterator[AskEvent]:
        return self._events

    async def __anext__(self) -> AskEvent:
        return await anext(self._events)

    async def result(self) -> AskResult:
        async for _ in self._events:
            pass
        return self._whole()

    async def close(self) -> None:
        try:
            await self._events.aclose()  # type: ignore[attr-defined]
        except RuntimeError:  # another task waits for an event
            self.stop()

    async def __aenter__(self) -> AsyncAskRun:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


async def _in_thread(call: Callable[[], Any]) -> Any:
    """What it returns. Where the caller goes away it is waited for: an index is not to be closed under its hands."""
    import asyncio

    working = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        while not working.done():
            with suppress(asyncio.CancelledError):  # again
                await asyncio.wait([working])
        working.exception()
        raise
