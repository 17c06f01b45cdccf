"""What a model's files recommend for sampling: read typed, and what cannot be used is told and left out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import pytest

from octavo.core.errors import ModelFormatError
from octavo.formats import GGUFFile
from octavo.loading.generation_config import generation_config_of

ALL = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.05}


def folder_with(folder: Path, **stored: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (ALL | {"do_sample": True, "eos_token_id": 2, "max_new_tokens": 2048, "temperature_last": False}, ALL),
        ({"_from_model_config": True, "eos_token_id": [1, 2]}, {}),
        ({"temperature": 1, "top_p": None, "top_k": -1}, {"temperature": 1, "top_k": -1}),
        (ALL | {"do_sample": False}, {"temperature": 0.0, "repetition_penalty": 1.05}),
        ({"do_sample": None, "top_k": 5}, {"top_k": 5}),
    ],
)
def test_folders(tmp_path: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    assert generation_config_of(folder_with(tmp_path, **stored), None) == expected


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert generation_config_of(tmp_path, None) == {}


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("temperature", -1, "must be at least 0"),
        ("temperature", "hot", "must be a number"),
        ("top_p", 0, "must be more than 0"),
        ("top_p", True, "must be a number"),
        ("top_k", 2.5, "must be an integer"),
        ("top_k", -3, "must be between -1"),
        ("min_p", 1.5, "must be at least 0 and at most 1"),
        ("repetition_penalty", 0, "must be at least 0.001"),
        ("do_sample", "no", "must be true or false"),
    ],
)
def test_what_cannot_be_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: Any, problem: str
) -> None:
    """Guards a model that cannot be used because of its advice, and advice that is dropped without a word."""
    folder = folder_with(tmp_path, **(ALL | {name: value}))
    with caplog.at_level(logging.WARNING, "octavo"):
        assert generation_config_of(folder, None) == {key: known for key, known in ALL.items() if key != name}
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith(f"{folder}: generation_config.json: {name}: {problem}") and "it is not used" in said


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_files_that_are_no_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"generation_config\.json"):
        generation_config_of(tmp_path, None)


def test_gguf_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As llama.cpp's own package writes them; 0.95 comes back as 0.95, though the file holds a float32."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_sampling_temp(0.6)
    writer.add_sampling_top_k(20)
    writer.add_sampling_top_p(0.95)
    writer.add_sampling_min_p(2.0)  # no probability
    writer.add_sampling_penalty_repeat(1.05)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(path) as file, caplog.at_level(logging.WARNING, "octavo"):
        found = generation_config_of(path, file.metadata)
    assert found == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: general.sampling.min_p: must be at least 0 and at most 1, not 2.0; it is not used"
    ]
    assert generation_config_of(path, {"general.architecture": "llama"}) == {}
