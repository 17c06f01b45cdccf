"""Chat templates of real models, with what transformers writes with them.

Their texts are not here, only facts: real_templates.json has the name and SHA-256 of each, and the beginning of the
SHA-256 of each text that transformers writes, "-" where it refuses. The tests look for the texts in the folder that the
environment's CHAT_TEMPLATES names, or else in installed packages, and are skipped where there are none. Most of these
are in models/templates of llama.cpp, which comes with the sources of the package llama-cpp-python.

``python -m tests.text.test_real_templates FOLDER`` makes the facts anew, of all the templates in a folder, and says
where Octavo differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import transformers

from octavo.core.errors import InvalidRequestError

from .conversations import CONVERSATIONS, NOW, OPTIONS, SPECIAL, compiled, written_by_octavo, written_by_transformers
from .template_families import FAMILIES

FILE = Path(__file__).with_name("real_templates.json")
FACTS = json.loads(FILE.read_text()) if FILE.exists() else {"templates": []}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def asked() -> str:
    """The digest of all that the facts depend on but the templates."""
    return digest(json.dumps([CONVERSATIONS, OPTIONS, SPECIAL, str(NOW)]))


def written(write: Callable[[str, dict[str, Any]], str], refusals: type[Exception]) -> dict[str, str]:
    """By conversation, what is written with each of the options."""

    def one(name: str, options: dict[str, Any]) -> str:
        try:
            return digest(write(name, options))[:8]
        except refusals:
            return "-"

    return {name: " ".join(one(name, options) for options in OPTIONS) for name in CONVERSATIONS}


def ours(source: str) -> dict[str, str]:
    template = compiled(source)
    return written(lambda name, options: written_by_octavo(template, name, options), InvalidRequestError)


def theirs(source: str) -> dict[str, str]:
    template = compiled(source)
    return written(lambda name, options: written_by_transformers(template, source, name, options), Exception)


@lru_cache(maxsize=1)
def sources() -> dict[str, str]:
    """Texts of templates by their digests."""
    if "CHAT_TEMPLATES" in os.environ:
        files = list(Path(os.environ["CHAT_TEMPLATES"]).rglob("*.jinja"))
    else:
        packaged = [file for package in distributions() for file in package.files or () if file.suffix == ".jinja"]
        files = [Path(str(file.locate())) for file in packaged]
    texts = [file.read_text() for file in files if file.is_file()]
    return {digest(text): text for text in texts}


@pytest.mark.parametrize("fact", FACTS["templates"], ids=lambda fact: fact["name"])
def test_real_template(fact: dict[str, Any]) -> None:
    source = sources().get(fact["sha256"])
    if source is None:
        pytest.skip("its text is not here: set CHAT_TEMPLATES to a folder that has it")
    assert ours(source) == fact["written"]


def test_the_facts_are_of_these_conversations() -> None:
    """Where they are not, they have to be made anew."""
    assert FACTS["asked"] == asked()
    assert len({fact["sha256"] for fact in FACTS["templates"]}) == len(FACTS["templates"]) >= 40
    for fact in FACTS["templates"]:
        texts = [text for texts in fact["written"].values() for text in texts.split()]
        assert len(texts) == len(CONVERSATIONS) * len(OPTIONS)
        assert sum(text != "-" for text in texts) >= 5


@pytest.mark.parametrize("name", ["zephyr", "llama 3.1"])
def test_facts_tell_what_is_equal(name: str) -> None:
    """With templates whose texts are here; and another template has others."""
    facts = theirs(FAMILIES[name])
    assert ours(FAMILIES[name]) == facts
    assert ours(FAMILIES[name] + " ") != facts


def make(folder: Path) -> None:
    texts: dict[str, tuple[str, str]] = {}
    for file in sorted(folder.rglob("*.jinja")):
        text = file.read_text()
        texts.setdefault(digest(text), (str(file.relative_to(folder).with_suffix("")), text))
    found = []
    for key, (name, text) in texts.items():
        found.append({"name": name, "sha256": key, "written": theirs(text)})
        different = [
            conversation for conversation, facts in ours(text).items() if facts != found[-1]["written"][conversation]
        ]
        print(f"{name}: {'different: ' + ', '.join(different) if different else 'equal'}")
    facts = {"transformers": transformers.__version__, "asked": asked(), "templates": found}
    FILE.write_text(json.dumps(facts, indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
