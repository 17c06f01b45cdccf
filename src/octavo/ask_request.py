"""From a question and what its answer may rest on to requests: checked, put together and tokenised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from octavo.core.ask import Source
from octavo.core.ask_params import AskParams
from octavo.core.errors import InvalidRequestError
from octavo.core.margins_params import MarginsParams, MarginsPrompts
from octavo.core.params import OutputKind
from octavo.core.prompts import filled
from octavo.core.values import check_unicode, exact_fields, exact_list, exact_str
from octavo.framing import Framing, check_no_marks, hole, naming
from octavo.frontend import Frontend, Request, checked_salt
from octavo.margins_request import MarginsRequest, checked_question, make_margins

MAX_DOCUMENTS = 1 << 16
_SOURCES = hole("the sources")
_DEFAULTS = MarginsPrompts()
# What the margins of one document are in a final prompt that asks for citations.
_NUMBERED = {
    "margin": "[{number}] {margin}\n",
    "answer": (
        "These notes were taken while the document was read. Each begins with its number in brackets.\n\n{margins}\n"
        "Answer the question with the help of the document and the notes. Behind each statement give the number of the "
        "note that says it, in brackets.\n\nQuestion: {question}"
    ),
    "answer_alone": (
        "These notes were taken while a long document was read. Each begins with its number in brackets.\n\n{margins}\n"
        "Answer the question with the help of the notes. Behind each statement give the number of the note that says "
        "it, in brackets.\n\nQuestion: {question}"
    ),
}

Order = Callable[[Sequence[int], Sequence[Sequence[int]]], list[int]]  # of parts behind a prefix


@dataclass(frozen=True, slots=True)
class GivenDocument:
    """One of the ``documents`` of a request."""

    id: str
    title: str
    text: str


def given_documents(value: Any) -> list[GivenDocument]:
    """Of ``[{"id": ..., "title": ..., "text": ...}]``. Raises InvalidRequestError naming the field at fault."""
    what = 'must be a list of {"id": ..., "title": ..., "text": ...}'
    listed = exact_list("documents", value, what)
    if not 1 <= len(listed) <= MAX_DOCUMENTS:
        raise InvalidRequestError("documents", f"from 1 to {MAX_DOCUMENTS} may be given, not {len(listed)}")
    found: dict[str, GivenDocument] = {}
    for number, one in enumerate(listed):
        field = f"documents[{number}]"
        given = exact_fields(field, one, 'must be {"id": ..., "title": ..., "text": ...}')
        if unknown := given.keys() - {"id", "title", "text"}:
            raise InvalidRequestError(field, f'allowed keys are "id", "title" and "text", not {sorted(unknown)}')
        if "text" not in given:
            raise InvalidRequestError(field, 'must have a "text"')
        text = exact_str(f"{field}.text", given["text"])
        id_ = exact_str(f"{field}.id", given.get("id", str(number + 1)))
        title = exact_str(f"{field}.title", given.get("title", ""))
        for name, part in (("id", id_), ("title", title), ("text", text)):
            check_unicode(f"{field}.{name}", part)
        if not id_.strip():
            raise InvalidRequestError(f"{field}.id", "is empty")
        if id_ in found:
            raise InvalidRequestError(f"{field}.id", f"{id_!r} is another document's as well")
        if not text.strip():
            raise InvalidRequestError(f"{field}.text", "is empty")
        found[id_] = GivenDocument(id_, title, text)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Composed:
    """A request for an answer, and what it rests on."""

    request: Request
    sources: tuple[Source, ...]  # in the order of the prompt
    num_left_out: int  # that did not fit


@dataclass(frozen=True, slots=True)
class AskOptions:
    """What is the same for all requests of one question."""

    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    priority: int = 0
    cache_salt: str | None = None


class AskMaker:
    """Makes the requests of one question. Raises InvalidRequestError naming the field at fault: here, of what can be
    checked before a document is looked at."""

    def __init__(self, frontend: Frontend, question: Any, params: AskParams, options: AskOptions) -> None:
        self.frontend = frontend
        self.question = checked_question("question", question)
        check_no_marks("question", self.question)
        check_unicode("question", self.question)
        self.params = params
        self.options = options
        self.seed = frontend.seed(params.seed)
        self.salt = checked_salt(options.cache_salt)
        frontend.priority(options.priority)
        with naming("answer"):
            frontend.checked_fields(params.answer)
        self._framing = Framing(
            frontend,
            params.apply_chat_template,
            params.texts.system,
            options.chat_template,
            options.chat_template_kwargs,
        )
        self._frame("answer")

    # --- passages, and notes ---

    def answer(self, sources: Sequence[Source], order: Order | None, request_id: str | None) -> Composed:
        """A request that answers from sources, which come best first. Those that do not fit beside better ones are left
        out; those that do stand in the prompt in the order of their documents, or in that of the cache."""
        notes = any(source.kind == "note" for source in sources)
        before, after = self._frame("answer_from_notes" if notes else "answer")
        codec, limits = self.frontend.codec, self.frontend.limits
        template = self.params.texts.note if notes else self.params.texts.passage
        # Each is tokenised by itself, so that its tokens are the same wherever it stands.
        prefix = self._framing.start(before)
        parts = [codec.encode_plain(self._written(template, source)) for source in sources]
        rest = codec.encode_inside(after)
        self.frontend.tokens.check_spelt("question", rest)
        around, most, least = len(prefix) + len(rest), limits.max_model_len, self._least_answer()
        room = most - around - least
        kept = []
        for number, part in enumerate(parts):
            if len(part) <= room:
                room -= len(part)
                kept.append(number)
        if not kept:
            sums = f"with max_model_len={most} and an answer of {least} tokens"
            if room <= 0:
                raise InvalidRequestError("question", f"and the prompt have {around} tokens; {sums} they do not fit")
            problem = (
                f"the question with one {'note' if notes else 'passage'} has {around + min(map(len, parts))} tokens"
            )
            field = "margins.margin.max_tokens" if notes else "passage_tokens"
            raise InvalidRequestError(field, f"{problem}; {sums} it does not fit")
        by_document = sorted(kept, key=lambda i: (sources[i].document, sources[i].index, sources[i].number))
        chosen = [sources[i] for i in by_document]
        tokens = [parts[i] for i in by_document]
        if order is not None:
            places = order(prefix, tokens)
            chosen, tokens = [chosen[i] for i in places], [tokens[i] for i in places]
        token_ids = [*prefix, *(token_id for part in tokens for token_id in part), *rest]
        params = self.params.answer.but(output_kind=OutputKind.DELTA)
        prompt: dict[str, Any] = {"prompt_token_ids": token_ids}
        if self.salt is not None:
            prompt["cache_salt"] = self.salt
        with naming("answer"):
            request = self.frontend.make(prompt, params, request_id, self.options.priority)
        request = replace(request, spec=replace(request.spec, seed=self.seed))
        return Composed(request, tuple(chosen), len(sources) - len(kept))

    def _least_answer(self) -> int:
        """Tokens that room is kept for."""
        wanted = self.params.answer.max_tokens
        most = self.frontend.limits.max_model_len // 4
        return max(1, self.params.answer.min_tokens, most if wanted is None else min(wanted, most))

    def _written(self, template: str, source: Source) -> str:
        return filled(template, number=str(source.number), place=source.place, text=source.text)

    def _frame(self, name: str) -> tuple[str, str]:
        """Text around the sources."""
        text = filled(getattr(self.params.texts, name), question=self.question, passages=_SOURCES)
        return self._framing.parted(self._framing.written(text), _SOURCES)

    # --- documents ---

    def read(self, text: str, *, alone: bool, request_id: str | None = None) -> MarginsRequest:
        """A request that reads a document in the margins way. `alone`: and answers the question, since it is the only
        one."""
        assert self.params.margins is not None
        given: MarginsParams = self.params.margins
        prompts = replace(given.texts, system=self.params.texts.system)
        if alone:
            own = {name: text for name, text in _NUMBERED.items() if getattr(prompts, name) == getattr(_DEFAULTS, name)}
            prompts = replace(prompts, **own)
        params = given.but(
            answer=self.params.answer if alone else None,
            review=given.review and alone,
            apply_chat_template=self.params.apply_chat_template,
            prompts=prompts,
            seed=self.seed,
        )
        options = self.options
        return make_margins(
            self.frontend,
            text,
            self.question,
            params,
            chat_template=options.chat_template,
            chat_template_kwargs=options.chat_template_kwargs,
            priority=options.priority,
            cache_salt=options.cache_salt,
            request_id=request_id,
        )
