"""How many KV blocks sharing saves: for beams, and for samples of one prompt.

    python benchmarks/sharing.py --model smollm2

The metric is that of the vLLM paper (Kwon et al., 2023, section 6.3): the blocks saved by sharing, divided by the
blocks there would be without; over all steps of all requests. Prompts are cuts of Python's own help topics.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import octavo


class Counting:
    """An executor that counts the blocks of each step's rows that decode: all, and without those that stand twice."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.entries = self.blocks = 0

    def execute(self, plan: Any) -> Any:
        tables = [grant.block_table for grant in plan.grants if grant.stop - grant.start == 1]
        self.entries += sum(map(len, tables))
        self.blocks += len(set().union(*tables))
        return self._executor.execute(plan)

    def close(self) -> None:
        self._executor.close()


def prompts(llm: octavo.LLM, length: int, count: int) -> list[dict[str, list[int]]]:
    from pydoc_data.topics import topics

    token_ids = llm.tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)))
    return [{"prompt_token_ids": token_ids[i * 1000 : i * 1000 + length]} for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new", type=int, default=64, help="tokens of each output")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    rows = []
    with octavo.LLM(args.model, max_model_len=2048, max_num_seqs=8) as llm:
        executor = llm._engine._executor
        for length in (20, 160, 640):
            for width in (2, 4, 8):
                given = prompts(llm, length, args.requests)
                for kind in ("beams", "samples"):
                    llm._engine._executor = counting = Counting(executor)
                    for prompt in given:  # one after the other: what requests share among each other is not counted
                        llm.reset_prefix_cache()
                        if kind == "beams":
                            beams = octavo.BeamSearchParams(beam_width=width, max_tokens=args.new, ignore_eos=True)
                            llm.beam_search(prompt, beams)
                        else:
                            llm.generate(prompt, octavo.SamplingParams(n=width, max_tokens=args.new, ignore_eos=True))
                    saved = 1 - counting.blocks / counting.entries
                    rows.append({"prompt": length, "new": args.new, "kind": kind, "width": width, "saved": saved})
                    print(f"prompt {length:4}, {args.new} new, {kind:8} {width}: {saved:6.1%} of the blocks saved")
        llm._engine._executor = executor
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
