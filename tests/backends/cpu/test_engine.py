"""What a request answers depends on the request alone, to the last bit: whole engines on random and on real models."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from octavo import _C, LLM, RequestOutput, SamplingParams
from tests.backends.cpu.engine import (
    AXES,
    alone,
    awkward_llama,
    full_product,
    pairwise,
    requests_for,
    run_combination,
    same_bits,
    same_output_bits,
)
from tests.invariance.harness import Counts, Request, prompt, run, run_stream

MAX_MODEL_LEN = 352
PAIRWISE = pairwise(AXES)
KV_DTYPES = ("int8", "float16", "float32")

Known = tuple[Path, list[Request], Callable[[str], list[RequestOutput]]]


def test_pairs_are_all_there() -> None:
    met = {(a, combination[a], b, combination[b]) for combination in PAIRWISE for a in AXES for b in AXES if a < b}
    assert met == {(a, x, b, y) for a in AXES for b in AXES if a < b for x in AXES[a] for y in AXES[b]}
    assert len(PAIRWISE) <= 15


@pytest.fixture(scope="module")
def tiny_cpu_llama_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return awkward_llama(tmp_path_factory.mktemp("awkward"), tiny_llama_dir)


@pytest.fixture(scope="module")
def tiny_cpu_qwen2_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases, and a window on the second layer."""
    window = {"sliding_window": 40, "max_window_layers": 1}
    return awkward_llama(tmp_path_factory.mktemp("qwen2"), tiny_llama_dir, "qwen2-window", **window)


@pytest.fixture(scope="module")
def tiny_cpu_qwen3_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return awkward_llama(tmp_path_factory.mktemp("qwen3"), tiny_llama_dir, "qwen3")


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen2", pytest.param("qwen3", marks=pytest.mark.slow)])
def known(request: pytest.FixtureRequest) -> Known:
    """A tiny model, requests, and what each answers alone, by KV type."""
    name = "tiny_gemma3_dir" if request.param == "gemma3" else f"tiny_cpu_{request.param}_dir"
    folder: Path = request.getfixturevalue(name)
    with LLM(str(folder), backend="cpu", threads=1, max_model_len=64) as llm:
        requests = requests_for(llm.model_config.vocab_size, long_prompt=310, max_tokens=20)
    return folder, requests, cache(lambda kv: alone(folder, MAX_MODEL_LEN, requests, kv_cache_dtype=kv))


@pytest.mark.parametrize(
    ("kv_dtype", "combinations"),
    [
        pytest.param("int8", PAIRWISE, id="int8"),
        pytest.param("float16", PAIRWISE[::3], id="float16, some"),
        *(pytest.param(t, PAIRWISE, id=t, marks=pytest.mark.slow) for t in KV_DTYPES[1:]),
    ],
)
def test_pairwise(known: Known, kv_dtype: str, combinations: list[dict[str, Any]]) -> None:
    check_combinations(known, kv_dtype, combinations)


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", KV_DTYPES[:2])
def test_full_product(known: Known, kv_dtype: str) -> None:
    check_combinations(known, kv_dtype, list(full_product(AXES)))


def check_combinations(known: Known, kv_dtype: str, combinations: list[dict[str, Any]]) -> None:
    folder, requests, expected = known
    counts = Counts()
    for combination in combinations:
        run_combination(
            folder, MAX_MODEL_LEN, requests, expected(kv_dtype), combination, counts, kv_cache_dtype=kv_dtype
        )
    assert min(counts.chunks, counts.mixed, counts.beside, counts.shared, counts.copies) > 2 * len(combinations)
    assert min(counts.preemptions, counts.cache_evictions) > len(combinations) // 2, counts
    assert min(counts.hits, 10 * counts.shared_tiles) > 100 * len(combinations)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "hidden"), [(2, 1, 64, 40), (4, 2, 96, 100), (3, 3, 128, 72), (8, 8, 256, 136)]
)
def test_awkward_shapes(
    tiny_llama_dir: Path, tmp_path: Path, heads: int, kv_heads: int, head_dim: int, hidden: int
) -> None:
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "hidden_size": hidden}
    folder = awkward_llama(tmp_path / "model", tiny_llama_dir, **shape)
    with LLM(str(folder), backend="cpu", threads=1, max_model_len=64) as llm:
        requests = requests_for(llm.model_config.vocab_size, long_prompt=200, max_tokens=8)
    expected = alone(folder, MAX_MODEL_LEN, requests)
    counts = Counts()
    for combination in PAIRWISE[1::4]:
        run_combination(folder, MAX_MODEL_LEN, requests, expected, combination, counts)
    assert min(counts.chunks, counts.mixed, counts.copies, counts.hits, counts.shared_tiles) > 0


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize("kv_dtype", KV_DTYPES[:2])
def test_instruction_sets(known: Known, kv_dtype: str, instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced by OCTAVO_INSTRUCTION_SET, each answers as the best one does."""
    folder, requests, expected = known
    monkeypatch.setenv("OCTAVO_INSTRUCTION_SET", instruction_set)
    for combination in PAIRWISE[:1]:
        given = {"kv_cache_dtype": kv_dtype}
        run_combination(folder, MAX_MODEL_LEN, requests, expected(kv_dtype), combination, Counts(), **given)


@pytest.mark.parametrize("length", [1, 16, 17, 63])
def test_forks(known: Known, length: int) -> None:
    """Each of n outputs is what its stream gives alone, while the others share its prompt's blocks."""
    folder, _, _ = known
    with LLM(str(folder), backend="cpu", threads=2, max_model_len=128) as llm:
        token_ids = prompt(length, llm.model_config.vocab_size, seed=length)
        params = SamplingParams(n=5, temperature=1.0, seed=99, max_tokens=20, ignore_eos=True, logprobs=2)
        expected = [run_stream(llm, (token_ids, params), index) for index in range(5)]
        counts = Counts()
        llm.reset_prefix_cache()
        (together,) = run(llm, [(token_ids, params)], counts)
    for index, (ours, theirs) in enumerate(zip(together.outputs, expected, strict=True)):
        same_output_bits(ours, theirs, f"output {index}")
    assert len({tuple(output.token_ids) for output in together.outputs}) == 5, "five streams, five answers"
    assert counts.shared > 0 or length < 16
    assert counts.copies == (4 if length % 16 else 0)


# --- quality and real models ---


def test_agrees_with_the_reference(known: Known) -> None:
    """The same model, float32 weights and KV: log-probabilities differ by rounding only."""
    folder, requests, expected = known
    with LLM(str(folder), backend="reference", max_model_len=MAX_MODEL_LEN) as llm:
        for request, ours in zip(requests, expected("float32"), strict=True):
            (theirs,) = run(llm, [request])
            first, other = ours.outputs[0].logprobs, theirs.outputs[0].logprobs
            assert first and other and first[0].keys() == other[0].keys()
            assert all(abs(first[0][token].logprob - other[0][token].logprob) < 1e-4 for token in first[0])


@pytest.mark.parametrize(
    ("fixture", "text", "answer"),
    [
        ("smollm2_path", "The capital of France is", " Paris"),
        ("smollm2_path", "The opposite of hot is", " cold"),
        ("gemma3_path", "The opposite of hot is", " cold"),
        ("gemma3_path", "1, 2, 3, 4, 5, 6,", " 7"),
    ],
)
def test_first_tokens(request: pytest.FixtureRequest, fixture: str, text: str, answer: str) -> None:
    with LLM(str(request.getfixturevalue(fixture)), backend="cpu", max_model_len=64) as llm:
        (output,) = llm.generate([text], SamplingParams(max_tokens=2, temperature=0), use_tqdm=False)
    assert output.outputs[0].text.startswith(answer)


@pytest.mark.parametrize(
    ("fixture", "settings"),
    [
        ("smollm2_path", {}),
        pytest.param("smollm2_path", {"kv_cache_dtype": "float16"}, marks=pytest.mark.slow),
        pytest.param("smollm2_path", {"compute_dtype": "float32", "kv_cache_dtype": "float32"}, marks=pytest.mark.slow),
        pytest.param("gemma3_path", {}, marks=pytest.mark.slow),
    ],
)
def test_real_models(request: pytest.FixtureRequest, fixture: str, settings: dict[str, Any]) -> None:
    """Guards against what shows with real weights and quantised ones only."""
    path: Path = request.getfixturevalue(fixture)
    with LLM(str(path), backend="cpu", threads=1, max_model_len=64) as llm:
        several = requests_for(llm.model_config.vocab_size, long_prompt=300, max_tokens=24)
    requests = [several[i] for i in (2, 4, 6)]
    expected = alone(path, 80, requests, **settings)
    # Six blocks of 16: the first two requests fit until both have grown, then one of them has to go.
    combination = {"threads": 2, "block_size": 16, "chunk": None, "extra_tokens": 20, "backwards": False}
    counts = Counts()
    run_combination(path, 80, requests, expected, combination | {"memory": "scarce"}, counts, **settings)
    assert counts.preemptions > 0 and counts.beside > 0 and counts.shared > 0


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["smollm2_path", "gemma3_path"])
def test_real_models_pairwise(request: pytest.FixtureRequest, fixture: str) -> None:
    path: Path = request.getfixturevalue(fixture)
    with LLM(str(path), backend="cpu", threads=1, max_model_len=64) as llm:
        requests = requests_for(llm.model_config.vocab_size, long_prompt=310, max_tokens=8)
    expected = alone(path, MAX_MODEL_LEN, requests)
    counts = Counts()
    for combination in PAIRWISE:
        run_combination(path, MAX_MODEL_LEN, requests, expected, combination, counts)
    assert min(counts.chunks, counts.mixed, counts.beside, counts.shared, counts.copies) > 0, counts
    assert min(counts.preemptions, counts.cache_evictions, counts.hits, counts.shared_tiles) > 0, counts


@pytest.mark.slow  # kernels and tiny models give the same bits with each; formats are those of test_linear
@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
def test_instruction_sets_on_a_real_model(
    smollm2_path: Path, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=3, temperature=0, logprobs=5, detokenize=False)
    requests = [(prompt(20, 49152, seed=3), params)]
    expected = alone(smollm2_path, 64, requests)
    monkeypatch.setenv("OCTAVO_INSTRUCTION_SET", instruction_set)
    (got,) = alone(smollm2_path, 64, requests, threads=2)
    same_bits(got, expected[0], instruction_set)


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["smollm2_path", "gemma3_path"])
def test_perplexity(request: pytest.FixtureRequest, fixture: str) -> None:
    """On 20 windows of 1,024 tokens of Python's own documentation, the second half of each scored: within 0.5 % of
    float32, whatever the type of KV."""
    path: Path = request.getfixturevalue(fixture)
    exact = log_likelihood(path, backend="reference")
    for kv_dtype in KV_DTYPES:
        ratio = math.exp(exact - log_likelihood(path, backend="cpu", kv_cache_dtype=kv_dtype))
        print(f"{fixture}, {kv_dtype} KV: perplexity {math.exp(-exact):.3f} {ratio - 1:+.3%}")
        assert ratio < 1.005


def log_likelihood(path: Path, **settings: Any) -> float:
    """Mean over the scored tokens."""
    from pydoc_data.topics import topics

    scored = []
    with LLM(str(path), max_model_len=1025, **settings) as llm:
        token_ids = llm.tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)))
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        for first in range(0, 20 * 1024, 1024):
            window = token_ids[first : first + 1024]
            (output,) = llm.generate([{"prompt_token_ids": window}], params, use_tqdm=False)
            rows = list(zip(output.prompt_logprobs or (), window, strict=True))[512:]
            scored += [row[token].logprob for row, token in rows if row is not None]
    assert len(scored) == 20 * 512
    return sum(scored) / len(scored)
