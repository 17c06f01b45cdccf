"""Make smollm2_beams.json: beam searches of width 4 and 8 by transformers. Takes some forty minutes on one
core; started again, it goes on where it was.

python -m tests.oracle.make_smollm2_beams [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from octavo.hub import resolve_model
from tests.oracle.beams import make
from tests.oracle.oracle import FOLDER


def main(out: Path = FOLDER / "smollm2_beams.json") -> None:
    make(resolve_model("smollm2"), out, "tests/oracle/make_smollm2_beams.py")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
