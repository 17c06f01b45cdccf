"""With tokens guessed and without, by every proposer: the same tokens, texts and log-probabilities, bit for bit."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, InvalidRequestError, RequestOutput, SamplingParams
from octavo.core.beam_params import BeamSearchParams
from octavo.core.events import EventKind
from octavo.core.plan import StepPlan
from tests.heads import save_random_head
from tests.invariance.test_drafts import bits

SETTINGS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 48, "max_model_len": 160}
CONFIGS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1, "adaptive": False},
    "ngram adaptive": {"method": "ngram"},
    "suffix chains": {"method": "suffix", "max_branches": 1, "adaptive": False},
    "suffix trees": {"method": "suffix", "suffix_decoding_min_token_prob": 0.05, "adaptive": False},
    "suffix of past outputs": {
        "method": "suffix",
        "suffix_decoding_max_cached_requests": 50,
        "num_speculative_tokens": 4,
        "adaptive": False,
    },
    "suffix adaptive": {"method": "suffix", "suffix_decoding_max_cached_requests": 50},
    "draft model": {"method": "draft_model", "num_speculative_tokens": 3, "adaptive": False},
    "draft model adaptive": {"method": "draft_model"},
    "draft head": {"method": "draft_head", "num_speculative_tokens": 3, "adaptive": False},
    "draft head adaptive": {"method": "draft_head"},
}
REQUESTS = 180  # for each of them
KINDS = ("greedy", "0.7", "1.2", "top_p", "penalties")


def configuration(rng: random.Random) -> tuple[str, list[int], SamplingParams]:
    """A request at random, of a kind that is counted. Few tokens may be drawn, so that guesses come true at times."""
    kind = rng.choice(KINDS)
    words = [rng.randrange(3, 90) for _ in range(rng.randint(1, 5))]
    prompt = (words * 12)[: rng.randint(1, 40)]
    fields: dict[str, Any] = {"max_tokens": rng.randint(1, 40), "seed": rng.randrange(2**64), "ignore_eos": True}
    match kind:
        case "greedy":
            fields["temperature"] = 0
        case "top_p":
            fields |= {"temperature": 0.9, "top_p": rng.choice([0.3, 0.8])}
        case "penalties":
            fields |= {
                "temperature": rng.choice([0, 0.8]),
                "presence_penalty": rng.choice([0.0, 0.4]),
                "frequency_penalty": 0.1,
                "repetition_penalty": 1.05,
            }
        case temperature:
            fields["temperature"] = float(temperature)
    if kind != "greedy" or rng.random() < 0.3:
        fields["allowed_token_ids"] = sorted(rng.sample(range(3, 90), rng.randint(2, 4)))
    if rng.random() < 0.3:
        fields["n"] = rng.randint(2, 3)
    if rng.random() < 0.5:
        fields["logprobs"] = rng.randint(0, 3)
    if rng.random() < 0.2:
        fields["prompt_logprobs"] = 1
    if rng.random() < 0.2:
        fields |= {"stop": [rng.choice("etaoin")], "min_tokens": rng.randint(0, fields["max_tokens"])}
    if rng.random() < 0.2:
        fields |= {"stop_token_ids": [rng.randrange(3, 90)], "min_tokens": rng.randint(0, fields["max_tokens"])}
    if rng.random() < 0.1:
        fields["bad_words"] = ["e"]
    if rng.random() < 0.1:
        fields["logit_bias"] = {rng.randrange(3, 90): 4.0}
    if rng.random() < 0.1:
        fields["speculative_decoding"] = False
    return kind, prompt, SamplingParams(**fields)


def all_of(output: RequestOutput) -> Any:
    """Everything that a user gets but times."""
    prompt = [None if row is None else sorted(row) for row in output.prompt_logprobs or ()]
    return bits(output), prompt, output.seed


@pytest.fixture(scope="module")
def asked(tiny_gemma3_dir: Path) -> list[tuple[str, list[int], SamplingParams, Any]]:
    """Requests, and what they are answered without guesses, each alone."""
    rng = random.Random(15)
    found = []
    with LLM(str(tiny_gemma3_dir), **SETTINGS, enable_prefix_caching=False) as llm:
        for _ in range(REQUESTS):
            kind, prompt, params = configuration(rng)
            (output,) = llm.generate([{"prompt_token_ids": prompt}], params)
            assert output.metrics.num_draft_tokens == 0
            found.append((kind, prompt, params, all_of(output)))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_over_a_thousand_requests(
    tiny_gemma3_dir: Path,
    tiny_dir: Path,
    tmp_path: Path,
    asked: list[tuple[str, list[int], SamplingParams, Any]],
    name: str,
) -> None:
    """In batches, in pools in which somebody is preempted, with chunks, cached prefixes and windows."""
    assert REQUESTS * len(CONFIGS) > 1000
    counts: Counter[str] = Counter()
    rng = random.Random(name)
    config = CONFIGS[name] | ({"model": str(tiny_dir)} if "model" in name else {})
    if "head" in name:
        config["model"] = str(save_random_head(tmp_path / "head.safetensors", tiny_gemma3_dir))
    with LLM(str(tiny_gemma3_dir), **SETTINGS, speculative_config=config) as llm:
        block_bytes = llm.memory_plan.block_bytes
    for first in range(0, REQUESTS, 60):
        settings = SETTINGS | {"kv_cache_memory_bytes": rng.choice([11, 13, 60]) * block_bytes}
        with LLM(str(tiny_gemma3_dir), **settings, speculative_config=config) as llm:
            part = asked[first : first + 60]
            for at in range(0, len(part), 12):
                batch = part[at : at + 12]
                outputs = llm.generate([{"prompt_token_ids": p} for _, p, _, _ in batch], [one[2] for one in batch])
                for (kind, _, params, alone), output in zip(batch, outputs, strict=True):
                    assert all_of(output) == alone, params
                    metrics = output.metrics
                    assert params.speculative_decoding or not metrics.num_draft_tokens
                    counts[f"{kind} accepted"] += metrics.num_accepted_tokens
                    counts[f"{kind} rejected"] += metrics.num_draft_tokens - metrics.num_accepted_tokens
            counts["preempted"] += len(llm._engine.events.of(EventKind.PREEMPTED))
            stats = llm.speculation_stats
            assert stats is not None and stats.num_accepted_tokens == sum(stats.accepted_per_position)
            if config.get("method") != "suffix" or config.get("max_branches") == 1:
                assert stats.num_draft_tokens == sum(stats.drafted_per_position)
            else:  # of several in one place one is counted there
                assert stats.num_draft_tokens >= sum(stats.drafted_per_position)
            pairs = zip(stats.accepted_per_position, stats.drafted_per_position, strict=True)
            assert all(accepted <= drafted for accepted, drafted in pairs)
            llm.reset_prefix_cache()
            assert llm._engine.kv.num_available == llm._engine.kv.num_blocks
    assert counts["preempted"] > 0
    if "adaptive" not in name:  # there it depends on the machine whether guesses pay
        for kind in KINDS:
            assert counts[f"{kind} accepted"] > 0 and counts[f"{kind} rejected"] > 0, (kind, counts)


def test_a_session_and_a_fork_of_it(tiny_dir: Path) -> None:
    def answers(**settings: Any) -> tuple[list[list[int]], int]:
        with LLM(str(tiny_dir), max_model_len=400, **settings) as llm, llm.session(seed=7) as session:
            session.extend("one two three one two three one two three")
            first = session.generate(max_tokens=20, temperature=0.8, allowed_token_ids=[5, 6, 7], ignore_eos=True)
            (fork,) = session.fork()
            second = fork.generate(max_tokens=20, temperature=0, ignore_eos=True)
            third = session.generate(max_tokens=20, temperature=0, ignore_eos=True)
            stats = llm.speculation_stats
            accepted = 0 if stats is None else stats.num_accepted_tokens
            return [list(one.token_ids) for one in (first, second, third)], accepted

    plain, none = answers()
    guessed, accepted = answers(speculative_config={"method": "suffix", "adaptive": False})
    assert guessed == plain and accepted > none == 0


def test_a_beam_search_says_why_it_is_refused(tiny_dir: Path) -> None:
    with LLM(str(tiny_dir), max_model_len=64, speculative_config={"method": "ngram"}) as llm:
        with pytest.raises(InvalidRequestError, match="speculative_decoding: a beam search") as caught:
            llm.beam_search("hello", BeamSearchParams(beam_width=2, max_tokens=4))
        assert caught.value.field == "speculative_decoding"
        params = BeamSearchParams(beam_width=2, max_tokens=4, speculative_decoding=False)
        (allowed,) = llm.beam_search(["hello"], params)
    with LLM(str(tiny_dir), max_model_len=64) as llm:
        (plain,) = llm.beam_search(["hello"], BeamSearchParams(beam_width=2, max_tokens=4))
    assert [one.token_ids for one in allowed.outputs] == [one.token_ids for one in plain.outputs]


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_the_real_model(smollm2_path: Path, method: str) -> None:
    """Fifty-two prompts, greedy and drawn, some of which are copied in part."""
    words = "Water is a chemical compound. A molecule of water has one atom of oxygen and two of hydrogen.".split()
    rng = random.Random(method)
    prompts = []
    for _ in range(52):
        passage = " ".join(rng.choice(words) for _ in range(rng.randint(4, 20)))
        prompts.append(
            rng.choice(["{0}\n\nOnce more: {0}\n\nOnce more:", "{0}", "Say it twice. {0} {0}"]).format(passage)
        )
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.7}, {"temperature": 1.2, "top_p": 0.9}]
    kinds.append({"temperature": 0.7, "repetition_penalty": 1.1, "presence_penalty": 0.2})
    params = [
        SamplingParams(**kinds[number % 4], seed=number, max_tokens=24, logprobs=1, ignore_eos=True)
        for number in range(len(prompts))
    ]
    settings: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 16}
    with LLM(str(smollm2_path), **settings) as llm:
        plain = llm.generate(prompts, params)
    config = {"method": method, "num_speculative_tokens": 4, "adaptive": False}
    with LLM(str(smollm2_path), **settings, speculative_config=config) as llm:
        guessed = llm.generate(prompts, params)
        stats = llm.speculation_stats
    assert [all_of(one) for one in guessed] == [all_of(one) for one in plain]
    assert stats is not None and 50 < stats.num_accepted_tokens < stats.num_draft_tokens - 50


@pytest.mark.parametrize("method", ["suffix", "draft_model", "draft_head"])
def test_what_must_look_as_asked(tiny_dir: Path, tmp_path: Path, method: str) -> None:
    """A guess that the grammar forbids comes not true; each row of a tree has the mask of its own path."""
    forms = [{"regex": "(ab|ac|ad){6}"}, {"choice": ["yes yes yes", "yes no no"]}, {"regex": "[0-9]{12}"}]
    params = [
        SamplingParams(temperature=1, seed=n, n=2, max_tokens=24, structured_outputs=form, logprobs=1)
        for n, form in enumerate(forms * 4)
    ]
    prompts = ["abacabad" * 3] * len(params)
    config: dict[str, Any] = {"method": method, "adaptive": False}
    if method == "draft_model":
        config["model"] = str(tiny_dir)
    if method == "draft_head":
        config["model"] = str(save_random_head(tmp_path / "head.safetensors", tiny_dir, every=1))
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        plain = llm.generate(prompts, params)
    with LLM(str(tiny_dir), **SETTINGS, speculative_config=config) as llm:
        singly: list[StepPlan] = []
        alone = llm._engine._execute_singly
        llm._engine._execute_singly = lambda plan: singly.append(plan) or alone(plan)  # type: ignore[method-assign]
        guessed = llm.generate(prompts, params)
        stats = llm.speculation_stats
    assert [all_of(one) for one in guessed] == [all_of(one) for one in plain]
    assert not singly, "what a grammar forbids is not computed, let alone twice"
    assert stats is not None and (method != "suffix" or stats.num_draft_tokens > stats.num_accepted_tokens > 0)


@pytest.mark.parametrize("method", ["draft_model", "draft_head"])
def test_a_fork_of_the_process(tiny_dir: Path, tmp_path: Path, method: str) -> None:
    """The cache, what was learnt and the models go on in both."""
    model = tiny_dir if method == "draft_model" else save_random_head(tmp_path / "head.safetensors", tiny_dir)
    config = {"method": method, "model": str(model), "adaptive": False}
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with LLM(str(tiny_dir), **SETTINGS, speculative_config=config) as llm:
        expected = [one.outputs[0].token_ids for one in llm.generate(["one two", "three four"], params)]
        child = os.fork()
        if not child:
            code = 1
            try:
                got = [one.outputs[0].token_ids for one in llm.generate(["one two", "three four"], params)]
                code = 0 if got == expected else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert [one.outputs[0].token_ids for one in llm.generate(["one two", "three four"], params)] == expected
