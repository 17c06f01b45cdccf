"""A short run of each fuzzer, with a seed, all together about a minute; `make fuzz` is a long one."""

from __future__ import annotations

import pytest

from .__main__ import run


@pytest.mark.parametrize(
    ("name", "rounds"),
    [
        ("templates", 1100),
        ("tokenizer_files", 2500),
        ("parameters", 80_000),
        ("gguf_models", 2000),
        ("model_folders", 1700),
    ],
)
def test_fuzzer(name: str, rounds: int) -> None:
    assert run(name, seed=1, rounds=rounds) == (rounds, [])
