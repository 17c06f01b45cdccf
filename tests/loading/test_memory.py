"""The memory plan: its arithmetic, its refusals, and whether a step keeps to it."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from octavo import LLM
from octavo.core.errors import OutOfMemoryError
from octavo.core.want import Sample
from octavo.loading.memory import available_memory, plan_memory, size
from octavo.runner.logits import rows_per_slice
from tests.models.probe import GREEDY, Probe
from tests.models.tiny import make

MIB, GIB = 1 << 20, 1 << 30


def plan(available: int = GIB, kv: int | None = None, max_model_len: int = 100, max_num_seqs: int = 4):
    return plan_memory(
        available_bytes=available,
        weights_bytes=100 * MIB,
        scratch_bytes=50 * MIB,
        block_bytes=MIB,
        block_size=16,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=kv,
    )


def test_blocks_for_all_sequences_when_there_is_room() -> None:
    """100 tokens are 7 blocks; four sequences 28. More would never be used."""
    made = plan()
    assert made.num_blocks == 28
    assert made.kv_bytes == 28 * MIB
    assert made.total_bytes == (100 + 50 + 28) * MIB


def test_half_of_what_is_left_when_there_is_not() -> None:
    made = plan(available=190 * MIB)
    assert made.num_blocks == (190 - 150) // 2
    assert made.total_bytes <= 190 * MIB


def test_at_least_one_sequence() -> None:
    """Half of what is left would be 5 blocks; a sequence needs 7, and there is room for them."""
    assert plan(available=160 * MIB).num_blocks == 7


def test_what_the_user_gives_is_taken() -> None:
    assert plan(kv=20 * MIB + 5).num_blocks == 20


def test_refusal_when_a_sequence_does_not_fit() -> None:
    """The message has every number of the sum. Guards against blocks that are planned and then not there."""
    with pytest.raises(OutOfMemoryError) as caught:
        plan(available=156 * MIB)
    text = str(caught.value)
    for part in (
        "weights 100.0 MiB",
        "scratch 50.0 MiB",
        "KV 7.0 MiB",
        "7 blocks of 16 tokens",
        "= 157.0 MiB of 156.0",
    ):
        assert part in text, text


def test_refusal_of_too_little_kv_memory() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        plan(kv=6 * MIB)
    text = str(caught.value)
    for part in ("kv_cache_memory_bytes", "6.0 MiB", "6 blocks", "max_model_len=100", "needs 7 (7.0 MiB)"):
        assert part in text, text


def test_refusal_of_more_kv_memory_than_there_is() -> None:
    with pytest.raises(OutOfMemoryError, match=r"the model does not fit.*= 1\.15 GiB of 1\.00 GiB"):
        plan(kv=GIB)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (MIB, "1.0 MiB"), (3 * GIB // 2, "1.50 GiB"), (-MIB, "-1.0 MiB")],
)
def test_size(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


def test_available_memory() -> None:
    assert 64 * MIB < available_memory() < 1 << 50


def test_plan_of_an_engine(tiny_llama_dir: Path) -> None:
    """Guards against bytes of the plan that are not those of the arrays: float32 weights, K and V of both layers."""
    with LLM(str(tiny_llama_dir), backend="reference", max_model_len=64, max_num_seqs=3) as llm:
        made, config = llm.memory_plan, llm.model_config
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 64 * 32 + 2 * 32
    untied = 1 if config.tie_embeddings else 2
    assert made.weights_bytes == 4 * (2 * layer + untied * config.vocab_size * 32 + 32)
    assert made.block_bytes == 2 * 2 * 16 * 2 * 8 * 4  # layers, K and V, tokens, heads, head_dim, float32
    assert made.num_blocks == 3 * 4
    assert re.search(r"memory plan: weights .* \+ scratch .* \+ KV .* = .* of .* available", str(made))


def test_too_little_memory_for_an_engine(tiny_llama_dir: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="max_model_len=4096 tokens needs 256"):
        LLM(str(tiny_llama_dir), backend="reference", kv_cache_memory_bytes=1 << 16)


@pytest.mark.parametrize(
    ("settings", "lengths", "context"),
    [
        ({"intermediate_size": 4096}, [300], 0),  # the MLP is widest
        ({"num_attention_heads": 16, "head_dim": 2}, [400, 100], 0),  # scores of a long chunk
        ({"num_attention_heads": 4, "head_dim": 128}, [8], 3000),  # keys and values of a long context
        ({"vocab_size": 20_000}, [200], 0),  # logits
    ],
)
def test_a_step_keeps_to_its_scratch(
    tmp_path: Path, settings: dict[str, int], lengths: list[int], context: int
) -> None:
    """Guards against a plan that fits and a step that does not."""
    probe = Probe(make(tmp_path, "llama-grouped-heads", settings=settings), num_tokens=4096)
    vocab = probe.config.vocab_size
    random = np.random.default_rng(0)
    parts = []
    for length in lengths:
        sequence = probe.sequence([int(i) for i in random.integers(0, vocab, context + length)])
        for stop in range(200, context + 1, 200):
            probe.step((sequence, stop, None))
        parts.append((sequence, context + length, Sample((GREEDY,))))
    longest = max(stop for _, stop, _ in parts)
    num_tokens = sum(lengths)
    rows = min(num_tokens, rows_per_slice(vocab))
    planned = probe.ops.scratch_nbytes(probe.config, lambda _: None, num_tokens, rows, 1, longest)
    probe.tap.rows = _Nothing()
    tracemalloc.start()
    try:
        probe.step(*parts, next_logprobs=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"planned {planned / MIB:.2f} MiB, taken {peak / MIB:.2f} MiB")
    assert peak <= planned * 1.05 + MIB // 4  # the arrays of a batch, and Python's own objects
    assert peak >= planned * 0.3


class _Nothing(list):  # type: ignore[type-arg]
    """Stands in for the probe's record of logits, which would count as the step's memory."""

    def __iadd__(self, rows: object) -> _Nothing:  # type: ignore[override,misc]
        return self


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_refused_was_not_allocated(tmp_path: Path, backend: str) -> None:
    """Guards against weights that take their memory before the plan says that there is none."""
    settings = {"vocab_size": 2_000_000, "hidden_size": 64, "head_dim": 16}
    make(tmp_path, "llama-tied", settings=settings, dtype="float16")  # 512 MB as float32
    program = """
import sys
from resource import RUSAGE_SELF, getrusage
import octavo.backends.cpu, octavo.wiring
from octavo import LLM
from octavo.core.errors import OutOfMemoryError
from octavo.loading import memory
before = getrusage(RUSAGE_SELF).ru_maxrss
try:
    LLM(sys.argv[1], backend=sys.argv[2], kv_cache_memory_bytes=1 << 10)
except OutOfMemoryError as error:
    assert "kv_cache_memory_bytes" in str(error)
    print(getrusage(RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", program, str(tmp_path), backend]
    kib = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert int(kib) < 64 << 10
