"""Answer one prompt; the answer goes to stdout as it comes.

The prompt is the argument, or what comes in through a pipe, or both: the argument, an empty line, then the pipe's text.
It becomes a user's message in the model's chat template where there is one. Tokens are drawn as the model's files
recommend, anew each time; --temperature 0 gives the most probable answer, which is always the same.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from octavo.cli.engine_args import add_engine_arguments, engine_config
from octavo.cli.sampling_args import add_beam_arguments, add_sampling_arguments, refuse_for_machines, request_params
from octavo.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from octavo.core.outputs import RequestOutput

MAX_STDIN_BYTES = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo run`."""
    parser.usage = "octavo run [-h] [-v] [--model MODEL] [flags] [PROMPT]"
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to answer")
    parser.add_argument("-p", "--prompt", dest="prompt_flag", metavar="PROMPT", help="the same, as a flag")
    parser.add_argument("--system", metavar="TEXT", help="system message, before the prompt")
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the prompt as it is")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, for machines")
    add_sampling_arguments(parser)
    add_beam_arguments(parser)
    add_engine_arguments(parser, leave_out=["seed"])


def run(args: argparse.Namespace) -> int:
    """Everything that can be checked without the model is checked before it is loaded."""
    request_params(args)
    if not args.json:
        refuse_for_machines(args)
    config = engine_config(args)
    text = _text_of(args)
    from octavo.cli.answering import (
        AnswerInterrupted,
        TextWriter,
        check_system,
        check_unicode,
        log_sampling,
        open_model,
        spinner,
        tell_repetition,
        to_json,
    )

    check_unicode("prompt", text)
    check_system(args.system, raw=args.raw)
    with open_model(config, args.verbose, chats=not args.raw) as answerer:
        params = request_params(args, answerer.llm.generation_config)
        log_sampling(params)
        prompt = answerer.prompt_of(text, args.system, raw=args.raw)
        if args.json:
            import json

            output = answerer.ask(prompt, params)
            print(json.dumps(to_json(output, answerer.model, params)))
        elif params.num_outputs > 1:
            with spinner("generating"):
                output = answerer.ask(prompt, params)
            _print_outputs(output)
        else:
            writer = TextWriter()
            try:
                output = answerer.ask(prompt, params, writer.write)
            except AnswerInterrupted:
                writer.end_line()
                raise
            writer.end_line()
        tell_repetition(output)
        _report(output, args.verbose)
    return 0


def _text_of(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.prompt_flag is not None:
        raise InvalidRequestError("prompt", "is given twice, as an argument and with --prompt")
    given = args.prompt if args.prompt is not None else args.prompt_flag
    piped = piped_text()
    if given is None and piped is None:
        raise InvalidRequestError("prompt", "is missing; give one as an argument or through a pipe")
    text = "\n\n".join(part for part in (given, piped) if part)
    if not text.strip():
        raise InvalidRequestError("prompt", "is empty")
    return text


def piped_text() -> str | None:
    """What comes in through a pipe or file, without its last line end; None when stdin is a terminal or closed."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    try:
        data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    except OSError as error:
        raise InvalidRequestError("stdin", f"cannot be read: {error.strerror}") from None
    if len(data) > MAX_STDIN_BYTES:
        raise InvalidRequestError("stdin", f"holds more than {MAX_STDIN_BYTES} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError("stdin", f"is not valid UTF-8 at byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")


def _print_outputs(output: RequestOutput) -> None:
    from octavo.cli.answering import TextWriter

    for completion in output.outputs:
        writer = TextWriter()
        writer.write(f"=== output {completion.index + 1} of {len(output.outputs)} ===\n")
        writer.write(completion.text)
        writer.end_line()


def _report(output: RequestOutput, verbose: int) -> None:
    from octavo.cli.answering import is_terminal, speed_line

    if verbose or is_terminal(sys.stderr):
        sys.stderr.write(speed_line(output) + "\n")
