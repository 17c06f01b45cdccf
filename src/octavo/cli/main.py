"""The program `octavo`: finds the command, runs it, and turns errors into exit codes.

Exit codes: 0 done; 1 a bug (unexpected exception); 2 wrong usage or wrong input; 3 a check of `verify` or a
request of `run-batch` failed; 74 stdout cannot be written; 130 interrupted; 141 the reader of our output went away.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, cast

from octavo import __version__
from octavo.cli.setting_args import SWITCH, switches_told
from octavo.cli.streams import OutputError, checked_streams
from octavo.config import LOG_LEVELS, warn_of_unknown_variables
from octavo.core.errors import ConfigError, OctavoError, shortened, shown

EXIT_BUG, EXIT_USAGE, EXIT_OUTPUT, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 74, 130, 141

# Name -> (module, help). The module is imported when the command is chosen, so `octavo --help` stays fast.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("octavo.cli.run", "answer one prompt"),
    "margins": ("octavo.cli.margins", "read a document with notes in its margins, and answer a question"),
    "ask": ("octavo.cli.ask", "answer a question from the documents in a folder, with citations"),
    "chat": ("octavo.cli.chat", "talk with a model in the terminal"),
    "serve": ("octavo.cli.serve", "serve a model over HTTP, with the routes of OpenAI's API and Anthropic's"),
    "run-batch": ("octavo.cli.run_batch", "answer a file of requests in OpenAI's batch format"),
    "pull": ("octavo.cli.pull", "fetch models, or verify those that are here"),
    "models": ("octavo.cli.models", "list the models on this machine"),
    "doctor": ("octavo.cli.doctor", "say what is found on this machine, and how fast it can be"),
    "bench": ("octavo.cli.bench", "measure latency, throughput, start-up or a server"),
    "eval": ("octavo.cli.eval", "score a model on long documents, in several ways of reading them"),
    "train-head": ("octavo.cli.train_head", "train a head that guesses tokens, for speculative decoding"),
    "cache": ("octavo.cli.cache", "explain what of a prompt the prefix cache has, and why not more"),
    "verify": ("octavo.cli.verify", "check a model against transformers and against itself"),
}

logger = logging.getLogger("octavo.cli")


class Command(Protocol):
    """What a module in `COMMANDS` defines."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments; the module's docstring becomes the description."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do the work and return the exit code. OctavoError becomes a message and exit code 2."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with checked_streams():
        try:
            code = _guarded(arguments)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            return EXIT_BROKEN_PIPE
        except OutputError as error:
            _print_error(str(error))
            return EXIT_OUTPUT


def _guarded(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except OutputError:
        raise
    except SystemExit as stop:  # argparse: --help, --version and usage errors.
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else EXIT_USAGE
    except OctavoError as error:
        _print_error(str(error))
        logger.info("where the error came from:", exc_info=True)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        _print_error(f"unexpected {type(error).__name__}: {error}")
        if logger.isEnabledFor(logging.INFO):
            logger.info("traceback:", exc_info=True)
        else:
            sys.stderr.write("This is a bug in Octavo. Please report it with what `octavo -v …` prints.\n")
        return EXIT_BUG


def _dispatch(arguments: list[str]) -> int:
    parser = _top_parser()
    top = parser.parse_args(arguments)
    if top.command is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    if top.command not in COMMANDS:
        parser.error(_unknown_command(top.command))
    _set_up_logging(top.verbose)
    warn_of_unknown_variables(elsewhere=_settings_of_serve)
    module, summary = COMMANDS[top.command]
    command = cast("Command", importlib.import_module(module))
    command_parser = _Parser(
        prog=f"octavo {top.command}",
        description=(getattr(command, "__doc__", None) or summary).strip(),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    _add_verbose(command_parser)
    command.add_arguments(command_parser)
    args = command_parser.parse_args(top.arguments)
    args.verbose += top.verbose
    _set_up_logging(args.verbose)
    return command.run(args)


def _settings_of_serve() -> list[str]:
    from dataclasses import fields

    from octavo.server.settings import ServerSettings

    return ["config", *(one.name for one in fields(ServerSettings))]


class _Parser(argparse.ArgumentParser):
    """What was typed may be of any length."""

    def error(self, message: str) -> NoReturn:
        super().error(shortened(message))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        switches = {name for one in self._actions if one.metavar == SWITCH for name in one.option_strings}
        return super().parse_known_args(switches_told(list(args or ()), switches), namespace)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Asks for the terminal's width itself: `shutil`, which argparse asks, brings compression libraries along."""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size(1).columns
        except (ValueError, OSError):
            columns = 0
        super().__init__(prog, width=(columns or 80) - 2)


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:{width}}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = _Parser(
        prog="octavo",
        usage="octavo [-h] [-v] [--version] COMMAND …",
        description="Octavo, an LLM inference engine for work that branches.",
        epilog=f"commands:\n{commands}\n\n`octavo COMMAND --help` tells more.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    _add_verbose(parser)
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="say more, with tracebacks of errors; twice for all"
    )


def _unknown_command(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown command {_printable(name)!r}{hint} (choose from {', '.join(COMMANDS)})"


def _set_up_logging(verbose: int) -> None:
    """Records go to stderr: warnings, with -v information, with -vv all. OCTAVO_LOG_LEVEL sets the level by name."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    name = os.environ.get("OCTAVO_LOG_LEVEL", "")
    if name and name.lower() not in LOG_LEVELS:
        raise ConfigError(f"OCTAVO_LOG_LEVEL: must be one of {', '.join(LOG_LEVELS)}, not {shown(name)}")
    if name and not verbose:
        level = getattr(logging, name.upper())
    root = logging.getLogger("octavo")
    root.setLevel(level)
    handler = logging.StreamHandler()  # stderr as it is now, not as it was at an earlier call of main().
    handler.setFormatter(logging.Formatter("octavo: %(message)s"))
    root.handlers[:] = [handler]


def _print_error(message: str) -> None:
    sys.stderr.write(f"octavo: error: {_printable(message)}\n")


def _printable(text: str) -> str:
    """`text` with control characters escaped: a file name must not be able to drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


if __name__ == "__main__":
    sys.exit(main())
