"""Perplexity of Octavo's backends and of llama.cpp on the same file, token ids and windows.

    python benchmarks/perplexity.py --model smollm2 --llama-cpp PATH/python

The text is that of Python's own help topics, the first 110,000 characters. Windows of 1,024 tokens, of which the second
half is scored. `reference` computes in float32; `cpu` as it does by default, with int8 activations and float16 KV.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path

CHARACTERS = 110_000
WINDOW = 1024

# Reads {model, threads, windows} and prints the mean log-probability of the second halves.
LLAMA_CPP = """
import ctypes, json, sys
import llama_cpp as l
import numpy as np
asked = json.load(sys.stdin)
l.llama_backend_init()
l.llama_log_set(ctypes.cast(None, l.llama_log_callback), ctypes.c_void_p(0))
model = l.llama_model_load_from_file(asked["model"].encode(), l.llama_model_default_params())
vocab_size = l.llama_vocab_n_tokens(l.llama_model_get_vocab(model))
params = l.llama_context_default_params()
params.n_ctx = params.n_batch = 1024
params.n_threads = params.n_threads_batch = asked["threads"]
context = l.llama_init_from_model(model, params)
batch = l.llama_batch_init(1024, 0, 1)
total, count = 0.0, 0
for window in asked["windows"]:
    l.llama_memory_clear(l.llama_get_memory(context), True)
    batch.n_tokens = len(window)
    for i, token in enumerate(window):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, i >= len(window) // 2 - 1
        batch.seq_id[i][0] = 0
    assert l.llama_decode(context, batch) == 0
    for i in range(len(window) // 2 - 1, len(window) - 1):
        row = np.ctypeslib.as_array(l.llama_get_logits_ith(context, i), (vocab_size,)).astype(np.float64)
        top = row.max()
        total += row[window[i + 1]] - top - np.log(np.exp(row - top).sum())
        count += 1
print(total / count)
"""


def windows_of(model: str) -> list[list[int]]:
    from pydoc_data.topics import topics

    import octavo

    text = "\n\n".join(topics[name] for name in sorted(topics))[:CHARACTERS]
    with octavo.LLM(model, max_model_len=64) as llm:
        token_ids = llm.tokenizer.encode(text)
    return [token_ids[i : i + WINDOW] for i in range(0, len(token_ids) - WINDOW + 1, WINDOW)]


def octavo_logprob(model: str, windows: Sequence[Sequence[int]], threads: int, backend: str) -> float:
    import octavo

    scored = []
    params = octavo.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    with octavo.LLM(model, backend=backend, threads=threads, max_model_len=WINDOW + 1) as llm:
        for window in windows:
            (output,) = llm.generate([{"prompt_token_ids": list(window)}], params, use_tqdm=False)
            rows = list(zip(output.prompt_logprobs or (), window, strict=True))[WINDOW // 2 :]
            scored += [row[token].logprob for row, token in rows if row is not None]
    return sum(scored) / len(scored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="alias, or a .gguf file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    from octavo.hub import resolve_model

    model = str(resolve_model(args.model))
    windows = windows_of(model)
    print(f"{len(windows)} windows of {WINDOW} tokens")
    found = {backend: octavo_logprob(model, windows, args.threads, backend) for backend in ("reference", "cpu")}
    if args.llama_cpp:
        asked = json.dumps({"model": model, "threads": args.threads, "windows": windows})
        run = subprocess.run([args.llama_cpp, "-c", LLAMA_CPP], input=asked, capture_output=True, text=True, check=True)
        found["llama.cpp"] = float(run.stdout)
    perplexities = {name: math.exp(-logprob) for name, logprob in found.items()}
    for name, perplexity in perplexities.items():
        against = "" if name == "cpu" else f"   cpu / {name}: {perplexities['cpu'] / perplexity:.5f}"
        print(f"{name:12}{perplexity:10.4f}{against}")
    if args.json:
        args.json.write_text(json.dumps(perplexities, indent=1) + "\n")


if __name__ == "__main__":
    main()
