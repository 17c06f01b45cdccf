"""The last benchmarks, remembered in OCTAVO_HOME for `octavo doctor`."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from octavo.core.errors import OctavoError
from octavo.hub import octavo_home

SCHEMA = 1  # raised when a field changes its meaning; a file of another schema is not read
FILE_NAME = "last_benchmarks.json"
_KEPT = ("benchmark", "model", "backend", "instruction_set", "threads", "output_tokens_per_second", "limits", "phases")
_MAX_BYTES = 1 << 20

logger = logging.getLogger("octavo.cli")


def save(report: dict[str, Any]) -> str | None:
    """Remember what `doctor` shows of a report, one of each benchmark. Returns the file's path.

    A folder that cannot be written is no reason for a benchmark to fail: that is logged, and None returned.
    """
    entry = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **{name: report.get(name) for name in _KEPT}}
    try:
        path = octavo_home() / FILE_NAME
        entries = {old["benchmark"]: old for old in load()} | {entry["benchmark"]: entry}
        text = json.dumps({"schema": SCHEMA, "benchmarks": list(entries.values())}, indent=1) + "\n"
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{FILE_NAME}.")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            Path(name).replace(path)  # at once: whoever reads finds the old file or the new one
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except (OctavoError, OSError) as error:
        logger.warning("the benchmark is not remembered: %s", error)
        return None
    return str(path)


def load() -> list[dict[str, Any]]:
    """The benchmarks remembered, the last one last; none when there is no file or none that this version reads."""
    try:
        with (octavo_home(writable=False) / FILE_NAME).open("rb") as file:
            content = json.loads(file.read(_MAX_BYTES))
    except (OctavoError, OSError, ValueError, RecursionError):
        return []
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return []
    entries = content.get("benchmarks")
    sound = [entry for entry in entries if _is_sound(entry)] if isinstance(entries, list) else []
    return sorted(sound, key=lambda entry: entry["date"])


def _is_sound(entry: Any) -> bool:
    """Whether an entry has the types that `doctor` prints: the file may have been edited, or cut short."""
    if not isinstance(entry, dict) or not isinstance(entry.get("phases"), dict):
        return False
    texts = all(isinstance(entry.get(name), str) for name in ("date", "benchmark", "model", "backend"))
    phases = [phase for phase in entry["phases"].values() if phase is not None]
    return texts and all(isinstance(phase, dict) and _has_shares(phase) for phase in phases)


def _has_shares(phase: dict[str, Any]) -> bool:
    rate = phase.get("tokens_computed_per_second")
    shares = [phase.get(name) for name in ("mbu", "mfu")]
    return _is_number(rate) and all(share is None or _is_number(share) for share in shares)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
