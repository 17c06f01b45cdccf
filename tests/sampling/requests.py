"""Random rows of logits, and everything that can be asked of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.core.params import SamplingParams
from octavo.core.want import Counts, Draw, History, NextLogprobs, Sample, Score, TopK, Want
from octavo.ops.rows import RowRequest

Random = np.random.Generator
KINDS = ("normal", "normal", "ties", "masked", "alone", "flat", "huge", "narrow", "nan", "inf", "nothing")


def random_rows(random: Random, count: int, vocab: int) -> NDArray[np.float32]:
    """[count, vocab]: ordinary rows, ties, tokens that cannot be drawn, extremes, and now and then damage."""
    rows = (random.standard_normal((count, vocab)) * 4).astype(np.float32)
    for index, row in enumerate(rows):
        at = int(random.integers(vocab))
        match random.choice(KINDS, p=[0.3, 0.2, 0.15, 0.1, 0.04, 0.04, 0.05, 0.06, 0.02, 0.02, 0.02]):
            case "ties":
                np.round(row, out=row)
            case "masked":
                row[random.random(vocab) < 0.7] = -np.inf
                row[at] = 0.5
            case "alone":
                row[...] = -np.inf
                row[at] = -3.0
            case "flat":
                row[...] = random.standard_normal()
            case "huge":
                rows[index] *= np.float32(1e30)
            case "narrow":
                rows[index] *= np.float32(1e-3)
            case "nan":
                row[at] = np.nan
            case "inf":
                row[at] = np.inf
            case "nothing":
                row[...] = -np.inf
    return rows


def random_requests(random: Random, count: int, rows: int, vocab: int) -> list[RowRequest]:
    """All kinds of wants, rows ascending; a row may be asked several times or not at all."""
    chosen = np.sort(random.integers(0, rows, count))
    return [RowRequest(int(row), int(random.integers(0, 5000)), random_want(random, vocab)) for row in chosen]


def random_want(random: Random, vocab: int) -> Want:
    match random.choice(["sample", "top_k", "score", "next_logprobs"], p=[0.6, 0.15, 0.1, 0.15]):
        case "sample":
            return Sample(tuple(random_draw(random, vocab) for _ in range(int(random.choice([1, 1, 1, 2, 5])))))
        case "top_k":
            k = int(random.choice([1, 4, 16, vocab + 3]) if vocab <= 1000 else random.integers(1, 40))
            return TopK(k, random_draw(random, vocab), random_top(random))
        case "score":
            sizes = random.integers(0, min(50, vocab), int(random.integers(1, 5)))
            return Score(tuple(tuple(ids(random, vocab, int(size))) for size in sizes))
    return NextLogprobs((int(random.integers(vocab)),), random_top(random) or 0)


def random_top(random: Random) -> int | None:
    return None if random.random() < 0.5 else int(random.choice([0, 1, 3, 20]))


def random_draw(random: Random, vocab: int) -> Draw:
    def maybe(chance: float, value: Any, otherwise: Any) -> Any:
        return value if random.random() < chance else otherwise

    settings: dict[str, Any] = {
        "temperature": float(random.choice([0.0, 0.3, 1.0, 1.0, 2.0, 1e300], p=[0.3, 0.1, 0.25, 0.2, 0.1, 0.05])),
        "top_k": int(maybe(0.3, random.choice([1, 5, 40, 3000]), -1)),
        "top_p": float(maybe(0.3, random.choice([1e-9, 0.5, 0.9, 0.999]), 1.0)),
        "min_p": float(maybe(0.2, random.choice([1e-4, 0.05, 1.0]), 0.0)),
        "logprobs": random_top(random),
        "allowed_token_ids": maybe(0.1, ids(random, vocab, int(random.integers(1, 20))), None),
        "logit_bias": maybe(
            0.15, {i: float(random.choice([-1e6, -1.5, 0.3, 100.0])) for i in ids(random, vocab, 4)}, None
        ),
        "repetition_penalty": float(maybe(0.3, random.choice([1e-3, 0.8, 1.3, 1e3]), 1.0)),
        "presence_penalty": float(maybe(0.3, random.choice([-2.0, 0.7]), 0.0)),
        "frequency_penalty": float(maybe(0.3, random.choice([-0.3, 0.2, 2.0]), 0.0)),
    }
    params = SamplingParams(**settings)
    size = int(maybe(0.2, random.choice([1, 2, 3]), 0))
    history = None
    if params.has_penalties or size or random.random() < 0.2:
        few = int(random.integers(2, 12))  # that many different tokens: some come again
        seen = [int(i) for i in random.choice(ids(random, vocab, few), int(random.integers(1, 60)))]
        cut = int(random.integers(len(seen)))
        output = {token: seen[cut:].count(token) for token in dict.fromkeys(seen[cut:])}
        history = History(
            forbidden=tuple(maybe(0.5, ids(random, vocab, 3), ())),
            token_ids=tuple(seen) if size else (),
            counts=Counts(frozenset(seen[:cut]), tuple(output.items())) if params.has_penalties else None,
        )
    seed, steps = int(random.integers(0, 2**64, dtype=np.uint64)), int(random.integers(0, 4))
    stream = tuple(int(step) for step in random.integers(0, 2**63, steps))
    return Draw(params, seed, stream, 1, no_repeat_ngram_size=size, history=history)


def ids(random: Random, vocab: int, count: int) -> list[int]:
    return [int(i) for i in random.integers(0, vocab, count)]
