"""Requests through LLM(backend="cpu"), compared to the last bit, and settings taken pairwise."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo import LLM, RequestOutput, SamplingParams
from octavo.core.outputs import CompletionOutput
from tests.invariance.harness import Counts, Request, mixed_requests, prompt, run, run_alone
from tests.models.tiny import make

# What may not change an answer. Memory "scarce" is room for one sequence and little more: others are preempted.
AXES: dict[str, tuple[Any, ...]] = {
    "threads": (1, 2, 3),
    "block_size": (16, 32, 64),
    "chunk": (None, 5, 24),  # most tokens of one sequence in a step
    "extra_tokens": (8, 500),  # in a step, besides those that decode
    "memory": ("ample", "scarce"),
    "backwards": (False, True),  # the order in which requests arrive
    "caching": (True, False),  # all requests twice: cold, and warm if they may use what was computed before
    "cascade": (True, False),  # whether rows that share blocks read them together
}


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few combinations in which every two values of different axes meet."""
    product = list(full_product(axes))
    missing = {pair for combination in product for pair in _pairs(combination)}
    chosen = []
    while missing:
        best = max(product, key=lambda combination: len(missing & _pairs(combination)))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def full_product(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _pairs(combination: Mapping[str, Any]) -> set[tuple[str, str]]:
    return set(itertools.combinations((f"{axis}={value}" for axis, value in combination.items()), 2))


def label(combination: Mapping[str, Any]) -> str:
    return " ".join(f"{axis}={value}" for axis, value in combination.items())


# --- models and requests ---


def awkward_llama(folder: Path, tokenizer_from: Path, variant: str = "llama-tied", **settings: Any) -> Path:
    """A random Llama none of whose sizes a vector or a group of 32 divides, but for head_dim; three KV heads. Or a
    model of another family that has them."""
    import json

    sizes = {
        "vocab_size": json.loads((tokenizer_from / "config.json").read_text())["vocab_size"],
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 48,
        "max_position_embeddings": 1024,
    }
    make(folder, variant, settings=sizes | settings)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, folder / name)
    return folder


def requests_for(vocab_size: int, long_prompt: int, max_tokens: int) -> list[Request]:
    """Those of the invariance tests, a prompt of several tiles of keys, so that threads share a row's attention, and
    one that begins like it, so that two requests share tiles."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=4, detokenize=False)
    long = prompt(long_prompt, vocab_size, seed=77)
    similar = long[: long_prompt // 2] + prompt(9, vocab_size, seed=78)
    return [*mixed_requests(vocab_size, max_tokens), (long, params), (similar, params)]


# --- running and comparing ---


def open_llm(path: Path, max_model_len: int, combination: Mapping[str, Any], **settings: Any) -> LLM:
    size = combination["block_size"]
    if combination["memory"] == "scarce":
        with LLM(str(path), backend="cpu", threads=1, max_model_len=16, block_size=size, **settings) as probe:
            block_bytes = probe.memory_plan.block_bytes
        settings["kv_cache_memory_bytes"] = block_bytes * (-(-max_model_len // size) + 1)
    return LLM(
        str(path),
        backend="cpu",
        threads=combination["threads"],
        max_model_len=max_model_len,
        block_size=size,
        long_prefill_token_threshold=combination["chunk"],
        max_num_seqs=12,
        max_num_batched_tokens=12 + combination["extra_tokens"],
        enable_prefix_caching=combination.get("caching", True),
        cascade_attention=combination.get("cascade", True),
        **settings,
    )


def run_combination(
    path: Path,
    max_model_len: int,
    requests: Sequence[Request],
    expected: Sequence[RequestOutput],
    combination: Mapping[str, Any],
    counts: Counts,
    **settings: Any,
) -> None:
    """All requests at once under these settings; every answer must be what it was alone."""
    order = list(range(len(requests)))
    if combination["backwards"]:
        order.reverse()
    mine = Counts()
    with open_llm(path, max_model_len, combination, **settings) as llm:
        for temperature in ("cold", "warm"):
            outputs = run(llm, [requests[i] for i in order], mine)
            for i, output in zip(order, outputs, strict=True):
                same_bits(output, expected[i], f"{label(combination)}: request {i}, {temperature}")
            if temperature == "warm" and combination.get("caching", True) and combination["memory"] == "ample":
                assert max(output.num_cached_tokens for output in outputs) > 100
        mine.shared_tiles += llm._engine._executor._runner._ops.machine.shared_tiles
    assert mine.mixed > 0 and mine.copies > 0
    assert mine.shared_tiles == 0 or combination.get("cascade", True)
    assert mine.chunks > 0 or (combination["chunk"] is None and combination["extra_tokens"] == 500)
    assert mine.preemptions == 0 or combination["memory"] == "scarce"
    for name in (
        "chunks",
        "mixed",
        "beside",
        "shared",
        "copies",
        "preemptions",
        "hits",
        "cache_evictions",
        "shared_tiles",
    ):
        setattr(counts, name, getattr(counts, name) + getattr(mine, name))


def alone(path: Path, max_model_len: int, requests: Sequence[Request], **settings: Any) -> list[RequestOutput]:
    """Each request by itself, on one thread, in a roomy engine that takes prompts whole."""
    with LLM(str(path), backend="cpu", max_model_len=max_model_len, **({"threads": 1} | settings)) as llm:
        outputs = run_alone(llm, requests)
    answers = [output.outputs[0].token_ids for output in outputs]
    assert len({tuple(token_ids) for token_ids in answers}) == len(answers), (
        "requests that all answer alike show nothing"
    )
    return outputs


def same_bits(got: RequestOutput, expected: RequestOutput, note: str) -> None:
    assert len(got.outputs) == len(expected.outputs), note
    for ours, theirs in zip(got.outputs, expected.outputs, strict=True):
        same_output_bits(ours, theirs, note)
    assert got.prompt_logprobs == expected.prompt_logprobs, note


def same_output_bits(got: CompletionOutput, expected: CompletionOutput, note: str) -> None:
    """Tokens, and log-probabilities as floats: == is equality of bits, but for zeros."""
    assert list(got.token_ids) == list(expected.token_ids), note
    assert got.logprobs is not None and got.logprobs == expected.logprobs, note
    assert got.cumulative_logprob == expected.cumulative_logprob, note
    assert got.finish_reason == expected.finish_reason, note
