"""What pays and what does not, on machines made up here: no test measures time."""

from __future__ import annotations

import random
from itertools import accumulate
from operator import mul

import pytest

from octavo.speculation.control import DOUBT, Acceptance, Brake, StepCosts, choose


def chain(each: list[float]) -> list[float]:
    """Of tokens that come true with these probabilities if those before them do: that they and all before do."""
    return list(accumulate(each, mul))


def measured(seconds: dict[int, float], times: int = 8) -> StepCosts:
    costs = StepCosts()
    for _ in range(times):
        for rows, took in seconds.items():
            costs.observe(rows, took)
    return costs


def test_costs_are_what_was_measured_and_between() -> None:
    costs = measured({1: 1.0, 4: 1.6, 8: 3.2})
    assert [costs.of(n) for n in (1, 4, 8)] == pytest.approx([1.0, 1.6, 3.2])
    assert costs.of(6) == pytest.approx(2.4)
    assert 3.2 < costs.of(16) < 6.4, "a row more is never more than a step of its own"
    assert measured({100: 5.0}).of(1) < 5.0


def test_costs_follow_what_slows_all_steps_down() -> None:
    costs = measured({1: 1.0, 4: 1.6})
    for _ in range(60):
        costs.observe(1, 2.0)
    assert costs.of(1) == pytest.approx(2.0, rel=0.02)
    assert 2.4 < costs.of(4) < 3.4, "steps of four rows are slower too, though none was seen"


def test_one_slow_step_changes_little() -> None:
    costs = measured({1: 1.0, 4: 1.6}, times=40)
    costs.observe(1, 50.0)
    assert costs.of(1) < 1.4
    costs.observe(1, 0.0)  # a clock that stands still
    costs.observe(0, 1.0)
    assert costs.of(1) < 1.4


def test_how_often_guesses_come_true_is_learnt_by_kind_and_request() -> None:
    rng, acceptance = random.Random(0), Acceptance([0.5, 0.5])
    for _ in range(2000):
        for kind, share in ((0, 0.9), (1, 0.2)):
            acceptance.observe("often", kind, rng.random() < share)
    assert acceptance.rates("other") == [pytest.approx(0.9, abs=0.06), pytest.approx(0.2, abs=0.08)]
    for _ in range(60):
        acceptance.observe("never", 0, False)
        acceptance.observe("often", 0, True)
    assert acceptance.rates("never")[0] < 0.35 < 0.6 < acceptance.rates("often")[0] < 1
    acceptance.forget("never")
    assert acceptance.rates("never") == acceptance.rates("other")


def test_what_pays_is_chosen() -> None:
    """One sequence, on a machine where a row more costs a tenth of a step."""
    costs = measured({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.7, 16: 2.5})
    assert choose({5: chain([0.9] * 8)}, 1, 1, costs)[5] == 8
    assert choose({5: chain([0.5] * 8)}, 1, 1, costs)[5] in (2, 3)
    assert choose({5: chain([0.08] * 8)}, 1, 1, costs) == {}
    assert choose({5: chain([])}, 1, 1, costs) == {} == choose({}, 1, 1, costs)


def test_where_rows_are_dear_nothing_is_chosen() -> None:
    costs = measured({n: float(n) for n in (1, 2, 4, 8, 16, 32)})
    assert choose({n: chain([0.9] * 4) for n in range(8)}, 8, 8, costs) == {}
    cheap = measured({8: 8.0, 16: 8.1, 40: 8.4})
    chosen = choose({n: chain([0.9] * 4) for n in range(8)}, 8, 8, cheap)
    assert chosen == dict.fromkeys(range(8), 4)


def test_no_sequence_is_slowed_down_for_the_sake_of_one() -> None:
    """Eight guesses for one of eight would give more tokens a second, and make seven wait two thirds longer."""
    costs = measured({8: 6.0, 9: 6.5, 12: 8.0, 16: 10.0})
    guess = chain([0.95] * 8)
    assert choose({0: guess}, 8, 8, costs) == {}
    assert 8 / 6.0 < (8 + sum(guess)) / 10.0


def test_of_a_tree_some() -> None:
    costs = measured({2: 1.0, 3: 1.05, 4: 1.1, 6: 3.0})
    assert choose({1: [0.6, 0.5, 0.05]}, 2, 2, costs) == {1: 2}
    assert choose({1: chain([0.95, 0.95]), 2: chain([0.1, 0.9])}, 2, 2, costs) == {1: 2}


def test_beside_a_prompt_guesses_cost_only_what_they_add() -> None:
    costs = measured({1: 1.0, 2: 1.95, 4: 3.85, 512: 200.0, 576: 200.5})
    assert choose({1: chain([0.9, 0.9])}, 1, 1, costs) == {}, "alone a row costs nearly as much as a step"
    assert choose({1: chain([0.9, 0.9])}, 512, 2, costs) == {1: 2}, "beside 511 it costs next to nothing"


def test_the_best_number_is_that_of_looking_at_each() -> None:
    """For one sequence: most tokens a second."""
    rng = random.Random(3)
    for _ in range(200):
        table = {1: 1.0}
        for rows in range(2, 17):
            table[rows] = table[rows - 1] + rng.choice([0.0, 0.02, 0.3])
        costs = measured(table, times=1)
        guess = chain([rng.uniform(0.3, 1) for _ in range(rng.randint(1, 6))])
        number = choose({7: guess}, 1, 1, costs).get(7, 0)
        rates = [(1 + sum(guess[:m])) ** DOUBT / costs.of(1 + m) for m in range(len(guess) + 1)]
        assert rates[number] >= max(rates) / 1.07


def test_what_loses_more_than_predicted_pauses() -> None:
    brake, tried = Brake(), 0
    for _ in range(4000):
        if not brake.holds:
            tried += 1
            brake.observe(1.2, -0.2)
    assert tried * 0.2 < 0.03 * 4000, "all that is lost is a small part of the time"
    brake, tried = Brake(), 0
    for n in range(1000):
        if not brake.holds:
            tried += 1
            brake.observe(1.0, 0.5 if n % 2 else -0.3)
    assert tried == 1000, "what gains on the whole goes on"
