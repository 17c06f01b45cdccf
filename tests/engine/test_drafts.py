"""Tokens that are guessed and verified in one step: who guesses, and how well, changes the number of steps alone."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from octavo.core.events import EventKind
from octavo.core.plan import Grant, StepPlan, StepResult, accepted_drafts, num_accepted
from tests.coordinators.test_branches import User
from tests.engine.fake import VOCAB, Harness, expected, next_token
from tests.proposing import Proposing


@dataclass
class Guesser(Proposing):
    """Guesses what the fake model says of plain requests with seed 0, and guesses wrong at times."""

    share_wrong: float = 0.0
    salt: object = (0, (0,))
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def guess(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        known = list(token_ids)
        for _ in range(self.rng.randint(0, max_tokens)):
            right = next_token(known, self.salt)
            known.append(self.rng.randrange(VOCAB) if self.rng.random() < self.share_wrong else right)
        return known[len(token_ids) :]


@pytest.fixture(autouse=True, params=[False, True], ids=["chains", "trees"])
def branched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whatever is guessed here stands in trees too."""
    monkeypatch.setattr(Guesser, "branched", request.param)
    return request.param


@dataclass
class Verified:
    """How many drafts there were, and how many were what was drawn."""

    drafted: int = 0
    accepted: int = 0

    def __call__(self, plan: StepPlan, result: StepResult) -> None:
        for grant, one in zip(plan.grants, result.results, strict=True):
            assert plan.num_tokens <= 32
            self.drafted += grant.num_drafts
            self.accepted += num_accepted(grant, one.rows) if one.error is None else 0


def guessing(share_wrong: float, **settings: object) -> tuple[Harness, Verified]:
    harness, verified = Harness(proposer=Guesser(share_wrong), **settings), Verified()  # type: ignore[arg-type]
    harness.engine.step_listeners.append(verified)
    return harness, verified


def cached_prefixes(harness: Harness) -> list[list[int]]:
    """The tokens of everything in the tree."""
    nodes = list(harness.kv.prefixes.tree.nodes())
    return [[token_id for above in [*node.path()][::-1] for token_id in above.key] for node in nodes]


def test_right_guesses_save_steps(branched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guesser, "num_trees", 0)
    plain = Harness()
    plain.add("r", [1, 2, 3], max_tokens=24)
    plain.run()
    harness, verified = guessing(0.0)
    harness.add("r", [1, 2, 3], max_tokens=24)
    harness.run()
    assert harness.tokens("r") == plain.tokens("r") == expected([1, 2, 3], 24)
    assert verified.accepted > 8 and (branched or verified.accepted == verified.drafted)
    assert harness.engine.num_steps + verified.accepted == plain.engine.num_steps == 24
    assert (Guesser.num_trees > 0) == branched
    assert harness.outputs["r"].metrics.num_generated_tokens == 24


@pytest.mark.parametrize("share_wrong", [1.0, 0.4])
def test_rejected_drafts_leave_nothing(share_wrong: float) -> None:
    """Guards against a draft in the tree, in a table, or in an answer: looked for after every step."""
    harness, verified = guessing(share_wrong, num_blocks=40)
    prompts = {f"r{i}": [i, *range(i + 3)] for i in range(6)}
    for name, prompt in prompts.items():
        harness.add(name, prompt, max_tokens=20)
    true = [prompt + expected(prompt, 21) for prompt in prompts.values()]
    seen = 0
    while harness.engine.has_unfinished_requests:
        harness.step()
        for sequence in harness.sequences():
            assert any(tokens[: sequence.num_tokens] == sequence.token_ids for tokens in true)
            assert sequence.num_computed <= sequence.num_tokens
            assert len(sequence.block_table) <= harness.kv.blocks_for(sequence.num_tokens)
        for prefix in cached_prefixes(harness):
            assert any(tokens[: len(prefix)] == prefix for tokens in true), "a guess is cached"
            seen += 1
    assert seen and verified.drafted > verified.accepted
    for name, prompt in prompts.items():
        assert harness.tokens(name) == expected(prompt, 20)


@pytest.fixture(scope="module")
def preempted() -> list[int]:
    """How often somebody was, in each run."""
    return []


@pytest.mark.parametrize("seed", range(6))
def test_neighbours_scarce_memory_and_ends(seed: int, preempted: list[int]) -> None:
    """Beside samples, penalties, end tokens in the middle of what was accepted, aborts and preemption."""
    rng = random.Random(seed)
    size = rng.choice([2, 4])
    harness, verified = guessing(0.3, num_blocks=24 // size + rng.randint(1, 4), block_size=size)
    asked = {}
    for number in range(20):
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 10))]
        count, n, penalties = rng.randint(1, 12), rng.choice([1, 1, 1, 2]), rng.random() < 0.3
        params: dict[str, object] = {"presence_penalty": 0.5} if penalties else {}
        if rng.random() < 0.5:
            params["stop_token_ids"] = rng.sample(range(VOCAB), 8)
        asked[f"r{number}"] = prompt, count, n, penalties, params.get("stop_token_ids", [])
        harness.add(f"r{number}", prompt, max_tokens=count, n=n, **params)
        for _ in range(rng.randint(0, 2)):
            harness.step()
        if number % 7 == 3:
            harness.take([output] if (output := harness.engine.abort(f"r{number}")) is not None else [])
    harness.run()
    for name, (prompt, count, n, penalties, ends) in asked.items():
        output = harness.outputs[name]
        for index in range(n):
            salt: tuple[object, ...] = (0, (index,), len(prompt)) if penalties else (0, (index,))
            tokens = list(prompt)
            while len(tokens) < len(prompt) + count and tokens[len(prompt) :][-1:] not in [[end] for end in ends]:  # type: ignore[attr-defined]
                tokens.append(next_token(tokens, salt))
            got = output.outputs[index].token_ids
            whole = output.outputs[index].finish_reason != "abort"
            assert got == tokens[len(prompt) :] if whole else got == tokens[len(prompt) :][: len(got)], name
    assert verified.drafted > verified.accepted > 0
    preempted.append(len(harness.engine.events.of(EventKind.PREEMPTED)))
    assert len(preempted) < 6 or sum(preempted) > 6, "too few were preempted to show anything"


def test_sessions() -> None:
    """`generate` ends inside of what was accepted, and the branch has no token more."""
    harness, verified = guessing(0.2)
    user = User(harness)
    user.extend(user.root, [1, 2, 3])
    tokens = [1, 2, 3]
    for number in range(3):
        harness.engine.scheduler._proposer.salt = (0, (number,))  # type: ignore[union-attr]
        (output,) = user.run(user.generate(user.root, 9))
        new = expected(tokens, 9, number)
        assert output.token_ids == new and user.root.token_ids == tokens + new
        tokens += new
    assert verified.accepted
    user.close()


def test_a_guess_that_fails_fails_nobody() -> None:
    harness, verified = guessing(0.5)
    harness.executor.fail = lambda grant: grant.num_drafts > 2
    prompts = {"a": [1, 2, 3], "b": [4, 5, 6]}
    for name, prompt in prompts.items():
        harness.add(name, prompt, max_tokens=20)
    harness.run()
    for name, prompt in prompts.items():
        assert harness.tokens(name) == expected(prompt, 20)
    assert verified.accepted and harness.engine.events.of(EventKind.STEP_RETRIED)


def test_what_was_accepted() -> None:
    from octavo.core.plan import DrawResult, RowResult

    def rows(*token_ids: int) -> list[RowResult]:
        return [RowResult(9 + i, draws=(DrawResult(token_id),)) for i, token_id in enumerate(token_ids)]

    grant = Grant("r", 0, 9, 13, (1, 5, 6, 7), (0, 1, 2, 3), (), num_drafts=3)
    assert grant.drafts == (5, 6, 7)
    assert num_accepted(grant, rows(5, 6, 7, 8)) == 3
    assert num_accepted(grant, rows(5, 6, 9, 8)) == 2
    assert num_accepted(grant, rows(5, 9, 7, 8)) == 1, "what follows a wrong guess is no verdict"
    assert num_accepted(grant, rows(4, 6, 7, 8)) == 0
    assert num_accepted(grant, rows(5)) == 1, "rows that are missing say nothing"
    #  1 - 5 - 6
    #    \\ 7 - 6 - 8
    tree = Grant("r", 0, 9, 15, (1, 5, 7, 6, 6, 8), (0, 1, 2, 3), (), num_drafts=5, draft_parents=(-1, -1, 0, 1, 3))
    assert [tree.position_of_draft(n) for n in range(5)] == [10, 10, 11, 11, 12]
    assert tree.draft_depth == 3 and grant.draft_depth == 3
    assert accepted_drafts(tree, rows(7, 0, 6, 0, 8, 9)) == (1, 3, 4)
    assert accepted_drafts(tree, rows(5, 6, 0, 2, 8, 9)) == (0, 2)
    assert accepted_drafts(tree, rows(6, 6, 6, 6, 6, 6)) == ()
    assert tree.without_drafts() == Grant("r", 0, 9, 10, (1,), (0, 1, 2, 3))


def test_a_plan_is_a_value() -> None:
    """It is the same after the engine went on, and after a way through another process."""
    harness, _ = guessing(0.4)
    plans: list[tuple[StepPlan, bytes]] = []
    harness.engine.step_listeners.append(lambda plan, result: plans.append((plan, pickle.dumps(plan))))
    harness.add("a", [1] * 40, max_tokens=9, presence_penalty=0.5, logit_bias={3: 1.0}, bad_words=["x"])
    harness.add("b", [2] * 7, max_tokens=9, n=3, prompt_logprobs=2)
    harness.run()
    assert len(plans) > 8
    for plan, pickled in plans:
        hash(plan)  # of all it holds
        assert pickle.loads(pickled) == plan and pickle.dumps(plan) == pickled


def test_a_proposer_that_raises_fails_nobody() -> None:
    class Broken(Guesser):
        def guess(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
            if len(token_ids) % 3 == 0:
                raise IndexError("no such n-gram")
            return super().guess(token_ids, max_tokens)

    harness = Harness(proposer=Broken())
    verified = Verified()
    harness.engine.step_listeners.append(verified)
    for number in range(3):
        harness.add(f"r{number}", [number] * 4, max_tokens=15)
    harness.run()
    assert [harness.tokens(f"r{n}") for n in range(3)] == [expected([n] * 4, 15) for n in range(3)]
    assert verified.accepted


def test_a_listener_that_raises_is_called_no_more() -> None:
    harness, calls = Harness(), []

    def broken(plan: StepPlan, result: StepResult) -> None:
        calls.append(plan)
        raise KeyError("oops")

    harness.engine.step_listeners += [broken, verified := Verified()]
    harness.add("r", [1, 2, 3], max_tokens=5)
    harness.run()
    assert harness.tokens("r") == expected([1, 2, 3], 5)
    assert len(calls) == 1 and harness.engine.step_listeners == [verified]


def test_a_listener_of_plans_that_raises_is_called_no_more() -> None:
    """It ends no request, let alone all."""
    harness, calls = Harness(), []

    def broken(plan: StepPlan) -> None:
        calls.append(plan.step)
        raise KeyError("oops")

    heard: list[int] = []
    harness.engine.plan_listeners += [broken, lambda plan: heard.append(plan.step)]
    harness.add("r", [1, 2, 3], max_tokens=5)
    harness.run()
    assert harness.tokens("r") == expected([1, 2, 3], 5)
    assert calls == heard[:1] and len(heard) > 1


@pytest.mark.parametrize("size", [1, 4, 7])
def test_a_drafter_that_is_always_right_or_always_wrong(size: int) -> None:
    """The first gives a token more in a step than it guesses, the second one token a step."""

    class Always(Guesser):
        branched = False

        def guess(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
            known = list(token_ids)
            for _ in range(min(size, max_tokens)):
                right = next_token(known, self.salt)
                known.append((right + 1) % VOCAB if self.share_wrong else right)
            return known[len(token_ids) :]

    tokens = 1 + 5 * (size + 1)  # the first comes out of the prompt's last row
    for share_wrong, steps in ((0.0, 6), (1.0, tokens)):
        harness, verified = Harness(proposer=Always(share_wrong)), Verified()
        harness.engine.step_listeners.append(verified)
        harness.add("r", [1, 2, 3], max_tokens=tokens)
        harness.run()
        assert harness.tokens("r") == expected([1, 2, 3], tokens)
        assert harness.engine.num_steps == steps
        assert verified.accepted == (0 if share_wrong else verified.drafted)
        metrics = harness.outputs["r"].metrics
        assert (metrics.num_draft_tokens, metrics.num_accepted_tokens) == (verified.drafted, verified.accepted)
