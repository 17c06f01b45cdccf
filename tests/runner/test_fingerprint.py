"""The numeric fingerprint: another file or setting, another fingerprint."""

from __future__ import annotations

from pathlib import Path

from octavo import LLM
from octavo.runner.fingerprint import fingerprint


def test_of_files_and_settings(tmp_path: Path) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    a.write_bytes(bytes(100_000))
    b.write_bytes(bytes(100_000))
    base = fingerprint([a], "float32")
    assert len(base) == 16 and int(base, 16) >= 0
    assert fingerprint([a], "float32") == base
    assert fingerprint([a, b], "float32") == fingerprint([b, a], "float32") != base
    assert fingerprint([a], "float64") != base
    assert fingerprint([a], "float32", None) != base
    assert fingerprint([b], "float32") != base
    for at in (0, 50_000, 99_999):  # a small file is sampled whole
        content = bytearray(100_000)
        content[at] = 1
        a.write_bytes(content)
        assert fingerprint([a], "float32") != base, at
    a.write_bytes(bytes(100_001))
    assert fingerprint([a], "float32") != base
    a.write_bytes(b"")
    assert fingerprint([a]) != fingerprint([])


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
