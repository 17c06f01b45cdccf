"""Counter-based noise against the generator's published vectors, and its statistics."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.sampling.noise import gumbel, philox4x32, stream_id, uniform

# Known answers for philox4x32-10 that the authors publish with Random123.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    out = philox4x32(tuple(np.array([c], np.uint32) for c in counter), key)  # type: ignore[arg-type]
    assert tuple(int(word[0]) for word in out) == words


def test_noise_of_a_token_does_not_depend_on_the_others() -> None:
    """Filters change which tokens survive; what each gets must not move."""
    everything = gumbel(3, (1, 2), 10, np.arange(1000))
    some = np.array([0, 7, 8, 9, 500, 999])
    assert np.array_equal(gumbel(3, (1, 2), 10, some), everything[some])
    for token in some:
        assert gumbel(3, (1, 2), 10, np.array([token]))[0] == everything[token]


def test_every_part_of_the_key_matters() -> None:
    base = uniform(1, (0,), 5, np.arange(64))
    for other in (
        uniform(2, (0,), 5, np.arange(64)),
        uniform(1 + (1 << 32), (0,), 5, np.arange(64)),
        uniform(1, (1,), 5, np.arange(64)),
        uniform(1, (0, 0), 5, np.arange(64)),
        uniform(1, (), 5, np.arange(64)),
        uniform(1, (0,), 6, np.arange(64)),
    ):
        assert not np.isin(base, other).any()


def test_paths_do_not_collide() -> None:
    paths = [(a, b) for a in range(30) for b in range(30)] + [(a,) for a in range(900)]
    assert len({stream_id(5, path) for path in paths}) == len(paths)


def test_uniform_is_uniform() -> None:
    values = uniform(11, (0,), 0, np.arange(1 << 18))
    assert 0 < values.min() and values.max() < 1
    counts, _ = np.histogram(values, bins=64, range=(0, 1))
    expected = len(values) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120  # 63 degrees of freedom; p about 1e-5
    neighbours = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(neighbours) < 0.01


def test_gumbel_max_draws_from_the_distribution() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    draws = [int(np.argmax(np.log(probabilities) + gumbel(9, (0,), p, np.arange(4)))) for p in range(4_000)]
    counts = np.bincount(draws, minlength=4)
    expected = probabilities * len(draws)
    assert ((counts - expected) ** 2 / expected).sum() < 25  # 3 degrees of freedom; p about 1e-5
