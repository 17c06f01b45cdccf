"""`octavo eval`: the table, the files, what is refused before anything is run, and what an interrupt leaves."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from octavo import __version__
from octavo.evaluation import runner
from octavo.evaluation.modes import MODES
from octavo.evaluation.tasks import TASKS

from .conftest import Invoke
from .test_bad_input import assert_refused

SMALL = ("--modes", ",".join(MODES), "--max-tokens", 3)
MARGINS = ("--segment-tokens", 300, "--margin-tokens", 4)
QUICK = ("--tasks", "niah_single,babi", "--lengths", "700,900", "--samples", 2, *SMALL, *MARGINS)


@pytest.fixture
def json_file(tmp_path: Path) -> Path:
    return tmp_path / "figures.json"


def rows_of(out: str) -> list[list[str]]:
    head, *rows = out.splitlines()
    assert head.split()[:4] == ["task", "length", "mode", "n"]
    return [row.split() for row in rows]


def test_all_tasks(invoke: Invoke, tiny_llama_dir: Path) -> None:
    code, out, err = invoke(
        "eval", "--model", tiny_llama_dir, "--lengths", 900, "--samples", 1, "--modes", "full", "--max-tokens", 2
    )
    assert (code, err) == (0, "")
    assert [row[:4] for row in rows_of(out)] == [[task, "900", "full", "1"] for task in TASKS]


def test_all_modes_and_files(invoke: Invoke, tiny_llama_dir: Path, tmp_path: Path, json_file: Path) -> None:
    plot = tmp_path / "figure.svg"
    code, out, err = invoke("eval", "--model", tiny_llama_dir, *QUICK, "--json", json_file, "--plot", plot)
    assert (code, err) == (0, "")
    expected = [(task, length, mode) for length in (700, 900) for task in ("niah_single", "babi") for mode in MODES]
    assert [tuple(row[:4]) for row in rows_of(out)] == [
        (task, str(length), mode, "2") for task, length, mode in expected
    ]
    told = json.loads(json_file.read_text())
    assert [(row["task"], row["length"], row["mode"]) for row in told["rows"]] == expected
    assert told["complete"] is True and told["octavo"] == __version__ and told["model"] == str(tiny_llama_dir)
    assert told["params"]["settings"]["segment_tokens"] == 300 and told["params"]["lengths"] == [700, 900]
    assert len(told["runs"]) == 2 * 2 * 2 * len(MODES)
    for row in told["rows"]:
        assert row["num_failed"] == 0 and row["score"]["n"] == 2 and row["seconds"] > 0
        assert (row["difference"] is None) == (row["mode"] == "full")
        assert (row["reused_tokens"] > 0) == (row["mode"] == "margins") or row["mode"] == "retrieved"
        assert row["computed_tokens"] > 100 and row["generated_tokens"] >= 1
    assert plot.read_bytes().startswith(b"<?xml")


def test_a_mode_that_cannot_read_so_much(invoke: Invoke, tiny_llama_dir: Path, json_file: Path) -> None:
    """It is told as failed, with the reason, and the others go on."""
    flags = ("--tasks", "niah_single", "--lengths", "900,5000", "--samples", 1, "--max-tokens", 3)
    more = ("--modes", "full,margins", "--segment-tokens", 1000, "--margin-tokens", 3, "--windows")
    code, out, err = invoke("eval", "--model", tiny_llama_dir, *flags, *more, "--json", json_file)
    assert (code, err) == (0, "")
    *table, why = out.splitlines()
    numbers = [(row[1], row[2], " ".join(row[3:6])) for row in rows_of("\n".join(table))]
    assert [one[:2] for one in numbers] == [
        ("900", "full"),
        ("900", "margins"),
        ("5000", "full"),
        ("5000", "margins"),
    ]
    assert numbers[2][2] == "0 of 1" and numbers[3][2].startswith("1 ")
    assert why.startswith("niah_single at 5000 tokens, full: 1 could not be run: prompt: has ")
    told = json.loads(json_file.read_text())
    assert [row["num_failed"] for row in told["rows"]] == [0, 0, 1, 0]
    assert [run["score"] is None for run in told["runs"]].count(True) == 1


def test_interrupted(
    invoke: Invoke, tiny_llama_dir: Path, json_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the fourth run: what the first three gave is told."""
    measure, calls = runner.measure, 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*given)

    monkeypatch.setattr(runner, "measure", interrupted)
    plot = tmp_path / "figure.png"
    flags = ("--tasks", "niah_single", "--lengths", 700, "--modes", "full", "--max-tokens", 2)
    code, out, err = invoke("eval", "--model", tiny_llama_dir, *flags, "--json", json_file, "--plot", plot)
    assert (code, err) == (130, "octavo: ended after 3 of 20 runs\n")
    assert [row[:4] for row in rows_of(out)] == [["niah_single", "700", "full", "3"]]
    told = json.loads(json_file.read_text())
    assert told["complete"] is False and len(told["runs"]) == 3 and plot.stat().st_size > 0


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--tasks", "needle"), "--tasks: 'needle' is none of niah_single, niah_multikey, kv_retrieval, vt, cwe, babi"),
        (("--tasks", "vt,vt"), "--tasks: 'vt' is given twice"),
        (("--tasks", ""), "--tasks: '' is none of"),
        (("--modes", "rag"), "--modes: 'rag' is none of full, margins, retrieved"),
        (("--lengths", "1k"), "--lengths: must be integers separated by commas, not '1k'"),
        (("--lengths", "0"), "--lengths: must be between 1 and 1048576, not 0"),
        (("--lengths", "60"), "--lengths: niah_multikey needs at least"),
        (
            ("--lengths", "800,5000", "--modes", "full,margins"),
            "--lengths: 5000 tokens and an answer do not fit max_mod",
        ),
        (("--depths", "120"), "--depths: must be between 0 and 100, not 120"),
        (("--depths", "50", "--tasks", "vt,cwe"), "--depths: has no effect on vt,cwe"),
        (("--samples", "0"), "--samples: must be between 1 and 1000, not 0"),
        (("--seed", "-1"), "--seed: must be between 0"),
        (("--max-tokens", "0"), "--max-tokens: must be between 1"),
        (("--segment-tokens", "0"), "--segment-tokens: must be between 1"),
        (("--threshold", "nan"), "--threshold: must be at least"),
        (("--passage-tokens", "0"), "--passage-tokens: must be between 1"),
        (("--windows", "--modes", "full"), "--windows: has no effect without the mode margins"),
        (("--threshold", "0", "--modes", "full"), "--threshold: has no effect without the mode margins"),
        (("--passages", "2", "--modes", "full,margins"), "--passages: has no effect without the mode retrieved"),
        (("--json", "no/such/folder/x.json"), "--json: no/such/folder/x.json cannot be written: No such file"),
        (("--json", "."), "--json: . cannot be written: Is a directory"),
        (("--plot", "no/such/folder/x.png"), "--plot: no/such/folder/x.png cannot be written"),
        (("--plot", "x.gif"), "--plot: must end in .png, .svg, .pdf, not '.gif'"),
        (("--block-size", "17"), "block_size: must be one of"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_refused(invoke: Invoke, tiny_llama_dir: Path, flags: tuple[str, ...], problem: str) -> None:
    assert_refused(invoke("eval", "--model", tiny_llama_dir, *flags), problem)


def test_refused_before_the_model_is_looked_for(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plot without matplotlib above all, which would be noticed only when everything has been run."""
    monkeypatch.setattr("octavo.evaluation.plot.find_spec", lambda name: None)
    result = invoke("eval", "--model", "no/such/model", "--plot", tmp_path / "x.png")
    assert_refused(result, "--plot: needs matplotlib: pip install 'octavo[eval]'")
    monkeypatch.setenv("OCTAVO_KV_OFFLOAD_DIR", str(tmp_path))
    result = invoke("eval", "--model", "no/such/model")
    assert_refused(result, "OCTAVO_KV_OFFLOAD_DIR: must not be set")


def test_files_that_were_there_stay_when_nothing_is_run(invoke: Invoke, tmp_path: Path, json_file: Path) -> None:
    json_file.write_text("old")
    new = tmp_path / "new.png"
    result = invoke("eval", "--model", "no/such/model", "--json", json_file, "--plot", new)
    assert result.code == 2 and json_file.read_text() == "old" and not new.exists()


def test_a_json_file_on_a_full_disk(invoke: Invoke, tiny_llama_dir: Path) -> None:
    """The table is told all the same."""
    flags = ("--tasks", "babi", "--modes", "full", "--samples", 1, "--lengths", 700, "--max-tokens", 2)
    result = invoke("eval", "--model", tiny_llama_dir, *flags, "--json", "/dev/full")
    assert result.code == 2 and "--json: /dev/full cannot be written: No space left on device" in result.err
    assert rows_of(result.out)[0][:3] == ["babi", "700", "full"]


def test_help_names_all_there_is(invoke: Invoke) -> None:
    out = invoke("eval", "--help").out
    paragraphs = out.partition("options:")[0]
    assert all(name in paragraphs for name in (*TASKS, *MODES))
