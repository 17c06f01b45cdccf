from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.coordinators.beam_models import make_model
from tests.models.tiny import oracle


@pytest.fixture(scope="session")
def one_torch_thread() -> Iterator[None]:
    """On models this small more threads only wait for one another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def beam_model(tmp_path_factory: pytest.TempPathFactory, one_torch_thread: None) -> Callable[..., Path]:
    """beam_model(variant, number of end tokens): a model folder, made once."""

    @cache
    def made(variant: str, num_ends: int = 3, **settings: Any) -> Path:
        return make_model(tmp_path_factory.mktemp("beams"), variant, num_ends, **settings)

    return made


@pytest.fixture(scope="session")
def beam_oracle(one_torch_thread: None) -> Callable[[Path], Any]:
    """transformers' model of a folder, loaded once."""
    return cache(oracle)
