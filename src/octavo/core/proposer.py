"""The contract of what guesses tokens: what it is asked, what it gives, and figures of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from octavo.core import sequence
    from octavo.core.namespace import Namespace
    from octavo.core.plan import StepPlan, StepResult


class Asked(NamedTuple):
    """A sequence for which guesses are welcome in the step that is being made."""

    sequence: sequence.Sequence
    request_id: str
    namespace: Namespace
    max_drafts: int  # at least 1


class Draft(NamedTuple):
    """Tokens that may follow a sequence: a chain, or a tree with the number of each one's parent, which stands before
    it; -1: it follows the sequence."""

    token_ids: tuple[int, ...]
    parents: tuple[int, ...] = ()  # of a chain none
    lookahead: int = 0  # tokens that a draft model or a head is to guess behind what comes of the step
    lookahead_slots: int = 0  # that their K and V need

    def first(self, count: int) -> Draft:
        """At most so many of them; a tree that is a chain as such."""
        parents = self.parents[:count]
        if parents == tuple(range(-1, len(parents) - 1)):
            parents = ()
        return self._replace(token_ids=self.token_ids[:count], parents=parents)

    def only(self, numbers: Sequence[int]) -> Draft:
        """Those of these numbers, which ascend; with each all that it follows."""
        places = {number: place for place, number in enumerate(numbers)} | {-1: -1}
        parents = self.parents or range(-1, len(self.token_ids) - 1)
        token_ids = tuple(self.token_ids[n] for n in numbers)
        chosen = self._replace(token_ids=token_ids, parents=tuple(places[parents[n]] for n in numbers))
        return chosen.first(len(token_ids))

    def paths(self) -> list[tuple[int, ...]]:
        """Of each, the tokens from the first on down to it."""
        found: list[tuple[int, ...]] = []
        for number, token_id in enumerate(self.token_ids):
            parent = self.parents[number] if self.parents else number - 1
            found.append((*(found[parent] if parent >= 0 else ()), token_id))
        return found


NO_DRAFT = Draft(())


@dataclass(slots=True)
class SpeculationStats:
    """Since the engine was built."""

    num_drafts: int = 0  # times that tokens were guessed for a sequence, and verified in a step
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)  # how often a first, second, ... was accepted
    drafted_per_position: list[int] = field(default_factory=list)  # of how many times that one was guessed, or several
    num_drawn_tokens: int = 0  # by steps and sequences for which guesses were welcome, whether or not there were any
    num_draws: int = 0  # such steps and sequences
    seconds_saved: float = 0.0  # predicted time of the steps that were spared, less what guessing added to others

    def count(self, num_drafts: int, depth: int, num_accepted: int) -> None:
        """A sequence's part of one step; of a chain the depth is the number of drafts."""
        self.num_draws += 1
        self.num_drawn_tokens += num_accepted + 1
        if not num_drafts:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        missing = depth - len(self.drafted_per_position)
        if missing > 0:
            self.accepted_per_position += [0] * missing
            self.drafted_per_position += [0] * missing
        for position in range(depth):
            self.drafted_per_position[position] += 1
            self.accepted_per_position[position] += position < num_accepted

    def copy(self) -> SpeculationStats:
        """As they are now."""
        lists = list(self.accepted_per_position), list(self.drafted_per_position)
        return replace(self, accepted_per_position=lists[0], drafted_per_position=lists[1])

    @property
    def tokens_per_step(self) -> float:
        """That a sequence got in a step; 1 where nothing was accepted."""
        return self.num_drawn_tokens / self.num_draws if self.num_draws else 1.0


class Proposer(Protocol):
    """Guesses tokens that may follow sequences, to be verified in the step that is being made (speculative decoding).
    Called by the engine's thread between steps. Where it raises, that step goes on without."""

    stats: SpeculationStats

    def propose(self, asked: Sequence[Asked], num_rows: int, num_drawing: int) -> Mapping[int, Draft]:
        """Guesses by sequence id, at most `max_drafts` each; those of which nothing is guessed are left out. The step
        has about `num_rows` rows without them, and `num_drawing` sequences draw a token in it."""
        ...

    def learn(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """What came of the step for which was proposed last, which took so long in all."""
        ...

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        ...
