"""A short run of each fuzzer, with a seed; `make fuzz` is a long one."""

from __future__ import annotations

import pytest

from .__main__ import run


@pytest.mark.parametrize(
    ("name", "rounds"),
    [("templates", 400), ("tokenizer_files", 250), ("parameters", 8000), ("gguf_models", 400), ("model_folders", 400)],
)
def test_fuzzer(name: str, rounds: int) -> None:
    assert run(name, seed=1, rounds=rounds) == (rounds, [])
