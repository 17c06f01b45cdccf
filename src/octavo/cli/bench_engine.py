"""`octavo bench latency` and `octavo bench throughput`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count as count_up
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo import __version__
from octavo.backends.registry import backend
from octavo.cli.driver import Answer, EngineDriver, Request, Step, completions
from octavo.cli.machine import identity, measure
from octavo.cli.record import save
from octavo.cli.step_costs import StepCosts
from octavo.core.errors import InvalidRequestError
from octavo.core.params import SamplingParams
from octavo.hub import resolve_model
from octavo.observe import utilization

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.observe import MachineLimits
    from octavo.ops import ModelConfig

LATENCY_PERCENTILES = (10, 25, 50, 75, 90, 99)  # those of vLLM's `bench latency`


def latency(
    config: EngineConfig,
    *,
    input_len: int,
    output_len: int,
    batch_size: int,
    num_iters_warmup: int,
    num_iters: int,
    seed: int,
    detokenize: bool,
) -> dict[str, Any]:
    """`batch_size` requests at once, from the first being added to the last token of all; `num_iters` times."""
    load = {"input_len": input_len, "output_len": output_len, "batch_size": batch_size, "seed": seed}
    with EngineDriver(config) as driver:
        check_fits(driver, input_len, output_len)
        batches = random_batches(driver, batch_size, input_len, output_len, seed, detokenize)
        for _ in range(num_iters_warmup):
            finished(driver.run(next(batches)))
        steps: list[Step] = []
        answers: list[Answer] = []
        latencies = []
        for _ in range(num_iters):
            done = finished(driver.run(next(batches), on_step=steps.append))
            latencies.append(max(answer.token_times[-1] for answer in done) - done[0].arrived)
            answers += done
        load |= {"num_iters": num_iters, "num_iters_warmup": num_iters_warmup}
        report = head("latency", config, driver, load)
    report["avg_latency"] = float(np.mean(latencies))
    report["latencies"] = latencies
    report["percentiles"] = {str(p): float(np.percentile(latencies, p)) for p in LATENCY_PERCENTILES}
    return _finish(report, config, driver, answers, steps, sum(latencies))


def throughput(
    config: EngineConfig, *, num_prompts: int, input_len: int, output_len: int, seed: int, detokenize: bool
) -> dict[str, Any]:
    """All requests are there from the start; the engine takes as many at a time as have a place."""
    with EngineDriver(config) as driver:
        check_fits(driver, input_len, output_len)
        few = min(num_prompts, config.max_num_seqs)
        warmup = next(random_batches(driver, few, min(input_len, 32), min(output_len, 8), seed + 1, detokenize))
        finished(driver.run(warmup))
        driver.built.engine.reset_prefix_cache()
        steps: list[Step] = []
        requests = next(random_batches(driver, num_prompts, input_len, output_len, seed, detokenize))
        answers = finished(driver.run(requests, on_step=steps.append))
        load = {"num_prompts": num_prompts, "input_len": input_len, "output_len": output_len, "seed": seed}
        report = head("throughput", config, driver, load)
    elapsed = max(answer.token_times[-1] for answer in answers) - answers[0].arrived
    report["elapsed_time"] = elapsed
    report["num_requests"] = num_prompts
    report["total_num_tokens"] = num_prompts * (input_len + output_len)
    report["requests_per_second"] = num_prompts / elapsed
    report["tokens_per_second"] = report["total_num_tokens"] / elapsed
    return _finish(report, config, driver, answers, steps, elapsed)


# --- the load ---


def check_fits(driver: EngineDriver, input_len: int, output_len: int) -> None:
    most = driver.built.max_model_len
    if input_len + output_len > most:
        raise InvalidRequestError(
            "--input-len", f"{input_len} and --output-len {output_len} together are more than max_model_len={most}"
        )


def random_batches(
    driver: EngineDriver, count: int, input_len: int, output_len: int, seed: int, detokenize: bool
) -> Iterator[list[Request]]:
    """Batch after batch of requests with random prompts. Their first tokens differ: nothing of them is cached."""
    random = np.random.default_rng(seed)
    vocab_size = driver.built.model_config.vocab_size
    first = count_up(seed)
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=detokenize)
    while True:
        prompts = random.integers(0, vocab_size, (count, input_len))
        prompts[:, 0] = [next(first) % vocab_size for _ in range(count)]
        yield [(ids, params) for ids in prompts.tolist()]


def finished(answers: list[Answer]) -> list[Answer]:
    for answer in answers:
        completions(answer)  # raises for a request that failed
    return answers


# --- the figures ---


def head(kind: str, config: EngineConfig, driver: EngineDriver, load: dict[str, Any]) -> dict[str, Any]:
    return {
        "benchmark": kind,
        "octavo_version": __version__,
        "model": config.model,
        **identity(config, driver.built.model_config),
        "system_fingerprint": driver.built.system_fingerprint,
        **load,
    }


def _finish(
    report: dict[str, Any],
    config: EngineConfig,
    driver: EngineDriver,
    answers: Sequence[Answer],
    steps: Sequence[Step],
    seconds: float,
) -> dict[str, Any]:
    """Add what both benchmarks have, and remember it for `octavo doctor`."""
    num_output = sum(len(answer.token_times) for answer in answers)
    report["output_tokens_per_second"] = num_output / seconds
    report |= _token_times(answers)
    limits = measure(config)
    report["limits"] = None if limits is None else asdict(limits)
    costs = step_costs(config, driver.built.model_config, report["backend"])
    report["phases"] = {
        "prefill": _phase([step for step in steps if step.prompt_tokens], costs, limits),
        "decode": _phase([step for step in steps if not step.prompt_tokens], costs, limits),
        "all": _phase(steps, costs, limits),
    }
    report["recorded_in"] = save(report)
    return report


def step_costs(config: EngineConfig, model: ModelConfig, name: str) -> StepCosts:
    """What steps of this model cost with these settings on the backend called `name`."""
    used = backend(name)
    integer = used.multiplies_codes and config.compute_dtype == "auto"
    return StepCosts(resolve_model(config.model), model, integer=integer, kv_dtype=used.kv_dtype(config))


def _token_times(answers: Sequence[Answer]) -> dict[str, float]:
    """Milliseconds, under the names of vLLM's `bench serve`. TPOT and ITL only where there is a second token."""
    series: dict[str, Any] = {
        "ttft": [answer.token_times[0] - answer.arrived for answer in answers],
        "tpot": [
            (answer.token_times[-1] - answer.token_times[0]) / (len(answer.token_times) - 1)
            for answer in answers
            if len(answer.token_times) > 1
        ],
        "itl": np.concatenate([np.diff(answer.token_times) for answer in answers]),
        "e2el": [answer.token_times[-1] - answer.arrived for answer in answers],
    }
    figures = {}
    for name, values in series.items():
        if len(values):
            milliseconds = 1000 * np.asarray(values)
            figures[f"mean_{name}_ms"] = float(np.mean(milliseconds))
            figures[f"median_{name}_ms"] = float(np.median(milliseconds))
            figures[f"p99_{name}_ms"] = float(np.percentile(milliseconds, 99))
    return figures


def _phase(steps: Sequence[Step], costs: StepCosts, limits: MachineLimits | None) -> dict[str, Any] | None:
    """Of some steps: their rate, and the shares of the machine's limits that they reached."""
    if not steps:
        return None
    seconds = sum(step.ended - step.started for step in steps)
    tokens = sum(new for step in steps for _, new in step.sequences)
    cost = costs.total(steps)
    shares = None if limits is None else utilization(cost, seconds, limits)
    return {
        "steps": len(steps),
        "seconds": seconds,
        "tokens_computed": tokens,
        "tokens_computed_per_second": tokens / seconds,
        **asdict(cost),
        "mbu": None if shares is None else shares.mbu,
        "mfu": None if shares is None else shares.mfu,
    }


# --- for people ---


def lines(report: dict[str, Any]) -> list[str]:
    """A report as lines of text."""
    if report["benchmark"] == "latency":
        text = [f"{'avg latency':24}{report['avg_latency']:10.3f} s"]
        text += [f"{f'p{p} latency':24}{value:10.3f} s" for p, value in report["percentiles"].items()]
    else:
        text = [
            f"{'elapsed':24}{report['elapsed_time']:10.3f} s",
            f"{'requests':24}{report['requests_per_second']:10.2f} /s",
            f"{'tokens, in and out':24}{report['tokens_per_second']:10.1f} /s",
        ]
    text.append(f"{'output tokens':24}{report['output_tokens_per_second']:10.1f} /s")
    for name in ("ttft", "tpot", "itl"):
        if f"mean_{name}_ms" in report:
            mean, median, p99 = (report[f"{kind}_{name}_ms"] for kind in ("mean", "median", "p99"))
            text.append(f"{name.upper():24}{mean:10.2f} ms mean, {median:.2f} median (p50), {p99:.2f} p99")
    for name, phase in report["phases"].items():
        if phase is not None:
            text.append(f"{name + ' steps':24}{phase['tokens_computed_per_second']:10.1f} tok/s{shares_text(phase)}")
    text.append(limits_text(report["limits"]))
    return [f"{report['benchmark']} of {report['model']} on {report['backend']} ({report['threads']} threads)", *text]


def shares_text(phase: dict[str, Any]) -> str:
    return "" if phase["mbu"] is None else f", MBU {phase['mbu']:.0%}, MFU {phase['mfu']:.0%}"


def limits_text(limits: dict[str, Any] | None) -> str:
    if limits is None:
        return "no MBU and MFU: the cpu backend, with which limits are measured, does not load"
    return (
        f"of {limits['read_bytes_per_s'] / 1e9:.1f} GB/s read, {limits['integer_macs_per_s'] / 1e9:.0f} G integer and "
        f"{limits['float32_macs_per_s'] / 1e9:.0f} G float32 multiply-adds/s measured with {limits['threads']} threads"
    )
