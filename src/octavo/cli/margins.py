"""Read a document with notes in its margins, and answer a question about it (Writing in the Margins).

The document is read segment by segment. After each the model notes what helps to answer the question, and says whether
the note is relevant; the notes are printed as they come, marked as kept or dropped. Then the answer follows, from the
document with the notes that were kept behind it.

FILE is a text in UTF-8; - reads what comes in through a pipe. With --interactive every note waits for your verdict.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from octavo.cli.engine_args import add_engine_arguments, engine_config
from octavo.cli.sampling_args import REPETITION
from octavo.cli.text_files import prompts_given, read_text
from octavo.core.errors import InvalidRequestError
from octavo.core.margins_params import CLASSIFICATIONS, MarginsParams, MarginsPrompts
from octavo.core.params import SamplingParams

if TYPE_CHECKING:
    from octavo.core.margins import Margin
    from octavo.margins import MarginsResult, MarginsRun

_DEFAULTS = MarginsParams()
_ANSWER = SamplingParams(temperature=0.0, max_tokens=256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo margins`."""
    parser.usage = "octavo margins [-h] [-v] [--model MODEL] [flags] FILE QUESTION"
    parser.add_argument("file", metavar="FILE", help="the document; - for what comes through a pipe")
    parser.add_argument("question", metavar="QUESTION", help="what to answer")
    parser.add_argument("--interactive", action="store_true", help="accept, reject or edit every note yourself")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, for machines")
    parser.add_argument("--raw", action="store_true", help="no chat template around the prompts")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--prompts", metavar="FILE", help="JSON file with prompts of your own: see MarginsPrompts")
    add = parser.add_argument_group("reading").add_argument
    add(
        "--segment-tokens", type=int, metavar="N", help=f"most tokens of a segment (default {_DEFAULTS.segment_tokens})"
    )
    add("--margin-tokens", type=int, metavar="N", help=f"most tokens of a note ({_DEFAULTS.margin.max_tokens})")
    add(
        "--classification",
        choices=CLASSIFICATIONS,
        help="how the model says whether a note is relevant (score)",
    )
    add("--threshold", type=float, metavar="X", help="keep a note if log p(YES) - log p(NO) is more (0)")
    add("--early-exit-kept", type=int, metavar="N", help="read no further when so many notes are kept")
    add("--early-exit-score", type=float, metavar="X", help="read no further after a note with this score")
    add("--sequential", action="store_true", help="decide each note before reading on: slower, the same answer")
    add("--windows", action="store_true", help="read what is longer than the context in parts; answer from the notes")
    add = parser.add_argument_group("answering").add_argument
    add("--max-tokens", type=int, metavar="N", help=f"most tokens of the answer ({_ANSWER.max_tokens})")
    add("--temperature", type=float, metavar="T", help="of the answer (0: the most probable one)")
    add("--seed", type=int, metavar="N", help="for answers that are drawn")
    add_engine_arguments(parser, leave_out=["seed"])


def run(args: argparse.Namespace) -> int:
    """Everything that can be checked without the model is checked before it is loaded."""
    if args.interactive and args.json:
        raise InvalidRequestError("--interactive", "has no effect with --json")
    if args.interactive and args.file == "-":
        raise InvalidRequestError("--interactive", "needs the keyboard, and the document comes from there")
    params = _params(args)
    config = engine_config(args)
    document = _document(args.file)
    from octavo.cli.answering import check_unicode, open_model

    check_unicode("question", args.question)
    with open_model(config, args.verbose, chats=not args.raw) as answerer:
        with answerer.llm.stream_margins(document, args.question, params) as reading:
            if args.json:
                import json

                print(json.dumps(_to_json(reading.result(), answerer.model)))
                return 0
            result = _show(reading, interactive=args.interactive)
        _report(result, args.verbose)
    return 0


def _params(args: argparse.Namespace) -> MarginsParams:
    given = {
        name: getattr(args, name)
        for name in ("segment_tokens", "classification", "threshold", "early_exit_kept", "early_exit_score", "seed")
        if getattr(args, name) is not None
    }
    margin, answer = _DEFAULTS.margin.but(repetition_detection=REPETITION), _ANSWER
    if args.margin_tokens is not None:
        margin = margin.but(max_tokens=args.margin_tokens)
    changes = {name: getattr(args, name) for name in ("max_tokens", "temperature") if getattr(args, name) is not None}
    return MarginsParams(
        margin=margin,
        answer=answer.but(repetition_detection=REPETITION, **changes),
        overlap=not args.sequential,
        review=args.interactive,
        windows=args.windows,
        apply_chat_template=False if args.raw else None,
        prompts=prompts_given(args, MarginsPrompts),
        **given,
    )


def _document(name: str) -> str:
    if name == "-":
        from octavo.cli.run import piped_text

        text = piped_text()
        if text is None:
            raise InvalidRequestError("FILE", "is -, and nothing comes in through a pipe")
        return text
    return read_text(name, "FILE")


# --- for people ---


class _View:
    """A progress bar below the notes on a terminal, plain lines elsewhere."""

    def __init__(self, num_segments: int) -> None:
        from octavo.cli.answering import is_terminal

        self.on_terminal = is_terminal(sys.stdout)
        self._num_segments = num_segments
        self._all_read = False
        self._progress: Any = None
        self._task: Any = None

    def begin(self) -> None:
        if self.on_terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(), transient=True)
            self._task = self._progress.add_task("reading", total=self._num_segments)
            self._progress.start()

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def read(self, num_read: int) -> None:
        self._all_read = num_read == self._num_segments
        self._update("reading", num_read)

    def decided(self, num_decided: int) -> None:
        if self._all_read:
            self._update("noting", num_decided)

    def _update(self, what: str, completed: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, description=what, completed=completed)

    def margin(self, margin: Margin) -> None:
        from octavo.cli.answering import harmless

        mark = "kept" if margin.kept else "dropped"
        score = "" if margin.score is None else f" {margin.score:+.2f}"
        place = f"[{margin.segment.index + 1}/{self._num_segments}]"
        text = " ".join(margin.text.split()) or "(nothing)"
        if not self.on_terminal:
            print(f"{place} {mark}{score}: {text}", flush=True)
            return
        from rich.console import Console
        from rich.text import Text

        line = Text(f"{place} ", "dim")
        line.append(f"{mark}{score}", "green" if margin.kept else "red")
        line.append(f"  {harmless(text)}", "" if margin.kept else "dim")
        (self._progress.console if self._progress is not None else Console()).print(line)


def _show(reading: MarginsRun, *, interactive: bool) -> MarginsResult:
    from octavo.cli.answering import TextWriter
    from octavo.core.margins import AnswerBegun, AnswerDelta, MarginDecided, SegmentRead
    from octavo.margins import MarginsDone

    view, writer = _View(len(reading.segments)), TextWriter()
    judging = interactive
    try:
        view.begin()
        for event in reading:
            if isinstance(event, SegmentRead):
                view.read(event.num_read)
            elif isinstance(event, MarginDecided) and event.margin.judged_by != "person":
                view.decided(event.num_decided)
                if not judging:
                    view.margin(event.margin)
                    continue
                view.end()
                view.margin(event.margin)
                judging = event.margin.judged_by == "nobody" or _judge(reading, event.margin)
            elif isinstance(event, AnswerBegun):
                view.end()
                print(flush=True)
            elif isinstance(event, AnswerDelta):
                writer.write(event.output.text)
            elif isinstance(event, MarginsDone):
                writer.end_line()
                return event.result
    finally:
        view.end()
    raise AssertionError("a run ends with MarginsDone")


def _judge(reading: MarginsRun, margin: Margin) -> bool:
    """Ask for a verdict. False: no more of them."""
    index = margin.segment.index
    default = "y" if margin.kept else "n"
    while True:
        sys.stderr.write(f"keep it? [y]es, [n]o, [e]dit, [a]nswer now, [s]top reading ({default}) ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        said = line.strip().lower() or default
        try:
            if not line or said in ("a", "answer"):
                reading.answer_now()
                return False
            if said in ("s", "stop"):
                reading.answer_now()
                reading.stop_reading()
                return False
            if said in ("y", "yes"):
                reading.accept(index)
            elif said in ("n", "no"):
                reading.reject(index)
            elif said in ("e", "edit"):
                sys.stderr.write("new text: ")
                sys.stderr.flush()
                reading.edit(index, sys.stdin.readline())
            else:
                continue
        except InvalidRequestError as error:
            sys.stderr.write(f"{error}\n")
            if error.field != "text":
                return True
            continue
        return True


def _report(result: MarginsResult, verbose: int) -> None:
    from octavo.cli.answering import is_terminal

    if verbose or is_terminal(sys.stderr):
        sys.stderr.write(_figures(result) + "\n")


def _figures(result: MarginsResult) -> str:
    metrics, answer = result.metrics, result.answer
    parts = [
        f"{result.segments[-1].last_token} tokens in {len(result.segments)} segments",
        f"{len(answer.kept)} of {len(answer.margins)} notes kept",
        f"{metrics.num_generated_tokens} generated tokens",
    ]
    if metrics.first_token_time is not None:
        parts.append(f"answer began after {metrics.first_token_time - metrics.arrival_time:.2f} s")
    return "; ".join(parts)


# --- for machines ---


def _to_json(result: MarginsResult, model: str) -> dict[str, Any]:
    answer, metrics = result.answer, result.metrics

    def since(moment: float | None) -> float | None:
        return None if moment is None else moment - metrics.arrival_time

    return {
        "request_id": result.request_id,
        "model": model,
        "question": answer.question,
        "text": answer.output.text,
        "token_ids": answer.output.token_ids,
        "finish_reason": answer.output.finish_reason,
        "stop_reason": answer.output.stop_reason,
        "margins": [asdict(margin) for margin in answer.margins],
        "segments": [asdict(segment) for segment in result.segments],
        "segments_in_prompt": answer.num_segments,
        "prompt_tokens": len(answer.prompt_token_ids),
        "generated_tokens": metrics.num_generated_tokens,
        "cached_tokens": metrics.num_cached_tokens,
        "seed": result.seed,
        "timings": {"ttft_s": since(metrics.first_token_time), "e2e_s": since(metrics.finished_time)},
        "system_fingerprint": result.system_fingerprint,
    }
