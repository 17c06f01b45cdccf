"""What is wanted of any row of a grant: its history ends with it, and guesses stand behind the last token alone."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import pytest

from octavo.coordinators.single import SingleCoordinator
from octavo.core.coordinator import NewSequence, SequenceResult
from octavo.core.params import SamplingParams
from octavo.core.plan import RowResult
from octavo.core.request import RequestSpec
from octavo.core.sequence import Sequence
from octavo.core.token_counts import TokenCounts
from octavo.core.want import Draw, Hidden, Sample, Score, TopK, Wanted
from octavo.kv_cache import KVCacheManager
from tests.engine.fake import Harness, expected, next_token
from tests.engine.test_drafts import Guesser, cached_prefixes

PROMPT = [7, 3, 3, 5, 1, 5, 2, 8, 4]


class Asking(SingleCoordinator):
    """Wants what it is given of rows of its prompt, and keeps what comes."""

    def __init__(self, rows: SequenceOf[Wanted], prompt: SequenceOf[int] = PROMPT) -> None:
        params = SamplingParams(max_tokens=4)
        super().__init__(RequestSpec("r", tuple(prompt), params, seed=0, max_tokens=4))
        self.wanted = tuple(rows)
        self.got: list[RowResult] = []

    def start(self, new_sequence: NewSequence) -> None:
        sequence = new_sequence((0,))
        self.sequences.append(sequence)
        sequence.extend(self.request.prompt_token_ids, want=self.completions[0].want, rows=self.wanted)

    def update(self, results: SequenceOf[SequenceResult]) -> None:
        for result in results:
            last = [row for row in result.rows if row.position >= len(PROMPT) - 1 and row.draws]
            self.got += [row for row in result.rows if row not in last]
            self.append_draws(0, [drawn for row in last for drawn in row.draws], result.sequence)


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
@pytest.mark.parametrize("share_wrong", [None, 0.0, 0.5, 1.0])
def test_rows_in_the_middle(chunk: int, share_wrong: float | None) -> None:
    """Guards against guesses behind a row that is not the last, whose KV the tree would take for that of the prompt."""
    proposer = None if share_wrong is None else Guesser(share_wrong)
    harness = Harness(proposer=proposer, max_chunk_tokens=chunk)
    draw = Draw(SamplingParams(), 0, (0,), len(PROMPT))
    last = len(PROMPT) - 1
    rows = [
        Wanted(3, 4, Sample((draw,), 3)),
        Wanted(5, 7, Sample((draw,), 3)),
        Wanted(2, 4, Score(((1,), (2, 3)))),
        Wanted(last, last + 1, Hidden((0,))),
        Wanted(last, last + 1, Score(((1,),))),
    ]
    asking = Asking(rows)
    harness.engine.add(asking)
    while harness.engine.has_unfinished_requests:
        harness.step()
        for prefix in cached_prefixes(harness):
            assert prefix == (PROMPT + expected(PROMPT, 5))[: len(prefix)]
    assert asking.completions[0].token_ids == expected(PROMPT, 4)
    assert {row.position: row.draws[0].token_id for row in asking.got if row.draws} == {
        row: next_token(PROMPT[: row + 1], (0, (0,))) for row in (3, 5, 6)
    }
    assert sorted(row.position for row in asking.got if row.scores) == [2, 3, last]
    assert sorted(row.position for row in asking.got if row.hidden) == [last]
    harness.add("other", PROMPT, max_tokens=4)
    harness.run()
    assert harness.tokens("other") == expected(PROMPT, 4)


def _sequence() -> Sequence:
    return Sequence(0, KVCacheManager(8, 4), iter(range(1, 9)).__next__)


@pytest.mark.parametrize("top", [False, True])
def test_the_history_of_a_row_ends_with_it(top: bool) -> None:
    """Counts for penalties, words that are forbidden and the tokens so far: as if the row were the last."""
    params = SamplingParams(presence_penalty=0.5, min_tokens=5)
    sequence = _sequence()
    sequence.extend(PROMPT[:2])
    sequence.attach(TokenCounts(PROMPT[:2]))
    draw = Draw(params, 0, (0,), 2, bad_words=((5, 9), (2, 6)), end_token_ids=(0,), no_repeat_ngram_size=2)
    want = TopK(3, draw) if top else Sample((draw,))
    sequence.extend(PROMPT[2:], rows=(Wanted(1, len(PROMPT), want),))
    for start in range(1, len(PROMPT)):
        (wanted,) = sequence.wants_within(start, start + 1)
        seen = _sequence()
        seen.extend(PROMPT[:2])
        seen.attach(TokenCounts(PROMPT[:2]))
        seen.extend(PROMPT[2 : start + 1], want=want)
        assert (wanted,) == seen.wants_within(start, start + 1)
    assert len(sequence.wants_within(1, len(PROMPT))) == len(PROMPT) - 1
    sequence.drop()


def test_what_was_wanted_before_still_is() -> None:
    sequence = _sequence()
    sequence.extend(PROMPT[:4], rows=(Wanted(1, 2, Score(((1,),))),))
    sequence.extend(PROMPT[4:], want=Score(((2,),)))
    assert [wanted[:2] for wanted in sequence.wants] == [(1, 2), (8, 9)] and sequence.target == 9
    sequence.truncate(3)
    assert not sequence.wants and not sequence.num_pending
    sequence.drop()


def test_a_row_alone_is_no_last_token() -> None:
    """Where only one row is left, in the middle of what is there, nothing is generated."""
    sequence = _sequence()
    sequence.extend(PROMPT, rows=(Wanted(0, 1, Score(((1,),))),))
    assert sequence.num_pending == 1 and sequence.is_prefilling and not sequence.is_generating
    sequence.drop()
