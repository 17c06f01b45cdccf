"""The suffix automaton beside the same questions answered by looking at all of the text."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from octavo._C import SuffixAutomaton

ALL = [1.0] * 18  # of guesses of every kind: none is left out


def places(text: list[int], suffix: list[int]) -> list[int]:
    """Where it ends, as the position behind it."""
    size = len(suffix)
    return [end for end in range(size, len(text) + 1) if text[end - size : end] == suffix]


def longest(text: list[int], query: list[int]) -> int:
    """Length of the query's longest suffix that is in the text."""
    return max(n for n in range(len(query) + 1) if n == 0 or places(text, query[len(query) - n :]))


def random_text(rng: random.Random, *, separated: bool = False) -> list[int]:
    """Over few tokens, so that much of it repeats; some are `separated` into several."""
    size, kinds = rng.randint(1, 60), rng.randint(1, 4)
    text = [rng.randrange(kinds) for _ in range(size)]
    if rng.random() < 0.5:
        text += text[rng.randrange(size) :]
    return [-1 if rng.random() < 0.05 else token for token in text] if separated else text


@pytest.mark.parametrize("seed", range(40))
def test_the_text_own_suffixes(seed: int) -> None:
    rng = random.Random(seed)
    text = random_text(rng)
    automaton = SuffixAutomaton()
    for size in range(1, len(text) + 1):
        automaton.extend(text[size - 1 : size])
        known = text[:size]
        earlier = [n for n in range(1, size + 1) if len(places(known, known[size - n :])) > 1]
        _, length = automaton.own()
        assert length == max(earlier, default=0)
        for most in (1, 2, 5):
            found, follows = automaton.earliest(most, 4)
            assert found == min(length, most)
            if found:
                first = places(known, known[size - found :])[0]
                assert follows == known[first : first + 4]
            else:
                assert not follows
    assert automaton.num_tokens == len(text)


@pytest.mark.parametrize("seed", range(40))
def test_another_text(seed: int) -> None:
    """Also while the automaton grows: a match is then not too long, and right again once it was lost."""
    rng = random.Random(seed)
    text, query = random_text(rng, separated=seed % 2 == 1), [rng.randrange(5) for _ in range(30)]
    automaton = SuffixAutomaton()
    automaton.extend(text)
    match = (0, 0)
    for size in range(1, len(query) + 1):
        match = automaton.follow(match, query[size - 1 : size])
        assert match[1] == longest(text, query[:size])
    assert automaton.follow((0, 0), query) == match
    match = (0, 0)
    for size in range(1, len(query) + 1):
        match = automaton.follow(match, query[size - 1 : size])
        assert match[1] <= longest(text, query[:size])
        more = [rng.randrange(5)]
        automaton.extend(more)
        text += more


@pytest.mark.parametrize("seed", range(40))
def test_what_followed_most_often_is_guessed_first(seed: int) -> None:
    rng = random.Random(seed)
    text = [rng.randrange(3) for _ in range(rng.randint(2, 40))]
    automaton = SuffixAutomaton()
    automaton.extend(text)
    for _ in range(10):
        query = [rng.randrange(3) for _ in range(rng.randint(1, 4))]
        match = automaton.follow((0, 0), query)
        matched = query[len(query) - match[1] :]
        following = Counter(text[end] for end in places(text, matched) if end < len(text))
        tokens, parents, kinds, chances = automaton.guess(match, 1, ALL, 0.0, 0.0)
        if not match[1] or not following:
            continue
        assert following[tokens[0]] == max(following.values())
        assert kinds == [SuffixAutomaton.kind_of(match[1], following[tokens[0]], following.total())]
        assert parents == [-1] and chances == [1.0]
        branches = automaton.guess(match, 3, ALL, 0.0, 0.0, 3)
        first = [token for token, parent in zip(branches[0], branches[1], strict=True) if parent < 0]
        assert set(first) <= set(following) and len(first) == len(set(first))


def test_kinds_of_guesses() -> None:
    by_length = [SuffixAutomaton.kind_of(length, 1, 1) // 3 for length in (0, 1, 2, 3, 4, 7, 8, 15, 16, 99)]
    assert by_length == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [SuffixAutomaton.kind_of(0, taken, 4) for taken in (1, 2, 3, 4)] == [0, 1, 1, 2]


def test_a_guess_stays_likely_and_within_bounds() -> None:
    automaton = SuffixAutomaton()
    automaton.extend([1, 2, 3, 1, 2, 4, 1, 2, 3, 9, 1, 2])
    match = automaton.own()
    assert match[1] == 2
    tokens, parents, _, _ = automaton.guess(match, 8, ALL, 0.0, 0.5)
    assert tokens[0] == 3 and parents == [-1, *range(len(tokens) - 1)]
    assert automaton.guess(match, 8, ALL, 0.0, 0.7)[0] == [], "two of three times is less than that"
    tree = automaton.guess(match, 6, ALL, 0.0, 0.1, 2)
    assert sorted(token for token, parent in zip(tree[0], tree[1], strict=True) if parent < 0) == [3, 4]
    assert all(parent < number for number, parent in enumerate(tree[1]))
    assert automaton.guess(match, 0, ALL, 0.0, 0.0)[0] == []
    rates = [0.5] * 18
    _, parents, _, chances = automaton.guess(match, 8, rates, 0.1, 0.0)
    assert chances == [0.5, 0.25, 0.125], "none of less than a tenth"
    rates[SuffixAutomaton.kind_of(2, 2, 3)] = 0.01
    assert automaton.guess(match, 8, rates, 0.1, 0.0)[0] == []
    with pytest.raises(ValueError, match="a rate for each kind"):
        automaton.guess(match, 8, [1.0], 0.0, 0.0)


def test_a_text_that_repeats_is_guessed_for_more_than_a_round() -> None:
    automaton = SuffixAutomaton()
    automaton.extend([5, 6, 7] * 3)
    assert automaton.guess(automaton.own(), 10, ALL, 0.0, 0.1)[0] == [5, 6, 7, 5, 6, 7, 5, 6, 7, 5]


def test_no_guess_crosses_a_separator() -> None:
    automaton = SuffixAutomaton()
    automaton.extend([1, 2, -1, 1, 3, -1])
    assert automaton.guess(automaton.follow((0, 0), [1, 2]), 4, ALL, 0.0, 0.0)[0] == []
    assert set(automaton.guess(automaton.follow((0, 0), [1]), 4, ALL, 0.0, 0.0, 4)[0]) == {2, 3}
    assert automaton.follow((0, 0), [3, -1]) == (0, 0)


def test_a_copy_is_apart() -> None:
    automaton = SuffixAutomaton()
    automaton.extend([1, 2, 1])
    copy = automaton.copy()
    copy.extend([3, 1])
    automaton.extend([4, 1])
    assert copy.guess(copy.own(), 1, ALL, 0.0, 0.0)[0] == [3] and automaton.guess(automaton.own(), 1, ALL, 0.0, 0.0)[
        0
    ] == [4]


def test_long_texts_of_one_token_take_bounded_time_and_memory() -> None:
    automaton = SuffixAutomaton()
    automaton.extend([7] * 50_000)
    assert automaton.own()[1] == 49_999
    assert automaton.nbytes < 250 * 50_000
    assert automaton.guess(automaton.own(), 16, ALL, 0.0, 0.1)[0] == [7] * 16


@pytest.mark.parametrize("match", [(-1, 0), (99, 0), (1, 9), (1, -1)])
def test_a_match_that_cannot_be_is_refused(match: tuple[int, int]) -> None:
    automaton = SuffixAutomaton()
    automaton.extend([1, 2])
    with pytest.raises(IndexError):
        automaton.guess(match, 1, ALL, 0.0, 0.0)
    with pytest.raises(IndexError):
        automaton.follow(match, [1])
