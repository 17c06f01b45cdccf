"""Tokens a second with guesses and without, in turn in one run, on text that repeats its context more and less.

Tasks are prompts with what the model makes of them, greedily. Overlap is measured on that: the share of generated
tokens that lie in a run of four which the context held already. Of many candidates (passages to copy and to edit,
records to extract, beginnings to continue, questions) those are taken whose overlap is nearest to 0, 0.5 and 0.9; chats
are questions as they come. Time is that of decoding: prompts come from the prefix cache, or the time of one token is
taken off.

With and without are the same engine's, whose requests want guesses or opt out (`speculative_decoding`): where in memory
the weights of an engine lie makes it some percent faster or slower than its neighbour. A batch of N is N requests at a
time, while others wait for the place of one that ends.

    python benchmarks/speculation.py --model smollm2 --threads 2 --rounds 5 --json figures.json
    python benchmarks/speculation.py --head head.safetensors
    python benchmarks/speculation.py --peer llama.cpp=PATH/python --peer openvino=PATH/python

Peers answer the same prompts one by one, with their prompt lookup and without.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pydoc_data.topics
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEW = 96  # tokens of each answer
PROMPTS = 16  # of each level
LEVELS = (0.0, 0.5, 0.9)
BATCHES = {1: 1, 4: 2, 16: 4}  # requests at a time -> how often each prompt is asked
METHODS: dict[str, dict[str, Any]] = {"ngram": {"method": "ngram"}, "suffix": {"method": "suffix"}}
QUESTIONS = (
    "What is the difference between weather and climate?",
    "Explain how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "Give me tips for learning a new language.",
    "What should I cook for dinner with rice and eggs?",
    "How does a vaccine work?",
    "Write a polite letter to a landlord about a broken heater.",
    "Why is the sky blue?",
    "Describe the city of Rome to a child.",
    "What are the advantages of reading every day?",
    "How can I sleep better?",
    "Tell me about the moon.",
    "Write a poem about autumn.",
    "What does a software engineer do?",
    "How do plants make food?",
    "Plan a weekend trip to the mountains.",
)


def overlap(prompt: list[int], output: list[int]) -> float:
    """Share of the output's tokens in a run of four tokens that stood in prompt or output before."""
    tokens = prompt + output
    seen = {tuple(tokens[i : i + 4]) for i in range(len(prompt) - 3)}
    inside = [False] * len(tokens)
    for end in range(len(prompt) + 1, len(tokens) + 1):
        if end < 4:
            continue
        run = tuple(tokens[end - 4 : end])
        if run in seen:
            inside[end - 4 : end] = [True] * 4
        seen.add(run)
    return sum(inside[len(prompt) :]) / len(output)


def candidates(llm: Any, rng: random.Random) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of tasks, and of chats."""
    encode = llm.tokenizer.encode

    def chat(text: str) -> list[int]:
        return list(llm.chat_prompt([{"role": "user", "content": text}])["prompt_token_ids"])

    topics = [" ".join(text.split()) for text in pydoc_data.topics.topics.values() if len(text) > 4000]
    tasks: list[list[int]] = []
    for _ in range(40):
        text = rng.choice(topics)
        start = rng.randrange(len(text) - 1500)
        passage = text[start : start + rng.randint(300, 700)]
        word, other = rng.choice(passage.split()), rng.choice(["apple", "Paris", "seven", "blue"])
        lines = [f"{rng.choice('ABCDEFGH')}{rng.randint(10, 99)}: {rng.randint(1000, 9999)}" for _ in range(20)]
        tasks += [
            encode(f"{passage}\n\nOnce more:\n\n{passage[:60]}"),
            encode(passage),
            chat(f"Repeat this text word for word:\n\n{passage}"),
            chat(f"Repeat this text, with {other} instead of {word}:\n\n{passage}"),
            chat("Write out the lines of this list that begin with A or B:\n\n" + "\n".join(lines)),
            chat(f"What is this text about?\n\n{passage}"),
        ]
    return tasks, [chat(question) for question in QUESTIONS]


class Octavo:
    """`batch`: None: requests come together."""

    def __init__(self, model: str, threads: int, batch: int | None = None, **config: Any) -> None:
        import octavo

        if batch is not None:
            config["max_num_seqs"] = batch
        # Room for all prompts, so that none is computed twice.
        self.llm = octavo.LLM(model, threads=threads, max_model_len=2048, kv_cache_memory_bytes=1 << 29, **config)
        self._params = octavo.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)

    def answers(self, prompts: list[list[int]], *, guesses: bool = True) -> tuple[list[list[int]], float]:
        """Outputs, and seconds."""
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = dataclasses.replace(self._params, speculative_decoding=guesses)
        started = time.perf_counter()
        outputs = self.llm.generate(given, params)
        return [list(output.outputs[0].token_ids) for output in outputs], time.perf_counter() - started


# --- peers: children that answer lines of prompts with seconds ---


def llama_cpp(model: str, threads: int, lookup: bool) -> Callable[[list[int]], float]:
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    draft = LlamaPromptLookupDecoding(num_pred_tokens=10) if lookup else None
    llm = Llama(model, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False, draft_model=draft)

    def run(prompt: list[int]) -> float:
        llm.reset()
        started = 0.0
        for number, _ in enumerate(llm.generate(prompt, temp=0.0)):
            if number == 0:
                started = time.perf_counter()
            if number == NEW - 1:
                break
        return time.perf_counter() - started

    return run


def openvino(model: str, threads: int, lookup: bool) -> Callable[[list[int]], float]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    settings: dict[str, Any] = {"prompt_lookup": True} if lookup else {}
    pipeline = genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads, **settings)

    def run(prompt: list[int]) -> float:
        ids = np.array([prompt], np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        seconds = []
        for new in (1, NEW):
            config = genai.GenerationConfig()
            config.do_sample, config.ignore_eos = False, True
            config.max_new_tokens = config.min_new_tokens = new
            if lookup:
                config.num_assistant_tokens, config.max_ngram_size = 5, 3  # its documentation's
            started = time.perf_counter()
            pipeline.generate(inputs, config)
            seconds.append(time.perf_counter() - started)
        return seconds[1] - seconds[0]

    return run


PEERS = {"llama.cpp": llama_cpp, "openvino": openvino}


def serve(peer: str, model: str, threads: int, lookup: bool) -> None:
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever it prints goes elsewhere
    run = PEERS[peer](model, threads, lookup)
    print("ready", file=output, flush=True)
    for line in sys.stdin:
        print(run(json.loads(line)), file=output, flush=True)


class Child:
    def __init__(self, peer: str, python: str, model: str, threads: int, lookup: bool) -> None:
        command = [python, __file__, "--serve", peer, "--model", model, "--threads", str(threads)]
        log = subprocess.DEVNULL if not os.environ.get("COMPARE_VERBOSE") else None
        self._process = subprocess.Popen(
            [*command, *(["--lookup"] if lookup else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        if self._line() != "ready":
            raise RuntimeError(f"{peer} does not load with {python}")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def seconds(self, prompts: list[list[int]]) -> float:
        total = 0.0
        for prompt in prompts:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(prompt) + "\n")
            self._process.stdin.flush()
            total += float(self._line())
        return total


# --- what is measured ---


def compared(engine: Octavo, prompts: list[list[int]], rounds: int) -> dict[str, Any]:
    """Tokens a second with guesses and without; the first round, which fills the prefix cache, does not count."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    before = engine.llm.speculation_stats
    for number in range(rounds + 1):
        found = {}
        for guesses in (False, True) if number % 2 else (True, False):
            found[guesses], seconds = engine.answers(prompts, guesses=guesses)
            if number:
                rates[guesses].append(len(prompts) * NEW / seconds)
        if found[True] != found[False]:
            raise RuntimeError("a guess changed an answer")
    ratios = [on / off for on, off in zip(rates[True], rates[False], strict=True)]
    after = engine.llm.speculation_stats
    old = [*before.drafted_per_position, *[0] * 64], [*before.accepted_per_position, *[0] * 64]
    return {
        "off": statistics.median(rates[False]),
        "tokens_per_s": statistics.median(rates[True]),
        "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
        "tokens_per_step": (after.num_drawn_tokens - before.num_drawn_tokens)
        / max(after.num_draws - before.num_draws, 1),
        "accepted": after.num_accepted_tokens - before.num_accepted_tokens,
        "drafted": after.num_draft_tokens - before.num_draft_tokens,
        "acceptance_by_position": [
            (after.accepted_per_position[p] - old[1][p]) / drafted
            for p in range(len(after.drafted_per_position))
            if (drafted := after.drafted_per_position[p] - old[0][p])
        ],
    }


def with_peer(peer: str, python: str, args: argparse.Namespace, model: str, sets: dict[str, Any]) -> dict[str, Any]:
    without, lookup = (Child(peer, python, model, args.threads, on) for on in (False, True))
    report = {}
    for name, prompts in sets.items():
        rates: list[tuple[float, float]] = []
        for number in range(args.rounds + 1):
            pair = tuple(len(prompts) * (NEW - 1) / child.seconds(prompts) for child in (without, lookup))
            if number:
                rates.append(pair)  # type: ignore[arg-type]
        ratios = [on / off for off, on in rates]
        report[name] = {
            "off": statistics.median(off for off, _ in rates),
            "prompt lookup": statistics.median(on for _, on in rates),
            "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
        }
        print(f"{peer:10} {name:12} batch 1  {_figures(report[name])}", flush=True)
    return report


def _figures(one: dict[str, Any]) -> str:
    median, low, high = one["ratio"]
    rates = [f"{one[key]:.0f}" for key in ("off", "prompt lookup", "tokens_per_s") if key in one]
    more = f", {one['tokens_per_step']:.2f} tokens a step" if "tokens_per_step" in one else ""
    return f"{' / '.join(rates)} tok/s, {median:.2f} ({low:.2f} to {high:.2f}){more}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="alias, or a .gguf file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--head", help="a file that octavo train-head wrote: what it guesses is measured too")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--peers-only", action="store_true", help="nothing of Octavo")
    parser.add_argument("--only", action="append", default=[], help="part of a set's name; repeatable")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--lookup", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.model, args.threads, args.lookup)
        return
    from octavo.hub import resolve_model

    methods = METHODS | ({"head": {"method": "draft_head", "model": args.head}} if args.head else {})
    plain = Octavo(args.model, args.threads)
    tasks, chats = candidates(plain.llm, random.Random(0))
    outputs, _ = plain.answers([*tasks, *chats])
    plain.llm.close()
    measured = [(overlap(prompt, output), prompt) for prompt, output in zip([*tasks, *chats], outputs, strict=True)]
    sets: dict[str, list[list[int]]] = {}
    shares: dict[str, float] = {}
    for level in LEVELS:
        nearest = sorted(measured, key=lambda one: abs(one[0] - level))[:PROMPTS]
        sets[f"overlap {level}"] = [prompt for _, prompt in nearest]
        shares[f"overlap {level}"] = statistics.mean(share for share, _ in nearest)
    sets["chat"] = chats
    shares["chat"] = statistics.mean(share for share, _ in measured[-len(chats) :])
    sets = {name: one for name, one in sets.items() if not args.only or any(part in name for part in args.only)}
    report: dict[str, Any] = {"overlap": shares, "octavo": {}, "peers": {}}
    for name in sets:
        print(f"{name}: measured {shares[name]:.2f}", flush=True)
    for batch, times in {} if args.peers_only else BATCHES.items():
        engines = {
            name: Octavo(args.model, args.threads, batch, speculative_config=config) for name, config in methods.items()
        }
        for name, prompts in sets.items():
            for method, engine in engines.items():
                found = compared(engine, prompts * times, args.rounds)
                report["octavo"][f"{name}, batch {batch}, {method}"] = found
                print(f"{method:10} {name:12} batch {batch:2}  {_figures(found)}", flush=True)
        for engine in engines.values():
            engine.llm.close()
    for one in args.peer:
        peer, _, python = one.partition("=")
        report["peers"][peer] = with_peer(peer, python, args, str(resolve_model(args.model)), sets)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
