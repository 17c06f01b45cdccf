"""What users are told of can be imported from `octavo`, and their type checkers know it."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import octavo

SOURCE = Path(octavo.__file__).parent
README = SOURCE.parents[1] / "README.md"
TYPING = Path(__file__).parent / "typing"
# Made by LLM.session alone, of parts that nobody else needs to name.
_NAMES = "Branch Session AsyncBranch AsyncSession MarginsRun AsyncMarginsRun AskRun AsyncAskRun"
NOT_FOR_USERS = {f"{name}.__init__" for name in _NAMES.split()}


def classes() -> set[str]:
    """Names of all classes and type aliases of the package, but for private ones and those of its programs."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] not in ("cli", "server"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    found -= {"Sequence"}  # in a signature it is the one of collections.abc
    return {name for name in found if not name.startswith("_")} | {"Prompt", "Messages"}


def public() -> list[tuple[str, Any]]:
    """Every public name, and every method and property of a public class."""
    found: list[tuple[str, Any]] = []
    for name in octavo.__all__:
        value = getattr(octavo, name)
        found.append((name, value))
        for base in value.__mro__ if inspect.isclass(value) else ():
            if base.__module__.startswith("octavo."):
                members = {key: getattr(member, "fget", member) for key, member in vars(base).items()}
                found += [(f"{name}.{key}", member) for key, member in members.items() if is_told(key, member)]
    return found


def is_told(key: str, member: Any) -> bool:
    return inspect.isroutine(member) and (key == "__init__" or not key.startswith("_"))


def test_every_name_can_be_imported() -> None:
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    assert set(octavo.__all__) == {*octavo._PUBLIC, "__version__"} == set(dir(octavo))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = octavo.Nonsense


def test_docstrings_name_what_can_be_imported() -> None:
    """Guards an exception that is promised and can only be caught under the name of a module nobody was told of."""
    known = classes()
    missing = {}
    for name, value in public():
        if isinstance(value, str) or name in NOT_FOR_USERS or not inspect.isroutine(value) | inspect.isclass(value):
            continue
        words = set(re.findall(r"\b[A-Z]\w+", inspect.getdoc(value) or ""))
        words |= set(re.findall(r"\b[A-Z]\w+", " ".join(map(str, getattr(value, "__annotations__", {}).values()))))
        missing |= {f"{name}: {word}": word for word in words & known if word not in octavo.__all__}
    assert missing == {}
    told = [name for name, value in public() if "RequestFailedError" in (inspect.getdoc(value) or "")]
    assert len(told) > 3, "the walk sees docstrings"


def test_every_error_can_be_imported() -> None:
    import octavo.core.errors as errors

    raised = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert raised <= set(octavo.__all__)


def test_the_package_says_that_it_is_typed() -> None:
    assert files("octavo").joinpath("py.typed").is_file()


@pytest.mark.slow  # a type checker reads all of NumPy; `make lint` has it read tests/typing beside the package
def test_a_users_programs_are_checked(tmp_path: Path) -> None:
    """Guards types that are all Any to whoever installs the package, and a README that a type checker would refuse."""
    pytest.importorskip("mypy")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    for number, block in enumerate(blocks):
        before = "" if "LLM(" in block else 'from octavo import LLM\n\nllm = LLM("smollm2")\n'
        (tmp_path / f"readme{number}.py").write_text(before + block)
    for path in TYPING.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"))
    checker = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*checker, "."], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert f"no issues found in {len(blocks) + 2} source files" in done.stdout
