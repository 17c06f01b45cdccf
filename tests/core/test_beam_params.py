"""Settings of a beam search: bad ones are refused at the edge, naming the field."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from octavo.core.beam_params import MAX_BEAM_WIDTH, BeamSearchParams
from octavo.core.errors import InvalidRequestError
from octavo.core.params import OutputKind, SamplingParams

BAD: list[tuple[str, Any]] = [
    *((name, value) for name in ("beam_width", "num_beams") for value in (0, -1, MAX_BEAM_WIDTH + 1, 2.0, "4", True)),
    *(("num_return_sequences", value) for value in (0, -1, 5, 1.5, True)),
    *(("length_penalty", value) for value in (math.nan, math.inf, 100, -100, "1", None, True)),
    *(("early_stopping", value) for value in ("always", "", "True", 1, 0, None)),
    *(("num_beam_groups", value) for value in (0, -1, 3, 5, 1.5, True)),
    *(("diversity_penalty", value) for value in (-1, math.nan, math.inf, "1", 0.5)),  # the last one without groups
    *(("no_repeat_ngram_size", value) for value in (-1, 1.5, "2", True)),
    *(("temperature", value) for value in (0.5, 2, -1, math.nan, True)),
    *(("max_tokens", value) for value in (0, -1, 2**63, 2.5)),
    *(("min_tokens", value) for value in (-1, 17)),
    *(("presence_penalty", value) for value in (3, math.nan)),
    *(("frequency_penalty", value) for value in (-3, math.inf)),
    *(("repetition_penalty", value) for value in (0, -1, math.nan)),
    *(("stop", value) for value in ("", [""], [1], 5)),
    *(("stop_token_ids", value) for value in ([-1], [1.5], "abc", 7)),
    *(("logprobs", value) for value in (-1, True, 1.5)),
    *(("logit_bias", value) for value in ({-1: 1.0}, {1: math.inf}, [1])),
    *(("allowed_token_ids", value) for value in ([], [-1], ["a"])),
    *(("bad_words", value) for value in ([""], [1])),
    *(
        (name, "yes")
        for name in (
            "ignore_eos",
            "include_stop_str_in_output",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "skip_reading_prefix_cache",
            "speculative_decoding",
        )
    ),
    ("output_kind", "sometimes"),
    ("repetition_detection", 3),
    *(("structured_outputs", value) for value in (3, "a", {}, {"regex": "a", "choice": ["b"]})),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_values_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        BeamSearchParams(**{field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


def test_every_field_is_checked() -> None:
    """Guards against a new field that nobody checks."""
    assert {field for field, _ in BAD} == {field.name for field in fields(BeamSearchParams) if field.init}


@pytest.mark.parametrize("name", ["n", "seed", "top_p", "top_k", "min_p", "prompt_logprobs", "best_of"])
def test_what_a_beam_search_has_not_is_unknown(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        BeamSearchParams(**{name: 1})


def test_two_names_of_the_width() -> None:
    assert BeamSearchParams().width == 4
    for given in ({"beam_width": 6}, {"num_beams": 6}, {"beam_width": 6, "num_beams": 6}):
        params = BeamSearchParams(**given)
        assert (params.width, params.beam_width, params.num_beams, params.num_return_sequences) == (6, 6, 6, 6)
    with pytest.raises(InvalidRequestError, match="num_beams: 5 contradicts beam_width=6"):
        BeamSearchParams(beam_width=6, num_beams=5)


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(InvalidRequestError, match="num_beam_groups: must divide the beam width 6, not 4"):
        BeamSearchParams(beam_width=6, num_beam_groups=4, diversity_penalty=1.0)
    with pytest.raises(InvalidRequestError, match="diversity_penalty: needs num_beam_groups"):
        BeamSearchParams(diversity_penalty=1.0)
    with pytest.raises(InvalidRequestError, match="diversity_penalty: must be more than 0"):
        BeamSearchParams(num_beam_groups=2)
    with pytest.raises(InvalidRequestError, match="num_return_sequences: must be between 1 and 2, not 3"):
        BeamSearchParams(beam_width=2, num_return_sequences=3)
    with pytest.raises(InvalidRequestError, match="need detokenize=True"):
        BeamSearchParams(stop="x", detokenize=False)


def test_a_changed_copy() -> None:
    params = BeamSearchParams(beam_width=4, stop="x", early_stopping="never")
    wider = params.but(beam_width=8)
    assert (wider.width, wider.num_outputs, wider.stop, wider.early_stopping) == (8, 8, ("x",), "never")
    assert params.but(num_beams=2).num_outputs == 2
    assert BeamSearchParams(num_return_sequences=1).but(beam_width=8).num_outputs == 1
    assert params.but(output_kind="delta").output_kind is OutputKind.DELTA
    with pytest.raises(InvalidRequestError, match="length_penalty"):
        params.but(length_penalty=math.nan)


def test_values_are_normalised() -> None:
    params = BeamSearchParams(beam_width=np.int64(4), length_penalty=np.float32(0.5), stop="x", logit_bias={"5": 1})
    assert (type(params.width), type(params.length_penalty)) == (int, float)
    assert (params.stop, params.logit_bias) == (("x",), {5: 1.0})


def test_what_is_shared_with_sampling_is_handed_on() -> None:
    """Guards against a field that the search accepts and the processors never see."""
    given: dict[str, Any] = {"repetition_penalty": 1.5, "min_tokens": 3, "bad_words": ["a"], "allowed_token_ids": [4]}
    params = BeamSearchParams(**given, stop_token_ids=[9], ignore_eos=True, logprobs=2)
    expected = SamplingParams(**given, stop_token_ids=[9], ignore_eos=True, logprobs=2, temperature=0)
    assert params.sampling == expected
