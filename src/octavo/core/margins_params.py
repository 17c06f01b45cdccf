"""What a user asks of Writing in the Margins, validated where it enters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from octavo.core.errors import InvalidRequestError, shown
from octavo.core.params import MAX_SEED, OutputKind, SamplingParams, integer, number
from octavo.core.prompts import check_prompt, prompts_of
from octavo.core.values import exact_bool, exact_record, exact_str

MAX_SEGMENT_TOKENS = 1 << 20
_MAX_SCORE = 1e6
CLASSIFICATIONS = ("score", "text", "merged")
_HOLES = "document", "question", "margin", "margins", "number"


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginsPrompts:
    """What stands around the document, the question and the margins. The model's chat template is put around the whole
    once, as one message of the user's.

    Holes such as ``{question}`` are replaced where they are named below; other braces stay as they are, and so do those
    in what is put in.

    Attributes:
        document: holds ``{document}``; what stands before it is what every question's prompt begins with, and what
            stands after it is where the reading of a segment, and of the whole, ends.
        extract: asks for the margin of the segment that ends here; may hold ``{question}``.
        extract_merged: the same for classification="merged": is to be answered by YES or NO, ``#``, and the margin.
        classify: asks whether a margin is relevant, to be answered by YES or NO; holds ``{margin}``, may hold
            ``{question}``. It is a prompt of its own, without the document.
        margin: what a kept margin becomes in the final prompt; holds ``{margin}``, may hold ``{number}``, its
            segment's, from 1.
        answer: asks for the answer; holds ``{margins}``, which is all of these, one after the other, and may hold
            ``{question}``.
        answer_without: the same where no margin was kept; may hold ``{question}``.
        answer_alone, answer_alone_without: the same for a document that was read in windows, and is not in the prompt.
        system: a system message, with a chat template; None: none is given.
    """

    document: str = "Here is a document.\n\n<document>\n{document}\n</document>\n\n"
    extract: str = (
        "Note in a few short sentences what the document says that helps to answer the question. If nothing does, say: "
        "nothing.\n\nQuestion: {question}"
    )
    extract_merged: str = (
        "Does the document say anything that helps to answer the question? If it does, say YES# and note it in a few "
        "short sentences. If it does not, say NO#.\n\nQuestion: {question}"
    )
    classify: str = (
        "Is this note relevant to the question? Answer YES if it is and NO if it is not.\n\nNote: {margin}\nQuestion: "
        "{question}\nRelevant:"
    )
    margin: str = "- {margin}\n"
    answer: str = (
        "These notes were taken while the document was read:\n{margins}\nAnswer the question with the help of the "
        "document and the notes.\n\nQuestion: {question}"
    )
    answer_without: str = "Answer the question with the help of the document.\n\nQuestion: {question}"
    answer_alone: str = (
        "These notes were taken while a long document was read:\n{margins}\nAnswer the question with the help of the "
        "notes.\n\nQuestion: {question}"
    )
    answer_alone_without: str = (
        "A long document was read, and nothing in it was found to help to answer the question below. Say so.\n\n"
        "Question: {question}"
    )
    system: str | None = None

    def __post_init__(self) -> None:
        for name, needed, allowed in (
            ("document", ("document",), ()),
            ("extract", (), ("question",)),
            ("extract_merged", (), ("question",)),
            ("classify", ("margin",), ("question",)),
            ("margin", ("margin",), ("number",)),
            ("answer", ("margins",), ("question",)),
            ("answer_without", (), ("question",)),
            ("answer_alone", ("margins",), ("question",)),
            ("answer_alone_without", (), ("question",)),
            ("system", (), ()),
        ):
            if name != "system" or self.system is not None:
                _set(self, name, check_prompt(f"prompts.{name}", getattr(self, name), needed, allowed, _HOLES))


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginsParams:
    """How to read a document with notes in its margins (Russak et al., "Writing in the Margins", 2024).

    The document is read segment by segment. After each segment the model writes, in a fork of what it has read, what
    helps to answer the question: a margin. It then says whether the margin is relevant. Those that are stand behind the
    document when the question is answered.

    Every field is checked on construction; a bad one raises InvalidRequestError naming it.

    Attributes:
        segment_tokens: most tokens of a segment; segments end where sentences do.
        margin: how margins are drawn. Default: greedy, at most 100 tokens.
        answer: how the answer is drawn. Default: greedy, at most 256 tokens. None: none is written.
        classification: how the model says whether a margin is relevant. "score": by the probabilities of YES and NO
            after a prompt of its own, in one forward pass. "text": by the text it writes after that prompt. "merged":
            by the text that it begins the margin with, and if that is NO it writes no more.
        threshold: with "score": keep a margin if log p(YES) - log p(NO) is more than this.
        early_exit_kept: read no further when so many margins have been kept, counted in the order of the segments.
        early_exit_score: with "score": read no further after a margin with at least this score.
        overlap: read on while margins are written. Without, each is decided before the next segment is read; the
            answers are the same.
        review: wait, before the answer, until every margin has been judged by whoever asked; see `octavo.MarginsRun`.
        windows: read a document that is longer than the model's context in windows that fit, one after the other; the
            answer then rests on the margins alone. Without, it is refused.
        apply_chat_template: put the model's chat template around the prompts. None: if it has one.
        prompts: MarginsPrompts, or a mapping of some of its fields.
        seed: of all draws; None draws one, which the result reports.
    """

    segment_tokens: int = 1024
    margin: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0, max_tokens=100))
    answer: SamplingParams | None = field(default_factory=lambda: SamplingParams(temperature=0.0, max_tokens=256))
    classification: Literal["score", "text", "merged"] = "score"
    threshold: float = 0.0
    early_exit_kept: int | None = None
    early_exit_score: float | None = None
    overlap: bool = True
    review: bool = False
    windows: bool = False
    apply_chat_template: bool | None = None
    prompts: MarginsPrompts | Mapping[str, str | None] = field(default_factory=MarginsPrompts)
    seed: int | None = None

    def __post_init__(self) -> None:
        _set(self, "segment_tokens", integer("segment_tokens", self.segment_tokens, 1, MAX_SEGMENT_TOKENS))
        for name in ("margin", "answer"):
            if name == "margin" or self.answer is not None:
                _set(self, name, one_text(name, getattr(self, name)))
        if self.margin.max_tokens is None:
            raise InvalidRequestError("margin.max_tokens", "must be given: room is kept for every margin")
        kind = exact_str("classification", self.classification)
        if kind not in CLASSIFICATIONS:
            allowed = ", ".join(map(repr, CLASSIFICATIONS))
            raise InvalidRequestError("classification", f"must be one of {allowed}, not {shown(kind)}")
        _set(self, "classification", kind)
        _set(self, "threshold", number("threshold", self.threshold, -_MAX_SCORE, _MAX_SCORE))
        if self.early_exit_kept is not None:
            _set(self, "early_exit_kept", integer("early_exit_kept", self.early_exit_kept, 1, 2**31 - 1))
        if self.early_exit_score is not None:
            _set(self, "early_exit_score", number("early_exit_score", self.early_exit_score, -_MAX_SCORE, _MAX_SCORE))
        if kind != "score":
            for name, default in (("threshold", 0.0), ("early_exit_score", None)):
                if getattr(self, name) != default:
                    raise InvalidRequestError(name, f'has a meaning only with classification="score", not {kind!r}')
        if self.review and self.answer is None:
            raise InvalidRequestError("review", "has no effect without an answer")
        for name in ("overlap", "review", "windows"):
            _set(self, name, exact_bool(name, getattr(self, name)))
        if self.apply_chat_template is not None:
            applied = exact_bool("apply_chat_template", self.apply_chat_template, "must be true, false or None")
            _set(self, "apply_chat_template", applied)
        _set(self, "prompts", prompts_of("prompts", self.prompts, MarginsPrompts))
        if self.seed is not None:
            _set(self, "seed", integer("seed", self.seed, 0, MAX_SEED))

    @property
    def texts(self) -> MarginsPrompts:
        """`prompts`, as which a mapping is kept too."""
        assert isinstance(self.prompts, MarginsPrompts)
        return self.prompts

    def but(self, **changes: Any) -> MarginsParams:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


def one_text(name: str, value: object) -> SamplingParams:
    """Parameters of one text that comes as events. Raises InvalidRequestError naming `name` and the field."""
    params = exact_record(name, value, SamplingParams)
    for field_name, allowed, why in (
        ("n", 1, "one is written"),
        ("prompt_logprobs", None, "the prompt is not given"),
        ("skip_reading_prefix_cache", False, "a margin goes on from what was read"),
        ("seed", None, "the seed is that of the whole, the field seed beside it"),
        ("detokenize", True, "its text is needed"),
        ("output_kind", OutputKind.CUMULATIVE, "it comes as events"),
        *([("logprobs", None, "only those of answers are told")] if name == "margin" else []),
    ):
        if getattr(params, field_name) != allowed:
            raise InvalidRequestError(f"{name}.{field_name}", f"must be {allowed}: {why}")
    return params


def _set(params: object, name: str, value: object) -> None:
    object.__setattr__(params, name, value)  # frozen: normalised once, in __post_init__
