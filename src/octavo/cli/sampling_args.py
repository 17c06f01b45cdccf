"""Flags of a request, made from the fields of SamplingParams and BeamSearchParams."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import InvalidRequestError, shown
from octavo.core.params import RepetitionDetectionParams, SamplingParams
from octavo.core.settings import flag, type_hints
from octavo.core.structured import StructuredOutputsParams

# On the command line one answer, as long as it takes, is the likeliest wish, and that it goes in circles nobody's.
# Sixteen tokens: rulers of tables, and "ha ha ha", are shorter.
REPETITION = RepetitionDetectionParams(max_pattern_size=256, min_pattern_size=16, min_count=4)
_DEFAULTS: dict[str, Any] = {"max_tokens": None, "repetition_detection": REPETITION}
_BEAM_DEFAULTS: dict[str, Any] = {**_DEFAULTS, "num_return_sequences": 1}
# Where neither a flag nor the model's files say otherwise.
_SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "min_p": 0.05}
# Without effect where nothing is drawn, with the value that says so.
_OF_DRAWING: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None}
_DECIDED_BY_COMMAND = frozenset(["output_kind"])
_OFF = "off"

# field -> (metavar, help)
_TEXTS: dict[str, tuple[str, str]] = {
    "n": ("N", "number of outputs (default 1)"),
    "presence_penalty": ("X", "subtract from the logits of tokens already generated, -2 to 2 (default 0)"),
    "frequency_penalty": ("X", "the same for each time they were generated, -2 to 2 (default 0)"),
    "repetition_penalty": ("X", "divide the logits of tokens in prompt or output (default: the model's, else 1)"),
    "temperature": (
        "X",
        "0 takes the most probable token always (default: what the model's files say, else 0.7)",
    ),
    "top_p": (
        "P",
        "sample from the most probable tokens that make up P (default: the model's, else 0.95)",
    ),
    "top_k": ("K", "sample from the K most probable tokens; 0 or -1 is off (default: the model's, else 0)"),
    "min_p": (
        "P",
        "sample from tokens at least P times as probable as the best (default: the model's, else 0.05)",
    ),
    "seed": ("N", "make sampling repeatable (default: drawn, and reported by --json)"),
    "stop": ("TEXT", "end the output before TEXT; may be repeated"),
    "stop_token_ids": ("ID,…", "end the output at these tokens; may be repeated"),
    "ignore_eos": ("", "go on past the model's own end tokens"),
    "max_tokens": ("N", "most tokens to generate (default: up to the model's context)"),
    "min_tokens": ("N", "do not end before N tokens (default 0)"),
    "logprobs": ("N", "report log-probabilities of each token and of the N best (with --json)"),
    "prompt_logprobs": ("N", "the same for the tokens of the prompt (with --json)"),
    "detokenize": ("", "make text of the tokens (default on)"),
    "skip_special_tokens": ("", "leave special tokens out of the text (default on)"),
    "spaces_between_special_tokens": ("", "for compatibility; changes nothing with the tokenizers supported"),
    "include_stop_str_in_output": ("", "keep the stop string or end token in the text (default off)"),
    "logit_bias": ("JSON", 'add to logits, as in {"15": -100}, by token id'),
    "allowed_token_ids": ("ID,…", "draw no other tokens; may be repeated"),
    "skip_reading_prefix_cache": ("", "compute the whole prompt, whatever of it is cached"),
    "speculative_decoding": ("", "guess tokens, with --speculative-config; answers are the same (default on)"),
    "repetition_detection": (
        "JSON",
        'end an output that repeats itself: {"max_pattern_size": 256, "min_pattern_size": 16, "min_count": 4} (the '
        "default) finds 16 to 256 tokens that come four times in a row; --no-repetition-detection is off",
    ),
    "structured_outputs": (
        "JSON",
        'what the output must look like: {"regex": "[0-9]+"}, {"choice": ["yes", "no"]}, {"grammar": …}, {"json": a '
        'schema} or {"json_object": true}',
    ),
    "bad_words": ("TEXT", "never complete the tokens that spell TEXT; may be repeated"),
}

_BEAM_TEXTS: dict[str, tuple[str, str]] = {
    "beam_width": ("N", "beam search: keep the N most probable beginnings at each step, instead of drawing tokens"),
    "num_return_sequences": ("N", "outputs of a beam search, best first (default 1)"),
    "length_penalty": ("X", "compare by log-probability over length ** X; more than 0 favours long ones (default 1)"),
    "early_stopping": (
        "WHEN",
        "true: end when --beam-width answers are finished; false: when a better one is not to be "
        "expected; never: when none is possible (default false)",
    ),
    "num_beam_groups": ("N", "search in N groups that differ (default 1)"),
    "diversity_penalty": ("X", "subtract from a token's log-probability for each time an earlier group chose it"),
    "no_repeat_ngram_size": ("N", "no N tokens in a row come twice, the prompt's included (default off)"),
}

# Why a flag of sampling cannot stand beside --beam-width.
_NOT_IN_BEAM_SEARCH = {
    "n": "a beam search has --num-return-sequences",
    **dict.fromkeys(("top_p", "top_k", "min_p", "seed"), "a beam search draws nothing"),
    "prompt_logprobs": "a beam search does not give them",
}


def add_sampling_arguments(parser: argparse.ArgumentParser, *, leave_out: Collection[str] = ()) -> None:
    """One flag per field. Values stay text here: `sampling_params` checks them."""
    group = parser.add_argument_group("sampling and stopping")
    hints = type_hints(SamplingParams)
    for field in fields(SamplingParams):
        if field.name in leave_out or field.name in _DECIDED_BY_COMMAND:
            continue
        metavar, text = _TEXTS[field.name]
        options: dict[str, Any] = {"dest": field.name, "help": text, "default": None}
        if hints[field.name] is bool:
            group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **options)
        else:
            if field.name == "repetition_detection":
                off: dict[str, Any] = {"action": "store_const", "const": _OFF, "help": argparse.SUPPRESS}
                group.add_argument(flag(f"no_{field.name}"), dest=field.name, **off)
            action = "append" if _READERS[hints[field.name]] in (_strings, _integers) else "store"
            group.add_argument(flag(field.name), action=action, metavar=metavar, **options)


def add_beam_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of BeamSearchParams that SamplingParams has not. `request_params` checks them."""
    group = parser.add_argument_group("beam search")
    for name, (metavar, text) in _BEAM_TEXTS.items():
        names = [flag(name), "--num-beams"] if name == "beam_width" else [flag(name)]
        group.add_argument(*names, dest=name, metavar=metavar, help=text, default=None)


def request_params(
    args: argparse.Namespace, recommended: Mapping[str, Any] | None = None
) -> SamplingParams | BeamSearchParams:
    """What the flags ask for, over what the model's files recommend (LLM.generation_config; None: not known yet).

    Raises InvalidRequestError naming the flag or field at fault.
    """
    given = [name for name in _BEAM_TEXTS if getattr(args, name) is not None]
    if "beam_width" in given:
        return _beam_search_params(args, recommended or {})
    if given:
        raise InvalidRequestError(flag(given[0]), "needs --beam-width")
    return sampling_params(args, recommended)


def refuse_for_machines(args: argparse.Namespace) -> None:
    """What is asked for and would not be shown. Raises InvalidRequestError."""
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(args, name) is not None:
            raise InvalidRequestError(flag(name), "is shown with --json only")
    if getattr(args, "detokenize", None) is False:
        raise InvalidRequestError("--no-detokenize", "leaves token ids, which are shown with --json only")


def _beam_search_params(args: argparse.Namespace, recommended: Mapping[str, Any]) -> BeamSearchParams:
    for name, reason in _NOT_IN_BEAM_SEARCH.items():
        if getattr(args, name, None) is not None:
            raise InvalidRequestError(flag(name), f"has no meaning with --beam-width: {reason}")
    of_model = {name: value for name, value in recommended.items() if name == "repetition_penalty"}
    return BeamSearchParams(**_BEAM_DEFAULTS | of_model | _given(args, BeamSearchParams))


def sampling_params(args: argparse.Namespace, recommended: Mapping[str, Any] | None = None) -> SamplingParams:
    """See `request_params`. A flag that the temperature leaves without effect is refused."""
    given = _given(args, SamplingParams)
    params = SamplingParams(**_DEFAULTS | _SAMPLING | dict(recommended or {}) | given)
    if not params.greedy:
        return params
    zero = "temperature 0" if "temperature" in given else "temperature 0, which the model's files ask for"
    for name in _OF_DRAWING:
        if name in given:
            raise InvalidRequestError(flag(name), f"has no effect at {zero}")
    if params.n > 1:
        raise InvalidRequestError("--n", f"all {params.n} outputs would be the same at {zero}")
    return params.but(**_OF_DRAWING)


def _given(args: argparse.Namespace, kind: type[SamplingParams | BeamSearchParams]) -> dict[str, Any]:
    """The values of the flags that were given."""
    hints = type_hints(kind)
    values: dict[str, Any] = {}
    for field in fields(kind):
        given = getattr(args, field.name, None)
        if given is not None:
            is_flag = isinstance(given, bool)
            values[field.name] = given if is_flag else _READERS[hints[field.name]](flag(field.name), given)
    return values


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidRequestError(name, f"must be an integer, not {shown(text)}") from None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidRequestError(name, f"must be a number, not {shown(text)}") from None


def _repetition(name: str, text: str) -> dict[str, Any] | None:
    return None if text == _OFF else _json_object(name, text)


def _early_stopping(name: str, text: str) -> bool | str:
    values: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
    if text.lower() not in values:
        raise InvalidRequestError(name, f"must be true, false or never, not {shown(text)}")
    return values[text.lower()]


def _strings(name: str, texts: list[str]) -> list[str]:
    return texts


def _integers(name: str, texts: list[str]) -> list[int]:
    return [_integer(name, part) for text in texts for part in text.split(",")]


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(name, f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(name, "must be a JSON object, which --help shows")
    return value


_READERS: dict[Any, Callable[[str, Any], Any]] = {
    int: _integer,
    int | None: _integer,
    float: _number,
    bool | str: _early_stopping,
    str | Sequence[str] | None: _strings,
    Sequence[str] | None: _strings,
    Sequence[int] | None: _integers,
    Mapping[int, float] | None: _json_object,
    RepetitionDetectionParams | Mapping[str, int] | None: _repetition,
    StructuredOutputsParams | Mapping[str, Any] | None: _json_object,
}
