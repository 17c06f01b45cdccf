"""Cold, warm, after eviction, restored from files, after a restart: a request answers the same, to the last bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo import LLM, RequestOutput, SamplingParams
from octavo.core.events import EventKind, Reason
from octavo.runner import block_files
from tests.invariance.harness import Request, prompt, run

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3, detokenize=False)
SAMPLED = SamplingParams(temperature=1, seed=3, max_tokens=12, ignore_eos=True, logprobs=3, detokenize=False, n=2)


@pytest.fixture(scope="module")
def cold(tiny_gemma3_dir: Path) -> Iterator[LLM]:
    """No request sees what another computed."""
    with LLM(str(tiny_gemma3_dir), backend="cpu", threads=2, max_model_len=512, enable_prefix_caching=False) as llm:
        yield llm


def requests(vocab_size: int) -> list[Request]:
    """Three documents, each with two questions; lengths on and off the edges of blocks."""
    found = []
    for seed, length in enumerate((160, 75, 233)):
        document = prompt(length, vocab_size, seed)
        found += [(document, GREEDY), (document + prompt(19, vocab_size, 50 + seed), SAMPLED)]
    return found


def bits(outputs: list[RequestOutput]) -> list[list[tuple[list[int], object, object]]]:
    return [[(o.token_ids, o.logprobs, o.cumulative_logprob) for o in output.outputs] for output in outputs]


def open_llm(folder: Path, tokens: int, **settings: object) -> LLM:
    """Room for so many tokens."""
    with LLM(str(folder), backend="cpu", threads=1, max_model_len=16) as probe:
        block_bytes = probe.memory_plan.block_bytes
    return LLM(
        str(folder), backend="cpu", threads=2, max_model_len=288, kv_cache_memory_bytes=tokens // 16 * block_bytes,
        **settings,
    )  # fmt: skip


def test_cold_warm_and_after_eviction(cold: LLM, tiny_gemma3_dir: Path) -> None:
    asked = requests(cold.model_config.vocab_size)
    expected = [bits(run(cold, [request])) for request in asked]
    assert cold.cache_stats.hit_tokens == 0
    with open_llm(tiny_gemma3_dir, 320) as llm:
        for _ in range(2):  # the second time some of it is still there and some has been evicted
            for request, known in zip(asked, expected, strict=True):
                assert bits(run(llm, [request])) == known
        (again,) = run(llm, [asked[-1]])  # right after itself: all but the last token
        assert bits([again]) == expected[-1] and again.num_cached_tokens == len(asked[-1][0]) - 1
        stats = llm.cache_stats
        assert stats.hit_tokens > 500 and stats.evicted_blocks > 50 and stats.copied_blocks > 0
        evicted = llm._engine.events.of(EventKind.CACHE_EVICTED)
        assert {event.reason for event in evicted} == {Reason.CAPACITY} and len(evicted) == stats.evicted_blocks


@pytest.fixture
def _files_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model so small may be computed faster than read; which it is must not decide what these tests see."""
    monkeypatch.setattr(block_files, "loading_is_slower", lambda *_: False)


@pytest.mark.usefixtures("_files_are_read")
def test_restored_from_files_and_after_a_restart(cold: LLM, tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    asked = requests(cold.model_config.vocab_size)
    expected = [bits(run(cold, [request])) for request in asked]
    for restart in range(3):
        with open_llm(tiny_gemma3_dir, 320, kv_offload_dir=tmp_path / "kv") as llm:
            for _ in range(2):
                for request, known in zip(asked, expected, strict=True):
                    assert bits(run(llm, [request])) == known
                    llm._engine.kv.prefixes.tier.flush()
            loaded = llm.cache_stats.loaded_blocks
        assert loaded > 10, f"start {restart}"
    with open_llm(tiny_gemma3_dir, 640, kv_offload_dir=tmp_path / "kv", kv_cache_dtype="float16") as llm:
        run(llm, asked[:1])
        assert llm.cache_stats.loaded_blocks == 0, "of other settings"


@pytest.mark.usefixtures("_files_are_read")
def test_many_at_once_with_files(cold: LLM, tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    """Loads, copies, preemptions and evictions in the same steps."""
    asked = requests(cold.model_config.vocab_size) * 2
    expected = [bits(run(cold, [request])) for request in asked]
    with open_llm(tiny_gemma3_dir, 400, kv_offload_dir=tmp_path) as llm:
        for _ in range(4):
            outputs = run(llm, asked)
            assert [bits([output]) for output in outputs] == expected
            llm._engine.kv.prefixes.tier.flush()
        assert llm.cache_stats.loaded_blocks > 0 and llm.cache_stats.copied_blocks > 0
        assert llm._engine.events.of(EventKind.PREEMPTED)


def test_identical_prompts_at_once_are_computed_once(cold: LLM, tiny_gemma3_dir: Path) -> None:
    vocab_size = cold.model_config.vocab_size
    document = prompt(160, vocab_size, 9)
    asked = [(document + prompt(5, vocab_size, i), GREEDY) for i in range(6)]
    expected = [bits(run(cold, [request])) for request in asked]
    with LLM(str(tiny_gemma3_dir), backend="cpu", threads=2, max_model_len=288) as llm:
        outputs = run(llm, asked)
        assert [bits([output]) for output in outputs] == expected
        assert [output.num_cached_tokens for output in outputs] == [0] + [160] * 5
        waits = [e for e in llm._engine.events.of(EventKind.WAITING) if e.reason is Reason.SHARED_PREFIX]
        assert len(waits) == 5


def test_salts_skipping_and_resetting(cold: LLM, tiny_gemma3_dir: Path) -> None:
    """Salts share nothing, a request can refuse to read, prompt_logprobs are always computed, a reset forgets."""
    token_ids = prompt(100, cold.model_config.vocab_size, 1)
    with LLM(str(tiny_gemma3_dir), backend="cpu", max_model_len=288) as llm:

        def cached(params: SamplingParams = GREEDY, **extra: str) -> int:
            (output,) = llm.generate({"prompt_token_ids": token_ids, **extra}, params, use_tqdm=False)
            return output.num_cached_tokens

        assert [cached(), cached()] == [0, 96]
        assert [cached(cache_salt="a"), cached(cache_salt="a"), cached(cache_salt="b"), cached()] == [0, 96, 0, 96]
        assert cached(GREEDY.but(skip_reading_prefix_cache=True)) == 0
        assert cached(GREEDY.but(prompt_logprobs=1)) == 0
        assert llm.reset_prefix_cache() > 6 and cached() == 0
        assert cached(GREEDY.but(prompt_logprobs=1), cache_salt="c") == 0
        assert cached(cache_salt="c") == 96, "what reads nothing still leaves its own"


def test_explanations_of_what_fills_no_block(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    """Guards against a difference behind the last whole block that is not told, and a request said not to have been."""
    with open_llm(tiny_gemma3_dir, 320) as llm:
        vocab_size = llm.model_config.vocab_size
        token_ids = prompt(40, vocab_size, 1)
        (first,) = llm.generate({"prompt_token_ids": token_ids[:31]}, GREEDY.but(max_tokens=1), use_tqdm=False)
        for at, length in ((20, 21), (20, 32), (20, 40), (3, 5), (3, 16)):
            other = token_ids[:length]
            other[at] = (other[at] + 1) % vocab_size
            told = llm.explain_cache({"prompt_token_ids": other})
            assert (told.first_difference, told.token_id, told.earlier_token_id) == (at, other[at], token_ids[at])
            cached = at if at < 16 else 16  # its last block was not full
            assert (told.num_cached_tokens, told.earlier_request_id) == (cached, first.request_id)
        ends = 31 + len(first.outputs[0].token_ids)
        whole = [*token_ids[:31], *first.outputs[0].token_ids]
        told = llm.explain_cache({"prompt_token_ids": whole[:20]})
        assert told.reason == "All full blocks are cached; the last 4 tokens do not fill one."
        told = llm.explain_cache({"prompt_token_ids": [*whole, *token_ids[:9]]})
        assert told.num_cached_tokens == 16 and f"past position {ends}; {first.request_id} ended there" in told.reason
        told = llm.explain_cache({"prompt_token_ids": token_ids[:5]})
        assert told.reason.startswith("Everything is cached") and told.num_cached_tokens == 4
        told = llm.explain_cache({"prompt_token_ids": whole[16:21]})
        assert told.num_cached_tokens == 0 and told.first_difference is not None
        assert llm.explain_cache({"prompt_token_ids": token_ids[:31], "cache_salt": "x"}).first_difference is None


@pytest.mark.usefixtures("_files_are_read")
def test_explanations_know_what_is_in_files(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    with open_llm(tiny_gemma3_dir, 320, kv_offload_dir=tmp_path / "kv") as llm:
        vocab_size = llm.model_config.vocab_size
        llm._engine.kv.prefixes.tier._timer = lambda: 0.0  # loading is never slower than computing
        asked = {"prompt_token_ids": prompt(100, vocab_size, 1)}
        llm.generate(asked, GREEDY, use_tqdm=False)
        assert llm.explain_cache(asked).num_kept_tokens == 0
        llm.generate({"prompt_token_ids": prompt(280, vocab_size, 2)}, GREEDY.but(max_tokens=2), use_tqdm=False)
        llm._engine.kv.prefixes.tier.flush()
        told = llm.explain_cache(asked)
        assert told.num_cached_tokens + told.num_kept_tokens == 96 and told.num_kept_tokens >= 16
        assert told.evicted_reason is None, "what is kept is not gone"
        (output,) = llm.generate(asked, GREEDY, use_tqdm=False)
        assert output.num_cached_tokens == 96


def test_a_reset_forgets_the_files_and_a_clean_close_keeps_them(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    """Whatever was in memory alone when the engine was closed is there after a restart, with the same bits; what was
    reset is nowhere."""
    settings: dict[str, object] = {"kv_offload_dir": str(tmp_path / "kv")}
    with open_llm(tiny_gemma3_dir, 320) as cold:
        token_ids = prompt(200, cold.model_config.vocab_size, 1)
        expected = bits(run(cold, [(token_ids, GREEDY)]))
    with open_llm(tiny_gemma3_dir, 320, **settings) as llm:
        run(llm, [(token_ids, GREEDY)])
        run(llm, [(prompt(280, llm.model_config.vocab_size, 2), GREEDY)])
        llm._engine.kv.prefixes.tier.flush()
        assert list((tmp_path / "kv").glob("*.kv"))
        llm.reset_prefix_cache()
        assert run(llm, [(token_ids, GREEDY)])[0].num_cached_tokens == 0
    kept = len(list((tmp_path / "kv").glob("*.kv")))
    assert kept == (200 + 12 - 1) // 16, "the last token drawn was not computed"
    with open_llm(tiny_gemma3_dir, 320, **settings) as llm:
        llm._engine.kv.prefixes.tier._timer = lambda: 0.0
        (output,) = outputs = run(llm, [(token_ids, GREEDY)])
        assert output.num_cached_tokens == 192 and bits(outputs) == expected
        llm.reset_prefix_cache()
    assert not list((tmp_path / "kv").glob("*.kv"))


def test_closing_frees_the_memory_with_a_tier_too(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    llm = open_llm(tiny_gemma3_dir, 320, kv_offload_dir=str(tmp_path / "kv"))
    run(llm, [(prompt(200, llm.model_config.vocab_size, 1), GREEDY)])
    runner = weakref.ref(llm._engine._executor._runner)
    assert runner() is not None
    llm.close()
    gc.collect()
    assert runner() is None


def test_explanations(tiny_gemma3_dir: Path) -> None:
    with open_llm(tiny_gemma3_dir, 320) as llm:
        vocab_size = llm.model_config.vocab_size
        token_ids = prompt(100, vocab_size, 1)
        asked = {"prompt_token_ids": token_ids}
        assert llm.explain_cache(asked).num_cached_tokens == 0
        (first,) = llm.generate(asked, GREEDY, use_tqdm=False)
        told = llm.explain_cache(asked)
        assert told.num_cached_tokens == 96 and told.earlier_request_id == first.request_id
        other = [*token_ids[:50], (token_ids[50] + 1) % vocab_size, *token_ids[51:]]
        told = llm.explain_cache({"prompt_token_ids": other})
        assert (told.num_cached_tokens, told.first_difference) == (50, 50)
        assert (told.token_id, told.earlier_token_id) == (other[50], token_ids[50])
        assert told.earlier_request_id == first.request_id and str(other[50]) in told.reason
        llm.generate({"prompt_token_ids": prompt(280, vocab_size, 2)}, GREEDY.but(max_tokens=2), use_tqdm=False)
        told = llm.explain_cache(asked)
        assert told.num_cached_tokens < 96 and told.evicted_reason == "capacity"
        assert told.evicted_seconds_ago is not None and told.evicted_seconds_ago >= 0
        assert told.earlier_request_id == first.request_id
        llm.reset_prefix_cache()
        assert llm.explain_cache(asked).evicted_reason in ("reset", "capacity")
