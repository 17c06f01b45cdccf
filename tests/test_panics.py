"""A model whose tokenizer panics on some texts, wherever such a text comes from: the one who asked is told, the engine
goes on, and so do the others.

The panics are the library's own. What would refuse such a file when it is read is left out here: it may miss others.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, AsyncLLM, SamplingParams
from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import InvalidRequestError, ModelFormatError
from octavo.text import directory, tokenizer_spec

# A table of characters that ends before that of "~": looking this one up is out of bounds.
_TABLE = struct.pack("<126I", *[0] * 126)
CHARSMAP = base64.b64encode(struct.pack("<I", len(_TABLE)) + _TABLE + b"x\0").decode()
BAD = "a~"


@pytest.fixture(scope="module")
def folder(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last token of the vocabulary is one that the tokenizer cannot encode, and can decode."""
    folder = tmp_path_factory.mktemp("panics")
    shutil.copytree(tiny_llama_dir, folder, dirs_exist_ok=True)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}
    last = "".join(spec["model"]["merges"][-1])
    spec["model"]["merges"][-1] = list(BAD)
    spec["model"]["vocab"][BAD] = spec["model"]["vocab"].pop(last)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture(scope="module")
def token(folder: Path) -> int:
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"][BAD]


@pytest.fixture(scope="module")
def unchecked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_spec.TokenizerSpec, "_charsmap", lambda *_: None)
        patch.setattr(directory, "_PROBES", ("fine",))
        yield


SETTINGS: dict[str, Any] = {"backend": "reference", "max_model_len": 128, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def llm(folder: Path, unchecked: None) -> Iterator[LLM]:
    with LLM(str(folder), **SETTINGS) as llm:
        yield llm


GREEDY = SamplingParams(temperature=0, max_tokens=4)


def test_the_file_is_refused_when_it_is_read(folder: Path) -> None:
    with pytest.raises(ModelFormatError, match="precompiled_charsmap"):
        directory.tokenizer_from_directory(folder)


CALLS: dict[str, tuple[str, Callable[[LLM], Any]]] = {
    "generate": ("prompt", lambda llm: llm.generate("x" + BAD, GREEDY)),
    "generate with others": ("prompts[1]", lambda llm: llm.generate(["fine", BAD], GREEDY)),
    "stream": ("prompt", lambda llm: llm.stream(BAD, GREEDY)),
    "beam_search": ("prompt", lambda llm: llm.beam_search(BAD, BeamSearchParams(beam_width=2))),
    "bad_words": ("bad_words", lambda llm: llm.generate("fine", SamplingParams(bad_words=[BAD]))),
    "chat": ("messages", lambda llm: llm.chat([{"role": "user", "content": BAD}], GREEDY)),
    "explain_cache": ("prompt", lambda llm: llm.explain_cache(BAD)),
}


@pytest.mark.parametrize("name", CALLS)
def test_texts_of_requests(llm: LLM, name: str) -> None:
    field, call = CALLS[name]
    with pytest.raises(
        InvalidRequestError, match=f"^{re.escape(field)}: this model's tokenizer fails on the text"
    ) as caught:
        call(llm)
    assert caught.value.field == field
    assert llm.generate("fine", GREEDY)[0].finished


def test_tokens_of_outputs(llm: LLM, token: int) -> None:
    """Decoding, stop strings and log-probabilities use no part of the library that panics."""
    params = GREEDY.but(allowed_token_ids=[token], logprobs=2, stop=["~a"])
    (output,) = llm.generate("fine", params)
    assert output.outputs[0].text == "a" and output.outputs[0].stop_reason == "~a"
    assert output.outputs[0].logprobs is not None
    assert output.outputs[0].logprobs[0][token].decoded_token == BAD


def test_sessions(llm: LLM, token: int) -> None:
    """What a stop string leaves of a token is encoded in the engine's thread, and fails there."""
    with llm.session() as session, llm.session() as other:
        for call in (session.extend, lambda text: session.select([text, "b"])):
            session.truncate(0)
            session.extend("fine")
            with pytest.raises(InvalidRequestError, match="tokenizer fails on the text"):
                call(BAD)
        session.extend({"prompt_token_ids": [token]})
        before = session.token_ids
        with pytest.raises(InvalidRequestError, match="tokenizer fails on the text"):
            session.generate(GREEDY.but(allowed_token_ids=[token], stop=["~"]))
        assert session.token_ids == before
        other.extend("fine")
        assert other.generate(GREEDY).token_ids
        assert session.generate(GREEDY).token_ids
    assert llm.generate("fine", GREEDY)[0].finished


async def test_asyncio(folder: Path, token: int, unchecked: None) -> None:
    async with AsyncLLM(str(folder), **SETTINGS) as llm:

        async def answer(prompt: Any) -> Any:
            return [output async for output in llm.generate(prompt, GREEDY.but(logprobs=1))][-1]

        results = await asyncio.gather(
            answer("fine"), answer(BAD), answer({"prompt_token_ids": [token]}), return_exceptions=True
        )
        assert isinstance(results[1], InvalidRequestError)
        assert results[0].finished and results[2].finished
        async with llm.session() as session:
            await session.extend({"prompt_token_ids": [token]})
            with pytest.raises(InvalidRequestError):
                await session.generate(GREEDY.but(allowed_token_ids=[token], stop=["~"]))
            assert (await session.generate(GREEDY)).token_ids
