"""Guesses from texts follow what the verbs do with a sequence, and stay within their namespace and memory."""

from __future__ import annotations

import random

import pytest

from octavo.core.errors import ConfigError
from octavo.core.namespace import SHARED, Namespace
from octavo.core.proposer import Asked
from octavo.core.sequence import Sequence
from octavo.core.speculation import SpeculativeConfig
from octavo.kv_cache import KVCacheManager
from octavo.speculation.drafter import Drafter
from octavo.speculation.lookup import NGram, OwnText, Suffix, text_of


class Sequences:
    """Makes sequences that have no engine."""

    def __init__(self) -> None:
        self.kv = KVCacheManager(64, 4)
        self._ids = iter(range(10_000))

    def new(self, token_ids: list[int]) -> Sequence:
        sequence = Sequence(next(self._ids), self.kv, self._ids.__next__)
        sequence.extend(token_ids)
        return sequence


def guess(drafter: Drafter, sequence: Sequence, most: int = 4, namespace: Namespace = SHARED) -> list[int]:
    found = drafter.guess(Asked(sequence, "r", namespace, most), most, [1.0] * len(drafter.first_rates))
    assert len(found.token_ids) == len(found.kinds) == len(found.parents) == len(found.chances) <= most
    assert found.chances == sorted(found.chances, reverse=True)
    assert all(parent < number for number, parent in enumerate(found.parents))
    return found.token_ids


def test_ngram_takes_the_earliest_place_of_the_longest_suffix_within_its_bounds() -> None:
    make = Sequences()
    text = [1, 2, 3, 7, 2, 3, 8, 1, 2, 3]
    assert guess(NGram(SpeculativeConfig(method="ngram")), make.new(text)) == [7, 2, 3, 8]
    short = SpeculativeConfig(method="ngram", prompt_lookup_max=2, prompt_lookup_min=1)
    assert guess(NGram(short), make.new([5, 2, 3, 9, 1, 2, 3, 7, 1, 2, 3])) == [9, 1, 2, 3]
    three = SpeculativeConfig(method="ngram", prompt_lookup_max=3, prompt_lookup_min=3)
    assert guess(NGram(three), make.new([9, 2, 3, 7, 1, 2, 3])) == [], "two tokens are too few"


def test_suffix_takes_the_likeliest_continuation() -> None:
    make = Sequences()
    text = [1, 2, 5, 6, 0, 1, 2, 7, 8, 0, 1, 2, 7, 8, 3, 1, 2]
    drafter = Suffix(SpeculativeConfig(method="suffix", max_branches=1))
    assert guess(drafter, make.new(text), 2) == [7, 8]
    assert guess(drafter, make.new([4, 5, 6])) == []


@pytest.mark.parametrize("seed", range(20))
def test_the_index_is_that_of_the_tokens_whatever_the_verbs_do(seed: int) -> None:
    """Guards an automaton that is shared by forks, or holds tokens that were taken back."""
    rng, make = random.Random(seed), Sequences()
    sequences = [make.new([rng.randrange(3) for _ in range(10)])]
    drafter = Suffix(SpeculativeConfig(method="suffix", suffix_decoding_min_token_prob=0.0, max_branches=1))
    for _ in range(120):
        sequence = rng.choice(sequences)
        match rng.randrange(5):
            case 0 | 1:
                sequence.extend([rng.randrange(3) for _ in range(rng.randint(1, 3))])
            case 2:
                sequence.truncate(rng.randint(max(sequence.num_tokens - 4, 1), sequence.num_tokens))
            case 3 if len(sequences) < 8:
                sequences.append(sequence.fork(rng.randint(1, sequence.num_tokens), (1,)))
            case _:
                fresh = make.new(list(sequence.token_ids))
                assert guess(drafter, sequence) == guess(drafter, fresh)
                assert text_of(sequence).own()[1] == text_of(fresh).own()[1]
    assert any(sequence.attached(OwnText) is not None for sequence in sequences)


PAST = SpeculativeConfig(method="suffix", suffix_decoding_max_cached_requests=8)


def answer(drafter: Suffix, make: Sequences, prompt: list[int], output: list[int], namespace: Namespace) -> None:
    sequence = make.new(prompt)
    guess(drafter, sequence, 4, namespace)
    sequence.extend(output)
    guess(drafter, sequence, 4, namespace)
    sequence.drop()
    drafter.sweep()


def test_past_outputs_are_found_in_their_namespace_alone() -> None:
    make, drafter = Sequences(), Suffix(PAST)
    mine, other, private = Namespace("a"), Namespace("b"), Namespace("a", request_id="r")
    answer(drafter, make, [1, 2], [10, 11, 12, 13, 14], mine)
    assert guess(drafter, make.new([9, 10, 11]), 4, mine) == [12, 13, 14]
    for namespace in (other, SHARED, private):
        assert guess(drafter, make.new([9, 10, 11]), 4, namespace) == []
    assert guess(drafter, make.new([9, 1, 2]), 4, mine) == [], "a prompt is no output"
    answer(drafter, make, [1], [20, 21, 22], private)
    assert guess(drafter, make.new([20, 21]), 4, mine) == [] == guess(drafter, make.new([20, 21]), 4, private)
    off = Suffix(SpeculativeConfig(method="suffix", max_branches=1))
    answer(off, make, [1, 2], [10, 11, 12], SHARED)
    assert guess(off, make.new([9, 10, 11])) == []


def test_of_two_texts_the_one_with_the_longer_suffix_is_gone_by() -> None:
    make, drafter = Sequences(), Suffix(PAST)
    answer(drafter, make, [1], [5, 6, 7, 8], SHARED)
    assert guess(drafter, make.new([6, 7, 99, 5, 6, 7]), 1) == [8]
    assert guess(drafter, make.new([4, 5, 6, 7, 99, 4, 5, 6, 7]), 1) == [99]


def test_past_outputs_take_bounded_memory() -> None:
    rng, make = random.Random(0), Sequences()
    config = SpeculativeConfig(method="suffix", suffix_decoding_max_cached_requests=6, max_cached_tokens=400)
    drafter = Suffix(config)
    outputs = [[rng.randrange(1000) for _ in range(rng.randint(1, 150))] for _ in range(60)]
    for number, output in enumerate(outputs):
        answer(drafter, make, [1], output, Namespace(str(number % 3)))
        assert sum(past.num_tokens for past in drafter._past.values()) <= 400 + 2 * 201
    last = outputs[-1]
    if len(last) > 6:
        assert guess(drafter, make.new(last[2:5]), 1, Namespace("2")) == [last[5]]
    for number in range(200):
        answer(drafter, make, [1], [5, 6], Namespace(f"n{number}"))
    assert len(drafter._past) <= 64
    assert not any(one.sequence.dropped for one in drafter._following.values()), "nobody follows what has ended"


def test_settings_are_checked_by_name() -> None:
    for given, named in (
        ({"method": "magic"}, "method"),
        ({"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 2}, "prompt_lookup_min"),
        ({"method": "suffix", "prompt_lookup_max": 2}, "prompt_lookup_max"),
        ({"method": "ngram", "suffix_decoding_min_token_prob": 0.5}, "suffix_decoding_min_token_prob"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"method": "ngram", "num_speculative_tokens": 65}, "num_speculative_tokens"),
        ({"method": "ngram", "num_speculative_tokens": True}, "num_speculative_tokens"),
        ({"method": "ngram", "adaptive": 1}, "adaptive"),
        ({"method": "suffix", "suffix_decoding_min_token_prob": 1.5}, "suffix_decoding_min_token_prob"),
        ({"num_speculative_tokens": 4}, "method"),
        ({"method": "ngram", "tokens": 3}, "tokens"),
        ([], "speculative_config"),
        ("ngram", "speculative_config"),
    ):
        with pytest.raises(ConfigError, match=named) as caught:
            SpeculativeConfig.of("speculative_config", given)
        assert str(caught.value).startswith("speculative_config")
    assert SpeculativeConfig(method="ngram", prompt_lookup_max=7).lookup == (7, 7)
    assert SpeculativeConfig(method="ngram").lookup == (2, 5)
    assert SpeculativeConfig.of("x", {"method": "ngram"}).max_drafts == 8
