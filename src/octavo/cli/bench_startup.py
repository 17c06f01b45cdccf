"""`octavo bench startup`: fresh processes, from the start of each to the first byte of its answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import cache_from_source
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo import __version__
from octavo.cli import record
from octavo.cli.bench_engine import limits_text, shares_text, step_costs
from octavo.cli.machine import identity, measure, model_config
from octavo.core.errors import OctavoError
from octavo.hub import resolve_model
from octavo.observe import utilization

if TYPE_CHECKING:
    from octavo.config import EngineConfig

# By their beginnings. Weights are packed beside the two behind them; "other" is what no phase covers: settings, the
# memory plan, KV, the engine's thread, and the way of the first text to stdout.
PHASES = ("interpreter", "imports", "index", "weights", "later_imports", "tokenizer", "first_step", "other")
_TIMEOUT_S = 600


class StartupError(OctavoError, RuntimeError):
    """A process that was started to be measured failed; the message is what it said."""


def run(
    config: EngineConfig, flags: list[str], prompt: str, *, num_iters_warmup: int, num_iters: int
) -> dict[str, Any]:
    """Medians over `num_iters` starts with the engine flags of the command line.

    Raises StartupError with the child's own words if one fails.
    """
    path = resolve_model(config.model)  # fetched, if need be, before anything is measured
    starts = [start(flags, prompt) for _ in range(num_iters_warmup + num_iters)][num_iters_warmup:]
    model = model_config(path)
    seconds = {name: float(np.median([one["phases"][name] for one in starts])) for name in PHASES}
    totals = [one["total"] for one in starts]
    report: dict[str, Any] = {
        "benchmark": "startup",
        "octavo_version": __version__,
        "model": config.model,
        **identity(config, model),
        "num_iters_warmup": num_iters_warmup,
        "num_iters": num_iters,
        "prompt_tokens": starts[0]["prompt_tokens"],
        "bytecode_cached": Path(cache_from_source(record.__file__)).exists(),
        "total_s": {"median": float(np.median(totals)), "min": min(totals), "max": max(totals)},
        "phases_s": seconds,
        "starts": starts,
    }
    limits = measure(config)
    report["limits"] = None if limits is None else asdict(limits)
    costs = step_costs(config, model, report["backend"])
    cost = costs.of(((0, report["prompt_tokens"]),), 1)
    shares = None if limits is None else utilization(cost, seconds["first_step"], limits)
    report["mbu"], report["mfu"] = (None, None) if shares is None else (shares.mbu, shares.mfu)
    return report


def start(flags: list[str], prompt: str) -> dict[str, Any]:
    """One start: seconds by phase, and until the first byte of the answer was read."""
    notes, child_end = os.pipe()
    command = [sys.executable, "-m", "octavo.cli.startup_child", str(child_end)]
    command += ["run", "--raw", "--max-tokens=1", "--temperature=0", "--ignore-eos", *flags, f"--prompt={prompt}"]
    began = time.monotonic()
    with (
        os.fdopen(notes) as note_file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[child_end],
        ) as child,
    ):
        os.close(child_end)
        assert child.stdout is not None
        first = child.stdout.read(1)
        answered = time.monotonic()
        try:
            _, said = child.communicate(timeout=_TIMEOUT_S)
        finally:
            child.kill()
        text = note_file.read()
    if child.returncode != 0 or not first or not text:
        words = said.decode(errors="replace").strip() or "it said nothing"
        raise StartupError(f"a start failed with exit code {child.returncode}: {words}")
    return _phases(json.loads(text), began, answered)


def _phases(note: dict[str, Any], began: float, answered: float) -> dict[str, Any]:
    spans = {name: tuple(span) for name, span in note["spans"].items()}
    spans |= {"interpreter": (began, note["started"]), "imports": (note["started"], note["imported"])}
    phases = {name: end - start for name, (start, end) in spans.items()}
    covered, until = 0.0, began
    for start, end in sorted(spans.values()):
        covered += max(end - max(start, until), 0.0)
        until = max(until, end)
    phases["other"] = max(answered - began - covered, 0.0)
    return {
        "total": answered - began,
        "phases": {name: phases[name] for name in PHASES},
        "prompt_tokens": note["prompt_tokens"],
    }


def lines(report: dict[str, Any]) -> list[str]:
    """A report as lines of text."""
    total = report["total_s"]
    head = f"startup of {report['model']} on {report['backend']} ({report['threads']} threads)"
    text = [f"{head}, median of {report['num_iters']}, prompt of {report['prompt_tokens']} tokens"]
    text += [f"{name.replace('_', ' '):24}{1000 * report['phases_s'][name]:10.1f} ms" for name in PHASES]
    text[-2] += shares_text(report)
    text.append(
        f"{'total to first byte':24}{1000 * total['median']:10.1f} ms ({1000 * total['min']:.1f} to "
        f"{1000 * total['max']:.1f})"
    )
    if not report["bytecode_cached"]:
        text.append(
            "Python cannot keep its bytecode here (PYTHONDONTWRITEBYTECODE?): imports compile every module anew"
        )
    return [*text, limits_text(report["limits"])]
