from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from octavo.formats import GGUFFile
from octavo.text.gguf_vocab import tokenizer_from_gguf
from octavo.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_path: Path) -> Mapping[str, Any]:
    return GGUFFile(smollm2_path).metadata


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: Mapping[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(smollm2_metadata)


@pytest.fixture(scope="session")
def gemma3_metadata(gemma3_path: Path) -> Mapping[str, Any]:
    return GGUFFile(gemma3_path).metadata


@pytest.fixture(scope="session")
def gemma3(gemma3_metadata: Mapping[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(gemma3_metadata)
