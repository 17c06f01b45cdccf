"""SmolLM2-135M-Instruct on the `reference` backend against transformers in float32 on the same dequantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from octavo import LLM
from tests.models.probe import Probe
from tests.oracle.compare import Tally
from tests.oracle.live import check_live, check_remade
from tests.oracle.make_smollm2 import main as make_smollm2
from tests.oracle.oracle import FOLDER, NUM_TOKENS, read

FILE = FOLDER / "smollm2.json"
# Of different kinds, 9 to 450 tokens.
RECORDED = (2, 14, 30, 37, pytest.param(43, marks=pytest.mark.slow))
LIVE = (0, 16, 34)


def test_the_file_covers_what_it_should() -> None:
    """Guards against an oracle that shrank: 50 prompts of 5 to 1,500 tokens, 64 greedy tokens each."""
    head, answers = read(FILE)
    lengths = sorted(len(answer.prompt_token_ids) for answer in answers)
    assert len(answers) == 50 and lengths[0] == 5 and lengths[-1] == 1500
    assert sum(length >= 100 for length in lengths) >= 10
    assert {len(answer.token_ids) for answer in answers} == {NUM_TOKENS}
    assert {"transformers", "torch", "numpy"} <= set(head["made_with"]) and head["seed"] == 20_261_123
    assert FILE.stat().st_size < 1_500_000


@pytest.mark.parametrize("number", RECORDED)
def test_recorded_answer(smollm2_probe: Probe, number: int) -> None:
    """Guards against logits and greedy tokens that differ from transformers', without running it."""
    answer = read(FILE)[1][number]
    tally = Tally()
    given = answer.prompt_token_ids + answer.token_ids[:-1]
    tally.recorded(answer, smollm2_probe.logits(given)[len(answer.prompt_token_ids) - 1 :])
    print(f"prompt {number}: {tally.worst:.2e}")
    assert tally.tokens == NUM_TOKENS and not tally.excused


@pytest.mark.slow  # those recorded are transformers' too
def test_live_answers(smollm2_llm: LLM, smollm2_probe: Probe, smollm2_oracle: Any) -> None:
    """The whole way, engine included, with transformers beside it, on a few prompts."""
    tally = Tally()
    answers = read(FILE)[1]
    check_live(smollm2_llm, smollm2_probe, smollm2_oracle, [answers[number] for number in LIVE], tally)
    print(f"worst {tally.worst:.2e}, excused {len(tally.excused)} of {tally.tokens}")
    assert tally.tokens == len(LIVE) * NUM_TOKENS and not tally.excused


@pytest.mark.slow
def test_all_answers_live(smollm2_llm: LLM, smollm2_probe: Probe, smollm2_oracle: Any) -> None:
    tally = Tally()
    check_live(smollm2_llm, smollm2_probe, smollm2_oracle, read(FILE)[1], tally)
    print(f"worst {tally.worst:.2e}, excused {len(tally.excused)} of {tally.tokens}")
    assert tally.tokens == 50 * NUM_TOKENS and not tally.excused


@pytest.mark.slow
def test_remade_file_is_the_same(smollm2_path: Path, tmp_path: Path) -> None:
    make_smollm2(tmp_path / FILE.name)
    check_remade(tmp_path / FILE.name, FILE)
