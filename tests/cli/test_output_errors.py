"""What cannot be written: told by name, with an exit code of its own, and never taken for a bug."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM
from octavo.cli.main import COMMANDS, EXIT_BROKEN_PIPE, EXIT_OUTPUT, main

from .conftest import Invoke

pytestmark = pytest.mark.usefixtures("quick_limits")

SOURCE = Path(__file__).parents[2] / "src"
ENV = {**os.environ, "PYTHONPATH": str(SOURCE), "OPENBLAS_NUM_THREADS": "1"}
FULL = "octavo: error: stdout cannot be written: No space left on device\n"
# One command line for each command; MODEL stands for a model.
LINES = {
    "run": ["run", "-m", "MODEL", "hello", "--max-tokens", "2"],
    "run --json": ["run", "-m", "MODEL", "hello", "--max-tokens", "2", "--json"],
    "run --n": ["run", "-m", "MODEL", "hello", "--max-tokens", "2", "--n", "2"],
    "chat": ["chat", "-m", "MODEL", "--max-tokens", "2"],
    "chat --json": ["chat", "-m", "MODEL", "--max-tokens", "2", "--json"],
    "margins": [
        "margins",
        "-m",
        "MODEL",
        str(SOURCE / "octavo" / "__main__.py"),
        "What?",
        "--max-tokens",
        "2",
        "--margin-tokens",
        "2",
    ],
    "ask": ["ask", "-m", "MODEL", "--docs", str(SOURCE.parent / "README.md"), "What is Octavo?", "--max-tokens", "2"],
    "serve": ["serve", "MODEL", "--port", "0"],
    "run-batch": ["run-batch", "-m", "MODEL", "-i", "-", "-o", "-"],
    "pull": ["pull", "MODEL"],
    "models": ["models"],
    "doctor": ["doctor", "--no-measure"],
    "bench": ["bench", "throughput", "-m", "MODEL", "--num-prompts", "1", "--input-len", "4", "--output-len", "2"],
    "eval": ["eval", "-m", "MODEL", "--tasks", "babi", "--modes", "full", "--samples", "1", "--max-tokens", "2"],
    "train-head": [
        *("train-head", "MODEL", "--output", "HEAD", "--tokens", "1000", "--text-tokens", "64"),
        *("--minutes", "0.0001", "--draft-vocab", "20", "--places", "1", "--max-model-len", "64"),
    ],
    "cache": ["cache", "explain", "-m", "MODEL", "hello"],
    "verify": ["verify", "--quick", "--skip", "transformers", "--skip", "exactness", "MODEL"],
    "--help": ["--help"],
    "run --help": ["run", "--help"],
    "--version": ["--version"],
}

REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "hello", "max_tokens": 2}}
STDIN = {"chat": b"hello\n", "run-batch": json.dumps(REQUEST).encode()}


def test_every_command_is_here() -> None:
    assert {name.split()[0] for name in LINES if not name.startswith("--")} == set(COMMANDS)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("name", LINES)
def test_a_full_disk(
    name: str, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MODEL": str(tiny_llama_dir), "HEAD": str(tmp_path / "head.safetensors")}
    arguments = [places.get(part, part) for part in LINES[name]]
    stdin = STDIN.get(arguments[0], b"")
    with monkeypatch.context() as patch, Path("/dev/full").open("w") as file:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        patch.setattr(sys, "stdout", file)
        assert main(arguments) == EXIT_OUTPUT
    assert capsys.readouterr().err.removeprefix(FULL) == ""


@pytest.mark.parametrize("name", ["models", "--help", "pull"])
@pytest.mark.parametrize(
    ("redirected", "code", "err"),
    [
        (">/dev/full", EXIT_OUTPUT, FULL),
        (">&-", EXIT_OUTPUT, "octavo: error: stdout cannot be written: Bad file descriptor\n"),
        ("| true; exit ${PIPESTATUS[0]}", EXIT_BROKEN_PIPE, ""),
        (">/dev/null 2>&-", 0, ""),
        (">/dev/null 2>/dev/full", 0, ""),
        ("<&- >/dev/null", 0, ""),
    ],
)
def test_a_whole_program(tiny_llama_dir: Path, tmp_path: Path, name: str, redirected: str, code: int, err: str) -> None:
    """The interpreter flushes once more when it exits, which must not be heard. A reader that has gone before anything
    was written is made sure of by a file: the program waits for it."""
    arguments = " ".join(str(tiny_llama_dir) if part == "MODEL" else part for part in LINES[name])
    command = f"{sys.executable} -m octavo {arguments}"
    if redirected.startswith("|"):
        gone = tmp_path / "gone"
        command = f"{{ until [ -e {gone} ]; do sleep 0.01; done; exec {command}; }}"
        redirected = f"| {{ exec <&-; touch {gone}; }}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", f"{command} {redirected}"], env=ENV, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", err)


def test_a_figure_file_on_a_full_disk(invoke: Invoke, tiny_llama_dir: Path) -> None:
    arguments = [str(tiny_llama_dir) if part == "MODEL" else part for part in LINES["bench"]]
    result = invoke(*arguments, "--output-json", "/dev/full")
    assert result.code == 2 and "--output-json: /dev/full cannot be written: No space left on device" in result.err


def test_what_says_something_is_not_what_does_it(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer is whole though nothing can be said on stderr beside it."""
    with Path("/dev/full").open("w", buffering=1) as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        monkeypatch.setattr(sys, "stderr", file)
        assert main(["run", "-v", "-m", str(tiny_llama_dir), "hi", "--temperature", "0", "--max-tokens", "9"]) == 0
    with LLM(str(tiny_llama_dir)) as llm:
        from octavo import SamplingParams

        expected = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(temperature=0, max_tokens=9))
    assert capsys.readouterr().out == expected[0].outputs[0].text + "\n"


def test_a_terminal_of_few_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a help text, or a path, that cannot be written in the terminal's encoding."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert main(["--help"]) == 0
    assert b"octavo [-h] [-v] [--version] COMMAND \\u2026" in written.getvalue()


def test_stdin_that_cannot_be_read(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, _: Any) -> int:
            raise OSError(5, "Input/output error")

    for command in ("run", "chat"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Broken())))
        assert main([command, "-m", str(tiny_llama_dir)]) == 2
        assert capsys.readouterr().err == "octavo: error: stdin: cannot be read: Input/output error\n"
