"""Rows of runs that were made up, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from octavo import InvalidRequestError
from octavo.evaluation.modes import Outcome
from octavo.evaluation.plot import SUFFIXES, check_plot, save_plot
from octavo.evaluation.report import failures, table, to_json
from octavo.evaluation.runner import EvalParams, Run
from octavo.evaluation.summary import Row, summarise
from octavo.evaluation.tasks import Example

BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def run(mode: str, sample: int, score: float | None, *, task: str = "vt", length: int = 100, seconds: float = 1) -> Run:
    """One that could not be run, without a score."""
    document = Example(task, sample, length, length - 1, None, "document", "Which?", ("A",), (), "match_all", 8)
    if score is None:
        return Run(document, mode, Outcome(error=f"prompt: too long by {sample % 2}"))
    figures = {"computed_tokens": 110, "reused_tokens": sample, "generated_tokens": 3, "prompt_tokens": 108}
    kept = 2 if mode == "margins" else None
    return Run(document, mode, Outcome(text="A", score=score, seconds=seconds, kept_margins=kept, **figures))


RUNS = [
    *(run("margins", sample, score) for sample, score in enumerate((1.0, 0.5, 1.0, 0.0))),
    *(run("full", sample, score, seconds=sample) for sample, score in enumerate((0.5, 0.5, None, None, 1.0))),
    *(run("full", sample, 0.25, length=200) for sample in range(3)),
    *(run("margins", sample, None, length=200) for sample in range(3)),
    run("full", 0, 1.0, task="cwe", length=200),
]


def test_rows() -> None:
    full, margins, longer, failed, other = summarise(RUNS)
    assert [(row.task, row.length, row.mode) for row in (full, margins, longer, failed, other)] == [
        ("vt", 100, "full"),
        ("vt", 100, "margins"),
        ("vt", 200, "full"),
        ("vt", 200, "margins"),
        ("cwe", 200, "full"),
    ]
    assert full.score is not None and (full.score.n, full.score.mean, full.num_failed) == (3, pytest.approx(2 / 3), 2)
    assert full.failures == {"prompt: too long by 0": 1, "prompt: too long by 1": 1} and full.difference is None
    assert (full.seconds, full.reused_tokens, full.kept_margins) == (1, pytest.approx(5 / 3), None)
    assert margins.score is not None and (margins.score.n, margins.score.mean) == (4, 0.625)
    assert margins.difference is not None and margins.difference.n == 2, "of the examples that both could run"
    assert margins.difference.mean == 0.25 and margins.kept_margins == 2
    assert (failed.score, failed.difference, failed.seconds, failed.num_failed) == (None, None, None, 3)
    assert longer.score is not None and longer.score.low == longer.score.high == 0.25
    assert other.num_failed == 0


def test_differences_are_paired() -> None:
    """Guards intervals of a difference that are as wide as those of two sets of examples."""
    scores = [0.0, 1.0] * 10
    runs = [run("full", sample, score * 0.9) for sample, score in enumerate(scores)]
    runs += [run("margins", sample, score * 0.9 + 0.1) for sample, score in enumerate(scores)]
    _, margins = summarise(runs)
    assert margins.difference is not None and margins.score is not None
    assert margins.difference.low == pytest.approx(0.1) == margins.difference.high
    assert margins.score.high - margins.score.low > 0.3


def written(rows: list[Row]) -> list[list[str]]:
    console = Console(width=10_000)
    with console.capture() as capture:
        console.print(table(rows))
    return [line.split() for line in capture.get().splitlines()]


def test_table() -> None:
    head, full, margins, _, failed, _ = written(summarise(RUNS))
    assert " ".join(head) == "task length mode n score less full seconds computed reused generated kept"
    assert " ".join(full) == "vt 100 full 3 of 5 0.67 [0.50, 1.00] - 1.00 110 2 3 -"
    assert " ".join(margins).startswith("vt 100 margins 4 0.62 [")
    assert " ".join(failed) == "vt 200 margins 0 of 3 - - - - - - -"
    assert failures(summarise(RUNS)) == [
        "vt at 100 tokens, full: 2 could not be run: prompt: too long by 0 (and 1 other reasons)",
        "vt at 200 tokens, margins: 3 could not be run: prompt: too long by 0 (and 1 other reasons)",
    ]


def test_json() -> None:
    rows = summarise(RUNS)
    told = json.loads(json.dumps(to_json(EvalParams(), RUNS, rows, {"model": "mine"}, complete=False)))
    assert (told["model"], told["complete"], told["params"]["samples"]) == ("mine", False, 20)
    assert told["params"]["settings"]["segment_tokens"] == 512
    assert [(row["task"], row["mode"]) for row in told["rows"]] == [(row.task, row.mode) for row in rows]
    assert told["rows"][1]["score"]["mean"] == 0.625 and set(told["rows"][1]["difference"]) == {
        "n",
        "mean",
        "low",
        "high",
    }
    assert told["rows"][0]["difference"] is None and told["rows"][0]["failures"]["prompt: too long by 1"] == 1
    assert len(told["runs"]) == len(RUNS)
    first = told["runs"][0]
    assert (first["mode"], first["sample"], first["text"], first["answers"]) == ("margins", 0, "A", ["A"])
    assert "document" not in first and first["error"] is None


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_plot(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"figure{suffix}"
    check_plot("--plot", path)
    save_plot(summarise(RUNS), path, "a model")
    data = path.read_bytes()
    assert data.startswith(BEGINNINGS[suffix]) and len(data) > 4000


def test_a_plot_of_nothing_that_could_be_run(tmp_path: Path) -> None:
    save_plot(summarise([run("margins", 0, None)]), tmp_path / "figure.svg", "a model")
    assert (tmp_path / "figure.svg").stat().st_size > 1000


def test_plots_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("figure", "figure.jpg", ".png", "figure.png.txt"):
        with pytest.raises(InvalidRequestError, match=r"--plot: must end in \.png, \.svg, \.pdf"):
            check_plot("--plot", Path(name))
    monkeypatch.setattr("octavo.evaluation.plot.find_spec", lambda name: None)
    with pytest.raises(InvalidRequestError, match=r"--plot: needs matplotlib: pip install 'octavo\[eval\]'"):
        check_plot("--plot", Path("figure.png"))
