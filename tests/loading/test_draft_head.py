"""A head's file is refused by the name of what is wrong with it."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from octavo import LLM, ModelFormatError, ModelNotFoundError
from octavo.loading.draft_head import FORMAT, as_q8_0, save_head
from tests.heads import random_head, raw

KIND = {"format": FORMAT}


def opened(model: Path, head: Path) -> LLM:
    return LLM(str(model), max_model_len=64, speculative_config={"method": "draft_head", "model": str(head)})


def arrays(**changed: Any) -> dict[str, Any]:
    found: dict[str, Any] = {f"{name}.weight": one.astype(np.float16) for name, one in random_head(64, 32).items()}
    found["draft_vocab"] = np.arange(10, dtype=np.int32)
    found |= changed
    return {name: one for name, one in found.items() if one is not None}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"down.weight": None}, "down.weight: tensor is missing"),
    "integers": ({"down.weight": np.zeros((64, 32), np.int8)}, "down.weight: is I8; it must be of a floating type"),
    "vector": ({"down.weight": np.zeros(64, np.float16)}, r"down.weight: has shape \(64,\); it is \[64, any size\]"),
    "empty": ({"down.weight": np.zeros((64, 0), np.float16)}, r"down.weight: has shape \(64, 0\)"),
    "other model": ({"down.weight": np.zeros((96, 32), np.float16)}, r"down.weight: has shape \(96, 32\); for this"),
    "other cell": ({"from_state.weight": np.zeros((32, 64), np.float16)}, "from_state.weight: has shape"),
    "norm": ({"token_norm.weight": np.zeros(63, np.float16)}, "token_norm.weight: has shape"),
    "not finite": (
        {"state_norm.weight": np.full(64, np.nan, np.float32)},
        "state_norm.weight: has values that are not",
    ),
    "too large": ({"down.weight": np.full((64, 32), 1e9, np.float32)}, "down.weight: has values up to 1e.09"),
    "unknown": ({"output.weight": np.zeros((4, 4), np.float16)}, "output.weight: is no tensor of a head"),
    "vocab type": ({"draft_vocab": np.zeros(3, np.float32)}, "draft_vocab: is F32 of shape"),
    "vocab shape": ({"draft_vocab": np.zeros((3, 1), np.int32)}, "draft_vocab: is I32 of shape"),
    "no vocab": ({"draft_vocab": np.zeros(0, np.int64)}, "draft_vocab: must be ids"),
    "negative": ({"draft_vocab": np.array([-1, 3])}, "draft_vocab: must be ids"),
    "too high": ({"draft_vocab": np.array([1, 2**31 + 5])}, "draft_vocab: must be ids"),
    "twice": ({"draft_vocab": np.array([1, 1])}, "draft_vocab: must be ids of tokens, from 0 to .*, that ascend"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tiny_dir: Path, tmp_path: Path, name: str) -> None:
    changed, message = BAD[name]
    save_file(arrays(**changed), tmp_path / "head.safetensors", KIND)
    with pytest.raises(ModelFormatError, match=message):
        opened(tiny_dir, tmp_path / "head.safetensors")


def test_what_is_no_head(tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    with pytest.raises(ModelNotFoundError, match=r"speculative_config\.model: .*no such file"):
        opened(tiny_dir, path)
    save_file(arrays(), path)
    with pytest.raises(ModelFormatError, match="format: must be 'octavo-draft-head'"):
        opened(tiny_dir, path)
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(ModelFormatError):
        opened(tiny_dir, path)
    with pytest.raises(ModelFormatError, match="is a directory, not a file"):
        opened(tiny_dir, tiny_dir)
    with pytest.raises(ModelFormatError, match="format: must be"):
        opened(tiny_dir, tiny_dir / "model.safetensors")
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelFormatError, match="magic: does not begin a safetensors file"):
        opened(tiny_dir, path)


def test_what_is_saved(tiny_dir: Path, tmp_path: Path) -> None:
    """As the library of the format reads it; a file that was there is replaced, and nothing is left beside it."""
    path, weights = tmp_path / "head.safetensors", random_head(64, 32)
    path.write_text("old")
    save_head(path, weights, np.array([3, 5]), {"model": "tiny"})
    found = load_file(path)
    assert found.pop("draft_vocab").tolist() == [3, 5]
    assert {name: one.tolist() for name, one in found.items()} == {
        f"{name}.weight": one.astype(np.float16).tolist() for name, one in weights.items()
    }
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + length])["__metadata__"] == KIND | {"model": "tiny"}
    assert [one.name for one in tmp_path.iterdir()] == ["head.safetensors"]
    opened(tiny_dir, path).close()


def test_what_is_no_file_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    """As /dev/null is."""
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target.safetensors"
    os.mkfifo(pipe)
    link.symlink_to(target)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_bytes)
        save_head(pipe, random_head(64, 32), None, {})
        save_head(link, random_head(64, 32), None, {})
        assert read.result() == target.read_bytes()
    assert pipe.is_fifo() and link.is_symlink() and len(list(tmp_path.iterdir())) == 3


def test_codes_of_eight_bits() -> None:
    """Within half a step of each value, and the same as gguf's own."""
    from gguf import GGMLQuantizationType, quants

    values = np.random.default_rng(1).normal(0, 1, (5, 96)).astype(np.float32)
    values[1] = 0
    found = as_q8_0(Path("x"), raw("x", values))
    theirs = quants.quantize(values, GGMLQuantizationType.Q8_0)
    steps = np.abs(values).reshape(5, 3, 32).max(-1, keepdims=True) / 127
    assert (np.abs(found.dequantize() - values).reshape(5, 3, 32) <= steps * 0.51 + 1e-7).all()
    assert np.abs(found.stored.astype(int) - theirs.astype(int)).max() <= 1 or (found.stored != theirs).mean() < 0.02
