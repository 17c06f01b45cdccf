"""Documents read with margins over the executor without a model, and what must come of it.

`alone` says that without an engine: it draws margin by margin and then the answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from octavo.coordinators.verdict import merged_margin, verdict_of
from octavo.core.margins import (
    AnswerBegun,
    AnswerDelta,
    MarginDecided,
    MarginsOutput,
    MarginsSpec,
    Question,
    Segment,
)
from octavo.core.params import SamplingParams
from octavo.core.request import RequestSpec
from tests.coordinators.test_branches import ByteCodec
from tests.engine.fake import VOCAB, Harness, logprob, next_token

# Verdicts, their ends, spaces and words.
SPELLING = [
    *(["YES", "no", "NO", "Yes", "#", "\n", " ", ": "] * 3),
    *(chr(97 + i) * 2 + " " for i in range(VOCAB - 24)),
]


WHOLE: dict[str, Any] = {"early_exit_kept": None, "early_exit_score": None}  # read to the end


class WordCodec(ByteCodec):
    spelling = SPELLING

    def encode_rest(self, before: Any, text: str) -> list[int]:
        assert isinstance(before, list | tuple)
        return [(len(before) + ord(letter)) % VOCAB for letter in text]

    def encode_around(self, before: Any, head: str, plain: str, tail: str) -> list[int]:
        return self.encode_rest(before, head + plain + tail)


class Late:
    """A Background whose jobs are done some steps later, in any order."""

    def __init__(self, harness: Harness, rng: random.Random) -> None:
        self.harness, self.rng = harness, rng
        self.jobs: list[tuple[str, Callable[[], Any], Callable[[Any], None]]] = []

    def submit(self, request_id: str, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self.jobs.append((request_id, job, done))

    def work(self) -> None:
        while self.jobs and self.rng.random() < 0.5:
            request_id, job, done = self.jobs.pop(self.rng.randrange(len(self.jobs)))
            answer = job()
            self.harness.engine.resume(request_id, lambda done=done, answer=answer: done(answer))  # type: ignore[misc]


def make_spec(rng: random.Random, name: str = "margins", **changes: Any) -> MarginsSpec:
    lengths = [rng.randint(1, 12) for _ in range(changes.pop("num_segments", rng.randint(1, 6)))]
    seed = rng.randint(0, 3)
    tokens = tuple(rng.randrange(VOCAB) for _ in range(sum(lengths)))
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    segments = tuple(
        Segment(i, end - n, end, end - n, end) for i, (n, end) in enumerate(zip(lengths, ends, strict=True))
    )
    kind = changes.pop("classification", rng.choice(["score", "text", "merged"]))
    windows = changes.pop("windows", (len(lengths),))

    def drawn(most: int) -> RequestSpec:
        params = SamplingParams(max_tokens=most, temperature=rng.choice([0.0, 1.0]))
        return RequestSpec(name, (), params, seed, most, eos_token_ids=(40, 41, 42))

    def some(least: int = 1) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB) for _ in range(rng.randint(least, 5)))

    questions = tuple(
        Question(
            extract=tuple(some() for _ in lengths),
            classify_before=() if kind == "merged" else some(),
            classify_after="?",
            answer_before="notes:",
            answer_after=f" q{number}",
            answer_without=f" only q{number}",
            start=some(0) if len(windows) > 1 else None,
        )
        for number in range(changes.pop("num_questions", 1))
    )
    spec = MarginsSpec(
        request_id=name,
        seed=seed,
        prefix=some(0),
        segments=segments,
        document=tokens,
        windows=windows,
        questions=questions,
        margin=drawn(rng.randint(1, 6)),
        verdict=drawn(4),
        answer=drawn(120),
        max_answer_tokens=rng.randint(1, 6),
        classification=kind,
        yes=(1, 2, 3),
        no=(4, 5),
        threshold=rng.choice([-0.5, 0.0, 0.5]),
        early_exit_kept=rng.choice([None, None, 1, 2]),
        early_exit_score=rng.choice([None, None, 1.0]) if kind == "score" else None,
        overlap=rng.random() < 0.7,
        margin_before="-",
        margin_after=";",
    )
    return replace(spec, **changes)


def draw(
    spec: RequestSpec, tokens: list[int], stream: tuple[int, ...], most: int, end: Callable[[str], bool]
) -> list[int]:
    found: list[int] = []
    while len(found) < most:
        found.append(next_token(tokens + found, (spec.seed, stream)))
        if found[-1] in spec.eos_token_ids or end(text_of(found, spec)):
            break
    return found


def never(text: str) -> bool:
    return False


def says_no(text: str) -> bool:
    return verdict_of(text, final=False) is False


def text_of(tokens: Sequence[int], spec: RequestSpec) -> str:
    return "".join(SPELLING[n] for n in tokens if n not in spec.eos_token_ids)


@dataclass
class Expected:
    margins: list[tuple[str, bool, float | None]] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)


def alone(
    spec: MarginsSpec, question: int = 0, judge: Callable[[int, str, bool], tuple[str, bool]] | None = None
) -> Expected:
    asked, found = spec.questions[question], Expected()
    first, kept_scores = 0, 0
    trunks: list[list[int]] = []
    for count in spec.windows:
        start = spec.segments[first].first_token
        trunks += [[*spec.prefix, *spec.document[start : s.last_token]] for s in spec.segments[first : first + count]]
        first += count
    number = 0
    for number, trunk in enumerate(trunks, 1):
        index = number - 1
        merged = spec.classification == "merged"
        seen = [*trunk, *asked.extract[index]]
        tokens = draw(spec.margin, seen, (1, index), spec.margin.max_tokens, says_no if merged else never)
        text = text_of(tokens, spec.margin)
        margin = merged_margin(text) if merged else text.strip()
        score = None
        if merged:
            kept = verdict_of(text, final=True) is True and bool(margin)
        elif not margin:
            kept = False
        else:
            seen = [*asked.classify_before]
            seen += WordCodec().encode_rest(asked.classify_before, margin + asked.classify_after)
            if spec.classification == "score":
                best = [max(logprob(seen, n) for n in ids) for ids in (spec.yes, spec.no)]
                score = best[0] - best[1]
                kept = score > spec.threshold
            else:
                said = draw(spec.verdict, seen, (2, index), 4, lambda text: verdict_of(text, final=False) is not None)
                kept = verdict_of(text_of(said, spec.verdict), final=True) is True
        kept_scores += kept
        found.margins.append((margin, kept, score))
        enough = spec.early_exit_kept is not None and kept_scores >= spec.early_exit_kept
        if enough or (spec.early_exit_score is not None and score is not None and score >= spec.early_exit_score):
            break
    if judge is not None:
        found.margins = [(*judge(i, text, kept), score) for i, (text, kept, score) in enumerate(found.margins)]
    before = [*asked.start] if asked.start is not None else trunks[number - 1]
    kept_texts = [text for text, kept, _ in found.margins if kept]
    text = asked.answer_without
    if kept_texts:
        text = asked.answer_before + "".join(f"-{one};" for one in kept_texts) + asked.answer_after
    found.prompt = [*before, *WordCodec().encode_rest(before, text)]
    room = min(spec.max_answer_tokens or 999, spec.answer.max_tokens - len(found.prompt))
    found.answer = draw(spec.answer, found.prompt, (0,), room, never)
    return found


@dataclass
class Told:
    """What came of a request so far."""

    events: list[Any] = field(default_factory=list)
    finished: bool = False
    error: str | None = None

    def take(self, output: MarginsOutput) -> None:
        assert not self.finished
        self.events += output.events
        self.finished, self.error = output.finished, output.error

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def result(self, question: int = 0) -> Expected:
        found = Expected()
        margins = {}
        for event in self.of(MarginDecided):
            if event.margin.question == question:
                margins[event.margin.segment.index] = event.margin
        found.margins = [(m.text, m.kept, m.score) for _, m in sorted(margins.items())]
        begun = [event for event in self.of(AnswerBegun) if event.question == question]
        assert len(begun) <= 1
        for event in begun:
            found.prompt = list(event.prompt_token_ids)
        for event in self.of(AnswerDelta):
            if event.question == question:
                found.answer += event.output.token_ids
        return found


class Reading(Harness):
    """A harness that knows margins."""

    def __init__(self, rng: random.Random | None = None, **settings: Any) -> None:
        super().__init__(codec=WordCodec(), **settings)  # type: ignore[arg-type]
        self.told: dict[str, Told] = {}
        self.late = None if rng is None else Late(self, rng)
        if self.late is not None:
            self.engine.background = self.late

    def read(self, spec: MarginsSpec) -> Told:
        self.told[spec.request_id] = told = Told()
        self.engine.add_request(spec)
        return told

    def take(self, outputs: list[Any]) -> None:
        for output in outputs:
            if output.request_id in self.told:
                self.told[output.request_id].take(output)
            else:
                super().take([output])

    def step(self) -> list[Any]:
        if self.late is not None:
            self.late.work()
        self.check()
        return super().step()

    def until(self, met: Callable[[], bool]) -> None:
        for _ in range(1000):
            if met():
                return
            self.step()
        raise AssertionError("it does not come")

    def finish(self, most: int = 5000) -> None:
        for _ in range(most):
            if not self.engine.num_requests:
                assert self.kv.num_available == self.kv.num_blocks
                return
            self.step()
        raise AssertionError("not finished")


def check(told: Told, spec: MarginsSpec, question: int = 0, expected: Expected | None = None) -> None:
    assert told.finished and told.error is None, told.error
    wanted = alone(spec, question) if expected is None else expected
    got = told.result(question)
    # Margins behind the end of reading may have been decided before that was known.
    assert got.margins[: len(wanted.margins)] == wanted.margins
    assert (got.prompt, got.answer) == (wanted.prompt, wanted.answer)
