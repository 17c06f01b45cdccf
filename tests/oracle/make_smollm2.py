"""Make smollm2.json: 50 prompts, 64 greedy tokens each, by transformers. Takes some ten minutes on one core.

python -m tests.oracle.make_smollm2 [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from octavo.hub import resolve_model
from tests.oracle.oracle import FOLDER, make
from tests.oracle.prompts import smollm2_prompts


def main(out: Path = FOLDER / "smollm2.json") -> None:
    make(resolve_model("smollm2"), smollm2_prompts(), out, "tests/oracle/make_smollm2.py")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
