"""The tests of this folder again, on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FILES = ("packing", "linear", "rows", "attention", "attention_bits", "errors", "processes")
SKIPPED = "idle or torch or host or real or python_goes_on"  # by time or with libraries that clash with the sanitizer


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package octavo, its extension built anew: some five minutes."""
    nanobind = pytest.importorskip("nanobind")
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no CMake or no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitized")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DOCTAVO_SANITIZE=ON", f"-Dnanobind_DIR={nanobind.cmake_dir()}"]
    options.append(f"-DPython_EXECUTABLE={sys.executable}")
    subprocess.run(["cmake", "-S", ROOT, "-B", folder / "build", *options], check=True)
    subprocess.run(["cmake", "--build", folder / "build", "--parallel", "2"], check=True)
    shutil.copytree(ROOT / "src" / "octavo", folder / "octavo", ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    (library,) = (folder / "build").glob("_C*.so")
    shutil.copy(library, folder / "octavo")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FILES)
def test_sanitized(package: Path, name: str) -> None:
    """Guards against reads and writes outside of what was allocated, and what C++ leaves undefined."""

    def library(file: str) -> str:
        compiler = os.environ.get("CXX", "c++")
        return subprocess.run(
            [compiler, f"-print-file-name={file}"], check=True, capture_output=True, text=True
        ).stdout.strip()

    environment = os.environ | {
        "PYTHONPATH": str(package),
        "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--timeout",
        "3000",
        "-k",
        f"not ({SKIPPED})",
    ]
    run = subprocess.run([*command, str(HERE / f"test_{name}.py")], env=environment, cwd=ROOT, check=False)
    assert run.returncode == 0
