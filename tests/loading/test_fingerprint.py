"""The numeric fingerprint: another file or setting, another fingerprint."""

from __future__ import annotations

import shutil
from pathlib import Path

from octavo import LLM
from octavo.loading.fingerprint import fingerprint_of, versions_of


def test_of_files_and_settings(tmp_path: Path) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    a.write_bytes(bytes(100_000))
    b.write_bytes(bytes(100_000))
    base = fingerprint_of([a], "float32")
    assert len(base) == 16 and int(base, 16) >= 0
    assert fingerprint_of([a], "float32") == base
    assert fingerprint_of([a, b], "float32") == fingerprint_of([b, a], "float32") != base
    assert fingerprint_of([a], "float64") != base
    assert fingerprint_of([a], "float32", None) != base
    assert fingerprint_of([b], "float32") != base
    for at in (0, 50_000, 99_999):  # a small file is sampled whole
        content = bytearray(100_000)
        content[at] = 1
        a.write_bytes(content)
        assert fingerprint_of([a], "float32") != base, at
    a.write_bytes(bytes(100_001))
    assert fingerprint_of([a], "float32") != base
    a.write_bytes(b"")
    assert fingerprint_of([a]) != fingerprint_of([])


def test_of_engines(tiny_llama_dir: Path, tiny_gemma3_dir: Path) -> None:
    """What answers depend on changes it; how a machine is used does not."""

    def of(folder: Path, **config: object) -> str:
        with LLM(str(folder), backend="reference", max_model_len=64, **config) as llm:
            return llm.system_fingerprint

    base = of(tiny_llama_dir)
    assert base.startswith("octavo-")
    assert of(tiny_llama_dir, max_num_seqs=2, block_size=32, seed=3) == base
    others = [
        of(tiny_llama_dir, compute_dtype="float64"),
        of(tiny_llama_dir, kv_cache_dtype="float16"),
        of(tiny_gemma3_dir),
    ]
    assert len({base, *others}) == 4


def test_versions_tell_any_change(tmp_path: Path) -> None:
    """Also one between the samples, under the same name and with the same size; and a copy is not the original."""
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(4 << 20))
    sampled, version = fingerprint_of([path]), versions_of([path])
    assert versions_of([path]) == version
    with path.open("r+b") as file:
        file.seek((1 << 20) + 30_000)
        file.write(b"other")
    assert fingerprint_of([path]) == sampled  # what the versions are for
    assert versions_of([path]) != version
    (tmp_path / "copy").mkdir()
    shutil.copy2(path, tmp_path / "copy")
    assert versions_of([tmp_path / "copy" / path.name]) != versions_of([path])
