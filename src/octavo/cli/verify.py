"""Check a model: does it answer, does it agree with transformers, is it exact?

Three parts. "answers": it loads and its log-probabilities are numbers. "transformers": logits and greedy tokens of the
reference backend in float32 agree with transformers, where that is installed; how far the cpu backend is from it is
told beside them. "exactness": on the cpu backend the same requests give the same bits alone and among others, in
chunks, preempted, forked, from the prefix cache, with other threads and block sizes.

Exit codes: 0 nothing failed, 3 a check failed; others as for every command.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from octavo import __version__
from octavo.cli.engine_args import add_engine_arguments, engine_config
from octavo.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from octavo.cli.check import Check
    from octavo.config import EngineConfig
    from octavo.ops import ModelConfig

EXIT_CHECK_FAILED = 3
PARTS = ("answers", "transformers", "exactness")
_TOKENS = (24, 8, 256)  # default, least, most
# Settings that a check may be run under; all others are what the checks vary.
_SETTINGS = frozenset(["instruction_set", "kv_cache_dtype", "compute_dtype"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo verify`."""
    from octavo.config import EngineConfig

    parser.usage = "octavo verify [-h] [-v] [--json] [--quick] [--skip PART] [flags] MODEL"
    parser.add_argument("model", metavar="MODEL", help="short name, Hugging Face name, .gguf file or model folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer cells of exactness")
    parser.add_argument("--skip", action="append", default=[], choices=PARTS, help="leave a part out; may be repeated")
    default, least, most = _TOKENS
    parser.add_argument(
        "--num-tokens", metavar="N", help=f"tokens of each answer, {least} to {most} (default {default})"
    )
    add_engine_arguments(parser, leave_out={setting.name for setting in fields(EngineConfig)} - _SETTINGS)


def run(args: argparse.Namespace) -> int:
    """Run the parts asked for, print the result, and return 0 or EXIT_CHECK_FAILED."""
    config = engine_config(args)
    num_tokens = _num_tokens(args.num_tokens)
    parts = [part for part in PARTS if part not in args.skip]
    if not parts:
        raise InvalidRequestError("--skip", "leaves nothing to check")
    report = examine(config, parts, num_tokens, args.quick, _tell(args.verbose))
    print(json.dumps(report, indent=2) if args.json else "\n".join(lines(report)))
    sys.stdout.flush()
    return 0 if report["passed"] else EXIT_CHECK_FAILED


def _num_tokens(text: str | None) -> int:
    default, least, most = _TOKENS
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError:
        raise InvalidRequestError("--num-tokens", f"must be an integer, not {text!r}") from None
    if not least <= value <= most:
        raise InvalidRequestError("--num-tokens", f"must be between {least} and {most}, not {value}")
    return value


def _tell(verbose: int) -> Callable[[str], None]:
    """Says on stderr what is being done, when somebody watches."""
    is_watched = verbose > 0 or (sys.stderr is not None and sys.stderr.isatty())

    def tell(text: str) -> None:
        if is_watched:
            sys.stderr.write(f"octavo: verify: {text}\n")

    return tell


def examine(
    config: EngineConfig, parts: list[str], num_tokens: int, is_quick: bool, tell: Callable[[str], None]
) -> dict[str, Any]:
    """All checks of the parts. Raises what finding and loading the model raises."""
    from octavo.cli import machine, verify_exactness, verify_quality
    from octavo.hub import resolve_model

    began = time.monotonic()
    path = resolve_model(config.model)
    model = machine.model_config(path)
    checks: list[Check] = []
    if "answers" in parts:
        tell("answers")
        checks.append(answers(config, model, num_tokens))
    if "transformers" in parts:
        checks += verify_quality.verify(config, path, model, num_tokens, tell)
    if "exactness" in parts:
        checks += verify_exactness.verify(config, model, num_tokens, is_quick, tell)
    return {
        "octavo_version": __version__,
        "model": config.model,
        "path": str(path),
        **machine.identity(config, model),
        "system_fingerprint": machine.look_at_model(config)["system_fingerprint"],
        "seconds": time.monotonic() - began,
        "passed": all(check.status != "failed" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def answers(config: EngineConfig, model: ModelConfig, num_tokens: int) -> Check:
    """The model answers two texts, and all log-probabilities are finite."""
    from octavo.cli.check import judged
    from octavo.cli.driver import EngineDriver
    from octavo.core.params import SamplingParams

    context = model.max_position
    texts = ("The capital of France is", "def add(a, b):\n    return")
    count = min(num_tokens, context // 4)
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=1)
    with EngineDriver(replace(config, max_model_len=min(context, 256), max_num_seqs=4)) as driver:
        prompts = [driver.built.tokenizer.encode(text)[: context // 2] for text in texts]
        done = [answer.output for answer in driver.run([(prompt, params) for prompt in prompts])]
    errors = [output.error for output in done if output is not None and output.error is not None]
    outputs = [output.outputs[0] for output in done if output is not None]
    rows = [row for output in outputs for row in output.logprobs or ()]
    finite = len(rows) == count * len(texts) and all(math.isfinite(e.logprob) for row in rows for e in row.values())
    detail = errors[0] if errors else f"{len(rows)} tokens, log-probabilities {'finite' if finite else 'NOT FINITE'}"
    shown = " | ".join(repr(text + output.text) for text, output in zip(texts, outputs, strict=True))
    return judged("answers", "loads and answers", finite and not errors, f"{detail}; {shown}", tokens=len(rows))


def lines(report: dict[str, Any]) -> list[str]:
    """The report as lines of text."""
    text = [
        f"{report['model']} on {report['backend']} (octavo {report['octavo_version']}, {report['system_fingerprint']})"
    ]
    part = None
    for check in report["checks"]:
        if check["part"] != part:
            part = check["part"]
            text.append(f"{part}:")
        text.append(f"  {check['status']:8}{check['name']}: {check['detail']}")
    failed = sum(check["status"] == "failed" for check in report["checks"])
    skipped = sum(check["status"] == "skipped" for check in report["checks"])
    verdict = f"{failed} of {len(report['checks'])} checks failed" if failed else "nothing failed"
    return [*text, f"{verdict}, {skipped} skipped, in {report['seconds']:.0f} s"]
