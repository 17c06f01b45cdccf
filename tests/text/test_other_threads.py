"""A long text that is tokenised holds up no other thread."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from octavo.text.directory import tokenizer_from_directory
from octavo.text.gguf_vocab import tokenizer_from_gguf
from octavo.text.tokenizer import Tokenizer

from . import tiny


@pytest.fixture(params=["folder", "gguf"])
def tokenizer(request: pytest.FixtureRequest, tiny_llama_dir: Path) -> Tokenizer:
    if request.param == "folder":
        return tokenizer_from_directory(tiny_llama_dir)
    return tokenizer_from_gguf(tiny.byte_level("smollm")[1])


def test_other_threads_run(tokenizer: Tokenizer) -> None:
    """Without that, another thread runs when the call begins and when it returns, and never between."""
    text = "The whale is white, and the sea is old. " * 20_000
    begun, ended = threading.Event(), threading.Event()
    turns = 0

    def work() -> None:
        begun.set()
        tokenizer.encode(text)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    while not ended.is_set():
        turns += 1
        ended.wait(0.001)
    thread.join()
    assert turns > 20
