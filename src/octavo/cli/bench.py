"""Measure this machine's speed on a model: latency of one batch, throughput of many requests, or start-up; or that of a
server.

Prompts are random token ids, new ones in every iteration, so that no cache helps; end tokens are ignored. Figures
carry the names of vLLM's benchmarks: TTFT is the time to the first token, ITL the time from one token to the next, TPOT
its mean over a request. MBU and MFU are the shares reached of the memory bandwidth and the arithmetic measured beside
it, which `octavo doctor` shows too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from octavo.cli.engine_args import add_engine_arguments, engine_config
from octavo.cli.output_files import check_writable, with_errors_named
from octavo.core.errors import InvalidRequestError
from octavo.core.settings import flag

_MOST = 2**31 - 1
# name of the setting -> (default, least, help)
_NUMBERS: dict[str, dict[str, tuple[int, int, str]]] = {
    "latency": {
        "input_len": (32, 1, "tokens of each prompt"),
        "output_len": (128, 1, "tokens to generate for each"),
        "batch_size": (1, 1, "requests at once"),
        "num_iters_warmup": (2, 0, "iterations that do not count"),
        "num_iters": (10, 1, "iterations that count"),
        "seed": (0, 0, "of the random prompts"),
    },
    "throughput": {
        "num_prompts": (64, 1, "requests, all there from the start"),
        "input_len": (128, 1, "tokens of each prompt"),
        "output_len": (64, 1, "tokens to generate for each"),
        "seed": (0, 0, "of the random prompts"),
    },
    "profile": {
        "input_len": (512, 1, "tokens of each prompt"),
        "output_len": (32, 1, "tokens to generate for each"),
        "batch_size": (1, 1, "requests at once"),
        "num_iters_warmup": (1, 0, "batches that do not count"),
        "num_iters": (3, 1, "batches that count"),
        "seed": (0, 0, "of the random prompts"),
    },
    "serve": {
        "num_prompts": (64, 1, "requests"),
        "input_len": (128, 1, "words of each prompt, most of them one token"),
        "output_len": (64, 1, "tokens to generate for each"),
        "shared_prefix_len": (0, 0, "words that all prompts begin with; of chats, what the system says"),
        "max_concurrency": (0, 0, "requests under way at once; 0: all"),
        "seed": (0, 0, "of the random prompts and moments"),
    },
    "startup": {
        "num_iters_warmup": (1, 0, "starts that do not count: they bring the file into memory"),
        "num_iters": (5, 1, "starts that count"),
    },
}
_SUMMARIES = {
    "latency": "end-to-end latency of one batch, again and again",
    "throughput": "many requests at once: requests and tokens a second",
    "profile": "steps taken apart by op: time, share of the machine's limits, idle threads (cpu backend)",
    "serve": "a server that speaks OpenAI's protocol: any, not only Octavo's",
    "startup": "from the start of the process to the first byte of an answer, by phase",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo bench`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{" + ",".join(_NUMBERS) + "}")
    for kind, numbers in _NUMBERS.items():
        sub = kinds.add_parser(kind, help=_SUMMARIES[kind], description=_SUMMARIES[kind], allow_abbrev=False)
        for name, (default, _, text) in numbers.items():
            sub.add_argument(flag(name), metavar="N", help=f"{text} (default {default})")
        if kind == "serve":
            from octavo.cli.bench_serve import add_serve_arguments

            add_serve_arguments(sub)
        elif kind == "startup":
            sub.add_argument("--prompt", default="The capital of France is", help="raw prompt (default: %(default)r)")
        else:
            sub.add_argument("--disable-detokenize", action="store_true", help="make no text of the tokens")
        sub.add_argument("--output-json", type=Path, metavar="FILE", help="write all figures to FILE")
        if kind != "serve":
            add_engine_arguments(sub, leave_out=["seed"])


def run(args: argparse.Namespace) -> int:
    """Everything that can be checked without the model is checked before it is loaded."""
    numbers = {name: _number(args, name, least) for name, (_, least, _) in _NUMBERS[args.kind].items()}
    if args.output_json is not None:
        check_writable("--output-json", args.output_json)
    from octavo.cli.answering import check_unicode, spinner

    if args.kind == "serve":
        from octavo.cli import bench_serve

        with spinner("asking"):
            report = bench_serve.run(args, numbers)
        lines = bench_serve.lines(report)
        return _tell(args, report, lines)
    config = engine_config(args)
    if args.kind == "startup":
        from octavo.cli import bench_startup

        check_unicode("--prompt", args.prompt)
        with spinner("starting again and again"):
            report = bench_startup.run(config, _engine_flags(args), args.prompt, **numbers)
        lines = bench_startup.lines(report)
    elif args.kind == "profile":
        from octavo.cli import bench_profile

        with spinner("measuring"):
            report = bench_profile.run(config, detokenize=not args.disable_detokenize, **numbers)
        lines = bench_profile.lines(report)
    else:
        from octavo.cli import bench_engine

        with spinner(f"measuring {args.kind}"):
            report = getattr(bench_engine, args.kind)(config, detokenize=not args.disable_detokenize, **numbers)
        lines = bench_engine.lines(report)
    return _tell(args, report, lines)


def _tell(args: argparse.Namespace, report: dict[str, Any], lines: list[str]) -> int:
    sys.stdout.write("\n".join(lines) + "\n")
    if args.output_json is not None:
        text = json.dumps(report, indent=2) + "\n"
        with_errors_named("--output-json", args.output_json, lambda: args.output_json.write_text(text))
    return 0


def _number(args: argparse.Namespace, name: str, least: int) -> int:
    text = getattr(args, name)
    if text is None:
        return _NUMBERS[args.kind][name][0]
    try:
        value = int(text)
    except ValueError:
        raise InvalidRequestError(flag(name), f"must be an integer, not {text!r}") from None
    if not least <= value <= _MOST:
        raise InvalidRequestError(flag(name), f"must be between {least} and {_MOST}, not {value}")
    return value


def _engine_flags(args: argparse.Namespace) -> list[str]:
    """The engine settings of this command line, as another process takes them."""
    from dataclasses import fields

    from octavo.config import EngineConfig

    given = ((setting.name, getattr(args, setting.name, None)) for setting in fields(EngineConfig))
    return [f"{flag(name)}={text}" for name, text in given if text is not None]
