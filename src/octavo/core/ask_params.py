"""What a user asks of a question over documents, validated where it enters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from octavo.core.errors import InvalidRequestError, shown
from octavo.core.margins_params import MarginsParams, one_text
from octavo.core.params import MAX_SEED, SamplingParams, integer
from octavo.core.prompts import check_prompt, prompts_of
from octavo.core.values import exact_bool, exact_record, exact_str

_HOLES = "number", "text", "place", "passages", "question"
ORDERS = ("document", "cache")
MAX_PASSAGES = 256
MIN_PASSAGE_TOKENS, MAX_PASSAGE_TOKENS = 16, 1 << 16
DEFAULT_PASSAGE_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AskPrompts:
    """What stands around the passages and the question. The model's chat template is put around the whole once, as one
    message of the user's. Holes are replaced where they are named below; other braces stay as they are.

    Attributes:
        passage: what a passage becomes in the prompt; holds ``{number}``, which is what an answer cites, and
            ``{text}``, and may hold ``{place}``: the file, page and heading.
        answer: asks for the answer; holds ``{passages}``, which is all of these, one after the other, and may hold
            ``{question}``.
        note, answer_from_notes: the same for documents that were read in the margins way, with notes for passages.
        system: a system message, with a chat template; None: none is given.
    """

    passage: str = "[{number}] {place}\n{text}\n\n"
    answer: str = (
        "Here are passages from documents. Each begins with its number in brackets.\n\n{passages}Answer the question "
        "with the help of these passages. Behind each statement give the number of the passage that says it, in "
        "brackets. If they do not hold the answer, say so.\n\nQuestion: {question}"
    )
    note: str = "[{number}] {place}: {text}\n"
    answer_from_notes: str = (
        "These notes were taken while documents were read. Each begins with its number in brackets.\n\n{passages}\n"
        "Answer the question with the help of these notes. Behind each statement give the number of the note that says "
        "it, in brackets. If they do not hold the answer, say so.\n\nQuestion: {question}"
    )
    system: str | None = None

    def __post_init__(self) -> None:
        of_one, of_all = ("number", "text"), ("passages",)
        for name, needed, allowed in (
            ("passage", of_one, ("place",)),
            ("answer", of_all, ("question",)),
            ("note", of_one, ("place",)),
            ("answer_from_notes", of_all, ("question",)),
            ("system", (), ()),
        ):
            if name != "system" or self.system is not None:
                _set(self, name, check_prompt(f"prompts.{name}", getattr(self, name), needed, allowed, _HOLES))


@dataclass(frozen=True, slots=True, kw_only=True)
class AskParams:
    """How to answer a question over documents: from passages that a search finds (retrieval-augmented generation), or
    with `margins` from documents that are read.

    Every field is checked on construction; a bad one raises InvalidRequestError naming it.

    Attributes:
        num_passages: most passages in the prompt. Those that fit the question worst are left out where not all fit the
            model's context.
        passage_tokens: most tokens of a passage, by the tokenizer of the model that indexes. None: those of the index
            that is there, 256 for a new one.
        order: of the passages in the prompt. "document": that of the folder, and in a document its own. "cache": that
            of which most is in the prefix cache already, so that the answer begins sooner; the answer may depend on it.
        answer: how the answer is drawn. Default: greedy, at most 256 tokens.
        margins: read whole documents in the margins way (see MarginsParams) instead of passages: the document, if
            there is one, else those that the best passages are from, each by itself; the answer to several rests on
            the notes. `answer`, `seed`, `apply_chat_template` and `prompts.system` of it are those of here.
        num_documents: most documents that `margins` reads.
        apply_chat_template: put the model's chat template around the prompt. None: if it has one.
        prompts: AskPrompts, or a mapping of some of its fields.
        seed: of all draws; None draws one, which the result reports.
    """

    num_passages: int = 8
    passage_tokens: int | None = None
    order: Literal["document", "cache"] = "document"
    answer: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0, max_tokens=256))
    margins: MarginsParams | None = None
    num_documents: int = 4
    apply_chat_template: bool | None = None
    prompts: AskPrompts | Mapping[str, str | None] = field(default_factory=AskPrompts)
    seed: int | None = None

    def __post_init__(self) -> None:
        _set(self, "num_passages", integer("num_passages", self.num_passages, 1, MAX_PASSAGES))
        _set(self, "num_documents", integer("num_documents", self.num_documents, 1, MAX_PASSAGES))
        if self.passage_tokens is not None:
            tokens = integer("passage_tokens", self.passage_tokens, MIN_PASSAGE_TOKENS, MAX_PASSAGE_TOKENS)
            _set(self, "passage_tokens", tokens)
        order = exact_str("order", self.order)
        if order not in ORDERS:
            allowed = ", ".join(map(repr, ORDERS))
            raise InvalidRequestError("order", f"must be one of {allowed}, not {shown(order)}")
        _set(self, "order", order)
        _set(self, "answer", one_text("answer", self.answer))
        if self.margins is not None:
            _set(self, "margins", exact_record("margins", self.margins, MarginsParams))
            if self.margins.review:
                raise InvalidRequestError("margins.review", "has no effect here: nobody is asked")
        if self.apply_chat_template is not None:
            applied = exact_bool("apply_chat_template", self.apply_chat_template, "must be true, false or None")
            _set(self, "apply_chat_template", applied)
        _set(self, "prompts", prompts_of("prompts", self.prompts, AskPrompts))
        if self.seed is not None:
            _set(self, "seed", integer("seed", self.seed, 0, MAX_SEED))

    @property
    def texts(self) -> AskPrompts:
        """`prompts`, as which a mapping is kept too."""
        assert isinstance(self.prompts, AskPrompts)
        return self.prompts

    def but(self, **changes: Any) -> AskParams:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


def _set(params: object, name: str, value: object) -> None:
    object.__setattr__(params, name, value)  # frozen: normalised once, in __post_init__
