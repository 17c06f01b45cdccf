"""What changes a search: processors against transformers' and against the plain loop; groups; searches wide enough to
miss nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from octavo import LLM, BeamSearchParams
from octavo.backends.reference import ReferenceOps
from octavo.core.outputs import CompletionOutput
from tests.coordinators.beam_models import Logits, logits_of, prompt
from tests.coordinators.plain_search import Found, log_softmax, plain_search
from tests.coordinators.test_beams_transformers import ends_of
from tests.oracle.beams import search

Making = Callable[..., Path]
Loading = Callable[[Path], Any]
Row = NDArray[np.float32]

GIVEN = [prompt(length, 40 + length) for length in (2, 9, 21, 38)]
WIDTHS = (2, 4, 8, 4)
PENALTIES = (1.0, 0.0, 2.0, -1.0)


@pytest.fixture(scope="module")
def folder(beam_model: Making) -> Path:
    return beam_model("llama-grouped-heads")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), backend="reference", max_num_seqs=64, max_model_len=96) as llm:
        yield llm


@pytest.fixture(scope="module")
def logits(folder: Path) -> Logits:
    return logits_of(folder, ReferenceOps("float32", "float32"))


def found(llm: LLM, max_tokens: int = 12, **settings: Any) -> list[list[CompletionOutput]]:
    """The hypotheses of each of GIVEN, all searched in one call."""
    params = [
        BeamSearchParams(**({"beam_width": width, "length_penalty": penalty, "max_tokens": max_tokens} | settings))
        for width, penalty in zip(WIDTHS, PENALTIES, strict=True)
    ]
    outputs = llm.beam_search([{"prompt_token_ids": one} for one in GIVEN], params, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return [output.outputs for output in outputs]


def same(ours: list[CompletionOutput], theirs: list[tuple[Any, float]]) -> None:
    assert [list(one.token_ids) for one in ours] == [list(tokens) for tokens, _ in theirs]
    assert [one.score for one in ours] == pytest.approx([score for _, score in theirs], rel=1e-5)


def tokens(outputs: list[list[CompletionOutput]]) -> list[list[list[int]]]:
    return [[one.token_ids for one in answer] for answer in outputs]


# --- processors against transformers' ---

# ours, transformers'
PROCESSORS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    ({"repetition_penalty": 0.6}, {"repetition_penalty": 0.6}),
    ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
    ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
    ({"min_tokens": 5}, {"min_new_tokens": 5}),
    ({"logit_bias": {4: 3.0, 9: -2.5}}, {"sequence_bias": {(4,): 3.0, (9,): -2.5}}),
    (
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_tokens": 3, "early_stopping": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "early_stopping": True},
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), PROCESSORS, ids=" ".join)
def test_processors(llm: LLM, folder: Path, beam_oracle: Loading, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """They act on log-probabilities, which are not normalised again."""
    changed = False
    for ends, length in ((ends_of(folder), 12), ([], 24)):
        answers = found(llm, max_tokens=length, ignore_eos=not ends, **ours)
        changed |= tokens(answers) != tokens(found(llm, max_tokens=length, ignore_eos=not ends))
        for given, width, penalty, answer in zip(GIVEN, WIDTHS, PENALTIES, answers, strict=True):
            settings = {"num_beams": width, "length_penalty": penalty, "max_new_tokens": length} | theirs
            same(answer, search(beam_oracle(folder), given, ends, **settings))
    assert changed, "the processors changed nothing: the test shows nothing"


def test_bad_words(llm: LLM, folder: Path, beam_oracle: Loading) -> None:
    """Words of one token, which transformers forbids everywhere, and of two, of which the last is forbidden."""
    free = tokens(found(llm))
    longest = max((one for answer in free for one in answer), key=len)
    ids = [longest[1:2], longest[3:5]]
    words = [llm.tokenizer.decode(word) for word in ids]
    assert [llm.tokenizer.encode(word) for word in words] == ids
    answers = found(llm, bad_words=words)
    assert tokens(answers) != free
    for given, width, penalty, answer in zip(GIVEN, WIDTHS, PENALTIES, answers, strict=True):
        settings = {"num_beams": width, "length_penalty": penalty, "max_new_tokens": 12, "bad_words_ids": ids}
        same(answer, search(beam_oracle(folder), given, ends_of(folder), **settings))


# --- what transformers has not, against the plain loop ---


def plain(logits: Logits, folder: Path, number: int, **settings: Any) -> list[tuple[Any, float]]:
    known: dict[str, Any] = {"max_tokens": 12, "width": WIDTHS[number], "length_penalty": PENALTIES[number]}
    answer: list[Found] = plain_search(logits, GIVEN[number], ends=ends_of(folder), **(known | settings))
    return [(one.tokens, one.score) for one in answer]


def test_presence_and_frequency(llm: LLM, folder: Path, logits: Logits) -> None:
    def process(row: Row, given: list[int], generated: tuple[int, ...]) -> None:
        for token in set(generated):
            row[token] -= np.float32(0.75) + np.float32(0.5) * generated.count(token)

    answers = found(llm, presence_penalty=0.75, frequency_penalty=0.5)
    assert tokens(answers) != tokens(found(llm))
    for number, answer in enumerate(answers):
        same(answer, plain(logits, folder, number, process=process))


def test_allowed_tokens(llm: LLM, folder: Path, logits: Logits) -> None:
    """With few tokens allowed there are fewer beams than the width at first: no place is filled with anything else."""
    allowed = [5, 17, 33, ends_of(folder)[0]]

    def process(row: Row, given: list[int], generated: tuple[int, ...]) -> None:
        row[np.setdiff1d(np.arange(len(row)), allowed)] = -np.inf

    for number, answer in enumerate(found(llm, allowed_token_ids=allowed)):
        same(answer, plain(logits, folder, number, process=process))
        assert {token for one in answer for token in one.token_ids} <= set(allowed)


# --- diverse groups ---


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("width", "groups"), [(2, 2), (4, 2), (6, 3), (8, 8), (12, 3), (16, 4)])
def test_groups(llm: LLM, folder: Path, logits: Logits, width: int, groups: int, early_stopping: bool | str) -> None:
    """Penalties from a fraction of what tokens differ by to more than any difference: then all groups part at once."""
    for diversity in (0.25, 1.5, 50.0) if early_stopping is False else (1.5,):
        settings = {"num_beam_groups": groups, "diversity_penalty": diversity, "early_stopping": early_stopping}
        answers = found(llm, beam_width=width, **settings)
        for number, answer in enumerate(answers):
            expected = plain(
                logits,
                folder,
                number,
                width=width,
                groups=groups,
                diversity=diversity,
                early_stopping=early_stopping,
            )
            same(answer, expected)
        assert tokens(answers) != tokens(found(llm, beam_width=width, early_stopping=early_stopping))


def test_one_group_is_the_plain_search(llm: LLM) -> None:
    assert tokens(found(llm, num_beam_groups=1)) == tokens(found(llm))


def test_groups_with_penalties_and_stop_strings(llm: LLM, folder: Path, logits: Logits) -> None:
    """The diversity penalty comes after all processors."""
    stop = llm.tokenizer.decode(tokens(found(llm, beam_width=6))[2][0][3:5])

    def process(row: Row, given: list[int], generated: tuple[int, ...]) -> None:
        seen = sorted({*given, *generated})
        row[seen] = np.where(row[seen] > 0, row[seen] / np.float32(1.25), row[seen] * np.float32(1.25))

    def stops(generated: tuple[int, ...]) -> bool:
        return stop in llm.tokenizer.decode(list(generated))

    settings = {"num_beam_groups": 3, "diversity_penalty": 0.5, "repetition_penalty": 1.25, "stop": stop}
    for number, answer in enumerate(found(llm, beam_width=6, **settings)):
        same(answer, plain(logits, folder, number, width=6, groups=3, diversity=0.5, process=process, stops=stops))


# --- wide enough to miss nothing ---


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
def test_exhaustive_search(beam_model: Making, length_penalty: float) -> None:
    """With as many beams as there are hypotheses, the best of all of them is found, and the order is theirs."""
    vocab, length, width = 5, 3, 125
    folder = beam_model("llama-grouped-heads", 1, vocab_size=vocab)
    logits, (end,) = logits_of(folder, ReferenceOps("float32", "float32")), ends_of(folder)
    given = [1, 3, 0, 2]
    sums: dict[tuple[int, ...], float] = {(): 0.0}
    ended: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(length):
        longer = {}
        for before, total in sums.items():
            row = log_softmax(logits([*given, *before]))
            for token in range(vocab):
                longer[(*before, token)] = total + float(row[token])
        ended += [(s / len(t) ** length_penalty, t) for t, s in longer.items() if t[-1] == end or len(t) == length]
        sums = {t: s for t, s in longer.items() if t[-1] != end}
    ended.sort(reverse=True)
    params = BeamSearchParams(
        beam_width=width, max_tokens=length, length_penalty=length_penalty, early_stopping="never"
    )
    with LLM(str(folder), backend="reference", max_num_seqs=128, max_model_len=32) as llm:
        (output,) = llm.beam_search({"prompt_token_ids": given}, params)
    assert len(ended) == len(output.outputs) == 4 * 4 * 5 + 4 + 1
    same(output.outputs, [(t, score) for score, t in ended])


def test_a_narrow_search_can_miss_the_best(llm: LLM) -> None:
    """Guards against comparisons that any search would pass: width matters on these models."""
    best = {
        width: [answer[0].cumulative_logprob for answer in found(llm, beam_width=width, length_penalty=0.0)]
        for width in (1, 2, 16)
    }
    assert len({tuple(values) for values in best.values()}) == 3  # type: ignore[arg-type]
    assert any(wide > narrow for wide, narrow in zip(best[16], best[2], strict=True))  # type: ignore[operator]


def test_grid_of_settings_composes(llm: LLM) -> None:
    """All pairs of settings run together: no error, and every hypothesis keeps what each of them says."""
    settings: list[dict[str, Any]] = [
        {"min_tokens": 3},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.2},
        {"logit_bias": {3: 2.0}},
        {"num_beam_groups": 2, "diversity_penalty": 0.5},
        {"logprobs": 2},
        {"stop": "!"},
        {"early_stopping": "never"},
        {"num_return_sequences": 1},
    ]
    for a, b in itertools.combinations(settings, 2):
        for answer in found(llm, max_tokens=8, **(a | b)):
            for one in answer:
                assert len(one.token_ids) >= (a | b).get("min_tokens", 1)
                assert (one.logprobs is not None) == ("logprobs" in a | b)
            assert 1 <= len(answer) <= (a | b).get("num_return_sequences", 8)
