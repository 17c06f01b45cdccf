"""Look at the prefix cache: `octavo cache explain PROMPT --after EARLIER` says what of a prompt it has, and why not
more.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from octavo.cli.engine_args import add_engine_arguments, engine_config
from octavo.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from octavo.core.outputs import CacheExplanation
    from octavo.frontend import Prompt
    from octavo.llm import LLM

EXIT_USAGE = 2
_EXPLAIN = """Answer the earlier prompts one by one (a single token each), then say how much of PROMPT would be taken
from the cache, where it first differs from an earlier one, and what was evicted. Prompts are taken as `octavo run`
takes them: as a user's message in the model's chat template where there is one, and as they are with --raw."""


@dataclass(frozen=True, slots=True)
class _Earlier:
    """A prompt that was answered before."""

    num_tokens: int
    num_cached_tokens: int
    evicted_blocks: int  # while it was answered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo cache`."""
    parser.set_defaults(print_help=parser.print_help)
    kinds = parser.add_subparsers(dest="what", metavar="{explain}")
    explain = kinds.add_parser(
        "explain", help="what the cache has of a prompt, and why not more", description=_EXPLAIN, allow_abbrev=False
    )
    explain.usage = "octavo cache explain [-h] [--model MODEL] [--after EARLIER]… [--raw] [--json] [flags] PROMPT"
    explain.add_argument("prompt", metavar="PROMPT", help="the prompt to explain")
    explain.add_argument(
        "--after", action="append", default=[], metavar="EARLIER", help="a prompt answered before; may be repeated"
    )
    explain.add_argument("--system", metavar="TEXT", help="system message, before each prompt")
    explain.add_argument("--raw", action="store_true", help="no chat template: take the prompts as they are")
    explain.add_argument("--json", action="store_true", help="print one JSON object, for machines")
    add_engine_arguments(explain)


def run(args: argparse.Namespace) -> int:
    """Everything that can be checked without the model is checked before it is loaded."""
    if args.what is None:
        args.print_help(sys.stderr)
        return EXIT_USAGE
    config = engine_config(args)
    from octavo.cli.answering import check_system, check_unicode, open_model

    for field, text in [("prompt", args.prompt), *(("--after", text) for text in args.after)]:
        if not check_unicode(field, text):
            raise InvalidRequestError(field, "is empty")
    check_system(args.system, raw=args.raw)
    with open_model(config, args.verbose) as answerer:
        prompt, *after = (answerer.prompt_of(text, args.system, raw=args.raw) for text in (args.prompt, *args.after))
        earlier, explanation = _explain(answerer.llm, prompt, after)
        report = _report(answerer.llm, answerer.model, earlier, explanation)
    print(json.dumps(report) if args.json else _text(report))
    return 0


def _explain(llm: LLM, prompt: Prompt, after: list[Prompt]) -> tuple[list[_Earlier], CacheExplanation]:
    from octavo.core.params import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, output_kind="final_only", detokenize=False)
    earlier = []
    for number, before in enumerate(after, 1):
        evicted = llm.cache_stats.evicted_blocks
        for output in llm.stream(before, params, _name(number)):
            tokens, cached = len(output.prompt_token_ids), output.num_cached_tokens
        earlier.append(_Earlier(tokens, cached, llm.cache_stats.evicted_blocks - evicted))
    return earlier, llm.explain_cache(prompt)


def _name(number: int) -> str:
    """Ids of the earlier requests, which the explanation quotes."""
    return f"earlier prompt {number}"


def _report(llm: LLM, model: str, earlier: list[_Earlier], explanation: CacheExplanation) -> dict[str, Any]:
    def spelt(token_id: int | None) -> str | None:
        return None if token_id is None else llm.tokenizer.spelling([token_id])

    return {
        "model": model,
        "earlier": [asdict(one) for one in earlier],
        **asdict(explanation),
        "token": spelt(explanation.token_id),
        "earlier_token": spelt(explanation.earlier_token_id),
    }


def _text(report: dict[str, Any]) -> str:
    lines = [
        f"{_name(number)}: {one['num_tokens']} tokens, {one['num_cached_tokens']} from the cache, "
        f"{one['evicted_blocks']} blocks evicted"
        for number, one in enumerate(report["earlier"], 1)
    ]
    kept = f", {report['num_kept_tokens']} more in files" if report["num_kept_tokens"] else ""
    lines.append(f"prompt: {report['num_tokens']} tokens, {report['num_cached_tokens']} from the cache{kept}")
    lines.append(report["reason"])
    if report["first_difference"] is not None:
        lines.append(
            f"first difference: position {report['first_difference']}, {report['token']!r} here, "
            f"{report['earlier_token']!r} in {report['earlier_request_id']}"
        )
    return "\n".join(lines)
