"""What a user asks of a beam search, validated where it enters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from octavo.core.errors import InvalidRequestError, shown
from octavo.core.params import OutputKind, RepetitionDetectionParams, SamplingParams, integer, number
from octavo.core.structured import StructuredOutputsParams
from octavo.core.values import exact_str

MAX_BEAM_WIDTH = 1024
DEFAULT_BEAM_WIDTH = 4
MAX_LENGTH_PENALTY = 6.0  # of a million tokens, length ** penalty is still a float32


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """How to search. The result is that of transformers' `generate` with the same settings and do_sample=False.

    Names are vLLM's and Hugging Face's; fields that SamplingParams has as well mean the same and are checked by it.
    Every field is checked on construction; a bad one raises InvalidRequestError naming it.

    Attributes:
        beam_width, num_beams: hypotheses kept per step, in all groups together; two names of one thing. Default 4.
            Width 1 is greedy decoding, whatever the other settings of the search.
        num_return_sequences: outputs, best first; at most the width, which is the default. There are fewer where fewer
            different ones exist.
        length_penalty: hypotheses are compared by their log-probability over length ** length_penalty, where the
            length counts generated tokens, the end token included. Above 0 favours long ones.
        early_stopping: when to end. True: when as many as the width are finished. False: when the best running one
            would not beat the worst finished one if it ended now. "never": when it cannot beat it at any length.
        num_beam_groups: groups that search one after the other in each step and differ (Vijayakumar et al., 2018);
            must divide the width.
        diversity_penalty: subtracted from a token's log-probability for each time that earlier groups chose it in this
            step; needs num_beam_groups of at least 2.
        no_repeat_ngram_size: no n-gram of this many tokens comes twice, the prompt's included; 0 is off.
        temperature: nothing is drawn: 0 and 1 are accepted and mean the same.
        logprobs: per token, its log-probability and those of this many best tokens; of the raw logits.
        repetition_detection: a hypothesis that repeats itself is finished, as by an end token.
        structured_outputs: what each hypothesis must look like; it ends with an end token, where one may come.
    """

    beam_width: int | None = None
    num_beams: int | None = None
    num_return_sequences: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    temperature: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    output_kind: OutputKind | Literal["cumulative", "delta", "final_only"] = OutputKind.CUMULATIVE
    skip_reading_prefix_cache: bool = False
    repetition_detection: RepetitionDetectionParams | Mapping[str, int] | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    speculative_decoding: bool = True
    sampling: SamplingParams = field(init=False, repr=False, compare=False)  # what the two kinds of request share

    def __post_init__(self) -> None:
        shared = {f.name for f in fields(SamplingParams)} & {f.name for f in fields(self)}
        _set(self, "sampling", SamplingParams(**{name: getattr(self, name) for name in shared}))
        for name in shared:
            _set(self, name, getattr(self.sampling, name))
        self.validate()

    def validate(self) -> None:
        """Whether the fields fit together. Raises InvalidRequestError naming the one at fault."""
        widths = {name: getattr(self, name) for name in ("beam_width", "num_beams")}
        given = {name: integer(name, value, 1, MAX_BEAM_WIDTH) for name, value in widths.items() if value is not None}
        if len(set(given.values())) > 1:
            raise InvalidRequestError("num_beams", f"{self.num_beams} contradicts beam_width={self.beam_width}")
        width = next(iter(given.values()), DEFAULT_BEAM_WIDTH)
        _set(self, "beam_width", width)
        _set(self, "num_beams", width)
        most = width if self.num_return_sequences is None else self.num_return_sequences
        _set(self, "num_return_sequences", integer("num_return_sequences", most, 1, width))
        penalty = number("length_penalty", self.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
        _set(self, "length_penalty", penalty)
        if self.early_stopping is not True and self.early_stopping is not False:
            what = 'must be true, false or "never"'
            _set(self, "early_stopping", exact_str("early_stopping", self.early_stopping, what))
            if self.early_stopping != "never":
                raise InvalidRequestError("early_stopping", f"{what}, not {shown(self.early_stopping)}")
        groups = integer("num_beam_groups", self.num_beam_groups, 1, width)
        _set(self, "num_beam_groups", groups)
        if width % groups:
            raise InvalidRequestError("num_beam_groups", f"must divide the beam width {width}, not {groups}")
        diversity = number("diversity_penalty", self.diversity_penalty, 0.0, math.inf)
        if diversity and groups == 1:
            raise InvalidRequestError("diversity_penalty", "needs num_beam_groups of at least 2")
        if groups > 1 and not diversity:
            raise InvalidRequestError("diversity_penalty", "must be more than 0, or all groups find the same")
        _set(self, "diversity_penalty", diversity)
        size = integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, 2**31 - 1)
        _set(self, "no_repeat_ngram_size", size)
        if self.structured_outputs is not None and self.ignore_eos:
            raise InvalidRequestError("ignore_eos", "has no meaning with structured_outputs: they end where they may")
        if self.temperature not in (0.0, 1.0):
            raise InvalidRequestError("temperature", f"beam search draws nothing: 0 or 1, not {self.temperature:g}")

    @property
    def width(self) -> int:
        return self.beam_width or DEFAULT_BEAM_WIDTH

    @property
    def num_outputs(self) -> int:
        return self.num_return_sequences or self.width

    def but(self, **changes: Any) -> BeamSearchParams:
        """A copy with some fields changed, checked again."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        if "beam_width" in changes or "num_beams" in changes:
            own["beam_width"] = own["num_beams"] = None
            if self.num_return_sequences == self.width:  # all of them
                own["num_return_sequences"] = None
        return BeamSearchParams(**(own | changes))


def _set(params: object, name: str, value: object) -> None:
    object.__setattr__(params, name, value)  # frozen: normalised once, in __post_init__
