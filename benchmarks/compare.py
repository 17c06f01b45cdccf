"""Octavo against llama.cpp, OpenVINO GenAI, vLLM and others: same weights, prompt ids and threads, in turn in one run.

Each engine lives in a process of its own, started with the interpreter it is installed for; they are asked in turn.
A figure is the median over the rounds; a ratio is the median of the rounds' ratios, with the lowest and highest.
Start-up is timed from outside, with a fresh process for each figure.

    python benchmarks/compare.py --model smollm2 --peer llama.cpp=PATH/python --peer openvino=PATH/python

See README.md beside this file for how to install the peers. A peer not given, or that does not load, is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import history
from engines import ENGINES, MissingError, Work, processor_flags, start_command, version, vllm_environment

HERE = Path(__file__).resolve().parent

WORKS = (
    Work("prefill 512", 1, 512, 0),
    Work("prefill 2048", 1, 2048, 0),
    Work("prefill 6000", 1, 6000, 0),
    Work("decode, context 16", 1, 16, 64),
    Work("decode, context 2048", 1, 2048, 64),
    Work("decode, context 4096", 1, 4096, 32),
    Work("16 sequences of 128 + 64", 16, 128, 64),
    Work("32 sequences of 128 + 64", 32, 128, 64),
    Work("beam search, width 4, 256 + 64", 1, 256, 64, beams=4, unit="steps/s"),
    Work("beam search, width 8, 256 + 64", 1, 256, 64, beams=8, unit="steps/s"),
    Work("burst: 16 of 1024 shared + 32, 32 new", 16, 1056, 32, shared=1024),
    Work("the same burst again", 16, 1056, 32, shared=1024, warm=True),
    Work("start-up, exec to first byte", 1, 5, 0, unit="s"),
)


def prompt_ids(call: int, sequence: int, length: int, shared: int) -> list[int]:
    """Token ids inside every vocabulary here. Calls differ from the first token on, and so do sequences but for what
    they share: no cache helps."""
    own = [(call * 104_729 + sequence * 7919 + i * 31) % 20_000 + 1000 for i in range(length)]
    return own if not shared or not sequence else prompt_ids(call, 0, length, 0)[:shared] + own[shared:]


def serve(engine: str, model: str, threads: int) -> None:
    """A child: loads one engine, then answers lines of {call, work} with seconds or a reason; a call of the same number
    has the same prompts."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints goes elsewhere
    try:
        run = ENGINES[engine](model, threads)
    except Exception as error:
        print(f"it does not load: {type(error).__name__}: {str(error).split(chr(10), 1)[0]}", file=output, flush=True)
        raise
    print("ready", version(engine), file=output, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        work = Work(**asked["work"])
        prompts = [prompt_ids(asked["call"], s, work.prompt, work.shared) for s in range(work.sequences)]
        started = time.perf_counter()
        try:
            run(prompts, work)
            answer: float | str = time.perf_counter() - started
        except MissingError as reason:
            answer = str(reason)
        print(json.dumps(answer), file=output, flush=True)


def seconds_to_first_byte(command: list[str]) -> float:
    log = subprocess.DEVNULL if not os.environ.get("COMPARE_VERBOSE") else None
    # An installed program has its bytecode beside it; one run from a checkout must be let write it, in the warm-up.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=env) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if not first or process.returncode != 0:
        raise RuntimeError(f"its start failed with exit code {process.returncode}")
    return seconds


class Child:
    def __init__(self, engine: str, python: str, model: str, threads: int) -> None:
        self.start = (engine, python, model, threads)
        self.calls = 0
        environment = dict(os.environ)
        if engine == "llama-server":  # a program of its own
            environment["COMPARE_LLAMA_SERVER"], python = python, sys.executable
        if engine == "vllm":
            environment |= vllm_environment(python, threads)
        command = [python, str(HERE / "compare.py"), "--serve", engine, "--model", model, "--threads", str(threads)]
        log = subprocess.DEVNULL if not os.environ.get("COMPARE_VERBOSE") else None
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if not answer.startswith("ready"):
            raise RuntimeError(answer or f"it does not load with {python}")
        self.version = answer.removeprefix("ready ")

    def seconds(self, work: Work, new: int, again: bool = False) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.calls += not again
        asked = {"call": self.calls, "work": asdict(replace(work, new=new))}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("it died")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise MissingError(answer)
        return float(answer)

    def figure(self, work: Work) -> float:
        """In the work's unit. Tokens are those of the prompt, or those after the first, in a burst over the whole time;
        a step is one of all beams."""
        if work.unit == "s":
            return seconds_to_first_byte(start_command(*self.start))
        if work.shared:
            cold = self.seconds(work, work.new)
            return work.sequences * work.new / (self.seconds(work, work.new, again=True) if work.warm else cold)
        if work.new == 0:
            return work.sequences * work.prompt / self.seconds(work, 0)
        first = self.seconds(work, 0)
        whole = self.seconds(work, work.new)
        return work.sequences * work.new / max(whole - first, 1e-9)


def measure(children: dict[str, Child], work: Work, rounds: int) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {name: [] for name in children}
    for round_number in range(rounds + 1):
        for name in list(figures):
            try:
                figure = children[name].figure(work)
            except MissingError as reason:
                print(f"{name}: {work.name}: {reason}; skipped", file=sys.stderr)
                del figures[name]
            except RuntimeError as error:
                print(f"{name}: {work.name}: {error}; it is left out from here on", file=sys.stderr)
                del children[name], figures[name]
            else:
                if round_number:  # the first warms up
                    figures[name].append(figure)
    return figures


def table(works: list[tuple[Work, dict[str, list[float]]]]) -> list[dict[str, Any]]:
    rows = []
    for work, figures in works:
        medians = {name: statistics.median(values) for name, values in figures.items()}
        row: dict[str, Any] = {"work": work.name, "unit": work.unit, "median": medians}
        ratios = {}
        for name, values in figures.items():
            if name != "octavo" and "octavo" in figures:
                each = [ours / theirs for ours, theirs in zip(figures["octavo"], values, strict=True)]
                ratios[name] = {"median": statistics.median(each), "min": min(each), "max": max(each)}
        rows.append(row | {"ratio": ratios})
    return rows


def show(rows: list[dict[str, Any]], engines: list[str]) -> None:
    """Ratios are of the figures as they stand: above 1 is better for rates, below 1 for seconds."""
    print(f"{'':40}{'unit':8}" + "".join(f"{name:>14}" for name in engines) + "   octavo / peer (min-max)")
    for row in rows:
        digits = 3 if row["unit"] == "s" else 1
        medians = [row["median"].get(name) for name in engines]
        cells = "".join(f"{'-':>14}" if median is None else f"{median:14.{digits}f}" for median in medians)
        ratios = ", ".join(
            f"{name} {r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f})" for name, r in row["ratio"].items()
        )
        print(f"{row['work']:40}{row['unit']:8}{cells}   {ratios}")


FLAGS = (
    "avx",
    "f16c",
    "fma",
    "amx",
    "sve",
    "asimddp",
    "i8mm",
    "bf16",
)  # what multiplies; how their names begin


def processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="alias, or a .gguf file that all engines read")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="append", default=[], metavar="ENGINE=PYTHON", help="repeatable")
    parser.add_argument("--only", action="append", default=[], help="part of a work's name; repeatable")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--record",
        type=Path,
        nargs="?",
        const=history.FILE,
        metavar="FILE",
        help=f"append the figures to a history ({history.FILE.name} beside this program)",
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        help="where vLLM's checkpoints are kept; else beside the --json, or removed when all is done",
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.model, args.threads)
        return
    if args.record:
        try:
            history.load(args.record)  # now, not when all has been timed
        except history.DamagedError as error:
            raise SystemExit(str(error)) from None
    with tempfile.TemporaryDirectory(prefix="compare-") as temporary:
        beside = args.json.resolve().parent / "checkpoints" if args.json else Path(temporary)
        os.environ["COMPARE_CHECKPOINTS"] = str((args.checkpoints or beside).resolve())
        compare(args)


def compare(args: argparse.Namespace) -> None:
    from octavo.hub import resolve_model

    model = str(resolve_model(args.model))
    start = {"date": datetime.now(UTC).isoformat(timespec="seconds")} | machine_report(args.threads)
    pythons = {"octavo": sys.executable, "vllm-method": sys.executable}
    pythons |= dict(peer.split("=", 1) for peer in args.peer)
    works = [work for work in WORKS if not args.only or any(part in work.name for part in args.only)]
    if not any(work.beams for work in works):
        del pythons["vllm-method"]
    children: dict[str, Child] = {}
    for name in ENGINES:
        if name not in pythons:
            print(f"{name}: not given, skipped", file=sys.stderr)
            continue
        try:
            children[name] = Child(name, pythons[name], model, args.threads)
        except RuntimeError as error:
            print(f"{name}: {error}, skipped", file=sys.stderr)
    versions = {name: child.version for name, child in children.items()}
    rows = table([(work, measure(children, work, args.rounds)) for work in works])
    show(rows, [name for name in ENGINES if name in pythons])
    setting = {"model": Path(model).name, "rounds": args.rounds, "versions": versions}
    report = start | setting | {"figures": rows}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.record:
        history.append(args.record, report)


def machine_report(threads: int) -> dict[str, Any]:
    """What figures depend on: this checkout and this machine."""
    from octavo.cli.machine import instruction_sets

    forced = os.environ.get("OCTAVO_INSTRUCTION_SET")
    flags = [flag for flag in processor_flags() if flag.startswith(FLAGS)]
    return {
        "commit": history.commit(),
        "machine": {"processor": processor(), "flags": flags, "threads": threads},
        "instruction_set": forced or next(iter(instruction_sets()), "none"),
        "instruction_set_forced": forced,
    }


if __name__ == "__main__":
    main()
