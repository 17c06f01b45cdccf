from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo import LLM
from octavo.cli import record
from octavo.cli.machine import cgroup_limits, cpu_model

from .conftest import Invoke

pytestmark = pytest.mark.usefixtures("quick_limits")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own model folder: what other benchmarks left is not seen, and nothing is left."""
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def entry(benchmark: str = "latency", date: str = "2026-01-02T03:04:05+00:00") -> dict[str, Any]:
    phase = {"tokens_computed_per_second": 123.4, "mbu": 0.71, "mfu": 0.05}
    return {
        "date": date,
        "benchmark": benchmark,
        "model": "some-model",
        "backend": "cpu",
        "phases": {"prefill": None, "decode": phase},
    }


def remember(home: Path, content: object) -> None:
    home.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (home / record.FILE_NAME).write_text(text)


def test_it_tells_what_there_is(invoke: Invoke, home: Path) -> None:
    result = invoke("doctor", "--threads", 1)
    assert (result.code, result.err) == (0, "")
    assert f"octavo              {octavo.__version__}" in result.out
    for words in ("processor", "instruction sets", "backend cpu         loads", "GB/s with 1 threads", str(home)):
        assert words in result.out, words
    assert result.out.count("G multiply-adds/s with 1 threads") == 2
    assert "last benchmark      none yet; `octavo bench latency` makes one" in result.out
    assert "no models yet" in result.out
    assert not home.exists(), "looking must leave nothing behind"


def test_json(invoke: Invoke) -> None:
    from octavo import _C

    report = json.loads(invoke("doctor", "--json", "--threads", 3).out)
    assert report["instruction_sets"] == _C.instruction_sets()
    assert report["instruction_set_used"] == _C.instruction_sets()[0]
    assert report["threads"] == report["limits"]["threads"] == 3
    assert report["backends"] == {"cpu": None, "reference": None}
    assert min(report["limits"].values()) > 0 and report["available_memory_bytes"] > 0
    assert report["model"] is None and report["last_benchmarks"] == []
    portable = json.loads(invoke("doctor", "--json", "--no-measure", "--instruction-set", "portable").out)
    assert portable["instruction_set_used"] == "portable" and portable["limits"] is None


def test_fingerprint_is_the_engines(invoke: Invoke, tiny_gemma3_dir: Path) -> None:
    """Guards against a fingerprint shown that answers do not carry."""
    for settings in ({}, {"kv_cache_dtype": "float16"}, {"backend": "reference"}):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        report = json.loads(invoke("doctor", "--json", "--no-measure", "--model", tiny_gemma3_dir, *flags).out)
        with LLM(str(tiny_gemma3_dir), max_model_len=16, **settings) as llm:
            assert report["model"]["system_fingerprint"] == llm.system_fingerprint


def test_why_a_backend_refuses_a_model(invoke: Invoke, tiny_llama_dir: Path) -> None:
    result = invoke("doctor", "--no-measure", "--model", tiny_llama_dir)
    assert result.code == 0
    assert "on cpu            head_dim must be a multiple of 16" in result.out


def test_without_the_extension(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine shows on which the C++ extension does not load."""
    monkeypatch.setitem(sys.modules, "octavo._C", None)
    monkeypatch.delitem(sys.modules, "octavo.backends.cpu", raising=False)
    monkeypatch.delattr(octavo, "_C", raising=False)
    monkeypatch.delattr("octavo.backends.cpu", raising=False)
    result = invoke("doctor")
    assert result.code == 0, result
    assert "backend cpu         its extension does not load" in result.out
    assert "backend reference   loads" in result.out
    assert "limits              not measured" in result.out


# --- the last benchmarks ---


def test_shares_of_the_last_benchmark(invoke: Invoke, home: Path) -> None:
    old, new = entry(), entry("throughput", "2026-02-02T03:04:05+00:00")
    remember(home, {"schema": record.SCHEMA, "benchmarks": [old, new]})
    lines = invoke("doctor", "--no-measure").out.splitlines()
    shown = [line for line in lines if line.startswith(("last benchmark", "  decode"))]
    assert "throughput of some-model on cpu, 2026-02-02" in shown[0] and "latency of some-model" in shown[2]
    assert "123.4 tok/s, MBU 71%, MFU 5%" in shown[1]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        '{"schema": 1}',
        {"schema": record.SCHEMA + 1, "benchmarks": [entry()]},
        {"schema": record.SCHEMA, "benchmarks": "latency"},
        {"schema": record.SCHEMA, "benchmarks": [5, None, {}]},
        {"schema": record.SCHEMA, "benchmarks": [entry() | {"phases": []}]},
        {"schema": record.SCHEMA, "benchmarks": [entry() | {"date": 7}]},
        {"schema": record.SCHEMA, "benchmarks": [entry() | {"phases": {"decode": {"mbu": "x"}}}]},
        {"schema": record.SCHEMA, "benchmarks": [entry() | {"phases": {"decode": 5}}]},
    ],
)
def test_a_file_that_is_not_sound_is_not_read(invoke: Invoke, home: Path, content: object) -> None:
    remember(home, content)
    result = invoke("doctor", "--no-measure")
    assert result.code == 0 and "last benchmark      none yet" in result.out


def test_one_entry_of_each_benchmark_is_kept(home: Path) -> None:
    for rate in (1.0, 2.0):
        record.save({**entry(), "output_tokens_per_second": rate, "secret": "not kept"})
    record.save(entry("throughput"))
    entries = record.load()
    assert [one["benchmark"] for one in entries] == ["latency", "throughput"]
    assert entries[0]["output_tokens_per_second"] == 2.0 and "secret" not in entries[0]
    assert [path.name for path in home.iterdir()] == [record.FILE_NAME]


def test_a_folder_that_cannot_be_written(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    home.write_text("a file where a folder should be")
    assert record.save(entry()) is None
    assert "the benchmark is not remembered" in caplog.text


# --- the machine ---


def test_cgroup_limits(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path) == {"cpus": None, "memory_bytes": None}
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert cgroup_limits(tmp_path) == {"cpus": 1.5, "memory_bytes": 1 << 30}
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_limits(tmp_path) == {"cpus": None, "memory_bytes": None}
    (tmp_path / "cpu.max").write_text("5 0\n")
    assert cgroup_limits(tmp_path)["cpus"] is None


def test_cpu_model(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_bytes(b"processor\t: 0\nmodel name\t: Some CPU \xff 3000\nmodel name\t: Other\n")
    assert cpu_model(tmp_path / "cpuinfo") == "Some CPU \ufffd 3000"
    assert cpu_model(tmp_path / "nowhere")


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "threads: must be at least 1"),
        (["--threads", "two"], "--threads: must be an integer"),
        (["--instruction-set", "mmx"], "instruction_set: must be one of"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_input(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke("doctor", *arguments)
    assert result.code == 2 and result.out == ""
    assert message in result.err and "Traceback" not in result.err
