"""Beam search through the library's doors: text, stop strings, log-probabilities, streaming, aborting, asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, AsyncLLM, BeamSearchParams, RequestOutput, SamplingParams
from octavo.backends.reference import ReferenceOps
from octavo.core.errors import InvalidRequestError
from octavo.core.outputs import CompletionOutput
from tests.coordinators.beam_models import Logits, logits_of
from tests.coordinators.plain_search import Found, plain_search

PROMPTS = ["the quick brown fox", "hello", "a", "jumps over the lazy dog and then the other one " * 3]


@pytest.fixture(scope="module")
def llm(tiny_llama_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama_dir), backend="reference", max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="module")
def logits(tiny_llama_dir: Path) -> Logits:
    return logits_of(tiny_llama_dir, ReferenceOps("float32", "float32"))


def best(llm: LLM, prompt: str, **params: Any) -> list[CompletionOutput]:
    (output,) = llm.beam_search(prompt, BeamSearchParams(**params))
    assert output.error is None and output.finished
    return output.outputs


def likely_ends(llm: LLM) -> list[int]:
    """Tokens that searches over PROMPTS come upon, early and late."""
    outputs = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=4, max_tokens=12))
    return sorted({one.token_ids[place] for output in outputs for one in output.outputs for place in (4, 9)})


def same_as_plain(outputs: list[CompletionOutput], found: list[Found]) -> None:
    assert [tuple(one.token_ids) for one in outputs] == [one.tokens for one in found[: len(outputs)]]
    assert [one.score for one in outputs] == pytest.approx([one.score for one in found[: len(outputs)]], rel=1e-5)


def nothing_left(llm: LLM) -> None:
    llm._loop.ask(lambda engine: None).result()  # ends are carried out between steps: wait for those asked for so far
    engine = llm._engine
    assert not engine.has_unfinished_requests and engine.kv.num_available == engine.kv.num_blocks


# --- results ---


def test_outputs(llm: LLM) -> None:
    """Best first, with sums, scores and text."""
    (output,) = llm.beam_search(PROMPTS[0], BeamSearchParams(num_beams=5, max_tokens=9, length_penalty=0.7))
    assert output.prompt == PROMPTS[0] and output.seed is None
    assert [one.index for one in output.outputs] == [0, 1, 2, 3, 4]
    assert len({tuple(one.token_ids) for one in output.outputs}) == 5
    for one in output.outputs:
        assert one.score == pytest.approx((one.cumulative_logprob or 0.0) / len(one.token_ids) ** 0.7)
        assert (one.finish_reason, one.stop_reason, one.logprobs) == ("length", None, None)
        assert one.text == llm.tokenizer.decode(one.token_ids)
    assert output.metrics.num_generated_tokens == 45
    assert len(best(llm, PROMPTS[0], beam_width=5, num_return_sequences=2, max_tokens=3)) == 2
    nothing_left(llm)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_width_one_is_greedy(llm: LLM, early_stopping: bool | str, length_penalty: float) -> None:
    ends = likely_ends(llm)
    greedy = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=30, stop_token_ids=ends))
    assert any(output.outputs[0].finish_reason == "stop" for output in greedy)
    params = BeamSearchParams(
        beam_width=1,
        max_tokens=30,
        stop_token_ids=ends,
        early_stopping=early_stopping,
        length_penalty=length_penalty,
    )
    for ours, theirs in zip(llm.beam_search(PROMPTS, params), greedy, strict=True):
        for name in ("token_ids", "text", "finish_reason", "stop_reason"):
            assert getattr(ours.outputs[0], name) == getattr(theirs.outputs[0], name)


def test_sums_are_what_the_model_says(llm: LLM) -> None:
    """Teacher-forced: the prompt and a hypothesis read in one pass."""
    for output in llm.beam_search(PROMPTS, BeamSearchParams(beam_width=6, max_tokens=14, logprobs=3)):
        given = [{"prompt_token_ids": output.prompt_token_ids + one.token_ids} for one in output.outputs]
        read = llm.generate(given, SamplingParams(max_tokens=1, prompt_logprobs=3, temperature=0))
        for one, again in zip(output.outputs, read, strict=True):
            rows = (again.prompt_logprobs or [])[len(output.prompt_token_ids) :]
            assert one.logprobs is not None and len(one.logprobs) == len(rows) == len(one.token_ids)
            for token_id, ours, theirs in zip(one.token_ids, one.logprobs, rows, strict=True):
                assert (
                    theirs is not None and ours.keys() == theirs.keys() and ours[token_id].rank == theirs[token_id].rank
                )
                assert ours[token_id].logprob == pytest.approx(theirs[token_id].logprob, abs=1e-4)
                assert ours[token_id].decoded_token == llm.tokenizer.decode([token_id], skip_special_tokens=False)
            total = sum(row[token_id].logprob for token_id, row in zip(one.token_ids, one.logprobs, strict=True))
            assert one.cumulative_logprob == pytest.approx(total, abs=1e-4)


def test_log_probabilities_are_of_the_raw_logits(llm: LLM) -> None:
    """Also where processors change what is searched by."""
    (one, *_) = best(llm, PROMPTS[0], max_tokens=8, logprobs=1, repetition_penalty=1.5, logit_bias={70: 4.0})
    assert one.logprobs is not None and one.cumulative_logprob is not None
    raw = [row[token_id].logprob for token_id, row in zip(one.token_ids, one.logprobs, strict=True)]
    assert abs(sum(raw) - one.cumulative_logprob) > 0.1
    given = {"prompt_token_ids": llm.tokenizer.encode(PROMPTS[0]) + one.token_ids}
    (again,) = llm.generate([given], SamplingParams(max_tokens=1, prompt_logprobs=1))
    rows = (again.prompt_logprobs or [])[-len(one.token_ids) :]
    expected = [row[token_id].logprob for token_id, row in zip(one.token_ids, rows, strict=True) if row is not None]
    assert raw == pytest.approx(expected, abs=1e-4)


def test_prompts_do_not_touch_one_another(llm: LLM) -> None:
    """Different prompts and settings in one call, beside samples from another thread's batch: each as alone."""
    settings = [
        BeamSearchParams(beam_width=4, max_tokens=20, length_penalty=0.0),
        BeamSearchParams(beam_width=8, max_tokens=7, early_stopping=True, stop_token_ids=likely_ends(llm)),
        BeamSearchParams(beam_width=3, max_tokens=33, early_stopping="never"),
        BeamSearchParams(beam_width=6, num_beam_groups=3, diversity_penalty=0.5, max_tokens=12),
    ]
    together = llm.beam_search(PROMPTS, settings)
    for prompt, params, output in zip(PROMPTS, settings, together, strict=True):
        llm.reset_prefix_cache()
        (alone,) = llm.beam_search(prompt, params)
        assert [one.token_ids for one in alone.outputs] == [one.token_ids for one in output.outputs]
        assert [one.score for one in alone.outputs] == pytest.approx([one.score for one in output.outputs], abs=1e-5)
    again = llm.beam_search(PROMPTS, settings)
    assert sum(output.num_cached_tokens for output in again) > 0, "the prefix cache serves beams as well"
    assert [one.token_ids for o in again for one in o.outputs] == [one.token_ids for o in together for one in o.outputs]


@pytest.mark.parametrize("block_size", [1, 32])
def test_block_size_and_chunks_change_nothing(llm: LLM, tiny_llama_dir: Path, block_size: int) -> None:
    params = BeamSearchParams(beam_width=8, max_tokens=40, length_penalty=0.0)
    expected = llm.beam_search(PROMPTS, params)
    config = {"block_size": block_size, "max_num_seqs": 16, "max_num_batched_tokens": 24, "max_model_len": 256}
    with LLM(str(tiny_llama_dir), backend="reference", **config) as other:
        found = other.beam_search(PROMPTS, params)
        assert (other.cache_stats.copied_blocks > 0) == (block_size > 1)
        nothing_left(other)
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.token_ids for one in ours.outputs] == [one.token_ids for one in theirs.outputs]


# --- stopping ---


def test_end_tokens(llm: LLM) -> None:
    """The model's own has no stop reason, a stop token has itself; neither is in the text unless asked for."""
    ends = likely_ends(llm)
    outputs = best(llm, PROMPTS[0], beam_width=8, max_tokens=12, stop_token_ids=ends)
    stopped = [one for one in outputs if one.finish_reason == "stop"]
    assert stopped and all(one.token_ids[-1] == one.stop_reason for one in stopped)
    assert all(one.text == llm.tokenizer.decode(one.token_ids[:-1]) for one in stopped)
    shown = best(llm, PROMPTS[0], beam_width=8, max_tokens=12, stop_token_ids=ends, include_stop_str_in_output=True)
    assert [one.token_ids for one in shown] == [one.token_ids for one in outputs]
    assert all(one.text == llm.tokenizer.decode(one.token_ids) for one in shown)
    own = best(llm, PROMPTS[0], beam_width=4, max_tokens=6, logit_bias={2: 8.0})
    assert any(one.token_ids[-1] == 2 and (one.finish_reason, one.stop_reason) == ("stop", None) for one in own)
    ignored = best(llm, PROMPTS[0], beam_width=4, max_tokens=6, logit_bias={2: 8.0}, ignore_eos=True)
    assert {one.finish_reason for one in ignored} == {"length"} and any(2 in one.token_ids for one in ignored)


def test_stop_strings(llm: LLM, logits: Logits) -> None:
    """A candidate whose text contains one ends as with an end token. They may span tokens, and are not in the text."""
    free = best(llm, PROMPTS[0], beam_width=4, max_tokens=16)
    text = free[0].text
    stops = [text[5:7], text[9]]
    outputs = best(llm, PROMPTS[0], beam_width=4, max_tokens=16, stop=stops)

    def stopped(tokens: tuple[int, ...]) -> bool:
        return any(stop in llm.tokenizer.decode(list(tokens)) for stop in stops)

    found = plain_search(logits, llm.tokenizer.encode(PROMPTS[0]), width=4, max_tokens=16, ends=(2,), stops=stopped)
    same_as_plain(outputs, found)
    ended = [one for one in outputs if one.stop_reason in stops]
    assert ended and all(one.finish_reason == "stop" for one in ended)
    for one in outputs:
        assert not any(stop in one.text for stop in stops)
        assert llm.tokenizer.decode(one.token_ids).startswith(one.text)
    shown = best(llm, PROMPTS[0], beam_width=4, max_tokens=16, stop=stops, include_stop_str_in_output=True)
    assert [one.token_ids for one in shown] == [one.token_ids for one in outputs]
    assert all(one.text.endswith(str(one.stop_reason)) for one in shown if one.stop_reason in stops)


def test_min_tokens_holds_back_every_end(llm: LLM) -> None:
    text = best(llm, PROMPTS[0], beam_width=4, max_tokens=16)[0].text
    ends: dict[str, Any] = {"stop": [text[2], text[9]], "stop_token_ids": likely_ends(llm)}
    assert min(len(one.token_ids) for one in best(llm, PROMPTS[0], max_tokens=16, **ends)) < 9
    late = best(llm, PROMPTS[0], max_tokens=16, min_tokens=9, **ends)
    assert min(len(one.token_ids) for one in late) >= 9


def test_what_rules_out_everything_is_an_error(llm: LLM) -> None:
    (output,) = llm.beam_search(
        "hello", BeamSearchParams(allowed_token_ids=[40], stop_token_ids=[40], min_tokens=3, max_tokens=5)
    )
    assert output.error is not None and "rule out the whole vocabulary" in output.error
    assert [one.finish_reason for one in output.outputs] == ["error"]
    nothing_left(llm)


def test_fewer_hypotheses_than_beams(llm: LLM) -> None:
    """Nothing is made up, and nothing that is not allowed comes out."""
    outputs = best(llm, "hello", beam_width=4, max_tokens=3, allowed_token_ids=[60])
    assert [one.token_ids for one in outputs] == [[60, 60, 60]]
    outputs = best(llm, "hello", beam_width=16, max_tokens=2, allowed_token_ids=[60, 61, 62])
    assert sorted(tuple(one.token_ids) for one in outputs) == [(a, b) for a in (60, 61, 62) for b in (60, 61, 62)]


# --- streaming ---


@pytest.mark.parametrize("params", [{}, {"stop": ["q", "zz"]}, {"logprobs": 2}, {"num_return_sequences": 2}])
@pytest.mark.parametrize("prompt", [*PROMPTS[:2], *(pytest.param(one, marks=pytest.mark.slow) for one in PROMPTS[2:])])
def test_streams_take_nothing_back(llm: LLM, prompt: str, params: dict[str, Any]) -> None:
    """What is shown is a beginning of the result, whichever beam wins; and something is shown before the end."""
    asked = BeamSearchParams(**({"beam_width": 3, "max_tokens": 60, "num_return_sequences": 1} | params))
    (whole,) = llm.beam_search(prompt, asked)
    states = list(llm.stream(prompt, asked))
    assert [state.finished for state in states] == [False] * (len(states) - 1) + [True]
    assert states[-1].outputs == whole.outputs
    for before, after in pairwise(states):
        shown, then = before.outputs[0], after.outputs[0]
        assert then.text.startswith(shown.text) and then.token_ids[: len(shown.token_ids)] == shown.token_ids
        assert len(then.token_ids) > len(shown.token_ids) or after.finished
        for one in whole.outputs:
            assert one.text.startswith(shown.text)
        if shown.logprobs is not None and whole.outputs[0].logprobs is not None:
            assert shown.logprobs == whole.outputs[0].logprobs[: len(shown.token_ids)]
    deltas = [output.outputs[0] for output in llm.stream(prompt, asked.but(output_kind="delta"))]
    assert len(deltas) == len(states)
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert list(chain.from_iterable(delta.token_ids for delta in deltas)) == whole.outputs[0].token_ids
    if whole.outputs[0].logprobs is not None:
        assert list(chain.from_iterable(delta.logprobs or () for delta in deltas)) == whole.outputs[0].logprobs
    nothing_left(llm)


def test_some_streams_show_something_early(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=60, num_return_sequences=1)
    assert sum(len(list(llm.stream(prompt, params))) for prompt in PROMPTS) > 2 * len(PROMPTS)


def test_closing_a_stream_frees_everything(llm: LLM) -> None:
    stream = llm.stream("hello", BeamSearchParams(beam_width=2, max_tokens=200, ignore_eos=True))
    next(stream)
    assert llm._engine.has_unfinished_requests
    stream.close()
    nothing_left(llm)


# --- asyncio ---


async def test_async_equals_blocking(llm: LLM, tiny_llama_dir: Path) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=12, output_kind="final_only")
    expected = llm.beam_search(PROMPTS, params)
    async with AsyncLLM(str(tiny_llama_dir), backend="reference", max_model_len=512, max_num_seqs=16) as model:

        async def last(prompt: str) -> RequestOutput:
            return [output async for output in model.beam_search(prompt, params)][-1]

        found = await asyncio.gather(*map(last, PROMPTS))
        assert [[one.token_ids for one in output.outputs] for output in found] == [
            [one.token_ids for one in output.outputs] for output in expected
        ]
        with pytest.raises(InvalidRequestError, match="max_num_seqs=16"):
            await anext(model.beam_search("hello", BeamSearchParams(beam_width=17)))
        with pytest.raises(InvalidRequestError, match="BeamSearchParams"):
            await anext(model.beam_search("hello", SamplingParams()))  # type: ignore[arg-type]
        again = await last(PROMPTS[0])  # the engine has survived
        assert again.outputs[0].token_ids == expected[0].outputs[0].token_ids


async def test_abort_gives_what_there_is(tiny_llama_dir: Path) -> None:
    async with AsyncLLM(str(tiny_llama_dir), backend="reference", max_model_len=512) as model:
        params = BeamSearchParams(beam_width=4, max_tokens=450, ignore_eos=True, num_return_sequences=3)
        stream = model.beam_search("hello", params, request_id="mine")
        first = await anext(stream)
        await model.abort("mine")
        rest = [output async for output in stream]
        last = rest[-1]
        assert last.finished and [one.finish_reason for one in last.outputs] == ["abort"] * 3
        shown = first.outputs[0].token_ids
        assert shown and all(one.token_ids[: len(shown)] == shown for one in last.outputs)
        scores = [one.score for one in last.outputs]
        assert None not in scores and scores == sorted(scores, reverse=True)  # type: ignore[type-var]
        assert model.num_unfinished_requests == 0


# --- refusals ---


def test_one_for_the_other_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="BeamSearchParams"):
        llm.beam_search("hello", SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="SamplingParams"):
        llm.generate("hello", BeamSearchParams())  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="max_num_seqs=32"):
        llm.beam_search(["hello", "you"], BeamSearchParams(beam_width=33))
    with pytest.raises(InvalidRequestError, match="stop_token_ids"):
        llm.beam_search("hello", BeamSearchParams(stop_token_ids=[10**6]))
    nothing_left(llm)
