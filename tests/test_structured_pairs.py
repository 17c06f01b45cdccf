"""Structured outputs and embeddings beside what they meet: guesses that are verified, windows of layers, types of KV,
files, priority, searches, sessions, callers who go away. Each answer is that of the same request alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, BeamSearchParams, PoolingParams, SamplingParams
from tests.invariance.test_drafts import Guesser, bits
from tests.pace import held
from tests.test_margins_pairs import check_home, folder, gave_way, scarce, together
from tests.test_structured import COMPACT, KINDS, check

__all__ = ["folder"]  # fixtures

SETTINGS: dict[str, Any] = {"max_num_seqs": 12, "max_num_batched_tokens": 48, "max_model_len": 256}
WORDS = "The white whale far under the sea, a captain of old sails "


def a_prompt(rng: random.Random) -> str:
    return WORDS * rng.randint(0, 3) + f"number {rng.randrange(4)} "


def drawn(rng: random.Random) -> SamplingParams:
    """Anything beside a grammar that leaves it a token; one of six has none."""
    given: dict[str, Any] = {"max_tokens": rng.randint(1, 60), "seed": rng.randrange(100), "logprobs": 2}
    if rng.random() < 5 / 6:
        given["structured_outputs"] = rng.choice(KINDS)
    if rng.random() < 0.3:
        given |= {"temperature": 0.0}
    else:
        given |= {"n": rng.choice([1, 1, 3]), "temperature": 1.3, "top_p": rng.choice([1.0, 0.9])}
    if rng.random() < 0.4:
        given |= {"presence_penalty": 0.5, "repetition_penalty": 1.2}
    if rng.random() < 0.3:
        given |= {"stop": [rng.choice(["a", '"', "o", "1"])], "include_stop_str_in_output": rng.random() < 0.5}
    if rng.random() < 0.3:
        given |= {"min_tokens": rng.randint(1, given["max_tokens"])}
    if rng.random() < 0.3:
        given |= {"logit_bias": {rng.randrange(200): rng.choice([-5.0, 5.0]) for _ in range(20)}}
    if rng.random() < 0.3:
        given |= {"bad_words": ["qq", "Lo"]}
    return SamplingParams(**given)


def a_request(rng: random.Random) -> Callable[[LLM], Any]:
    """Whatever is asked: a function of the numbers alone."""
    prompt, kind = a_prompt(rng), rng.randrange(6)
    if kind == 0:
        width, structured = rng.choice([2, 4]), rng.choice(KINDS)
        search = BeamSearchParams(beam_width=width, max_tokens=rng.randint(1, 30), structured_outputs=structured)

        def searched(llm: LLM) -> Any:
            (found,) = llm.beam_search(prompt, search, use_tqdm=False)
            return found.error, [(one.token_ids, one.score, one.finish_reason) for one in found.outputs]

        return searched
    if kind == 1:
        pooling = PoolingParams(pooling=rng.choice(["mean", "last"]), normalize=rng.random() < 0.5)
        return lambda llm: llm.embed(prompt, pooling, use_tqdm=False)[0].outputs.embedding
    if kind == 2:
        verbs = [rng.choice(["free", "fork", "structured", "truncate"]) for _ in range(4)]
        structured, seed = rng.choice(KINDS), rng.randrange(100)

        def branched(llm: LLM) -> Any:
            found: list[Any] = []
            with llm.session(seed=seed) as session:
                session.extend(prompt)
                branch: Any = session
                for verb in verbs:
                    if verb == "fork":
                        (branch,) = branch.fork(1)
                    elif verb == "truncate":
                        branch.truncate(max(len(branch.token_ids) - 3, 1))
                    else:
                        given = {"structured_outputs": structured} if verb == "structured" else {}
                        output = branch.generate(SamplingParams(max_tokens=20, **given))
                        found.append((output.token_ids, output.text, output.finish_reason))
            return found

        return branched
    params = drawn(rng)

    def generated(llm: LLM) -> Any:
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        for one in output.outputs:
            if params.grammar is not None and one.finish_reason == "stop" and one.stop_reason is None:
                check(
                    one.text,
                    next(kind for kind in KINDS if SamplingParams(structured_outputs=kind).grammar == params.grammar),
                )
        return output.error, bits(output)

    return generated


def leave(llm: LLM, rng: random.Random) -> None:
    """Begins answers and goes away at some event of each."""
    for _ in range(6):
        most = rng.randint(0, 12)
        with_grammar = drawn(rng).but(structured_outputs=COMPACT, stop=None, output_kind="delta")
        answer = llm.stream(a_prompt(rng), with_grammar)
        for _, _ in zip(range(most), answer, strict=False):
            pass
        answer.close()


@pytest.mark.parametrize("kv_cache_dtype", ["float16", "int8"])
@pytest.mark.parametrize("seed", [0, 1])
def test_storm(folder: Path, tmp_path: Path, seed: int, kv_cache_dtype: str) -> None:
    """In a pool too small, with blocks in files, a cache that is warm the second time, and callers who go away."""
    rng = random.Random(seed)
    asked = [a_request(rng) for _ in range(24)]
    settings = SETTINGS | {"kv_cache_dtype": kv_cache_dtype}
    with LLM(str(folder), **settings, enable_prefix_caching=False) as llm:
        alone = [ask(llm) for ask in asked]
        settings |= scarce(llm, 256) | {"kv_offload_dir": str(tmp_path / "kv")}
    with LLM(str(folder), **settings) as llm:
        for _ in range(2):
            found: dict[int, Any] = {}
            begun = held(llm._engine, lambda: llm._engine.num_requests >= 6)

            def work(first: int) -> None:
                found.update({number: asked[number](llm) for number in range(first, len(asked), 6)})  # noqa: B023

            works: list[Callable[[], None]] = [lambda first=first: work(first) for first in range(6)]  # type: ignore[misc]
            with begun:
                together(*works, lambda: leave(llm, random.Random(seed)))
            assert [found[number] for number in range(len(asked))] == alone
        assert gave_way(llm), "the pool was large enough for all"
        check_home(llm)


@pytest.mark.parametrize("is_scarce", [False, True])
def test_guesses(folder: Path, is_scarce: bool) -> None:
    """Right ones and wrong ones, and such as the grammar refuses; a refused one changes nothing."""
    rng = random.Random(5)
    prompts, params = [a_prompt(rng) for _ in range(16)], [drawn(rng) for _ in range(16)]
    settings = SETTINGS | {"kv_cache_dtype": "int8"}
    with LLM(str(folder), **settings, enable_prefix_caching=False) as llm:
        alone = [llm.generate(*one, use_tqdm=False)[0] for one in zip(prompts, params, strict=True)]
        vocab_size = llm.model_config.vocab_size
        if is_scarce:
            settings |= scarce(llm, 256)
    answers = [[*output.prompt_token_ids, *one.token_ids] for output in alone for one in output.outputs]
    guesser = Guesser(answers, vocab_size)
    with LLM(str(folder), **settings) as llm:
        llm._engine.scheduler._proposer = guesser
        llm._engine.step_listeners.append(guesser.note)
        for _ in range(2):
            found = llm.generate(prompts, params, use_tqdm=False)
            assert [bits(output) for output in found] == [bits(output) for output in alone]
        assert not is_scarce or gave_way(llm)
        check_home(llm)
    assert guesser.accepted > 50 and guesser.rejected > 20


def test_priority(folder: Path) -> None:
    """The unimportant give way in the middle of their grammars."""
    rng = random.Random(7)
    asked = [a_request(rng) for _ in range(12)]
    with LLM(str(folder), **SETTINGS) as llm:
        alone = [ask(llm) for ask in asked]
        settings = SETTINGS | scarce(llm, 256) | {"scheduling_policy": "priority"}
    urgent = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    with LLM(str(folder), **settings) as llm:
        found: list[Any] = []

        def press() -> None:
            for number in range(12):
                llm.generate([WORDS * 3 + str(number)] * 2, urgent, priority=-1, use_tqdm=False)

        together(lambda: found.extend(ask(llm) for ask in asked), press)
        assert found == alone
        check_home(llm)


def test_two_engines_of_a_process(tiny_dir: Path, tiny_gemma3_dir: Path) -> None:
    """They share the thread that computes masks, and nothing else."""
    rng = random.Random(9)
    asked = [a_request(rng) for _ in range(16)]
    with LLM(str(tiny_dir), **SETTINGS) as one, LLM(str(tiny_gemma3_dir), **SETTINGS) as other:
        alone = {llm: [ask(llm) for ask in asked] for llm in (one, other)}
        found: dict[LLM, list[Any]] = {one: [], other: []}
        together(*(lambda llm=llm: found[llm].extend(ask(llm) for ask in asked) for llm in found))  # type: ignore[misc]
        assert found == alone
        check_home(one)
        check_home(other)
