"""Packed weights from files are those that packing makes, or are not used."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from octavo import LLM, ConfigError, SamplingParams, build
from octavo.backends.cpu import CpuOps
from octavo.backends.reference import ReferenceOps
from octavo.loading import kept_weights
from octavo.loading.fingerprint import model_files
from octavo.loading.kept_weights import KeptWeights
from octavo.ops.packing import Packing
from tests.backends.cpu.harness import random_tensor, unpacked

TENSORS = [random_tensor(name, outputs, 512) for name, outputs in (("Q4_1", 40), ("Q6_K", 17), ("F16", 33), ("F32", 5))]


@pytest.fixture(autouse=True)
def keep_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_weights, "LEAST_BYTES", 1)


def taken(ops: CpuOps) -> tuple[list, Packing]:
    packing = ops.defer_packing()
    return [ops.linear_weight([tensor]) for tensor in TENSORS], packing


def values(weights: list) -> list[bytes]:
    shapes = [tensor.shape for tensor in TENSORS]
    return [unpacked(one.packed, 0, 0, *shape).tobytes() for one, shape in zip(weights, shapes, strict=True)]


@pytest.fixture(scope="module")
def packed() -> list[bytes]:
    weights, packing = taken(CpuOps(threads=2))
    packing.pack()
    packing.end()
    return values(weights)


def kept(folder: Path, packing: Packing, identity: str = "a", most: int = 1 << 30) -> KeptWeights:
    assert packing.packed is not None
    return KeptWeights(folder / "packed", most, identity, packing.packed)


def keep(folder: Path, identity: str = "a", most: int = 1 << 30) -> None:
    weights, packing = taken(CpuOps(threads=2))
    packing.pack()
    packing.end()
    kept(folder, packing, identity, most).write()
    assert weights


def read(folder: Path, identity: str = "a") -> list[bytes] | None:
    """None: there was no file to read from, and they were packed as if nothing had been tried."""
    weights, packing = taken(CpuOps(threads=2))
    file = kept(folder, packing, identity)
    found = file.find() and file.read()
    file.close()
    assert file.found is None
    if not found:
        packing.pack()
    packing.end()
    result = values(weights)
    return result if found else None


def test_what_was_kept_is_what_packing_makes(tmp_path: Path, packed: list[bytes]) -> None:
    assert read(tmp_path) is None
    keep(tmp_path)
    assert read(tmp_path) == packed
    assert read(tmp_path, "another model") is None
    (file,) = (tmp_path / "packed").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"X" + data[1:],
        lambda data: data[:8] + b"\2" + data[9:],  # another version
        lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],  # another key
        lambda data: data[:5000] + bytes([data[5000] ^ 4]) + data[5001:],
        lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    ],
)
def test_a_file_that_differs_anywhere_is_not_used(
    tmp_path: Path, packed: list[bytes], harm: Callable[[bytes], bytes]
) -> None:
    keep(tmp_path)
    (file,) = (tmp_path / "packed").iterdir()
    file.write_bytes(harm(file.read_bytes()))
    weights, packing = taken(CpuOps(threads=2))
    one = kept(tmp_path, packing)
    assert not (one.find() and one.read())
    one.close()
    packing.pack()
    packing.end()
    assert values(weights) == packed


def test_every_byte_counts(tmp_path: Path) -> None:
    """The checksum finds one bit that flipped, wherever it is."""
    keep(tmp_path)
    (file,) = (tmp_path / "packed").iterdir()
    data, rng = bytearray(file.read_bytes()), np.random.default_rng(0)
    for at in rng.integers(4096, len(data), 60).tolist():
        bit = 1 << int(rng.integers(8))
        data[at] ^= bit
        file.write_bytes(data)
        assert read(tmp_path) is None
        data[at] ^= bit
    file.write_bytes(data)
    assert read(tmp_path) is not None


def test_others_cannot_give_weights(tmp_path: Path) -> None:
    keep(tmp_path)
    (file,) = (tmp_path / "packed").iterdir()
    file.chmod(0o620)
    assert read(tmp_path) is None
    file.chmod(0o600)
    assert read(tmp_path) is not None
    elsewhere = file.rename(tmp_path / "elsewhere")
    file.symlink_to(elsewhere)
    assert read(tmp_path) is None, "links are not followed"
    file.unlink()
    os.mkfifo(file)
    assert read(tmp_path) is None, "nor is a pipe waited for"
    file.unlink()
    (tmp_path / "packed").chmod(0o770)
    keep(tmp_path)
    assert not list((tmp_path / "packed").iterdir()), "nothing is written where others could change it"


def test_the_limit_holds_and_only_our_own_files_go(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    keep(tmp_path, "a")
    (first,) = folder.iterdir()
    size = first.stat().st_size
    mine = folder / "notes.weights"
    mine.write_text("mine")
    left_over, fresh = folder / f"{'0' * 32}.77.tmp", folder / f"{'1' * 32}.78.tmp"
    for file in (left_over, fresh):
        file.write_text("half")
    os.utime(left_over, (0, 0))
    os.utime(first, (1, 1))
    keep(tmp_path, "b", 2 * size)
    keep(tmp_path, "c", 2 * size)
    assert mine.exists() and fresh.exists() and not left_over.exists() and not first.exists()
    assert read(tmp_path, "b") is not None and read(tmp_path, "c") is not None
    keep(tmp_path, "d", size - 1)
    assert read(tmp_path, "d") is None, "larger than all that may be kept"
    os.utime(next(iter(folder.glob("*.weights"))), (5, 5))
    assert read(tmp_path, "b") is not None, "reading makes it the one used last"


def test_no_folder_no_file(tmp_path: Path) -> None:
    (tmp_path / "packed").write_text("a file")
    keep(tmp_path)
    assert read(tmp_path) is None
    assert ReferenceOps().defer_packing().packed is None


def test_what_nobody_reads_for_a_month_goes(tmp_path: Path) -> None:
    keep(tmp_path, "a")
    (old,) = (tmp_path / "packed").iterdir()
    os.utime(old, (time.time() - 31 * 86400,) * 2)
    keep(tmp_path, "b")
    assert not old.exists() and read(tmp_path, "b") is not None


def test_many_write_the_same_at_once(tmp_path: Path, packed: list[bytes]) -> None:
    """Several engines of one process, or of several: nobody sees half a file."""
    threads = [threading.Thread(target=keep, args=(tmp_path,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    seen = [read(tmp_path) for _ in range(10)]
    for thread in threads:
        thread.join()
    assert all(one in (None, packed) for one in seen) and read(tmp_path) == packed
    assert len(list((tmp_path / "packed").iterdir())) == 1


def test_writing_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    _, packing = taken(CpuOps(threads=2))
    packing.pack()
    packing.end()
    file = kept(tmp_path, packing)
    file._stop[0] = 1
    file.write()
    assert not list((tmp_path / "packed").iterdir())


def test_engines_start_from_kept_weights(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers, and what differs in any part is packed anew."""
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path))
    loaded: list[bool] = []
    loading = build.LoadedModel
    monkeypatch.setattr(build, "LoadedModel", lambda *parts: loaded.append(parts[-1]) or loading(*parts))
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=1)

    def answer(**settings: object) -> object:
        with LLM(str(tiny_dir), max_model_len=64, **settings) as llm:
            (output,) = llm.generate("hello there", params)
        for thread in threading.enumerate():
            if thread.name == "octavo-kept-weights":
                thread.join()
        return output.outputs[0].token_ids, [sorted(row) for row in output.outputs[0].logprobs or ()]

    first = answer()
    assert answer() == first == answer(kv_cache_dtype="int8", threads=1)
    assert loaded == [False, True, True]
    answer(compute_dtype="float32")
    assert loaded[-1] is False, "float32 weights are others"
    answer(compute_dtype="float32")
    assert loaded[-1] is True
    assert len(list((tmp_path / "packed").iterdir())) == 2
    os.utime(next(file for file in model_files(tiny_dir) if file.suffix == ".safetensors"))
    assert answer() == first and loaded[-1] is False, "a file that was written again"
    before = len(list((tmp_path / "packed").iterdir()))
    answer(kept_weights_bytes=0)
    assert loaded[-1] is False and len(list((tmp_path / "packed").iterdir())) == before


def test_without_a_home(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model given by its path needs no folder of ours."""

    def nowhere(*_: object, **__: object) -> Path:
        raise ConfigError("there is no home directory to keep models in; set OCTAVO_HOME to a folder")

    monkeypatch.setattr(build, "octavo_home", nowhere)
    with LLM(str(tiny_dir), max_model_len=64) as llm:
        assert llm.generate("hi", SamplingParams(max_tokens=2))[0].finished
