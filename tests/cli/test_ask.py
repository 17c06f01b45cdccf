"""`octavo ask`: answers with their sources, JSON, margins, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.documents.index import NAME

from .conftest import Invoke

QUESTION = "Who is old?"
LIMITS = ("--max-tokens", "7", "--passage-tokens", "40")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "sea.md").write_text("# Sea\n\nThe whale is white. The sea is old.\n\n## Ships\n\nThe captain is far.\n")
    (folder / "other.txt").write_text("The wind is old as well. It is under the sails of the ship. " * 3)
    return folder


def test_answer_and_sources(invoke: Invoke, tiny_llama_dir: Path, folder: Path) -> None:
    code, out, err = invoke("ask", "--docs", folder, QUESTION, *LIMITS, "--model", tiny_llama_dir)
    assert code == 0
    answer, _, sources = out.rpartition("\n\n")
    assert answer and err == "octavo: the answer cites nothing; it may rest on these:\n"
    assert "sea.md, Sea" in sources and "other.txt" in sources
    assert (folder / NAME).exists()
    assert invoke("ask", "--docs", folder, QUESTION, *LIMITS, "--model", tiny_llama_dir) == (code, out, err)
    told = json.loads(invoke("ask", "--docs", folder, QUESTION, *LIMITS, "--model", tiny_llama_dir, "--json").out)
    assert told["text"].strip() == answer.strip()
    assert [f"[{one['number']}] {one['place']}" for one in told["sources"]] == sources.strip().split("\n")
    assert told["citations"] == [] and told["problems"] == [] and told["sources_left_out"] == 0
    assert told["timings"]["ttft_s"] > 0 and told["finish_reason"] == "length"


def test_citations(invoke: Invoke, tiny_llama_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights cites nothing: what it says is read as if it did."""
    from octavo import Citation, Source, ask

    def cite(text: str, sources: list[Source]) -> list[Citation]:
        return [Citation(0, 1, sources[-1].number, sources[-1]), Citation(2, 4, 77, None), Citation(5, 7, 77, None)]

    monkeypatch.setattr(ask, "citations_in", cite)
    code, out, err = invoke("ask", "--docs", folder, QUESTION, *LIMITS, "--model", tiny_llama_dir)
    assert code == 0 and err == "octavo: [77] in the answer is none of its sources\n"
    told = json.loads(invoke("ask", "--docs", folder, QUESTION, *LIMITS, "--model", tiny_llama_dir, "--json").out)
    assert out.rpartition("\n\n")[2].strip() == "[{number}] {place}".format(**told["sources"][-1])
    assert [one["exists"] for one in told["citations"]] == [True, False, False]


def test_margins(invoke: Invoke, tiny_llama_dir: Path, folder: Path) -> None:
    flags = ("--margins", "--margin-tokens", "5", "--segment-tokens", "40", *LIMITS, "--model", tiny_llama_dir)
    code, _, err = invoke("ask", "--docs", folder, QUESTION, *flags)
    assert code == 0 and "sea.md [1/" in err and "other.txt [1/" in err
    told = json.loads(invoke("ask", "--docs", folder, QUESTION, *flags, "--json").out)
    assert {one["document"] for one in told["documents_read"]} == {"sea.md", "other.txt"}
    assert {one["kind"] for one in told["sources"]} <= {"note"}
    told = json.loads(invoke("ask", "--docs", folder / "sea.md", QUESTION, *flags, "--json").out)
    assert [one["document"] for one in told["documents_read"]] == ["sea.md"] and told["text"]
    code, _, err = invoke("ask", "--docs", folder, QUESTION, *flags, "--documents", "1")
    assert code == 0 and len({line.split(" [")[0] for line in err.splitlines() if " [" in line}) == 1


def test_nothing_found(invoke: Invoke, tiny_llama_dir: Path, folder: Path) -> None:
    code, out, err = invoke("ask", "--docs", folder, "zzz", "--model", tiny_llama_dir)
    assert (code, out) == (0, "") and err == "octavo: nothing found: no passage has a word of the question\n"


def test_files_that_cannot_be_read_are_told(invoke: Invoke, tiny_llama_dir: Path, folder: Path) -> None:
    for number in range(7):
        (folder / f"bad{number}.pdf").write_bytes(b"%PDF-1.4 broken")
    code, _, err = invoke("ask", "--docs", folder, QUESTION, *LIMITS, "--model", tiny_llama_dir)
    assert code == 0 and "octavo: bad0.pdf: cannot be read" in err
    assert "and 2 more files that cannot be read" in err


def test_the_index_as_it_is(invoke: Invoke, tiny_llama_dir: Path, folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "index.db"
    flags = ("--index", elsewhere, *LIMITS, "--model", tiny_llama_dir, "--json")
    first = json.loads(invoke("ask", "--docs", folder, QUESTION, *flags).out)
    assert elsewhere.exists() and not (folder / NAME).exists()
    (folder / "sea.md").unlink()
    second = json.loads(invoke("ask", "--docs", folder, QUESTION, *flags, "--no-update").out)
    assert second["sources"] == first["sources"]
    third = json.loads(invoke("ask", "--docs", folder, QUESTION, *flags).out)
    assert {one["document"] for one in third["sources"]} == {"other.txt"}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--docs", "missing"), "--docs: 'missing' does not exist"),
        (("--docs", "docs", "--documents", "2"), "--documents: has an effect only with --margins"),
        (("--docs", "docs", "--segment-tokens", "2"), "--segment-tokens: has an effect only with --margins"),
        (("--docs", "docs", "--passages", "0"), "num_passages: must be between 1"),
        (("--docs", "docs", "--order", "best"), "argument --order: invalid choice"),
        (("--docs", "docs/sea.md", "--index", "x"), "--index: has no effect where --docs is a file"),
        (("--docs", "docs", "--index", "none/index.db"), "cannot be written"),
        (("--docs", "docs", "--index", "docs/sea.md"), "delete it, and it is made anew"),
        (("--docs", "docs", "--raw", "--system", "x"), "--system: has no effect with --raw"),
        (("--docs", "docs", "--prompts", "none.json"), "--prompts: 'none.json' cannot be read"),
        (("--docs", "empty.txt"), "holds no text"),
        (("--docs", "scan.pdf"), "holds no text (scanned pages?)"),
        ((), "the following arguments are required: --docs"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value)[:40],
)
def test_refused(
    invoke: Invoke,
    tiny_llama_dir: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    problem: str,
) -> None:
    from tests.documents.files import a_pdf

    monkeypatch.chdir(folder.parent)
    (folder.parent / "empty.txt").write_text("")
    a_pdf(folder.parent / "scan.pdf", [""])
    before = (folder / "sea.md").read_text()
    code, out, err = invoke("ask", *flags, QUESTION, "--model", tiny_llama_dir)
    assert (code, out) == (2, "") and problem in err and "Traceback" not in err, err
    assert (folder / "sea.md").read_text() == before
