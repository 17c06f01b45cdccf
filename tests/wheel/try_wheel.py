"""Looks into a wheel, installs it into an environment of its own without a compiler, and uses it from there.

``make test-wheel`` runs it, with any Python that the wheel is for: only the standard library is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = "octavo/_C.abi3.so"
# What the environment may not take over: where Python and programs look for files, and settings of Octavo and make.
HIDDEN = ("PYTHON", "OCTAVO_", "VIRTUAL_ENV", "MAKE", "MFLAGS", "LD_")


class WheelError(Exception):
    """What is wrong with the wheel."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise WheelError(message)


def check_contents(wheel: Path, root: Path = ROOT) -> None:
    """The package and nothing else, with its licence and its program, for all Pythons from 3.11. Nothing in it names a
    path of the machine that made it.

    Raises WheelError.
    """
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    (info,) = {name.split("/")[0] for name in contents if ".dist-info/" in name}
    source = root / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "octavo").rglob("*")
        if path.suffix in {".py", ".pyi"} or path.name == "py.typed"
    } | {EXTENSION}
    found = {name for name in contents if not name.startswith(f"{info}/")}
    check(found >= expected, f"the wheel lacks {sorted(expected - found)}")
    check(found <= expected, f"the wheel should not contain {sorted(found - expected)}")
    check(f"{info}/licenses/LICENSE" in contents, "the wheel lacks its licence")
    check(contents[f"{info}/licenses/LICENSE"] == (root / "LICENSE").read_bytes(), "the wheel has another licence")
    programs = contents.get(f"{info}/entry_points.txt", b"")
    check(b"octavo = octavo.cli.main:main" in programs, "the wheel lacks the program octavo")
    tags = [line for line in contents[f"{info}/WHEEL"].decode().splitlines() if line.startswith("Tag: ")]
    check(any(tag.startswith("Tag: cp311-abi3-manylinux_2_28_") for tag in tags), f"the wheel's tags are {tags}")
    for name, content in contents.items():
        for path in (root, Path(tempfile.gettempdir())):
            check(f"{path}/".encode() not in content, f"{name} in the wheel names a path of this machine, {path}/")


class Environment:
    """A virtual environment with the wheel and what it depends on, and processes that find nothing else."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=True)
        self.programs = folder / "venv" / "bin"
        (folder / "elsewhere").mkdir()
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith(HIDDEN)}
        if "OCTAVO_HOME" in os.environ:  # models need not be fetched anew
            self.variables["OCTAVO_HOME"] = os.environ["OCTAVO_HOME"]
        self.variables |= {"PATH": str(self.programs), "CC": "/bin/false", "CXX": "/bin/false"}
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        self.run("python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *constraints, str(wheel))

    def run(self, program: str, *arguments: str) -> str:
        """What the program of the environment writes to stdout. Raises WheelError when it fails."""
        print("$", program, *arguments, flush=True)
        return output_of([str(self.programs / program), *arguments], self.folder / "elsewhere", self.variables)


def output_of(command: list[str], folder: Path, variables: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=variables, check=False, stdout=subprocess.PIPE, text=True)
    check(done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def extension_of(files: list[str]) -> str:
    (file,) = (file for file in files if Path(file).match("octavo/_C.*.so"))
    return file


def check_origin(files: list[str], environment: Environment) -> None:
    """Every module is the environment's or the standard library's, Octavo's own the environment's."""
    own = environment.folder.resolve() / "venv"
    allowed = (own, Path(sys.base_prefix).resolve(), Path(sys.base_exec_prefix).resolve())
    for path in (Path(file).resolve() for file in files):
        check(any(path.is_relative_to(folder) for folder in allowed), f"{path} was imported, not only the wheel")
    check(Path(extension_of(files)).resolve().is_relative_to(own), "another extension was imported")


def try_wheel(wheel: Path, other: Path | None) -> None:
    """Raises WheelError. `other`: a Python with another build, whose answers must be the same to the bit."""
    check_contents(wheel)
    with tempfile.TemporaryDirectory(prefix="octavo-wheel-") as name:
        environment = Environment(Path(name), wheel)
        for compiler in ("c++", "g++", "clang++", "cc", "gcc", "cmake", "ninja"):
            check(shutil.which(compiler, path=environment.variables["PATH"]) is None, f"{compiler} is at hand")
        check(environment.run("octavo", "--version").startswith("octavo "), "octavo --version says something else")
        environment.run("octavo", "pull", "smollm2")
        report = json.loads(environment.run("octavo", "doctor", "--json", "--no-measure"))
        check(report["backends"]["cpu"] is None, f"the cpu backend does not load: {report['backends']['cpu']}")
        flags = ["--raw", "--temperature", "0", "--max-tokens", "1"]
        answer = environment.run("octavo", "run", *flags, "The capital of France is")
        check(answer.strip() == "Paris", f"the answer is {answer!r}")
        smoke = Path(shutil.copy(ROOT / "tests" / "wheel" / "smoke.py", environment.folder))
        for instruction_set in report["instruction_sets"]:
            result: dict[str, Any] = json.loads(environment.run("python", "-I", str(smoke), instruction_set))
            check_origin(result["files"], environment)
            check(result["answers"]["best"] == " mammal", f"selected was {result['answers']['best']!r}")
            if other is not None:
                command = [str(other.absolute()), "-I", str(smoke), instruction_set]
                theirs = json.loads(output_of(command, environment.folder, dict(os.environ)))
                check(extension_of(theirs["files"]) != extension_of(result["files"]), "it was compared with itself")
                check(theirs["answers"] == result["answers"], f"{other} answers otherwise, with {instruction_set}")
        compared = "" if other is None else f", the same bits as with {other}"
        print(f"{wheel.name}: works with {', '.join(report['instruction_sets'])}{compared}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--compare-with", type=Path, metavar="PYTHON", help="one with another build of Octavo")
    arguments = parser.parse_args()
    try:
        try_wheel(arguments.wheel.resolve(), arguments.compare_with)
    except WheelError as error:
        sys.exit(f"{arguments.wheel}: {error}")


if __name__ == "__main__":
    main()
