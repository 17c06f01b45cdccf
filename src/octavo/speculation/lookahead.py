"""How many tokens a model or a head is to guess behind a step, for the next one: as many as are predicted to pay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from octavo.core.proposer import Asked
from octavo.core.speculation import SpeculativeConfig
from octavo.speculation.control import DOUBT, LEAST_GAIN, Acceptance, Brake, StepCosts
from octavo.speculation.from_model import FromModel

_SEEING = 0.01  # of the time of steps in which a model does not pay goes into guesses that show whether it does
_SETTLED = 8  # steps for which it holds that a model does not pay


class Lookahead:
    """What a model's guesses cost, and what comes of it. It costs time whether or not its guesses are verified."""

    def __init__(
        self, config: SpeculativeConfig, drafter: FromModel, acceptance: Acceptance, costs: StepCosts, brake: Brake
    ) -> None:
        self._drafter = drafter
        self._acceptance = acceptance
        self._costs = costs
        self._brake = brake
        self._most = config.max_drafts
        self._adaptive = config.adaptive
        self._keeps_kv = config.method == "draft_model"
        self._round_seconds = 0.0  # for a token more of each sequence
        self._read_seconds = 0.0  # for a token that it reads first
        self._saved_seconds = 0.0  # that a token takes less, as predicted, when it guesses
        self._steps_without = 0  # that are left, when it does not pay
        self._to_see = 0.0  # seconds that may go into seeing whether it still does not

    def of(self, asked: Sequence[Asked], num_drafts: Mapping[int, int], num_rows: int) -> dict[int, int]:
        """By sequence id; `num_drafts` of each are verified in this step."""
        if self._adaptive and self._steps_without:
            self._steps_without -= 1
            return {}
        most = self._worth_guessing(asked, num_rows) if self._adaptive else self._most
        found = {}
        for one in asked:
            count = min(most, one.max_drafts - 1 - num_drafts.get(one.sequence.id, 0))
            if count > 0 and self._is_worth_reading(one):
                found[one.sequence.id] = count
        return found

    def num_slots(self, count: int) -> int:
        """Slots for K and V that so many guesses need."""
        return count if self._keeps_kv else 0

    def learn(self, timings: Mapping[str, float]) -> None:
        """Of a step."""
        if (seconds := timings.get("draft_round")) is not None:
            self._round_seconds = _mixed(self._round_seconds, seconds)
        if (seconds := timings.get("draft_read")) is not None:
            self._read_seconds = _mixed(self._read_seconds, seconds)

    def _is_worth_reading(self, one: Asked) -> bool:
        """Whether what a model has not read of a sequence costs less than guesses save of all that may still come."""
        if not self._adaptive or not self._read_seconds:
            return True
        return self._drafter.num_unread(one.sequence) * self._read_seconds <= one.max_drafts * self._saved_seconds

    def _worth_guessing(self, asked: Sequence[Asked], num_rows: int) -> int:
        """The number of tokens whose guessing pays, by what was seen so far, if those are verified that come true often
        enough; now and then one, to see."""
        plain = self._costs.of(num_rows)
        least = self._costs.of(num_rows + len(asked)) / plain - 1  # what a row more of each takes, what it gains
        gained = [0.0] * (self._most + 1)  # logarithms of tokens, over all sequences
        rows = [0.0] * (self._most + 1)  # that are verified
        for one in asked:
            tokens, chance, verified, reached = 1.0, 1.0, 0.0, 1.0
            rates = self._acceptance.rates(one.request_id)
            for place, (share, right) in enumerate(self._drafter.by_place(rates, self._most, least), 1):
                chance *= right
                tokens += chance
                reached *= share
                verified += reached
                gained[place] += math.log(tokens)
                rows[place] += verified
        best, value = 0, LEAST_GAIN * len(asked)
        for count in range(1, self._most + 1):
            seconds = self._costs.of(num_rows + math.ceil(rows[count])) + count * self._round_seconds
            if (worth := DOUBT * gained[count] - len(asked) * math.log(seconds / plain)) > value:
                best, value = count, worth
        self._saved_seconds = plain * (1 - math.exp(-value / max(len(asked), 1)))
        if best and not self._brake.holds:
            return best
        self._steps_without = _SETTLED - 1
        self._to_see += _SETTLED * _SEEING * plain
        if self._to_see < self._round_seconds:
            return 0
        self._to_see = 0.0
        return 1


def _mixed(mean: float, seen: float) -> float:
    return mean + (seen - mean) * 0.1 if mean else seen
