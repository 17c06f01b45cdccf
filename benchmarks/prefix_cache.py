"""What the radix tree costs: microseconds for the bookkeeping of a step while the cache holds many blocks.

    python benchmarks/prefix_cache.py --blocks 100000

A pool of that many blocks is filled with cached prompts that share beginnings. Then requests come that hit, miss,
decode and end, every new block evicting an old one, as on a server that has run for a day. Nothing is computed: the
time is that of `KVCacheManager` alone.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from octavo.kv_cache import BlockTable, KVCacheManager

BLOCK_SIZE = 16
SEQUENCES = 32  # that decode together
PROMPT = 1024  # tokens


def prompts(rng: random.Random) -> Callable[[], list[int]]:
    """Half of a prompt is one of 50 common beginnings."""
    beginnings = [[rng.randrange(50_000) for _ in range(PROMPT // 2)] for _ in range(50)]
    return lambda: rng.choice(beginnings) + [rng.randrange(50_000) for _ in range(PROMPT // 2)]


def begin(kv: KVCacheManager, token_ids: list[int]) -> BlockTable:
    table = kv.new_table()
    have = kv.match(table, token_ids, 0, len(token_ids) - 1)
    kv.allocate(table, have, len(token_ids))
    kv.commit(table, token_ids, len(token_ids))
    return table


def timed(samples: list[float], work: Callable[[], None]) -> None:
    started = time.perf_counter()
    work()
    samples.append((time.perf_counter() - started) * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rng = random.Random(0)
    a_prompt = prompts(rng)
    tracemalloc.start()
    kv = KVCacheManager(args.blocks, BLOCK_SIZE)
    while kv.stats.evicted_blocks < args.blocks // 10:
        kv.free(begin(kv, a_prompt()))
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    running = [(token_ids, begin(kv, token_ids)) for token_ids in (a_prompt() for _ in range(SEQUENCES))]
    steps: list[float] = []
    admissions: list[float] = []
    endings: list[float] = []

    def decode() -> None:
        for token_ids, table in running:
            kv.allocate(table, len(token_ids) - 1, len(token_ids))
            kv.commit(table, token_ids, len(token_ids))

    for step in range(args.steps):
        for token_ids, _ in running:
            token_ids.append(rng.randrange(50_000))
        timed(steps, decode)
        if step % 8 == 0:
            _, table = running.pop(0)
            token_ids = a_prompt()
            timed(endings, lambda table=table: kv.free(table))
            timed(admissions, lambda token_ids=token_ids: running.append((token_ids, begin(kv, token_ids))))
    kv.check([table for _, table in running])
    figures = {
        "blocks": args.blocks,
        "cached_blocks": kv.num_cached,
        "bytes_per_block": round(memory / args.blocks),
        "decode_step_us": statistics.median(steps),
        "decode_step_p99_us": statistics.quantiles(steps, n=100)[98],
        "admission_us": statistics.median(admissions),
        "ending_us": statistics.median(endings),
        "hit_rate": kv.stats.hit_tokens / ((len(admissions) + SEQUENCES) * PROMPT),
        "evicted_blocks": kv.stats.evicted_blocks,
    }
    cached, each = figures["cached_blocks"], figures["bytes_per_block"]
    print(f"{cached:,} of {args.blocks:,} blocks cached, {each} bytes of bookkeeping each")
    median, p99 = figures["decode_step_us"], figures["decode_step_p99_us"]
    print(f"a step that decodes {SEQUENCES} sequences: {median:.0f} µs (p99 {p99:.0f})")
    begins, ends = figures["admission_us"], figures["ending_us"]
    print(f"a request of {PROMPT} tokens, half of them cached, begins: {begins:.0f} µs; ends: {ends:.0f} µs")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
