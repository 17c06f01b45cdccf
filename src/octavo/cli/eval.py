"""Score a model on long documents that are made up on the spot, asked about in several ways.

Tasks: niah_single and niah_multikey (a needle in a haystack: find a number), kv_retrieval (find the value of a UUID
among others), vt (track a value through variables), cwe (find the most common words), babi (say where a person is).

Modes, in each of which the same examples are asked: full puts the whole document into the prompt; margins reads it with
notes in its margins, as `octavo margins` does; retrieved puts only the passages into the prompt that fit the question.

Scores are means from 0 to 1 with 95% bootstrap intervals; "less full" is the difference from full, example by example.
Seconds are medians, numbers of tokens means. Every example begins with an empty prefix cache: reused is what a mode
itself computed once and used again; kept, of margins, how many notes were. Ctrl-C ends it and shows what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo import __version__
from octavo.cli.engine_args import add_engine_arguments, engine_config
from octavo.cli.output_files import check_writable, with_errors_named
from octavo.core.errors import InvalidRequestError, OctavoError, shown
from octavo.core.settings import flag
from octavo.evaluation.modes import MODES, ModeSettings
from octavo.evaluation.plot import check_plot, save_plot
from octavo.evaluation.report import failures, table, to_json
from octavo.evaluation.runner import EvalParams, Evaluation, Run
from octavo.evaluation.summary import summarise
from octavo.evaluation.tasks import TASKS

if TYPE_CHECKING:
    from octavo.llm import LLM

_DEFAULTS = EvalParams()
_SETTINGS = _DEFAULTS.settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo eval`."""
    parser.usage = "octavo eval [-h] [-v] [--model MODEL] [--tasks TASK,…] [--modes MODE,…] [--lengths N,…] [flags]"
    add = parser.add_argument
    add("--tasks", metavar="TASK,…", help=f"of {', '.join(TASKS)} (default: all)")
    add("--modes", metavar="MODE,…", help=f"of {', '.join(MODES)} (default: all)")
    add("--lengths", metavar="N,…", help=f"tokens of a document, at most (default {_listed(_DEFAULTS.lengths)})")
    add("--depths", metavar="P,…", help=f"where needles stand, in percent ({_listed(_DEFAULTS.depths)}, in turn)")
    add("--samples", type=int, metavar="N", help=f"examples a task and length (default {_DEFAULTS.samples})")
    add("--seed", type=int, metavar="N", help=f"of the examples (default {_DEFAULTS.seed})")
    add("--max-tokens", type=int, metavar="N", help="most tokens of an answer (default: what the task needs)")
    add("--json", type=Path, metavar="FILE", help="write all figures, and every answer, to FILE")
    add("--plot", type=Path, metavar="FILE", help="draw scores and seconds: FILE.png, .svg or .pdf; needs matplotlib")
    add = parser.add_argument_group("modes").add_argument
    add("--segment-tokens", type=int, metavar="N", help=f"margins: of a segment ({_SETTINGS.segment_tokens})")
    add("--margin-tokens", type=int, metavar="N", help=f"margins: of a note ({_SETTINGS.margin_tokens})")
    add("--threshold", type=float, metavar="X", help=f"margins: keep notes that score more ({_SETTINGS.threshold:g})")
    add("--windows", action="store_true", default=None, help="margins: read what is longer than the context in parts")
    add("--passages", type=int, metavar="N", help=f"retrieved: most passages ({_SETTINGS.passages})")
    add("--passage-tokens", type=int, metavar="N", help=f"retrieved: of a passage ({_SETTINGS.passage_tokens})")
    add_engine_arguments(parser, leave_out=["seed", "kv_offload_dir", "kv_offload_bytes"])


def run(args: argparse.Namespace) -> int:
    """Everything that can be checked without the model is checked before it is loaded."""
    params = _params(args)
    config = engine_config(args)
    if config.kv_offload_dir is not None:
        raise InvalidRequestError("OCTAVO_KV_OFFLOAD_DIR", "must not be set: a mode would use what another computed")
    if args.plot is not None:
        check_plot("--plot", args.plot)
    for field, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None:
            check_writable(field, path)
    from octavo.cli.answering import open_model

    with open_model(config, args.verbose) as answerer:
        with _flags_named():
            evaluation = Evaluation(answerer.llm, params)
        runs: list[Run] = []
        try:
            with _Progress(params.num_runs) as progress:
                for one in evaluation:
                    runs.append(one)
                    progress.advance(one)
        except (KeyboardInterrupt, OctavoError):
            sys.stderr.write(f"octavo: ended after {len(runs)} of {params.num_runs} runs\n")
            _tell(args, answerer.llm, params, runs)
            raise
        _tell(args, answerer.llm, params, runs)
    return 0


# --- what is asked for ---


def _params(args: argparse.Namespace) -> EvalParams:
    given: dict[str, Any] = {}
    for name in ("tasks", "modes"):
        if (text := getattr(args, name)) is not None:
            given[name] = tuple(part.strip() for part in text.split(","))
    for name in ("lengths", "depths"):
        if (text := getattr(args, name)) is not None:
            given[name] = tuple(_integer(flag(name), part) for part in text.split(","))
    for name in ("samples", "seed"):
        if (value := getattr(args, name)) is not None:
            given[name] = value
    settings = {one.name: value for one in fields(ModeSettings) if (value := getattr(args, one.name)) is not None}
    with _flags_named():
        params = EvalParams(**given, settings=ModeSettings(**settings))
    for mode, names in (
        ("margins", ("segment_tokens", "margin_tokens", "threshold", "windows")),
        ("retrieved", ("passages", "passage_tokens")),
    ):
        for name in names:
            if mode not in params.modes and getattr(args, name) is not None:
                raise InvalidRequestError(flag(name), f"has no effect without the mode {mode}")
    if args.depths is not None and not any(TASKS[name].has_depth for name in params.tasks):
        raise InvalidRequestError("--depths", f"has no effect on {_listed(params.tasks)}: nothing stands at one place")
    return params


def _integer(field: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidRequestError(field, f"must be integers separated by commas, not {shown(text)}") from None


@contextmanager
def _flags_named() -> Iterator[None]:
    """Errors name the flag, not the field."""
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(flag(error.field), error.problem) from None


def _listed(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values))


# --- what is told ---


class _Progress:
    """A bar on stderr, if that is a terminal."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self._bar = Progress(
            *columns,
            console=console,
            transient=True,
            refresh_per_second=2,  # drawing takes time from what is measured
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("evaluating", total=total)

    def advance(self, run: Run) -> None:
        self._bar.update(self._task, description=f"{run.example.task} {run.example.length}", advance=1)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


def _tell(args: argparse.Namespace, llm: LLM, params: EvalParams, runs: list[Run]) -> None:
    """The table, why some could not be run, and the files."""
    rows = summarise(runs)
    if rows:
        from rich.console import Console

        Console(width=10_000).print(table(rows))  # whole lines, as in `octavo models`
    for line in failures(rows):
        print(line)
    sys.stdout.flush()
    if args.json is not None:
        report = to_json(params, runs, rows, _about(llm), complete=len(runs) == params.num_runs)
        text = json.dumps(report, indent=1) + "\n"
        with_errors_named("--json", args.json, lambda: args.json.write_text(text))
    if args.plot is not None and rows:
        with_errors_named("--plot", args.plot, lambda: save_plot(rows, args.plot, llm.config.model))


def _about(llm: LLM) -> dict[str, Any]:
    return {
        "octavo": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": llm.config.model,
        "system_fingerprint": llm.system_fingerprint,
        "max_model_len": llm.max_model_len,
        "engine": asdict(llm.config),
    }
