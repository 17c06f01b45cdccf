"""The library's front door. The tiny model unless the real one is the point."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, BeamSearchParams, SamplingParams
from octavo.core.errors import ConfigError, EngineClosedError, InvalidRequestError, OutOfMemoryError
from octavo.core.events import EventKind, Reason
from octavo.core.outputs import RequestOutput
from octavo.loading.weights import FileWeights
from tests.pace import held

PROMPT = "the quick brown fox"
LONG_PROMPT = "A prompt that nobody else has. " * 7
LONG = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama_dir), max_num_seqs=8, max_num_batched_tokens=64) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does: afterwards nothing is queued and every block is home."""
    yield
    if "tiny" in request.fixturenames:
        check_idle(request.getfixturevalue("tiny"))


def check_idle(llm: LLM) -> None:
    llm._loop.ask(lambda engine: None).result()  # ends are carried out between steps: wait for those asked for so far
    kv = llm._engine.kv
    assert llm._engine.num_requests == 0
    assert llm._engine.scheduler.num_waiting == llm._engine.scheduler.num_running == 0
    assert kv.num_available == kv.num_blocks
    assert not llm._loop._deliver


def params(**given: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 12, "seed": 7, "ignore_eos": True, **given})


def token_ids(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


# --- the real model ---


def test_the_real_model_answers(smollm2_llm: LLM) -> None:
    """Guards the whole path at once: file, tokenizer, template, model, KV, sampling, text."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (output,) = smollm2_llm.chat(question, SamplingParams(temperature=0, max_tokens=20))
    assert output.outputs[0].text == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"
    assert output.prompt is not None and output.prompt.count("<|im_start|>") == 3
    check_idle(smollm2_llm)


def test_the_real_model_in_a_batch_answers_as_alone(smollm2_llm: LLM) -> None:
    """Guards against requests of one batch seeing each other: lengths differ, and one has stop and penalties."""
    greedy = SamplingParams(temperature=0, max_tokens=8)
    prompts = ["The sun is", "Water boils at a temperature of 100 degrees and freezes at", "One, two, three,"]
    each = [greedy, greedy.but(stop=["Celsius"]), greedy.but(repetition_penalty=1.3)]
    alone = [smollm2_llm.generate(p, one)[0] for p, one in zip(prompts, each, strict=True)]
    together = smollm2_llm.generate(prompts, each)
    assert [token_ids(output) for output in together] == [token_ids(output) for output in alone]
    check_idle(smollm2_llm)


# --- generate ---


def test_outputs_come_in_the_order_of_the_prompts(tiny: LLM) -> None:
    prompts = [PROMPT + "!" * n for n in range(12)]
    outputs = tiny.generate(prompts, [params(max_tokens=12 - n) for n in range(12)])
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [12 - n for n in range(12)]
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)


def test_prompt_forms_are_equal(tiny: LLM) -> None:
    ids = tiny.tokenizer.encode(PROMPT)
    forms: list[Any] = [PROMPT, {"prompt": PROMPT}, {"prompt_token_ids": ids}]
    first, *others = (token_ids(output) for output in tiny.generate(forms, params()))
    assert others == [first, first]
    assert token_ids(tiny.generate(forms[2], params())[0]) == first, "one prompt need not be in a list"
    assert tiny.generate([], params()) == []


def test_a_seed_is_reported_and_repeats_the_output(tiny: LLM) -> None:
    """Guards against an answer that nobody can get again."""
    drawn = tiny.generate([PROMPT, PROMPT], params(seed=None))
    assert drawn[0].seed != drawn[1].seed and token_ids(drawn[0]) != token_ids(drawn[1])
    for output in drawn:
        (again,) = tiny.generate(PROMPT, params(seed=output.seed))
        assert (again.seed, token_ids(again)) == (output.seed, token_ids(output))


def test_the_engines_seed_is_used_by_requests_without_one(tiny_llama_dir: Path, tiny: LLM) -> None:
    with LLM(str(tiny_llama_dir), seed=5) as llm:
        (output,) = llm.generate(PROMPT, params(seed=None))
    assert output.seed == 5
    assert token_ids(output) == token_ids(tiny.generate(PROMPT, params(seed=5))[0])


def test_samples_differ_and_each_is_what_it_would_be_with_fewer(tiny: LLM) -> None:
    """Guards noise keyed by anything but (seed, sample, position, token): its batch, its siblings, its row."""
    five = token_ids(tiny.generate(PROMPT, params(n=5))[0])
    assert len({tuple(ids) for ids in five}) == 5 and len({ids[0] for ids in five}) > 1
    assert token_ids(tiny.generate(PROMPT, params(n=3))[0]) == five[:3]
    assert token_ids(tiny.generate(PROMPT, params())[0]) == five[:1]
    assert tiny._engine.kv.num_copies > 0, "siblings shared a block and one of them copied it"


def test_logprobs_have_the_shape_asked_for(tiny: LLM) -> None:
    (output,) = tiny.generate(PROMPT, params(temperature=0, logprobs=3, prompt_logprobs=2))
    completion = output.outputs[0]
    assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids) == 12
    total = 0.0
    for token_id, row in zip(completion.token_ids, completion.logprobs, strict=True):
        assert [entry.rank for entry in row.values()] == [1, 2, 3]
        assert row[token_id].rank == 1, "greedy"
        assert all(entry.logprob <= 0 and isinstance(entry.decoded_token, str) for entry in row.values())
        total += row[token_id].logprob
    assert completion.cumulative_logprob == pytest.approx(total)
    rows = output.prompt_logprobs
    assert rows is not None and len(rows) == len(output.prompt_token_ids) and rows[0] is None
    for token_id, row in zip(output.prompt_token_ids[1:], rows[1:], strict=True):
        assert row is not None and token_id in row and 2 <= len(row) <= 3


def test_prompt_logprobs_are_those_of_generating(tiny: LLM) -> None:
    """Guards an off-by-one between positions and rows, also where the prompt is cut into chunks of 64."""
    (made,) = tiny.generate(PROMPT * 10, params(temperature=0, logprobs=0, max_tokens=30))
    assert len(made.prompt_token_ids) > 64
    ids = made.prompt_token_ids + made.outputs[0].token_ids
    (read,) = tiny.generate({"prompt_token_ids": ids}, params(prompt_logprobs=0, max_tokens=1))
    rows = read.prompt_logprobs
    assert rows is not None and made.outputs[0].logprobs is not None
    for made_row, read_row in zip(made.outputs[0].logprobs, rows[-30:], strict=True):
        ((made_id, made_entry),) = made_row.items()
        assert read_row is not None
        assert read_row[made_id].logprob == pytest.approx(made_entry.logprob, abs=1e-4)


def test_zero_logprobs_are_those_of_the_token_alone(tiny: LLM) -> None:
    (output,) = tiny.generate(PROMPT, params(logprobs=0))
    assert output.outputs[0].logprobs is not None
    assert [list(row) for row in output.outputs[0].logprobs] == [[i] for i in output.outputs[0].token_ids]


def test_answers_end_with_the_context(tiny_llama_dir: Path) -> None:
    with LLM(str(tiny_llama_dir), max_model_len=40) as llm:
        (output,) = llm.generate(PROMPT, params(max_tokens=None))
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 40
        assert output.outputs[0].finish_reason == "length"


def test_metrics_are_in_order(tiny: LLM) -> None:
    (output,) = tiny.generate(PROMPT, params(n=2))
    m = output.metrics
    assert m.first_scheduled_time and m.first_token_time and m.finished_time
    assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.finished_time
    assert m.num_generated_tokens == 24
    assert output.system_fingerprint == tiny.system_fingerprint


def test_every_token_of_a_prompt_is_computed_found_or_shared(tiny: LLM) -> None:
    """What `cache_stats` says of the work that n samples of one prompt are, from an empty cache and again."""
    found = []
    for _ in range(2):
        before = tiny.cache_stats
        (output,) = tiny.generate(LONG_PROMPT, params(n=3, max_tokens=5))
        after = tiny.cache_stats
        prompt, names = len(output.prompt_token_ids), ("computed_tokens", "hit_tokens", "forked_tokens")
        computed, hit, forked = (getattr(after, name) - getattr(before, name) for name in names)
        assert (computed, hit, forked) == (
            prompt - output.num_cached_tokens + 3 * 4,
            output.num_cached_tokens,
            3 * prompt,
        )
        found.append(hit)
    assert found[0] == 0 < prompt - 16 <= found[1]


def test_windowed_model(tiny_gemma3_dir: Path) -> None:
    """Guards masks at the edges of windows: a prompt several windows long, whole and in chunks."""
    answers = []
    for step_tokens in (512, 37):
        with LLM(str(tiny_gemma3_dir), max_num_batched_tokens=step_tokens) as llm:
            (output,) = llm.generate(PROMPT * 5, params(max_tokens=40))
            assert len(output.prompt_token_ids) > 4 * 16
            answers.append(token_ids(output))
            check_idle(llm)
    assert answers[0] == answers[1]


# --- streaming ---


@pytest.mark.parametrize("n", [1, 3])
def test_output_kinds_tell_the_same(tiny: LLM, n: int) -> None:
    """Guards deltas that lose or repeat something, and a last output that is not the whole."""
    (final,) = tiny.generate(PROMPT, params(n=n, logprobs=1, prompt_logprobs=1))
    kind = params(n=n, logprobs=1, prompt_logprobs=1, output_kind="cumulative")
    cumulative = list(tiny.stream(PROMPT, kind))
    deltas = list(tiny.stream(PROMPT, kind.but(output_kind="delta")))
    (only,) = tiny.stream(PROMPT, kind.but(output_kind="final_only"))
    assert len(cumulative) == len(deltas) == 12
    assert [output.finished for output in deltas] == [False] * 11 + [True]
    for index in range(n):
        whole = final.outputs[index]
        assert cumulative[-1].outputs[index] == only.outputs[index] == whole
        parts = [part for delta in deltas for part in delta.outputs if part.index == index]
        assert "".join(part.text for part in parts) == whole.text
        assert [i for part in parts for i in part.token_ids] == whole.token_ids
        assert [row for part in parts for row in part.logprobs or ()] == whole.logprobs
        lengths = [len(output.outputs[index].token_ids) for output in cumulative]
        assert lengths == list(range(1, 13))
    assert deltas[0].prompt_logprobs == final.prompt_logprobs == cumulative[-1].prompt_logprobs
    assert all(delta.prompt_logprobs is None for delta in deltas[1:])


def test_outputs_that_are_kept_do_not_change(tiny: LLM) -> None:
    """Guards against live objects in what the user gets, and against the user's changes to it reaching the engine."""
    asked = params(max_tokens=6, logprobs=1, prompt_logprobs=1, repetition_penalty=1.4, n=2)
    (expected,) = tiny.generate(PROMPT, asked)
    kept = []
    for output in tiny.stream(PROMPT, asked):
        kept.append(output)
        assert output.metrics.num_generated_tokens == 2 * len(kept)
        output.prompt_token_ids.append(5)
        output.metrics.num_generated_tokens += 0
    assert [output.metrics.num_generated_tokens for output in kept] == [2, 4, 6, 8, 10, 12]
    assert [[len(one.token_ids) for one in output.outputs] for output in kept] == [[i, i] for i in range(1, 7)]
    assert [[len(one.logprobs or ()) for one in output.outputs] for output in kept] == [[i, i] for i in range(1, 7)]
    assert len({id(output.metrics) for output in kept}) == 6
    assert token_ids(kept[-1]) == token_ids(expected)
    assert all(output.prompt_logprobs == expected.prompt_logprobs for output in kept)


def test_what_leaves_the_engine_is_what_is_new(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against text and tokens that are copied whole in every step, on the thread that everybody waits for."""
    made: list[RequestOutput] = []
    step = tiny._engine.step

    def watched() -> list[RequestOutput]:
        outputs = step()
        made.extend(copy.deepcopy(outputs))
        return outputs

    monkeypatch.setattr(tiny._engine, "step", watched)
    *_, last = tiny.stream(PROMPT, params(max_tokens=50, logprobs=1))
    assert [len(output.outputs[0].token_ids) for output in made] == [1] * 50
    assert "".join(output.outputs[0].text for output in made) == last.outputs[0].text
    assert sum(len(output.outputs[0].logprobs or ()) for output in made) == 50
    made.clear()
    asked = BeamSearchParams(beam_width=3, max_tokens=30, logprobs=1)
    *_, last = tiny.stream(PROMPT, asked)
    (found,) = tiny.beam_search(PROMPT, asked)
    assert token_ids(last) == token_ids(found) and last.outputs[0].text == found.outputs[0].text
    assert sum(len(output.outputs[0].token_ids) for output in made[:-1]) <= 30


def test_closing_a_stream_early_frees_its_blocks(tiny: LLM) -> None:
    stream = tiny.stream(PROMPT, LONG)
    next(stream)
    assert tiny._engine.kv.num_available < tiny._engine.kv.num_blocks
    stream.close()
    check_idle(tiny)


def test_leaving_a_loop_over_a_stream_frees_its_blocks(tiny: LLM) -> None:
    for output in tiny.stream(PROMPT, LONG):
        if len(output.outputs[0].token_ids) == 5:
            break
    check_idle(tiny)


@pytest.mark.parametrize("how", ["forgotten", "closed"])
def test_a_stream_that_nobody_starts_leaves_nothing(tiny: LLM, how: str) -> None:
    """Guards a request queued when the stream is made: an unstarted generator runs no clean-up."""
    stream = tiny.stream(PROMPT, LONG)
    if how == "closed":
        stream.close()
    del stream
    check_idle(tiny)


def test_streams_side_by_side(tiny: LLM) -> None:
    expected = token_ids(tiny.generate(PROMPT, params())[0])
    streams = [tiny.stream(PROMPT, params()) for _ in range(3)]
    for outputs in zip(*streams, strict=True):
        last = outputs
    assert [token_ids(output) for output in last] == [expected] * 3


# --- chat ---


def test_chat_is_generate_on_the_templates_text(tiny: LLM) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    prompt = tiny.chat_prompt(messages)
    assert prompt["prompt"] == text and prompt["prompt_token_ids"][0] == 1
    (output,) = tiny.chat(messages, params())
    assert output.prompt == text
    assert token_ids(output) == token_ids(tiny.generate(prompt, params())[0])
    assert [token_ids(o) for o in tiny.chat([messages, messages], params())] == [token_ids(output)] * 2


def test_chat_options(tiny: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
    continued = tiny.chat(messages, params(), add_generation_prompt=False, continue_final_message=True)
    assert continued[0].prompt is not None and continued[0].prompt.endswith("assistant\nWell")
    template = "{{ who }}: {{ messages[0].content }}"
    own = tiny.chat(messages[:1], params(), chat_template=template, chat_template_kwargs={"who": "Q"})
    assert own[0].prompt == "Q: hi"


@pytest.mark.parametrize(
    ("messages", "options", "field"),
    [
        ([], {}, "messages"),
        ("hi", {}, "messages"),
        (5, {}, "messages"),
        ({"role": "user", "content": "x"}, {}, "messages"),
        ([{"role": "user"}], {}, "messages[0].content"),
        ([{"role": "user", "content": "x"}], {"chat_template": 5}, "chat_template"),
        ([{"role": "user", "content": "x"}], {"chat_template_kwargs": 5}, "chat_template_kwargs"),
        (
            [{"role": "user", "content": "x"}],
            {"chat_template_kwargs": {"messages": 5}},
            "chat_template_kwargs.messages",
        ),
        (
            [{"role": "user", "content": "x"}],
            {"chat_template_kwargs": {"add_generation_prompt": False}},
            "chat_template_kwargs.add_generation_prompt",
        ),
        ([{"role": "user", "content": "x"}], {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ([{"role": "user", "content": "x"}], {"continue_final_message": True}, "continue_final_message"),
        ([{"role": "user", "content": "x"}], {"request_id": "mine"}, "request_id"),
        ([{"role": "user", "content": "x"}], {"priority": "high"}, "priority"),
    ],
)
def test_bad_conversations_are_refused(tiny: LLM, messages: Any, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tiny.chat(messages, params(), **options)
    assert caught.value.field == field
    if isinstance(messages, list):
        good = [{"role": "user", "content": "x"}]
        with pytest.raises(InvalidRequestError) as caught:
            tiny.chat([[*good, {"role": "assistant", "content": "y"}], messages], params(), **options)
        first = field if field.startswith("chat_template") else field.replace("messages", "messages[1]")
        assert caught.value.field == ("continue_final_message" if field == "continue_final_message" else first)


def test_parameters_are_values(tiny: LLM) -> None:
    """Guards against a caller who changes what a request under way was given."""
    bias = {7: 100.0}
    given = params(max_tokens=4, logit_bias=bias)
    stream = tiny.stream("hello there", given)
    next(stream)
    bias[9] = 1e6
    with pytest.raises(TypeError, match="cannot be changed"):
        given.logit_bias[9] = 1e6  # type: ignore[index]
    assert token_ids(list(stream)[-1]) == [[7] * 4]
    assert given.logit_bias == {7: 100.0} and hash(given) == hash(pickle.loads(pickle.dumps(given)))
    assert copy.deepcopy(given) == given == given.but(n=1)


def test_settings_that_the_backend_does_not_heed(tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    LLM(str(tiny_llama_dir), backend="reference", threads=2, pin_threads=False).close()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "threads: has no effect with the reference backend"
    ]


def test_which_conversation_is_too_long(tiny: LLM) -> None:
    good, bad = ([{"role": "user", "content": text}] for text in ("x", "x " * 5000))
    with pytest.raises(InvalidRequestError, match=r"^messages\[2\]: has 10\d+ tokens"):
        tiny.chat([good, good, bad], params())
    with pytest.raises(InvalidRequestError, match=r"^messages: has 10\d+ tokens"):
        tiny.chat(bad, params())


def test_which_prompt_leaves_no_room(tiny: LLM) -> None:
    """The parameters are for all, and one prompt is too long for them."""
    prompts = [PROMPT, {"prompt_token_ids": [5] * 4000}, {"prompt_token_ids": [5], "cache_salt": ""}]
    with pytest.raises(InvalidRequestError, match=r"^min_tokens: 200 do not fit: prompts\[1\] has 4000 tokens"):
        tiny.generate(prompts, params(min_tokens=200, max_tokens=None))
    with pytest.raises(InvalidRequestError, match=r"^prompts\[2\]\.cache_salt: must be"):
        tiny.generate(prompts, params())


# --- bad input ---


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "prompt"),
        (5, "prompts"),
        (None, "prompts"),
        (b"bytes", "prompts"),
        ([5], "prompts[0]"),
        ([None], "prompts[0]"),
        ({}, "prompt"),
        ({"text": "x"}, "prompt"),
        ({"prompt": "x", 5: 6}, "prompt"),
        ({"prompt": 5, "prompt_token_ids": [5]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ("a\ud800b", "prompt"),
        ("x " * 5000, "prompt"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids"),
        ({"prompt_token_ids": 5}, "prompt_token_ids"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids"),
        ({"prompt_token_ids": [2**31]}, "prompt_token_ids"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids"),
        ({"prompt_token_ids": [1.0]}, "prompt_token_ids"),
        ({"prompt_token_ids": [None]}, "prompt_token_ids"),
        ({"prompt_token_ids": [5] * 4096}, "prompt"),
    ],
)
def test_bad_prompts_are_refused(tiny: LLM, prompt: Any, field: str) -> None:
    """Each names what is wrong, and the good prompt beside it is not left in the queue."""
    with pytest.raises(InvalidRequestError) as caught:
        tiny.generate(prompt, params())
    assert caught.value.field == field
    if not isinstance(prompt, list):
        beams = BeamSearchParams(beam_width=2)
        for batch in (lambda few: tiny.generate(few, params()), lambda few: tiny.beam_search(few, beams)):
            with pytest.raises(InvalidRequestError) as caught:
                batch([PROMPT] * 5 + [prompt] + [PROMPT] * 5)
            part = ".prompt_token_ids" if field == "prompt_token_ids" else ""
            assert caught.value.field == f"prompts[5]{part}", "which of the eleven"
        with pytest.raises(InvalidRequestError):
            tiny.stream(prompt, params())


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"sampling_params": [params()] * 3}, "sampling_params"),
        ({"sampling_params": [params(), None]}, "sampling_params[1]"),
        ({"sampling_params": {"temperature": 0}}, "sampling_params"),
        ({"sampling_params": "ab"}, "sampling_params"),
        ({"priority": 1}, "priority"),
        ({"priority": [0, 1]}, "priority"),
        ({"priority": "0"}, "priority"),
        ({"priority": True}, "priority"),
        ({"sampling_params": params(stop_token_ids=[10**8])}, "stop_token_ids"),
        ({"sampling_params": params(allowed_token_ids=[10**8])}, "allowed_token_ids"),
        ({"sampling_params": params(logit_bias={10**8: 1.0})}, "logit_bias"),
        ({"sampling_params": params(logprobs=21)}, "logprobs"),
        ({"sampling_params": params(prompt_logprobs=21)}, "prompt_logprobs"),
        ({"sampling_params": params(min_tokens=4090, max_tokens=None)}, "min_tokens"),
        ({"sampling_params": params(stop=["\udcff"])}, "stop"),
        ({"sampling_params": params(bad_words=["\udcff"])}, "bad_words"),
        ({"sampling_params": [params(), params(stop_token_ids=[10**8])]}, "sampling_params[1].stop_token_ids"),
        ({"sampling_params": [params(), params(min_tokens=4090, max_tokens=None)]}, "sampling_params[1].min_tokens"),
        ({"sampling_params": [params(), params(logprobs=21)]}, "sampling_params[1].logprobs"),
    ],
)
def test_bad_parameters_are_refused(tiny: LLM, given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tiny.generate([PROMPT, PROMPT], **given)
    assert caught.value.field == field


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, "1", None, True])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_numbers_that_are_none(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"max_modellen": 5}, ConfigError),
        ({"max_model_len": 10**6}, ConfigError),
        ({"max_model_len": 1}, ConfigError),
        ({"max_num_seqs": 0}, ConfigError),
        ({"max_num_seqs": True}, ConfigError),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 4}, ConfigError),
        ({"max_num_batched_tokens": 10**400}, ConfigError),
        ({"max_num_batched_tokens": 2**31 - 1}, OutOfMemoryError),
        ({"kv_cache_memory_bytes": 1000}, OutOfMemoryError),
        ({"kv_cache_memory_bytes": 2**62}, OutOfMemoryError),
        ({"kv_cache_memory_bytes": 10**400}, ConfigError),
        ({"block_size": 17}, ConfigError),
        ({"backend": "abacus"}, ConfigError),
        ({"seed": -1}, ConfigError),
    ],
)
def test_bad_settings_are_refused(tiny_llama_dir: Path, config: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        LLM(str(tiny_llama_dir), **config)
    assert next(iter(config)) in str(caught.value) or error is OutOfMemoryError


def test_environment_sets_what_keywords_do_not(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_MODEL", str(tiny_llama_dir))
    monkeypatch.setenv("OCTAVO_MAX_MODEL_LEN", "100")
    with LLM() as llm:
        assert llm.max_model_len == 100
    with LLM(max_model_len=50) as llm:
        assert llm.max_model_len == 50
    monkeypatch.setenv("OCTAVO_MAX_MODEL_LEN", "many")
    with pytest.raises(ConfigError, match="OCTAVO_MAX_MODEL_LEN: must be an integer, not 'many'"):
        LLM()


# --- threads and life ---


def test_threads_share_a_batch(tiny: LLM) -> None:
    """Guards outputs given to the wrong caller, or lost."""
    seeds = list(range(24))
    expected = {seed: token_ids(tiny.generate(PROMPT, params(seed=seed))[0]) for seed in seeds}
    steps = tiny._engine.num_steps
    got: dict[int, list[list[int]]] = {}
    start = threading.Barrier(4)

    def work(mine: list[int]) -> None:
        start.wait()
        for output in tiny.generate([PROMPT] * len(mine), [params(seed=seed) for seed in mine]):
            assert output.seed is not None
            got[output.seed] = token_ids(output)

    threads = [threading.Thread(target=work, args=(seeds[n::4],)) for n in range(4)]
    with held(tiny._engine, lambda: tiny._engine.num_requests == len(seeds)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == expected
    assert tiny._engine.num_steps - steps < 12 * len(seeds) / 2, "requests of different threads ran together"


def test_a_bad_prompt_of_one_thread_does_not_disturb_another(tiny: LLM) -> None:
    expected = token_ids(tiny.generate(PROMPT, params(max_tokens=100))[0])
    stream = tiny.stream(PROMPT, params(max_tokens=100))
    last = None
    for output in stream:
        last = output
        if len(output.outputs[0].token_ids) % 10 == 0:
            with pytest.raises(InvalidRequestError):
                tiny.generate([PROMPT, ""], params())
    assert last is not None and token_ids(last) == expected


def test_an_interrupt_in_generate_leaves_nothing(tiny: LLM) -> None:
    """Guards requests that run on after Ctrl-C, and an engine that is broken into in the middle of a step."""
    finished = len(tiny._engine.events.of(EventKind.FINISHED))
    with interrupt_at_step(tiny, 3), pytest.raises(KeyboardInterrupt):
        tiny.generate([PROMPT] * 3, LONG)
    check_idle(tiny)
    ended = list(tiny._engine.events.of(EventKind.FINISHED))[finished:]
    assert [event.reason for event in ended] == [Reason.ABORT] * 3
    assert token_ids(tiny.generate(PROMPT, params())[0]) == token_ids(tiny.generate(PROMPT, params())[0])


def test_packing_that_fails_leaves_nothing(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an engine whose threads and memory outlive the error: the weights are packed while it is wired."""

    def refused(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(FileWeights, "finish", refused)
    before = set(threading.enumerate())
    with pytest.raises(OutOfMemoryError, match="refused memory"):
        LLM(str(tiny_llama_dir), max_model_len=64, kv_offload_dir=str(tmp_path / "kv"))
    assert set(threading.enumerate()) <= before


@contextmanager
def interrupt_at_step(llm: LLM, number: int) -> Iterator[None]:
    """Ctrl-C, which comes to the main thread while the engine is in a step; the step ends when it has come."""
    step, calls, came = llm._engine.step, iter(range(1000)), threading.Event()

    def interrupted() -> list[RequestOutput]:
        if next(calls) == number:
            # Again if need be: one that comes just before the main thread goes to sleep wakes it only later, when there
            # is output, and here there is none before it has come.
            for _ in range(20):
                os.kill(os.getpid(), signal.SIGINT)
                if came.wait(1):
                    break
            assert came.is_set()
        return step()

    def handler(*_: object) -> None:
        came.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    llm._engine.step = interrupted  # type: ignore[method-assign]
    try:
        yield
        assert came.is_set()
    finally:
        signal.signal(signal.SIGINT, before)
        del llm._engine.step  # the method of the class shows again


def test_the_engine_cannot_wait_for_itself(tiny: LLM) -> None:
    """A finalizer of the user's may run in any thread: in the engine's own it must not wait for the engine for ever."""
    for call in (lambda: tiny.generate(PROMPT, params()), tiny.reset_prefix_cache):
        with pytest.raises(RuntimeError, match="the engine's own thread cannot wait"):
            tiny._loop.ask(lambda engine, call=call: call()).result()  # type: ignore[misc]


def test_a_forgotten_llm_ends_its_thread(tiny_llama_dir: Path) -> None:
    """Guards a leak of thread and model when nobody calls close()."""
    llm = LLM(str(tiny_llama_dir))
    llm.generate(PROMPT, params())
    thread = llm._loop.thread
    assert thread is not None and thread.is_alive()
    del llm
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_close_ends_everything(tiny_llama_dir: Path) -> None:
    llm = LLM(str(tiny_llama_dir))
    started, unstarted = llm.stream(PROMPT, LONG), llm.stream(PROMPT, LONG)
    next(started)
    llm.close()
    llm.close()
    check_kv = llm._engine.kv
    assert check_kv.num_available == check_kv.num_blocks
    for stream in (started, unstarted):
        with pytest.raises(EngineClosedError):  # after what came before
            list(stream)
    with pytest.raises(EngineClosedError):
        llm.generate(PROMPT)
    with pytest.raises(EngineClosedError):
        llm.stream(PROMPT)


def test_close_tells_a_thread_that_waits(tiny_llama_dir: Path) -> None:
    """Guards a caller who waits for ever, or takes half an answer for a whole one."""
    llm = LLM(str(tiny_llama_dir))
    caught: list[Exception] = []

    def work() -> None:
        try:
            llm.generate(PROMPT, params(max_tokens=4000))
        except EngineClosedError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while llm._engine.num_steps < 5:
        pass
    llm.close()
    thread.join(60)
    assert len(caught) == 1


def test_a_request_that_fails_in_the_engine_says_so(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One output has finish_reason "error" and the reason; its neighbours in the batch are as they would be."""
    expected = token_ids(tiny.generate(PROMPT, params())[0])
    runner = tiny._engine._executor._runner  # type: ignore[attr-defined]
    sample = runner._ops.sample

    def failing(logits: Any, requests: Any) -> Any:
        if any(request.want.draws[0].seed == 666 and request.position > 10 for request in requests):
            raise ArithmeticError("bad row")
        return sample(logits, requests)

    monkeypatch.setattr(runner._ops, "sample", failing)
    good, bad, fine = tiny.generate([PROMPT] * 3, [params(), params(seed=666), params()])
    assert token_ids(good) == token_ids(fine) == expected
    assert bad.outputs[0].finish_reason == "error" and bad.error == "ArithmeticError: bad row"
