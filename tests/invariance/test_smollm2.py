"""Invariance on the real small model: alone, in chunks beside others, with forks, and preempted."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo import LLM
from tests.invariance.harness import Counts, mixed_requests, run, run_alone, same


@pytest.mark.slow  # test_tiny has tiny models on this backend, tests/backends/cpu this model on its own
def test_alone_is_in_a_crowd(smollm2_path: Path, smollm2_llm: LLM) -> None:
    """Guards against what shows with real weights only: rounding that adds up over 30 layers, and near ties."""
    requests = [mixed_requests(49152, max_tokens=20)[i] for i in (1, 2, 6)]
    counts = Counts()
    with LLM(
        str(smollm2_path),
        backend="reference",
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=24,
        kv_cache_memory_bytes=5 * smollm2_llm.memory_plan.block_bytes,
    ) as llm:
        together = run(llm, requests, counts)
    for got, expected in zip(together, run_alone(smollm2_llm, requests), strict=True):
        same(got, expected, counts)
    print(counts)
    assert counts.compared == 5 * 20 and not counts.excused
    assert counts.chunks > 0 and counts.mixed > 0 and counts.preemptions > 0 and counts.copies > 0
