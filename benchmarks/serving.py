"""`octavo serve` beside its own library and llama.cpp's server: chats with a shared system prompt, at some numbers of
clients, in turn on the same file with as many threads.

    python benchmarks/serving.py --model smollm2 --threads 2 --peer llama-server=PROGRAM --json figures.json

Each round has a system prompt and texts that no engine has seen, the same for all of them. The client is `octavo bench
serve`, a process of its own; the library answers them with `AsyncLLM`, streaming, in a process that does nothing else.
See README.md beside this file for how to build the program `llama-server`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama_server import LlamaServer

FIGURES = "request_throughput", "output_throughput", "mean_ttft_ms", "median_itl_ms", "p99_itl_ms", "client_cpu_seconds"
NUMBERS = {"shared_prefix_len": 200, "input_len": 40, "output_len": 64}


def octavo_server(model: str, threads: int) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "octavo.cli.main", "serve", model, "--port", "0", "--threads", str(threads)]
    command += ["--max-num-seqs", "32", "--max-model-len", "2048", "--max-num-queued-reqs", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found is not None, "octavo serve does not start"
    return process, found[0]


def over_http(url: str, seed: int, clients: int, requests: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "octavo.cli.main", "bench", "serve", "--base-url", url]
        command += ["--backend", "openai-chat", "--seed", str(seed), "--max-concurrency", str(clients)]
        command += ["--num-prompts", str(requests), "--output-json", file.name]
        for name, value in NUMBERS.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return dict(json.loads(Path(file.name).read_text()))


class Library:
    """A process that answers with `AsyncLLM`."""

    def __init__(self, model: str, threads: int) -> None:
        command = [sys.executable, __file__, "--library", model, "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask({})

    def _ask(self, work: dict[str, int]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def run(self, seed: int, clients: int, requests: int) -> dict[str, Any]:
        return self._ask({"seed": seed, "clients": clients, "num_prompts": requests})

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


async def answer_from_the_library(model: str, threads: int) -> None:
    """Work comes line by line, and so do figures."""
    from octavo import AsyncLLM, SamplingParams
    from octavo.cli.bench_serve import conversation, texts

    params = SamplingParams(temperature=0, max_tokens=NUMBERS["output_len"], ignore_eos=True, output_kind="delta")
    llm = AsyncLLM(model, threads=threads, max_num_seqs=32, max_model_len=2048)

    async def one(places: asyncio.Semaphore, prefix: str, text: str, firsts: list[float], gaps: list[float]) -> None:
        async with places:
            began, last = time.perf_counter(), 0.0
            async for _ in llm.generate(llm.chat_prompt(conversation(prefix, text)), params):
                now = time.perf_counter()
                (gaps if last else firsts).append(now - (last or began))
                last = now

    for line in sys.stdin:
        work = json.loads(line)
        if not work:
            print("{}", flush=True)
            continue
        prefix, prompts = texts(random.Random(work["seed"]), {**NUMBERS, **work})
        firsts: list[float] = []
        gaps: list[float] = []
        places, began, cpu = asyncio.Semaphore(work["clients"]), time.perf_counter(), time.process_time()
        await asyncio.gather(*(one(places, prefix, text, firsts, gaps) for text in prompts))
        elapsed = time.perf_counter() - began
        gaps.sort()
        figures = {
            "duration": elapsed,
            "request_throughput": len(prompts) / elapsed,
            "output_throughput": len(prompts) * NUMBERS["output_len"] / elapsed,
            "mean_ttft_ms": 1000 * statistics.fmean(firsts),
            "median_itl_ms": 1000 * statistics.median(gaps),
            "p99_itl_ms": 1000 * gaps[int(0.99 * (len(gaps) - 1))],
            "client_cpu_seconds": time.process_time() - cpu,  # of the whole
        }
        print(json.dumps(figures), flush=True)


def restart(model: str, threads: int) -> float:
    """Seconds from the engine's end, with 8 clients at work, to the first answer of a request that came after it."""
    process, url = octavo_server(model, threads)
    command = [sys.executable, "-m", "octavo.cli.main", "bench", "serve", "--base-url", url, "--max-concurrency", "8"]
    load = subprocess.Popen([*command, "--num-prompts", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(3)
        tasks = Path(f"/proc/{process.pid}/task").iterdir()
        children = {int(one) for task in tasks for one in (task / "children").read_text().split()}
        (engine,) = (one for one in children if "engine_process" in Path(f"/proc/{one}/cmdline").read_text())
        body = json.dumps({"prompt": "A", "max_tokens": 1}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        began = time.perf_counter()
        os.kill(engine, signal.SIGKILL)
        while True:
            with suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=60):
                return time.perf_counter() - began
    finally:
        for one in (load, process):
            one.kill()
            one.wait()


def median(values: list[float]) -> float:
    return statistics.median(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", help="llama-server=PROGRAM and its flags")
    parser.add_argument("--restart", action="store_true", help="time how long a killed engine is missed, and no more")
    parser.add_argument("--json")
    parser.add_argument("--library", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library:
        asyncio.run(answer_from_the_library(args.library, args.threads))
        return
    if args.restart:
        found = [restart(args.model, args.threads) for _ in range(args.rounds)]
        print(f"answered again after {median(found):.2f} s ({min(found):.2f} to {max(found):.2f})")
        return
    from octavo.hub import resolve_model

    server, url = octavo_server(args.model, args.threads)
    library = Library(args.model, args.threads)
    engines = {
        "octavo serve": lambda *work: over_http(url, *work),
        "octavo library": library.run,
    }
    peer = None
    if args.peer:
        program = args.peer.removeprefix("llama-server=").split()
        settings = "--parallel", "32", "--ctx-size", str(32 * 1024), "--kv-unified"
        peer = LlamaServer(program, str(resolve_model(args.model)), args.threads, *settings)
        engines["llama-server"] = lambda *work: over_http(peer.address, *work)
    report: dict[str, Any] = {"rounds": args.rounds, **NUMBERS}
    try:
        for clients in args.clients:
            requests = {1: 6}.get(clients, 3 * clients)
            figures: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
            for number in range(args.rounds):
                names = list(engines) if number % 2 == 0 else list(engines)[::-1]
                for name in names:
                    figures[name].append(engines[name](1000 * clients + number, clients, requests))
            report[str(clients)] = figures
            print(f"{clients} clients, {requests} requests")
            for name, found in figures.items():
                medians = {key: median([one[key] for one in found]) for key in FIGURES}
                told = ", ".join(f"{key} {value:.2f}" for key, value in medians.items())
                ratios = [
                    one["duration"] / ours["duration"] for one, ours in zip(found, figures["octavo serve"], strict=True)
                ]
                print(f"  {name:15} {told}")
                print(f"  {'':15} {median(ratios):.2f} of octavo serve's time ({min(ratios):.2f} to {max(ratios):.2f})")
    finally:
        server.kill()
        server.wait()
        library.close()
        if peer is not None:
            peer.close()
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
