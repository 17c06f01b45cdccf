"""prompt_logprobs of long prompts: made in slices of rows, so that memory stays bounded."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from octavo import LLM, SamplingParams
from octavo.runner import logits as slices
from tests.invariance.harness import TOLERANCE, prompt
from tests.models.probe import Probe
from tests.models.tiny import make

VOCAB = 49152
SETTINGS = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
}
PARAMS = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def folder(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, 16 wide, and the vocabulary of SmolLM2; the tokenizer is of a smaller one."""
    folder = make(tmp_path_factory.mktemp("wide"), "llama-tied", settings=SETTINGS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_dir / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), backend="reference", max_num_batched_tokens=2048) as llm:
        yield llm


def test_memory_is_bounded_at_4000_tokens(llm: LLM) -> None:
    """The logits of all rows are 800 MB, those of one step 400 MB. Guards against making them at once."""
    token_ids = prompt(4000, VOCAB, seed=1)
    tracemalloc.start()
    try:
        (output,) = llm.generate({"prompt_token_ids": token_ids}, PARAMS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"peak {peak / 1e6:.0f} MB")
    assert peak < 300e6
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 4000
    assert output.prompt_logprobs[0] is None
    for token_id, row in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert row is not None and token_id in row and len(row) == (1 if row[token_id].rank == 1 else 2)


@pytest.mark.parametrize("rows", [7, 100, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 10_000))])
def test_slices_change_nothing(folder: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Values and ranks are those of all logits computed at once, in float64. Guards against rows that are skipped or
    taken twice where one slice ends, and between two requests of a step."""
    monkeypatch.setattr(slices, "LOGITS_SLICE_BYTES", rows * 4 * VOCAB)
    prompts = [prompt(length, VOCAB, seed=length) for length in (300, 2, 41)]
    with LLM(str(folder), backend="reference", max_model_len=512) as sliced:
        outputs = sliced.generate([{"prompt_token_ids": token_ids} for token_ids in prompts], PARAMS)
    probe = Probe(folder)
    for token_ids, output in zip(prompts, outputs, strict=True):
        logits = probe.logits(token_ids).astype(np.float64)
        whole = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert output.prompt_logprobs is not None
        for position, row in enumerate(output.prompt_logprobs[1:]):
            assert row is not None
            token_id = token_ids[position + 1]
            assert abs(row[token_id].logprob - whole[position, token_id]) <= TOLERANCE
            assert row[token_id].rank == 1 + np.count_nonzero(logits[position] > logits[position, token_id])
            assert row[int(logits[position].argmax())].rank == 1
