"""Beam search as a plain loop over whole rows of logits, with transformers' semantics: the tests' own reference.

It shares nothing with octavo.coordinators. Every hypothesis is computed from its tokens alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]
Tokens = tuple[int, ...]


class Found(NamedTuple):
    tokens: Tokens  # generated, the end token included
    score: float  # log-probability over length ** length_penalty


@dataclass
class _Group:
    beams: list[tuple[Tokens, np.float32]]  # running: tokens and sum of log-probabilities
    finished: list[Found] = field(default_factory=list)
    done: bool = False


def plain_search(
    logits_of: Callable[[list[int]], Row],
    prompt: Sequence[int],
    *,
    width: int,
    max_tokens: int,
    ends: Sequence[int] = (),
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    groups: int = 1,
    diversity: float = 0.0,
    process: Callable[[Row, list[int], Tokens], None] | None = None,
    stops: Callable[[Tokens], bool] | None = None,
) -> list[Found]:
    """All hypotheses, best first. `logits_of(token ids)` is the row after the last one; `process(log-probabilities,
    prompt, generated)` changes a row in place; `stops(generated)` says whether anything but an end token ends it.
    """
    size = width // groups
    kept = max(2, 1 + len(ends)) * size
    all_groups = [_Group([((), np.float32(0.0))]) for _ in range(groups)]
    for length in range(1, max_tokens + 1):
        taken: Counter[int] = Counter()
        for group in all_groups:
            if group.done:
                continue
            rows = []
            for tokens, total in group.beams:
                row = log_softmax(logits_of([*prompt, *tokens]))
                if process is not None:
                    process(row, list(prompt), tokens)
                for token, times in taken.items():
                    row[token] -= np.float32(diversity * times)
                rows.append(row + total)
            flat = np.concatenate(rows)
            best = [int(i) for i in np.argsort(-flat, kind="stable")[:kept] if flat[i] > -np.inf]
            going: list[tuple[Tokens, np.float32]] = []
            ended: list[Found] = []
            for rank, place in enumerate(best):
                beam, token = divmod(place, len(rows[0]))
                tokens = (*group.beams[beam][0], token)
                if token in ends or length == max_tokens or (stops is not None and stops(tokens)):
                    if rank < size:
                        ended.append(Found(tokens, _normalised(flat[place], length, length_penalty)))
                elif len(going) < size:
                    going.append((tokens, flat[place]))
            group.finished = sorted(group.finished + ended, key=lambda found: -found.score)[:size]
            group.beams = going
            full = len(group.finished) == size
            reach = max_tokens if early_stopping == "never" and length_penalty > 0 else length
            if not going or (full and early_stopping is True):
                group.done = True
            elif full:
                group.done = _normalised(going[0][1], reach, length_penalty) <= group.finished[-1].score
            if not group.done:
                taken.update(tokens[-1] for tokens, _ in going)
    return sorted((found for group in all_groups for found in group.finished), key=lambda found: -found.score)


def log_softmax(logits: NDArray[Any]) -> Row:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return (wide - np.log(np.exp(wide).sum())).astype(np.float32)


def _normalised(total: np.float32, length: int, penalty: float) -> float:
    return float(total / np.float32(length**penalty))
