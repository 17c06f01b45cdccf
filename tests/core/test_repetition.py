"""When an output is said to repeat itself: against the definition spelt out, on token lists from small alphabets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo import LLM, BeamSearchParams, RepetitionDetectionParams, SamplingParams
from octavo.core.errors import InvalidRequestError
from octavo.core.repetition import repeats


def by_definition(token_ids: list[int], params: RepetitionDetectionParams) -> bool:
    for size in range(max(params.min_pattern_size, 1), params.max_pattern_size + 1):
        pattern = token_ids[-size:]
        if len(token_ids) >= size * params.min_count and token_ids[-size * params.min_count :] == (
            pattern * params.min_count
        ):
            return True
    return False


@given(st.data())
def test_it_is_the_definition(data: st.DataObject) -> None:
    least = data.draw(st.integers(0, 4))
    params = RepetitionDetectionParams(
        max_pattern_size=data.draw(st.integers(max(least, 1), 6)),
        min_pattern_size=least,
        min_count=data.draw(st.integers(2, 4)),
    )
    start = data.draw(st.lists(st.integers(0, 2), max_size=8))
    pattern = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=7))
    token_ids = start + pattern * data.draw(st.integers(1, 5)) + data.draw(st.lists(st.integers(0, 2), max_size=2))
    for end in range(1, len(token_ids) + 1):
        assert repeats(token_ids[:end], params) == by_definition(token_ids[:end], params)


def test_sizes_and_counts() -> None:
    """Each bound holds at its edge, and a short pattern is a long one several times over."""
    params = RepetitionDetectionParams(max_pattern_size=4, min_pattern_size=3, min_count=3)
    assert repeats([9, 1, 2, 3, 1, 2, 3, 1, 2, 3], params)
    assert not repeats([1, 2, 3, 1, 2, 3, 1, 2], params)
    assert not repeats([1, 2, 3, 4, 5] * 3, params), "larger than max_pattern_size"
    assert not repeats([1, 2] * 5, params), "a pattern of two, and six tokens short of four of them three times"
    assert repeats([1, 2] * 6, params), "a pattern of four, three times"
    assert repeats([7] * 9, params) and not repeats([7] * 8, params)
    assert not repeats([7] * 100, RepetitionDetectionParams())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_pattern_size": -1}, "repetition_detection.max_pattern_size: must be between 0 and 4096"),
        ({"max_pattern_size": 5000, "min_count": 2}, "repetition_detection.max_pattern_size: must be between 0 and"),
        ({"max_pattern_size": 2.0}, "repetition_detection.max_pattern_size: must be an integer"),
        (
            {"max_pattern_size": 4, "min_pattern_size": 5, "min_count": 2},
            "min_pattern_size: 5 is more than max_pattern",
        ),
        ({"max_pattern_size": 4}, "repetition_detection.min_count: must be between 2 and"),
        ({"max_pattern_size": 4, "min_count": 1}, "repetition_detection.min_count: must be between 2 and"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message.replace(".", r"\.")):
        RepetitionDetectionParams(**fields)
    with pytest.raises(InvalidRequestError, match=message.replace(".", r"\.")):
        SamplingParams(repetition_detection=fields)


def test_a_mapping_will_do() -> None:
    """As it comes from JSON; what it does not know is refused."""
    fields = {"max_pattern_size": 8, "min_pattern_size": 2, "min_count": 3}
    assert SamplingParams(repetition_detection=fields).repetition_detection == RepetitionDetectionParams(**fields)
    with pytest.raises(InvalidRequestError, match=r"repetition_detection\.window: 'window' is not a field"):
        SamplingParams(repetition_detection={"window": 3})
    with pytest.raises(InvalidRequestError, match="repetition_detection: must be RepetitionDetectionParams"):
        SamplingParams(repetition_detection=3)  # type: ignore[arg-type]


def ends_there(token_ids: list[int], params: RepetitionDetectionParams) -> bool:
    """The last token completes the first repetition."""
    return by_definition(token_ids, params) and not any(
        by_definition(token_ids[:end], params) for end in range(1, len(token_ids))
    )


SQUARES = RepetitionDetectionParams(max_pattern_size=8, min_pattern_size=4, min_count=2)
FEW = {"allowed_token_ids": [65, 66, 67], "ignore_eos": True, "max_tokens": 300, "repetition_detection": SQUARES}


def test_in_batches_forks_and_preemptions(tiny_llama_dir: Path) -> None:
    """Of three tokens something is soon repeated. In a pool too small for all, each output ends where it does alone."""
    params = [SamplingParams(temperature=100, seed=seed, n=3, **FEW) for seed in range(5)]
    prompts = [{"prompt_token_ids": [70 + seed] * 20} for seed in range(5)]
    with LLM(str(tiny_llama_dir), max_model_len=16) as probe:
        block = probe.memory_plan.block_bytes
    with LLM(str(tiny_llama_dir), max_model_len=320) as llm:
        alone = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]
    with LLM(str(tiny_llama_dir), max_model_len=320, kv_cache_memory_bytes=21 * block) as llm:
        crowded = llm.generate(prompts, params)
        assert sum(output.metrics.num_preemptions for output in crowded) > 0
    lengths = set()
    for one, other in zip(alone, crowded, strict=True):
        for mine, same in zip(one.outputs, other.outputs, strict=True):
            assert (mine.token_ids, mine.finish_reason) == (same.token_ids, same.finish_reason)
            assert mine.finish_reason == "repetition" and ends_there(mine.token_ids, SQUARES)
            lengths.add(len(mine.token_ids))
    assert len(lengths) > 5


def test_in_a_beam_search_and_a_session(tiny_llama_dir: Path) -> None:
    with LLM(str(tiny_llama_dir), max_model_len=320) as llm:
        (found,) = llm.beam_search("hello", BeamSearchParams(beam_width=4, **FEW))
        reasons = {(one.finish_reason, one.stop_reason) for one in found.outputs}
        assert reasons == {("repetition", "repetition_detected")}
        assert all(ends_there(one.token_ids, SQUARES) for one in found.outputs)
        with llm.session(seed=3) as s:
            s.extend("hello")
            before = s.token_ids
            output = s.generate(temperature=1, **FEW)
            assert output.finish_reason == "repetition" and ends_there(output.token_ids, SQUARES)
            assert s.token_ids == before + output.token_ids, "the branch has all of it"
