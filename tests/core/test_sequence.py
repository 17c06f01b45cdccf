"""The verbs: what is asked, what stays computed, and what follows a fork."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from itertools import count

import pytest

from octavo.core.params import SamplingParams
from octavo.core.sequence import Sequence
from octavo.core.token_counts import TokenCounts
from octavo.core.want import Counts, Draw, History, NextLogprobs, Sample, Score, Wanted
from octavo.kv_cache import KVCacheManager

WANT = Score(((1,),))


class Recorder:
    """A state that remembers every token it saw."""

    def __init__(self, seen: SequenceOf[int] = ()) -> None:
        self.seen = list(seen)

    def fork(self) -> Recorder:
        return Recorder(self.seen)

    def advance(self, token_ids: SequenceOf[int]) -> None:
        self.seen.extend(token_ids)

    def rollback(self, num_tokens: int) -> None:
        del self.seen[len(self.seen) - num_tokens :]


@pytest.fixture
def kv() -> KVCacheManager:
    return KVCacheManager(num_blocks=32, block_size=4)


@pytest.fixture
def sequence(kv: KVCacheManager) -> Sequence:
    ids = count(1)
    return Sequence(0, kv, ids.__next__, ())


def compute(sequence: Sequence, kv: KVCacheManager) -> None:
    """What a step does with all that is pending."""
    stop = sequence.num_computed + sequence.num_pending
    assert kv.allocate(sequence.block_table, sequence.num_computed, stop) is not None
    sequence.commit(stop)


def test_the_last_token_waits_until_something_wants_its_row(sequence: Sequence, kv: KVCacheManager) -> None:
    sequence.extend([1, 2, 3, 4, 5])
    assert sequence.num_pending == 4
    compute(sequence, kv)
    assert sequence.num_pending == 0
    sequence.extend([], WANT)
    assert sequence.num_pending == 1
    compute(sequence, kv)
    assert sequence.num_computed == 5 and not sequence.wants


def test_a_row_can_be_wanted_twice(sequence: Sequence, kv: KVCacheManager) -> None:
    sequence.extend([1, 2, 3], WANT)
    compute(sequence, kv)
    sequence.extend([], WANT)
    assert (sequence.num_computed, sequence.num_pending) == (2, 1)


def test_decode_is_a_sample_of_the_last_row(sequence: Sequence) -> None:
    sequence.extend([1, 2, 3])
    draw = Draw(SamplingParams(), 0, (0,), 3)
    sequence.decode(draw)
    assert sequence.wants == (Wanted(2, 3, Sample((draw,))),)
    assert sequence.num_pending == 3


def test_rows_besides_the_last(sequence: Sequence, kv: KVCacheManager) -> None:
    rows = [Wanted(1, 3, NextLogprobs((3, 4), 0))]
    sequence.extend([1, 2, 3, 4], rows=rows)
    assert sequence.num_pending == 3 and sequence.first_wanted_row == 1, "nothing wants the last token's"
    assert sequence.wants_within(0, 2) == (Wanted(1, 2, NextLogprobs((3,), 0)),)
    compute(sequence, kv)
    assert not sequence.wants and not sequence.pending
    sequence.extend([], WANT, rows=rows)
    assert sequence.pending == (range(1, 4),), "rows that are wanted are computed anew"
    assert sequence.wants_within(2, 4) == (Wanted(2, 3, NextLogprobs((4,), 0)), Wanted(3, 4, WANT))


def test_generating_and_prefilling(sequence: Sequence, kv: KVCacheManager) -> None:
    assert not sequence.is_generating and not sequence.is_prefilling
    sequence.extend([1, 2, 3], WANT)
    assert sequence.is_prefilling and not sequence.is_generating
    compute(sequence, kv)
    sequence.extend([4], WANT)
    assert sequence.is_generating and not sequence.is_prefilling
    sequence.evict()
    assert sequence.is_prefilling


def test_draws_in_a_plan_have_their_history(sequence: Sequence) -> None:
    """As of the row: what is appended, or drafted for another row, changes no plan."""
    draw = Draw(
        SamplingParams(repetition_penalty=1.1, min_tokens=2),
        0,
        (0,),
        num_prompt_tokens=2,
        bad_words=((5, 6), (8,)),
        end_token_ids=(7,),
        no_repeat_ngram_size=2,
    )
    sequence.extend([1, 2], Sample((draw,)))
    sequence.attach(TokenCounts([1, 2]))
    sequence.extend([5], Sample((draw,)))
    prompt = frozenset({1, 2})
    first = History((7, 6, 8), (1, 2, 5), Counts(prompt, ((5, 1),)))
    after = History((8,), (1, 2, 5, 5), Counts(prompt, ((5, 2),)))
    last = History((8,), (1, 2, 5, 5, 6), Counts(prompt, ((5, 2), (6, 1))))
    after = replace(after, forbidden=(6, 8))
    wants = sequence.wants_within(2, 3, [(5,), (5, 6)])
    assert [wanted[:2] for wanted in wants] == [(2, 3), (3, 4), (4, 5)]
    histories = [wanted.want.draws[0].history for wanted in wants if isinstance(wanted.want, Sample)]
    assert histories == [first, after, last]
    counts = sequence.attached(TokenCounts)
    assert counts is not None and counts.output == {5: 1}, "drafts are nobody's tokens"
    sequence.extend([9])
    assert histories[0] == first
    plain = Draw(SamplingParams(), 0, (0,), 2)
    assert plain.at([1, 2, 3], None) is plain


def test_exactness_ends_somewhere(sequence: Sequence) -> None:
    """`exact_until` follows forks and truncations that reach past it, and nothing else."""
    sequence.extend(list(range(10)))
    sequence.exact_until = 6
    assert sequence.fork(7, ()).exact_until == 6
    assert sequence.fork(6, ()).exact_until is None
    sequence.truncate(7)
    assert sequence.exact_until == 6
    sequence.truncate(6)
    assert sequence.exact_until is None
    sequence.exact_until = 3
    sequence.evict()
    assert sequence.exact_until is None, "what comes back is computed"


def test_fork_shares_what_is_committed(sequence: Sequence, kv: KVCacheManager) -> None:
    sequence.extend(list(range(10)), WANT)
    compute(sequence, kv)
    child = sequence.fork(6, (1,))
    assert child.token_ids == list(range(6)) and child.num_computed == 6
    assert child.block_table == sequence.block_table[:2]
    assert child.num_pending == 0 and not child.wants and child.stream == (1,)
    child.extend([77], WANT)
    assert child.num_pending == 1
    assert sequence.token_ids == list(range(10))
    uncomputed = Sequence(9, kv, count(10).__next__, ())
    uncomputed.extend([1, 2, 3])
    assert uncomputed.fork(3, ()).block_table == []
    kv.check([sequence.block_table, child.block_table])


def test_truncate_forgets_tokens_blocks_and_wants(sequence: Sequence, kv: KVCacheManager) -> None:
    sequence.extend(list(range(10)), WANT)
    compute(sequence, kv)
    sequence.extend([10, 11], WANT)
    sequence.truncate(3)
    assert sequence.token_ids == [0, 1, 2] and sequence.num_computed == 3 and len(sequence.block_table) == 1
    assert sequence.num_pending == 0 and not sequence.wants
    sequence.truncate(0)
    assert kv.num_available == kv.num_blocks


def test_drop_is_final_and_idempotent(sequence: Sequence, kv: KVCacheManager) -> None:
    sequence.extend(list(range(10)), WANT)
    compute(sequence, kv)
    sequence.drop()
    sequence.drop()
    assert sequence.dropped and kv.num_available == kv.num_blocks


@pytest.mark.parametrize("at", [-1, 11])
def test_positions_outside_the_sequence_are_refused(sequence: Sequence, at: int) -> None:
    sequence.extend(list(range(10)))
    with pytest.raises(ValueError, match="10 tokens"):
        sequence.fork(at, ())
    with pytest.raises(ValueError, match="10 tokens"):
        sequence.truncate(at)


def test_evicted_and_idle_asks_for_nothing(sequence: Sequence, kv: KVCacheManager) -> None:
    """A sequence nobody asks anything of must not be recomputed after its blocks were taken."""
    sequence.extend(list(range(10)), WANT)
    compute(sequence, kv)
    sequence.evict()
    assert sequence.num_pending == 0 and kv.num_available == kv.num_blocks
    sequence.extend([5], WANT)
    assert sequence.num_pending == 11


def test_state_follows_the_verbs(sequence: Sequence) -> None:
    """advance, fork and rollback reach what is attached, and only for tokens that came after it was."""
    sequence.extend([1, 2, 3])
    state = Recorder()
    sequence.attach(state)
    sequence.extend([4, 5])
    sequence.extend([6])
    assert state.seen == [4, 5, 6]
    child = sequence.fork(4, ())
    child.extend([40])
    ((child_state, _),) = child._attached
    assert child_state.seen == [4, 40] and state.seen == [4, 5, 6]  # type: ignore[attr-defined]
    sequence.truncate(5)
    assert state.seen == [4, 5]
    assert sequence.fork(2, ())._attached == [], "a fork from before it was attached knows nothing of it"


def test_token_counts_roll_back() -> None:
    counts = TokenCounts([1, 1, 2])
    counts.advance([5, 5, 6])
    copy = counts.fork()
    copy.rollback(2)
    assert copy.output == {5: 1} and counts.output == {5: 2, 6: 1} and counts.prompt == {1, 2}
    copy.rollback(1)
    assert copy.output == {}


def test_a_detached_state_follows_no_more(sequence: Sequence) -> None:
    states = [Recorder(), Recorder()]
    for state in states:
        sequence.attach(state)
    sequence.extend([1, 2])
    sequence.detach(states[0])
    sequence.extend([3])
    assert [state.seen for state in states] == [[1, 2], [1, 2, 3]]
    assert sequence.attached(Recorder) is states[1]
