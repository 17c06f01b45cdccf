from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.backends.cpu import CpuOps
from octavo.cli import verify_quality
from octavo.cli.check import Status
from octavo.cli.verify_exactness import CELLS, QUICK, Cell, Counts, _judge, requests_for
from octavo.cli.verify_quality import _compare_greedy, _compare_logits, distance
from octavo.core.plan import StepPlan
from octavo.runner.model_runner import ModelRunner

from .conftest import Invoke

FEW = ("--num-tokens", 8)


def checks(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in report["checks"]}


def test_a_model_that_is_right(invoke: Invoke, tiny_gemma3_dir: Path) -> None:
    """The whole of it on a model with windows: every check passes, and each cell met what it is about."""
    result = invoke("verify", tiny_gemma3_dir, "--json", *FEW)
    report = json.loads(result.out)
    assert (result.code, result.err) == (0, ""), [one for one in report["checks"] if one["status"] == "failed"]
    found = checks(report)
    assert report["passed"] and {"loads and answers", "logits", "greedy tokens", "cpu backend"} < found.keys()
    assert {cell.name for cell in CELLS} | {"forked samples"} <= found.keys()
    statuses = [check["status"] for check in report["checks"]]
    assert set(statuses) == {"passed", "info"} and statuses.count("info") >= 2
    assert found["logits"]["figures"]["worst"] <= 1e-4 and found["logits"]["figures"]["rows"] > 500
    assert found["greedy tokens"]["figures"] == {"tokens": 24, "wrong": [], "excused": []}
    quality = found["cpu backend"]["figures"]
    assert quality["oracle"] == "transformers" and 0 <= quality["mean_kl"] < 0.1 and quality["top1_agreement"] > 0.8
    for cell in CELLS:
        figures = found[cell.name]["figures"]
        assert figures["differences"] == 0 and figures["compared"] == cell.runs * 10 * 8
        assert cell.happened and all(figures[name] > 0 for name in cell.happened)


def test_the_page(invoke: Invoke, tiny_gemma3_dir: Path) -> None:
    result = invoke("verify", tiny_gemma3_dir, "--quick", "--skip", "transformers", *FEW)
    lines = result.out.splitlines()
    assert result.code == 0
    assert "octavo-" in lines[0] and lines[1] == "answers:" and "exactness:" in lines
    assert sum(line.startswith("  passed  ") for line in lines) == 1 + 1 + len(QUICK)
    assert lines[-1].startswith("nothing failed, 0 skipped, in ")


def test_a_model_the_cpu_backend_refuses(invoke: Invoke, tiny_llama_dir: Path) -> None:
    """Then the rest is still checked, and what could not be is named."""
    report = json.loads(invoke("verify", tiny_llama_dir, "--json", *FEW).out)
    found = checks(report)
    assert report["passed"] and report["backend"] == "reference"
    assert found["logits"]["status"] == "passed"
    assert found["all cells"]["status"] == found["cpu backend"]["status"] == "skipped"
    assert "head_dim must be a multiple of 16" in found["all cells"]["detail"]


def test_without_transformers(invoke: Invoke, tiny_gemma3_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = invoke("verify", tiny_gemma3_dir, "--json", "--skip", "exactness", *FEW)
    found = checks(json.loads(result.out))
    assert result.code == 0
    assert found["logits"]["status"] == found["greedy tokens"]["status"] == "skipped"
    assert "transformers is not installed" in found["logits"]["detail"]
    assert found["cpu backend"]["figures"]["oracle"] == "the reference backend"


def test_too_little_memory_for_the_comparison(
    invoke: Invoke, tiny_gemma3_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_quality, "available_memory", lambda: 10_000)
    result = invoke("verify", tiny_gemma3_dir, "--json", "--skip", "exactness", *FEW)
    found = checks(json.loads(result.out))
    assert result.code == 0 and found["logits"]["status"] == "skipped"
    assert "9.8 KiB are available" in found["logits"]["detail"]


# --- what is wrong is found ---


def change_logits(monkeypatch: pytest.MonkeyPatch, factor: Callable[[StepPlan], float]) -> None:
    """Multiply all logits of a step by what its plan says."""
    sample, run = CpuOps.sample, ModelRunner.run
    by = np.float32(1)

    def changed(self: CpuOps, logits: Any, requests: Any) -> Any:
        return sample(self, self.from_numpy(self.to_numpy(logits) * by), requests)

    def noting(self: ModelRunner, plan: StepPlan) -> Any:
        nonlocal by
        by = np.float32(factor(plan))
        return run(self, plan)

    monkeypatch.setattr(CpuOps, "sample", changed)
    monkeypatch.setattr(ModelRunner, "run", noting)


def test_rows_that_depend_on_their_batch(
    invoke: Invoke, tiny_gemma3_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a matrix that cannot fail: logits moved by the last bits, and only in larger batches."""
    change_logits(monkeypatch, lambda plan: 1 + 1e-6 if len(plan.grants) > 1 else 1)
    result = invoke("verify", tiny_gemma3_dir, "--json", "--skip", "transformers", *FEW)
    found = checks(json.loads(result.out))
    assert result.code == 3
    assert found["batched with neighbours"]["status"] == "failed"
    assert "DIFFERS: request 0" in found["batched with neighbours"]["detail"]
    assert found["loads and answers"]["status"] == "passed"


def test_rows_that_depend_on_how_a_prompt_is_cut(
    invoke: Invoke, tiny_gemma3_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference in chunks only: other cells pass, so the one that fails says where to look."""

    def factor(plan: StepPlan) -> float:
        return 1 + 1e-6 if any(grant.start and grant.num_tokens > 1 for grant in plan.grants) else 1

    change_logits(monkeypatch, factor)
    result = invoke("verify", tiny_gemma3_dir, "--json", "--skip", "transformers", *FEW)
    found = checks(json.loads(result.out))
    assert result.code == 3
    assert found["prompts in chunks"]["status"] == "failed"
    assert found["batched with neighbours"]["status"] == found["2 threads"]["status"] == "passed"


def test_logits_that_are_no_numbers(invoke: Invoke, tiny_gemma3_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_logits(monkeypatch, lambda plan: float("nan"))
    result = invoke("verify", tiny_gemma3_dir, "--skip", "transformers", "--skip", "exactness", *FEW)
    assert result.code == 3
    assert "  failed  loads and answers: " in result.out and "1 of 1 checks failed" in result.out


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        pytest.param(lambda rows: rows * np.float32(1.01), {"logits"}, marks=pytest.mark.slow),
        # Rows that far apart excuse every token.
        pytest.param(lambda rows: np.roll(rows, 1, axis=1), {"logits"}, marks=pytest.mark.slow),
        (lambda rows: rows * np.float32("nan"), {"logits", "greedy tokens", "cpu backend"}),
    ],
)
def test_transformers_says_otherwise(
    invoke: Invoke,
    tiny_gemma3_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], Any],
    failed: set[str],
) -> None:
    compute = verify_quality._with_transformers
    monkeypatch.setattr(
        verify_quality, "_with_transformers", lambda path, texts: [change(rows) for rows in compute(path, texts)]
    )
    result = invoke("verify", tiny_gemma3_dir, "--json", "--skip", "exactness", *FEW)
    found = checks(json.loads(result.out))
    assert result.code == 3
    assert {name for name, check in found.items() if check["status"] == "failed"} == failed


# --- the rules ---


def test_a_cell_in_which_nothing_happened_shows_nothing() -> None:
    cell = Cell("preempted", happened=("preemptions",))
    assert _judge(cell, Counts(compared=100), []).status is Status.FAILED
    assert _judge(cell, Counts(compared=100, preemptions=1), []).status is Status.PASSED
    assert _judge(cell, Counts(compared=100, preemptions=1), ["x"]).status is Status.FAILED
    told = Cell("portable", happened=("mixed",), is_info=True)
    assert _judge(told, Counts(mixed=1), ["x"]).status is Status.INFO
    assert _judge(told, Counts(), []).status is Status.FAILED


def test_logits_are_measured_by_their_row() -> None:
    theirs = np.array([[0, 100, 0], [0, 0, 1]], np.float32)
    within = theirs + np.array([[0.009, 0, 0], [0, 0, 0.00009]], np.float32)
    assert _compare_logits([within], [theirs]).status is Status.PASSED
    beyond = theirs + np.array([[0, 0, 0], [0, 0.00011, 0]], np.float32)
    check = _compare_logits([within, beyond], [theirs, theirs])
    assert check.status is Status.FAILED and check.figures["worst"] == pytest.approx(1.1e-4, rel=1e-3)
    nan = theirs + np.array([[np.nan, 0, 0], [0, 0, 0]], np.float32)
    assert _compare_logits([nan], [theirs]).status is Status.FAILED


def test_only_a_tie_excuses_another_token() -> None:
    """Row 1 is the first that chooses a token."""
    theirs = np.array([[9, 9, 9], [1.0, 1.001, 0], [5, 0, 0]], np.float32)
    tie = theirs + np.array([[0, 0, 0], [0.002, 0, 0], [0, 0, 0]], np.float32)
    check = _compare_greedy([[0, 0]], [1], [tie], [theirs])
    assert check.status is Status.PASSED
    assert len(check.figures["excused"]) == 1 and check.figures["tokens"] == 2
    clear = theirs + np.array([[0, 0, 0], [0.0004, 0, 0], [0, 0, 0]], np.float32)
    check = _compare_greedy([[0, 0]], [1], [clear], [theirs])
    assert check.status is Status.FAILED and "step 0: 0 for 1" in check.detail


def test_distance() -> None:
    """Against values worked out by hand: probabilities 1/2, 1/4, 1/4 where the oracle has 1/4, 1/4, 1/2."""
    oracle = np.log(np.array([[1, 1, 2], [1, 1, 2]], np.float32))
    ours = np.log(np.array([[2, 1, 1], [1, 1, 2]], np.float32))
    found = distance(ours, oracle, [0, 0])
    assert found["mean_kl"] == pytest.approx(np.log(2) / 8) and found["max_kl"] == pytest.approx(np.log(2) / 4)
    assert found["top1_agreement"] == 0.5
    assert (found["perplexity"], found["oracle_perplexity"]) == pytest.approx((2, 4))
    assert found["perplexity_ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize("context", [64, 128, 320])
def test_requests_fit_a_short_context(context: int) -> None:
    requests = requests_for(vocab_size=50, context=context, num_tokens=context // 8)
    assert all(1 <= len(ids) <= context - context // 8 and max(ids) < 50 for ids, _ in requests)
    assert len({tuple(ids) for ids, _ in requests}) == len(requests)


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: MODEL"),
        (["no/such/folder"], "no/such/folder"),
        (["smollm2", "--num-tokens", "1"], "--num-tokens: must be between 8 and 256, not 1"),
        (["smollm2", "--num-tokens", "x"], "--num-tokens: must be an integer"),
        (["smollm2", "--skip", "speed"], "--skip: invalid choice: 'speed'"),
        (
            ["smollm2", *("--skip", "answers", "--skip", "transformers", "--skip", "exactness")],
            "--skip: leaves nothing",
        ),
        (["smollm2", "--block-size", "32"], "unrecognized arguments: --block-size"),
        (["smollm2", "--instruction-set", "mmx"], "instruction_set: must be one of"),
    ],
)
def test_bad_input(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke("verify", *arguments)
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err
    assert message in result.err


# --- real models ---


@pytest.mark.slow
def test_smollm2(invoke: Invoke, smollm2_path: Path) -> None:
    report = json.loads(invoke("verify", smollm2_path, "--json").out)
    assert report["passed"] and not any(check["status"] == "skipped" for check in report["checks"])


@pytest.mark.slow
def test_gemma3(invoke: Invoke, gemma3_path: Path) -> None:
    report = json.loads(invoke("verify", gemma3_path, "--json").out)
    assert report["passed"] and not any(check["status"] == "skipped" for check in report["checks"])
