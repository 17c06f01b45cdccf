"""The engine with guesses on machines whose steps take a known time: it is never slower for it, and faster where text
repeats. Time is the harness's own clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from octavo.core.speculation import SpeculativeConfig
from octavo.speculation.speculator import Speculator
from tests.engine import fake
from tests.engine.fake import Harness

MACHINES: dict[str, Callable[[int], float]] = {
    "rows are cheap": lambda rows: 1.0 + 0.02 * rows,
    "a row costs a tenth": lambda rows: 1.0 + 0.1 * rows,
    "tiles of eight": lambda rows: 1.0 + 0.6 * -(-rows // 8),
    "rows are all it costs": lambda rows: 0.3 * rows,
}
SUFFIX = SpeculativeConfig(method="suffix")
NGRAM = SpeculativeConfig(method="ngram")


def seconds(machine: Callable[[int], float], batch: int, config: SpeculativeConfig | None) -> float:
    """Of answering so many requests."""
    tokens = 300 if batch == 1 else 120
    proposer = None if config is None else Speculator(config)
    harness = Harness(num_blocks=8000, max_num_seqs=32, max_num_batched_tokens=256, proposer=proposer)
    harness.engine.plan_listeners.append(lambda plan: setattr(harness, "now", harness.now + machine(plan.num_tokens)))
    for number in range(batch):
        harness.add(f"r{number}", [number % 5, 1, 2, 3], max_tokens=tokens)
    harness.run()
    if proposer is not None:
        assert proposer.stats.num_drawn_tokens > 0
    return harness.now - len(harness.executor.plans)  # the harness takes 1.0 a step between steps


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("config", [SUFFIX, NGRAM], ids=["suffix", "ngram"])
def test_it_is_not_slower_on_text_that_does_not_repeat(name: str, batch: int, config: SpeculativeConfig) -> None:
    machine = MACHINES[name]
    assert seconds(machine, batch, config) <= 1.03 * seconds(machine, batch, None)


@pytest.mark.parametrize("config", [SUFFIX, NGRAM], ids=["suffix", "ngram"])
@pytest.mark.parametrize(("name", "batch", "least"), [
    ("rows are cheap", 1, 4.0), ("a row costs a tenth", 1, 2.5), ("tiles of eight", 1, 3.0),
    ("rows are cheap", 16, 1.9), ("rows are all it costs", 1, 0.97), ("rows are all it costs", 16, 0.97),
])  # fmt: skip
def test_it_is_faster_on_text_that_repeats(
    monkeypatch: pytest.MonkeyPatch, name: str, batch: int, least: float, config: SpeculativeConfig
) -> None:
    def periodic(seen: Sequence[int], salt: object = 0) -> int:
        return [3, 1, 4, 1, 5, 9, 2, 6, 5][len(seen) % 9]

    monkeypatch.setattr(fake, "next_token", periodic)
    machine = MACHINES[name]
    assert seconds(machine, batch, None) >= least * seconds(machine, batch, config)


def test_what_is_told() -> None:
    proposer = Speculator(SUFFIX)
    harness = Harness(num_blocks=800, proposer=proposer)
    harness.engine.plan_listeners.append(lambda plan: setattr(harness, "now", harness.now + 1 + 0.1 * plan.num_tokens))
    harness.add("r", [1, 2] * 6, max_tokens=40)
    harness.run()
    stats = harness.engine.figures()["speculation"]
    assert stats == proposer.stats and stats is not proposer.stats
    assert stats.num_draws <= 40 and stats.num_drawn_tokens == stats.num_draws + stats.num_accepted_tokens
    assert not proposer._acceptance._requests, "what was learnt of a request goes with it"
