"""A model against itself: on the cpu backend an answer depends on its request alone, to the last bit.

Requests of many kinds are answered each by itself, on one thread and with whole prompts; then all at once, under one
setting after the other that must not matter. Each cell also counts that what it is about did happen: a cell in which
nobody was preempted would say nothing about preemption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.cli import machine
from octavo.cli.check import Check, Status, judged
from octavo.cli.driver import Answer, EngineDriver, Request, completions
from octavo.config import EngineConfig
from octavo.core.params import SamplingParams
from octavo.core.want import Sample

if TYPE_CHECKING:
    from octavo.core.outputs import CompletionOutput
    from octavo.core.plan import StepPlan
    from octavo.ops import ModelConfig

PART = "exactness"
_CONTEXT = 320  # tokens; the longest request fills most of it
_PLACES = 12  # sequences in a step
_LOGPROBS = 4  # best tokens whose log-probabilities are compared, besides the chosen one's
_SAMPLED = 6  # index of the request with several outputs
_LENGTHS = (1, 16, 33, 70, 17, 48, 21, 200)  # tokens of the prompts, on and off the edges of blocks and tiles


@dataclass
class Counts:
    """What happened while requests ran."""

    mixed: int = 0  # steps with rows of several requests
    chunks: int = 0  # grants that ended before the last known token of their sequence
    shared: int = 0  # steps in which two sequences read the same block
    copies: int = 0  # blocks copied on write
    preemptions: int = 0
    cached_tokens: int = 0  # of prompts, found in the prefix cache
    compared: int = 0  # tokens

    def add_plan(self, plan: StepPlan) -> None:
        self.mixed += len({grant.request_id for grant in plan.grants}) > 1
        self.chunks += sum(not any(isinstance(one.want, Sample) for one in grant.wants) for grant in plan.grants)
        blocks = [block for grant in plan.grants for block in grant.block_table]
        self.shared += len(set(blocks)) < len(blocks)
        self.copies += len(plan.copies)

    def add_answers(self, answers: Sequence[Answer]) -> None:
        outputs = [answer.output for answer in answers if answer.output is not None]
        self.preemptions += sum(output.metrics.num_preemptions for output in outputs)
        self.cached_tokens += sum(output.num_cached_tokens for output in outputs)


@dataclass(frozen=True)
class Cell:
    """One setting, or several, that must not change an answer."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    happened: tuple[str, ...] = ()  # counts that must not be 0
    is_scarce: bool = False  # memory for the longest request and little more: others are preempted
    runs: int = 1  # in the same engine, one after the other
    is_backwards: bool = False  # the order in which requests arrive
    is_info: bool = False  # a difference is told, and no failure


CELLS = (
    Cell("batched with neighbours", happened=("mixed", "shared", "copies")),
    Cell("prompts in chunks", {"long_prefill_token_threshold": 5}, ("mixed", "chunks")),
    Cell("few tokens a step", {"max_num_batched_tokens": _PLACES + 11}, ("mixed", "chunks")),
    Cell("2 threads", {"threads": 2}, ("mixed",)),
    Cell("3 threads", {"threads": 3}, ("mixed",)),
    Cell("blocks of 32", {"block_size": 32}, ("mixed",)),
    Cell("blocks of 64", {"block_size": 64}, ("mixed",)),
    # A prompt in chunks is let in for its first blocks, and then there are too few for the rest.
    Cell(
        "preempted", {"long_prefill_token_threshold": 24}, ("preemptions", "chunks"), is_scarce=True, is_backwards=True
    ),
    Cell("prefix cache", {"enable_prefix_caching": True}, ("cached_tokens",), runs=2),
    Cell("shared prefixes read once", {"cascade_attention": True}, ("shared",)),
    Cell(
        "several of these at once",
        {
            "threads": 3,
            "long_prefill_token_threshold": 24,
            "enable_prefix_caching": True,
            "cascade_attention": True,
        },
        ("mixed", "chunks", "preemptions", "cached_tokens"),
        is_scarce=True,
        runs=2,
        is_backwards=True,
    ),
)
QUICK = ("batched with neighbours", "prompts in chunks", "2 threads", "preempted", "several of these at once")


def verify(
    config: EngineConfig,
    model: ModelConfig,
    num_tokens: int,
    is_quick: bool,
    tell: Callable[[str], None],
) -> list[Check]:
    """All cells, with `num_tokens` generated tokens an output. `tell` hears what is being done."""
    reason = machine.refusals(config, model)["cpu"]
    if reason is not None:
        return [Check(PART, "all cells", Status.SKIPPED, f"the cpu backend refuses: {reason}")]
    context = min(_CONTEXT, model.max_position)
    num_tokens = min(num_tokens, context // 8)  # prompts of different lengths also where the context is short
    requests = requests_for(model.vocab_size, context, num_tokens)
    base = replace(
        config,
        backend="cpu",
        threads=1,
        max_model_len=max(len(ids) for ids, _ in requests) + num_tokens,
        max_num_seqs=_PLACES,
        max_num_batched_tokens=_PLACES + sum(len(ids) for ids, _ in requests),  # no prompt is cut
        enable_prefix_caching=False,
        cascade_attention=False,
    )
    tell("each request alone")
    with EngineDriver(base) as driver:
        expected = [driver.run([request])[0] for request in requests]
        token_bytes = driver.built.memory_plan.block_bytes // base.block_size
        checks = [_forks(driver, requests[_SAMPLED], expected[_SAMPLED])]
    cells = [cell for cell in CELLS if not is_quick or cell.name in QUICK]
    for cell in (*cells, *(() if is_quick else _instruction_set_cells(config))):
        tell(cell.name)
        checks.append(_run(cell, base, token_bytes, requests, expected))
    return checks


def requests_for(vocab_size: int, context: int, num_tokens: int) -> list[Request]:
    """Greedy and sampled, with penalties and filters; one with its prompt's log-probabilities, one with 3 outputs."""
    random = np.random.default_rng(20_261_124)
    common: dict[str, Any] = {
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "logprobs": _LOGPROBS,
        "detokenize": False,
    }
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0},
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0, "prompt_logprobs": 3},
        {"temperature": 1.3, "seed": 12, "top_p": 0.9, "top_k": 40},
        {"temperature": 0.8, "seed": 13, "repetition_penalty": 1.3, "presence_penalty": 0.4, "min_p": 0.01},
        {"temperature": 1.0, "seed": 14, "n": 3},
        {"temperature": 0},
    ]
    return [
        (random.integers(0, vocab_size, min(length, context - num_tokens)).tolist(), SamplingParams(**common, **kind))
        for length, kind in zip(_LENGTHS, kinds, strict=True)
    ]


def _instruction_set_cells(config: EngineConfig) -> list[Cell]:
    """The other instruction sets. That they agree is no promise: it is told, and nothing fails by it."""
    sets = machine.instruction_sets()
    used = config.instruction_set or sets[0]
    return [
        Cell(f"{name} instead of {used}", {"instruction_set": name, "threads": 2}, ("mixed",), is_info=True)
        for name in sets
        if name != used
    ]


def _run(
    cell: Cell, base: EngineConfig, token_bytes: int, requests: Sequence[Request], expected: Sequence[Answer]
) -> Check:
    config = replace(base, **cell.settings)
    if cell.is_scarce:
        assert config.max_model_len is not None
        blocks = -(-config.max_model_len // config.block_size) + 3
        config = replace(config, kv_cache_memory_bytes=blocks * config.block_size * token_bytes)
    order = list(range(len(requests)))
    if cell.is_backwards:
        order.reverse()
    counts, differences = Counts(), []
    with EngineDriver(config) as driver:
        for _ in range(cell.runs):
            answers = driver.run([requests[i] for i in order], counts.add_plan)
            counts.add_answers(answers)
            for i, answer in zip(order, answers, strict=True):
                differences += _differences(f"request {i}", answer, expected[i], counts)
    return _judge(cell, counts, differences)


def _forks(driver: EngineDriver, request: Request, expected: Answer) -> Check:
    """An output of several is what it is with fewer beside it, or with more."""
    ids, params = request
    counts, differences = Counts(), []
    for count in (1, params.n + 2):
        (answer,) = driver.run([(ids, params.but(n=count))], counts.add_plan)
        pairs = list(zip(completions(answer), completions(expected), strict=False))
        for ours, theirs in pairs:
            differences += _output_differences(f"output {ours.index} of {count}", ours, theirs, counts)
    return _judge(Cell("forked samples", happened=("shared", "copies")), counts, differences)


def _judge(cell: Cell, counts: Counts, differences: Sequence[str]) -> Check:
    figures = {name: value for name, value in vars(counts).items() if name in (*cell.happened, "compared")}
    missing = [name for name in cell.happened if not figures[name]]
    seen = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in figures.items() if name != "compared")
    detail = f"{counts.compared} tokens compared; {seen}"
    if differences:
        detail += f"; DIFFERS: {differences[0]}" + (f" and {len(differences) - 1} more" if differences[1:] else "")
    if missing:
        detail += f"; shows nothing, because there were no {', '.join(missing)}"
    figures["differences"] = len(differences)
    if cell.is_info and not missing:
        return Check(PART, cell.name, Status.INFO, detail + ("" if differences else "; the same bits"), figures)
    return judged(PART, cell.name, not differences and not missing, detail, **figures)


# --- comparing ---


def _differences(note: str, ours: Answer, theirs: Answer, counts: Counts) -> list[str]:
    pairs = list(zip(completions(ours), completions(theirs), strict=True))
    found = [text for pair in pairs for text in _output_differences(note, *pair, counts)]
    assert ours.output is not None and theirs.output is not None
    if ours.output.prompt_logprobs != theirs.output.prompt_logprobs:
        found.append(f"{note}: log-probabilities of the prompt")
    return found


def _output_differences(note: str, ours: CompletionOutput, theirs: CompletionOutput, counts: Counts) -> list[str]:
    """Tokens, and log-probabilities as floats: == is equality of bits, but for zeros, and a NaN equals nothing."""
    counts.compared += len(theirs.token_ids)
    for step, pair in enumerate(zip(ours.token_ids, theirs.token_ids, strict=False)):
        if pair[0] != pair[1]:
            return [f"{note}: token {step} is {pair[0]} instead of {pair[1]}"]
    if len(ours.token_ids) != len(theirs.token_ids):
        return [f"{note}: {len(ours.token_ids)} tokens instead of {len(theirs.token_ids)}"]
    if not ours.logprobs or ours.logprobs != theirs.logprobs or ours.cumulative_logprob != theirs.cumulative_logprob:
        return [f"{note}: log-probabilities"]
    if ours.finish_reason != theirs.finish_reason:
        return [f"{note}: ended by {ours.finish_reason} instead of {theirs.finish_reason}"]
    return []
