"""An evaluation as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from octavo.evaluation.runner import EvalParams, Run
from octavo.evaluation.summary import BASELINE, Row

if TYPE_CHECKING:
    from rich.table import Table

    from octavo.evaluation.scores import Interval

_TEXT_COLUMNS = ("task", "length", "mode")
_FIGURES = ("n", "score", f"less {BASELINE}", "seconds", "computed", "reused", "generated", "kept")
_MISSING = "-"


def table(rows: Iterable[Row]) -> Table:
    """Scores from 0 to 1 with their 95% intervals; seconds are medians, numbers of tokens and of margins kept
    means."""
    from rich.table import Table
    from rich.text import Text

    result = Table(box=None, header_style="bold", pad_edge=False)
    for name in _TEXT_COLUMNS:
        result.add_column(name)
    for name in _FIGURES:
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(*map(Text, _cells(row)))
    return result


def _cells(row: Row) -> tuple[str, ...]:
    n = 0 if row.score is None else row.score.n
    return (
        row.task,
        str(row.length),
        row.mode,
        f"{n} of {n + row.num_failed}" if row.num_failed else str(n),
        _interval(row.score, ".2f"),
        _interval(row.difference, "+.2f"),
        _MISSING if row.seconds is None else f"{row.seconds:.2f}",
        *(
            _MISSING if value is None else f"{value:.0f}"
            for value in (row.computed_tokens, row.reused_tokens, row.generated_tokens)
        ),
        _MISSING if row.kept_margins is None else f"{row.kept_margins:.1f}",
    )


def _interval(found: Interval | None, form: str) -> str:
    if found is None:
        return _MISSING
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def failures(rows: Iterable[Row]) -> list[str]:
    """What could not be run and why, a line for each row where that was so; of several reasons the first."""
    lines = []
    for row in rows:
        if row.failures:
            reason, *others = row.failures
            more = f" (and {len(others)} other reasons)" if others else ""
            name = f"{row.task} at {row.length} tokens, {row.mode}"
            lines.append(f"{name}: {row.num_failed} could not be run: {reason}{more}")
    return lines


def to_json(
    params: EvalParams, runs: Sequence[Run], rows: Sequence[Row], about: dict[str, Any], *, complete: bool
) -> dict[str, Any]:
    """All there is: `about` (the model, the machine), what was asked for, the rows, and every run with its answer.
    Documents are left out: they can be made again from their task, seed, sample, length and depth."""
    return {
        **about,
        "complete": complete,
        "params": asdict(params),
        "rows": [_row_json(row) for row in rows],
        "runs": [_run_json(run) for run in runs],
    }


def _row_json(row: Row) -> dict[str, Any]:
    intervals = {
        name: None if found is None else found._asdict()
        for name, found in (("score", row.score), ("difference", row.difference))
    }
    return asdict(row) | intervals


def _run_json(run: Run) -> dict[str, Any]:
    example = asdict(run.example)
    del example["document"], example["choices"]
    return example | {"mode": run.mode} | asdict(run.outcome)
