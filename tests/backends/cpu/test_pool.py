"""The pool of threads by itself, in C++: hundreds of thousands of regions of a few nanoseconds."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc" / "cpu"


def build(folder: Path, *flags: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = folder / "stress"
    command: list[str | Path] = [compiler, "-std=c++20", "-O1", "-pthread", *flags, f"-I{SOURCES}"]
    subprocess.run([*command, HERE / "pool_stress.cpp", SOURCES / "pool.cpp", "-o", program], check=True)
    return program


def stress(program: Path, threads: int, thousands: int) -> None:
    command: list[str | Path] = [program, str(threads), str(thousands)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=3000)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(run.stdout.split()[0]) == 1000 * thousands


def test_every_item_once(tmp_path: Path) -> None:
    """Guards against a worker that comes late and takes a piece of the next region before it is whole."""
    program = build(tmp_path)
    for threads in (2, 3):
        stress(program, threads, 30)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_no_data_race(tmp_path: Path, threads: int) -> None:
    """Under ThreadSanitizer."""
    stress(build(tmp_path, "-g", "-fsanitize=thread"), threads, 50)
