"""`octavo run --beam-width`: the flags, what is printed, and what does not go together."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, BeamSearchParams, SamplingParams
from octavo.cli.answering import TextWriter
from octavo.cli.sampling_args import REPETITION, add_beam_arguments, add_sampling_arguments, request_params

from .conftest import Invoke

BEAMS = ("--raw", "--beam-width", "4", "--max-tokens", "12")
PARAMS = BeamSearchParams(beam_width=4, max_tokens=12)


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama_dir)) as llm:
        yield llm


def parsed(*arguments: str) -> SamplingParams | BeamSearchParams:
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    add_beam_arguments(parser)
    return request_params(parser.parse_args(arguments))


def test_the_best_is_printed(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path) -> None:
    best = tiny.beam_search("hello", PARAMS)[0].outputs[0].text
    assert best != tiny.generate("hello", SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].text
    assert invoke("run", "--model", tiny_llama_dir, *BEAMS, "hello") == (0, best + "\n", "")


def test_it_comes_in_pieces(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all beams have in common is shown before the search has ended."""
    pieces: list[str] = []
    write = TextWriter.write
    monkeypatch.setattr(TextWriter, "write", lambda self, text: (pieces.append(text), write(self, text))[1])
    arguments = ("--raw", "--beam-width", "2", "--max-tokens", "40")
    result = invoke("run", "--model", tiny_llama_dir, *arguments, "hello")
    params = BeamSearchParams(beam_width=2, max_tokens=40)
    assert "".join(pieces) == tiny.beam_search("hello", params)[0].outputs[0].text == result.out.removesuffix("\n")
    assert sum(map(bool, pieces)) > 1


def test_several_outputs(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path) -> None:
    expected = tiny.beam_search("hello", PARAMS)[0].outputs
    result = invoke("run", "--model", tiny_llama_dir, *BEAMS, "--num-return-sequences", 3, "hello")
    parts = [f"=== output {i + 1} of 3 ===\n{expected[i].text}\n" for i in range(3)]
    assert result.out == "".join(part if part.endswith("\n") else part + "\n" for part in parts)


def test_json(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path) -> None:
    expected = tiny.beam_search("hello", PARAMS.but(logprobs=2))[0].outputs
    arguments = ("--json", "--logprobs", "2", "--num-return-sequences", "2")
    answer = json.loads(invoke("run", "--model", tiny_llama_dir, *BEAMS, *arguments, "hello").out)
    assert answer["seed"] is None and answer["completion_tokens"] == sum(len(one.token_ids) for one in expected[:2])
    for got, one in zip(answer["outputs"], expected[:2], strict=True):
        assert got["token_ids"] == one.token_ids and got["text"] == one.text
        assert (got["score"], got["cumulative_logprob"]) == (one.score, one.cumulative_logprob)
        assert len(got["logprobs"]) == len(one.token_ids)
    single = json.loads(invoke("run", "--model", tiny_llama_dir, *BEAMS, "--json", "--logprobs", "2", "hello").out)
    first = answer["outputs"][0]
    assert [single[name] for name in ("token_ids", "score", "logprobs")] == [
        first[name] for name in ("token_ids", "score", "logprobs")
    ]


def test_every_field_has_a_flag() -> None:
    """Guards against a field of BeamSearchParams that the command line forgot. Temperature can only be left alone."""
    values: dict[str, list[str]] = {
        "beam_width": ["3"],
        "num_return_sequences": ["2"],
        "length_penalty": ["0.5"],
        "early_stopping": ["never"],
        "num_beam_groups": ["3"],
        "diversity_penalty": ["1.5"],
        "no_repeat_ngram_size": ["2"],
        "max_tokens": ["9"],
        "min_tokens": ["2"],
        "presence_penalty": ["0.5"],
        "frequency_penalty": ["0.25"],
        "repetition_penalty": ["1.5"],
        "stop": ["x"],
        "stop_token_ids": ["4,5"],
        "logprobs": ["3"],
        "logit_bias": ['{"3": 1.5}'],
        "allowed_token_ids": ["1,2"],
        "bad_words": ["y"],
        "temperature": ["1"],
        "repetition_detection": ['{"max_pattern_size": 5, "min_count": 3}'],
    }
    flags = {"ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "skip_reading_prefix_cache"}
    flags.add("speculative_decoding")
    not_flags = {"output_kind", "sampling", "num_beams", "detokenize", "spaces_between_special_tokens"}
    not_flags.add("structured_outputs")  # not beside --ignore-eos
    structured = parsed("--beam-width", "3", "--structured-outputs", '{"regex": "a+"}')
    assert structured == BeamSearchParams(
        beam_width=3,
        num_return_sequences=1,
        max_tokens=None,
        repetition_detection=REPETITION,
        structured_outputs={"regex": "a+"},
    )
    names = {field.name for field in fields(BeamSearchParams)}
    assert names == set(values) | flags | not_flags
    arguments = [part for name, given in values.items() for part in ("--" + name.replace("_", "-"), *given)]
    arguments += ["--ignore-eos", "--include-stop-str-in-output", "--no-skip-special-tokens"]
    params = parsed(*arguments, "--skip-reading-prefix-cache", "--no-speculative-decoding")
    assert isinstance(params, BeamSearchParams)
    default: Any = BeamSearchParams()
    same = {name for name in set(values) | flags if getattr(params, name) == getattr(default, name)}
    assert same == set()
    assert parsed("--num-beams", "3") == parsed("--beam-width", "3")
    assert parsed("--beam-width", "3", "--early-stopping", "TRUE").early_stopping is True  # type: ignore[union-attr]
    assert isinstance(parsed("--n", "2"), SamplingParams)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "2"], "--n: has no meaning with --beam-width: a beam search has --num-return-sequences"),
        (["--top-p", "0.5"], "--top-p: has no meaning with --beam-width: a beam search draws nothing"),
        (["--top-k", "5"], "--top-k:"),
        (["--min-p", "0.1"], "--min-p:"),
        (["--seed", "1"], "--seed:"),
        (["--prompt-logprobs", "1"], "--prompt-logprobs:"),
        (["--temperature", "0.7"], "temperature: beam search draws nothing"),
        (["--beam-width", "0"], "beam_width: must be between 1 and"),
        (["--beam-width", "x"], "--beam-width: must be an integer, not 'x'"),
        (["--beam-width", "33"], "beam_width: all beams run in one step, and max_num_seqs=32 is less than 33"),
        (["--num-return-sequences", "5"], "num_return_sequences: must be between 1 and 4"),
        (["--length-penalty", "nan"], "length_penalty:"),
        (["--length-penalty", "100"], "length_penalty: must be at least"),
        (["--early-stopping", "maybe"], "--early-stopping: must be true, false or never, not 'maybe'"),
        (["--num-beam-groups", "3"], "num_beam_groups: must divide the beam width 4"),
        (["--num-beam-groups", "2"], "diversity_penalty: must be more than 0"),
        (["--diversity-penalty", "1"], "diversity_penalty: needs num_beam_groups"),
        (["--diversity-penalty", "-1"], "diversity_penalty:"),
        (["--no-repeat-ngram-size", "-1"], "no_repeat_ngram_size:"),
    ],
)
def test_refused(invoke: Invoke, tiny_llama_dir: Path, arguments: list[str], message: str) -> None:
    result = invoke("run", "--model", tiny_llama_dir, "--beam-width", "4", *arguments, "hello")
    assert (result.code, result.out) == (2, "") and message in result.err and result.err.count("\n") == 1, result


def test_needs_the_width(invoke: Invoke, tiny_llama_dir: Path) -> None:
    result = invoke("run", "--model", tiny_llama_dir, "--length-penalty", "2", "hello")
    assert result.code == 2 and "--length-penalty: needs --beam-width" in result.err
