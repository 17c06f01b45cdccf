"""A head's guesses are what its formula gives, and change no answer; see also tests/invariance/test_speculation.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import LLM, RequestOutput, SamplingParams
from octavo.core.plan import Grant, GrantResult, RowResult, StepPlan, StepResult, accepted_drafts
from octavo.core.want import Draw, Sample
from octavo.loading.draft_head import save_head
from octavo.ops.rows import RowRequest
from octavo.runner import draft_head
from octavo.sampling import Sampler
from octavo.training.own_texts import hidden_states
from tests.heads import NumpyHead, model_matrix, random_head, save_random_head

SETTINGS: dict[str, Any] = {"max_model_len": 160, "max_num_seqs": 8, "max_num_batched_tokens": 48}
WORDS = "the quick brown fox jumps over the lazy dog "
SIZE = 3
PARAMS = [
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=3, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=4, max_tokens=30, ignore_eos=True),
    SamplingParams(seed=5, presence_penalty=0.5, repetition_penalty=1.2, max_tokens=30, ignore_eos=True),
    SamplingParams(seed=6, n=3, max_tokens=30, ignore_eos=True, allowed_token_ids=[7, 8, 9, 10]),
]


def guessing(model: Path, head: Path, **settings: Any) -> LLM:
    config = {"method": "draft_head", "model": str(head), "num_speculative_tokens": SIZE, "adaptive": False}
    return LLM(str(model), **(SETTINGS | settings), speculative_config=config)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [one.token_ids for output in outputs for one in output.outputs]


class Watch:
    """All that was guessed, and the grant behind which it was."""

    def __init__(self, llm: LLM) -> None:
        self.seen: list[tuple[Grant, GrantResult]] = []
        llm._engine.step_listeners.append(self)

    def __call__(self, plan: StepPlan, result: StepResult) -> None:
        self.seen += zip(plan.grants, result.results, strict=True)

    def guesses(self) -> dict[int, GrantResult]:
        """By the number of tokens of the sequence that they follow."""
        return {
            grant.first_draft + len(accepted_drafts(grant, one.rows)) + 1: one for grant, one in self.seen if one.guess
        }


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("family", ["tiny_dir", "tiny_gemma3_dir"])
def test_against_the_formula(request: pytest.FixtureRequest, tmp_path: Path, family: str, every: int) -> None:
    """From the state of the row that drew the last token, whatever was accepted before: guesses and their chances."""
    model: Path = request.getfixturevalue(family)
    embedding, output = model_matrix(model, "embed_tokens"), model_matrix(model, "lm_head")
    weights = random_head(output.shape[1], 32)
    known = np.arange(0, len(output), every)
    save_head(tmp_path / "head.safetensors", weights, known if every > 1 else None, {})
    oracle = NumpyHead(weights, embedding, output[known])
    with guessing(model, tmp_path / "head.safetensors", backend="reference") as llm:
        watch = Watch(llm)
        (answer,) = llm.generate([WORDS], PARAMS[0])
        found = watch.guesses()
        all_ids = [*answer.prompt_token_ids, *answer.outputs[0].token_ids]
        (states,) = hidden_states(llm, [all_ids])
    assert len(found) > 20
    for length, result in found.items():
        state, last = states[length - 2].astype(np.float32), all_ids[length - 1]
        assert 1 <= len(result.guess) == len(result.guess_chances) <= SIZE
        for token_id, chance in zip(result.guess, result.guess_chances, strict=True):
            state = oracle.next_state(state, last)
            logits = oracle.logits(state)
            best = np.sort(logits)[-2:]
            column = int(np.searchsorted(known, token_id))
            assert known[column] == token_id and logits[column] > best[1] - 0.05  # states come as float16
            assert chance == pytest.approx(
                float(np.exp(logits - best[1])[column] / np.exp(logits - best[1]).sum()), rel=0.1
            )
            last = token_id


def test_guesses_are_drawn_with_the_noise_of_the_request(tiny_dir: Path, tmp_path: Path) -> None:
    """With `down` zero the state stays the model's, so each guess is what that would give in the guess's place."""
    weights = random_head(64, 32)
    weights["down"][:] = 0
    save_head(tmp_path / "head.safetensors", weights, None, {})
    with guessing(tiny_dir, tmp_path / "head.safetensors") as llm:
        watch = Watch(llm)
        (answer,) = llm.generate([WORDS], PARAMS[1])
        found = watch.guesses()
        num_prompt = len(answer.prompt_token_ids)
        (states,) = hidden_states(llm, [[*answer.prompt_token_ids, *answer.outputs[0].token_ids]])
    output, sampler = model_matrix(tiny_dir, "lm_head"), Sampler()
    same = total = 0
    for length, result in found.items():
        logits = states[length - 2].astype(np.float32) @ output.T
        draw = Sample((Draw(PARAMS[1], 3, (0,), num_prompt),))
        for place, token_id in enumerate(result.guess):
            (row,) = sampler.sample(logits[None], [RowRequest(0, length - 1 + place, draw)])
            assert isinstance(row, RowResult)
            same += row.draws[0].token_id == token_id
            total += 1
    assert total > 45 and same > 0.9 * total  # states come as float16


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_answers_stay(tiny_dir: Path, tmp_path: Path, backend: str) -> None:
    """Also where nothing that the head knows may be drawn, and beside what is not guessed for."""
    head = save_random_head(tmp_path / "head.safetensors", tiny_dir)
    with LLM(str(tiny_dir), **SETTINGS, backend=backend) as llm:
        expected = tokens(llm.generate([WORDS] * len(PARAMS), PARAMS))
        block_bytes = llm.memory_plan.block_bytes
    with guessing(tiny_dir, head, backend=backend) as llm:
        assert llm.memory_plan.block_bytes == block_bytes, "a head keeps nothing in blocks"
    with guessing(tiny_dir, head, backend=backend, kv_cache_memory_bytes=12 * block_bytes) as llm:
        for _ in range(2):
            assert tokens(llm.generate([WORDS] * len(PARAMS), PARAMS)) == expected
        stats = llm.speculation_stats
    assert stats is not None and stats.num_draft_tokens > 100


def test_many_rows_go_slice_by_slice(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = save_random_head(tmp_path / "head.safetensors", tiny_dir)
    with guessing(tiny_dir, head) as llm:
        watch = Watch(llm)
        whole = tokens(llm.generate([WORDS] * len(PARAMS), PARAMS)), [one.guess for _, one in watch.seen]
    monkeypatch.setattr(draft_head, "rows_per_slice", lambda vocab_size: 2)
    with guessing(tiny_dir, head) as llm:
        watch = Watch(llm)
        assert (tokens(llm.generate([WORDS] * len(PARAMS), PARAMS)), [one.guess for _, one in watch.seen]) == whole


def test_states_that_are_no_numbers_fail_nobody(tiny_dir: Path, tmp_path: Path) -> None:
    """Weights are finite, but what they make need not be."""
    weights = random_head(64, 32)
    weights["down"][:] = 6e4
    weights["from_state"][:] = 6e4
    save_head(tmp_path / "head.safetensors", weights, None, {})
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        expected = tokens(llm.generate([WORDS] * len(PARAMS), PARAMS))
    with guessing(tiny_dir, tmp_path / "head.safetensors") as llm:
        assert tokens(llm.generate([WORDS] * len(PARAMS), PARAMS)) == expected
