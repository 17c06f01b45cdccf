"""One output under way: when it stops, what of it is text, and what streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from octavo.core.outputs import OutputSoFar, RequestOutput
from octavo.core.params import OutputKind, SamplingParams
from octavo.core.plan import DrawResult, GrantResult, RowResult, StepPlan, StepResult, TokenLogprob, TokenLogprobs
from octavo.core.request import RequestSpec
from octavo.core.want import Sample
from octavo.engine import Engine, SchedulerConfig
from octavo.kv_cache import KVCacheManager
from octavo.text.stream import IncrementalText, StopMatcher

END = 0  # the model's end token
SPELLING = {END: b"<end>", 1: b"a", 2: b"b", 3: b"c", 5: "é".encode()[:1], 6: "é".encode()[1:], 7: b"<tag>"}


class LetterCodec:
    """Tokens that spell one letter or part of one; real incremental text over them."""

    vocab_size = 8
    eos_token_ids = (END,)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1 for _ in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return b"".join(SPELLING[i] for i in token_ids if not (skip_special_tokens and i == END)).decode()

    def text_stream(self, prompt_token_ids: Sequence[int], **options: Any) -> IncrementalText:
        return IncrementalText(
            token_bytes=SPELLING.__getitem__,
            skipped=frozenset({END}) if options["skip_special_tokens"] else frozenset(),
            strip_leading_space=False,
            prompt_token_ids=prompt_token_ids,
            stop=StopMatcher(options["stop"]) if options["stop"] else None,
            include_stop=options["include_stop_str_in_output"],
            stop_after=options["stop_after"],
        )


class Script:
    """An executor that draws from a script: the same tokens for every output."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def execute(self, plan: StepPlan) -> Script:
        self.plan = plan
        return self

    def result(self) -> StepResult:
        results = []
        for grant in self.plan.grants:
            (wanted,) = grant.wants
            assert isinstance(wanted.want, Sample)
            draws = wanted.want.draws
            token = self.tokens[grant.stop - draws[0].num_prompt_tokens]
            logprobs = TokenLogprobs(TokenLogprob(token, -0.5, 2), (TokenLogprob(3, -0.1, 1),))
            drawn = DrawResult(token, None if draws[0].params.logprobs is None else logprobs)
            results.append(GrantResult((RowResult(wanted.start, draws=(drawn,) * len(draws)),)))
        return StepResult(tuple(results))

    def close(self) -> None: ...


def outputs(tokens: Sequence[int], eos: tuple[int, ...] = (END,), **params: Any) -> list[RequestOutput]:
    sampling = SamplingParams(**({"max_tokens": len(tokens)} | params))
    assert sampling.max_tokens is not None
    request = RequestSpec("r", (1, 1, 1), sampling, seed=0, max_tokens=sampling.max_tokens, eos_token_ids=eos)
    engine = Engine(SchedulerConfig(8, 64), KVCacheManager(32, 4), Script(tokens), lambda: 0.0, LetterCodec())
    engine.add_request(request)
    got: list[RequestOutput] = []
    while engine.has_unfinished_requests:
        got += engine.step()
    assert engine.kv.num_available == 32
    so_far = OutputSoFar()
    return got if sampling.output_kind is OutputKind.DELTA else [so_far.merge(output) for output in got]


def last(tokens: Sequence[int], **params: Any) -> tuple[str, list[int], str | None, int | str | None]:
    output = outputs(tokens, **params)[-1].outputs[0]
    return output.text, output.token_ids, output.finish_reason, output.stop_reason


def test_max_tokens() -> None:
    assert last([1, 2, 3, 1]) == ("abca", [1, 2, 3, 1], "length", None)
    assert last([1, 2, 3, 1], max_tokens=2) == ("ab", [1, 2], "length", None)


def test_end_token_is_a_token_but_not_text() -> None:
    assert last([1, 2, END, 3]) == ("ab", [1, 2, END], "stop", None)
    assert last([1, 2, END, 3], eos=()) == ("abc", [1, 2, END, 3], "length", None)
    assert last([1, END], skip_special_tokens=False, include_stop_str_in_output=True)[0] == "a<end>"


def test_stop_token_ids() -> None:
    assert last([1, 7, 3], stop_token_ids=[7]) == ("a", [1, 7], "stop", 7)
    assert last([1, 7, 3], stop_token_ids=[7], include_stop_str_in_output=True) == ("a<tag>", [1, 7], "stop", 7)


def test_min_tokens_holds_stops_back() -> None:
    assert last([END, 1, END, 2], min_tokens=2) == ("a", [END, 1, END], "stop", None)
    assert last([3, 1, 3, 2], min_tokens=2, stop="c") == ("ca", [3, 1, 3], "stop", "c")
    assert last([3, 1, 3, 2], stop="c") == ("", [3], "stop", "c")
    assert last([1, 2, 3, 1], stop="bc", min_tokens=2) == ("a", [1, 2, 3], "stop", "bc"), "begins before, ends after"


def test_stop_strings_span_tokens() -> None:
    assert last([1, 2, 3, 1], stop="bc") == ("a", [1, 2, 3], "stop", "bc")
    assert last([1, 2, 3, 1], stop="bc", include_stop_str_in_output=True) == ("abc", [1, 2, 3], "stop", "bc")


def test_a_stop_string_on_the_last_token_wins_over_the_length() -> None:
    assert last([1, 2, 3], stop="bc") == ("a", [1, 2, 3], "stop", "bc")


def test_what_might_be_a_stop_string_is_held_back_and_released_at_the_end() -> None:
    got = outputs([1, 2, 2], stop="bbb", output_kind="delta")
    assert [output.outputs[0].text for output in got] == ["a", "", "bb"]


def test_half_a_character_is_never_shown() -> None:
    got = outputs([1, 5, 6, 5], output_kind="cumulative")
    assert [output.outputs[0].text for output in got] == ["a", "a", "aé", "aé\ufffd"]


@pytest.mark.parametrize("kind", ["delta", "cumulative", "final_only"])
def test_output_kinds(kind: str) -> None:
    got = outputs([1, 2, 3], output_kind=kind, logprobs=1)
    texts = [output.outputs[0].text for output in got]
    ids = [output.outputs[0].token_ids for output in got]
    logprobs = [output.outputs[0].logprobs for output in got]
    if kind == "delta":
        assert texts == ["a", "b", "c"] and ids == [[1], [2], [3]]
        assert [len(row or ()) for row in logprobs] == [1, 1, 1]
    elif kind == "cumulative":
        assert texts == ["a", "ab", "abc"] and ids == [[1], [1, 2], [1, 2, 3]]
    else:
        assert texts == ["abc"] and ids == [[1, 2, 3]]
    assert [output.finished for output in got] == [False] * (len(got) - 1) + [True]
    assert got[-1].outputs[0].cumulative_logprob == pytest.approx(-1.5)


def test_logprobs_hold_the_token_and_the_best() -> None:
    (row,) = outputs([1], logprobs=1)[-1].outputs[0].logprobs or ()
    assert set(row) == {1, 3}
    assert (row[1].rank, row[3].rank) == (2, 1)


LOOPS = {"max_pattern_size": 4, "min_pattern_size": 2, "min_count": 3}


def test_repetition() -> None:
    """The output ends with the token that completes the loop, and has it; what else ends it there comes first."""
    tokens = [3, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2]
    end = ("repetition", "repetition_detected")
    assert last(tokens, repetition_detection=LOOPS) == ("cababab", tokens[:7], *end)
    assert last(tokens) == ("cababababab", tokens, "length", None)
    assert last(tokens, repetition_detection=LOOPS, max_tokens=7)[2:] == ("length", None)
    assert last(tokens, repetition_detection=LOOPS, stop="abab")[2:] == ("stop", "abab")
    assert last(tokens, repetition_detection=LOOPS, detokenize=False) == ("", tokens[:7], *end)
    assert last(tokens, repetition_detection=LOOPS, min_tokens=9) == ("cabababab", tokens[:9], *end)
    prompt_is_ones = last([1, 1, 1, 1, 1, 1, 1], repetition_detection=LOOPS)
    assert prompt_is_ones == ("aaaaaa", [1] * 6, *end), "the prompt's tokens do not count"


def test_repetition_of_samples() -> None:
    got = outputs([1, 2] * 5, n=2, repetition_detection=LOOPS)[-1]
    assert [(output.finish_reason, len(output.token_ids)) for output in got.outputs] == [("repetition", 6)] * 2


def test_samples_end_one_by_one() -> None:
    got = outputs([1, 2, 3], n=3, output_kind="delta")
    assert all(len(output.outputs) == 3 for output in got)
    assert {output.index for output in got[-1].outputs} == {0, 1, 2}
    assert got[-1].finished


def test_detokenize_off_gives_tokens_only() -> None:
    assert last([1, 2], detokenize=False) == ("", [1, 2], "length", None)
