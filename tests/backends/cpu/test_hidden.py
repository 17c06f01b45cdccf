"""Hidden states are read out while the recorded graph runs, and change nothing for anybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.backends.cpu import CpuOps
from octavo.core.params import SamplingParams
from octavo.core.plan import GrantResult
from octavo.core.want import Draw, Hidden, Sample, Score, Want
from tests.models.probe import Probe
from tests.models.tiny import make, tokens

DRAW = Draw(SamplingParams(logprobs=3), seed=7, stream=(0,), num_prompt_tokens=1)
WANTS: list[Want] = [Sample((DRAW,)), Hidden((3, 0, 1)), Score(((1, 2), (3,))), Hidden((1,)), Sample((DRAW,))]
PROMPTS = [tokens(length, seed=length) for length in (5, 40, 3, 1, 17)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"head_dim": 16, "num_hidden_layers": 3}
    return make(tmp_path_factory.mktemp("hidden"), "llama-grouped-heads", settings=settings)


def run(probe: Probe, asked: list[int]) -> dict[int, GrantResult]:
    """The results of some of the prompts, in one step."""
    parts = [(probe.sequence(PROMPTS[i]), len(PROMPTS[i]), WANTS[i]) for i in asked]
    return dict(zip(asked, probe.step(*parts, next_logprobs=2), strict=True))


def states(result: GrantResult) -> tuple[Any, ...]:
    (found,) = [row.hidden for row in result.rows if row.hidden]
    return found


@pytest.mark.parametrize("threads", [1, 3])
def test_beside_others(folder: Path, threads: int) -> None:
    """Rows that want hidden states stay on the recorded graph, and so do their neighbours, to the same bits."""

    def outside(*arguments: Any) -> None:
        raise AssertionError("the model ran outside its recording")

    probe = Probe(folder, ops=CpuOps(threads=threads, compute_dtype="float32", kv_dtype="float32"))
    probe.tap.embed = probe.tap.layer = outside  # what was recorded does not come by
    together = run(probe, [0, 1, 2, 3, 4])
    without = run(probe, [0, 2, 4])
    assert {i: together[i] for i in without} == without
    reference = run(Probe(folder), [1, 3])
    for i in (1, 3):
        alone, want = states(run(probe, [i])[i]), WANTS[i]
        assert isinstance(want, Hidden) and len(alone) == len(want.layers)
        for got, same, expected in zip(states(together[i]), alone, states(reference[i]), strict=True):
            assert got.dtype == np.float32 and got.tobytes() == same.tobytes()
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
