from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.backends.cpu import CpuOps
from octavo.loading.memory import available_memory
from octavo.observe import MachineLimits, StepCost, limits, measure_limits, utilization
from octavo.observe.limits import STREAM_BYTES, last_level_cache_bytes, stream_bytes

GB = 10**9


class Clocked:
    """A backend that computes nothing: each linear moves a clock on by what it would take at known rates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow_every: int) -> None:
        self.now, self.calls, self.slow_every = 0.0, 0, slow_every
        self.streamed = 0
        monkeypatch.setattr(limits.time, "perf_counter", lambda: self.now)

    def linear_weight(self, parts: Any) -> Any:
        (part,) = parts
        assert part.stored.shape[0] == part.shape[0] and part.nbytes == part.stored.nbytes
        return part

    def from_numpy(self, values: Any) -> Any:
        return values

    def linear(self, x: Any, weight: Any) -> None:
        assert x.shape[1] == weight.shape[1]
        if len(x) == 1:
            self.streamed = weight.nbytes
            seconds = weight.nbytes / (20 * GB)
        else:
            macs = len(x) * weight.size
            seconds = macs / {"F32": 50 * GB, "Q4_0": 200 * GB, "Q8_0": 100 * GB}[weight.dtype.name]
        self.calls += 1
        # As if something else had run on the machine in between.
        self.now += seconds * (3 if self.calls % self.slow_every else 1)


def test_rates_are_those_of_the_best_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against means instead of minima, swapped kinds and forgotten factors."""
    ops = Clocked(monkeypatch, slow_every=3)
    found = measure_limits(ops, threads=5, available_bytes=1 << 40)
    assert found.threads == 5
    assert found.read_bytes_per_s == pytest.approx(20 * GB)
    assert found.integer_macs_per_s == pytest.approx(200 * GB)
    assert found.float32_macs_per_s == pytest.approx(50 * GB)
    assert ops.streamed == pytest.approx(stream_bytes(last_level_cache_bytes()), rel=0.01)


def test_little_memory_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = Clocked(monkeypatch, slow_every=1)
    assert measure_limits(ops, 1, 40 << 20).read_bytes_per_s == pytest.approx(20 * GB)
    assert 9 << 20 <= ops.streamed <= 10 << 20
    with pytest.raises(MemoryError, match="1000 bytes"):
        measure_limits(ops, 1, 1000)


def test_the_real_machine() -> None:
    """It gives figures that a machine can have, however busy it is."""
    found = measure_limits(CpuOps(threads=1), 1, available_memory())
    assert 0 < found.read_bytes_per_s < 4000 * GB
    assert 0 < found.float32_macs_per_s < 2000 * GB
    assert 0 < found.integer_macs_per_s < 10_000 * GB


def test_the_streamed_matrix_is_larger_than_the_cache(tmp_path: Path) -> None:
    least, most = STREAM_BYTES
    assert stream_bytes(0) == least
    assert stream_bytes(32 << 20) == 128 << 20
    assert stream_bytes(1 << 40) == most
    for index, text in enumerate(["32K\n", "1M", "96M\n", "broken", ""]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(text)
    assert last_level_cache_bytes(tmp_path) == 96 << 20
    assert last_level_cache_bytes(tmp_path / "nowhere") == 32 << 20


# --- MBU and MFU ---

MACHINE = MachineLimits(2, read_bytes_per_s=10 * GB, integer_macs_per_s=100 * GB, float32_macs_per_s=20 * GB)


def test_shares() -> None:
    """5 GB of 10 GB/s take 0.5 s of 2 s; 40 GFLOP of integers and 8 of floats are 0.2 s each."""
    shares = utilization(StepCost(5 * GB, integer_flops=40 * GB, float_flops=8 * GB), 2.0, MACHINE)
    assert shares is not None
    assert shares.mbu == pytest.approx(0.25)
    assert shares.mfu == pytest.approx(0.2)


def test_nothing_done_has_no_share() -> None:
    assert utilization(StepCost(), 1.0, MACHINE) is None
    assert utilization(StepCost(1, 1, 1), 0.0, MACHINE) is None


def test_costs_add_up() -> None:
    one, other = StepCost(1, 2, 3), StepCost(10, 20, 30)
    assert one + other == StepCost(11, 22, 33) == sum([one, other], StepCost())
    assert one * 4 == StepCost(4, 8, 12)
    assert np.all([StepCost() + one == one, one * 0 == StepCost()])
