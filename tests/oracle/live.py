"""The oracle run live: transformers reads a prompt and our tokens in one pass (teacher forcing)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from octavo import LLM, SamplingParams
from tests.models.probe import Probe
from tests.oracle.compare import LOGITS_TOLERANCE, Tally
from tests.oracle.oracle import NUM_TOKENS, Answer, all_logits, read


def check_live(llm: LLM, probe: Probe, model: Any, answers: list[Answer], tally: Tally) -> None:
    """Our greedy answers, all prompts in one batch through the engine; then every row of each against transformers."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": answer.prompt_token_ids} for answer in answers], params)
    for answer, output in zip(answers, outputs, strict=True):
        chosen = output.outputs[0].token_ids
        assert len(chosen) == NUM_TOKENS
        given, start = answer.prompt_token_ids + chosen[:-1], len(answer.prompt_token_ids) - 1
        ours, theirs = probe.logits(given), all_logits(model, given)
        tally.rows(ours, theirs)
        tally.choices(chosen, ours[start:], theirs[start:])


def check_remade(made: Path, committed: Path) -> None:
    """A file made anew says what the committed one says."""
    (new_head, new), (head, old) = read(made), read(committed)
    assert {**new_head, "made_with": None} == {**head, "made_with": None}
    assert [answer.prompt_token_ids for answer in new] == [answer.prompt_token_ids for answer in old]
    for ours, theirs in zip(new, old, strict=True):
        assert (ours.token_ids, ours.columns) == (theirs.token_ids, theirs.columns)
        peaks = np.array(theirs.peaks)
        for name in ("gaps", "peaks", "logits"):
            difference = np.abs(np.array(getattr(ours, name)) - np.array(getattr(theirs, name)))
            assert (difference.reshape(len(peaks), -1).max(axis=1) <= LOGITS_TOLERANCE * peaks).all(), name
