"""Make gemma3.json: 8 prompts, 64 greedy tokens each, by transformers. Takes some two minutes on one core.

python -m tests.oracle.make_gemma3 [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from octavo.hub import resolve_model
from tests.oracle.oracle import FOLDER, make
from tests.oracle.prompts import gemma3_prompts


def main(out: Path = FOLDER / "gemma3.json") -> None:
    make(resolve_model("gemma3-270m"), gemma3_prompts(), out, "tests/oracle/make_gemma3.py")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
