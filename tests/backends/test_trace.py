"""The `trace` backend: its numbers against counts made by hand, its ops against those of a real step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octavo.backends.reference import KVLayer, ReferenceOps
from octavo.backends.trace import OpRecord
from octavo.core.params import SamplingParams
from octavo.core.plan import Grant, StepPlan
from octavo.core.sequence import Sequence
from octavo.core.want import Draw, Sample, Wanted
from octavo.formats import GGUFFile
from octavo.kv_cache import KVCacheManager
from octavo.loading.gguf_config import config_from_gguf
from octavo.loading.weights import FileWeights
from octavo.ops import Activation, LayerConfig, ModelConfig, RopeConfig
from octavo.ops.cost import Cost, Widths, total
from octavo.runner.model_runner import ModelRunner
from octavo.runner.trace import trace_step
from tests.models.probe import load
from tests.models.tiny import make

ROPE = RopeConfig(10_000.0, 4)
TINY = ModelConfig(
    architecture="llama",
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_position=64,
    norm_eps=1e-5,
    activation=Activation.SILU,
    layers=(LayerConfig(ROPE), LayerConfig(ROPE, window=4)),
    tie_embeddings=False,
)


def only(records: list[OpRecord], op: str) -> list[OpRecord]:
    return [record for record in records if record.op == op]


def cost_of(records: list[OpRecord]) -> Cost:
    return total([record.cost for record in records])


def test_tiny_step_by_hand() -> None:
    """Two sequences: a prompt of 3 tokens, and one token after 6 cached ones. T = 4 tokens, 2 rows of logits.
    Weights and activations take 4 bytes an element here, K and V 2."""
    records = trace_step(TINY, [(0, 3), (6, 1)])
    a = 4
    expected = [
        # op, inputs, output, FLOPs, bytes read, bytes written
        ("embed", [], (4, 8), 0, 4 * 8 * a, 4 * 8 * a),
    ]
    # Pairs of row and key: 1 + 2 + 3 of the prompt and 7 of the other; with a window of 4 that is 6 + 4.
    # Keys that are read: 3 and 7; with the window 3 and 4.
    for pairs, keys in ((6 + 7, 3 + 7), (6 + 4, 3 + 4)):
        expected += [
            ("rms_norm", [(4, 8)], (4, 8), 4 * 32, (32 + 8) * a, 32 * a),
            ("linear", [(4, 8)], (4, 16), 2 * 4 * 8 * 16, (16 * 8 + 32) * a, 64 * a),  # q 8, k 4, v 4
            ("rope", [(4, 1, 4)], (4, 1, 4), 3 * 16, 16 * a, 16 * a),
            ("store_kv", [(4, 1, 4), (4, 1, 4)], (), 0, 32 * a, 32 * 2),
            ("rope", [(4, 2, 4)], (4, 2, 4), 3 * 32, 32 * a, 32 * a),
            # A score is 4 multiply-adds, a share of the output 4 more, and scale, maximum, exp and sum 4 FLOPs.
            (
                "attention",
                [(4, 2, 4)],
                (4, 8),
                2 * pairs * (8 + 8 + 4) + 32,
                32 * a + keys * (4 + 4) * 2,
                32 * a,
            ),
            ("linear", [(4, 8), (4, 8)], (4, 8), 2 * 4 * 8 * 8 + 32, (64 + 32 + 32) * a, 32 * a),
            ("rms_norm", [(4, 8)], (4, 8), 4 * 32, (32 + 8) * a, 32 * a),
            ("linear", [(4, 8)], (4, 24), 2 * 4 * 8 * 24, (24 * 8 + 32) * a, 96 * a),
            ("gated", [(4, 24)], (4, 12), 5 * 48, 96 * a, 48 * a),
            ("linear", [(4, 12), (4, 8)], (4, 8), 2 * 4 * 12 * 8 + 32, (96 + 48 + 32) * a, 32 * a),
        ]
    expected += [
        ("take_rows", [(4, 8)], (2, 8), 0, 16 * a, 16 * a),
        ("rms_norm", [(2, 8)], (2, 8), 4 * 16, (16 + 8) * a, 16 * a),
        ("linear", [(2, 8)], (2, 10), 2 * 2 * 8 * 10, (80 + 16) * a, 20 * a),
    ]
    got = [(r.op, list(r.inputs), r.output, r.cost.flops, r.cost.bytes_read, r.cost.bytes_written) for r in records]
    assert got == expected


@pytest.mark.parametrize(
    ("sequences", "window", "pairs", "keys"),
    [
        ([(0, 1)], None, 1, 1),
        ([(0, 5)], None, 15, 5),
        ([(0, 5)], 2, 1 + 4 * 2, 5),
        ([(0, 5)], 1, 5, 5),
        ([(0, 5)], 100, 15, 5),
        ([(10, 3)], None, 11 + 12 + 13, 13),
        ([(10, 3)], 4, 12, 6),  # rows at 10, 11 and 12 read the keys 7 to 12
        ([(10, 1), (20, 1), (0, 2)], None, 11 + 21 + 3, 11 + 21 + 2),
        ([(10, 1), (20, 1), (0, 2)], 4, 4 + 4 + 3, 4 + 4 + 2),
        ([(7, 0), (3, 1)], None, 4, 4),
    ],
)
def test_attention_counts(sequences: list[tuple[int, int]], window: int | None, pairs: int, keys: int) -> None:
    """Guards against counting masked pairs, and keys once per row or per head."""
    config = replace(TINY, layers=(LayerConfig(ROPE, window),))
    (record,) = only(trace_step(config, sequences), "attention")
    outputs = sum(new for _, new in sequences) * 8
    assert record.cost == Cost(2 * pairs * 20 + outputs, outputs * 4 + keys * 8 * 2, outputs * 4)


def test_rows_and_widths() -> None:
    """Rows without wants make no logits; wider K and V make wider reads and writes, of themselves only."""
    assert not only(trace_step(TINY, [(0, 3)], logits_rows=0), "take_rows")
    assert only(trace_step(TINY, [(0, 3)], logits_rows=3), "take_rows")[0].output == (3, 8)
    narrow, wide = (trace_step(TINY, [(5, 3)], widths=Widths(4, kv)) for kv in (2, 4))
    for a, b in zip(narrow, wide, strict=True):
        extra = (b.cost.bytes_read - a.cost.bytes_read, b.cost.bytes_written - a.cost.bytes_written)
        if a.op == "store_kv":
            assert extra == (0, 3 * 8 * 2)
        elif a.op == "attention":
            keys = 8 if a is only(narrow, "attention")[0] else 6  # the second layer's window is 4
            assert extra == (keys * 8 * 2, 0)
        else:
            assert extra == (0, 0)


def test_a_bias_by_hand() -> None:
    """An addition for each output, and its bytes once."""
    plain, biased = (
        only(trace_step(replace(TINY, architecture=name), [(0, 3)]), "linear")[0] for name in ("llama", "qwen2")
    )
    assert (biased.inputs, biased.output) == (plain.inputs, plain.output)
    assert biased.cost.flops == plain.cost.flops + 3 * 16
    assert biased.cost.bytes_read == plain.cost.bytes_read + 4 * 16
    assert set(biased.weights) - set(plain.weights) == {f"layers.0.self_attn.{part}_proj.bias" for part in "qkv"}


# --- SmolLM2 ---


@pytest.fixture(scope="module")
def smollm2_file(smollm2_path: Path) -> GGUFFile:
    return GGUFFile(smollm2_path)


def weights_of(config: ModelConfig, file: GGUFFile) -> Callable[[Any], FileWeights]:
    return lambda ops: FileWeights(ops, config, "trace", file.tensors, gguf=True)


LINEARS = 576 * (576 + 2 * 192) + 576 * 576 + 576 * 2 * 1536 + 1536 * 576  # weights of a layer's matrices


def test_smollm2_flops(smollm2_file: GGUFFile) -> None:
    """A token costs 212 MFLOP without the output matrix, and that matrix 57 more. Guards against a factor of two, or a
    layer or matrix that is left out."""
    config = config_from_gguf(smollm2_file)
    records = trace_step(config, [(0, 512)], weights=weights_of(config, smollm2_file))
    linears = only(records, "linear")
    assert len(linears) == 4 * 30 + 1
    residuals = 30 * 2 * 512 * 576
    assert sum(record.cost.flops for record in linears[:-1]) == 2 * 512 * 30 * LINEARS + residuals
    assert linears[-1].cost.flops == 2 * 576 * 49152
    assert round(2 * 30 * LINEARS / 1e6) == 212
    one = cost_of(trace_step(config, [(0, 1)], weights=weights_of(config, smollm2_file), logits_rows=0))
    assert one.flops / 1e6 == pytest.approx(212, abs=1.5)
    attention = only(records, "attention")
    pairs = 512 * 513 // 2
    assert [record.cost.flops for record in attention] == [pairs * 9 * (4 * 64 + 4) + 512 * 576] * 30


def test_smollm2_bytes(smollm2_file: GGUFFile) -> None:
    """A decode step reads every weight once, as the file packs it, but of the embedding's first use one row; and the K
    and V of the context: 23 KB a token in float16."""
    config = config_from_gguf(smollm2_file)
    tensors = smollm2_file.tensors
    records = trace_step(config, [(2047, 1)], weights=weights_of(config, smollm2_file))
    used = {name for record in records for name in record.weights}
    assert used == set(tensors)
    in_file = sum(tensor.nbytes for tensor in tensors.values())
    assert round(in_file / 2**20) == 92
    activations = 4
    weights = 0
    for record in records:
        elements = sum(math.prod(shape) for shape in record.inputs)
        if record.op in ("linear", "rms_norm"):
            weights += record.cost.bytes_read - elements * activations
    assert weights == in_file
    embedding = tensors["token_embd.weight"]
    assert only(records, "embed")[0].cost.bytes_read == embedding.nbytes // 49152
    kv = sum(record.cost.bytes_read - 576 * activations for record in only(records, "attention"))
    assert kv == 2048 * 30 * 2 * 3 * 64 * 2 == 2048 * 23_040


# --- against a real step ---


class Recorder(ReferenceOps):
    """The `reference` backend, writing down what is called with which shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], tuple[int, ...]]] = []

    def _noted(self, op: str, inputs: list[Any], output: Any) -> Any:
        shapes = tuple(x.shape for x in inputs if x is not None)
        self.calls.append((op, shapes, output.shape if output is not None else ()))
        return output

    def embed(self, batch: Any, weight: Any, scale: float = 1.0) -> Any:
        return self._noted("embed", [], super().embed(batch, weight, scale))

    def rms_norm(self, x: Any, weight: Any, eps: float, residual: Any = None) -> Any:
        return self._noted("rms_norm", [x, residual], super().rms_norm(x, weight, eps, residual))

    def linear(self, x: Any, weight: Any, residual: Any = None) -> Any:
        return self._noted("linear", [x, residual], super().linear(x, weight, residual))

    def rope(self, x: Any, batch: Any, rope: RopeConfig) -> Any:
        return self._noted("rope", [x], super().rope(x, batch, rope))

    def store_kv(self, k: Any, v: Any, batch: Any, kv: KVLayer) -> None:
        self._noted("store_kv", [k, v], super().store_kv(k, v, batch, kv))

    def attention(self, q: Any, batch: Any, kv: KVLayer, scale: float) -> Any:
        return self._noted("attention", [q], super().attention(q, batch, kv, scale))

    def gated(self, x: Any, activation: Activation) -> Any:
        return self._noted("gated", [x], super().gated(x, activation))

    def take_rows(self, x: Any, rows: Any) -> Any:
        return self._noted("take_rows", [x], super().take_rows(x, rows))


@pytest.mark.parametrize("variant", ["llama-grouped-heads", "mistral-window", "gemma3", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("sequences", [[(0, 7)], [(9, 1)], [(0, 5), (3, 1), (8, 6)]])
def test_the_same_ops_as_a_real_step(tmp_path: Path, variant: str, sequences: list[tuple[int, int]]) -> None:
    """Guards against a trace of another model than the one that runs."""
    ops = Recorder()
    model, config = load(make(tmp_path, variant), ops)
    kv = KVCacheManager(32, 4)
    runner = ModelRunner(
        model, ops, num_blocks=32, block_size=4, hidden_size=config.hidden_size, vocab_size=config.vocab_size
    )
    draw = Draw(SamplingParams(temperature=0), seed=0, stream=(0,), num_prompt_tokens=0)
    grants = []
    for index, (old, new) in enumerate(sequences):
        sequence = Sequence(index, kv, _no_ids)
        sequence.token_ids = list(range(old + new))
        kv.allocate(sequence.block_table, 0, old + new)
        table = tuple(sequence.block_table)
        wanted = Wanted(old + new - 1, old + new, Sample((draw,)))
        grants.append(Grant(str(index), index, old, old + new, tuple(range(old, old + new)), table, (wanted,)))
    runner.run(StepPlan(0, tuple(grants)))
    traced = [(record.op, record.inputs, record.output) for record in trace_step(config, sequences)]
    assert ops.calls == traced


def _no_ids() -> int:
    raise AssertionError("nothing forks here")


def test_gemma3_windows_are_traced(tmp_path: Path) -> None:
    """Of eight layers the sixth alone reads all keys."""
    _, config = load(make(tmp_path, "gemma3"), ReferenceOps())
    read = [record.cost.bytes_read for record in only(trace_step(config, [(100, 1)]), "attention")]
    per_key, q = 2 * 16 * 2, 4 * 16 * 4
    assert read == [q + (101 if index == 5 else 8) * per_key for index in range(8)]
