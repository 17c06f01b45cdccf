"""From grants to the arrays of a batch, against an example laid out by hand."""

from __future__ import annotations

import numpy as np

from octavo.core.params import SamplingParams
from octavo.core.plan import Grant
from octavo.core.want import Draw, Hidden, NextLogprobs, Sample, Score, Wanted
from octavo.runner.input_batch import hidden_rows, logits_requests, make_batch

DRAW = Draw(SamplingParams(), seed=0, stream=(0,), num_prompt_tokens=1)
SAMPLE = Sample((DRAW,))


def grant(token_ids: list[int], start: int, table: tuple[int, ...] = (0, 1, 2, 3), *wants: Wanted) -> Grant:
    return Grant("request", 0, start, start + len(token_ids), tuple(token_ids), table, wants)


def next_logprobs(start: int, token_ids: tuple[int, ...]) -> Wanted:
    return Wanted(start, start + len(token_ids), NextLogprobs(token_ids, 1))


def test_layout_by_hand() -> None:
    """Blocks of 4. Guards against slots of the wrong block, and positions that begin at 0."""
    batch = make_batch(
        [
            grant([13, 14, 15], 3, (7, 2)),
            grant([20], 0, (5,), Wanted(0, 1, SAMPLE)),
            grant([38], 8, (1, 0, 9), Wanted(8, 9, Score(((1,),)))),
        ],
        block_size=4,
    )
    expected = {
        "input_ids": [13, 14, 15, 20, 38],
        "positions": [3, 4, 5, 0, 8],
        "query_start_loc": [0, 3, 4, 5],
        "slot_mapping": [7 * 4 + 3, 2 * 4 + 0, 2 * 4 + 1, 5 * 4, 9 * 4],
        "logits_indices": [3, 4],
    }
    for name, values in expected.items():
        array = getattr(batch, name)
        assert array.tolist() == values, name
        assert array.dtype == np.int32 and array.flags.c_contiguous, name
    assert batch.block_tables.tolist() == [[7, 2, 0], [5, 0, 0], [1, 0, 9]]
    assert (batch.num_tokens, batch.num_seqs, batch.block_size) == (5, 3, 4)


def test_no_grants() -> None:
    batch = make_batch([], block_size=4)
    assert (batch.num_tokens, batch.num_seqs) == (0, 0)
    assert batch.query_start_loc.tolist() == [0] and batch.block_tables.shape == (0, 0)


def test_wanted_rows() -> None:
    """Guards against a row too many where one is wanted twice, and against answers that go to another row."""

    def rows(token_ids: list[int], start: int, *wants: Wanted) -> tuple[list[int], list[tuple[int, int]]]:
        one = grant(token_ids, start, (0, 1, 2, 3), *wants)
        asked = [(request.row, request.position) for request in logits_requests([one])]
        return make_batch([one], 4).logits_indices.tolist(), asked

    sample, hidden = Wanted(5, 6, SAMPLE), Wanted(4, 6, Hidden((0,)))
    assert rows([1, 2, 3, 4, 5, 6], 0) == ([], [])
    assert rows([1, 2, 3, 4, 5, 6], 0, sample) == ([5], [(0, 5)])
    assert rows([4, 5, 6], 3, next_logprobs(3, (5, 6)), sample) == ([0, 1, 2], [(0, 3), (1, 4), (2, 5)])
    assert rows([5, 6], 4, next_logprobs(4, (6, 7)), sample) == ([0, 1], [(0, 4), (1, 5), (1, 5)]), (
        "one row serves both"
    )
    assert rows([5, 6], 4, sample, sample) == ([1], [(0, 5), (0, 5)])
    assert rows([5, 6], 4, hidden, sample) == ([1], [(0, 5)])
    two = [grant([1, 2], 0, (0,), next_logprobs(0, (2, 3))), grant([5, 6], 4, (0, 1), hidden, sample)]
    batch = make_batch(two, 4)
    assert batch.logits_indices.tolist() == [0, 1, 3]
    assert [(r.row, r.position) for r in logits_requests(two)] == [(0, 0), (1, 1), (2, 5)]
    assert [r.want for r in logits_requests(two)] == [NextLogprobs((2,), 1), NextLogprobs((3,), 1), SAMPLE]
    assert {layer: rows.tolist() for layer, rows in hidden_rows(two, batch).items()} == {0: [2, 3]}


def test_parts_of_what_is_wanted() -> None:
    """A prompt in chunks gets the log-probabilities of each chunk's own rows."""
    wanted = next_logprobs(2, (13, 14, 15))  # of the rows of positions 2 to 4
    assert wanted.within(0, 2) is None and wanted.within(5, 9) is None
    assert wanted.within(0, 4) == next_logprobs(2, (13, 14))
    assert wanted.within(3, 4) == next_logprobs(3, (14,))
    assert wanted.within(4, 9) == next_logprobs(4, (15,))
    assert Wanted(2, 5, SAMPLE).within(3, 9) == Wanted(3, 5, SAMPLE)
