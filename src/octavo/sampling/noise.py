"""Counter-based noise: a pure function of (seed, stream, position, token).

Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"). There is no state to keep, fork
or restore: a draw is the same whatever else is in the batch, and however often the request was preempted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint32]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]
) -> tuple[Words, Words, Words, Words]:
    """Four words of 32 random bits per counter. The counter's arrays are broadcast; `key` is two 32-bit integers."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint32) for c in counter))
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0.astype(np.uint64) * _MULTIPLIERS[0]
        product1 = c2.astype(np.uint64) * _MULTIPLIERS[1]
        high0, low0 = (product0 >> _SHIFT).astype(np.uint32), (product0 & _LOW).astype(np.uint32)
        high1, low1 = (product1 >> _SHIFT).astype(np.uint32), (product1 & _LOW).astype(np.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint32(k0), low1, high0 ^ c3 ^ np.uint32(k1), low0
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def stream_id(seed: int, stream: tuple[int, ...]) -> int:
    """64 bits that stand for a path of integers; paths of different lengths differ."""
    key = (seed & 0xFFFFFFFF, seed >> 32)
    state = len(stream)
    for step in stream:
        out = philox4x32(([state & 0xFFFFFFFF], [state >> 32], [step & 0xFFFFFFFF], [step >> 32]), key)
        state = int(out[0][0]) | int(out[1][0]) << 32
    return state


def uniform(seed: int, stream: tuple[int, ...], position: int, token_ids: NDArray[np.integer]) -> NDArray[np.float64]:
    """float64 in (0, 1), one per token id: the middles of 2**32 equal steps.

    Four neighbouring token ids share one Philox call: id t takes word t % 4 of counter t // 4.
    """
    path = stream_id(seed, stream)
    groups, place = np.divmod(np.asarray(token_ids, np.int64), 4)
    unique, inverse = (groups, None) if len(groups) < 2 else np.unique(groups, return_inverse=True)
    words = philox4x32(
        (unique, position, path & 0xFFFFFFFF, path >> 32),
        (seed & 0xFFFFFFFF, seed >> 32),
    )
    table = np.stack(words, axis=-1)  # [groups, 4]
    chosen = table[inverse if inverse is not None else np.arange(len(groups)), place]
    return (chosen.astype(np.float64) + 0.5) * 2.0**-32


def gumbel(seed: int, stream: tuple[int, ...], position: int, token_ids: NDArray[np.integer]) -> NDArray[np.float64]:
    """Standard Gumbel noise per token id: argmax(log p + noise) draws from p (Gumbel, 1954)."""
    return -np.log(-np.log(uniform(seed, stream, position, token_ids)))
