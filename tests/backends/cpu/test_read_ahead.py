"""Threads that wait ask memory for the weights of the ops to come: a guess, whatever becomes of those."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from octavo import LLM, SamplingParams
from octavo.backends.cpu import CpuOps
from tests.backends.cpu.engine import awkward_llama
from tests.backends.cpu.harness import array, bits_equal, random_tensor

PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=2)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_weights_that_come_and_go(threads: int) -> None:
    """Ops of a single row by weights that are freed before the next: what was announced is no longer memory."""
    alone, ops = CpuOps(threads=1), CpuOps(threads=threads)
    x = array(1, 256)
    for number, outputs in enumerate((2000, 16, 40, 3000, 17, 2000) * 4):
        tensor = random_tensor("Q4_1" if number % 2 else "Q8_0", outputs, 256, seed=number)
        expected = alone.to_numpy(alone.linear(alone.from_numpy(x), alone.linear_weight([tensor])))
        weight = ops.linear_weight([tensor])
        bits_equal(ops.to_numpy(ops.linear(ops.from_numpy(x), weight)), expected, str(number))
        del weight
        gc.collect()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_engines_that_take_turns_and_end(
    tiny_llama_dir: Path, tiny_gemma3_dir: Path, tmp_path: Path, threads: int
) -> None:
    """Steps of one row, in two engines at a time, one of which is closed and made anew; many rows in between."""
    folders = (awkward_llama(tmp_path / "model", tiny_llama_dir), tiny_gemma3_dir)
    prompts = [{"prompt_token_ids": list(range(3, 3 + length))} for length in (1, 20, 70)]

    def made(folder: Path, threads: int) -> LLM:
        return LLM(str(folder), backend="cpu", threads=threads, max_model_len=128)

    def answers(llm: LLM, together: bool) -> list[object]:
        groups = [prompts] if together else [[prompt] for prompt in prompts]
        outputs = [output for group in groups for output in llm.generate(group, PARAMS, use_tqdm=False)]
        return [(output.outputs[0].token_ids, output.outputs[0].cumulative_logprob) for output in outputs]

    expected = []
    for folder in folders:
        with made(folder, 1) as llm:
            expected.append(answers(llm, together=False))
    first, second = (made(folder, threads) for folder in folders)
    try:
        for round_number in range(3):
            assert answers(first, together=round_number == 1) == expected[0]
            assert answers(second, together=round_number == 0) == expected[1]
            first.close()
            first = made(folders[0], threads)
    finally:
        first.close()
        second.close()


def test_rows_of_a_step_are_of_no_account() -> None:
    """One row, several, one: what was announced before a step that announces nothing leads nowhere."""
    alone, ops = CpuOps(threads=1), CpuOps(threads=2)
    tensor = random_tensor("Q4_1", 1000, 576)
    expecting, weight = alone.linear_weight([tensor]), ops.linear_weight([tensor])
    for rows in (1, 1, 40, 1, 2, 1):
        x = array(rows, 576, seed=rows)
        got = ops.to_numpy(ops.linear(ops.from_numpy(x), weight))
        bits_equal(got, alone.to_numpy(alone.linear(alone.from_numpy(x), expecting)))
        assert np.isfinite(got).all()
