"""Octavo against llama.cpp, OpenVINO GenAI and transformers: same file, prompt ids and threads, alternating in one run.

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
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Work:
    """What is timed."""

    name: str
    sequences: int
    prompt: int  # tokens of each
    new: int  # tokens of each; 0: the prompt alone is timed
    beams: int = 0  # width of a beam search; 0: greedy
    shared: int = 0  # tokens of the prompts that are the same in all sequences; then the whole is timed
    warm: bool = False  # the same prompts a second time, with whatever the engine has kept of them
    unit: str = "tok/s"


WORKS = (
    Work("prefill 512", 1, 512, 0),
    Work("prefill 2048", 1, 2048, 0),
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
START_PROMPT = "The capital of France is"


def prompt_ids(call: int, sequence: int, length: int, shared: int) -> list[int]:
    """Token ids inside every vocabulary here. Calls differ from the first token on, and so do sequences but for what
    they share: no cache helps."""
    own = [(call * 104_729 + sequence * 7919 + i * 31) % 20_000 + 1000 for i in range(length)]
    return own if not shared or not sequence else prompt_ids(call, 0, length, 0)[:shared] + own[shared:]


# --- engines: each gives run(prompts, work): the prompts, and `work.new` tokens after the first of each ---

Run = Callable[[list[list[int]], Work], None]


class MissingError(Exception):
    """An engine cannot do a work; the message says why."""


def load_octavo(model: str, threads: int) -> Run:
    import octavo

    llm = octavo.LLM(model, threads=threads, max_num_seqs=32, max_model_len=8192)

    def run(prompts: list[list[int]], work: Work) -> None:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        if work.beams:
            params = octavo.BeamSearchParams(beam_width=work.beams, max_tokens=work.new + 1, ignore_eos=True)
            llm.beam_search(given, params)
        else:
            params = octavo.SamplingParams(temperature=0, max_tokens=work.new + 1, ignore_eos=True, detokenize=False)
            llm.generate(given, params)

    return run


def load_beams_by_requests(model: str, threads: int) -> Run:
    """Beam search as vLLM's `LLM.beam_search` does it, on Octavo's engine: in each step a request of one token for each
    beam, with the log-probabilities of twice as many tokens as there are beams; the prefix cache carries the KV."""
    import octavo

    llm = octavo.LLM(model, threads=threads, max_num_seqs=32, max_model_len=8192)

    def run(prompts: list[list[int]], work: Work) -> None:
        if not work.beams:
            raise MissingError("it is a way to search")
        params = octavo.SamplingParams(max_tokens=1, temperature=0, logprobs=2 * work.beams, detokenize=False)
        beams = [(0.0, prompts[0])]
        for _ in range(work.new + 1):
            outputs = llm.generate([{"prompt_token_ids": tokens} for _, tokens in beams], params)
            candidates = [
                (score + entry.logprob, [*tokens, token_id])
                for (score, tokens), output in zip(beams, outputs, strict=True)
                for token_id, entry in output.outputs[0].logprobs[0].items()
            ]
            beams = sorted(candidates, key=lambda candidate: -candidate[0])[: work.beams]

    return run


def load_llama_cpp(model: str, threads: int) -> Run:
    import ctypes

    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(ctypes.cast(None, llama_cpp.llama_log_callback), ctypes.c_void_p(0))
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = 32 * 640, 32, 8192, 512
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(loaded, params)
    batch = llama_cpp.llama_batch_init(8192, 0, 1)

    def put(token: int, position: int, sequence: int, wanted: bool) -> None:
        i = batch.n_tokens
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
        batch.seq_id[i][0] = sequence
        batch.n_tokens += 1

    def best(row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, (vocab_size,)).argmax())

    def decode() -> None:
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def run_batch(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """(token, position, sequence, wanted) of any number; the best next token after each wanted one."""
        found = []
        for first in range(0, len(rows), 8192):
            batch.n_tokens = 0
            for row in rows[first : first + 8192]:
                put(*row)
            decode()
            found += [best(i) for i, row in enumerate(rows[first : first + 8192]) if row[3]]
        return found

    def run(prompts: list[list[int]], work: Work) -> None:
        if work.beams:
            raise MissingError("it has no beam search")
        if work.shared:
            raise MissingError("its server shares prefixes: see llama-server")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        last = len(prompts[0]) - 1
        tokens = run_batch([(id_, i, s, i == last) for s, prompt in enumerate(prompts) for i, id_ in enumerate(prompt)])
        for step in range(work.new):
            tokens = run_batch([(token, last + 1 + step, s, True) for s, token in enumerate(tokens)])

    return run


def load_llama_server(model: str, threads: int) -> Run:
    """llama.cpp's own server, with a slot for each request of a burst; asked over HTTP, all at once."""
    from concurrent.futures import ThreadPoolExecutor

    from llama_server import LlamaServer

    settings = ["--parallel", "16", "--kv-unified", "--ctx-size", "20480"]
    ask = LlamaServer([os.environ["COMPARE_LLAMA_SERVER"]], model, threads, *settings).ask

    def run(prompts: list[list[int]], work: Work) -> None:
        if not work.shared:
            raise MissingError("it is timed with bursts of requests only")
        body = {"n_predict": work.new + 1, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
        with ThreadPoolExecutor(len(prompts)) as users:
            for answer in users.map(lambda prompt: ask("/completion", body | {"prompt": prompt}), prompts):
                if answer["tokens_predicted"] != work.new + 1:
                    raise RuntimeError(f"it gave {answer['tokens_predicted']} tokens")

    return run


def load_openvino(model: str, threads: int, **more: str) -> Run:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipelines: dict[bool, Any] = {}  # by whether requests share a prefix; each is made when it is needed

    def pipeline(shared: bool) -> Any:
        if shared not in pipelines:
            pipelines.clear()
            settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, **more}
            if shared:  # continuous batching with its prefix cache
                settings["scheduler_config"] = scheduler = genai.SchedulerConfig()
                scheduler.enable_prefix_caching = True
                scheduler.max_num_batched_tokens, scheduler.cache_size = 512, 4
            pipelines[shared] = genai.LLMPipeline(model, "CPU", **settings)
        return pipelines[shared]

    def run(prompts: list[list[int]], work: Work) -> None:
        config = genai.GenerationConfig()
        config.do_sample, config.ignore_eos = False, True
        if work.beams:
            config.num_beams, config.num_beam_groups, config.num_return_sequences = work.beams, 1, 1
            config.stop_criteria = genai.StopCriteria.NEVER
        config.max_new_tokens = config.min_new_tokens = work.new + 1
        ids = np.array(prompts, np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        pipeline(bool(work.shared)).generate(inputs, config)

    return run


def load_openvino_f32(model: str, threads: int) -> Run:
    """OpenVINO in float32, as it computes by default where the processor has no bfloat16."""
    return load_openvino(model, threads, INFERENCE_PRECISION_HINT="f32")


def load_transformers(model: str, threads: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    path = Path(model)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    def run(prompts: list[list[int]], work: Work) -> None:
        ids = torch.tensor(prompts)
        with torch.no_grad():
            loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=work.new + 1,
                min_new_tokens=work.new + 1,
                do_sample=False,
                num_beams=work.beams or 1,
                pad_token_id=0,
                **({"early_stopping": "never"} if work.beams else {}),
            )

    return run


ENGINES: dict[str, Callable[[str, int], Run]] = {
    "octavo": load_octavo,
    "vllm-method": load_beams_by_requests,
    "llama.cpp": load_llama_cpp,
    "llama-server": load_llama_server,
    "openvino": load_openvino,
    "openvino-f32": load_openvino_f32,
    "transformers": load_transformers,
}


def serve(engine: str, model: str, threads: int) -> None:
    """A child: loads one engine, then answers lines of {call, work} with seconds or a reason; a call of the same number
    has the same prompts."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints goes elsewhere
    run = ENGINES[engine](model, threads)
    print("ready", file=output, flush=True)
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


# --- start-up: what a user would run, in a process of its own; compare.py's imports are not part of it ---

LLAMA_CPP_START = """
import sys
import llama_cpp
model, threads, prompt = sys.argv[1], int(sys.argv[2]), sys.argv[3]
llm = llama_cpp.Llama(model, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
for part in llm(prompt, max_tokens=1, temperature=0, stream=True):
    print(part["choices"][0]["text"], flush=True)
    break
"""


def start_command(engine: str, python: str, model: str, threads: int) -> list[str]:
    if engine == "octavo":
        settings = [
            "--model",
            model,
            "--threads",
            str(threads),
            "--max-tokens",
            "1",
            "--ignore-eos",
            "--temperature",
            "0",
        ]
        return [str(Path(python).with_name("octavo")), "run", "--raw", *settings, START_PROMPT]
    if engine == "llama.cpp":
        return [python, "-c", LLAMA_CPP_START, model, str(threads), START_PROMPT]
    raise MissingError("its start-up is not timed")


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
        command = [python, str(HERE / "compare.py"), "--serve", engine, "--model", model, "--threads", str(threads)]
        log = subprocess.DEVNULL if not os.environ.get("COMPARE_VERBOSE") else None
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"it does not load with {python}")

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
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.model, args.threads)
        return
    from octavo.hub import resolve_model

    model = str(resolve_model(args.model))
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
    rows = table([(work, measure(children, work, args.rounds)) for work in works])
    show(rows, [name for name in ENGINES if name in pythons])
    if args.json:
        machine = {"processor": processor(), "threads": args.threads}
        report = {"date": datetime.now(UTC).isoformat(), "machine": machine, "model": Path(model).name, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
