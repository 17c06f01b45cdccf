"""The tests of this folder again, on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.backends.cpu.other_build import OtherBuild

HERE = Path(__file__).parent
FILES = "packing linear rows sampling attention attention_bits attention_shared errors processes".split()
SKIPPED = "idle or torch or host or real or python_goes_on"  # by time or with libraries that clash with the sanitizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def library(file: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={file}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {
        "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    }


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> OtherBuild:
    """Some five minutes."""
    return OtherBuild(tmp_path_factory.mktemp("sanitized"), options=["-DOCTAVO_SANITIZE=ON"])


@pytest.mark.parametrize("name", FILES)
def test_sanitized(sanitized: OtherBuild, environment: dict[str, str], name: str) -> None:
    """Guards against reads and writes outside of what was allocated, and what C++ leaves undefined."""
    run = sanitized.test("-k", f"not ({SKIPPED})", HERE / f"test_{name}.py", environment=environment)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]


def test_the_sanitizer_looks(sanitized: OtherBuild, environment: dict[str, str], tmp_path: Path) -> None:
    """Guards against tests that run on another build than they think: a read past the end must end the process."""
    test = tmp_path / "test_overflow.py"
    test.write_text(
        "import ctypes\n"
        "def test_overflow():\n"
        "    library = ctypes.CDLL(None)\n"
        "    library.malloc.restype = ctypes.c_void_p\n"
        "    place = library.malloc(8)\n"
        "    library.memcmp(ctypes.c_void_p(place), ctypes.c_void_p(place + 4), ctypes.c_size_t(64))\n"
    )
    run = sanitized.test("-s", test, environment=environment)
    assert run.returncode != 0 and "heap-buffer-overflow" in run.stdout + run.stderr
