"""From grants to the arrays of a batch, against an example laid out by hand."""

from __future__ import annotations

import numpy as np

from octavo.core.params import SamplingParams
from octavo.core.plan import Grant
from octavo.core.sequence import Sequence
from octavo.core.want import Draw, Hidden, NextLogprobs, Sample, Score, Want
from octavo.kv_cache import KVCacheManager
from octavo.runner.input_batch import make_batch, rows_with_next

DRAW = Draw(SamplingParams(), seed=0, stream=(0,), num_prompt_tokens=1)
SAMPLE = Sample((DRAW,))


def grant(
    token_ids: list[int],
    start: int,
    stop: int,
    table: tuple[int, ...] = (0, 1, 2, 3),
    want: Want | None = None,
    each_row: NextLogprobs | None = None,
) -> Grant:
    sequence = Sequence(0, KVCacheManager(1, 1), lambda: 0)
    return Grant("request", sequence, token_ids, start, stop, table, want, each_row)


def test_layout_by_hand() -> None:
    """Blocks of 4. Guards against slots of the wrong block, positions that begin at 0, and tokens past `stop`."""
    batch = make_batch(
        [
            grant([10, 11, 12, 13, 14, 15, 16], 3, 6, table=(7, 2), want=None),  # the seventh token is not granted
            grant([20], 0, 1, table=(5,), want=SAMPLE),
            grant([30, 31, 32, 33, 34, 35, 36, 37, 38], 8, 9, table=(1, 0, 9), want=Score(((1,),))),
        ],
        block_size=4,
    )
    expected = {
        "input_ids": [13, 14, 15, 20, 38],
        "positions": [3, 4, 5, 0, 8],
        "query_start_loc": [0, 3, 4, 5],
        "seq_lens": [6, 1, 9],
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
    """Guards against a row too many where the last one is wanted twice, and a row too few where a prompt's next token
    is not granted yet."""
    each = NextLogprobs(1)
    ids = [1, 2, 3, 4, 5, 6]

    def rows(start: int, stop: int, want: Want | None, each_row: NextLogprobs | None) -> list[int]:
        return make_batch([grant(ids, start, stop, want=want, each_row=each_row)], 4).logits_indices.tolist()

    assert rows(0, 6, None, None) == []
    assert rows(0, 6, SAMPLE, None) == [5]
    assert rows(0, 3, None, each) == [0, 1, 2]  # the fourth token is known: row 2 has a next one
    assert rows(3, 6, None, each) == [0, 1]  # nothing follows the last
    assert rows(3, 6, SAMPLE, each) == [0, 1, 2]
    assert rows(0, 3, SAMPLE, each) == [0, 1, 2]  # the last row serves both
    assert rows(0, 6, Hidden((0,)), None) == []
    assert rows(0, 6, Hidden((0,)), each) == [0, 1, 2, 3, 4]
    assert rows(5, 6, None, each) == []
    two = make_batch([grant(ids, 0, 2, each_row=each), grant(ids, 4, 6, want=SAMPLE)], 4)
    assert two.logits_indices.tolist() == [0, 1, 3]


def test_rows_with_next() -> None:
    assert list(rows_with_next(grant([1, 2, 3], 0, 3))) == [0, 1]
    assert list(rows_with_next(grant([1, 2, 3], 0, 2))) == [0, 1]
    assert list(rows_with_next(grant([1, 2, 3], 2, 3))) == []


def test_rows_before_the_start_are_not_asked() -> None:
    """Guards log-probabilities that are made, and paid for, at positions which may as well come from the cache."""
    ids = [1, 2, 3, 4, 5]
    for start, stop, rows in ((0, 5, [2, 3]), (0, 2, []), (1, 4, [1, 2]), (3, 5, [0]), (4, 5, [])):
        one = grant(ids, start, stop, each_row=NextLogprobs(0, start=2))
        assert list(rows_with_next(one)) == rows
        assert make_batch([one], 4).logits_indices.tolist() == rows
