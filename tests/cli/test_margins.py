"""`octavo margins`: notes as they come, the answer, JSON, a person's verdicts, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo import LLM, MarginsParams, MarginsPrompts, MarginsResult
from octavo.cli.sampling_args import REPETITION

from .conftest import Invoke

TEXT = "The whale is white. The sea is old. The captain is far under the sails. " * 3
QUESTION = "Who is old?"
LIMITS = ("--margin-tokens", "6", "--max-tokens", "7", "--segment-tokens", "45")


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def expected(tiny_llama_dir: Path) -> Iterator[MarginsResult]:
    base = MarginsParams()
    params = MarginsParams(
        segment_tokens=45,
        margin=base.margin.but(max_tokens=6, repetition_detection=REPETITION),
        answer=base.answer.but(max_tokens=7, repetition_detection=REPETITION),
    )
    with LLM(str(tiny_llama_dir)) as llm:
        yield llm.margins(TEXT, QUESTION, params)


def test_lines_and_answer(invoke: Invoke, tiny_llama_dir: Path, document: Path, expected: MarginsResult) -> None:
    code, out, err = invoke("margins", document, QUESTION, *LIMITS, "--model", tiny_llama_dir)
    assert (code, err) == (0, "")
    notes, _, answer = out.partition("\n\n")
    lines = sorted(notes.split("\n"))
    assert len(lines) == len(expected.answer.margins) > 2
    for number, (line, margin) in enumerate(zip(lines, expected.answer.margins, strict=True), 1):
        mark = "kept" if margin.kept else "dropped"
        assert line.startswith(f"[{number}/{len(lines)}] {mark} {margin.score:+.2f}: ")
    assert answer == expected.text + ("" if expected.text.endswith("\n") else "\n")


def test_json(invoke: Invoke, tiny_llama_dir: Path, document: Path, expected: MarginsResult) -> None:
    code, out, err = invoke("margins", document, QUESTION, *LIMITS, "--model", tiny_llama_dir, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["token_ids"] == expected.answer.output.token_ids and told["text"] == expected.text
    assert [margin["text"] for margin in told["margins"]] == [margin.text for margin in expected.answer.margins]
    assert [(one["start"], one["stop"]) for one in told["segments"]] == [(o.start, o.stop) for o in expected.segments]
    assert told["segments_in_prompt"] == len(expected.segments)
    assert told["prompt_tokens"] == len(expected.answer.prompt_token_ids)
    assert told["timings"]["ttft_s"] > 0 and told["finish_reason"] == "length"


def test_through_a_pipe(invoke: Invoke, tiny_llama_dir: Path, expected: MarginsResult) -> None:
    code, out, _ = invoke(
        "margins", "-", QUESTION, *LIMITS, "--model", tiny_llama_dir, "--json", stdin=TEXT.encode() + b"\n"
    )
    assert code == 0 and json.loads(out)["token_ids"] == expected.answer.output.token_ids


def test_sequential_is_the_same(invoke: Invoke, tiny_llama_dir: Path, document: Path, expected: MarginsResult) -> None:
    arguments = (document, QUESTION, *LIMITS, "--model", tiny_llama_dir, "--json", "--sequential", "-v")
    code, out, err = invoke("margins", *arguments)
    assert code == 0 and json.loads(out)["token_ids"] == expected.answer.output.token_ids
    assert "segments" not in err


def test_a_person_decides(invoke: Invoke, tiny_llama_dir: Path, document: Path) -> None:
    """In whatever order the notes come; the last verdict lets it answer."""
    keys = b"y\ne\nmine\nx\nn\na\n"
    code, out, err = invoke(
        "margins", document, QUESTION, *LIMITS, "--model", tiny_llama_dir, "--interactive", "-v", stdin=keys
    )
    assert code == 0
    assert err.count("keep it?") == 5 and "new text:" in err
    assert re.search(r"2 of \d notes kept|[3-9] of \d notes kept", err)
    code, out, err = invoke("margins", document, QUESTION, *LIMITS, "--model", tiny_llama_dir, "--interactive")
    assert code == 0 and err.count("keep it?") == 1, "where nobody types, nobody is waited for"
    code, out, err = invoke(
        "margins", document, QUESTION, *LIMITS, "--model", tiny_llama_dir, "--interactive", stdin=b"s\n"
    )
    assert code == 0 and out.count("[") >= 1


def test_prompts_of_ones_own(invoke: Invoke, tiny_llama_dir: Path, document: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"answer_without": "So?", "answer": "So? {margins}"}))
    results = [
        json.loads(invoke("margins", document, QUESTION, *LIMITS, "--model", tiny_llama_dir, "--json", *more).out)
        for more in ((), ("--prompts", prompts), ("--prompts", prompts, "--system", "Be brief."), ("--raw",))
    ]
    assert len({result["prompt_tokens"] for result in results}) == 4
    assert set(MarginsPrompts.__dataclass_fields__) >= {"answer", "answer_without"}


@pytest.mark.parametrize(
    ("content", "question", "flags", "problem"),
    [
        (None, "What?", (), "FILE: '"),
        (b"", "What?", (), "document: is empty"),
        (b"\xff\xfe", "What?", (), "is not text in UTF-8: see byte 0"),
        (b"A whale.", "", (), "question: is empty"),
        (b"A whale.", "What?", ("--segment-tokens", "0"), "segment_tokens: must be between 1"),
        (b"A whale.", "What?", ("--classification", "text", "--threshold", "1"), "threshold: has a meaning only with"),
        (b"A whale.", "What?", ("--json", "--interactive"), "--interactive: has no effect with --json"),
        (b"A whale.", "What?", ("--prompts", "none.json"), "--prompts: 'none.json' cannot be read"),
        (b"A whale.", "What?", ("--raw", "--system", "x"), "--system: has no effect with --raw"),
        (b"whale " * 9000, "What?", (), "windows=True"),
        (b"A whale.", "What?", ("--margin-tokens", "9999"), "margins of at most 9999"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_refused(
    invoke: Invoke,
    tiny_llama_dir: Path,
    tmp_path: Path,
    content: bytes | None,
    question: str,
    flags: tuple[str, ...],
    problem: str,
) -> None:
    path = tmp_path / "document.txt"
    if content is not None:
        path.write_bytes(content)
    code, out, err = invoke("margins", path, question, *flags, "--model", tiny_llama_dir)
    assert (code, out) == (2, "") and problem in err and "Traceback" not in err, err


def test_a_prompts_file_that_is_wrong(invoke: Invoke, tiny_llama_dir: Path, document: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    for content, problem in (
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"x": "y"}', "'x' is not a field"),
    ):
        prompts.write_text(content)
        code, _, err = invoke("margins", document, QUESTION, "--prompts", prompts, "--model", tiny_llama_dir)
        assert code == 2 and problem in err


def test_nothing_comes_through_the_pipe(invoke: Invoke, tiny_llama_dir: Path) -> None:
    code, _, err = invoke("margins", "-", QUESTION, "--model", tiny_llama_dir)
    assert code == 2 and "document: is empty" in err
    code, _, err = invoke("margins", "-", QUESTION, "--interactive", "--model", tiny_llama_dir)
    assert code == 2 and "--interactive: needs the keyboard" in err
