"""All examples in all modes, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple

from octavo.core.ask_params import MAX_PASSAGE_TOKENS, MAX_PASSAGES, MIN_PASSAGE_TOKENS
from octavo.core.errors import InvalidRequestError, shown
from octavo.core.margins_params import MAX_SEGMENT_TOKENS
from octavo.core.params import MAX_SEED, integer, number
from octavo.evaluation.modes import MODES, ModeSettings, Outcome, measure, warm_up
from octavo.evaluation.tasks import TASKS, Example, ExampleKey, least_tokens, make_example

if TYPE_CHECKING:
    from octavo.llm import LLM

MAX_LENGTH = 1 << 20
MAX_SAMPLES = 1000
MAX_THRESHOLD = 1e6
_MAX_TOKENS = 2**31 - 1
_LIMITS = {
    "samples": (1, MAX_SAMPLES),
    "seed": (0, MAX_SEED),
    "max_tokens": (1, _MAX_TOKENS),
    "segment_tokens": (1, MAX_SEGMENT_TOKENS),
    "margin_tokens": (1, _MAX_TOKENS),
    "passages": (1, MAX_PASSAGES),
    "passage_tokens": (MIN_PASSAGE_TOKENS, MAX_PASSAGE_TOKENS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalParams:
    """What to run. A bad value raises InvalidRequestError naming the field."""

    tasks: tuple[str, ...] = tuple(TASKS)
    modes: tuple[str, ...] = tuple(MODES)
    lengths: tuple[int, ...] = (1000,)  # tokens of a document, at most
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)  # percent; samples take them in turn
    samples: int = 20  # examples of each task at each length
    seed: int = 0
    settings: ModeSettings = field(default_factory=ModeSettings)

    def __post_init__(self) -> None:
        for name, known in (("tasks", TASKS), ("modes", MODES)):
            for one in self._several(name):
                if one not in known:
                    raise InvalidRequestError(name, f"{shown(one)} is none of {', '.join(known)}")
        for name, low, high in (("lengths", 1, MAX_LENGTH), ("depths", 0, 100)):
            for one in self._several(name):
                integer(name, one, low, high)
        for part in (self, self.settings):
            for one in fields(part):
                value = getattr(part, one.name)
                if one.name in _LIMITS and value is not None:
                    integer(one.name, value, *_LIMITS[one.name])
        number("threshold", self.settings.threshold, -MAX_THRESHOLD, MAX_THRESHOLD)

    def _several(self, name: str) -> tuple[object, ...]:
        given: tuple[object, ...] = getattr(self, name)
        if not given:
            raise InvalidRequestError(name, "is empty")
        if len(set(given)) < len(given):
            twice = next(one for one in given if given.count(one) > 1)
            raise InvalidRequestError(name, f"{shown(twice)} is given twice")
        return given

    @property
    def num_runs(self) -> int:
        return len(self.tasks) * len(self.modes) * len(self.lengths) * self.samples


class Run(NamedTuple):
    """One example asked in one mode."""

    example: Example
    mode: str
    outcome: Outcome


class Evaluation:
    """Runs a model through tasks. Raises InvalidRequestError for lengths that the tasks or the model cannot have."""

    def __init__(self, llm: LLM, params: EvalParams) -> None:
        self.llm = llm
        self.params = params
        self._check_lengths()

    def __iter__(self) -> Iterator[Run]:
        """Every example is asked in all modes before the next one is made. Which mode comes first changes from sample
        to sample, so that what slows the machine down for a while is no one mode's."""
        modes = self.params.modes
        warm_up(self.llm)
        for key in self._keys():
            example = make_example(key, self._count_tokens)
            first = key.sample % len(modes)
            for mode in (*modes[first:], *modes[:first]):
                yield Run(example, mode, measure(self.llm, mode, example, self.params.settings))

    def _keys(self) -> Iterator[ExampleKey]:
        params = self.params
        for length in params.lengths:
            for task in params.tasks:
                for sample in range(params.samples):
                    depth = params.depths[sample % len(params.depths)] / 100
                    yield ExampleKey(task, params.seed, sample, length, depth)

    def _count_tokens(self, text: str) -> int:
        return len(self.llm.tokenizer.encode(text, add_special_tokens=False))

    def _check_lengths(self) -> None:
        """Before minutes of measuring, not after."""
        longest, most = max(self.params.lengths), self.llm.max_model_len
        read_more = {"retrieved", "margins"} if self.params.settings.windows else {"retrieved"}
        if longest >= most and read_more.isdisjoint(self.params.modes):
            problem = f"{longest} tokens and an answer do not fit max_model_len={most}"
            raise InvalidRequestError("lengths", f"{problem}: only retrieved, and margins with windows, read more")
        for key in self._keys():
            if (least := least_tokens(key, self._count_tokens)) > key.length:
                raise InvalidRequestError("lengths", f"{key.task} needs at least {least} tokens, not {key.length}")
