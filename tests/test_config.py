"""Variables that nobody knows: told, with the nearest that is known, once, and without effect."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from octavo import LLM, EngineConfig, config


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_told", set())


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "octavo.config"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("OCTAVO_MAX_NUM_SEQ", "; did you mean OCTAVO_MAX_NUM_SEQS?"),
        ("OCTAVO_BLOCKSIZE", "; did you mean OCTAVO_BLOCK_SIZE?"),
        ("OCTAVO_HOMEDIR", "; did you mean OCTAVO_HOME?"),
        ("OCTAVO_LOGLEVEL", "; did you mean OCTAVO_LOG_LEVEL?"),
        ("OCTAVO_PORT", ""),  # Kubernetes sets it in every container, where there is a service of this name
    ],
)
def test_unknown_variables(caplog: pytest.LogCaptureFixture, name: str, hint: str) -> None:
    with caplog.at_level(logging.WARNING, "octavo"):
        assert EngineConfig.resolve({}, {name: "1"}) == EngineConfig()
        EngineConfig.resolve({}, {name: "1"})
    assert len(told(caplog)) == 1
    assert told(caplog)[0].startswith(f"{name}: no such variable is known, and it has no effect") and (
        told(caplog)[0].endswith(hint or "no effect")
    )


def test_known_variables_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    environ = {
        "OCTAVO_MAX_NUM_SEQS": "7",
        "OCTAVO_HOME": "/x",
        "OCTAVO_LOG_LEVEL": "info",
        "PATH": "x",
        "XOCTAVO_A": "",
    }
    with caplog.at_level(logging.WARNING, "octavo"):
        assert EngineConfig.resolve({}, environ).max_num_seqs == 7
    assert told(caplog) == []


def test_the_library_tells_too(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OCTAVO_THREAD", "2")
    with caplog.at_level(logging.WARNING, "octavo"), LLM(str(tiny_llama_dir)):
        pass
    assert [line.split(":")[0] for line in told(caplog)] == ["OCTAVO_THREAD"]
