"""A model in a ModelRunner without an engine, with every row of logits that its head makes written down."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.backends.reference import ReferenceOps
from octavo.core.params import SamplingParams
from octavo.core.plan import Grant, GrantResult, StepPlan
from octavo.core.sequence import Sequence
from octavo.core.want import Draw, NextLogprobs, Sample, Want, Wanted
from octavo.formats import GGUFFile, open_weights
from octavo.kv_cache import KVCacheManager
from octavo.loading.model_config import model_config
from octavo.loading.weights import FileWeights
from octavo.models import Model, family
from octavo.ops import ModelConfig, Ops
from octavo.runner.model_runner import ModelRunner

Rows = NDArray[np.floating]
GREEDY = Draw(SamplingParams(temperature=0), seed=0, stream=(0,), num_prompt_tokens=0)


class Tap:
    """A model whose methods can be replaced, and the logits that its head made in a runner."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.rows: list[Rows] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def write_down(self, runner: ModelRunner, ops: Ops) -> None:
        """What the head makes from here on. Outside the head, which may be recorded."""
        head = runner._head

        def noted(x: Any) -> Any:
            logits = head(x)
            self.rows += list(np.array(ops.to_numpy(logits)))
            return logits

        runner._head = noted


def load(path: Path, ops: Ops) -> tuple[Model, ModelConfig]:
    """The model of a .gguf file or a folder on a backend."""
    with open_weights(path) as file:
        config = model_config(file, path)
        weights = FileWeights(ops, config, file.path, file.tensors, gguf=isinstance(file, GGUFFile))
        model = family(config.architecture).model(config, weights)
        weights.finish()
    return model, config


class Probe:
    def __init__(
        self, path: Path, dtype: str = "float32", block_size: int = 16, num_tokens: int = 2048, ops: Ops | None = None
    ) -> None:
        self.ops = ops if ops is not None else ReferenceOps(dtype, dtype)
        model, self.config = load(path, self.ops)
        self.tap = Tap(model)
        self.kv = KVCacheManager(-(-num_tokens // block_size), block_size)
        self.runner = ModelRunner(
            self.tap,  # type: ignore[arg-type] # stands for the model by delegation
            self.ops,
            num_blocks=self.kv.num_blocks,
            block_size=block_size,
            hidden_size=self.config.hidden_size,
            vocab_size=self.config.vocab_size,
        )
        self.tap.write_down(self.runner, self.ops)
        self._ids = count()

    def sequence(self, token_ids: SequenceOf[int]) -> Sequence:
        sequence = Sequence(next(self._ids), self.kv, self._ids.__next__)
        sequence.token_ids = list(token_ids)
        return sequence

    def step(
        self, *parts: tuple[Sequence, int, Want | None], next_logprobs: int | None = None
    ) -> tuple[GrantResult, ...]:
        """Compute each sequence up to a position and commit it. `next_logprobs`: so many best tokens are wanted, beside
        the next one, of each row that is computed and has one."""
        grants = []
        for sequence, stop, want in parts:
            copies = self.kv.allocate(sequence.block_table, sequence.num_computed, stop)
            assert copies == (), "the probe's sequences share nothing and fit"
            grants.append(
                Grant(
                    request_id=str(sequence.id),
                    sequence_id=sequence.id,
                    start=sequence.num_computed,
                    stop=stop,
                    token_ids=tuple(sequence.token_ids[sequence.num_computed : stop]),
                    block_table=tuple(sequence.block_table),
                    wants=_wants(sequence, stop, want, next_logprobs),
                )
            )
        results = self.runner.run(StepPlan(0, tuple(grants))).results
        for sequence, stop, _ in parts:
            sequence.num_computed = stop
        return results

    def logits(self, token_ids: SequenceOf[int], chunk: int | None = None) -> Rows:
        """Logits of all positions, [len(token_ids), vocab], computed `chunk` tokens at a time."""
        self.tap.rows.clear()
        sequence = self.sequence(token_ids)
        for stop in [*range(chunk or len(token_ids), len(token_ids), chunk or 1), len(token_ids)]:
            want = Sample((GREEDY,)) if stop == len(token_ids) else None
            self.step((sequence, stop, want), next_logprobs=0)
        sequence.drop()
        return np.array(self.tap.rows)

    def greedy(self, token_ids: SequenceOf[int], num_tokens: int) -> tuple[list[int], Rows]:
        """Greedy decoding with KV: tokens, and the logits each was chosen from, [num_tokens, vocab]."""
        self.tap.rows.clear()
        sequence = self.sequence(token_ids)
        for _ in range(num_tokens):
            (result,) = self.step((sequence, len(sequence.token_ids), Sample((GREEDY,))))
            sequence.token_ids.append(result.rows[-1].draws[0].token_id)
        tokens = sequence.token_ids[len(token_ids) :]
        sequence.drop()
        return tokens, np.array(self.tap.rows)


def _wants(sequence: Sequence, stop: int, want: Want | None, next_logprobs: int | None) -> tuple[Wanted, ...]:
    if isinstance(want, Sample):
        want = Sample(tuple(draw.at(sequence.token_ids[:stop], None) for draw in want.draws))
    wants = [] if want is None else [Wanted(stop - 1, stop, want)]
    following = tuple(sequence.token_ids[sequence.num_computed + 1 : stop + 1])
    if next_logprobs is not None and following:
        start = sequence.num_computed
        wants.insert(0, Wanted(start, start + len(following), NextLogprobs(following, next_logprobs)))
    return tuple(wants)
