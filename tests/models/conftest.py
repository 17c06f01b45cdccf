from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.models.tiny import make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a variant, made once. Not to be changed: a test that edits one makes its own."""
    return cache(lambda variant: make(tmp_path_factory.mktemp(variant), variant))
