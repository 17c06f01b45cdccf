"""What wheels are made of and with. `make test-wheel` tries a real one."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path

import pytest

from octavo import _C
from tests.wheel import try_wheel

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
INFO = "octavo-0.1.0.dist-info"


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", one)[0].lower().replace("_", "-") for one in requirements}


def test_every_requirement_is_pinned() -> None:
    """Guards against builds and tests that take whatever version is newest."""
    project = PROJECT["project"]
    wanted = names(project["dependencies"]) | names(PROJECT["build-system"]["requires"])
    for extra in project["optional-dependencies"].values():
        wanted |= names(extra)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "auditwheel" in wanted and "numpy" in wanted
    assert wanted <= names([line for line in lines if "==" in line])


def test_one_wheel_is_for_all_pythons() -> None:
    """Guards against an extension, or a Python of cibuildwheel's, that is not the oldest one allowed."""
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=3.")
    tools = PROJECT["tool"]
    assert tools["scikit-build"]["wheel"]["py-api"] == f"cp3{oldest}"
    assert tools["cibuildwheel"]["build"] == f"cp3{oldest}-manylinux_*"
    assert _C.__file__ is not None and _C.__file__.endswith(try_wheel.EXTENSION.removeprefix("octavo/"))


@pytest.fixture
def contents() -> dict[str, bytes]:
    """Of a wheel that is right, for a checkout with one module."""
    return {
        "octavo/__init__.py": b"",
        "octavo/py.typed": b"",
        "octavo/_C.abi3.so": b"\x7fELF",
        f"{INFO}/licenses/LICENSE": b"Apache",
        f"{INFO}/entry_points.txt": b"[console_scripts]\noctavo = octavo.cli.main:main\n",
        f"{INFO}/WHEEL": b"Wheel-Version: 1.0\nTag: cp311-abi3-manylinux_2_28_x86_64\n",
    }


def check(contents: dict[str, bytes], folder: Path) -> None:
    package = folder / "src" / "octavo"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "py.typed").touch()
    (folder / "LICENSE").write_bytes(b"Apache")
    with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    try_wheel.check_contents(folder / "a.whl", folder)


def test_a_right_wheel_passes(contents: dict[str, bytes], tmp_path: Path) -> None:
    check(contents, tmp_path)


@pytest.mark.parametrize("name", ["octavo/py.typed", "octavo/_C.abi3.so", f"{INFO}/licenses/LICENSE"])
def test_what_a_wheel_lacks_is_told(contents: dict[str, bytes], tmp_path: Path, name: str) -> None:
    """Guards against a check that looks at nothing."""
    del contents[name]
    with pytest.raises(try_wheel.WheelError, match="lacks"):
        check(contents, tmp_path)


@pytest.mark.parametrize("name", ["tests/test_llm.py", "csrc/bindings.cpp", "octavo/libnanobind-static.a"])
def test_what_a_wheel_should_not_contain_is_told(contents: dict[str, bytes], tmp_path: Path, name: str) -> None:
    contents[name] = b""
    with pytest.raises(try_wheel.WheelError, match=f"should not contain .*{name}"):
        check(contents, tmp_path)


def test_paths_and_tags_are_looked_at(contents: dict[str, bytes], tmp_path: Path) -> None:
    """Guards against wheels that name the machine they were made on, and such as auditwheel did not see."""
    hiding = contents | {"octavo/_C.abi3.so": f"\x7fELF{tmp_path}/one/csrc/bindings.cpp".encode()}
    with pytest.raises(try_wheel.WheelError, match="names a path of this machine"):
        check(hiding, tmp_path / "one")
    contents[f"{INFO}/WHEEL"] = b"Tag: cp311-abi3-linux_x86_64\n"
    with pytest.raises(try_wheel.WheelError, match="tags are"):
        check(contents, tmp_path / "two")


def test_modules_from_elsewhere_are_told(tmp_path: Path) -> None:
    """Guards against a test of a wheel that runs on the checkout."""
    environment = object.__new__(try_wheel.Environment)
    environment.folder = tmp_path
    own = str(tmp_path / "venv" / "lib" / try_wheel.EXTENSION)
    try_wheel.check_origin([own, re.__file__], environment)
    with pytest.raises(try_wheel.WheelError, match="was imported, not only the wheel"):
        try_wheel.check_origin([own, str(ROOT / "src" / "octavo" / "llm.py")], environment)
