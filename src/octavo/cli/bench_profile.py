"""`octavo bench profile`: steps of the engine taken apart by op, from the counters of the cpu backend."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from octavo.cli.bench_engine import check_fits, finished, head, limits_text, random_batches, step_costs
from octavo.cli.driver import EngineDriver, Step
from octavo.cli.machine import measure
from octavo.core.errors import ConfigError
from octavo.observe import StepCost, utilization

if TYPE_CHECKING:
    from octavo.backends.trace import OpRecord
    from octavo.cli.step_costs import StepCosts
    from octavo.config import EngineConfig
    from octavo.observe import MachineLimits

OpTime = tuple[str, float, float]  # name, seconds, seconds that all threads together worked on it
_NOT_TRACED = ("angles", "sample")  # what the backend does for a step beside the ops of a model
_NO_KERNEL = ("take_rows",)  # ops of a model for which it runs no kernel
_LAYER = re.compile(r"^.*?\.\d+\.")


@dataclass(slots=True)
class OpSum:
    """One op, or the same op of all layers, over some steps."""

    calls: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0  # of all threads together
    cost: StepCost = field(default_factory=StepCost)

    def add(self, time: OpTime, cost: StepCost) -> None:
        self.calls += 1
        self.seconds += time[1]
        self.busy_seconds += time[2]
        self.cost += cost


def run(
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
    """`batch_size` requests at once, `num_iters` times; their steps by what they compute: a prompt, or a token each.

    Raises ConfigError for a backend without such counters.
    """
    load = {"input_len": input_len, "output_len": output_len, "batch_size": batch_size, "seed": seed}
    with EngineDriver(config) as driver:
        machine = getattr(driver.built.ops, "machine", None)
        if machine is None:
            raise ConfigError(
                f"backend: bench profile takes steps of the cpu backend apart, not of {driver.built.ops.name}"
            )
        check_fits(driver, input_len, output_len)
        batches = random_batches(driver, batch_size, input_len, output_len, seed, detokenize)
        for _ in range(num_iters_warmup):
            finished(driver.run(next(batches)))
        steps: list[tuple[Step, list[OpTime]]] = []
        machine.profile(True)
        for _ in range(num_iters):
            finished(driver.run(next(batches), on_step=lambda step: steps.append((step, machine.take_op_times()))))
        machine.profile(False)
        load |= {"num_iters": num_iters, "num_iters_warmup": num_iters_warmup}
        report = head("profile", config, driver, load)
        costs = step_costs(config, driver.built.model_config, report["backend"])
        threads = machine.threads
    limits = measure(config)
    report["limits"] = None if limits is None else asdict(limits)
    report["phases"] = {
        "prefill": _phase([one for one in steps if one[0].prompt_tokens], costs, limits, threads),
        "decode": _phase([one for one in steps if not one[0].prompt_tokens], costs, limits, threads),
    }
    return report


def _phase(
    steps: Sequence[tuple[Step, list[OpTime]]], costs: StepCosts, limits: MachineLimits | None, threads: int
) -> dict[str, Any] | None:
    """Of some steps: their ops, and the time in which no op ran, as means of a step."""
    if not steps:
        return None
    sums: dict[str, OpSum] = {}
    for step, times in steps:
        for label, time, cost in match(times, costs.by_op(step.sequences, step.logits_rows)):
            sums.setdefault(label, OpSum()).add(time, cost)
    count = len(steps)
    seconds = sum(step.ended - step.started for step, _ in steps)
    in_ops = sum(one.seconds for one in sums.values())
    executing = sum(sum(step.timings.values()) for step, _ in steps)
    ops = [_op(label, one, count, limits, threads) for label, one in sums.items()]
    return {
        "steps": count,
        "tokens_computed": sum(new for step, _ in steps for _, new in step.sequences) / count,
        "ms": 1000 * seconds / count,
        "ops": sorted(ops, key=lambda op: -op["ms"]),
        "between_ops_ms": 1000 * (executing - in_ops) / count,  # batches are made, ops called, rows collected
        "between_steps_ms": 1000 * (seconds - executing) / count,  # scheduling, coordinators, text
    }


def _op(label: str, one: OpSum, steps: int, limits: MachineLimits | None, threads: int) -> dict[str, Any]:
    shares = None if limits is None else utilization(one.cost, one.seconds, limits)
    return {
        "op": label,
        "calls": one.calls / steps,
        "ms": 1000 * one.seconds / steps,
        "bytes": one.cost.bytes / steps,
        "flops": (one.cost.integer_flops + one.cost.float_flops) / steps,
        "mbu": None if shares is None else shares.mbu,
        "mfu": None if shares is None else shares.mfu,
        "idle": 1 - one.busy_seconds / (threads * one.seconds) if one.seconds else 0.0,  # share of the threads' time
    }


def match(times: Iterable[OpTime], traced: Iterable[tuple[OpRecord, StepCost]]) -> list[tuple[str, OpTime, StepCost]]:
    """What was timed in a step, with its name and cost: both lists are in the order in which ops run.

    Raises RuntimeError if they are of different steps.
    """
    expected = iter([(record, cost) for record, cost in traced if record.op not in _NO_KERNEL])
    matched = []
    for time in times:
        if time[0] in _NOT_TRACED:
            matched.append((time[0], time, StepCost()))
            continue
        record, cost = next(expected, (None, StepCost()))
        if record is None or record.op != time[0]:
            raise RuntimeError(f"{time[0]} was run where {record and record.op} was to be")
        matched.append((_label(record), time, cost))
    if left := [record.op for record, _ in expected]:
        raise RuntimeError(f"{left} were not run")
    return matched


def _label(record: OpRecord) -> str:
    """An op's name; of a linear with the weights it multiplies by, without the number of the layer."""
    if record.op != "linear":
        return record.op
    names = [_LAYER.sub("", name).removesuffix(".weight") for name in record.weights if not name.endswith(".bias")]
    return " ".join(["linear", *names])


# --- for people ---


def lines(report: dict[str, Any]) -> list[str]:
    """A report as lines of text."""
    text = [f"profile of {report['model']} on {report['backend']} ({report['threads']} threads)"]
    for name, phase in report["phases"].items():
        if phase is None:
            continue
        text += [
            "",
            f"{name}: {phase['steps']} steps of {phase['tokens_computed']:.1f} tokens, {phase['ms']:.3f} ms each",
        ]
        text.append(f"{'':40}{'calls':>7}{'ms':>10}{'share':>7}{'MB':>9}{'MFLOP':>10}{'MBU':>6}{'MFU':>6}{'idle':>6}")
        text += [_line(op, phase["ms"]) for op in phase["ops"]]
        for label, key in (("between ops", "between_ops_ms"), ("between steps", "between_steps_ms")):
            text.append(f"{label:40}{'':7}{phase[key]:10.3f}{phase[key] / phase['ms']:7.1%}")
    return [*text, "", limits_text(report["limits"])]


def _line(op: dict[str, Any], step_ms: float) -> str:
    shares = "".join(f"{'' if op[key] is None else format(op[key], '.0%'):>6}" for key in ("mbu", "mfu"))
    return (
        f"{op['op']:40}{op['calls']:7.0f}{op['ms']:10.3f}{op['ms'] / step_ms:7.1%}{op['bytes'] / 1e6:9.2f}"
        f"{op['flops'] / 1e6:10.1f}{shares}{op['idle']:6.0%}"
    )
