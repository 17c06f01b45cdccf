"""The runner: every want beside every other, answered from the right row; copies; failures that stay with one grant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from octavo.core.params import SamplingParams
from octavo.core.plan import BlockCopy, Grant, StepPlan
from octavo.core.want import Draw, Hidden, Sample, Score, TopK, Wanted
from octavo.runner.model_runner import LocalExecutor
from tests.models.probe import GREEDY, Probe
from tests.models.tiny import make, tokens

SAMPLED = Draw(SamplingParams(seed=4, temperature=1.0), seed=4, stream=(1,), num_prompt_tokens=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("runner"), "llama-grouped-heads")


def log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row.astype(np.float64) - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_all_wants_in_one_step(folder: Path) -> None:
    """Guards against answers from a neighbour's row, which happens when wants of several kinds share a batch."""
    probe, single = Probe(folder), Probe(folder)
    prompts = [tokens(length, seed=length) for length in (3, 9, 1, 12, 5, 7)]
    sets = ((1, 2, 3), (5,))
    wants = [Sample((GREEDY, SAMPLED)), None, TopK(4, GREEDY), Score(sets), Hidden((2, 0)), Sample((SAMPLED,))]
    parts = [(probe.sequence(p), len(p), want) for p, want in zip(prompts, wants, strict=True)]
    results = probe.step(*parts)
    rows = [log_softmax(single.logits(prompt)[-1]) for prompt in prompts]
    assert len(results[0].rows[0].draws) == 2
    assert results[0].rows[0].draws[0].token_id == rows[0].argmax()
    assert results[1] == type(results[1])()
    best = np.argsort(-rows[2])[:4]
    assert [token for token, _ in results[2].rows[0].candidates] == best.tolist()
    np.testing.assert_allclose([value for _, value in results[2].rows[0].candidates], rows[2][best], atol=1e-5)
    np.testing.assert_allclose(
        results[3].rows[0].scores, [np.log(np.exp(rows[3][list(s)]).sum()) for s in sets], atol=1e-5
    )
    assert [state.shape for state in results[4].rows[0].hidden] == [(32,), (32,)]
    alone = single.step((single.sequence(prompts[5]), 7, wants[5]))
    assert results[5] == alone[0]


def test_next_logprobs_beside_wants(folder: Path) -> None:
    """Guards against rows of prompt_logprobs that shift by one where the last row is also sampled from."""
    probe, single = Probe(folder), Probe(folder)
    prompts = [tokens(length, seed=length) for length in (6, 4, 9)]
    wants = [Sample((GREEDY,)), None, Hidden((1,))]
    parts = [(probe.sequence(p), len(p), want) for p, want in zip(prompts, wants, strict=True)]
    results = probe.step(*parts, next_logprobs=2)
    for prompt, result in zip(prompts, results, strict=True):
        rows = [log_softmax(row) for row in single.logits(prompt)]
        entries = [one.logprobs for one in result.rows if one.logprobs is not None]
        assert len(entries) == len(prompt) - 1
        for row, entry, token_id in zip(rows, entries, prompt[1:], strict=False):
            assert entry.token.token_id == token_id
            assert entry.token.logprob == pytest.approx(row[token_id], abs=1e-5)
            assert entry.token.rank == 1 + (row > row[token_id]).sum()
            assert [one.token_id for one in entry.top] == np.argsort(-row)[:2].tolist()


def test_copies_come_before_everything(folder: Path) -> None:
    """A fork that got its own copy of a block goes on from the same KV, and leaves the original alone."""
    probe = Probe(folder, block_size=8)
    prompt = tokens(13, seed=8)
    sequence = probe.sequence(prompt)
    probe.step((sequence, 13, None))
    fork = sequence.fork(13, (1,))
    fork.token_ids += [5, 6]
    sequence.token_ids += [7, 8]
    copies = probe.kv.allocate(fork.block_table, 13, 15)
    assert copies is not None and len(copies) == 1 and isinstance(copies[0], BlockCopy)
    assert probe.kv.allocate(sequence.block_table, 13, 15) == ()
    grants = tuple(
        Grant(
            str(one.id),
            one.id,
            13,
            15,
            tuple(one.token_ids[13:]),
            tuple(one.block_table),
            (Wanted(14, 15, Score(((1,), (2,)))),),
        )
        for one in (sequence, fork)
    )
    results = probe.runner.run(StepPlan(0, grants, copies)).results
    for one, result in zip((sequence, fork), results, strict=True):
        row = log_softmax(Probe(folder).logits(one.token_ids)[-1])
        np.testing.assert_allclose(result.rows[0].scores, row[[1, 2]], atol=1e-5)


def test_a_plan_of_copies_alone(folder: Path) -> None:
    probe = Probe(folder)
    assert probe.runner.run(StepPlan(0, (), (BlockCopy(0, 1),))).results == ()


def test_errors_of_a_draw_stay_with_it(folder: Path) -> None:
    """A request that rules out every token fails; its neighbours are answered from their own rows."""
    probe, single = Probe(folder), Probe(folder)
    params = SamplingParams(temperature=0, allowed_token_ids=[3], bad_words=["x"])
    impossible = GREEDY._replace(params=params, bad_words=((3,),))
    prompts = [tokens(5, seed=1), tokens(8, seed=2), tokens(6, seed=3)]
    draws = [GREEDY, impossible, GREEDY]
    results = probe.step(
        *((probe.sequence(p), len(p), Sample((draw,))) for p, draw in zip(prompts, draws, strict=True)),
        next_logprobs=0,
    )
    assert results[1].error is not None and "rule out the whole vocabulary" in results[1].error
    for index in (0, 2):
        assert results[index].error is None
        assert results[index].rows[-1].draws[0].token_id == single.logits(prompts[index])[-1].argmax()


def test_a_closed_executor_says_so(folder: Path) -> None:
    executor = LocalExecutor(Probe(folder).runner)
    assert executor.execute(StepPlan(0, ())).result().results == ()
    executor.close()
    with pytest.raises(RuntimeError, match="closed"):
        executor.execute(StepPlan(0, ()))


def test_several_rows_of_a_grant(folder: Path) -> None:
    """Rows in the middle of a grant: drawn from, scored and looked into, each as if its tokens were all there are."""
    probe, single = Probe(folder), Probe(folder)
    prompt = tokens(9, seed=3)
    sequence = probe.sequence(prompt)
    assert probe.kv.allocate(sequence.block_table, 0, 9) == ()
    sets = ((4,), (1, 2))
    wants = (Wanted(2, 5, Score(sets)), Wanted(4, 8, Hidden((1,))), Wanted(5, 9, Sample((SAMPLED,))))
    other = probe.sequence(tokens(4, seed=5))
    assert probe.kv.allocate(other.block_table, 0, 4) == ()
    grants = (
        Grant("other", other.id, 0, 4, tuple(other.token_ids), tuple(other.block_table), (Wanted(3, 4, Score(sets)),)),
        Grant("rows", sequence.id, 0, 9, tuple(prompt), tuple(sequence.block_table), wants),
    )
    _, result = probe.runner.run(StepPlan(0, grants)).results
    assert [row.position for row in result.rows] == [2, 3, 4, 4, 5, 6, 7, 5, 6, 7, 8]
    for row in result.rows:
        alone = single.sequence(prompt[: row.position + 1])
        want = Score(sets) if row.scores else (Hidden((1,)) if row.hidden else Sample((SAMPLED,)))
        ((expected,),) = [one.rows for one in single.step((alone, row.position + 1, want))]
        np.testing.assert_allclose(row.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(np.array(row.hidden), np.array(expected.hidden), atol=1e-5)
        assert row.draws == expected.draws
        alone.drop()
