"""What a running model takes, beside what was planned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Fills the whole context of the model and reports memory of its own process, in bytes. All rows of logits are wanted:
# the plan has room for the step that needs most. What imports and a tokenizer take is no part of it, and is taken away.
RUN = """
import json, sys, threading, time
from octavo import LLM, SamplingParams
def anonymous():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))
path, length = sys.argv[1], int(sys.argv[2])
peak, over = [0], threading.Event()
def watch():
    while not over.wait(0.002):
        peak[0] = max(peak[0], anonymous())
threading.Thread(target=watch, daemon=True).start()
import octavo.backends.cpu, octavo.llm, octavo.text.gguf_vocab, tokenizers
from octavo.formats import open_weights
from octavo.text.gguf_vocab import tokenizer_from_gguf
from pathlib import Path
with open_weights(Path(path)) as file:
    tokenizer = tokenizer_from_gguf(file.metadata, path)
before = anonymous()
llm = LLM(path, backend="cpu", threads=2, max_model_len=length, max_num_seqs=1,
          kv_cache_memory_bytes=length // 16 * 30 * 2 * 16 * 3 * 64 * 2)
mapped = sum(path in line for line in open("/proc/self/maps"))
token_ids = [i * 31 % 20000 + 1000 for i in range(length - 40)]
params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, detokenize=False, prompt_logprobs=0)
(output,) = llm.generate({"prompt_token_ids": token_ids}, params)
over.set()
plan = llm.memory_plan
print(json.dumps({"before": before, "peak": peak[0], "planned": plan.total_bytes, "mapped": mapped,
                  "tokens": len(output.outputs[0].token_ids), "plan": str(plan)}))
"""


@pytest.mark.slow
def test_peak_of_the_whole_context(smollm2_path: Path) -> None:
    """Guards against a plan that is far from what is taken, and a file that stays mapped after it was packed."""
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(smollm2_path), "8192"], capture_output=True, text=True, check=False, timeout=250
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    taken = found["peak"] - found["before"]
    print(found["plan"])
    print(f"anonymous memory: {taken / 1e6:.1f} MB taken, {found['planned'] / 1e6:.1f} MB planned")
    assert found["tokens"] == 40 and found["mapped"] == 0
    assert 0.9 < taken / found["planned"] < 1.1
