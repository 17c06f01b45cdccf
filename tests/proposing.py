"""Proposers of tests: they say what they guess for one sequence at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence

from octavo.core.plan import StepPlan, StepResult
from octavo.core.proposer import Asked, Draft, SpeculationStats


class Proposing:
    """A Proposer that guesses by the tokens alone and learns nothing. With `branched`, what it guesses stands in trees
    among tokens that nobody guessed."""

    stats = SpeculationStats()
    branched: bool = False
    num_trees = 0

    def guess(self, token_ids: Sequence[int], max_tokens: int) -> Sequence[int]:
        raise NotImplementedError

    def propose(self, asked: Sequence[Asked], num_rows: int, num_drawing: int) -> dict[int, Draft]:
        assert num_rows >= num_drawing >= len(asked) > 0
        found = {}
        for one in asked:
            chain = tuple(self.guess(one.sequence.token_ids, one.max_drafts))
            draft = tree_around(chain, random.Random(len(chain) + one.sequence.num_tokens)) if self.branched else None
            found[one.sequence.id] = Draft(chain) if draft is None else draft
            type(self).num_trees += draft is not None and bool(draft.first(one.max_drafts).parents)
        return found

    def learn(self, plan: StepPlan, result: StepResult, seconds: float) -> None: ...

    def forget(self, request_id: str) -> None: ...


def tree_around(chain: Sequence[int], rng: random.Random) -> Draft:
    """The chain as one path of a tree; the others' tokens are neighbours of its own."""
    token_ids: list[int] = []
    parents: list[int] = []

    def add(token_id: int, parent: int) -> int:
        token_ids.append(token_id)
        parents.append(parent)
        return len(token_ids) - 1

    last = -1
    for token_id in chain:
        aside = last
        for _ in range(rng.choice([0, 0, 1, 2])):
            aside = add(token_id + 1 if token_id < 3 else token_id - 1, aside)
        last = add(token_id, last)
    return Draft(tuple(token_ids), tuple(parents))
