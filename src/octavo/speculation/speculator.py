"""The engine's Proposer: a drafter guesses, the control says how much of it goes into the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from octavo.core.plan import Grant, GrantResult, StepPlan, StepResult, accepted_drafts
from octavo.core.proposer import NO_DRAFT, Asked, Draft, SpeculationStats
from octavo.core.speculation import SpeculativeConfig
from octavo.speculation import lookup
from octavo.speculation.control import DOUBT, LEAST_GAIN, Acceptance, Brake, StepCosts, choose
from octavo.speculation.drafter import Drafter, Guess
from octavo.speculation.from_model import FromModel

_SEEING = 0.01  # of the time of steps in which a model does not pay goes into guesses that show whether it does
_SETTLED = 8  # steps for which it holds that a model does not pay


class _Pending(NamedTuple):
    request_id: str
    guess: Guess


_LOOKS = 3  # steps in which a sequence is not looked at, at most, after nothing was found that pays: of one alone,
_LOOKS_OF_MANY = 4  # and a step more for so many sequences


class Speculator:
    """See the module."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self.stats = SpeculationStats()
        self.costs = StepCosts()
        self._drafter = _drafter(config)
        self._from_model = self._drafter if isinstance(self._drafter, FromModel) else None
        self._draft_seconds = 0.0  # of a model, for a token of each sequence
        self._read_seconds = 0.0  # of a model, for a token that it reads first
        self._saved_seconds = 0.0  # that a token takes less, as predicted, when a model guesses
        self._steps_without = 0  # that are left, of a model that does not pay
        self._to_see = 0.0  # seconds that may go into seeing whether it still does not
        self._most = config.max_drafts
        self._adaptive = config.adaptive
        self._acceptance = Acceptance(self._drafter.first_rates)
        self._brake = Brake()
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
        if not self._adaptive:
            drafts = {n: guess.draft for n, guess in guessed.items()}
            return self._with_lookahead(asked, drafts, num_rows)
        chosen: dict[int, int] = {}
        if guessed and not self._brake.holds:
            chances = {n: guess.chances for n, guess in guessed.items()}
            chosen = choose(chances, num_rows, num_drawing, self.costs)
        drafts = {n: guessed[n].draft.first(count) for n, count in chosen.items()}
        if self._from_model is not None:
            return self._with_lookahead(asked, drafts, num_rows)
        self._rest_after(chosen)
        return drafts

    def _with_lookahead(self, asked: Sequence[Asked], drafts: dict[int, Draft], num_rows: int) -> dict[int, Draft]:
        """How many tokens a model is to guess behind this step, for the next one."""
        if self._from_model is None:
            return drafts
        if self._adaptive and self._steps_without:
            self._steps_without -= 1
            return drafts
        most = self._most if not self._adaptive else self._worth_drafting(self._from_model, asked, num_rows)
        for one in asked:
            draft = drafts.get(one.sequence.id, NO_DRAFT)
            room = one.max_drafts - 1 - len(draft.token_ids)
            if min(most, room) > 0 and self._is_worth_reading(self._from_model, one):
                drafts[one.sequence.id] = draft._replace(lookahead=min(most, room))
        return drafts

    def _is_worth_reading(self, drafter: FromModel, one: Asked) -> bool:
        """Whether what a model has not read of a sequence costs less than guesses save of all that may still come."""
        if not self._adaptive or not self._read_seconds:
            return True
        return drafter.num_unread(one.sequence) * self._read_seconds <= one.max_drafts * self._saved_seconds

    def _worth_drafting(self, drafter: FromModel, asked: Sequence[Asked], num_rows: int) -> int:
        """The number of tokens whose guessing pays, by what was seen so far, if those are verified that come true often
        enough; now and then one, to see."""
        plain = self.costs.of(num_rows)
        least = self.costs.of(num_rows + len(asked)) / plain - 1  # what a row more of each takes, what it gains
        gained = [0.0] * (self._most + 1)  # logarithms of tokens, over all sequences
        rows = [0.0] * (self._most + 1)  # that are verified
        for one in asked:
            tokens, chance, verified, reached = 1.0, 1.0, 0.0, 1.0
            rates = self._acceptance.rates(one.request_id)
            for place, (share, right) in enumerate(drafter.by_place(rates, self._most, least), 1):
                chance *= right
                tokens += chance
                reached *= share
                verified += reached
                gained[place] += math.log(tokens)
                rows[place] += verified
        best, value = 0, LEAST_GAIN * len(asked)
        for count in range(1, self._most + 1):
            seconds = self.costs.of(num_rows + math.ceil(rows[count])) + count * self._draft_seconds
            if (worth := DOUBT * gained[count] - len(asked) * math.log(seconds / plain)) > value:
                best, value = count, worth
        self._saved_seconds = plain * (1 - math.exp(-value / max(len(asked), 1)))
        if self._brake.holds:
            best = 0
        if best:
            return best
        self._steps_without = _SETTLED - 1
        self._to_see += _SETTLED * _SEEING * plain
        if self._to_see < self._draft_seconds:
            return 0
        self._to_see = 0.0
        return 1

    def _rests(self, sequence_id: int) -> bool:
        """Whether a sequence is left alone in this step: looking costs time, and text that did not repeat a moment ago
        seldom does."""
        left, following = self._rest.get(sequence_id, (0, 0))
        if not left:
            return False
        self._rest[sequence_id] = left - 1, following
        return True

    def _rest_after(self, chosen: Mapping[int, int]) -> None:
        if len(self._rest) > 2 * len(self._pending) + 64:
            self._rest = {}  # of sequences that ended
        most = _LOOKS + len(self._pending) // _LOOKS_OF_MANY
        for sequence_id in self._pending:
            if sequence_id in chosen:
                self._rest.pop(sequence_id, None)
            else:
                _, steps = self._rest.get(sequence_id, (0, 0))
                self._rest[sequence_id] = steps, min(steps + 1, most)

    def learn(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """See octavo.core.proposer.Proposer."""
        num_drafts = num_accepted = 0
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
        elif (draft_seconds := result.timings.get("draft", 0.0)) > _SEEING * seconds:  # guessed, and nothing verified
            self.stats.seconds_saved -= draft_seconds
            self._brake.observe(seconds, -draft_seconds)
        if (seconds_of_round := result.timings.get("draft_round")) is not None:
            self._draft_seconds = _mixed(self._draft_seconds, seconds_of_round)
        if (seconds_of_token := result.timings.get("draft_read")) is not None:
            self._read_seconds = _mixed(self._read_seconds, seconds_of_token)
        self.costs.observe(plan.num_tokens, seconds - result.timings.get("draft", 0.0))
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


def _mixed(mean: float, seen: float) -> float:
    return mean + (seen - mean) * 0.1 if mean else seen


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
