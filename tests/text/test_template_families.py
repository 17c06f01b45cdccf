"""Whole chat templates against transformers, with conversations of every shape.

``python -m tests.text.test_template_families FOLDER`` compares all the templates in a folder, such as real models'.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .conversations import differences
from .template_families import CHANGING, FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    found, written = differences(FAMILIES[name], continues=name not in CHANGING)
    assert found == []
    assert written >= 15  # of some 80; some families refuse many


def test_there_are_as_many_as_promised() -> None:
    assert len(FAMILIES) >= 40


if __name__ == "__main__":
    for file in sorted(Path(sys.argv[1]).rglob("*.jinja")):
        found, written = differences(file.read_text())
        print(f"{file.name}: {written} equal, {len(found)} different", *found[:3], sep="\n    ")
