"""Processes of a server that runs as a program."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def engines_of(pid: int) -> list[int]:
    """Those that step; none while there is none, or once the program has ended."""
    children: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # a thread that has ended meanwhile
                children += map(int, (task / "children").read_text().split())
    return [child for child in children if is_engine(child)]


def is_engine(pid: int) -> bool:
    try:
        return b"octavo.server.engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
