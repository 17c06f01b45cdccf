"""The cost table: FLOPs and bytes of each op from shapes alone.

A multiply-add is two FLOPs; exp, tanh, division and square root are one each. Bytes are those that a step must move
between memory and processor if each array is read or written once: weights as packed, KV as stored, and a key or value
of a sequence once per layer, however many rows and heads share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.ops.model_config import Activation

if TYPE_CHECKING:
    from octavo.ops.batch import Batch

FLOPS_PER_NORM_ELEMENT = 4  # square, add to the sum, times the scale, times the weight
FLOPS_PER_ROPE_ELEMENT = 3  # per pair: four products, two sums
FLOPS_PER_SCORE = 4  # scale, subtract the maximum, exp, add to the denominator
FLOPS_PER_GATED = {
    Activation.SILU: 5,  # negate, exp, add one, divide, times up
    Activation.GELU_TANH: 10,  # x * x * x, two products and a sum inside, tanh, add one, halve, times x, times up
}


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes per element."""

    activation: int = 4
    kv: float = 2  # with its share of scales


@dataclass(frozen=True, slots=True)
class Cost:
    flops: int
    bytes_read: int
    bytes_written: int

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
        )


def embed(tokens: int, hidden: int, row_bytes: int, scaled: bool, widths: Widths) -> Cost:
    return Cost(tokens * hidden if scaled else 0, tokens * row_bytes, tokens * hidden * widths.activation)


def rms_norm(elements: int, weight_bytes: int, has_residual: bool, widths: Widths) -> Cost:
    flops = elements * (FLOPS_PER_NORM_ELEMENT + has_residual)
    read = elements * (1 + has_residual) * widths.activation + weight_bytes
    return Cost(flops, read, elements * widths.activation)


def linear(
    rows: int,
    in_features: int,
    out_features: int,
    weight_bytes: int,
    has_residual: bool,
    widths: Widths,
    *,
    has_bias: bool = False,
) -> Cost:
    """`weight_bytes`: with those of the bias."""
    outputs = rows * out_features
    read = weight_bytes + (rows * in_features + outputs * has_residual) * widths.activation
    added = outputs * (has_bias + has_residual)
    return Cost(2 * outputs * in_features + added, read, outputs * widths.activation)


def rope(elements: int, rotated: int, widths: Widths) -> Cost:
    return Cost(rotated * FLOPS_PER_ROPE_ELEMENT, elements * widths.activation, elements * widths.activation)


def store_kv(elements: int, widths: Widths) -> Cost:
    """`elements` of K and V together."""
    return Cost(0, elements * widths.activation, round(elements * widths.kv))


def visible_keys(batch: Batch, window: int | None) -> tuple[int, int]:
    """(row, key) pairs that attention scores in one head, and distinct keys it reads, over the whole batch."""
    pairs = keys = 0
    for s in range(batch.num_seqs):
        first, stop = int(batch.query_start_loc[s]), int(batch.query_start_loc[s + 1])
        if first == stop:
            continue
        positions = range(int(batch.positions[first]), int(batch.positions[stop - 1]) + 1)
        pairs += sum(position + 1 if window is None else min(position + 1, window) for position in positions)
        lowest = 0 if window is None else max(positions[0] - window + 1, 0)
        keys += positions[-1] + 1 - lowest
    return pairs, keys


def attention(batch: Batch, heads: int, kv_heads: int, head_dim: int, window: int | None, widths: Widths) -> Cost:
    pairs, keys = visible_keys(batch, window)
    outputs = batch.num_tokens * heads * head_dim
    flops = pairs * heads * (4 * head_dim + FLOPS_PER_SCORE) + outputs  # the last term divides by the denominator
    read = outputs * widths.activation + round(2 * keys * kv_heads * head_dim * widths.kv)
    return Cost(flops, read, outputs * widths.activation)


def gated(outputs: int, activation: Activation, widths: Widths) -> Cost:
    return Cost(outputs * FLOPS_PER_GATED[activation], 2 * outputs * widths.activation, outputs * widths.activation)


def take_rows(elements: int, widths: Widths) -> Cost:
    return Cost(0, elements * widths.activation, elements * widths.activation)


def total(costs: Sequence[Cost]) -> Cost:
    return sum(costs, Cost(0, 0, 0))
