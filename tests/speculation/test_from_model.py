"""The engine with a model or a head that guesses, on machines whose steps and guesses take a known time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from octavo.core.namespace import SHARED
from octavo.core.plan import GrantResult, StepPlan, StepResult, accepted_drafts
from octavo.core.proposer import NO_DRAFT, Asked
from octavo.core.speculation import SpeculativeConfig
from octavo.runner.drafting import READ, ROUND
from octavo.speculation.from_model import FromModel
from octavo.speculation.speculator import Speculator
from tests.engine import fake
from tests.engine.fake import Harness
from tests.speculation.test_lookup import Sequences

HEAD = SpeculativeConfig(method="draft_head", model="head.safetensors")


class Guesses(NamedTuple):
    right: float  # share of its guesses
    round_seconds: float  # that a token more of each sequence takes
    tells: bool = False  # how sure it is: of those that are right mostly more than of those that are not
    read_seconds: float = 0.0  # of a token of a sequence for which it guesses the first time
    seed: int = 0


def machine(rows: int) -> float:
    return 1.0 + 0.1 * rows


def next_token(seen: Sequence[int], salt: object = 0) -> int:
    return hash((tuple(seen[-3:]), len(seen))) % fake.VOCAB


class Model:
    """Beside the executor of a harness: it guesses for whom it is asked, and takes the harness's time for it."""

    def __init__(self, harness: Harness, guesses: Guesses) -> None:
        self._harness, self._guesses = harness, guesses
        self._rng = random.Random(guesses.seed)
        self._read: set[int] = set()
        self.num_read = 0
        run = harness.executor.result
        harness.executor.result = lambda: self._with_guesses(run())  # type: ignore[method-assign]

    def _with_guesses(self, result: StepResult) -> StepResult:
        plan = self._harness.executor.plans[-1]
        self._harness.now += machine(plan.num_tokens)
        results, rounds, read = [], 0, 0
        for grant, one in zip(plan.grants, result.results, strict=True):
            if not grant.num_lookahead:
                results.append(one)
                continue
            rounds = max(rounds, grant.num_lookahead)
            accepted = accepted_drafts(grant, one.rows)
            tokens = self._harness.executor._known[grant.sequence_id][: grant.first_draft]
            tokens = [*tokens, *(grant.drafts[n] for n in accepted)]
            tokens.append(next_token(tokens))
            if self._guesses.read_seconds and grant.sequence_id not in self._read:
                read += len(tokens)
                self._read.add(grant.sequence_id)
            results.append(self._guess(one, tokens, grant.num_lookahead))
        seconds = rounds * self._guesses.round_seconds + read * self._guesses.read_seconds
        self._harness.now += seconds
        self.num_read += read
        timings = {"draft": seconds} | ({ROUND: self._guesses.round_seconds} if rounds else {})
        if read:
            timings[READ] = self._guesses.read_seconds
        return StepResult(tuple(results), timings)

    def _guess(self, result: GrantResult, tokens: list[int], count: int) -> GrantResult:
        guess, chances = [], []
        for _ in range(count):
            right = next_token(tokens)
            is_right = self._rng.random() < self._guesses.right
            guess.append(right if is_right else (right + 1) % fake.VOCAB)
            chances.append(self._rng.choice([0.92, 0.95, 0.3] if is_right else [0.05, 0.3]))
            tokens = [*tokens, guess[-1]]
        return result._replace(guess=tuple(guess), guess_chances=tuple(chances) if self._guesses.tells else ())


def seconds(
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    guesses: Guesses | None,
    tokens: int = 250,
    prompt: int = 4,
    places: int = 32,
) -> tuple[float, Model | None]:
    monkeypatch.setattr(fake, "next_token", next_token)
    proposer = None if guesses is None else Speculator(HEAD)
    harness = Harness(num_blocks=8000, max_num_seqs=places, max_num_batched_tokens=256, proposer=proposer)
    model = None
    if guesses is None:
        harness.engine.plan_listeners.append(lambda plan: _add(harness, plan))
    else:
        model = Model(harness, guesses)
    for number in range(batch):
        harness.add(f"r{number}", [number, *range(prompt - 1)], max_tokens=tokens)
    harness.run()
    return harness.now - len(harness.executor.plans), model  # the harness takes 1.0 a step between steps


def mean_seconds(monkeypatch: pytest.MonkeyPatch, batch: int, guesses: Guesses) -> float:
    """Over some fortunes."""
    return sum(seconds(monkeypatch, batch, guesses._replace(seed=seed))[0] for seed in range(4)) / 4


def _add(harness: Harness, plan: StepPlan) -> None:
    harness.now += machine(plan.num_tokens)


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize(
    "guesses",
    [Guesses(0.05, 0.1), Guesses(0.3, 0.5), Guesses(0.5, 1.0), Guesses(0.3, 0.5, tells=True), Guesses(0.0, 0.02)],
)
def test_it_is_not_slower_where_guesses_do_not_pay(
    monkeypatch: pytest.MonkeyPatch, batch: int, guesses: Guesses
) -> None:
    plain, _ = seconds(monkeypatch, batch, None)
    guessed, _ = seconds(monkeypatch, batch, guesses)
    assert guessed <= 1.03 * plain


@pytest.mark.parametrize(
    ("batch", "guesses", "least"),
    [(1, Guesses(0.8, 0.1), 1.6), (4, Guesses(0.8, 0.1), 1.2), (1, Guesses(0.5, 0.1), 1.1)],
)
def test_it_is_faster_where_they_do(
    monkeypatch: pytest.MonkeyPatch, batch: int, guesses: Guesses, least: float
) -> None:
    plain, _ = seconds(monkeypatch, batch, None)
    assert plain >= least * mean_seconds(monkeypatch, batch, guesses)


def test_how_sure_it_is_says_which_guesses_to_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = mean_seconds(monkeypatch, 4, Guesses(0.5, 0.1))
    assert mean_seconds(monkeypatch, 4, Guesses(0.5, 0.1, tells=True)) < 0.97 * blind


def test_a_long_prompt_is_not_read_for_a_short_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Sequences()
    speculator = Speculator(HEAD)

    def lookahead(num_tokens: int, left: int) -> int:
        sequence = make.new([1] * num_tokens)
        asked = Asked(sequence, "r", SHARED, left)
        return speculator.propose([asked], 1, 1).get(sequence.id, NO_DRAFT).lookahead

    assert lookahead(200, 10) > 0, "nobody knows yet what reading costs"
    for rows in range(1, 9):
        speculator.costs.observe(rows, machine(rows))
    speculator.learn(StepPlan(0, ()), StepResult((), {ROUND: 0.1, READ: 0.05}), 1.0)
    assert lookahead(200, 10) == 0 < lookahead(200, 190)
    assert lookahead(10, 10) > 0
    sizes = {"tokens": 20, "prompt": 150, "places": 1}
    long, model = seconds(monkeypatch, 6, Guesses(0.8, 0.1, read_seconds=0.2), **sizes)
    assert model is not None and 150 <= model.num_read < 160, "of all but the first, none"
    assert long <= 1.3 * seconds(monkeypatch, 6, None, **sizes)[0]


def test_guesses_that_nobody_verifies_are_seen_to_cost_time() -> None:
    """However sure they seem: something else may drop them."""
    make, speculator = Sequences(), Speculator(HEAD)
    sequence = make.new([1] * 10)
    for rows in range(1, 9):
        speculator.costs.observe(rows, machine(rows))
    asked, num_guessed = [Asked(sequence, "r", SHARED, 1000)], 0
    for step in range(600):
        draft = speculator.propose(asked, 1, 1).get(sequence.id, NO_DRAFT)
        num_guessed += draft.lookahead > 0
        timings = {"draft": 0.5, ROUND: 0.1} if draft.lookahead else {}
        speculator.learn(StepPlan(step, ()), StepResult((), timings), 1.1)
    assert 0 < num_guessed < 60
    assert speculator.stats.seconds_saved == pytest.approx(-0.5 * num_guessed)


def test_a_head_needs_no_slots() -> None:
    make = Sequences()
    for method, needs in (("draft_head", False), ("draft_model", True)):
        speculator = Speculator(SpeculativeConfig(method=method, model="x", adaptive=False))
        sequence = make.new([1] * 10)
        draft = speculator.propose([Asked(sequence, "r", SHARED, 100)], 1, 1)[sequence.id]
        assert draft.lookahead == 4 and draft.lookahead_slots == (4 if needs else 0)


def test_what_was_learnt_of_requests_goes_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they end in a step that had guesses for them."""
    monkeypatch.setattr(fake, "next_token", next_token)
    proposer = Speculator(HEAD)
    harness = Harness(num_blocks=800, max_num_seqs=8, max_num_batched_tokens=256, proposer=proposer)
    Model(harness, Guesses(0.8, 0.02))
    for number in range(30):
        harness.add(f"r{number}", [number, 1, 2], max_tokens=40, stop_token_ids=[7, 8, 9])
    harness.run()
    assert proposer.stats.num_accepted_tokens > 20
    assert not proposer._acceptance._requests


def test_no_budget_for_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that has a token for each sequence and no more asks for none."""
    monkeypatch.setattr(fake, "next_token", next_token)
    harness = Harness(num_blocks=800, max_num_seqs=8, max_num_batched_tokens=8, proposer=Speculator(HEAD))
    model = Model(harness, Guesses(1.0, 0.5))
    harness.add("r", [1, 2], max_tokens=40)
    harness.run()
    assert model._rng.getstate() == random.Random(0).getstate(), "nothing was guessed"


def test_kinds() -> None:
    """Of a place, and of how sure it is; what a place comes to is the mean of those that were seen there."""
    make, drafter = Sequences(), FromModel()
    sequence = make.new([1, 2, 3])
    rates = [float(n) for n in range(len(drafter.first_rates))]
    for chances in ((0.05, 0.99), (0.05, 0.5)):
        drafter.take(sequence.id, 3, GrantResult(guess=(7, 8), guess_chances=chances))
        assert drafter.num_unread(sequence) == 0
        guess = drafter.guess(Asked(sequence, "r", SHARED, 5), 5, rates)
        assert guess.token_ids == [7, 8] and guess.parents == [-1, 0]
        assert len(set(guess.kinds)) == 2 and guess.kinds[0] == 0
    assert not drafter.has_one_for(sequence.id)
    first, second, third = drafter.by_place(rates, 3)
    assert first == (pytest.approx(1), 0.0) and second == third and min(guess.kinds[1:]) < second[1]
    often = drafter.by_place(rates, 2, least=guess.kinds[1] + 1)  # the surer of the two that were seen in second place
    assert often[0] == (0, 0) and 0 < often[1][0] < 0.6
    drafter.take(sequence.id, 4, GrantResult(guess=(7,)))
    assert not drafter.guess(Asked(sequence, "r", SHARED, 5), 5, rates).token_ids, "it is for one token more"
