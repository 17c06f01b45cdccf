"""Gemma 3 270M on the `reference` backend against transformers in float32 on the same dequantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from octavo import LLM
from tests.models.probe import Probe
from tests.oracle.compare import Tally
from tests.oracle.live import check_live, check_remade
from tests.oracle.make_gemma3 import main as make_gemma3
from tests.oracle.oracle import FOLDER, NUM_TOKENS, read

FILE = FOLDER / "gemma3.json"
BEYOND_THE_WINDOW = 7  # its 700 tokens go past the window of 512


def _check(probe: Probe, number: int) -> None:
    answer = read(FILE)[1][number]
    tally = Tally()
    given = answer.prompt_token_ids + answer.token_ids[:-1]
    tally.recorded(answer, probe.logits(given)[len(answer.prompt_token_ids) - 1 :])
    print(f"prompt {number}: {tally.worst:.2e}")
    assert tally.tokens == NUM_TOKENS and not tally.excused


@pytest.mark.slow  # tests/models compares a tiny one beyond its window, and tests/backends/cpu the first tokens of this
def test_recorded_answer_beyond_the_window(gemma3_probe: Probe) -> None:
    """Guards against windows, rope bases and norms that are right on tiny models only."""
    assert len(read(FILE)[1][BEYOND_THE_WINDOW].prompt_token_ids) == 700
    _check(gemma3_probe, BEYOND_THE_WINDOW)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(BEYOND_THE_WINDOW))
def test_recorded_answer(gemma3_probe: Probe, number: int) -> None:
    _check(gemma3_probe, number)


@pytest.mark.slow
def test_all_answers_live(gemma3_path: Path, gemma3_probe: Probe, gemma3_oracle: Any) -> None:
    tally = Tally()
    with LLM(str(gemma3_path), backend="reference", max_model_len=1024, max_num_seqs=8) as llm:
        check_live(llm, gemma3_probe, gemma3_oracle, read(FILE)[1], tally)
    print(f"worst {tally.worst:.2e}, excused {len(tally.excused)} of {tally.tokens}")
    assert tally.tokens == 8 * NUM_TOKENS and not tally.excused


@pytest.mark.slow
def test_remade_file_is_the_same(gemma3_path: Path, tmp_path: Path) -> None:
    make_gemma3(tmp_path / FILE.name)
    check_remade(tmp_path / FILE.name, FILE)
