#!/usr/bin/env python3
"""Coverage-guided fuzzing of the model file readers with atheris.

    python tests/fuzz/fuzz_formats.py -max_total_time=60 [corpus folder] [other libFuzzer options]

Any exception but ModelFormatError, any accepted file that is not consistent, and more than 512 MiB or 5 s for one small
file are findings; libFuzzer writes the input to ./crash-… or ./oom-….
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "formats"), str(HERE.parents[1] / "src")]

with atheris.instrument_imports(include=["octavo.formats", "json"]):
    from octavo.formats import GGUFFile, SafetensorsFile, open_safetensors, open_weights

from builder import sample_gguf, sample_safetensors  # noqa: E402
from invariants import mutate, opens  # noqa: E402

FOLDER = Path(tempfile.mkdtemp(prefix="octavo-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
FILE = FOLDER / "file"
INDEX = FOLDER / "model.safetensors.index.json"
(FOLDER / "shard").write_bytes(sample_safetensors())


def test_one_input(data: bytes) -> None:
    if not data:
        return
    FILE.write_bytes(data)
    opens(GGUFFile, FILE)
    opens(SafetensorsFile, FILE)
    opens(open_weights, FILE)
    if data[:1] == b"{":
        INDEX.write_bytes(data)
        opens(open_safetensors, INDEX)


def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
    """Half the time libFuzzer's own changes, half the time ours, which know what lengths and counts look like."""
    if seed % 2 or not data:
        return atheris.Mutate(data, max_size)
    return mutate(data, random.Random(seed))[:max_size]


def write_seeds(folder: Path) -> None:
    (folder / "gguf").write_bytes(sample_gguf())
    (folder / "safetensors").write_bytes(sample_safetensors())
    (folder / "index").write_bytes(b'{"metadata":{"total_size":4},"weight_map":{"ints":"shard"}}')


def main() -> None:
    arguments = list(sys.argv)
    if all(a.startswith("-") for a in arguments[1:]):
        corpus = FOLDER / "corpus"
        corpus.mkdir()
        arguments.append(str(corpus))
    folder = Path(next(a for a in arguments[1:] if not a.startswith("-")))
    if folder.is_dir():
        write_seeds(folder)
    defaults = {"-max_len": "8192", "-rss_limit_mb": "512", "-timeout": "5"}
    given = {a.split("=")[0] for a in arguments}
    arguments += [f"{name}={value}" for name, value in defaults.items() if name not in given]
    child = os.fork()  # libFuzzer ends its process without clean-up
    if child:
        _, status = os.waitpid(child, 0)
        shutil.rmtree(FOLDER)
        sys.exit(os.waitstatus_to_exitcode(status))
    atheris.Setup(arguments, test_one_input, custom_mutator=custom_mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
