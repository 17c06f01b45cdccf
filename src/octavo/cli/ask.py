"""Answer a question from documents, with citations.

The passages of a folder's files that fit the question best stand before it in the prompt; the answer cites them by
their numbers, and where they stand is printed behind it. Text, Markdown, HTML, PDF, DOCX and EPUB are read. An index of
the folder is kept in it, in .octavo-index.sqlite3, and brought up to date each time; an interruption loses none of it.

With --margins whole documents are read, with notes in their margins, instead of passages: that of --docs if it is a
file, or else those that the best passages are from.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli.engine_args import add_engine_arguments, engine_config
from octavo.cli.sampling_args import REPETITION
from octavo.cli.text_files import prompts_given
from octavo.core.ask_params import ORDERS, AskParams, AskPrompts
from octavo.core.errors import InvalidRequestError
from octavo.core.margins_params import MarginsParams

if TYPE_CHECKING:
    from octavo.ask import AskResult, AskRun
    from octavo.core.ask import IndexProgress
    from octavo.core.margins import Margin

_DEFAULTS = AskParams()
_MARGINS = MarginsParams()
_TELL = 500  # files read between two lines, where there is no progress bar
_READING = "segment_tokens", "margin_tokens", "num_documents"  # flags that say something with --margins alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo ask`."""
    parser.usage = "octavo ask [-h] [-v] [--model MODEL] [flags] --docs FOLDER QUESTION"
    parser.add_argument("question", metavar="QUESTION", help="what to answer")
    parser.add_argument("--docs", required=True, metavar="FOLDER", help="the folder, or one file")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, for machines")
    parser.add_argument("--raw", action="store_true", help="no chat template around the prompts")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--prompts", metavar="FILE", help="JSON file with prompts of your own: see AskPrompts")
    add = parser.add_argument_group("finding").add_argument
    add("--passages", dest="num_passages", type=int, metavar="N", help=f"most passages ({_DEFAULTS.num_passages})")
    add("--passage-tokens", type=int, metavar="N", help="most tokens of a passage (256 in a new index)")
    add("--order", choices=ORDERS, help="of the passages: by document (default), or as the prefix cache has them")
    add("--index", metavar="FILE", help="where the index is, if not in the folder")
    add("--no-update", action="store_true", help="take the index as it is, without a look at the files")
    add = parser.add_argument_group("reading").add_argument
    add("--margins", action="store_true", help="read whole documents, with notes in their margins")
    add("--documents", dest="num_documents", type=int, metavar="N", help=f"most of them ({_DEFAULTS.num_documents})")
    add("--segment-tokens", type=int, metavar="N", help=f"most tokens of a segment ({_MARGINS.segment_tokens})")
    add("--margin-tokens", type=int, metavar="N", help=f"most tokens of a note ({_MARGINS.margin.max_tokens})")
    add = parser.add_argument_group("answering").add_argument
    add("--max-tokens", type=int, metavar="N", help=f"most tokens of the answer ({_DEFAULTS.answer.max_tokens})")
    add("--temperature", type=float, metavar="T", help="of the answer (0: the most probable one)")
    add("--seed", type=int, metavar="N", help="for answers that are drawn")
    add_engine_arguments(parser, leave_out=["seed"])


def run(args: argparse.Namespace) -> int:
    """Everything that can be checked without the model is checked before it is loaded."""
    params = _params(args)
    config = engine_config(args)
    _check_docs(args.docs)
    if args.index is not None and not Path(args.docs).is_dir():
        raise InvalidRequestError("--index", "has no effect where --docs is a file")
    from octavo.cli.answering import check_unicode, open_model

    check_unicode("question", args.question)
    if not args.verbose:  # it tells of every oddity of a file that it can read all the same
        logging.getLogger("pypdf").setLevel(logging.ERROR)
    with open_model(config, args.verbose, chats=not args.raw) as answerer:
        options: dict[str, Any] = {"index_path": args.index, "update_index": not args.no_update}
        with answerer.llm.stream_ask(args.question, args.docs, params, **options) as asking:
            result = _show(asking, quiet=args.json)
        if args.json:
            import json

            print(json.dumps(_to_json(result, answerer.model)))
        else:
            _tell_sources(result)
        _tell_problems(result)
        if result.output.finish_reason == "repetition":
            sys.stderr.write("octavo: the answer ends here: it repeats itself\n")
        _report(result, args.verbose)
    return 0


def _check_docs(docs: str) -> None:
    if not docs:
        raise InvalidRequestError("--docs", "is empty")
    try:
        exists = Path(docs).exists()
    except (OSError, ValueError) as error:
        raise InvalidRequestError("--docs", f"cannot be looked at: {getattr(error, 'strerror', error)}") from None
    if not exists:
        raise InvalidRequestError("--docs", f"{docs!r} does not exist")


def _params(args: argparse.Namespace) -> AskParams:
    if not args.margins:
        for name in _READING:
            if getattr(args, name) is not None:
                flag = "--" + name.removeprefix("num_").replace("_", "-")
                raise InvalidRequestError(flag, "has an effect only with --margins")
    names = "num_passages", "passage_tokens", "order", "num_documents", "seed"
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    changes = {name: getattr(args, name) for name in ("max_tokens", "temperature") if getattr(args, name) is not None}
    margins = None
    if args.margins:
        margin = _MARGINS.margin.but(repetition_detection=REPETITION)
        if args.margin_tokens is not None:
            margin = margin.but(max_tokens=args.margin_tokens)
        margins = MarginsParams(margin=margin, windows=True)
        if args.segment_tokens is not None:
            margins = margins.but(segment_tokens=args.segment_tokens)
    return AskParams(
        answer=_DEFAULTS.answer.but(repetition_detection=REPETITION, **changes),
        margins=margins,
        apply_chat_template=False if args.raw else None,
        prompts=prompts_given(args, AskPrompts),
        **given,
    )


# --- for people ---


class _View:
    """A progress bar on a terminal while the folder is indexed and documents are read; notes as they come."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._progress: Any = None
        self._task: Any = None

    def index(self, told: IndexProgress) -> None:
        from octavo.cli.answering import is_terminal

        if told.num_read % _TELL == 0 < told.num_read and not is_terminal(sys.stderr):
            sys.stderr.write(f"octavo: indexed {told.num_read} files, {told.num_seen} of {told.num_files} seen\n")
        if told.num_seen < told.num_files and self._begin():
            self._progress.update(self._task, description="indexing", completed=told.num_seen, total=told.num_files)
        elif told.num_seen == told.num_files:
            self.end()

    def segment(self, document: str, num_read: int, num_segments: int) -> None:
        if self._begin():
            self._progress.update(self._task, description=document, completed=num_read, total=num_segments)

    def _begin(self) -> bool:
        from octavo.cli.answering import is_terminal

        if self._progress is None and is_terminal(sys.stderr) and not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            text = TextColumn("{task.description}", markup=False)
            columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task("indexing", total=None)
            self._progress.start()
        return self._progress is not None

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def margin(self, document: str, margin: Margin, num_segments: int) -> None:
        if self._quiet:
            return
        from octavo.cli.answering import harmless

        mark = "kept" if margin.kept else "dropped"
        score = "" if margin.score is None else f" {margin.score:+.2f}"
        text = harmless(" ".join(margin.text.split()) or "(nothing)")
        line = f"{harmless(document)} [{margin.segment.index + 1}/{num_segments}] {mark}{score}: {text}"
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False)
        else:
            sys.stderr.write(line + "\n")


def _show(asking: AskRun, *, quiet: bool) -> AskResult:
    from octavo.ask import AskDone
    from octavo.cli.answering import TextWriter
    from octavo.core.ask import DocumentEvent, IndexProgress
    from octavo.core.margins import AnswerBegun, AnswerDelta, MarginDecided, SegmentRead

    view, writer = _View(quiet), TextWriter()
    try:
        for event in asking:
            if isinstance(event, IndexProgress):
                view.index(event)
            elif isinstance(event, DocumentEvent):
                if isinstance(event.event, SegmentRead):
                    view.segment(event.document, event.event.num_read, event.event.num_segments)
                elif isinstance(event.event, MarginDecided):
                    view.margin(event.document, event.event.margin, event.event.num_segments)
            elif isinstance(event, AnswerBegun):
                view.end()
            elif isinstance(event, AnswerDelta) and not quiet:
                writer.write(event.output.text)
            elif isinstance(event, AskDone):
                view.end()
                if writer.started:
                    writer.end_line()
                return event.result
    finally:
        view.end()
    raise AssertionError("a run ends with AskDone")


def _tell_sources(result: AskResult) -> None:
    from octavo.ask import NOTHING_FOUND
    from octavo.cli.answering import harmless

    if result.output.finish_reason == NOTHING_FOUND:
        what = "no passage has a word of the question"
        if result.passages:
            what = "no note was kept" if result.readings else "no document could be read"
        sys.stderr.write(f"octavo: nothing found: {what}\n")
        return
    cited = result.cited
    if not cited and result.sources:
        sys.stdout.flush()
        sys.stderr.write("octavo: the answer cites nothing; it may rest on these:\n")
        sys.stderr.flush()
    print()
    for source in cited or result.sources:
        print(harmless(f"[{source.number}] {source.place}"))
    for number in dict.fromkeys(one.number for one in result.citations if one.source is None):
        sys.stderr.write(f"octavo: [{number}] in the answer is none of its sources\n")


def _tell_problems(result: AskResult) -> None:
    from octavo.cli.answering import harmless

    shown = 5
    for name, problem in result.problems[:shown]:
        sys.stderr.write(harmless(f"octavo: {name}: {problem}") + "\n")
    if len(result.problems) > shown:
        sys.stderr.write(f"octavo: and {len(result.problems) - shown} more files that cannot be read\n")
    if result.num_left_out:
        sys.stderr.write(f"octavo: {result.num_left_out} of the best sources did not fit the model's context\n")


def _report(result: AskResult, verbose: int) -> None:
    from octavo.cli.answering import is_terminal

    if not (verbose or is_terminal(sys.stderr)):
        return
    metrics = result.metrics
    parts = [
        f"{len(result.prompt_token_ids)} prompt tokens, {metrics.num_cached_tokens} cached",
        f"{metrics.num_generated_tokens} generated tokens",
    ]
    if metrics.first_token_time is not None:
        parts.append(f"first token after {metrics.first_token_time - metrics.arrival_time:.2f} s")
    sys.stderr.write("; ".join(parts) + "\n")


# --- for machines ---


def _to_json(result: AskResult, model: str) -> dict[str, Any]:
    metrics = result.metrics

    def since(moment: float | None) -> float | None:
        return None if moment is None else moment - metrics.arrival_time

    return {
        "request_id": result.request_id,
        "model": model,
        "question": result.question,
        "text": result.text,
        "token_ids": result.output.token_ids,
        "finish_reason": result.output.finish_reason,
        "stop_reason": result.output.stop_reason,
        "citations": [
            {"start": one.start, "stop": one.stop, "number": one.number, "exists": one.source is not None}
            for one in result.citations
        ],
        "sources": [asdict(source) | {"place": source.place} for source in result.sources],
        "sources_left_out": result.num_left_out,
        "problems": [{"file": name, "problem": problem} for name, problem in result.problems],
        "documents_read": [
            {"document": name, "margins": [asdict(margin) for margin in reading.answer.margins]}
            for name, reading in result.readings
        ],
        "prompt_tokens": len(result.prompt_token_ids),
        "generated_tokens": metrics.num_generated_tokens,
        "cached_tokens": metrics.num_cached_tokens,
        "seed": result.seed,
        "timings": {"ttft_s": since(metrics.first_token_time), "e2e_s": since(metrics.finished_time)},
        "system_fingerprint": result.system_fingerprint,
    }
