"""What a request answers depends on the request alone: tiny models, every way of running that the engine has."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo import LLM, RequestOutput, SamplingParams
from tests.backends.cpu.engine import awkward_llama
from tests.invariance.harness import (
    Counts,
    Request,
    mixed_requests,
    prompt,
    run,
    run_alone,
    run_stream,
    same,
    same_output,
)

MAX_MODEL_LEN = 96


@pytest.fixture(scope="module", params=["llama", "gemma3", pytest.param("qwen2", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3's has windows of 16 tokens on all layers but the last, Qwen 2's of 16 on the last."""
    if request.param == "qwen2":
        tokenizer_from = request.getfixturevalue("tiny_llama_dir")
        window = {"sliding_window": 16, "max_window_layers": 1}
        return awkward_llama(tmp_path_factory.mktemp("qwen2"), tokenizer_from, "qwen2-window", **window)
    return request.getfixturevalue(f"tiny_{request.param}_dir")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[LLM]:
    """Room for everything: no chunk, no preemption."""
    with LLM(str(folder), backend="reference", max_model_len=MAX_MODEL_LEN) as llm:
        yield llm


@pytest.fixture(scope="module")
def requests(plain: LLM) -> list[Request]:
    return mixed_requests(plain.model_config.vocab_size)


@pytest.fixture(scope="module")
def alone(plain: LLM, requests: list[Request]) -> list[RequestOutput]:
    outputs = run_alone(plain, requests)
    sampled = [output.outputs[0].token_ids for output in outputs]
    assert len({tuple(token_ids) for token_ids in sampled}) == len(sampled)
    return outputs


def check(llm: LLM, requests: list[Request], alone: list[RequestOutput], counts: Counts) -> None:
    for got, expected in zip(run(llm, requests, counts), alone, strict=True):
        same(got, expected, counts)
    assert not counts.excused


def blocks(llm: LLM, tokens: int) -> int:
    """Bytes of KV for so many tokens."""
    return tokens // llm.config.block_size * llm.memory_plan.block_bytes


def test_alone_is_repeatable(plain: LLM, requests: list[Request], alone: list[RequestOutput]) -> None:
    """Guards against state that one request leaves for the next."""
    for got, expected in zip(run_alone(plain, requests), alone, strict=True):
        same(got, expected, Counts())


def test_with_neighbours(plain: LLM, requests: list[Request], alone: list[RequestOutput]) -> None:
    counts = Counts()
    check(plain, requests, alone, counts)
    assert counts.mixed > 10 and counts.copies > 0 and counts.shared > 0


def test_any_split(folder: Path, requests: list[Request], alone: list[RequestOutput]) -> None:
    """Guards against answers that depend on token budgets, chunk lengths, block sizes, places or order of arrival."""
    total = Counts()

    @settings(max_examples=7, deadline=None)
    @given(
        block_size=st.sampled_from([1, 16, 32, 64]),
        max_num_seqs=st.integers(1, 9),
        extra_tokens=st.integers(0, 60),
        chunk=st.one_of(st.none(), st.integers(1, 40)),
        order=st.permutations(range(len(requests))),
    )
    def split(block_size: int, max_num_seqs: int, extra_tokens: int, chunk: int | None, order: list[int]) -> None:
        with LLM(
            str(folder),
            backend="reference",
            max_model_len=MAX_MODEL_LEN,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_tokens,
            long_prefill_token_threshold=chunk,
        ) as llm:
            check(llm, [requests[i] for i in order], [alone[i] for i in order], total)

    split()
    assert total.chunks > 50 and total.mixed > 50 and total.beside > 10 and total.copies > 0 and total.compared > 1000


@pytest.mark.parametrize(
    ("block_size", "chunk"),
    [(1, None), pytest.param(16, None, marks=pytest.mark.slow), (16, 5), pytest.param(32, 11, marks=pytest.mark.slow)],
)
def test_preemption(
    folder: Path, plain: LLM, requests: list[Request], alone: list[RequestOutput], block_size: int, chunk: int | None
) -> None:
    """Guards against KV that is not computed anew, or penalties and noise that forget, when blocks run out."""
    tokens = MAX_MODEL_LEN + 2 * block_size
    counts = Counts()
    with LLM(
        str(folder),
        backend="reference",
        max_model_len=MAX_MODEL_LEN,
        block_size=block_size,
        kv_cache_memory_bytes=blocks(plain, tokens - tokens % 16 + 16),
        long_prefill_token_threshold=chunk,
    ) as llm:
        check(llm, requests, alone, counts)
    assert counts.preemptions > 0
    assert chunk is None or counts.chunks > 0


@pytest.mark.parametrize(
    "length", [pytest.param(1, marks=pytest.mark.slow), 16, 17, pytest.param(31, marks=pytest.mark.slow)]
)
def test_forks(folder: Path, plain: LLM, length: int) -> None:
    """Each of n outputs is what its stream gives alone, while the others share its prompt's blocks. Guards against
    writing into a shared block, and noise that depends on n or on the order of outputs."""
    token_ids = prompt(length, plain.model_config.vocab_size, seed=length)
    params = SamplingParams(
        n=5, temperature=1.0, seed=99, max_tokens=20, ignore_eos=True, logprobs=2, frequency_penalty=0.3
    )
    expected = [run_stream(plain, (token_ids, params), index) for index in range(5)]
    counts = Counts()
    plain.reset_prefix_cache()
    (together,) = run(plain, [(token_ids, params)], counts)
    with LLM(
        str(folder), backend="reference", max_model_len=64, block_size=1, kv_cache_memory_bytes=blocks(plain, 64)
    ) as scarce:
        (restored,) = run(scarce, [(token_ids, params)])
    for output in (together, restored):
        for ours, theirs in zip(output.outputs, expected, strict=True):
            same_output(ours, theirs, counts)
    assert len({tuple(output.token_ids) for output in together.outputs}) == 5, "five streams, five answers"
    assert counts.shared > 0 or length < plain.config.block_size
    assert counts.copies == (4 if length % plain.config.block_size else 0)
    assert not counts.excused


def test_forks_under_preemption(folder: Path, plain: LLM) -> None:
    """Guards against forks that are restored from the wrong sibling, or whose streams get mixed up."""
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=30, ignore_eos=True, logprobs=2, detokenize=False)
    requests = [(prompt(length, plain.model_config.vocab_size, seed=length), params) for length in (21, 40, 9, 30)]
    counts = Counts()
    with LLM(
        str(folder), backend="reference", max_model_len=MAX_MODEL_LEN, kv_cache_memory_bytes=blocks(plain, 160)
    ) as llm:
        outputs = run(llm, requests, counts)
    for request, output in zip(requests, outputs, strict=True):
        for index, ours in enumerate(output.outputs):
            same_output(ours, run_stream(plain, request, index), counts)
    assert counts.preemptions > 0 and counts.shared > 0 and counts.copies > 0
    assert not counts.excused


def test_seeds(plain: LLM) -> None:
    """The same seed gives the same answer, another one another; without one, the seed that was drawn is reported."""

    @cache
    def answer(seed: int | None, **params: float) -> RequestOutput:
        given = SamplingParams(seed=seed, max_tokens=16, ignore_eos=True, detokenize=False, **params)
        (output,) = plain.generate({"prompt_token_ids": prompt(12, plain.model_config.vocab_size, seed=1)}, given)
        return output

    drawn = answer(None)
    assert drawn.seed is not None
    answers = {seed: answer(seed).outputs[0].token_ids for seed in (0, 1, 2**64 - 1, drawn.seed)}
    assert len({tuple(token_ids) for token_ids in answers.values()}) == 4
    assert answers[drawn.seed] == drawn.outputs[0].token_ids
    assert answer(0, temperature=0).outputs[0].token_ids == answer(1, temperature=0).outputs[0].token_ids
