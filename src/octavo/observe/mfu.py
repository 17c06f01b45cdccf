"""MBU and MFU: how much of the time of some work its memory traffic, or its arithmetic, would take by itself.

MFU is PaLM's model FLOPs utilisation (Chowdhery et al., 2022), MBU the same for bytes: what the model needs, not what
a kernel happens to do, over what the machine could do in that time. Where some products are of integers and some of
floats, each kind counts at its own rate.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.observe.limits import MachineLimits

FLOPS_PER_MAC = 2


@dataclass(frozen=True, slots=True)
class StepCost:
    """What steps need by the cost table (octavo.ops.cost)."""

    bytes: int = 0
    integer_flops: int = 0  # of products of integer codes, in linears and attention
    float_flops: int = 0  # all else

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(
            self.bytes + other.bytes,
            self.integer_flops + other.integer_flops,
            self.float_flops + other.float_flops,
        )

    def __mul__(self, times: int) -> StepCost:
        return StepCost(self.bytes * times, self.integer_flops * times, self.float_flops * times)


@dataclass(frozen=True, slots=True)
class Utilization:
    """Shares of the machine's limits; 1 is all of it."""

    mbu: float
    mfu: float


def utilization(cost: StepCost, seconds: float, limits: MachineLimits) -> Utilization | None:
    """Shares reached by work of `cost` that took `seconds`; None if nothing was done."""
    if seconds <= 0 or cost.bytes == 0:
        return None
    memory_s = cost.bytes / limits.read_bytes_per_s
    integer_s = cost.integer_flops / FLOPS_PER_MAC / limits.integer_macs_per_s
    float_s = cost.float_flops / FLOPS_PER_MAC / limits.float32_macs_per_s
    return Utilization(memory_s / seconds, (integer_s + float_s) / seconds)
