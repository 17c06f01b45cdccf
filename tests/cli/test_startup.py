"""What is loaded before anything happens, which decides how long a user waits; `octavo bench startup` measures it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
ENV = {**os.environ, "PYTHONPATH": str(SOURCE)}
# Each takes longer to load than all that --help may take, or belongs to an optional feature.
HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "huggingface_hub",
    "tokenizers",
    "jinja2",
    "rich",
    "asyncio",
    "prompt_toolkit",
)


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], env=ENV, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


@pytest.mark.parametrize(
    "code", ["import octavo", "import octavo.hub", "from octavo.cli.main import main; assert main(['--help']) == 0"]
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    """Guards what the times above rest on, independent of the machine: torch above all."""
    loaded = python("-c", f"{code}\nimport sys; print(*[m for m in {HEAVY!r} if m in sys.modules], sep=',')")
    assert loaded.splitlines()[-1] == ""


def test_what_is_loaded_of_octavo() -> None:
    """Guards against an eager import in octavo/__init__.py, and a command's imports at the start of every command."""
    code = "import sys; print(*sorted(m for m in sys.modules if m.startswith('octavo')))"
    assert python("-c", f"import octavo; {code}") == "octavo\n"
    helped = python("-c", f"from octavo.cli.main import main; main(['--help']); {code}").splitlines()[-1].split()
    mine = ["octavo", "octavo.cli", "octavo.cli.main", "octavo.cli.setting_args", "octavo.cli.streams"]
    assert helped == [
        *mine,
        "octavo.config",
        "octavo.core",
        "octavo.core.errors",
        "octavo.core.settings",
        "octavo.core.speculation",
    ]


def test_how_much_is_loaded() -> None:
    """Of the standard library too: modules beyond those of a bare interpreter. A few more are no harm, dozens are."""
    count = "import sys; before = set(sys.modules); {}; print(len(set(sys.modules) - before))"
    assert int(python("-c", count.format("import octavo"))) <= 45
    assert int(python("-c", count.format("import octavo.cli.main")).splitlines()[-1]) <= 80
