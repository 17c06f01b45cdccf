"""Training of a head that guesses (octavo.models.draft_head), in PyTorch, on processors.

It is distilled: in every position of the model's own texts the cell is applied some times on, given the tokens that
came, and each of its states is to give the distribution that the model's own state gave there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import kl_div, linear, log_softmax, rms_norm, silu, smooth_l1_loss, softmax

from octavo.models.draft_head import EPSILON

Weights = dict[str, NDArray[np.float32]]

_DECAY = 0.8  # of what a guess's loss counts, from place to place
_FEATURES = 0.1  # what the distance of states counts beside that of distributions
_MEASURED = 10  # steps that show how long one takes
_WARM = 0.03  # share of the steps in which the rate of learning rises


class TrainingSettings(NamedTuple):
    cell_size: int
    places: int = 4  # times that the cell is applied
    positions: int = 1024  # of a batch
    rate: float = 1e-3
    minutes: float = 30.0  # of training
    steps: int | None = None  # of training, instead of minutes
    seed: int = 0


class Texts(NamedTuple):
    """N tokens of texts, one after the other."""

    token_ids: NDArray[np.int64]  # [N]
    states: NDArray[np.float16]  # [N, H]
    left: NDArray[np.int64]  # [N] tokens of the text that follow; -1: of a prompt, of which nothing is guessed


def joined(token_ids: Sequence[Sequence[int]], prompts: Sequence[int], states: Sequence[NDArray[np.float16]]) -> Texts:
    """`prompts`: tokens of each text that are its prompt's."""
    left = []
    for one, num_prompt in zip(token_ids, prompts, strict=True):
        left.append(np.arange(len(one) - 1, -1, -1))
        left[-1][: max(num_prompt - 1, 0)] = -1
    return Texts(np.concatenate([np.array(one) for one in token_ids]), np.concatenate(states), np.concatenate(left))


class _Head(torch.nn.Module):
    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()

        def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(rows, columns) * scale / math.sqrt(columns))

        self.state_norm = torch.nn.Parameter(torch.ones(hidden))
        self.token_norm = torch.nn.Parameter(torch.ones(hidden))
        self.from_state = matrix(2 * size, hidden)
        self.from_token = matrix(2 * size, hidden)
        self.down = matrix(hidden, size, 0.1)

    def forward(self, state: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        width = (state.shape[-1],)
        x = linear(rms_norm(state, width, self.state_norm, EPSILON), self.from_state)
        x = x + linear(rms_norm(embedding, width, self.token_norm, EPSILON), self.from_token)
        gate, up = x.chunk(2, -1)
        return state + linear(silu(gate) * up, self.down)


def train(
    texts: Texts,
    embedding: NDArray[np.float32],
    output: NDArray[np.float32],
    settings: TrainingSettings,
    progress: Callable[[str], None],
) -> Weights:
    """Weights by the names that a head's file has.

    Args:
        embedding: [vocabulary, H]
        output: [V, H], of the tokens that can be guessed.
        progress: is given a line now and then.
    """
    torch.manual_seed(settings.seed)
    head = _Head(texts.states.shape[1], settings.cell_size)
    words, embedded = torch.from_numpy(output), torch.from_numpy(embedding)
    token_ids, states = torch.from_numpy(texts.token_ids), torch.from_numpy(texts.states)
    starts = torch.from_numpy(np.flatnonzero(texts.left >= settings.places))
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(settings.seed)
    began = told = time.monotonic()
    steps, done, mean = settings.steps, 0, 0.0
    while steps is None or done < steps:
        if steps is None and done == _MEASURED:  # as many as there is time for
            each = (time.monotonic() - began) / _MEASURED
            steps = max(int(settings.minutes * 60 / each), _MEASURED + 1)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * _schedule(done, steps)
        at = starts[torch.randint(len(starts), (settings.positions,), generator=generator)]
        loss = _loss(head, at, token_ids, states, embedded, words, settings.places)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        done += 1
        mean += (loss.item() - mean) / min(done, 50)
        if time.monotonic() - told > 30:
            told = time.monotonic()
            progress(f"step {done:,} of {steps or '?'}, loss {mean:.3f}")
    return {f"{name}.weight": value.detach().float().numpy() for name, value in head.named_parameters()}


def _schedule(done: int, steps: int | None) -> float:
    share = done / steps if steps else 0.0
    return min(1.0, share / _WARM + 0.1) * 0.5 * (1 + math.cos(math.pi * share))


def _loss(
    head: _Head,
    at: torch.Tensor,
    token_ids: torch.Tensor,
    states: torch.Tensor,
    embedding: torch.Tensor,
    output: torch.Tensor,
    places: int,
) -> Any:
    state, loss, weight = states[at].float(), torch.zeros(()), 0.0
    for place in range(1, places + 1):
        state = head(state, embedding[token_ids[at + place]])
        expected = states[at + place].float()
        with torch.no_grad():
            wanted = softmax(linear(expected, output), -1)
        distance = kl_div(log_softmax(linear(state, output), -1), wanted, reduction="batchmean")
        loss = loss + _DECAY ** (place - 1) * (distance + _FEATURES * smooth_l1_loss(state, expected))
        weight += _DECAY ** (place - 1)
    return loss / weight


def agreement(
    weights: Weights,
    texts: Texts,
    embedding: NDArray[np.float32],
    output: NDArray[np.float32],
    draft_vocab: NDArray[np.int64],
    places: int,
    most: int = 4096,
) -> list[float]:
    """How often the head's best token is the model's, by place, where all before it were.

    `output`: [vocabulary, H]."""
    head = _Head(texts.states.shape[1], weights["down.weight"].shape[1])
    head.load_state_dict({name.removesuffix(".weight"): torch.from_numpy(one) for name, one in weights.items()})
    starts = np.flatnonzero(texts.left >= places)
    at = torch.from_numpy(np.random.default_rng(0).permutation(starts)[:most])
    token_ids, states = torch.from_numpy(texts.token_ids), torch.from_numpy(texts.states)
    words, embedded = torch.from_numpy(output), torch.from_numpy(embedding)
    vocab = torch.from_numpy(draft_vocab)
    rates = []
    with torch.no_grad():
        state, right = states[at].float(), torch.ones(len(at), dtype=torch.bool)
        for place in range(1, places + 1):
            state = head(state, embedded[token_ids[at + place]])
            best = linear(states[at + place].float(), words).argmax(-1)
            guessed = vocab[linear(state, words[vocab]).argmax(-1)]
            before = right.sum().item()
            right = right & (guessed == best)
            rates.append(right.sum().item() / max(before, 1))
    return rates
