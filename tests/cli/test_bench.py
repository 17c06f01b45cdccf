from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.backends.trace import OpRecord
from octavo.cli import bench_startup, record
from octavo.cli.bench_profile import match
from octavo.cli.driver import Answer, EngineDriver, Step
from octavo.cli.machine import model_config
from octavo.cli.step_costs import StepCosts
from octavo.config import EngineConfig
from octavo.core.params import SamplingParams
from octavo.formats import open_weights
from octavo.loading.weights import FileWeights
from octavo.observe import StepCost
from octavo.ops import cost
from octavo.ops.cost import Cost, Widths
from octavo.runner import logits
from octavo.runner.trace import trace_step

from .conftest import Invoke

pytestmark = pytest.mark.usefixtures("quick_limits")

SMALL = ("--max-model-len", 128, "--threads", 1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own model folder for the file that benchmarks are remembered in."""
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[list[Answer]]:
    """All answers that benchmarks get, run by run."""
    seen: list[list[Answer]] = []
    run = EngineDriver.run

    def watched(self: EngineDriver, *args: Any, **kwargs: Any) -> list[Answer]:
        seen.append(run(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(EngineDriver, "run", watched)
    return seen


# --- latency and throughput ---


def test_latency(
    invoke: Invoke, tiny_gemma3_dir: Path, tmp_path: Path, home: Path, answers: list[list[Answer]]
) -> None:
    out = tmp_path / "latency.json"
    load = ("--input-len", 20, "--output-len", 5, "--batch-size", 3, "--num-iters-warmup", 1, "--num-iters", 4)
    result = invoke("bench", "latency", "--model", tiny_gemma3_dir, *SMALL, *load, "--output-json", out)
    assert (result.code, result.err) == (0, "")
    report = json.loads(out.read_text())
    assert len(report["latencies"]) == 4
    assert report["avg_latency"] == pytest.approx(np.mean(report["latencies"]))
    assert report["percentiles"]["50"] == pytest.approx(np.median(report["latencies"]))
    assert list(report["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert report["output_tokens_per_second"] == pytest.approx(4 * 3 * 5 / sum(report["latencies"]))
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert 0 < report[f"median_{name}_ms"] <= report[f"p99_{name}_ms"]
    # A request ends when its first token came and four more followed.
    assert report["mean_e2el_ms"] == pytest.approx(report["mean_ttft_ms"] + 4 * report["mean_tpot_ms"])
    assert report["mean_e2el_ms"] <= 1000 * report["avg_latency"] * 1.0001
    assert report["backend"] == "cpu" and report["threads"] == 1

    phases = report["phases"]
    assert (phases["prefill"]["steps"], phases["decode"]["steps"]) == (4, 4 * 4)
    assert (phases["prefill"]["tokens_computed"], phases["decode"]["tokens_computed"]) == (4 * 3 * 20, 4 * 3 * 4)
    assert all(0 < phase["mbu"] < 2 and 0 < phase["mfu"] < 2 for phase in phases.values())
    assert phases["all"]["seconds"] == pytest.approx(phases["prefill"]["seconds"] + phases["decode"]["seconds"])

    prompts = [tuple(answer.output.prompt_token_ids) for run in answers for answer in run if answer.output]
    assert len(prompts) == len(set(prompts)) == 5 * 3, "a prompt that comes again could be answered from the cache"
    assert all(answer.output.num_cached_tokens == 0 for run in answers for answer in run if answer.output)

    for words in ("avg latency", "p99 latency", "TTFT", "TPOT", "ITL", "median (p50)", "MBU", "GB/s"):
        assert words in result.out
    (entry,) = record.load()
    assert entry["benchmark"] == "latency" and str(home) in report["recorded_in"]
    assert f"MBU {phases['decode']['mbu']:.0%}" in invoke("doctor", "--no-measure").out


@pytest.mark.parametrize("threads", [1, 2])
def test_profile(invoke: Invoke, tiny_gemma3_dir: Path, tmp_path: Path, threads: int) -> None:
    """Every op of every layer is told once in each step, and with what lies between them they make the step."""
    out = tmp_path / "profile.json"
    load = ("--input-len", 20, "--output-len", 5, "--batch-size", 3, "--num-iters-warmup", 1, "--num-iters", 2)
    settings = ("--model", tiny_gemma3_dir, "--threads", threads, "--max-model-len", 64)
    result = invoke("bench", "profile", *settings, *load, "--output-json", out)
    assert (result.code, result.err) == (0, "")
    report = json.loads(out.read_text())
    layers = model_config(tiny_gemma3_dir).num_layers
    phases = report["phases"]
    assert (phases["prefill"]["steps"], phases["decode"]["steps"]) == (2, 2 * 4)
    assert (phases["prefill"]["tokens_computed"], phases["decode"]["tokens_computed"]) == (60, 3)
    for phase in phases.values():
        ops = {op["op"]: op for op in phase["ops"]}
        assert {"embed", "rms_norm", "rope", "store_kv", "attention", "gated", "sample"} < ops.keys()
        assert all(ops[name]["calls"] == layers for name in ("attention", "store_kv", "gated", "linear mlp.down_proj"))
        assert ops["linear model.embed_tokens"]["calls"] == 1
        assert all(op["ms"] > 0 and 0 <= op["idle"] < 1 for op in ops.values())
        assert threads > 1 or all(op["idle"] < 0.9 for op in ops.values())
        assert phase["between_ops_ms"] > 0 and phase["between_steps_ms"] > 0
        parts = sum(op["ms"] for op in ops.values()) + phase["between_ops_ms"] + phase["between_steps_ms"]
        assert parts == pytest.approx(phase["ms"])
        assert f"{ops['attention']['ms']:10.3f}" in result.out
    assert "between steps" in result.out


def test_profile_of_another_backend(invoke: Invoke, tiny_gemma3_dir: Path) -> None:
    result = invoke("bench", "profile", "--model", tiny_gemma3_dir, "--backend", "reference")
    assert (result.code, result.out) == (2, "")
    assert "backend: bench profile takes steps of the cpu backend apart, not of reference" in result.err


def test_logits_in_slices(tiny_gemma3_dir: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke) -> None:
    """The head runs several times where its rows are many, in the engine and in what is expected of it."""
    monkeypatch.setattr(logits, "LOGITS_SLICE_BYTES", 4 * 2 * model_config(tiny_gemma3_dir).vocab_size)
    load = ("--input-len", 20, "--output-len", 3, "--batch-size", 5, "--num-iters", 1)
    result = invoke("bench", "profile", "--model", tiny_gemma3_dir, *SMALL, *load)
    assert (result.code, result.err) == (0, "")
    assert re.search(r"linear model.embed_tokens +3 ", result.out)


def test_what_was_timed_is_what_was_to_be_run() -> None:
    """Guards against times under another op's name."""
    linear = OpRecord("linear", ((1, 8),), (1, 8), ("model.layers.3.mlp.down_proj.weight", "b.bias"), Cost(1, 2, 3))
    traced = [(linear, StepCost(1)), (OpRecord("take_rows", (), (), (), Cost(0, 0, 0)), StepCost())]
    time, other = ("linear", 0.1, 0.2), ("angles", 0.3, 0.4)
    assert match([other, time], traced) == [("angles", other, StepCost()), ("linear mlp.down_proj", time, StepCost(1))]
    with pytest.raises(RuntimeError, match="linear was run where None was to be"):
        match([time, time], traced)
    with pytest.raises(RuntimeError, match="rope was run where linear was to be"):
        match([("rope", 1.0, 1.0)], traced)
    with pytest.raises(RuntimeError, match=r"\['linear'\] were not run"):
        match([other], traced)


def test_throughput(invoke: Invoke, tiny_gemma3_dir: Path, tmp_path: Path, answers: list[list[Answer]]) -> None:
    out = tmp_path / "throughput.json"
    load = (
        "--num-prompts",
        7,
        "--input-len",
        18,
        "--output-len",
        6,
        "--max-num-seqs",
        3,
        "--max-num-batched-tokens",
        16,
    )
    result = invoke("bench", "throughput", "--model", tiny_gemma3_dir, *SMALL, *load, "--output-json", out)
    assert (result.code, result.err) == (0, "")
    report = json.loads(out.read_text())
    elapsed = report["elapsed_time"]
    assert report["requests_per_second"] == pytest.approx(7 / elapsed)
    assert report["total_num_tokens"] == 7 * (18 + 6)
    assert report["tokens_per_second"] == pytest.approx(7 * 24 / elapsed)
    assert report["output_tokens_per_second"] == pytest.approx(7 * 6 / elapsed)
    phases = report["phases"]
    assert phases["all"]["tokens_computed"] == 7 * (18 + 5)  # the last token of each is not computed
    # Prompts of 18 tokens in steps of 16: what decodes beside a prompt belongs to that step.
    assert 7 * 18 <= phases["prefill"]["tokens_computed"] < 7 * 23 and phases["prefill"]["steps"] > 7
    assert len(answers[-1]) == 7 and {len(answer.token_times) for answer in answers[-1]} == {6}
    assert "requests" in result.out and "tokens, in and out" in result.out


def test_the_seed_decides_the_prompts(
    invoke: Invoke, tiny_gemma3_dir: Path, answers: list[list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (5, 5, 6):
        load = ("--num-prompts", 2, "--input-len", 9, "--output-len", 1, "--seed", seed, "--disable-detokenize")
        assert invoke("bench", "throughput", "--model", tiny_gemma3_dir, *SMALL, *load).code == 0
    one, again, other = ([answer.output.prompt_token_ids for answer in run if answer.output] for run in answers[1::2])
    assert one == again != other


def test_one_output_token_has_no_time_between_tokens(invoke: Invoke, tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.json"
    load = ("--output-len", 1, "--num-iters", 1, "--num-iters-warmup", 0, "--output-json", out)
    result = invoke("bench", "latency", "--model", tiny_gemma3_dir, *SMALL, *load)
    report = json.loads(out.read_text())
    assert result.code == 0 and "mean_ttft_ms" in report
    assert "mean_tpot_ms" not in report and "mean_itl_ms" not in report and report["phases"]["decode"] is None


def test_the_reference_backend(invoke: Invoke, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """It has neither threads nor an instruction set, and is measured against the same machine."""
    out = tmp_path / "reference.json"
    load = ("--output-len", 2, "--num-iters", 1, "--num-iters-warmup", 0, "--backend", "reference")
    assert invoke("bench", "latency", "--model", tiny_llama_dir, *load, "--output-json", out).code == 0
    report = json.loads(out.read_text())
    assert report["backend"] == "reference" and report["threads"] is None
    assert report["phases"]["all"]["integer_flops"] == 0 and report["phases"]["all"]["mbu"] > 0


# --- costs of steps ---


def test_costs_are_those_of_the_cost_table(tiny_gemma3_dir: Path) -> None:
    """Guards against a second formula: what a step costs is what the trace says, whatever order sequences stand in."""
    model = model_config(tiny_gemma3_dir)
    costs = StepCosts(tiny_gemma3_dir, model, integer=True, kv_dtype="int8")
    sequences = ((40, 1), (0, 7), (3, 2))
    with open_weights(tiny_gemma3_dir) as file:
        tensors = dict(file.tensors)
        records = trace_step(
            model,
            sequences,
            weights=lambda ops: FileWeights(ops, model, "trace", tensors, gguf=False),
            widths=Widths(kv=1 + (4 / 32 + 4 / model.head_dim) / 2),
            logits_rows=2,
        )
        expected = cost.total([one.cost for one in records])
    # Of float weights only attention over int8 keys and values is of integers.
    integer = cost.total([one.cost for one in records if one.op == "attention"]).flops
    assert costs.of(sequences, 2) == StepCost(expected.bytes, integer, expected.flops - integer) and integer > 0
    assert [record.op for record, _ in costs.by_op(sequences, 2)] == [one.op for one in records]
    assert costs.of(sequences[::-1], 2) == costs.of(sequences, 2)
    steps = [Step(0, 1, sequences, 2, 7, {}), Step(1, 2, ((9, 1),), 1, 0, {}), Step(2, 3, sequences, 2, 7, {})]
    assert costs.total(steps) == costs.of(sequences, 2) * 2 + costs.of(((9, 1),), 1)


def test_integer_products_are_told_apart(smollm2_path: Path) -> None:
    """One token through SmolLM2: two FLOPs for each weight of a matrix, output matrix included, all with codes."""
    model = model_config(smollm2_path)
    c = model
    per_layer = (
        c.hidden_size * (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 3 * c.hidden_size * c.intermediate_size
    )
    weights = c.num_layers * per_layer + c.vocab_size * c.hidden_size
    integer = StepCosts(smollm2_path, model, integer=True, kv_dtype="float16").of(((0, 1),), 1)
    # The residual that a linear adds is counted with it.
    assert 2 * weights <= integer.integer_flops <= 2.001 * weights
    assert 0 < integer.float_flops < integer.integer_flops / 100
    floats = StepCosts(smollm2_path, model, integer=False, kv_dtype="float16").of(((0, 1),), 1)
    assert floats.integer_flops == 0
    assert floats.float_flops == integer.integer_flops + integer.float_flops
    with open_weights(smollm2_path) as file:
        size = sum(tensor.nbytes for tensor in file.tensors.values())
    assert size < integer.bytes < 1.05 * size  # every weight is read once, and little else


# --- the driver ---


def test_steps_and_tokens_of_a_driven_engine(tiny_gemma3_dir: Path) -> None:
    """Guards against steps that are lost, counted twice, or given the wrong context."""
    steps: list[Step] = []
    with EngineDriver(EngineConfig(model=str(tiny_gemma3_dir), max_model_len=64, threads=1)) as driver:
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        done = driver.run([(list(range(3, 13)), params), ([7], params.but(max_tokens=1))], on_step=steps.append)
        assert driver.run([([5], params)])[0].output is not None, "an engine can be driven again"
    assert [sorted(step.sequences) for step in steps] == [[(0, 1), (0, 10)], [(10, 1)], [(11, 1)]]
    assert [step.prompt_tokens for step in steps] == [11, 0, 0]
    assert [step.logits_rows for step in steps] == [2, 1, 1]
    assert [len(answer.token_times) for answer in done] == [3, 1]
    assert all(step.started < step.ended for step in steps)
    assert done[0].token_times == [step.ended for step in steps] and done[0].arrived <= steps[0].started


# --- start-up ---


def test_startup(invoke: Invoke, tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "startup.json"
    flags = ("--num-iters", 2, "--num-iters-warmup", 0, "--prompt", "hello", "--output-json", out)
    result = invoke("bench", "startup", "--model", tiny_gemma3_dir, *SMALL, *flags)
    assert (result.code, result.err) == (0, ""), result.err
    report = json.loads(out.read_text())
    assert tuple(report["phases_s"]) == bench_startup.PHASES
    for one in report["starts"]:
        phases = one["phases"]
        assert all(phases[name] > 0 for name in bench_startup.PHASES if name != "other")
        assert sum(phases.values()) >= one["total"] * 0.999  # more where phases overlap
        assert phases["imports"] > phases["index"]
    assert report["total_s"]["min"] <= report["total_s"]["median"] <= report["total_s"]["max"]
    assert report["prompt_tokens"] == 4  # "he" is one token
    assert report["mbu"] > 0 and report["mfu"] > 0
    for words in (
        "interpreter",
        "imports",
        "index",
        "weights",
        "later imports",
        "tokenizer",
        "first step",
        "total to first byte",
    ):
        assert words in result.out
    assert report["bytecode_cached"] or "PYTHONDONTWRITEBYTECODE" in result.out
    assert record.load() == [], "its shares are not those of a benchmark"


def test_a_start_that_fails_says_why(invoke: Invoke, tiny_gemma3_dir: Path) -> None:
    result = invoke("bench", "startup", "--model", tiny_gemma3_dir, "--max-model-len", 3, "--num-iters", 1)
    assert result.code == 2 and result.out == ""
    assert "a start failed with exit code 2" in result.err and "max_model_len=3" in result.err


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: {latency,throughput,profile,serve,startup}"),
        (["speed"], "invalid choice: 'speed'"),
        (["latency", "--input-len", "0"], "--input-len: must be between 1 and"),
        (["latency", "--input-len", "many"], "--input-len: must be an integer, not 'many'"),
        (["latency", "--output-len", "-1"], "--output-len: must be between 1 and"),
        (["latency", "--batch-size", "9" * 30], "--batch-size: must be between 1 and"),
        (["latency", "--batch-size", "9" * 5000], "--batch-size: must be an integer"),
        (["latency", "--num-iters", "0"], "--num-iters: must be between 1"),
        (["latency", "--num-iters-warmup", "-1"], "--num-iters-warmup: must be between 0"),
        (["throughput", "--num-prompts", "0"], "--num-prompts: must be between 1"),
        (["throughput", "--seed", "x"], "--seed: must be an integer"),
        (["startup", "--num-iters", "0"], "--num-iters: must be between 1"),
        (["startup", "--prompt", "\udcff"], "--prompt: is not valid UTF-8"),
        (["startup", "--input-len", "5"], "unrecognized arguments: --input-len"),
        (["latency", "--threads", "0"], "threads: must be at least 1"),
        (["latency", "--model", "no/such/folder"], "no/such/folder"),
        (["startup", "--model", "no/such/folder"], "no/such/folder"),
        (
            ["latency", "--output-json", "no/such/folder/x.json"],
            "--output-json: no/such/folder/x.json cannot be written",
        ),
        (["latency", "--output-json", "."], "--output-json: . cannot be written: Is a directory"),
    ],
)
def test_bad_input(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke("bench", *arguments)
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err
    assert message in result.err


def test_a_load_that_does_not_fit(invoke: Invoke, tiny_gemma3_dir: Path) -> None:
    result = invoke("bench", "latency", "--model", tiny_gemma3_dir, *SMALL, "--input-len", 100, "--output-len", 29)
    assert result.code == 2
    assert "--input-len: 100 and --output-len 29 together are more than max_model_len=128" in result.err
