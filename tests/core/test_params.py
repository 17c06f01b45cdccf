"""Bad parameters are refused at the edge, naming the field."""

from __future__ import annotations

import math
from typing import Any

import pytest

from octavo.core.errors import InvalidRequestError
from octavo.core.params import SamplingParams

BAD: list[tuple[str, Any]] = [
    *(("temperature", value) for value in (-1, math.nan, math.inf, "hot", None, True)),
    *(("top_p", value) for value in (0, 2, -0.1, math.nan)),
    *(("top_k", value) for value in (-2, 2**40, 1.5, True)),
    *(("min_p", value) for value in (-0.1, 1.1, math.nan)),
    *(("n", value) for value in (0, 10**6, -1, 1.0, True)),
    *(("max_tokens", value) for value in (0, -1, 2**63, 2.5)),
    *(("min_tokens", value) for value in (-1, 17, 2**63)),
    *(("seed", value) for value in (-1, 2**64, 1.5, "1")),
    *(("repetition_penalty", value) for value in (0, -1, math.nan, math.inf)),
    *(("presence_penalty", value) for value in (3, math.nan)),
    *(("frequency_penalty", value) for value in (-3, math.inf)),
    *(("logprobs", value) for value in (-1, True, 1.5)),
    *(("prompt_logprobs", value) for value in (-1, "all")),
    *(("stop", value) for value in ("", [""], [1], ["x"] * 10_000, "x" * 1_000_000, 5)),
    *(("stop_token_ids", value) for value in ([-1], [1.5], [True], "abc", 7)),
    *(("allowed_token_ids", value) for value in ([], [-1], ["a"])),
    *(
        ("logit_bias", value)
        for value in ({-1: 1.0}, {1: math.inf}, {1: math.nan}, {"x": 1}, [1], {True: 1.0}, {1: "a"})
    ),
    *(("bad_words", value) for value in ([""], [1], ["x"] * 5000)),
    *((flag, "yes") for flag in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")),
    ("output_kind", "sometimes"),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_values_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


def test_stop_needs_text() -> None:
    with pytest.raises(InvalidRequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_values_are_normalised() -> None:
    params = SamplingParams(stop="x", allowed_token_ids=[3, 1, 3], logit_bias={"5": 1}, stop_token_ids=range(2))
    assert params.stop == ("x",)
    assert params.allowed_token_ids == (1, 3)
    assert params.logit_bias == {5: 1.0}
    assert params.stop_token_ids == (0, 1)
    assert params.but(temperature=0).greedy


def test_values_too_large_to_print_or_to_compute_are_refused() -> None:
    """10**400 does not fit a float, 10**5000 not even an error message."""
    for field in ("temperature", "top_p", "repetition_penalty", "n", "top_k", "seed", "max_tokens", "logprobs"):
        for value in (10**400, 10**5000):
            with pytest.raises(InvalidRequestError) as caught:
                SamplingParams(**{field: value})
            assert caught.value.field == field
            assert len(str(caught.value)) < 200
    for bias in ({1: 10**400}, {1: 1e300}, {10**5000: -1e300}):
        with pytest.raises(InvalidRequestError):
            SamplingParams(logit_bias=bias)


def test_numpy_numbers_are_numbers() -> None:
    import numpy as np

    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), stop_token_ids=np.array([4, 5]))
    assert (params.temperature, params.top_k, params.stop_token_ids) == (0.5, 3, (4, 5))
    assert type(params.top_k) is int
