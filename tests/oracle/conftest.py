from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models.probe import Probe
from tests.oracle.oracle import load_model


@pytest.fixture(scope="module")
def smollm2_probe(smollm2_path: Path) -> Probe:
    return Probe(smollm2_path)


@pytest.fixture(scope="module")
def smollm2_oracle(smollm2_path: Path) -> Any:
    return load_model(smollm2_path)


@pytest.fixture(scope="module")
def gemma3_probe(gemma3_path: Path) -> Probe:
    return Probe(gemma3_path)


@pytest.fixture(scope="module")
def gemma3_oracle(gemma3_path: Path) -> Any:
    return load_model(gemma3_path)
