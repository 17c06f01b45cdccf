"""Text through the doors of the library, with a SentencePiece tokenizer that puts a space before every text."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.async_llm import AsyncLLM
from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import InvalidRequestError
from tests.test_llm import check_idle

BEGINNING = "a whale is a"


@pytest.fixture(scope="module")
def llm(tiny_sentencepiece_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_sentencepiece_dir), max_num_seqs=8) as llm:
        yield llm
        check_idle(llm)


def whole_less_beginning(llm: LLM, text: str) -> list[int]:
    return llm.tokenizer.encode(BEGINNING + text)[len(llm.tokenizer.encode(BEGINNING)) :]


def test_sessions_put_no_spaces_between_pieces(llm: LLM) -> None:
    with llm.session() as s:
        s.extend(BEGINNING)
        result = s.select([" fish", " mammal"])
        for choice in result.choices:
            assert choice.token_ids == whole_less_beginning(llm, choice.text)
        assert len(result.choices[0].token_ids) == 1
        s.extend(" mammal")
        s.extend(" and a")
        assert s.token_ids == llm.tokenizer.encode(BEGINNING + " mammal and a")
        s.extend("nd then")  # across a border of tokens
        assert s.text == "<s> " + BEGINNING + " mammal and and then"


def test_a_token_cut_by_a_stop_string_leaves_no_space(llm: LLM) -> None:
    """What is left of the token goes on where it stood."""
    fish = whole_less_beginning(llm, " fish")
    params: dict[str, Any] = {"logit_bias": {fish[0]: 1e4}, "temperature": 0, "max_tokens": 8}
    with llm.session() as s:
        s.extend(BEGINNING)
        output = s.generate(**params, stop="sh")
        assert (output.text, output.stop_reason, output.token_ids) == (" fi", "sh", fish)
        assert s.text == f"<s> {BEGINNING} fi"


# --- tokens that the model has no row for ---


def prompts_with_pad(llm: LLM) -> dict[str, Callable[[], object]]:
    """Every door that takes text, given the text of such a token."""
    text = "hello<pad>"
    return {
        "generate": lambda: llm.generate(["hello", text]),
        "stream": lambda: llm.stream(text),
        "beam_search": lambda: llm.beam_search(text),
        "explain_cache": lambda: llm.explain_cache(text),
        "chat": lambda: llm.chat([{"role": "user", "content": text}]),
    }


@pytest.mark.parametrize("door", ["generate", "stream", "beam_search", "explain_cache", "chat"])
def test_a_prompt_with_a_token_without_a_row_is_refused_by_name(llm: LLM, door: str) -> None:
    pad = llm.model_config.vocab_size
    with pytest.raises(InvalidRequestError, match=rf"'<pad>', token {pad}, .* end at {pad - 1}") as caught:
        prompts_with_pad(llm)[door]()
    assert caught.value.field == {"chat": "messages", "generate": "prompts[1]"}.get(door, "prompt")


def test_sessions_refuse_them_too(llm: LLM) -> None:
    with llm.session() as s:
        for _ in range(2):  # at the start, and later
            with pytest.raises(InvalidRequestError, match=r"^prompt: holds '<pad>'"):
                s.extend("hello<pad>")
            s.extend("hello")
        with pytest.raises(InvalidRequestError, match=r"^choices\[1\]: holds '<pad>'"):
            s.select([" fish", "<pad>"])
        assert s.generate(max_tokens=2).token_ids


async def test_async_refuses_them_too(tiny_sentencepiece_dir: Path) -> None:
    llm = AsyncLLM(str(tiny_sentencepiece_dir), max_num_seqs=8)
    try:
        with pytest.raises(InvalidRequestError, match=r"^prompt: holds '<pad>'"):
            async for _ in llm.generate("hello<pad>"):
                pass
    finally:
        llm.close()


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_ids_that_the_user_gives_are_refused(llm: LLM, field: str) -> None:
    pad = llm.model_config.vocab_size
    with pytest.raises(InvalidRequestError, match=rf"^{field}: .*not {pad}"):
        llm.generate("hello", SamplingParams(**{field: {pad: 1.0} if field == "logit_bias" else [pad]}))


def test_bad_words_without_a_row_can_never_be_drawn(llm: LLM) -> None:
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 4}
    (free,) = llm.generate("hello", SamplingParams(**params))
    (output,) = llm.generate("hello", SamplingParams(**params, bad_words=["<pad>", "whale<pad>"]))
    assert output.outputs[0].token_ids == free.outputs[0].token_ids
    (beams,) = llm.beam_search("hello", BeamSearchParams(max_tokens=4, bad_words=["<pad>"]))
    assert beams.outputs[0].finish_reason == "length"


def test_end_tokens_without_a_row(tiny_sentencepiece_dir: Path, tmp_path: Path) -> None:
    """Only the others end an answer; `min_tokens` keeps them from being drawn."""
    folder = shutil.copytree(tiny_sentencepiece_dir, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5000, 9]}')
    with LLM(str(folder), max_num_seqs=8) as llm:
        assert llm.tokenizer.eos_token_ids == (2, 9, 5000)
        params = SamplingParams(temperature=0, min_tokens=3, max_tokens=8, logit_bias={9: 1e4})
        (output,) = llm.generate("hello", params)
        assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (4, "stop")
        (beams,) = llm.beam_search("hello", BeamSearchParams(beam_width=2, min_tokens=3, max_tokens=8))
        assert beams.outputs[0].finish_reason in ("stop", "length")


# --- words in every spelling ---


def test_bad_words_are_forbidden_without_a_space_too(llm: LLM) -> None:
    inside = llm.tokenizer.encode_inside("London")
    assert llm.tokenizer.spelling(inside) == "London" and len(inside) > 1
    params: dict[str, Any] = {"allowed_token_ids": inside, "n": 8, "max_tokens": 40, "seed": 1, "ignore_eos": True}
    (free,) = llm.generate(BEGINNING, SamplingParams(**params))
    assert any("London" in output.text for output in free.outputs)
    (held,) = llm.generate(BEGINNING, SamplingParams(**params, bad_words=["London"]))
    assert not any("London" in output.text for output in held.outputs)


def test_bad_words_after_a_space_and_at_the_start(llm: LLM) -> None:
    spaced = whole_less_beginning(llm, " London")
    assert len(spaced) == 1
    for word in ("London", " London"):
        (output,) = llm.generate(
            BEGINNING, SamplingParams(logit_bias={spaced[0]: 1e4}, temperature=0, bad_words=[word])
        )
        assert spaced[0] not in output.outputs[0].token_ids


# --- a token alone as text ---


def test_log_probabilities_tell_a_leading_space(llm: LLM) -> None:
    (spaced,) = whole_less_beginning(llm, " true")
    params = SamplingParams(logprobs=5, prompt_logprobs=0, max_tokens=1, logit_bias={spaced: 1e4}, temperature=0)
    (output,) = llm.generate("true", params)
    entry = output.outputs[0].logprobs[0][spaced]  # type: ignore[index]
    assert (entry.decoded_token, entry.bytes) == (" true", list(b" true"))
    assert output.prompt_logprobs[-1][output.prompt_token_ids[-1]].decoded_token == " true"  # type: ignore[index]
    with llm.session() as s:
        s.extend(BEGINNING)
        ((_, entry),) = s.generate(params.but(prompt_logprobs=None, logprobs=0)).logprobs[0].items()  # type: ignore[index]
        assert entry.decoded_token == " true"
        assert s.select([{"prompt_token_ids": [spaced]}]).best.text == " true"


def test_log_probabilities_of_parts_of_a_character_have_its_bytes(llm: LLM) -> None:
    parts = llm.tokenizer.encode("\u6771", add_special_tokens=False)[1:]
    assert len(parts) == 3
    (output,) = llm.generate({"prompt_token_ids": [1, *parts]}, SamplingParams(prompt_logprobs=0, max_tokens=1))
    entries = [row[token_id] for row, token_id in zip(output.prompt_logprobs[1:], parts, strict=True)]  # type: ignore[index]
    assert [entry.decoded_token for entry in entries] == ["\ufffd"] * 3
    assert bytes(byte for entry in entries for byte in entry.bytes or ()) == "\u6771".encode()


# --- special tokens as stop strings ---


@pytest.mark.parametrize("include", [False, True])
def test_a_special_token_stops_where_it_is_not_shown(llm: LLM, include: bool) -> None:
    """Also the model's end token, where that is ignored."""
    for token, token_id in (("<unk>", 0), ("</s>", 2)):
        params = SamplingParams(
            stop=token,
            logit_bias={token_id: 1e4},
            temperature=0,
            ignore_eos=True,
            max_tokens=8,
            include_stop_str_in_output=include,
        )
        (output,) = llm.generate("hello", params)
        (one,) = output.outputs
        assert (one.token_ids, one.finish_reason, one.stop_reason) == ([token_id], "stop", token)
        assert one.text == (token if include else "")
        with llm.session() as s:
            s.extend("hello")
            before = s.token_ids
            s.generate(params)
            assert s.token_ids == before + ([token_id] if include else [])
        (beams,) = llm.beam_search("hello", BeamSearchParams(beam_width=2, stop=token, logit_bias={token_id: 1e4}))
        assert len(beams.outputs[0].token_ids) == 1


def test_a_stop_string_that_could_never_be_found_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"^stop: 'x</s>' holds the special token </s>"):
        llm.generate("hello", SamplingParams(stop=["ok", "x</s>"]))
    params = SamplingParams(
        stop=["x</s>"], skip_special_tokens=False, logit_bias={2: 1e4}, ignore_eos=True, max_tokens=2, temperature=0
    )
    (output,) = llm.generate("hello", params)
    assert output.outputs[0].text == "</s></s>"


# --- named chat templates ---


async def test_tools_reach_the_template_for_them(llm: LLM, tiny_sentencepiece_dir: Path) -> None:
    messages, tools = [{"role": "user", "content": "hello"}], [{"name": "clock"}]
    params = SamplingParams(max_tokens=1, temperature=0)
    assert llm.chat(messages, params)[0].prompt == "hello"
    assert llm.chat(messages, params, tools=tools)[0].prompt == "clock: hello"
    assert llm.chat(messages, params, tools=tools, chat_template="default")[0].prompt == "hello"
    assert llm.chat_prompt(messages, tools=tools)["prompt"] == "clock: hello"
    with pytest.raises(InvalidRequestError, match=r"^chat_template: 'rag' is neither .* \('default', 'tool_use'\)"):
        llm.chat(messages, params, chat_template="rag")
    other = AsyncLLM(str(tiny_sentencepiece_dir), max_num_seqs=8)
    try:
        async for output in other.chat(messages, params, tools=tools):
            assert output.prompt == "clock: hello"
    finally:
        other.close()
