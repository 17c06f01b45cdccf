"""Talk with a model in the terminal.

Ctrl-C stops an answer, Ctrl-D or /exit leaves, /clear forgets the conversation, /help lists the commands. What is
pasted is one message, whatever lines it has; a line that ends with a backslash goes on in the next, and a message
between \"\"\" and \"\"\" has as many as it likes. When stdin is not a terminal its lines are messages by the same
rules; each is answered, and the program ends with the input. Tokens are drawn as the model's files recommend, anew for
each answer; --temperature 0 gives the most probable answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from octavo.cli.engine_args import add_engine_arguments, engine_config
from octavo.cli.message_input import Message, read_message, terminal_reader
from octavo.cli.sampling_args import add_sampling_arguments, refuse_for_machines, sampling_params
from octavo.cli.streams import OutputError
from octavo.core.errors import EngineClosedError, InvalidRequestError, OctavoError

if TYPE_CHECKING:
    from octavo.cli.answering import Answerer
    from octavo.core.outputs import RequestOutput
    from octavo.core.params import SamplingParams
    from octavo.frontend import ChatPrompt

MAX_LINE_BYTES = 16 << 20
_ROOM = 256  # tokens of the context kept free for an answer, or a quarter of a small context
_HELP = """\
/clear, /reset  forget the conversation
/exit, /quit    leave (Ctrl-D does, too)
/help           this list
Ctrl-C          stop the answer
\\               at the end of a line: the message goes on
\"\"\"             begins a message of several lines, and ends it"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo chat`."""
    parser.usage = "octavo chat [-h] [-v] [--model MODEL] [flags]"
    parser.add_argument("--system", metavar="TEXT", help="system message, at the start of the conversation")
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer, for machines")
    add_sampling_arguments(parser, leave_out=["n"])
    add_engine_arguments(parser, leave_out=["seed"])


def run(args: argparse.Namespace) -> int:
    """Everything that can be checked without the model is checked before it is loaded."""
    sampling_params(args)
    if not args.json:
        refuse_for_machines(args)
    if args.detokenize is False:
        raise InvalidRequestError("--no-detokenize", "a conversation goes on from the text of its answers")
    config = engine_config(args)
    from octavo.cli.answering import check_system, is_terminal, log_sampling, open_model

    check_system(args.system, raw=False)
    interactive = is_terminal(sys.stdin)
    with open_model(config, args.verbose) as answerer:
        if answerer.llm.tokenizer.chat_template is None:
            raise InvalidRequestError(
                "model", f"{config.model} has no chat template and cannot chat; `octavo run` continues a text"
            )
        params = sampling_params(args, answerer.llm.generation_config)
        log_sampling(params)
        chat = Chat(answerer, params, args.system, as_json=args.json, show_speed=_shows_speed(args))
        if interactive:
            _talk(chat)
        else:
            _answer_lines(chat)
    return 0


def _shows_speed(args: argparse.Namespace) -> bool:
    from octavo.cli.answering import is_terminal

    return bool(args.verbose) or is_terminal(sys.stderr)


class Chat:
    """A conversation."""

    def __init__(
        self, answerer: Answerer, params: SamplingParams, system: str | None, *, as_json: bool, show_speed: bool
    ) -> None:
        self._answerer = answerer
        self._params = params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []  # of user and assistant, alternately
        self._as_json = as_json
        self._show_speed = show_speed

    def clear(self) -> None:
        self._turns.clear()

    def answer(self, text: str) -> None:
        """Answer a message and print it. What Ctrl-C stops stays in the conversation as far as it got; a message that
        was not answered at all does not. Raises AnswerInterrupted or InvalidRequestError.
        """
        from octavo.cli.answering import AnswerInterrupted, TextWriter

        prompt, turns = self._fitting([*self._turns, {"role": "user", "content": text}])
        writer = TextWriter()
        output: RequestOutput | None = None
        try:
            output = self._answerer.ask(prompt, self._params, None if self._as_json else writer.write)
        except AnswerInterrupted as interrupted:
            output = interrupted.output
            raise
        finally:
            if writer.started or (output is not None and not self._as_json):
                writer.end_line()
            if output is not None:
                self._turns = [*turns, {"role": "assistant", "content": output.outputs[0].text}]
                self._tell(output)

    def _fitting(self, turns: list[dict[str, str]]) -> tuple[ChatPrompt, list[dict[str, str]]]:
        """The turns as a prompt, without the oldest if they have outgrown the context, and those that are left."""
        llm = self._answerer.llm
        most = llm.max_model_len
        room = min(_ROOM, most // 4)
        kept = turns
        prompt = llm.chat_prompt(self._system + kept)
        while len(prompt["prompt_token_ids"]) > most - room and len(kept) > 1:
            kept = kept[2:]
            prompt = llm.chat_prompt(self._system + kept)
        num_tokens = len(prompt["prompt_token_ids"])
        if num_tokens >= most:
            raise InvalidRequestError(
                "prompt", f"the message has {num_tokens} tokens in the chat template, and the context has only {most}"
            )
        if len(kept) < len(turns):
            note(f"the context of {most} tokens is full: the first {(len(turns) - len(kept)) // 2} turns were dropped")
        return prompt, kept

    def _tell(self, output: RequestOutput) -> None:
        from octavo.cli.answering import speed_line, tell_repetition, to_json

        if self._as_json:
            print(json.dumps(to_json(output, self._answerer.model, self._params)), flush=True)
        tell_repetition(output)
        if output.outputs[0].finish_reason == "length" and self._params.max_tokens is None:
            note(f"the answer ends here: the context of {self._answerer.llm.max_model_len} tokens is full")
        if self._show_speed:
            sys.stderr.write(speed_line(output) + "\n")


def note(text: str) -> None:
    sys.stderr.write(f"octavo: {text}\n")
    sys.stderr.flush()


# --- a terminal ---


def _talk(chat: Chat) -> None:
    from octavo.cli.answering import AnswerInterrupted

    read_line = terminal_reader()
    note("Ctrl-D leaves, /help lists the commands")
    while True:
        try:
            _talk_about(chat, read_message(read_line))
        except EOFError:
            sys.stderr.write("\n")
            return
        except AnswerInterrupted:
            note("stopped")
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            note("Ctrl-D or /exit leaves")
        except UnicodeDecodeError:
            note("the line is not valid UTF-8")
        except (EngineClosedError, OutputError):
            raise
        except OctavoError as error:
            note(str(error))


def _talk_about(chat: Chat, message: Message) -> None:
    text = message.text.strip()
    if not message.is_quoted and text.startswith("/") and len(text.split()) == 1:
        if not _command(chat, text):
            note(f"unknown command {text}; /help lists them")
    elif text:
        chat.answer(text)


def _command(chat: Chat, line: str) -> bool:
    """Do what a command says; False when it is none. /exit raises EOFError."""
    if line in ("/exit", "/quit"):
        raise EOFError
    if line in ("/clear", "/reset"):
        chat.clear()
    elif line == "/help":
        sys.stderr.write(_HELP + "\n")
    else:
        return False
    return True


# --- a pipe ---


def _answer_lines(chat: Chat) -> None:
    lines = _piped_lines()

    def read_line(_: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    while True:
        try:
            message = read_message(read_line)
            if message.text.strip() and (message.is_quoted or not _command(chat, message.text.strip())):
                chat.answer(message.text)
        except EOFError:
            return


def _piped_lines() -> Iterator[str]:
    if sys.stdin is None:
        return
    while data := _line_of_stdin():
        if len(data) > MAX_LINE_BYTES:
            raise InvalidRequestError("stdin", f"has a line of more than {MAX_LINE_BYTES} bytes")
        try:
            yield data.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InvalidRequestError("stdin", f"is not valid UTF-8 at byte {error.start} of a line") from None


def _line_of_stdin() -> bytes:
    try:
        return sys.stdin.buffer.readline(MAX_LINE_BYTES + 1)
    except OSError as error:
        raise InvalidRequestError("stdin", f"cannot be read: {error.strerror}") from None
