"""The figures of compare.py's runs over time, in a file: a list of entries, the newest last."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FILE = HERE / "history.json"
TEXTS = ("date", "commit", "model", "instruction_set")


class DamagedError(Exception):
    """The file is no history; the message names it."""


def load(path: Path) -> list[dict[str, Any]]:
    """All entries. A file that is not there has none."""
    try:
        entries = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(entries, list):
        raise DamagedError(f"{path} is damaged: it has no list of runs")
    for number, entry in enumerate(entries, 1):
        problem = problem_of(entry)
        if problem:
            raise DamagedError(f"{path} is damaged: run {number} of {len(entries)}: {problem}")
    return entries


def append(path: Path, entry: dict[str, Any]) -> None:
    """One run more. Whoever reads meanwhile finds the old file or the new one; a damaged file stays as it is."""
    problem = problem_of(entry)
    if problem:
        raise ValueError(problem)
    text = json.dumps([*load(path), entry], indent=1) + "\n"
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    part = Path(name)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o644)  # that of any file here; what is temporary is its owner's alone
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def problem_of(entry: Any) -> str | None:
    """What an entry lacks of what is read again, or None."""
    if not isinstance(entry, dict):
        return "it is no object"
    for name in TEXTS:
        if not isinstance(entry.get(name), str):
            return f"it has no {name}"
    try:
        datetime.fromisoformat(entry["date"])
    except ValueError:
        return f"its date is {entry['date']!r}"
    machine = entry.get("machine")
    if not isinstance(machine, dict) or not isinstance(machine.get("processor"), str):
        return "it has no processor"
    if not isinstance(machine.get("threads"), int):
        return "it has no number of threads"
    figures = entry.get("figures")
    if not isinstance(figures, list):
        return "it has no figures"
    return next(
        (f"figures {i}: {problem}" for i, row in enumerate(figures, 1) if (problem := problem_of_row(row))), None
    )


def problem_of_row(row: Any) -> str | None:
    if not isinstance(row, dict) or not isinstance(row.get("work"), str) or not isinstance(row.get("unit"), str):
        return "they have no work or no unit"
    medians, ratios = row.get("median"), row.get("ratio")
    if not isinstance(medians, dict) or not isinstance(ratios, dict):
        return "they have no medians or no ratios"
    numbers = list(medians.values())
    for ratio in ratios.values():
        numbers += [ratio.get(name) for name in ("median", "min", "max")] if isinstance(ratio, dict) else [None]
    sound = all(isinstance(n, int | float) and math.isfinite(n) and n > 0 for n in numbers)
    return None if sound else "they are no numbers above 0"


def commit() -> str:
    """Of the checkout that this file is in, with `-dirty` where files differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
