"""What many runs say together: one row for each task, length and mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from octavo.evaluation.modes import Outcome
from octavo.evaluation.runner import Run
from octavo.evaluation.scores import Interval, bootstrap_interval

BASELINE = "full"  # what other modes are compared with


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The examples of one task and length in one mode. Figures are of those that it could run."""

    task: str
    length: int
    mode: str
    num_failed: int  # examples that the mode could not run
    failures: dict[str, int]  # why, and how many of them
    score: Interval | None  # None: it could run none
    difference: Interval | None  # score less that of `BASELINE`, example by example, over those that both could run
    seconds: float | None  # median
    computed_tokens: float | None  # this and all below are means
    reused_tokens: float | None
    generated_tokens: float | None
    prompt_tokens: float | None
    kept_margins: float | None  # None: no margins are written


def summarise(runs: Iterable[Run]) -> list[Row]:
    """Rows in the order in which tasks and lengths came first; in each the modes, the baseline before the others."""
    groups: dict[tuple[int, str], dict[str, dict[int, Outcome]]] = {}
    for run in runs:
        group = groups.setdefault((run.example.length, run.example.task), {})
        group.setdefault(run.mode, {})[run.example.sample] = run.outcome
    return [
        _row(task, length, mode, outcomes, {} if mode == BASELINE else by_mode.get(BASELINE, {}))
        for (length, task), by_mode in groups.items()
        for mode, outcomes in sorted(by_mode.items(), key=lambda item: item[0] != BASELINE)
    ]


def _row(task: str, length: int, mode: str, outcomes: dict[int, Outcome], baseline: dict[int, Outcome]) -> Row:
    done = {sample: one for sample, one in outcomes.items() if one.error is None}
    failures = Counter(one.error for one in outcomes.values() if one.error is not None)
    differences = [
        one.score - other.score
        for sample, one in done.items()
        if one.score is not None and (other := baseline.get(sample)) is not None and other.score is not None
    ]
    seconds = _values(done, "seconds")
    return Row(
        task=task,
        length=length,
        mode=mode,
        num_failed=failures.total(),
        failures=dict(failures),
        score=bootstrap_interval(_values(done, "score")),
        difference=bootstrap_interval(differences),
        seconds=median(seconds) if seconds else None,
        computed_tokens=_mean(_values(done, "computed_tokens")),
        reused_tokens=_mean(_values(done, "reused_tokens")),
        generated_tokens=_mean(_values(done, "generated_tokens")),
        prompt_tokens=_mean(_values(done, "prompt_tokens")),
        kept_margins=_mean(_values(done, "kept_margins")),
    )


def _values(outcomes: dict[int, Outcome], name: str) -> list[float]:
    return [value for one in outcomes.values() if (value := getattr(one, name)) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
