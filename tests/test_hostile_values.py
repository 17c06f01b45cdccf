"""Values of the caller's own classes, at every door: read once, and a refusal that names the field where that fails."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
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
from octavo.core.params import RepetitionDetectionParams


class Str(str):
    """Says something else about itself each way it is asked."""

    def __hash__(self) -> int:
        raise RuntimeError("no hash")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__
    __len__ = __iter__ = encode = __bool__ = __hash__  # type: ignore[assignment]


class Changing:
    """A token id when it is checked, another number when it is used."""

    def __init__(self, *values: int) -> None:
        self._values = itertools.chain(values, itertools.repeat(10**9))

    def __index__(self) -> int:
        return next(self._values)


class Raising:
    def __index__(self) -> int:
        raise RuntimeError("no number")

    __float__ = __iter__ = __len__ = __repr__ = __index__  # type: ignore[assignment]


class Int(int):
    def __index__(self) -> int:
        raise RuntimeError("no number")

    __hash__ = __repr__ = __index__  # type: ignore[assignment]


class Endless(Mapping[Any, Any]):
    def __getitem__(self, key: Any) -> Any:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return itertools.count()

    def __len__(self) -> int:
        return 1


class NoItems(Endless):
    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("no items")


class Lying:
    """Passes for anything that isinstance is asked about; what it is used for then fails."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        return self._kind

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")

    __eq__ = __iter__ = __len__ = __bool__  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class Faceless:
    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no class")


class Key(str):
    """Is taken for a key of prompts where these are looked up, and then fails."""

    def __hash__(self) -> int:
        return hash("prompt")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")


class List(list[Any]):
    def __len__(self) -> int:
        raise RuntimeError("no length")

    __bool__ = __len__  # type: ignore[assignment]


class Array:
    def tolist(self) -> list[int]:
        raise RuntimeError("no list")


class PathLike(os.PathLike[str]):
    def __fspath__(self) -> str:
        raise RuntimeError("no path")


class Sampling(SamplingParams):
    """Does without the checks."""

    def __post_init__(self) -> None: ...


class Beams(BeamSearchParams):
    def __post_init__(self) -> None: ...


class Repetition(RepetitionDetectionParams):
    def __post_init__(self) -> None: ...


def shared() -> list[Any]:
    """Small in memory, 2 ** 60 values when it is written out."""
    value: list[Any] = [1]
    for _ in range(60):
        value = [value, value]
    return value


HOSTILE: list[Callable[[], Any]] = [
    lambda: Str("a"), lambda: Str(""), lambda: [Str("a")], Raising, lambda: [Raising()], lambda: Changing(1),
    lambda: [Changing(1)], lambda: Int(3), lambda: [Int(3)], itertools.count, lambda: itertools.repeat("a"), Endless,
    NoItems, shared, lambda: {"9" * 5000: 1}, lambda: {"1" * 19: 1}, lambda: {Changing(2): 1.0},
    lambda: {1: Raising()}, lambda: 10**5000, lambda: [10**5000], lambda: -(10**5000), lambda: float("nan"),
    lambda: [float("inf")], lambda: np.float64("nan"), lambda: np.array([1, 2]), lambda: np.array(["a"]),
    lambda: np.datetime64("2024"), lambda: b"a", lambda: "\ud800", lambda: ["\ud800"], lambda: "\0", lambda: True,
    lambda: None, object, dict, lambda: [[]], lambda: ..., lambda: int, lambda: 1j, lambda: range(10**9),
    lambda: "a" * 10**5, lambda: ["a"] * 10**5,
    *(lambda kind=kind: Lying(kind) for kind in (bool, int, float, str, list, dict, SamplingParams, BeamSearchParams)),
    Faceless, lambda: [Faceless()], lambda: {"prompt": Faceless()}, lambda: {Key("x"): 1}, lambda: {Key("prompt"): "a"},
    lambda: List([1]), lambda: List([{"role": "user", "content": "a"}]), Array, lambda: {"prompt_token_ids": Array()},
    lambda: Sampling(max_tokens="x", stop=Raising()), lambda: Beams(beam_width="x", max_tokens=Raising()),
    lambda: Repetition(max_pattern_size=Int(3), min_pattern_size="x", min_count=None), PathLike,
]  # fmt: skip
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
    assert len(FLAGS) == 6
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
