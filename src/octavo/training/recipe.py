"""From a loaded model to a trained head."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.core.errors import ConfigError
from octavo.formats import open_weights
from octavo.hub import resolve_model
from octavo.loading.draft_head import save_head
from octavo.loading.weights import model_tensor
from octavo.training.head import Texts, TrainingSettings, agreement, joined, train
from octavo.training.own_texts import hidden_states, write_texts

if TYPE_CHECKING:
    from octavo.llm import LLM

_TOGETHER = 32  # texts whose states are computed at once
_HELD_OUT = 20  # of so many texts one is not learnt


class Recipe(NamedTuple):
    """See `octavo train-head --help`."""

    tokens: int = 300_000
    text_tokens: int = 384
    minutes: float = 30.0
    steps: int | None = None  # of training, instead of minutes
    cell_size: int | None = None
    draft_vocab: int = 8192
    places: int = 4
    seed: int = 0


class TrainedHead(NamedTuple):
    weights: Mapping[str, NDArray[np.float32]]
    token_ids: NDArray[np.int64]
    agreement: list[float]  # by place
    notes: dict[str, str]

    def save(self, path: Path) -> None:
        save_head(path, self.weights, self.token_ids, self.notes)


def train_head(llm: LLM, recipe: Recipe, progress: Callable[[str], None]) -> TrainedHead:
    """Texts, states, training. `progress` is given lines. Raises ConfigError where the texts are too short."""
    began = time.monotonic()
    texts, prompts, tokens = [], [], 0
    most = min(recipe.text_tokens, llm.max_model_len)
    if recipe.places >= most:
        raise ConfigError(f"places: {recipe.places} are more than texts of {most} tokens have room for")
    for text, num_prompt in write_texts(llm, recipe.tokens, most, recipe.seed):
        texts.append(text)
        prompts.append(num_prompt)
        tokens += len(text)
        if len(texts) % 100 == 0:
            progress(f"{tokens:,} of {recipe.tokens:,} tokens written")
    states = []
    for first in range(0, len(texts), _TOGETHER):
        states += hidden_states(llm, texts[first : first + _TOGETHER])
    progress(f"{tokens:,} tokens and their states in {time.monotonic() - began:.0f} s")

    learnt = [n for n in range(len(texts)) if n % _HELD_OUT != 1]
    held_out = [n for n in range(len(texts)) if n % _HELD_OUT == 1]
    of_learnt, of_held_out = (_chosen(part, texts, prompts, states) for part in (learnt, held_out))
    if not all((one.left >= recipe.places).any() for one in (of_learnt, of_held_out)):
        raise ConfigError(
            f"places: {recipe.places} are more than the model's own answers have room for: they are short"
        )
    embedding, output = _matrices(llm)
    token_ids = _frequent([texts[n][prompts[n] :] for n in learnt], len(output), recipe.draft_vocab)
    settings = TrainingSettings(
        recipe.cell_size or 2 * output.shape[1],
        recipe.places,
        minutes=recipe.minutes,
        steps=recipe.steps,
        seed=recipe.seed,
    )
    weights = train(of_learnt, embedding, output[token_ids], settings, progress)
    rates = agreement(weights, of_held_out, embedding, output, token_ids, recipe.places)
    notes = {"trained_on": f"{tokens} tokens of its own", "model": llm.config.model}
    return TrainedHead({name.removesuffix(".weight"): one for name, one in weights.items()}, token_ids, rates, notes)


def _chosen(numbers: list[int], texts: list[list[int]], prompts: list[int], states: list[NDArray[np.float16]]) -> Texts:
    return joined([texts[n] for n in numbers], [prompts[n] for n in numbers], [states[n] for n in numbers])


def _matrices(llm: LLM) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Embedding and output, [vocabulary, hidden] each."""
    config = llm.model_config
    with open_weights(resolve_model(llm.config.model)) as file:
        embedding = model_tensor(config, file, "embed_tokens").dequantize()
        return embedding, embedding if config.tie_embeddings else model_tensor(config, file, "lm_head").dequantize()


def _frequent(outputs: list[list[int]], vocab_size: int, most: int) -> NDArray[np.int64]:
    """The tokens that occur most often, ascending; of those that do not, the first."""
    counts = np.zeros(vocab_size, np.int64)
    for output in outputs:
        np.add.at(counts, output, 1)
    return np.sort(np.argsort(-counts, kind="stable")[:most])
