"""The pool of threads by itself, in C++: hundreds of thousands of regions of a few nanoseconds."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc" / "cpu"


def stress(folder: Path, threads: int, seconds: float, *flags: str) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = folder / "stress"
    build: list[str | Path] = [compiler, "-std=c++20", "-O2", "-pthread", *flags, f"-I{SOURCES}"]
    subprocess.run([*build, HERE / "pool_stress.cpp", SOURCES / "pool.cpp", "-o", program], check=True)
    command: list[str | Path] = [program, str(threads), str(seconds)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds + 60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(run.stdout.split()[0]) > 1000


@pytest.mark.parametrize("threads", [2, 3])
def test_every_item_once(tmp_path: Path, threads: int) -> None:
    """Guards against a worker that comes late and takes a piece of the next region before it is whole."""
    stress(tmp_path, threads, 2)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_no_data_race(tmp_path: Path, threads: int) -> None:
    """Under ThreadSanitizer."""
    stress(tmp_path, threads, 20, "-g", "-fsanitize=thread")
