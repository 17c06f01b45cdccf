"""Values of the caller's own classes, at every door: read once, and a refusal that names the field where that fails."""

from __future__ import annotations

import subprocess
import sys
from array import array
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import LLM, AsyncLLM, SamplingParams
from octavo.config import EngineConfig
from octavo.core import values
from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import ConfigError, InvalidRequestError, OctavoError
from tests.hostile import HOSTILE, Changing, Faceless, Lying, Str

MAKERS = range(len(HOSTILE))


@pytest.mark.parametrize("kind", [SamplingParams, BeamSearchParams])
@pytest.mark.parametrize("number", MAKERS)
def test_parameters(kind: type, number: int) -> None:
    for field in fields(kind):
        if not field.init:
            continue
        try:
            params = kind(**{field.name: HOSTILE[number]()})
        except InvalidRequestError as error:
            assert len(str(error)) < 1000
            continue
        repr(params), params.but(), params == kind()  # what is kept is plain


def test_settings() -> None:
    for field in fields(EngineConfig):
        for make in HOSTILE:
            try:
                repr(EngineConfig.resolve({field.name: make()}, {}))
            except ConfigError as error:
                assert len(str(error)) < 1000
    assert type(EngineConfig(backend=Str("auto")).backend) is str


@pytest.fixture(scope="module")
def llm(tiny_llama_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama_dir), backend="reference", max_model_len=64, max_num_seqs=4) as llm:
        yield llm


ONE = SamplingParams(temperature=0, max_tokens=1)
MESSAGES = [{"role": "user", "content": "hi"}]
TEMPLATE = "{{ messages[0].content }}{{ x | tojson if x is defined }}"
DOORS: dict[str, Callable[[LLM, Any], Any]] = {
    "prompt": lambda llm, value: llm.generate([value], ONE),
    "prompts": lambda llm, value: llm.generate(value, ONE),
    "text": lambda llm, value: llm.generate({"prompt": value}, ONE),
    "token ids": lambda llm, value: llm.generate({"prompt_token_ids": value}, ONE),
    "token ids and text": lambda llm, value: llm.generate({"prompt": value, "prompt_token_ids": [1]}, ONE),
    "salt": lambda llm, value: llm.generate({"prompt": "a", "cache_salt": value}, ONE),
    "sampling_params": lambda llm, value: llm.generate("a", value),
    "stop_token_ids": lambda llm, value: llm.generate("a", ONE.but(stop_token_ids=value)),
    "allowed_token_ids": lambda llm, value: llm.generate("a", ONE.but(allowed_token_ids=value)),
    "logit_bias": lambda llm, value: llm.generate("a", ONE.but(logit_bias=value)),
    "bad_words": lambda llm, value: llm.generate("a", ONE.but(bad_words=value)),
    "stop": lambda llm, value: llm.generate("a", ONE.but(stop=value)),
    "priority": lambda llm, value: llm.generate("a", ONE, priority=value),
    "use_tqdm": lambda llm, value: llm.generate("a", ONE, use_tqdm=value),
    "params": lambda llm, value: llm.beam_search("a", value),
    "stream": lambda llm, value: list(llm.stream("a", value)),
    "repetition_detection": lambda llm, value: llm.generate("a", ONE.but(repetition_detection=value)),
    "conversations": lambda llm, value: llm.chat(value, ONE, chat_template=TEMPLATE),
    "add_generation_prompt": lambda llm, value: llm.chat(
        MESSAGES, ONE, chat_template=TEMPLATE, add_generation_prompt=value
    ),
    "continue_final_message": lambda llm, value: llm.chat_prompt(
        MESSAGES, chat_template=TEMPLATE, continue_final_message=value
    ),
    "request_id": lambda llm, value: list(llm.stream("a", ONE, value)),
    "messages": lambda llm, value: llm.chat_prompt(value, chat_template=TEMPLATE),
    "message": lambda llm, value: llm.chat_prompt([value], chat_template=TEMPLATE),
    "role": lambda llm, value: llm.chat_prompt([{"role": value, "content": "a"}], chat_template=TEMPLATE),
    "content": lambda llm, value: llm.chat_prompt([{"role": "user", "content": value}], chat_template=TEMPLATE),
    "extra": lambda llm, value: llm.chat_prompt([MESSAGES[0] | {"x": value}], chat_template=TEMPLATE),
    "tools": lambda llm, value: llm.chat_prompt(MESSAGES, chat_template=TEMPLATE, tools=value),
    "tool": lambda llm, value: llm.chat_prompt(MESSAGES, chat_template=TEMPLATE, tools=[value]),
    "documents": lambda llm, value: llm.chat_prompt(MESSAGES, chat_template=TEMPLATE, documents=value),
    "variable": lambda llm, value: llm.chat_prompt(MESSAGES, chat_template=TEMPLATE, x=value),
    "variables": lambda llm, value: llm.chat(MESSAGES, ONE, chat_template=TEMPLATE, chat_template_kwargs=value),
    "template": lambda llm, value: llm.chat_prompt(MESSAGES, chat_template=value),
    "explain_cache": lambda llm, value: llm.explain_cache(value),
    "session's seed": lambda llm, value: llm.session(seed=value).close(),
    "session's salt": lambda llm, value: llm.session(cache_salt=value).close(),
    "session's priority": lambda llm, value: llm.session(priority=value).close(),
    "extend": lambda llm, value: in_session(llm, lambda session: session.extend(value)),
    "fork": lambda llm, value: in_session(llm, lambda session: session.fork(value)),
    "truncate": lambda llm, value: in_session(llm, lambda session: session.truncate(value)),
    "select": lambda llm, value: in_session(llm, lambda session: session.select(value)),
    "choice": lambda llm, value: in_session(llm, lambda session: session.select([value])),
    "by": lambda llm, value: in_session(llm, lambda session: session.select(["a"], by=value)),
    "select's extend": lambda llm, value: in_session(llm, lambda session: session.select(["a"], extend=value)),
    "generate": lambda llm, value: in_session(llm, lambda session: session.generate(value)),
    "branches": lambda llm, value: in_session(llm, lambda session: session.generate_all(value, ONE)),
    "each": lambda llm, value: in_session(llm, lambda session: session.generate_all([session], value)),
}


def in_session(llm: LLM, call: Callable[[Any], Any]) -> None:
    with llm.session() as session:
        session.extend("hi")
        call(session)


@pytest.mark.parametrize("door", DOORS)
def test_doors(llm: LLM, door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "MAX_ITEMS", 1 << 17)  # what has no end comes to it sooner
    refused = 0
    for make in HOSTILE:
        try:
            value = make()
            if door != "prompts" or type(value) not in (list, range) or len(value) < 100:  # those are welcome
                DOORS[door](llm, value)
        except OctavoError as error:
            refused += 1
            assert len(str(error)) < 5000
    assert refused > 10
    assert llm.generate("hi", ONE)[0].finished


def test_what_is_checked_is_what_is_used(llm: LLM) -> None:
    (output,) = llm.generate({"prompt_token_ids": [Changing(1), Changing(2)]}, ONE)
    assert output.prompt_token_ids == [1, 2]
    assert SamplingParams(stop_token_ids=[Changing(7)]).stop_token_ids == (7,)
    assert SamplingParams(seed=Changing(7), top_k=Changing(3)).seed == 7


@pytest.mark.parametrize(
    "path", ["/proc/self/mem", "/proc/1/mem", "/dev/zero", "/dev/null", "a\0b", "\udc80", "x" * 5000]
)
def test_names_that_lead_nowhere(path: str) -> None:
    from octavo.hub import resolve_model

    with pytest.raises(OctavoError):
        resolve_model(path)


def test_a_folder_with_a_zero_byte(tiny_llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"^kv_offload_dir"):
        LLM(str(tiny_llama_dir), backend="reference", kv_offload_dir="a\0b")


def test_pull_says_what_is_wrong() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "octavo", "pull", "/proc/self/mem"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot be read" in done.stderr and "bug" not in done.stderr


FLAGS = [field.name for field in fields(SamplingParams) if field.default in (True, False) and field.type == "bool"]


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_are_no_code(flag: str) -> None:
    """They are looked at in the engine's thread."""
    assert len(FLAGS) == 7
    with pytest.raises(InvalidRequestError, match=flag):
        SamplingParams(**{flag: Lying(bool)})


async def test_what_is_aborted(tiny_llama_dir: Path) -> None:
    """An id is looked up in the engine's thread, where a hash that never comes back would be waited for by all."""
    with LLM(str(tiny_llama_dir), backend="reference", max_model_len=64) as llm:
        fine = llm.generate("hi", ONE)[0].outputs[0].token_ids
    llm = AsyncLLM(str(tiny_llama_dir), backend="reference", max_model_len=64)
    try:
        await llm.abort(Str("nobody"))
        for value in ([1], None, 1.5, Lying(str), Faceless()):
            with pytest.raises(InvalidRequestError, match="request_id"):
                await llm.abort(value)  # type: ignore[arg-type]
        async for output in llm.generate("hi", ONE):
            last = output
        assert last.outputs[0].token_ids == fine
    finally:
        llm.close()


def test_what_is_welcome(llm: LLM) -> None:
    """NumPy's numbers and truths, None where there is a default, mappings and lists of any make."""
    params = SamplingParams(
        temperature=np.float32(0), max_tokens=np.int64(2), ignore_eos=np.bool_(True), stop_token_ids=np.array([3, 4])
    )
    assert params == SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, stop_token_ids=[3, 4])
    assert type(params.ignore_eos) is bool
    for ids in ([1, 2], (1, 2), range(1, 3), np.array([1, 2]), deque([1, 2]), array("i", [1, 2])):
        (output,) = llm.generate(UserDict(prompt_token_ids=ids), params)
        assert output.prompt_token_ids == [1, 2]
    for flag in (None, True, np.bool_(True)):
        written = llm.chat_prompt((OrderedDict(MESSAGES[0]),), chat_template=TEMPLATE, add_generation_prompt=flag)
        assert written["prompt"] == "hi"
    in_session(llm, lambda session: session.select(("a", "b"), extend=np.bool_(False)))


def test_conversations_are_bounded_by_the_context(llm: LLM) -> None:
    """Before a template sees them: many may wait for their turn, each with its own."""
    llm.chat_prompt([{"role": "user", "content": "a" * ((1 << 20) - 20)}], chat_template="{{ 'short' }}")
    with pytest.raises(InvalidRequestError, match=rf"^messages\[0\]: .*more than {1 << 20} characters"):
        llm.chat_prompt([{"role": "user", "content": "a" * (1 << 20)}], chat_template="{{ 'short' }}")
