"""What does not fit is refused in words; nothing that Python hands over crashes the process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import _C, LLM, SamplingParams
from octavo.backends.cpu import CpuOps, CpuWeight, available_processors
from octavo.core.errors import ConfigError
from octavo.ops import KVSpec
from tests.backends.cpu.engine import awkward_llama
from tests.backends.cpu.harness import Paged, array, random_tensor

F32 = np.float32


@pytest.fixture
def ops() -> CpuOps:
    return CpuOps(threads=2)


# --- models that have no kernels ---


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"head_dim": 12}, "head_dim must be a multiple of 16.*not 12"),
        ({"head_dim": 1040}, "head_dim must be.*at most 1024, not 1040"),
        (
            {"head_dim": 16, "hidden_size": 65, "num_attention_heads": 65, "num_key_value_heads": 1},
            "at most 64 query heads may share a KV head, not 65",
        ),
    ],
)
def test_model_without_kernels(
    tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, int], text: str
) -> None:
    """Asked for, the backend says why it cannot and which one can; on "auto" the engine takes that one and logs why."""
    folder = awkward_llama(tmp_path / "model", tiny_llama_dir, **settings)
    with pytest.raises(ConfigError, match=f"(?s)cpu: {text}.*--backend reference"):
        LLM(str(folder), backend="cpu", max_model_len=32)
    with caplog.at_level(logging.INFO), LLM(str(folder), backend="auto", max_model_len=32) as llm:
        (output,) = llm.generate(["the"], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 2
    (line,) = [record.getMessage() for record in caplog.records if "backend reference" in record.getMessage()]
    assert "head_dim" in line or "query heads" in line


def test_instruction_set_that_is_not_there(tiny_gemma3_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_INSTRUCTION_SET", "sse9")
    with pytest.raises(
        ConfigError, match="OCTAVO_INSTRUCTION_SET: must be one of avx512, avxvnni, avx2, portable, not 'sse9'"
    ):
        LLM(str(tiny_gemma3_dir), backend="cpu", max_model_len=32)


@pytest.mark.parametrize("settings", [{"block_size": 1}, {"compute_dtype": "float64"}])
def test_settings_of_another_backend(tiny_gemma3_dir: Path, settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=f"cpu: {name}"):
        LLM(str(tiny_gemma3_dir), backend="cpu", max_model_len=32, **settings)
    with LLM(str(tiny_gemma3_dir), max_model_len=32, **settings) as llm:
        assert llm.config.backend == "auto"


# --- memory ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: _C.KVLayer("float16", 2**60, 16, 1, 16, 0),
        lambda: _C.KVLayer("int8", 2**63, 64, 8, 256, 0),
        lambda: _C.KVLayer("float32", 2**40, 64, 2**20, 1024, 0),
        lambda: _C.KVLayer("float32", 1, 64, 2**60, 1024, 0),
        lambda: _C.Weight([("Q4_1", 2**58)], 32),
        lambda: _C.Weight([("F32", 16)], 2**58),
        lambda: _C.Weight([("F32", 2**40)], 2**40),
        lambda: _C.Weight([("Q8_0", 2**64 - 1)], 32),
    ],
)
def test_memory_that_is_not_there(make: Callable[[], Any]) -> None:
    """Guards against a size that wraps round to a small one."""
    with pytest.raises(MemoryError):
        make()


def test_untouched_blocks_cost_nothing() -> None:
    """KV is taken from the system when it is written: 1 TiB of blocks, a few of them used."""
    ops = CpuOps(threads=1, kv_dtype="float16")
    (kv,) = ops.kv_layers([KVSpec(8, 128, None)], 2**24, 16)
    assert kv.layer.nbytes == 2**40
    kv.layer.copy_block(2**24 - 1, 7)


# --- shapes ---


def graph(ops: CpuOps) -> tuple[Any, tuple[int, int, int]]:
    g = _C.Graph(ops.machine)
    return g, (g.bind(64), 0, 64)


Record = Callable[[Any, tuple[int, int, int], CpuOps], Any]
WEIGHT = _C.Weight([("Q4_1", 20)], 64)
FLOAT = _C.Weight([("F16", 20)], 64)
LAYER = _C.KVLayer("float16", 4, 16, 2, 16, 0)


@pytest.mark.parametrize(
    "record",
    [
        lambda g, x, _: g.linear((0, 0, 63), WEIGHT, None),
        lambda g, x, _: g.linear((0, 1, 64), WEIGHT, None),
        lambda g, x, _: g.linear((0, 2**64 - 1, 64), WEIGHT, None),
        lambda g, x, _: g.linear((1, 0, 64), WEIGHT, None),
        lambda g, x, _: g.linear((-1, 0, 64), WEIGHT, None),
        lambda g, x, _: g.linear((99, 0, 64), WEIGHT, None),
        lambda g, x, _: g.linear(x, WEIGHT, x),
        lambda g, x, _: g.linear((g.bind(65), 1, 64), FLOAT, None),
        lambda g, x, _: g.linear(x, WEIGHT, (g.bind(30), 0, 20)),
        lambda g, x, _: g.rms_norm(x, np.ones(63, F32), 1e-5, None),
        lambda g, x, _: g.rms_norm(x, np.ones(0, F32), 1e-5, None),
        lambda g, x, _: g.rms_norm((0, 0, 0), np.ones(1, F32), 1e-5, None),
        lambda g, x, _: g.rms_norm(x, np.ones(64, F32), 1e-5, (0, 0, 32)),
        lambda g, x, _: g.rope(x, 0, 0, np.ones(0, F32)),
        lambda g, x, _: g.rope(x, 48, 48, np.ones(24, F32)),
        lambda g, x, _: g.rope(x, 16, 32, np.ones(16, F32)),
        lambda g, x, _: g.rope(x, 16, 16, np.ones(7, F32)),
        lambda g, x, _: g.gated((0, 0, 63), "silu"),
        lambda g, x, _: g.gated((0, 0, 0), "silu"),
        lambda g, x, _: g.gated(x, "tanh"),
        lambda g, x, _: g.store_kv(x, x, LAYER),
        lambda g, x, _: g.store_kv((0, 0, 32), (5, 0, 32), LAYER),
        lambda g, x, _: g.attention((0, 0, 48), LAYER, 1.0),
        lambda g, x, _: g.attention((0, 0, 0), LAYER, 1.0),
        lambda g, x, _: g.attention((g.bind(65 * 32), 0, 65 * 32), LAYER, 1.0),
        lambda g, x, _: g.embed(_C.Weight([("Q4_1", 4), ("F16", 4)], 64), 1.0),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(ops: CpuOps, record: Record) -> None:
    g, x = graph(ops)
    with pytest.raises(ValueError, match=r"\w"):
        record(g, x, ops)


@pytest.mark.parametrize(
    "make",
    [
        lambda: _C.Weight([], 32),
        lambda: _C.Weight([("Q4_1", 0)], 32),
        lambda: _C.Weight([("Q4_1", 1)], 0),
        lambda: _C.Weight([("Q4_1", 1)], 33),
        lambda: _C.Weight([("Q4_K", 1)], 32),
        lambda: _C.Weight([("IQ1_S", 1)], 256),
        lambda: _C.KVLayer("float16", 1, 1, 1, 16, 0),
        lambda: _C.KVLayer("float16", 1, 128, 1, 16, 0),
        lambda: _C.KVLayer("float16", 1, 16, 1, 24, 0),
        lambda: _C.KVLayer("float16", 1, 16, 1, 2048, 0),
        lambda: _C.KVLayer("float16", 1, 16, 0, 16, 0),
        lambda: _C.KVLayer("float16", 1, 16, 1, 16, -1),
        lambda: _C.KVLayer("bfloat16", 1, 16, 1, 16, 0),
        lambda: _C.panel_bytes("Q9", 32),
    ],
)
def test_sizes_that_do_not_fit(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        make()


def test_packing_outside(ops: CpuOps) -> None:
    weight = _C.Weight([("Q4_1", 20)], 64)
    rows = random_tensor("Q4_1", 4, 64).data
    for part, data, at, error in (
        (1, rows, 0, IndexError),
        (0, rows, 17, ValueError),
        (0, rows, 2**64 - 1, ValueError),
        (0, np.ascontiguousarray(rows[:, 1:]), 0, ValueError),
        (0, np.repeat(rows, 2, axis=1)[:, ::2], 0, TypeError),
        (0, rows.view(np.int8), 0, TypeError),
    ):
        with pytest.raises(error):
            _C.pack(ops.machine, [(weight, part, data, None, at)])
    for order, at, error in (([4], 0, IndexError), ([-1], 0, IndexError), ([0] * 4, 17, ValueError)):
        with pytest.raises(error):
            _C.pack(ops.machine, [(weight, 0, rows, np.array(order), at)])
    with pytest.raises(ValueError, match="nothing was packed"):
        weight.unpack(0, 0, np.empty((1, 64), F32))
    _C.pack(ops.machine, [(weight, 0, rows, None, 0)])
    for part, first, shape, error in ((1, 0, (1, 64), IndexError), (0, 20, (1, 64), ValueError)):
        with pytest.raises(error):
            weight.unpack(part, first, np.empty(shape, F32))
    with pytest.raises(TypeError):
        weight.unpack(0, 0, np.empty((1, 64)))
    for first, shape in ((2**64 - 1, (2, 64)), (0, (1, 63)), (0, (21, 64))):
        with pytest.raises(ValueError, match="shape"):
            weight.unpack(0, first, np.empty(shape, F32))


def test_weights_that_were_never_packed(ops: CpuOps) -> None:
    """They have no memory: guards against reading from there."""
    weight = CpuWeight(_C.Weight([("Q4_1", 20)], 64), (20,))
    x = ops.from_numpy(np.ones((3, 64), F32))
    with pytest.raises(ValueError, match="a weight was never packed"):
        ops.linear(x, weight)
    _C.pack(ops.machine, [(weight.packed, 0, random_tensor("Q4_1", 20, 64).data, None, 0)])
    assert ops.linear(x, weight).columns == 20


@pytest.mark.parametrize("size", [0, 19, 21, 32])
def test_biases_of_another_size(size: int) -> None:
    if size == 0:
        assert _C.Weight([("Q4_1", 20)], 64, np.empty(0, F32)).outputs == 20  # none
        return
    with pytest.raises(ValueError, match="a bias has a number for each output"):
        _C.Weight([("Q4_1", 20)], 64, np.ones(size, F32))


def test_nothing_where_something_is_wanted(ops: CpuOps) -> None:
    """None is a null pointer to C++."""
    rows = random_tensor("Q4_1", 4, 64).data
    g, x = graph(ops)
    for call in (
        lambda: _C.pack(ops.machine, [(None, 0, rows, None, 0)]),
        lambda: g.linear(x, None, None),
        lambda: g.embed(None, 1.0),
        lambda: g.store_kv(x, x, None),
        lambda: g.attention(x, None, 1.0),
        lambda: _C.Graph(None),
        lambda: _C.pack(None, []),
        lambda: g.run(None, None, None, 3),
        lambda: _C.sample(None, np.zeros((1, 3), F32), []),
        lambda: _C.sample(ops.machine, np.zeros((1, 3), F32), [(0, 0, "sample", None)]),
        lambda: _C.sample(ops.machine, np.zeros((1, 3), F32), [None]),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()


def test_another_thread_changes_what_is_read(ops: CpuOps) -> None:
    """The metadata of a batch, the order of rows and rows of logits, while the kernels read them without the
    interpreter: the result is of what was checked, and nothing is read or written outside."""
    paged = Paged(ops, [20, 5])
    batch = paged.batch([(0, 3, 20), (1, 4, 5)])
    q = ops.from_numpy(array(18, 4, 16))
    expected = ops.to_numpy(ops.attention(q, ops.prepare(batch), paged.kv, 1.0)).tobytes()
    good = [getattr(batch, name).copy() for name in METADATA]
    weight, rows = _C.Weight([("Q4_1", 400)], 64), random_tensor("Q4_1", 400, 64).data
    order = np.arange(400)
    logits = array(2, 50_000)
    ends = threading.Event()

    def change() -> None:
        while not ends.is_set():
            for value in (np.nan, np.inf, -np.inf, 0.0):
                logits[0] = value
            logits[1] = logits[1, ::-1].copy()
            for name in METADATA:
                getattr(batch, name)[...] = 2**31 - 1
            order[...] = 2**60
            for name, values in zip(METADATA, good, strict=True):
                getattr(batch, name)[...] = values
            order[...] = np.arange(400)

    thread = threading.Thread(target=change)
    thread.start()
    done = Counter[str]()
    try:
        while done["run"] < 200 or done["packed"] < 50 or done["drawn"] < 50:
            with suppress(ValueError, IndexError):
                assert ops.to_numpy(ops.attention(q, ops.prepare(batch), paged.kv, 1.0)).tobytes() == expected
                done["run"] += 1
            with suppress(ValueError, IndexError):
                _C.pack(ops.machine, [(weight, 0, rows, order, 0)])
                done["packed"] += 1
            with suppress(ValueError, IndexError):
                for answer in _C.sample(ops.machine, logits, WANTS):
                    if isinstance(answer, tuple):
                        assert all(0 <= token < 50_000 for token in answer[0])
                        done["drawn"] += 1
            done["all"] += 1
    finally:
        ends.set()
        thread.join()


# Of both rows: draws with and without filters and processors, candidates, scores, log-probabilities.
WANTS = [
    (row, 5, kind, want)
    for row in (0, 1)
    for kind, want in (
        ("sample", [(1.0, k, p, 0.0, 1, (0,), 3, None) for k, p in ((40, 0.9), (0, 0.9), (0, 1.0))]),
        ("sample", [(0.0, 0, 1.0, 0.0, 1, (), None, ((), (7,), (), (1.0, 0.0, 0.0), (), (), (), 0, b"\xff" * 9))]),
        ("top_k", (9, None, None)),
        ("score", [(1, 2)]),
        ("next_logprobs", (7, 4)),
    )
]
METADATA = ("input_ids", "positions", "query_start_loc", "block_tables", "slot_mapping")


def test_a_graph_that_runs_is_not_recorded_on(ops: CpuOps) -> None:
    """Two threads run it, one after the other; a third records."""
    g, x = graph(ops)
    out = g.rms_norm(x, np.ones(64, F32), 1e-5, None)
    for _ in range(200):
        out = g.rms_norm((out, 0, 64), np.ones(64, F32), 1e-5, None)
    values = array(300, 64)
    expected = np.zeros((300, 64), F32)
    g.run([x[0], out], [values, expected], None, 300)
    failed: list[BaseException] = []
    left = threading.Semaphore(2)

    def run() -> None:
        try:
            for _ in range(20):
                result = np.zeros((300, 64), F32)
                g.run([x[0], out], [values, result], None, 300)
                assert result.tobytes() == expected.tobytes()
        except BaseException as error:
            failed.append(error)
        finally:
            left.acquire()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    while left._value:
        # What does not change what is run: views that are refused. While a run is under way even that is not looked at.
        with pytest.raises((ValueError, RuntimeError)):
            g.rms_norm((9999, 0, 64), np.ones(64, F32), 1e-5, None)
    for thread in threads:
        thread.join()
    assert not failed


def test_blocks_outside(ops: CpuOps) -> None:
    for source, target in ((4, 0), (0, 4), (2**63, 0)):
        with pytest.raises(IndexError, match="no such block"):
            LAYER.copy_block(source, target)
    with pytest.raises(TypeError):
        LAYER.copy_block(-1, 0)


def test_runs_with_the_wrong_buffers(ops: CpuOps) -> None:
    """Guards against writing through a pointer that was never given."""
    g, x = graph(ops)
    out = g.rms_norm(x, np.ones(64, F32), 1e-5, None)
    a = np.zeros((3, 64), F32)
    g.run([x[0], out], [a, a.copy()], None, 3)
    for ids, arrays in (
        ([], []),
        ([out], [a]),
        ([x[0]], [a]),
        ([out, x[0]], [a, a.copy()]),
        ([x[0], out], [a]),
        ([x[0], out, out], [a, a, a]),
        ([x[0], out], [a[:2], a]),
        ([x[0], out], [a, np.zeros((3, 63), F32)]),
        ([x[0], -1], [a, a]),
    ):
        with pytest.raises(ValueError, match="run:"):
            g.run(ids, arrays, None, 3)
    for bad in (a.astype(np.float64), a[:, ::2], a[0]):
        with pytest.raises(TypeError):
            g.run([x[0], out], [bad, a], None, 3)
    frozen = a.copy()
    frozen.flags.writeable = False
    with pytest.raises(TypeError):
        g.run([x[0], out], [a, frozen], None, 3)


# --- batches ---


def test_batches_that_point_nowhere(ops: CpuOps) -> None:
    """Token ids, slots, positions, row ranges and blocks out of range, and metadata that is missing."""
    paged = Paged(ops, [20, 5])
    good = paged.batch([(0, 3, 20), (1, 4, 5)])
    q = ops.from_numpy(array(18, 4, 16))
    ops.attention(q, ops.prepare(good), paged.kv, 1.0)
    table = good.block_tables.copy()
    table[0, 1] = 4 + 2
    negative = good.block_tables.copy()
    negative[0, 0] = -1

    def changed(values: Any, at: int, value: int) -> Any:
        values = values.copy()
        values[at] = value
        return values

    starts, positions, slots = good.query_start_loc, good.positions, good.slot_mapping
    for batch in (
        replace(good, block_tables=table),
        replace(good, block_tables=negative),
        replace(good, block_tables=good.block_tables[:1]),
        replace(good, block_tables=np.ascontiguousarray(good.block_tables[:, :1])),
        replace(good, positions=changed(positions, 0, -1)),
        replace(good, positions=changed(positions, 3, 2**31 - 1)),
        replace(good, positions=positions[:3]),
        replace(good, slot_mapping=changed(slots, 0, -1)),
        replace(good, slot_mapping=changed(slots, 5, 5 * 16)),
        replace(good, query_start_loc=changed(starts, 0, 1)),
        replace(good, query_start_loc=changed(starts, 1, -4)),
        replace(good, query_start_loc=changed(starts, 1, 19)),
        replace(good, query_start_loc=changed(starts, 2, 17)),
        replace(good, query_start_loc=starts[:2]),
    ):
        with pytest.raises(ValueError, match=r"(run|prepare):"):
            ops.attention(q, ops.prepare(batch), paged.kv, 1.0)
    weight = ops.embedding_weight(random_tensor("Q4_1", 20, 64))
    for token in (-1, 20, 2**31 - 1):
        with pytest.raises(ValueError, match=r"(run|prepare):"):
            ops.embed(ops.prepare(replace(good, input_ids=changed(good.input_ids, 2, token))), weight)
    with pytest.raises(ValueError, match="run:"):  # blocks of another size than the layer's
        ops.attention(q, ops.prepare(replace(good, block_size=32)), paged.kv, 1.0)
    with pytest.raises(ValueError, match="run:"):  # rows of another batch
        ops.attention(q, ops.prepare(paged.batch([(0, 3, 20)])), paged.kv, 1.0)
    g, x = graph(ops)
    out = g.rope(x, 16, 16, np.ones(8, F32))
    with pytest.raises(ValueError, match="run:"):
        g.run([x[0], out], [np.zeros((3, 64), F32), np.zeros((3, 64), F32)], None, 3)
    with pytest.raises(TypeError):
        ops.prepare(replace(good, positions=positions.astype(np.int64)))
    with pytest.raises(TypeError):
        ops.prepare(replace(good, positions=None))  # type: ignore[arg-type]


def test_recorded_arrays_have_no_values(ops: CpuOps) -> None:
    weight = ops.embedding_weight(random_tensor("Q4_1", 20, 64))
    with pytest.raises(RuntimeError, match="recording"):
        ops.capture(lambda batch: iter([ops.take_rows(ops.embed(batch, weight), np.array([0], np.int32))]))
    with pytest.raises(ValueError, match="run:"):  # what comes back must be what the last op made

        def first_of_two(batch: Any) -> Any:
            x = ops.embed(batch, weight)
            ops.rms_norm(x, np.ones(64, F32), 1e-5)
            yield x

        paged = Paged(ops, [5])
        ops.capture(first_of_two)(ops.prepare(paged.batch([(0, 0, 5)])))
    batch = ops.prepare(Paged(ops, [5]).batch([(0, 0, 5)]))
    assert ops.to_numpy(ops.embed(batch, weight)).shape == (5, 64), "works after a failed recording"


def test_rows_of_a_recording_that_are_not_there(ops: CpuOps) -> None:
    """Guards against copying from outside a buffer, or to outside the result."""
    weight = ops.embedding_weight(random_tensor("Q4_1", 20, 64))
    recorded = ops.capture(lambda batch: iter([ops.embed(batch, weight)]))
    batch = ops.prepare(Paged(ops, [5]).batch([(0, 0, 5)]))
    with pytest.raises(IndexError):
        recorded(batch, {1: np.array([0], np.int32)})
    for rows in ([5], [-1], [0, 2**31 - 1]):
        with pytest.raises(ValueError, match="no such row"):
            recorded(batch, {0: np.array(rows, np.int32)})
    with pytest.raises(TypeError):
        recorded(batch, {0: np.array([0])})  # int64
    g, x = graph(ops)
    out = g.rms_norm(x, np.ones(64, F32), 1e-5, None)
    a, rows = np.zeros((3, 64), F32), np.array([1], np.int32)
    for view, into in (
        (x, np.zeros((1, 64), F32)),  # nothing that an op made
        ((out, 0, 64), np.zeros((2, 64), F32)),
        ((out, 0, 64), np.zeros((1, 63), F32)),
        ((out, 1, 64), np.zeros((1, 64), F32)),
        ((-1, 0, 64), np.zeros((1, 64), F32)),
    ):
        with pytest.raises(ValueError, match=r"run:|a view"):
            g.run([x[0], out], [a, a.copy()], None, 3, [(view, rows, into)])


# --- the process ---


@pytest.mark.slow  # another program that imports PyTorch
def test_float_mode_of_the_host() -> None:
    """A host program may flush denormals to zero or round otherwise; results stay, and so does its mode. Guards against
    bits that depend on the caller's MXCSR, on its thread or on the pool's."""
    pytest.importorskip("torch")
    code = """
import numpy as np, torch
from octavo.backends.cpu import CpuOps
from tests.backends.cpu.harness import array, random_tensor, run_linear
ops = CpuOps(threads=2)
tiny = random_tensor("F32", 300, 64)
x = array(9, 64) * np.float32(1e-38)
weight = ops.linear_weight([tiny])
before = run_linear(ops, weight, x)
assert ((np.abs(before) < 1.1e-38) & (before != 0)).any()
assert torch.set_flush_denormal(True)
assert torch.tensor([1e-40]).mul(1.0).item() == 0.0
assert run_linear(ops, weight, x).tobytes() == before.tobytes()
assert run_linear(CpuOps(threads=3), weight, x).tobytes() == before.tobytes(), "threads inherit the mode"
assert torch.tensor([1e-40]).mul(1.0).item() == 0.0, "the mode of the host is kept"
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def test_available_processors() -> None:
    assert 1 <= available_processors() <= (os.cpu_count() or 1)
    assert CpuOps(threads=5).machine.threads == 5
