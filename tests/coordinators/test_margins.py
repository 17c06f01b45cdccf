"""Writing in the Margins over the executor without a model: what comes out is a function of the request alone.

`alone` says what that is, without an engine: it draws margin by margin and then the answer. Every run, whatever its
neighbours, memory, order of steps and whoever tokenises late, is compared with it.
"""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from octavo.coordinators.margins import MarginsCoordinator, merged_margin, verdict_of
from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import InvalidRequestError
from octavo.core.events import EventKind, Reason
from octavo.core.margins import (
    AnswerBegun,
    AnswerDelta,
    AnswerNow,
    Judge,
    MarginDecided,
    MarginsOutput,
    MarginsSpec,
    MarginWritten,
    Question,
    ReviewBegun,
    Segment,
    SegmentRead,
    StopReading,
)
from octavo.core.params import SamplingParams
from octavo.core.request import RequestSpec
from octavo.text.stream import IncrementalText, StopMatcher
from tests.coordinators.test_branches import User
from tests.engine.fake import VOCAB, Harness, logprob, next_token
from tests.engine.fake import expected as expected_of
from tests.engine.test_drafts import Guesser
from tests.engine.test_storm_of_all import search, search_alone

# Verdicts, their ends, spaces and words.
SPELLING = [
    *(["YES", "no", "NO", "Yes", "#", "\n", " ", ": "] * 3),
    *(chr(97 + i) * 2 + " " for i in range(VOCAB - 24)),
]


WHOLE: dict[str, Any] = {"early_exit_kept": None, "early_exit_score": None}  # read to the end


class WordCodec:
    def encode_rest(self, before: Any, text: str) -> list[int]:
        assert isinstance(before, list | tuple)
        return [(len(before) + ord(letter)) % VOCAB for letter in text]

    def text_stream(self, prompt_token_ids: Any, *, stop: Any = (), **options: Any) -> IncrementalText:
        return IncrementalText(
            token_bytes=lambda token_id: SPELLING[token_id].encode(),
            skipped=frozenset(),
            strip_leading_space=False,
            prompt_token_ids=prompt_token_ids,
            stop=StopMatcher(stop) if stop else None,
            include_stop=False,
        )


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


@pytest.mark.parametrize("seed", range(60))
def test_alone(seed: int) -> None:
    """W2 and W3: overlapped or not, the same margins, flags and answer, and the answer is that of its prompt."""
    rng = random.Random(seed)
    spec = make_spec(rng)
    for overlap in (True, False):
        harness = Reading(random.Random(seed) if seed % 2 else None, max_num_batched_tokens=rng.choice([8, 32]))
        told = harness.read(replace(spec, overlap=overlap))
        harness.finish()
        check(told, spec)
        result = told.result()
        harness.add("plain", result.prompt, max_tokens=len(result.answer), seed=spec.seed)
        harness.finish()
        assert harness.tokens("plain") == result.answer
        read = told.of(SegmentRead)
        assert [event.num_read for event in read] == list(range(1, len(read) + 1))
        assert len(told.of(MarginWritten)) >= len(alone(spec).margins)


def test_a_request_is_a_value() -> None:
    """It goes to another process and back, and so does what it tells."""
    spec = make_spec(random.Random(3), num_questions=2)
    assert pickle.loads(pickle.dumps(spec)) == spec and hash(spec)
    harness = Reading()
    outputs: list[Any] = []
    harness.take = outputs.extend  # type: ignore[method-assign]
    harness.read(pickle.loads(pickle.dumps(spec)))
    harness.finish()
    assert pickle.loads(pickle.dumps(outputs)) == outputs and outputs[-1].finished
    for call in (Judge(0, 0, True, "x"), AnswerNow(), StopReading()):
        assert pickle.loads(pickle.dumps(call)) == call and hash(call)


def test_all_kinds_are_met() -> None:
    """Of the runs above: kept, dropped and empty margins, and documents that are not read to their end."""
    counts: Counter[str] = Counter()
    for seed in range(60):
        spec = make_spec(random.Random(seed))
        found = alone(spec)
        counts["kept"] += sum(kept for _, kept, _ in found.margins)
        counts["dropped"] += sum(not kept for _, kept, _ in found.margins)
        counts["empty"] += sum(not text for text, _, _ in found.margins)
        counts["left early"] += len(found.margins) < len(spec.segments)
        counts[spec.classification] += 1
    assert min(counts.values()) > 5 and len(counts) == 7, counts


def test_a_margin_depends_on_what_was_read_before_alone() -> None:
    """W4."""
    spec = make_spec(
        random.Random(1), num_segments=5, classification="score", early_exit_kept=None, early_exit_score=None
    )
    changed = replace(spec, document=(*spec.document[: spec.segments[2].last_token], *([0] * 99))[: len(spec.document)])
    results = []
    for one in (spec, changed):
        harness = Reading()
        told = harness.read(one)
        harness.finish()
        check(told, one)
        results.append(told.result())
    assert results[0].margins[:3] == results[1].margins[:3] and results[0].prompt != results[1].prompt


@pytest.mark.parametrize("seed", range(8))
def test_windows(seed: int) -> None:
    rng = random.Random(seed)
    spec = make_spec(rng, num_segments=5, windows=(2, 1, 2))
    harness = Reading(rng)
    told = harness.read(spec)
    harness.finish()
    check(told, spec)
    assert {event.num_segments for event in told.of(AnswerBegun)} == {0}


@pytest.mark.parametrize("seed", range(12))
def test_questions_side_by_side(seed: int) -> None:
    """Each is answered as if it had been asked alone, and the document is computed once."""
    rng = random.Random(seed)
    spec = make_spec(rng, num_questions=3, num_segments=4)
    harness = Reading(rng, num_blocks=200)
    told = harness.read(spec)
    harness.finish()
    for question in range(3):
        check(told, spec, question)
        one = Reading()
        single = one.read(replace(spec, questions=(spec.questions[question],)))
        one.finish()
        check(single, spec, expected=alone(spec, question))


def test_blocks_of_the_document_are_taken_once() -> None:
    """W6: the peak is the trunk and what the branches have to themselves."""
    spec = make_spec(random.Random(3), num_segments=6, overlap=True, **WHOLE)
    harness = Reading(num_blocks=200, caching=False)
    harness.read(spec)
    least = harness.kv.num_blocks
    while harness.engine.num_requests:
        harness.step()
        least = min(least, harness.kv.num_available)
    trunk = -(-(len(spec.prefix) + len(spec.document)) // 4)
    private = sum(-(-(len(one) + spec.margin.max_tokens + 1) // 4) + 2 for one in spec.questions[0].extract)
    assert harness.kv.num_blocks - least <= trunk + private
    assert harness.kv.num_available == harness.kv.num_blocks


def test_what_was_read_is_found_again() -> None:
    """W7: a second question computes nothing of the document, and its margins all begin at once."""
    spec = make_spec(random.Random(5), num_segments=5, overlap=True, **WHOLE)
    harness = Reading(num_blocks=200)
    harness.read(spec)
    harness.finish()
    computed: set[int] = set()
    harness.engine.step_listeners.append(lambda plan, result: computed.update(g.sequence_id for g in plan.grants))
    again = replace(make_spec(random.Random(6), num_questions=1, num_segments=5), request_id="again")
    again = replace(again, prefix=spec.prefix, document=spec.document, segments=spec.segments, windows=spec.windows)
    told = harness.read(again)
    (trunk,) = harness.sequences()
    harness.step()
    assert len(told.of(SegmentRead)) == 5
    harness.finish()
    assert len(computed) >= 6 and trunk.id not in computed
    check(told, again)


def test_the_trunk_does_not_wait_for_margins() -> None:
    """It is computed in as few steps as the budget allows, whatever is written meanwhile."""
    spec = make_spec(random.Random(7), num_segments=6, overlap=True, **WHOLE)
    harness = Reading(num_blocks=200, max_num_batched_tokens=16)
    told = harness.read(spec)
    steps = 0
    while len(told.of(SegmentRead)) < 6:
        harness.step()
        steps += 1
    total = len(spec.prefix) + len(spec.document) + sum(map(len, spec.questions[0].extract))
    assert steps <= total // 8 + 4
    assert steps < 6 * (spec.margin.max_tokens + 2)


@pytest.mark.parametrize("seed", range(24))
def test_scarce_memory_neighbours_and_aborts(seed: int) -> None:
    """Several documents in a pool that holds one or two, beside plain requests; some are ended at any moment."""
    rng = random.Random(seed)
    size = rng.choice([2, 4])
    harness = Reading(
        rng if seed % 2 else None,
        num_blocks=130 // size + rng.randint(0, 20),
        block_size=size,
        caching=seed % 3 != 0,
        ticks=(lambda: rng.randint(0, 3)) if seed % 3 == 1 else None,
        max_num_batched_tokens=rng.choice([12, 32]),
        max_num_seqs=rng.choice([4, 8]),
    )
    specs, aborted = {}, set()
    plain = {}
    for number in range(6):
        spec = make_spec(rng, f"m{number}", num_questions=rng.choice([1, 1, 2]))
        specs[spec.request_id] = spec
        harness.read(spec)
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 10))]
        plain[f"p{number}"] = prompt
        harness.add(f"p{number}", prompt, max_tokens=6)
        for _ in range(rng.randint(0, 6)):
            harness.step()
        if number % 3 == 2:
            name = rng.choice(sorted(specs))
            output = harness.engine.abort(name)
            if output is not None:
                aborted.add(name)
                harness.take([output])
                harness.check()
    harness.finish()
    for name, spec in specs.items():
        told = harness.told[name]
        assert told.finished
        if name not in aborted:
            for question in range(len(spec.questions)):
                check(told, spec, question)
    for name, prompt in plain.items():
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(next_token(tokens, (0, (0,))))
        assert harness.tokens(name) == tokens[len(prompt) :]


@pytest.mark.parametrize("seed", range(8))
def test_beside_searches_and_sessions(seed: int) -> None:
    """In lockstep, parked, with drafts: each answers as alone, in a pool that is too small for all."""
    rng = random.Random(seed)
    harness = Reading(rng, num_blocks=40, block_size=4, max_num_seqs=8, proposer=Guesser(0.3) if seed % 2 else None)
    specs = [make_spec(rng, f"m{number}") for number in range(3)]
    user = User(harness, "session")
    user.extend(user.root, [1, 2, 3])
    tasks = []
    prompts = [tuple(rng.randrange(VOCAB) for _ in range(6)) for _ in range(2)]
    for number, spec in enumerate(specs):
        harness.read(spec)
        if number < 2:
            search(harness, f"b{number}", prompts[number], BeamSearchParams(beam_width=3, max_tokens=5))
        for _ in range(rng.randint(0, 9)):
            harness.step()
        if user.root.task is None:
            tasks.append((list(user.root.token_ids), user.generate(user.root, 4)))
    for _ in range(3000):
        if harness.engine.num_requests == 1 and not harness.engine.has_unfinished_requests:
            break
        harness.step()
    for spec in specs:
        check(harness.told[spec.request_id], spec)
    for number, prompt in enumerate(prompts):
        outputs = harness.outputs[f"b{number}"].outputs
        assert [output.token_ids for output in outputs] == search_alone(prompt, 3, 5)
    assert tasks and all(future.done() for _, future in tasks)
    for number, (before, future) in enumerate(tasks):
        assert future.result().output.token_ids == expected_of(before, 4, number)
    user.close()
    harness.finish()


def test_memory_was_scarce() -> None:
    """The runs above meet preemption, eviction at the barrier and whatever else there is."""
    met: Counter[str] = Counter()
    for seed in range(10):
        rng = random.Random(seed)
        harness = Reading(num_blocks=27, block_size=4, max_num_batched_tokens=32)
        specs = [make_spec(rng, f"m{number}", num_questions=2) for number in range(5)]
        for spec in specs:
            harness.read(spec)
        harness.finish()
        for spec in specs:
            check(harness.told[spec.request_id], spec, 1)
        met["preempted"] += len(harness.engine.events.of(EventKind.PREEMPTED))
        for event in harness.engine.events.of(EventKind.EVICTED):
            met[str(event.reason)] += 1
    assert met["preempted"] > 3 and met[str(Reason.NO_BLOCKS)] + met[str(Reason.IDLE)] > 3, met


def test_cancelled_at_every_step() -> None:
    """W8: nothing is left, whenever it ends."""
    spec = make_spec(random.Random(11), num_questions=2, num_segments=5, early_exit_kept=None, overlap=False)
    for steps in range(200):
        harness = Reading(random.Random(steps))
        told = harness.read(spec)
        for _ in range(steps):
            if harness.engine.num_requests:
                harness.step()
        output = harness.engine.abort("margins")
        if output is None:
            assert told.finished and steps > 10
            return
        harness.take([output])
        assert told.finished and not harness.engine.num_requests
        harness.check()
        assert harness.kv.num_available == harness.kv.num_blocks
        for _, job, done in harness.late.jobs:  # type: ignore[union-attr]
            done(job())  # what was under way comes to nothing
    raise AssertionError("it does not end")


def test_a_row_that_fails_ends_this_request_alone() -> None:
    spec = make_spec(random.Random(12), num_segments=3)
    harness = Reading()
    told = harness.read(spec)
    harness.add("other", [1, 2, 3], max_tokens=9)
    harness.executor.fail = lambda grant: grant.request_id == "margins" and grant.start > 9
    harness.finish()
    assert told.finished and told.error is not None
    assert len(harness.tokens("other")) == 9


def test_tokenising_that_fails() -> None:
    class Broken(WordCodec):
        def encode_rest(self, before: Any, text: str) -> list[int]:
            raise InvalidRequestError("prompt", "this model's tokenizer fails on the text")

    harness = Reading()
    harness.engine._codec = Broken()  # type: ignore[assignment]
    told = harness.read(make_spec(random.Random(1), classification="merged"))
    harness.finish()
    assert told.error is not None and "tokenizer fails" in told.error


def test_no_room_for_an_answer() -> None:
    spec = make_spec(random.Random(1))
    spec = replace(spec, answer=replace(spec.answer, max_tokens=len(spec.document)))
    harness = Reading()
    told = harness.read(spec)
    harness.finish()
    assert told.error is not None and "no room is left for an answer" in told.error


# --- a person beside it ---


def test_review() -> None:
    """The answer waits until every margin was judged, or until it is told not to."""
    spec = make_spec(random.Random(21), num_segments=4, **WHOLE)
    spec = replace(spec, review=True)
    verdicts = {0: (True, "mine"), 1: (False, None), 2: (True, None), 3: (False, None)}

    def judge(index: int, text: str, kept: bool) -> tuple[str, bool]:
        keep, new = verdicts[index]
        return (new or text, keep) if text else (text, kept)

    harness = Reading(random.Random(0), num_blocks=200)
    told = harness.read(spec)
    harness.until(lambda: bool(told.of(ReviewBegun)))
    for _ in range(20):
        harness.step()
    assert not told.of(AnswerBegun) and not harness.engine.has_unfinished_requests
    written = {event.margin.segment.index: event.margin for event in told.of(MarginWritten)}
    for index, (keep, text) in verdicts.items():
        if written[index].text:
            assert harness.engine.call("margins", [Judge(0, index, keep, text)]) == [None]
    harness.finish()
    check(told, spec, expected=alone(spec, judge=judge))


def test_review_ends_when_told() -> None:
    spec = replace(make_spec(random.Random(22), **WHOLE), review=True)
    harness = Reading(num_blocks=200)
    told = harness.read(spec)
    harness.until(lambda: bool(told.of(ReviewBegun)))
    assert harness.engine.call("margins", [AnswerNow()]) == [None]
    harness.finish()
    check(told, spec)


def test_a_verdict_in_passing() -> None:
    """Without review a person may be faster than the answer; what comes too late is refused."""
    spec = make_spec(
        random.Random(23), num_segments=4, early_exit_kept=None, early_exit_score=None, classification="score"
    )
    harness = Reading(num_blocks=200, max_num_batched_tokens=8)
    told = harness.read(spec)
    (refused,) = harness.engine.call("margins", [Judge(0, 0, True)])
    assert isinstance(refused, InvalidRequestError) and refused.field == "segment"
    harness.until(lambda: bool(told.of(MarginWritten)))
    index = told.of(MarginWritten)[0].margin.segment.index
    assert harness.engine.call("margins", [Judge(0, index, True, "mine")]) == [None]
    (refused,) = harness.engine.call("margins", [AnswerNow()])
    assert isinstance(refused, InvalidRequestError) and refused.field == "review"
    harness.finish()
    got = told.result()
    assert got.margins[index][:2] == ("mine", True)
    assert got.margins[:index] + got.margins[index + 1 :] == [
        one for number, one in enumerate(alone(spec).margins) if number != index
    ]


def test_what_cannot_be_kept() -> None:
    """Room is kept for so many margins as may be kept by the rules; an empty one needs a text."""
    spec = make_spec(random.Random(25), num_segments=5, classification="score", early_exit_score=None, review=True)
    spec = replace(spec, early_exit_kept=2, threshold=99.0)
    harness = Reading(num_blocks=200)
    told = harness.read(spec)
    harness.until(lambda: bool(told.of(ReviewBegun)))
    margins = [event.margin for event in told.of(MarginDecided)]
    full = sorted(margin.segment.index for margin in margins if margin.text)
    for margin in margins:
        if not margin.text:
            (refused,) = harness.engine.call("margins", [Judge(0, margin.segment.index, True)])
            assert refused.field == "segment" and "is empty" in refused.problem
    assert harness.engine.call("margins", [Judge(0, full[0], True)]) == [None]
    assert harness.engine.call("margins", [Judge(0, full[1], True)]) == [None]
    (refused,) = harness.engine.call("margins", [Judge(0, full[2], True)])
    assert isinstance(refused, InvalidRequestError) and "early_exit_kept=2 allows no more" in refused.problem
    harness.engine.call("margins", [AnswerNow()])
    harness.finish()
    assert told.error is None and [one[0] for one in told.result().margins if one[1]] == [
        margin.text for margin in sorted(margins, key=lambda one: one.segment.index) if margin.segment.index in full[:2]
    ]


@pytest.mark.parametrize("places", [1, 2, 4])
def test_few_places_in_a_step(places: int) -> None:
    """Branches leave rows to others: who comes later is answered long before the document is."""
    spec = make_spec(random.Random(26), num_segments=6, num_questions=3, classification="score", **WHOLE)
    harness = Reading(num_blocks=300, max_num_seqs=places, max_num_batched_tokens=16)
    told = harness.read(replace(spec, max_branches=max(1, places // 4)))
    for _ in range(5):
        harness.step()
    harness.add("later", [1, 2, 3], max_tokens=6)
    harness.finish()
    for question in range(3):
        check(told, spec, question)
    ends = [event.time for event in harness.engine.events.of(EventKind.FINISHED)]
    names = [event.request_id for event in harness.engine.events.of(EventKind.FINISHED)]
    assert sorted(names) == ["later", "margins"]
    if places > 1:
        assert names == ["later", "margins"] and ends[0] < ends[1] / 2


@pytest.mark.parametrize("steps", range(0, 30, 3))
def test_stop_reading(steps: int) -> None:
    """What was read stays, and margins that are decided; at least one segment."""
    spec = make_spec(random.Random(24), num_segments=6, num_questions=2, **WHOLE)
    harness = Reading(random.Random(steps), num_blocks=200, max_num_batched_tokens=8)
    told = harness.read(spec)
    for _ in range(steps):
        harness.step()
    joining = {event.question for event in told.of(AnswerBegun)}
    if harness.engine.num_requests:
        harness.engine.call("margins", [StopReading()])
        harness.step()
        read = len(told.of(SegmentRead))
        harness.finish()
        assert told.error is None
        for question in range(2):
            (begun,) = [event for event in told.of(AnswerBegun) if event.question == question]
            assert 1 <= begun.num_segments <= max(read, 1) or question in joining
            end = len(spec.prefix) + spec.segments[begun.num_segments - 1].last_token
            assert list(begun.prompt_token_ids[:end]) == [*spec.prefix, *spec.document][:end]


# --- verdicts in text ---


@pytest.mark.parametrize(
    ("text", "early", "final"),
    [
        ("YES#because", True, True),
        ("yes.", True, True),
        ("YES", None, True),
        ("NO", None, False),
        ("NOT sure#", None, None),
        ("The wall, no doubt, helps#x", None, None),
        ("It does: YES", None, True),
        ("NOTHING", None, None),
        ("The answer is NO#x", False, False),
        ("  \n Yes, it does", True, True),
        ("maybe\nYES", None, None),
        ("", None, None),
        ("#YES", None, None),
        ("**YES**#", True, True),
        ("No\n", False, False),
    ],
)
def test_verdict_of(text: str, early: bool | None, final: bool | None) -> None:
    assert verdict_of(text, final=False) is early
    assert verdict_of(text, final=True) is final


def test_an_early_verdict_is_the_final_one() -> None:
    """Whatever follows."""
    rng = random.Random(0)
    words = ["YES", "NO", "yes", "Nothing", "#", "\n", " ", ".", "x", "T", "*"]
    for _ in range(3000):
        text = ""
        known = None
        for _ in range(8):
            text += rng.choice(words)
            said = verdict_of(text, final=False)
            assert known is None or said is known, text
            known = said
        assert known is None or verdict_of(text, final=True) is known


@pytest.mark.parametrize(
    ("text", "margin"),
    [("YES#what it says", "what it says"), ("Yes: a\nb", "a\nb"), ("YES", ""), ("YES. 5#6", "5#6"), (" yes # x ", "x")],
)
def test_merged_margin(text: str, margin: str) -> None:
    assert merged_margin(text) == margin


def test_it_needs_text() -> None:
    with pytest.raises(ValueError, match="codec"):
        MarginsCoordinator(make_spec(random.Random(0)), None, None)  # type: ignore[arg-type]
