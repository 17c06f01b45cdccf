"""The engine's Proposer: a drafter guesses, the control says how much of it goes into the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from octavo.core.plan import Grant, GrantResult, StepPlan, StepResult, accepted_drafts
from octavo.core.proposer import NO_DRAFT, Asked, Draft, SpeculationStats
from octavo.core.speculation import SpeculativeConfig
from octavo.speculation import lookup
from octavo.speculation.control import Acceptance, Brake, StepCosts, choose
from octavo.speculation.drafter import Drafter, Guess
from octavo.speculation.from_model import FromModel
from octavo.speculation.lookahead import Lookahead

_LOOKS = 3  # steps in which a sequence is not looked at, at most, after nothing was found that pays: of one alone,
_LOOKS_OF_MANY = 2  # and a step more for so many sequences


class _Pending(NamedTuple):
    request_id: str | None  # None: it has ended
    guess: Guess


class Speculator:
    """See the module."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self.stats = SpeculationStats()
        self.costs = StepCosts()
        self._most = config.max_drafts
        self._adaptive = config.adaptive
        self._drafter = drafter = _drafter(config)
        self._acceptance = Acceptance(drafter.first_rates)
        self._brake = Brake()
        self._from_model: FromModel | None = None
        self._lookahead: Lookahead | None = None
        if isinstance(drafter, FromModel):
            self._from_model = drafter
            self._lookahead = Lookahead(config, drafter, self._acceptance, self.costs, self._brake)
        self._pending: dict[int, _Pending] = {}  # by sequence id: what was guessed for the step under way
        self._drawing = 0  # sequences that draw in it
        self._num_resting = 0  # that were not looked at
        self._rest: dict[int, tuple[int, int]] = {}  # sequence id -> (steps left without a look, steps the next time)

    def propose(self, asked: Sequence[Asked], num_rows: int, num_drawing: int) -> dict[int, Draft]:
        """See octavo.core.proposer.Proposer."""
        self._drafter.sweep()
        self._drawing = num_drawing
        self._pending = {}
        for one in asked:
            sequence_id = one.sequence.id
            if self._from_model is not None:
                if not self._from_model.has_one_for(sequence_id):
                    continue
            elif self._rests(sequence_id):
                continue
            rates = self._acceptance.rates(one.request_id)
            guess = self._drafter.guess(one, min(one.max_drafts, self._most), rates)
            self._pending[sequence_id] = _Pending(one.request_id, guess)
        self._num_resting = len(asked) - len(self._pending)
        guessed = {n: guess for n, (_, guess) in self._pending.items() if guess.token_ids}
        chosen = {n: len(guess.token_ids) for n, guess in guessed.items()}
        if self._adaptive and guessed:
            chances = {n: guess.chances for n, guess in guessed.items()}
            chosen = {} if self._brake.holds else choose(chances, num_rows, num_drawing, self.costs)
        drafts = {n: guessed[n].draft.first(count) for n, count in chosen.items()}
        if self._lookahead is not None:
            for n, count in self._lookahead.of(asked, chosen, num_rows).items():
                draft = drafts.get(n, NO_DRAFT)
                drafts[n] = draft._replace(lookahead=count, lookahead_slots=self._lookahead.num_slots(count))
        elif self._adaptive:
            self._rest_after(chosen, _LOOKS + len(asked) // _LOOKS_OF_MANY)
        return drafts

    def _rests(self, sequence_id: int) -> bool:
        """Whether a sequence is left alone in this step: looking costs time, and text that did not repeat a moment ago
        seldom does."""
        left, following = self._rest.get(sequence_id, (0, 0))
        if not left:
            return False
        self._rest[sequence_id] = left - 1, following
        return True

    def _rest_after(self, chosen: Mapping[int, int], most: int) -> None:
        if len(self._rest) > 2 * self._drawing + 64:
            self._rest = {}  # of sequences that ended
        for sequence_id in self._pending:
            if sequence_id in chosen:
                self._rest.pop(sequence_id, None)
            else:
                _, steps = self._rest.get(sequence_id, (0, 0))
                self._rest[sequence_id] = steps, min(steps + 1, most)

    def learn(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """See octavo.core.proposer.Proposer."""
        num_drafts = num_accepted = 0
        guessing = result.timings.get("draft", 0.0)  # seconds of a model
        self.stats.num_draws += self._num_resting
        self.stats.num_drawn_tokens += self._num_resting
        self._num_resting = 0
        for grant, of_grant in zip(plan.grants, result.results, strict=True):
            pending = self._pending.get(grant.sequence_id)
            if (pending is None and not of_grant.guess) or of_grant.error is not None:
                continue
            came = _came(grant, of_grant)
            if not came:
                continue
            if self._from_model is not None:
                self._from_model.take(grant.sequence_id, grant.first_draft + len(came), of_grant)
            if pending is None:
                continue
            num_drafts += grant.num_drafts
            num_accepted += len(came) - 1
            self.stats.count(grant.num_drafts, grant.draft_depth, len(came) - 1)
            self._learn_of(pending, came)
        if num_drafts:
            without = self.costs.of(plan.num_tokens - num_drafts)
            drawing = max(self._drawing, 1)
            saved = without + num_accepted * self.costs.of(drawing) / drawing - seconds
            self.stats.seconds_saved += saved
            self._brake.observe(seconds, saved)
        elif guessing:  # and nothing of it was verified
            self.stats.seconds_saved -= guessing
            self._brake.observe(seconds, -guessing)
        if self._lookahead is not None:
            self._lookahead.learn(result.timings)
        self.costs.observe(plan.num_tokens, seconds - guessing)
        self._pending = {}

    def _learn_of(self, pending: _Pending, came: Sequence[int]) -> None:
        """Of all tokens that were guessed in the places of those that came, verified or not."""
        request_id, guess = pending
        parent = -1
        for token_id in came:
            right = None
            for number, above in enumerate(guess.parents):
                if above == parent:
                    is_right = guess.token_ids[number] == token_id
                    self._acceptance.observe(request_id, guess.kinds[number], is_right)
                    right = number if is_right else right
            if right is None:
                return
            parent = right

    def forget(self, request_id: str) -> None:
        """See octavo.core.proposer.Proposer."""
        self._acceptance.forget(request_id)
        for n, pending in self._pending.items():  # its last step is yet to be learnt from
            if pending.request_id == request_id:
                self._pending[n] = pending._replace(request_id=None)


def _came(grant: Grant, result: GrantResult) -> list[int]:
    """The tokens that a sequence got in a step."""
    accepted = accepted_drafts(grant, result.rows)
    rows = [row for row in result.rows if row.draws][-grant.num_drafts - 1 :]
    return [rows[n].draws[0].token_id for n in (0, *(number + 1 for number in accepted)) if n < len(rows)]


def _drafter(config: SpeculativeConfig) -> Drafter:
    match config.method:
        case "ngram":
            return lookup.NGram(config)
        case "suffix":
            return lookup.Suffix(config)
    return FromModel()
