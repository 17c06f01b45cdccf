from __future__ import annotations

from pathlib import Path

import pytest

from octavo.formats import GGUFFile
from octavo.text.gguf_vocab import tokenizer_from_gguf
from octavo.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_path: Path) -> Tokenizer:
    with GGUFFile(smollm2_path) as file:
        return tokenizer_from_gguf(file.metadata)
