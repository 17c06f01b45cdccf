"""The result of one check of `octavo verify`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"  # `detail` says why
    INFO = "info"  # measured, without a limit to hold


@dataclass(frozen=True, slots=True)
class Check:
    part: str  # "answers", "transformers" or "exactness"
    name: str
    status: Status
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)


def judged(part: str, name: str, passed: bool, detail: str, **figures: Any) -> Check:
    return Check(part, name, Status.PASSED if passed else Status.FAILED, detail, figures)
