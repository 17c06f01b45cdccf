"""Messages as a person types or pastes them: a line, a pasted text, or several lines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

from octavo.core.errors import InvalidRequestError

QUOTES = '"""'
MAX_MESSAGE_CHARS = 64 << 20
_PROMPT, _FURTHER = "> ", ". "

ReadLine = Callable[[str], str]  # a line, or what was pasted into it, after showing a prompt; EOFError at the end


class Message(NamedTuple):
    text: str
    is_quoted: bool  # then it is never a command


def read_message(read_line: ReadLine) -> Message:
    '''A line; it goes on after a backslash at its end, and from """ to the next """ that ends a line.

    Raises EOFError when there is no more, InvalidRequestError when the input ends inside quotes.
    '''
    text = read_line(_PROMPT)
    if text.lstrip().startswith(QUOTES):
        return Message(_quoted(text.lstrip().removeprefix(QUOTES), read_line), is_quoted=True)
    while text.endswith("\\"):
        text = text[:-1]
        try:
            text += "\n" + _further(read_line, len(text))
        except EOFError:  # Ctrl-D ends the message; the next one ends the program
            break
    return Message(text, is_quoted=False)


def _quoted(text: str, read_line: ReadLine) -> str:
    lines = [text]
    while not lines[-1].rstrip().endswith(QUOTES):
        try:
            lines.append(_further(read_line, sum(map(len, lines))))
        except EOFError:
            raise InvalidRequestError("stdin", f"ends inside a message that {QUOTES} began") from None
    return "\n".join(lines).rstrip().removesuffix(QUOTES).strip("\n")


def _further(read_line: ReadLine, num_chars: int) -> str:
    if num_chars > MAX_MESSAGE_CHARS:
        raise InvalidRequestError("stdin", f"has a message of more than {MAX_MESSAGE_CHARS} characters")
    return read_line(_FURTHER)


def terminal_reader() -> ReadLine:
    """Reads from the terminal, with editing, history and bracketed paste (what is pasted is one line to the reader,
    whatever line ends it has)."""
    if not any(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr)):
        return _read_unseen
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    # Where stdout goes into a file, the prompt is shown on stderr.
    session: PromptSession[str] = PromptSession(output=create_output(always_prefer_tty=True))
    return session.prompt


def _read_unseen(prompt: str) -> str:
    """There is nothing to edit a line on."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
