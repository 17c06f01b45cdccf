"""`octavo chat` at a terminal: keys, pastes, and Ctrl-C."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo import LLM, SamplingParams

from .terminal import ASKS_FOR_PASTES, PASTE_BEGINS, PASTE_ENDS, Terminal

GREEDY = SamplingParams(temperature=0, max_tokens=8)
ENDLESS = ("--temperature", "0", "--ignore-eos", "--no-repetition-detection")


@pytest.fixture
def terminal(tiny_llama_dir: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    terminal = Terminal("chat", "--model", str(tiny_llama_dir), *getattr(request, "param", ENDLESS))
    yield terminal
    terminal.end()


def test_a_session(terminal: Terminal) -> None:
    """Ctrl-C at the prompt hints, during an answer stops it and not the program, and the next question is answered."""
    terminal.expect("/help lists the commands")
    terminal.expect_prompt()
    terminal.send("\x03")
    terminal.expect("Ctrl-D or /exit leaves")
    for _ in range(2):
        terminal.expect_prompt()
        terminal.send("hello\r")
        terminal.expect("\x1b\\[\\?2004l")  # the line is taken
        terminal.expect(r"[^\r\n]{10}")  # the answer is under way
        terminal.send("\x03")
        rest = terminal.expect("octavo: stopped")
        assert "Traceback" not in rest
        tokens = re.search(r"; (\d+) generated tokens", rest)
        assert tokens is not None and int(tokens[1]) < 3500, "stopped, not ended by the context"
    terminal.expect_prompt()
    terminal.send("/what\r")
    terminal.expect("unknown command /what")
    terminal.expect_prompt()
    terminal.send("/clear\r")
    terminal.expect_prompt()
    terminal.send("\x04")
    assert terminal.exit_code() == 0


def test_leaving_by_command(terminal: Terminal) -> None:
    terminal.expect_prompt()
    terminal.send("/exit\r")
    assert terminal.exit_code() == 0


JSON = ("--json", "--temperature", "0", "--max-tokens", "8")
PARAGRAPH = ["First line of four.", "", "/third/looks/like/a/command", "and the fourth"]


@pytest.mark.parametrize("terminal", [JSON], indirect=True)
@pytest.mark.parametrize("line_end", ["\n", "\r", "\r\n"])
def test_what_is_pasted_is_one_message(terminal: Terminal, tiny_llama_dir: Path, line_end: str) -> None:
    """Guards a paragraph that becomes a message a line: the program asks the terminal to mark pastes, and obeys."""
    text = "\n".join(PARAGRAPH)
    terminal.expect_prompt()
    terminal.send(PASTE_BEGINS + line_end.join(PARAGRAPH) + PASTE_ENDS)
    terminal.send("\r")
    assert_answers(terminal, tiny_llama_dir, text)


@pytest.mark.parametrize("terminal", [JSON], indirect=True)
@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("one \\\rtwo\\\rthree\r", "one \ntwo\nthree"),
        ('"""one\r/clear\r\rtwo"""\r', "one\n/clear\n\ntwo"),
        pytest.param('"""\rone\r"""\r', "one", marks=pytest.mark.slow),
        pytest.param('"""/exit"""\r', "/exit", marks=pytest.mark.slow),
        pytest.param("one \\\r\x04", "one", marks=pytest.mark.slow),
    ],
)
def test_messages_of_several_lines(terminal: Terminal, tiny_llama_dir: Path, keys: str, text: str) -> None:
    terminal.expect_prompt()
    for line in re.findall(r"[^\r]*\r|\x04", keys):
        terminal.send(line)
    assert_answers(terminal, tiny_llama_dir, text)


def assert_answers(terminal: Terminal, model: Path, text: str) -> None:
    """One answer came, to the text, and the program waits for the next message."""
    with LLM(str(model)) as llm:
        prompt = llm.chat_prompt([{"role": "user", "content": text.strip()}])
        (expected,) = llm.generate(prompt, GREEDY)
    terminal.expect(r'{"request_id"')
    seen = terminal.expect(ASKS_FOR_PASTES)
    answers = re.findall(r'"prompt_tokens": (\d+)', seen)
    assert answers == [str(len(prompt["prompt_token_ids"]))], seen
    assert f'"token_ids": {expected.outputs[0].token_ids}' in seen
    terminal.send("\x04")
    assert terminal.exit_code() == 0
