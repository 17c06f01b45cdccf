"""Answer a file of requests in OpenAI's batch format.

Each line of the input is a request to a route of `octavo serve`:

  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 50}}

Each line of the output is the answer that the server would give, in the order in which they are done:

  {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "body": {...}, ...}, "error": null}

A batch that was interrupted, in whatever way, goes on when the same command is given again: what is answered in the
output file stays, and the rest is asked, failed requests included. A line that is no request gets an answer with an
error, and the others go on. Ctrl-C finishes what is under way, a second one ends it at once.

Exit codes: 0 when every request has succeeded, 3 when some failed, 130 when it was interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from octavo.cli.engine_args import add_engine_arguments, engine_config
from octavo.cli.serve import check_packages
from octavo.cli.setting_args import add_setting_arguments, given_flags
from octavo.core.errors import InvalidRequestError, shown
from octavo.core.settings import Given, from_environment, made, variable

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.server.batch.answers import BatchAnswer, Output
    from octavo.server.batch.requests import BadLine, BatchRequest
    from octavo.server.settings import ServerSettings

EXIT_SOME_FAILED, EXIT_INTERRUPTED = 3, 130
_SETTINGS = "served_model_name", "generation_config", "limits"  # of the server
_NO_LIMIT = 2**31 - 1
_TOLD_FAILURES = 5  # at most, at the end
_LOG_SECONDS = 30.0  # between two records of how far it is, where no bar is shown

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo run-batch`."""
    parser.usage = "octavo run-batch [-h] [-v] -i FILE -o FILE [--overwrite] [--model MODEL] [flags]"
    check_packages("octavo run-batch")
    from octavo.server.settings import ServerSettings

    add = parser.add_argument
    add("-i", "--input-file", required=True, metavar="FILE", help="requests, one a line; - is standard input")
    add("-o", "--output-file", required=True, metavar="FILE", help="answers, one a line; - is standard output")
    add("--overwrite", action="store_true", help="begin anew, whatever the output file holds")
    others = [one.name for one in fields(ServerSettings) if one.name not in _SETTINGS]
    text = f"Each can also be set by a variable: --limits by {variable('limits')}."
    add_setting_arguments(parser.add_argument_group("server settings", text), ServerSettings, leave_out=others)
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Everything that can be checked without the model is checked before it is loaded."""
    from octavo.server.batch.ledger import open_ledger
    from octavo.server.batch.requests import BatchInput

    settings = _settings(args)
    config = engine_config(args)
    file = _open_input(args.input_file)
    size = _size(file)
    with (
        open_ledger() as ledger,
        closing(BatchInput(args.input_file, file, ledger, settings.limits)) as source,
        closing(_open_output(args, file)) as output,
    ):
        output.find(ledger)
        items = iter(source)
        first = next(items, None)
        if not source.num_requests:
            raise InvalidRequestError("--input-file", f"{args.input_file} holds no request")
        told = _Told(args, size)
        if first is None:
            output.begin()
            complete = True
        else:
            complete = _answer(config, settings, chain([first], items), output, told)
        return told.end(source.num_answered, ledger.num_unasked, complete=complete)


def _answer(
    config: EngineConfig,
    settings: ServerSettings,
    items: Iterator[BatchRequest | BadLine],
    output: Output,
    told: _Told,
) -> bool:
    """What is left to do; whether it was all done."""
    from octavo.cli.answering import spinner
    from octavo.hub import resolve_model
    from octavo.server.app import make_app
    from octavo.server.batch.runner import BatchRunner
    from octavo.server.served_llm import ServedLLM

    resolve_model(config.model)  # with its own progress bars, when it has to be fetched
    with spinner(f"loading {config.model}"):
        llm = ServedLLM(**asdict(config))

    async def answer() -> bool:
        runner = BatchRunner(make_app(llm, settings), items, output, told.note)

        def stop() -> None:
            told.stopping(runner.num_unanswered, again=runner.stopped)
            runner.stop()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        return await runner.run()

    with closing(llm):
        output.check_fingerprint(llm.system_fingerprint)
        output.begin()
        with told:
            return asyncio.run(answer())


def _settings(args: argparse.Namespace) -> ServerSettings:
    """From flags over the environment. Raises ConfigError."""
    from octavo.server.settings import ServerSettings

    variables = {name: os.environ[name] for name in map(variable, _SETTINGS) if name in os.environ}
    given = {**from_environment(ServerSettings, variables), **given_flags(args, ServerSettings)}
    # As much is asked at once as there is room for: nothing is to be refused because others wait.
    for name in ("max_num_queued_reqs", "max_num_queued_tokens"):
        given[name] = Given(_NO_LIMIT, "")
    return made(ServerSettings, given)


# --- files ---


def _open_input(name: str) -> BinaryIO:
    """Raises InvalidRequestError."""
    try:
        if name != "-":
            return Path(name).open("rb")
        if sys.stdin is None:
            raise InvalidRequestError("--input-file", "standard input is closed")
        # A file of its own: that of `sys.stdin` is locked while somebody waits for a line, also when the program ends.
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    except io.UnsupportedOperation:  # it is no file: whoever called us put it there
        return sys.stdin.buffer
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        if isinstance(error, InvalidRequestError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequestError("--input-file", f"{shown(name)} cannot be read: {reason}") from None


def _size(file: BinaryIO) -> int | None:
    """Bytes that are left of it, if that is known."""
    try:
        return os.fstat(file.fileno()).st_size - file.tell() if file.seekable() else None
    except io.UnsupportedOperation:
        return None


def _open_output(args: argparse.Namespace, file: BinaryIO) -> Output:
    """Raises InvalidRequestError, also for what is the input as well."""
    from octavo.server.batch.answers import open_output

    if args.output_file == "-":
        if args.overwrite:
            raise InvalidRequestError("--overwrite", "has no effect on standard output")
        return _standard_output()
    if _is(file, args.output_file):
        raise InvalidRequestError("--output-file", f"{args.output_file} is the input as well")
    return open_output(args.output_file, overwrite=args.overwrite)


def _is(file: BinaryIO, name: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), Path(name).stat())
    except (OSError, ValueError):  # it is no file; there is none of that name
        return False


def _standard_output() -> Output:
    from octavo.server.batch.answers import Output, as_line

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")  # as JSON is, whatever the terminal

    class StandardOutput(Output):
        """What cannot be written is told as with every command."""

        def put(self, answer: BatchAnswer) -> None:
            sys.stdout.write(as_line(answer).decode())
            sys.stdout.flush()

        def close(self) -> None:
            """It is not ours."""

    return StandardOutput("standard output", sys.stdout.buffer)


# --- what is told ---


class _Told:
    """A bar on stderr, if that is a terminal, and else now and then a record; and in the end what came of it."""

    def __init__(self, args: argparse.Namespace, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._input, self._output = args.input_file, args.output_file
        self._resumable = args.output_file != "-"
        self._num_succeeded = 0
        self._num_failed = 0
        self._failures: list[str] = []  # the first
        self._logged = time.monotonic()
        console = Console(stderr=True)
        shown_bar = console.is_terminal and not (args.output_file == "-" and sys.stdout.isatty())
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        # Of bytes: how many lines there are is not known before all are read.
        self._bar = Progress(
            *columns,
            console=console,
            transient=True,
            refresh_per_second=2,
            disable=not shown_bar,
            redirect_stdout=False,
        )
        self._task = self._bar.add_task("answering", total=total)

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def note(self, item: BatchRequest | BadLine, answer: BatchAnswer) -> None:
        """A line was written."""
        if answer.succeeded:
            self._num_succeeded += 1
        else:
            self._num_failed += 1
            if len(self._failures) < _TOLD_FAILURES:
                self._failures.append(_failure(item.number, answer))
        self._bar.update(self._task, advance=item.size, description=self._so_far())
        if self._bar.disable and time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("%s", self._so_far())

    def _so_far(self) -> str:
        failed = f", {self._num_failed:,} failed" if self._num_failed else ""
        return f"{self._num_succeeded:,} answered{failed}"

    def stopping(self, num_left: int, again: bool) -> None:
        """A signal came."""
        how = "ended" if again else "finished first; once more ends them"
        sys.stderr.write(f"octavo: interrupted: {num_left} requests under way are {how}\n")

    def end(self, num_before: int, num_unasked: int, *, complete: bool) -> int:
        """Tell what came of it; the exit code."""
        before = f"; {num_before:,} had been before" if num_before else ""
        sys.stderr.write(f"octavo: {self._so_far()}{before}\n")
        for failure in self._failures:
            sys.stderr.write(f"octavo: {failure}\n")
        if self._num_failed > len(self._failures):
            sys.stderr.write(f"octavo: and {self._num_failed - len(self._failures):,} more\n")
        if not complete:
            if self._resumable:
                sys.stderr.write("octavo: interrupted; the same command goes on from here\n")
            return EXIT_INTERRUPTED
        if num_unasked:
            problem = f"answers {num_unasked:,} requests that {self._input} does not hold"
            sys.stderr.write(f"octavo: {self._output} {problem}\n")
        return EXIT_SOME_FAILED if self._num_failed else 0


def _failure(number: int, answer: BatchAnswer) -> str:
    """Of what has not succeeded, in a line."""
    if answer.error is not None:
        return answer.error.message
    assert answer.response is not None
    error = json.loads(bytes(answer.response.body))["error"]
    return f"line {number}: {answer.response.status_code}: {error['message']}"
