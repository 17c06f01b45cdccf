"""Backends that register themselves: who is chosen, who refuses and why, and that one more needs nobody's help."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from octavo import LLM, SamplingParams
from octavo.backends.reference import ReferenceOps
from octavo.backends.registry import (
    Backend,
    BackendRefusedError,
    backend,
    backends,
    register,
    unregister,
)
from octavo.build import make_ops
from octavo.cli.machine import refusals
from octavo.config import EngineConfig
from octavo.core.errors import ConfigError
from octavo.loading.hf_config import config_from_folder

if TYPE_CHECKING:
    from octavo.backends.registry import BackendSettings

NAME = "only-in-this-test"


class Counting(ReferenceOps):
    name = NAME
    linears = 0

    def linear(self, x, weight, residual=None):  # type: ignore[no-untyped-def]
        Counting.linears += 1
        return super().linear(x, weight, residual)


def make(settings: BackendSettings) -> Counting:
    if settings.threads == 7:
        raise BackendRefusedError("seven threads are too many")
    return Counting()


@pytest.fixture
def registered() -> Iterator[None]:
    register(Backend(NAME, f"{__name__}:make", ("auto",), ("auto",), (16,), settings=("threads",)))
    yield
    unregister(NAME)


@pytest.mark.usefixtures("registered")
def test_one_more_backend_needs_nobodys_help(tiny_llama_dir: Path) -> None:
    """Guards against names of backends in the code that builds an engine."""
    prompt, params = {"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=3, temperature=0, detokenize=False)
    with LLM(str(tiny_llama_dir), backend=NAME) as llm:
        (output,) = llm.generate(prompt, params)
    with LLM(str(tiny_llama_dir), backend="reference") as llm:
        (expected,) = llm.generate(prompt, params)
    assert Counting.linears > 0
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids


@pytest.mark.usefixtures("registered")
def test_refusals_are_told(tiny_gemma3_dir: Path) -> None:
    model = config_from_folder(tiny_gemma3_dir)
    with pytest.raises(ConfigError) as caught:
        make_ops(EngineConfig(backend=NAME, threads=7), model)
    assert str(caught.value) == (
        f"backend: none fits; {NAME}: seven threads are too many. --backend reference runs every model, slowly"
    )
    with pytest.raises(ConfigError, match=f"{NAME}: block_size 64 is of the cpu and the reference backend"):
        make_ops(EngineConfig(backend=NAME, block_size=64), model)
    assert refusals(EngineConfig(threads=7), model) == {
        "cpu": None,
        "reference": None,
        NAME: "seven threads are too many",
    }


def test_a_name_that_nobody_registered() -> None:
    with pytest.raises(ConfigError, match="backend: must be one of auto, cpu, reference, not 'only-in-this-test'"):
        EngineConfig(backend=NAME)


def test_auto_takes_the_first_that_can(tiny_gemma3_dir: Path) -> None:
    model = config_from_folder(tiny_gemma3_dir)
    assert [one.name for one in backends()] == ["cpu", "reference"]
    assert make_ops(EngineConfig(), model).name == "cpu"
    assert make_ops(EngineConfig(compute_dtype="float64"), model).name == "reference"
    with pytest.raises(ConfigError) as caught:
        make_ops(EngineConfig(compute_dtype="float64", kv_cache_dtype="int8"), model)
    assert str(caught.value) == (
        "backend: none fits; cpu: compute_dtype float64 is of the reference backend; "
        "reference: kv_cache_dtype int8 is of the cpu backend"
    )


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_what_a_backend_says_it_can_do_it_can(name: str, tiny_llama_dir: Path) -> None:
    """Guards against a list of types that nobody holds against the code."""
    one = backend(name)
    for compute in one.compute_dtypes:
        for kv in one.kv_cache_dtypes:
            for size in one.block_sizes:
                ops = one.make(EngineConfig(backend=name, compute_dtype=compute, kv_cache_dtype=kv, block_size=size))
                assert ops.name == name
