"""Say what Octavo finds on this machine: processor, memory, backends, models, and how fast it can be.

Measures for a second or two how fast memory is read and how fast numbers are multiplied, with the threads an engine
would use, and shows which share of that the last `octavo bench latency` and `throughput` reached. With --model it also
shows that model's numeric fingerprint with the settings given: answers are the same, to the bit, where fingerprints are
equal.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from octavo import __version__
from octavo.cli.engine_args import add_engine_arguments, engine_config

if TYPE_CHECKING:
    from octavo.config import EngineConfig

HOW_TO_BENCHMARK = "none yet; `octavo bench latency` makes one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-measure", action="store_true", help="measure nothing")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Look at everything, then print."""
    config = engine_config(args)
    from octavo.cli.answering import spinner

    with spinner("looking"):
        report = examine(config, args.model, not args.no_measure)
    print(json.dumps(report, indent=2) if args.json else "\n".join(lines(report)))
    sys.stdout.flush()
    return 0


def examine(config: EngineConfig, model: str | None, is_measured: bool) -> dict[str, Any]:
    """All that `doctor` shows. Raises ConfigError, and with a model what finding and opening it raises."""
    from octavo.cli import machine, record
    from octavo.loading.memory import available_memory

    shown_model = None if model is None else machine.look_at_model(config)
    sets = machine.instruction_sets()
    limits = machine.measure(config) if is_measured else None
    return {
        "version": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "cpu": machine.cpu_model(),
        "instruction_sets": sets,
        "instruction_set_used": (config.instruction_set or sets[0]) if sets else None,
        "processors": machine.num_processors(),
        "threads": config.threads or machine.num_processors(),
        "cgroup": machine.cgroup_limits(),
        "available_memory_bytes": available_memory(),
        "backends": machine.refusals(replace(config, backend="auto")),
        "models": _models(),
        "model": shown_model,
        "limits": None if limits is None else asdict(limits),
        "last_benchmarks": record.load(),
    }


def _models() -> dict[str, Any]:
    from octavo import hub

    found = [
        {"name": model.name, "bytes": model.num_bytes, "format": model.format, "problem": model.problem}
        for model in hub.list_models()
    ]
    return {"folder": str(hub.octavo_home(writable=False)), "found": found}


# --- for people ---


def lines(report: dict[str, Any]) -> list[str]:
    """The report as lines of text."""
    rows: list[tuple[str, str]] = [
        ("octavo", report["version"]),
        ("python", f"{report['python']} on {report['system']}"),
        ("processor", report["cpu"]),
        ("instruction sets", _instruction_sets(report)),
        ("threads", f"{report['threads']} ({report['processors']} physical cores may be used)"),
        ("control group", _cgroup(report["cgroup"])),
        ("memory available", _bytes(report["available_memory_bytes"])),
        *((f"backend {name}", reason or "loads") for name, reason in report["backends"].items()),
        ("model folder", report["models"]["folder"]),
        *(("", _model_line(model)) for model in report["models"]["found"] or [None]),
        *_fingerprint_rows(report["model"]),
        *_limit_rows(report["limits"]),
        *_benchmark_rows(report["last_benchmarks"]),
    ]
    return [f"{name:20}{text}" for name, text in rows]


def _instruction_sets(report: dict[str, Any]) -> str:
    if not report["instruction_sets"]:
        return "unknown: the cpu backend's extension does not load"
    return f"{', '.join(report['instruction_sets'])}; {report['instruction_set_used']} is used"


def _cgroup(limits: dict[str, float | None]) -> str:
    cpus = "no limit of processors" if limits["cpus"] is None else f"{limits['cpus']:g} processors"
    memory = "no limit of memory" if limits["memory_bytes"] is None else f"{_bytes(int(limits['memory_bytes']))} memory"
    return f"{cpus}, {memory}"


def _bytes(count: int) -> str:
    from octavo.loading.memory import size

    return size(count)


def _model_line(model: dict[str, Any] | None) -> str:
    if model is None:
        return "no models yet; `octavo models` lists those to fetch"
    return f"{model['name']}, {model['bytes'] / 1e6:,.1f} MB, {model['problem'] or model['format']}"


def _fingerprint_rows(model: dict[str, Any] | None) -> list[tuple[str, str]]:
    if model is None:
        return []
    rows = [("model", f"{model['name']}: {model['architecture']}, {model['path']}")]
    rows += [(f"  on {name}", reason) for name, reason in model["refused"].items() if reason is not None]
    return [*rows, ("fingerprint", f"{model['system_fingerprint']} ({model['computes']})")]


def _limit_rows(limits: dict[str, Any] | None) -> list[tuple[str, str]]:
    if limits is None:
        return [("limits", "not measured")]
    threads = f"with {limits['threads']} threads"
    return [
        ("memory is read at", f"{limits['read_bytes_per_s'] / 1e9:.1f} GB/s {threads}"),
        ("integers at", f"{limits['integer_macs_per_s'] / 1e9:.1f} G multiply-adds/s {threads}"),
        ("float32 at", f"{limits['float32_macs_per_s'] / 1e9:.1f} G multiply-adds/s {threads}"),
    ]


def _benchmark_rows(entries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not entries:
        return [("last benchmark", HOW_TO_BENCHMARK)]
    from octavo.cli.bench_engine import shares_text

    rows = []
    for entry in reversed(entries):
        rows.append(
            ("last benchmark", f"{entry['benchmark']} of {entry['model']} on {entry['backend']}, {entry['date']}")
        )
        for name, phase in entry["phases"].items():
            if phase is not None:
                rows.append((f"  {name} steps", f"{phase['tokens_computed_per_second']:.1f} tok/s{shares_text(phase)}"))
    return rows
