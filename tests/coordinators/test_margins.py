"""Writing in the Margins over the executor without a model: what comes out is a function of the request alone.

Every run, whatever its neighbours, memory, order of steps and whoever tokenises late, is compared with `alone`.
"""

from __future__ import annotations

import pickle
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from octavo.coordinators.margins import MarginsCoordinator
from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import InvalidRequestError
from octavo.core.events import EventKind, Reason
from octavo.core.margins import (
    AnswerBegun,
    AnswerNow,
    Judge,
    MarginWritten,
    SegmentRead,
    StopReading,
)
from tests.coordinators.reading import (
    WHOLE,
    Reading,
    WordCodec,
    alone,
    check,
    make_spec,
)
from tests.coordinators.test_branches import User
from tests.engine.fake import VOCAB, next_token
from tests.engine.fake import expected as expected_of
from tests.engine.test_drafts import Guesser
from tests.engine.test_storm_of_all import search, search_alone


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
        def encode_around(self, before: Any, *parts: str) -> list[int]:
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


def test_it_needs_text() -> None:
    with pytest.raises(ValueError, match="codec"):
        MarginsCoordinator(make_spec(random.Random(0)), None, None)  # type: ignore[arg-type]
