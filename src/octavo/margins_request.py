"""From a document and questions about it to a request for Writing in the Margins: checked, cut and tokenised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from octavo.core.errors import InvalidRequestError
from octavo.core.margins import MarginsSpec, Question, Segment
from octavo.core.margins_params import MarginsParams
from octavo.core.params import SamplingParams
from octavo.core.prompts import filled
from octavo.core.request import RequestSpec
from octavo.core.values import exact_list, exact_record, exact_str, is_a
from octavo.framing import Framing, check_no_marks, hole, naming
from octavo.frontend import Frontend, checked_salt, renaming
from octavo.text.segments import split

MAX_QUESTIONS = 64
_MAX_BRANCHES = 16  # more would evict each other
_CONTEXT = 64  # tokens before a text that decide how it is tokenised
_VERDICT_TOKENS = 10
_VERDICT = SamplingParams(temperature=0.0, max_tokens=_VERDICT_TOKENS)
_WORDS = ("YES", "Yes", "yes"), ("NO", "No", "no")

# Stand in a prompt for what is put there later, while the chat template is put around it.
_DOCUMENT = hole("the document")
_MARGINS = hole("the margins")


class MarginsRequest(NamedTuple):
    """What goes to the engine, and the questions' texts, which do not."""

    spec: MarginsSpec
    questions: tuple[str, ...]


def make_margins(
    frontend: Frontend,
    document: str,
    questions: str | Sequence[str],
    params: MarginsParams,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    priority: int = 0,
    cache_salt: str | None = None,
    request_id: str | None = None,
) -> MarginsRequest:
    """Raises InvalidRequestError naming the field at fault."""
    params = exact_record("params", params, MarginsParams)
    text = exact_str("document", document)
    if not text.strip():
        raise InvalidRequestError("document", "is empty")
    asked = _questions(questions)
    maker = _Maker(frontend, params, chat_template, chat_template_kwargs)
    frames = [maker.frames(question) for question in asked]
    if len({one.before for one in frames}) > 1:
        raise InvalidRequestError("chat_template", "writes something else before the document for each question")
    prefix = maker.prefix(frames)
    segments, document_ids = maker.segments(prefix, text)
    extracts = [maker.extracts(one, prefix, document_ids, segments) for one in frames]
    longest = max(len(token_ids) for extract in extracts for token_ids in extract)
    windows = maker.windows(len(prefix), segments, longest, frames)
    made = [maker.question(*one, in_windows=len(windows) > 1) for one in zip(frames, extracts, strict=True)]
    yes, no = maker.verdict_ids()
    seed = frontend.seed(params.seed)
    identity = frontend.request_id(request_id)

    def drawn(name: str, sampling: SamplingParams, max_tokens: int) -> RequestSpec:
        with naming(name):
            fields = frontend.checked_fields(sampling)
        return RequestSpec(identity, (), sampling, seed, max_tokens, priority=priority, **fields)

    margin = params.margin
    assert margin.max_tokens is not None
    before, _, after = params.texts.margin.partition("{margin}")
    spec = MarginsSpec(
        request_id=identity,
        seed=seed,
        prefix=tuple(prefix),
        segments=tuple(segments),
        document=tuple(document_ids),
        windows=windows,
        questions=tuple(made),
        margin=drawn("margin", margin, margin.max_tokens),
        verdict=drawn("classification", _VERDICT, _VERDICT_TOKENS),
        answer=None if params.answer is None else drawn("answer", params.answer, frontend.limits.max_model_len),
        max_answer_tokens=None if params.answer is None else params.answer.max_tokens,
        classification=params.classification,
        yes=yes,
        no=no,
        threshold=params.threshold,
        early_exit_kept=params.early_exit_kept,
        early_exit_score=params.early_exit_score,
        overlap=params.overlap,
        review=params.review,
        # Each takes a row of a step: others, and the trunk, are to have most of them.
        max_branches=max(1, min(_MAX_BRANCHES, frontend.limits.max_num_seqs // 4)),
        margin_before=before,
        margin_after=after,
        priority=frontend.priority(priority),
        cache_salt=checked_salt(cache_salt),
        arrival_time=frontend.clock(),
    )
    return MarginsRequest(spec, asked)


def _questions(given: Any) -> tuple[str, ...]:
    if is_a(given, str):
        return (checked_question("question", given),)
    what = "must be a question, or a list of them"
    listed = exact_list("question", given, what)
    if not 1 <= len(listed) <= MAX_QUESTIONS:
        raise InvalidRequestError("question", f"from 1 to {MAX_QUESTIONS} may be asked at once, not {len(listed)}")
    return tuple(checked_question(f"question[{number}]", one) for number, one in enumerate(listed))


def checked_question(field: str, value: Any) -> str:
    """Raises InvalidRequestError."""
    text = exact_str(field, value)
    if not text.strip():
        raise InvalidRequestError(field, "is empty")
    return text


class _Frames(NamedTuple):
    """The texts around a document, its margins and a question, as the model sees them."""

    before: str  # the document
    extract: str  # behind a segment
    classify: tuple[str, str]  # around a margin; empty if that is not asked so
    answer: tuple[str, str]  # around the margins, behind the document
    answer_without: str
    alone: tuple[str, str]  # the same of a final prompt without the document
    alone_without: str


class _Maker:
    def __init__(
        self, frontend: Frontend, params: MarginsParams, chat_template: Any, variables: Mapping[str, Any] | None
    ) -> None:
        self.frontend = frontend
        self.params = params
        self.prompts = params.texts
        self._framing = Framing(frontend, params.apply_chat_template, self.prompts.system, chat_template, variables)

    # --- texts ---

    def frames(self, question: str) -> _Frames:
        texts = self.prompts
        check_no_marks("question", question)
        opening, _, closing = texts.document.partition("{document}")
        merged = self.params.classification == "merged"
        extract = filled(texts.extract_merged if merged else texts.extract, question=question)
        answer, without, alone, alone_without = (
            filled(text, question=question, margins=_MARGINS)
            for text in (texts.answer, texts.answer_without, texts.answer_alone, texts.answer_alone_without)
        )
        head, behind = self._around(opening, closing + extract)
        heads, parts = [head], [behind]
        for text in (answer, without):
            head, behind = self._around(opening, closing + text)
            heads.append(head)
            parts.append(behind)
        if len(set(heads)) > 1:
            problem = "writes something else before the document depending on what is behind it"
            raise InvalidRequestError("chat_template", problem)
        classify = ("", "")
        if not merged:
            classify = self._framing.parted(
                self._framing.written(filled(texts.classify, question=question, margin=_MARGINS)), _MARGINS
            )
        return _Frames(
            heads[0],
            parts[0],
            classify,
            self._framing.parted(parts[1], _MARGINS),
            parts[2],
            self._framing.parted(self._framing.written(alone), _MARGINS),
            self._framing.written(alone_without),
        )

    def _around(self, opening: str, rest: str) -> tuple[str, str]:
        return self._framing.parted(self._framing.written(opening + _DOCUMENT + rest), _DOCUMENT)

    # --- tokens ---

    def prefix(self, frames: Sequence[_Frames]) -> list[int]:
        token_ids = self._framing.start(frames[0].before)
        self.frontend.tokens.check_spelt("prompts.document", token_ids)
        return token_ids

    def segments(self, prefix: Sequence[int], text: str) -> tuple[list[Segment], list[int]]:
        frontend, most = self.frontend, self.frontend.limits.max_model_len
        if not self.params.windows:
            try:
                frontend.tokens.check_beginning("document", text, most)
            except InvalidRequestError as error:
                raise InvalidRequestError("document", f"{error.problem}. windows=True reads it in parts") from None
        with renaming("document"):
            parts = split(frontend.codec, prefix, text, self.params.segment_tokens)
        token_ids: list[int] = []
        segments = []
        for index, part in enumerate(parts):
            first = len(token_ids)
            token_ids += part.token_ids
            segments.append(Segment(index, part.start, part.stop, first, len(token_ids)))
        if not token_ids:
            raise InvalidRequestError("document", "has no tokens")
        frontend.tokens.check_spelt("document", token_ids)
        return segments, token_ids

    def extracts(
        self, frames: _Frames, prefix: Sequence[int], document: Sequence[int], segments: Sequence[Segment]
    ) -> tuple[tuple[int, ...], ...]:
        """Tokens that ask for a margin, behind each segment."""
        found = []
        for segment in segments:
            last = segment.last_token
            before = [*prefix[-_CONTEXT:], *document[max(last - _CONTEXT, 0) : last]]
            token_ids = self.frontend.codec.encode_following(before, frames.extract)
            self.frontend.tokens.check_spelt("question", token_ids)
            found.append(tuple(token_ids))
        return tuple(found)

    def windows(
        self, num_prefix: int, segments: Sequence[Segment], longest: int, frames: Sequence[_Frames]
    ) -> tuple[int, ...]:
        """Numbers of segments that are read together. Raises InvalidRequestError where something cannot fit."""
        context, margin = self.frontend.limits.max_model_len, self.params.margin.max_tokens or 0
        total = segments[-1].last_token
        reading = num_prefix + longest + margin  # besides the document
        kept = min(len(segments), self.params.early_exit_kept or len(segments))
        encode = self.frontend.codec.encode_inside
        around = len(encode(filled(self.prompts.margin, margin="", number=str(len(segments))))) + 1
        joined = kept * (margin + around)

        def final(texts: Callable[[_Frames], tuple[str, str]]) -> int:
            return max(len(encode(before)) + len(encode(after)) for before, after in map(texts, frames))

        wants_answer = self.params.answer is not None
        answering = num_prefix + final(lambda one: one.answer) + joined + 1 if wants_answer else 0
        sums = f"{num_prefix} before it, {kept} margins of at most {margin} + {around} tokens"
        if total + max(reading, answering) <= context:
            self._check_answer(context - total - answering + 1)
            return (len(segments),)
        if not self.params.windows:
            longer = max(reading, answering)
            raise InvalidRequestError(
                "document",
                f"has {total} tokens; with {sums}, the prompts and an answer of at least one token that is "
                f"{total + longer}, and max_model_len is {context}. windows=True reads it in parts",
            )
        room = context - reading
        largest = max(one.last_token - one.first_token for one in segments)
        if largest > room:
            problem = (
                f"a segment of {largest} tokens does not fit: max_model_len={context} leaves room for {max(room, 0)}"
            )
            raise InvalidRequestError("segment_tokens", problem)
        alone = len(self._framing.start("")) + final(lambda one: one.alone) + joined + 1 if wants_answer else 0
        if alone > context:
            raise InvalidRequestError(
                "document",
                f"has {len(segments)} segments; a final prompt with {kept} margins of at most {margin} + {around} "
                f"tokens may have {alone}, and max_model_len is {context}: give longer segments, shorter margins, or "
                "early_exit_kept",
            )
        self._check_answer(context - alone + 1)
        counts, first = [0], 0
        for one in segments:
            if one.last_token - first > room:
                counts.append(0)
                first = one.first_token
            counts[-1] += 1
        return tuple(counts)

    def _check_answer(self, room: int) -> None:
        least = 0 if self.params.answer is None else self.params.answer.min_tokens
        if least > room:
            raise InvalidRequestError("answer.min_tokens", f"{least} do not fit: there may be room for {room}")

    def question(self, frames: _Frames, extract: tuple[tuple[int, ...], ...], *, in_windows: bool) -> Question:
        before, after = frames.classify
        classify = self._framing.start(before) if before or after else []
        self.frontend.tokens.check_spelt("prompts.classify", classify)
        rest = len(self.frontend.codec.encode_inside(after)) + (self.params.margin.max_tokens or 0)
        total, context = len(classify) + rest + _VERDICT_TOKENS, self.frontend.limits.max_model_len
        if classify and total > context:
            problem = (
                f"with the question, a margin and a verdict may have {total} tokens, and max_model_len is {context}"
            )
            raise InvalidRequestError("prompts.classify", problem)
        answer = frames.alone if in_windows else frames.answer
        return Question(
            extract=extract,
            classify_before=tuple(classify),
            classify_after=after,
            answer_before=answer[0],
            answer_after=answer[1],
            answer_without=frames.alone_without if in_windows else frames.answer_without,
            start=tuple(self._framing.start("")) if in_windows else None,
        )

    def verdict_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens that are YES, and that are NO, with and without a space before them; for a model that has none of
        these, those that they begin with."""
        if self.params.classification != "score":
            return (), ()
        found = []
        for words in _WORDS:
            spelt = [self.frontend.codec.encode_inside(space + word) for word in words for space in ("", " ")]
            spelt = [ids for ids in spelt if ids and max(ids) < self.frontend.limits.vocab_size]
            found.append({ids[0] for ids in spelt if len(ids) == 1} or {ids[0] for ids in spelt})
        yes, no = (ids - found[1 - number] for number, ids in enumerate(found))  # a space alone tells nothing
        if not yes or not no:
            problem = "'score' needs tokens that tell YES from NO, and this model has none: choose 'text' or 'merged'"
            raise InvalidRequestError("classification", problem)
        return tuple(sorted(yes)), tuple(sorted(no))
