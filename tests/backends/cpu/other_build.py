"""Another build of the package beside the installed one, and tests run on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nanobind
import pytest

ROOT = Path(__file__).parents[3]

# An editable install finds its package before the path is looked at: without this the tests would run on that.
_RUN = """
import sys
package = sys.argv[1]
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
sys.path.insert(0, package)
import octavo._C
assert octavo._C.__file__.startswith(package) and octavo.__file__.startswith(package), octavo._C.__file__
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def configuring(source: Path, build: Path, *options: str) -> list[str | Path]:
    """The command that prepares a build of `source` in the folder `build`."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no CMake or no C++ compiler")
    found = [f"-Dnanobind_DIR={nanobind.cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    return ["cmake", "-S", source, "-B", build, *found, *options, "-DCMAKE_BUILD_TYPE=Release"]


class OtherBuild:
    """`folder/octavo` is the package: the Python files of `source`, with an extension built from `source`."""

    def __init__(self, folder: Path, source: Path = ROOT, options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.source = source
        self._configure = configuring(source, folder / "build", *options)
        self.build()

    def build(self) -> None:
        """Build what has changed in the source since the last time."""
        subprocess.run(self._configure, check=True, capture_output=True)
        subprocess.run(["cmake", "--build", self.folder / "build", "--parallel", "2"], check=True, capture_output=True)
        package = self.folder / "octavo"
        shutil.rmtree(package, ignore_errors=True)
        ignored = shutil.ignore_patterns("_C*.so", "__pycache__")
        shutil.copytree(self.source / "src" / "octavo", package, ignore=ignored)
        (library,) = (self.folder / "build").glob("_C*.so")
        shutil.copy(library, package)

    def test(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
        """Run pytest on it. `arguments` name tests of the repository."""
        options = ["-q", "-p", "no:cacheprovider", "--timeout", "3000"]
        return subprocess.run(
            [sys.executable, "-c", _RUN, str(self.folder), *options, *arguments],
            env=os.environ | dict(environment or {}),
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
