"""Fuzzers of what comes from strangers: ``python -m tests.fuzz [--seconds N] [--seed N] [--only NAME] [FILE]``.

Each fuzzer is a module with `make(rng) -> bytes`, an input, and `check(data)`, which raises where it finds something.
The input is then kept in tests/fuzz/found; given a FILE from there, it is checked again.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time
import traceback
from pathlib import Path

FUZZERS = ("templates", "tokenizer_files", "parameters", "gguf_models", "model_folders")
FOUND = Path(__file__).parent / "found"


def run(name: str, seed: int, seconds: float = float("inf"), rounds: int = sys.maxsize) -> tuple[int, list[Path]]:
    """How many inputs were tried until time or rounds were up, and the files of those that found something. What ends
    the process leaves its input behind as well."""
    fuzzer = importlib.import_module(f"tests.fuzz.{name}")
    found: list[Path] = []
    end, tried = time.monotonic() + seconds, 0
    while tried < rounds and time.monotonic() < end:
        data = fuzzer.make(random.Random(f"{seed} {tried}"))
        file = FOUND / f"{name}-{seed}-{tried}"
        FOUND.mkdir(exist_ok=True)
        file.write_bytes(data)
        tried += 1
        try:
            fuzzer.check(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of Rust code is no Exception
            traceback.print_exc()
            found.append(file)
        else:
            file.unlink()
    return tried, found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=60, help="in all")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", choices=FUZZERS)
    parser.add_argument("file", nargs="?", type=Path)
    args = parser.parse_args()
    if args.file is not None:
        importlib.import_module(f"tests.fuzz.{args.file.name.split('-')[0]}").check(args.file.read_bytes())
        return 0
    seed = random.randrange(10**6) if args.seed is None else args.seed
    names = [args.only] if args.only else FUZZERS
    failures = 0
    for name in names:
        tried, found = run(name, seed, args.seconds / len(names))
        print(f"{name}: {tried} inputs with seed {seed}, {len(found)} found something", *found, sep="\n    ")
        failures += len(found)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
