"""The pool of threads inside other people's programs: forks, threads, several engines, and idleness."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import LLM, SamplingParams
from octavo.backends.cpu import CpuOps
from octavo.core.errors import EngineClosedError
from tests.backends.cpu.harness import Floats, array, bits_equal, random_tensor, run_linear
from tests.invariance.harness import prompt
from tests.pace import held

X = array(8, 256)
TENSOR = random_tensor("Q4_1", 640, 256)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def compute(ops: CpuOps, weight: Any) -> Floats:
    """Enough outputs for every thread to have several pieces."""
    return run_linear(ops, weight, X)


def in_fork(work: Callable[[], None], seconds: float = 120) -> None:
    """Runs `work` in a forked child, which must end well by itself and in time."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    wait_for(pid, seconds)


def wait_for(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


@pytest.fixture(params=[2, 3])
def ops(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(threads=request.param)


def test_fork_after_the_pool_ran(ops: CpuOps) -> None:
    """The child has none of the parent's threads: it must start its own, and not wait for those. Twice, and a fork of
    the fork."""
    weight = ops.linear_weight([TENSOR])
    expected = compute(ops, weight)

    def work() -> None:
        for _ in range(3):
            bits_equal(compute(ops, weight), expected)
        in_fork(lambda: bits_equal(compute(ops, weight), expected))
        bits_equal(compute(ops, weight), expected)
        other = CpuOps(threads=2)
        bits_equal(compute(other, other.linear_weight([TENSOR])), expected)
        del other

    for _ in range(2):
        in_fork(work)
        bits_equal(compute(ops, weight), expected)


def test_fork_before_the_pool_ran(ops: CpuOps) -> None:
    """A pool that was made and never used may start in parent and child."""
    weight = CpuOps(threads=1).linear_weight([TENSOR])
    expected = compute(CpuOps(threads=1), weight)
    in_fork(lambda: bits_equal(compute(ops, weight), expected))
    bits_equal(compute(ops, weight), expected)


def test_fork_while_another_thread_computes(ops: CpuOps) -> None:
    """Guards against a lock that the other thread holds at that moment, and that nobody in the child will ever open,
    and against a graph caught half way."""
    weight = ops.linear_weight([TENSOR])
    expected = compute(ops, weight)
    stop = threading.Event()
    rounds = 0

    def busy() -> None:
        nonlocal rounds
        while not stop.is_set():
            bits_equal(compute(ops, weight), expected)
            rounds += 1

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(8):
            in_fork(lambda: bits_equal(compute(ops, weight), expected))
    finally:
        stop.set()
        thread.join()
    assert rounds > 40


def child(queue: Any, ops: CpuOps, weight: Any) -> None:
    queue.put(compute(ops, weight))


def test_multiprocessing(ops: CpuOps) -> None:
    """Children end by themselves: guards against a pool whose end waits for threads that are not there."""
    weight = ops.linear_weight([TENSOR])
    expected = compute(ops, weight)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=child, args=(queue, ops, weight)) for _ in range(3)]
    for process in children:
        process.start()
    for _ in children:
        bits_equal(queue.get(timeout=30), expected)
    for process in children:
        process.join(30)
        assert process.exitcode == 0


# --- the host's floating-point mode ---


@pytest.mark.skipif(platform.machine() != "x86_64", reason="modes are numbered for x86-64")
@pytest.mark.parametrize("threads", [1, 3])
def test_the_hosts_rounding_mode_does_not_matter(threads: int) -> None:
    """A host program may round upward: the results are those of rounding to nearest, also of threads that are started
    meanwhile, and the program's own mode is left as it was."""
    library, upward = ctypes.CDLL("libm.so.6"), 0x800
    weights = [CpuOps(threads=1).linear_weight([random_tensor(name, 640, 256)]) for name in ("Q4_1", "F32")]
    expected = [compute(CpuOps(threads=1), weight) for weight in weights]
    ops = CpuOps(threads=threads)
    assert library.fesetround(upward) == 0
    try:
        found = [compute(ops, weight) for weight in weights]
        mode = library.fegetround()
    finally:
        library.fesetround(0)
    assert mode == upward
    for one, other in zip(found, expected, strict=True):
        bits_equal(one, other)


# --- threads of the host ---


def test_threads_of_the_host(ops: CpuOps) -> None:
    """Many threads on one machine and its graphs: each gets its own result."""
    weight = ops.linear_weight([TENSOR])
    inputs = [array(1 + i % 9, 256, seed=i) for i in range(6)]
    expected = [run_linear(ops, weight, x) for x in inputs]
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(60):
                bits_equal(run_linear(ops, weight, inputs[i]), expected[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads)


def test_one_recording_in_many_threads(ops: CpuOps) -> None:
    """Runs of one graph take turns: guards against two batches in one arena."""
    from tests.backends.batches import ragged

    table, weight = (ops.linear_weight([random_tensor("Q8_0", n, 256)]) for n in (50, 256))

    def two_layers(batch: Any) -> Any:
        x = ops.embed(batch, table)
        yield ops.linear(ops.rms_norm(x, np.ones(256, np.float32), 1e-5), weight, x)

    recorded = ops.capture(two_layers)
    batches = [ops.prepare(ragged([(0, n)], seed=n)[0]) for n in (1, 40, 3, 17)]
    expected = [ops.to_numpy(next(two_layers(batch))) for batch in batches]
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(100):
                bits_equal(ops.to_numpy(recorded(batches[i])[0]), expected[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_python_goes_on_while_an_op_runs() -> None:
    """The GIL is released: another thread gets it although nobody takes it from the one that computes."""
    ops = CpuOps(threads=1)
    weight = ops.linear_weight([random_tensor("F32", 4096, 1024)])
    x = ops.from_numpy(array(64, 1024))
    in_op, seen, interval = False, threading.Event(), sys.getswitchinterval()

    def look() -> None:
        while not seen.is_set():
            if in_op:
                seen.set()
            time.sleep(0)

    thread = threading.Thread(target=look, daemon=True)
    try:
        thread.start()
        sys.setswitchinterval(1000)  # seconds for which a thread that wants the GIL leaves it to who has it
        for _ in range(5000):
            in_op = True
            ops.linear(x, weight)
            in_op = False
            if seen.is_set():
                break
        assert seen.is_set()
    finally:
        sys.setswitchinterval(interval)
        seen.set()


# --- regions of the pool ---


def test_many_short_regions() -> None:
    """Thousands of regions of a few microseconds, with more threads than processors: workers are late all the time.
    Guards against a late worker that takes a piece of the wrong region, or that the caller does not wait for."""
    for threads in (2, 3, 8):
        ops = CpuOps(threads=threads)
        parts = [random_tensor("Q4_1", outputs, 64, seed=outputs) for outputs in (33, 160, 48)]
        weights = [ops.linear_weight([part]) for part in parts]
        inputs = [array(rows, 64, seed=rows) for rows in (1, 5, 9, 40)]
        one = CpuOps(threads=1)
        expected = [run_linear(one, weight, x) for weight in weights for x in inputs]
        for number in range(60):
            got = [run_linear(ops, weight, x) for weight in weights for x in inputs]
            for ours, theirs in zip(got, expected, strict=True):
                bits_equal(ours, theirs, f"{threads} threads, round {number}")


def test_idle_costs_nothing(ops: CpuOps) -> None:
    """Workers sleep soon after the last op, and then use no processor at all."""
    before = {task.name for task in Path("/proc/self/task").iterdir()}
    weight = ops.linear_weight([TENSOR])
    compute(ops, weight)
    workers = [task for task in Path("/proc/self/task").iterdir() if task.name not in before] or [
        task for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()
    ]
    assert workers

    def used() -> list[tuple[str, str, str]]:
        """Of each worker: its state, and the processor time it has used, in ticks."""
        fields = [(task / "stat").read_text().rpartition(")")[2].split() for task in workers]
        return [(field[0], field[11], field[12]) for field in fields]

    for _ in range(6000):
        first = used()
        time.sleep(0.1)
        if all(state == "S" for state, _, _ in first) and used() == first:
            return
    pytest.fail(f"they go on: {used()}")


def test_threads_end_with_the_pool() -> None:
    """Guards against threads that outlive their engine."""

    def count() -> int:
        return sum(1 for _ in Path("/proc/self/task").iterdir())

    before = count()
    for _ in range(20):
        ops = CpuOps(threads=3)
        compute(ops, ops.linear_weight([TENSOR]))
        assert count() == before + 2
        del ops
        for _ in range(6000):
            if count() == before:
                break
            time.sleep(0.01)
        assert count() == before


# --- engines ---


@pytest.fixture(scope="module")
def llm(tiny_gemma3_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_gemma3_dir), backend="cpu", threads=2, max_model_len=128) as llm:
        yield llm


def answer(llm: LLM, seed: int = 1) -> list[int]:
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, detokenize=False)
    token_ids = prompt(30, llm.model_config.vocab_size, seed=seed)
    (output,) = llm.generate([{"prompt_token_ids": token_ids}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def test_engine_after_a_fork(llm: LLM) -> None:
    expected = answer(llm)

    def work() -> None:
        assert answer(llm) == expected
        assert answer(llm, seed=2) != expected

    in_fork(work)
    assert answer(llm) == expected


def test_engine_after_a_fork_in_the_middle_of_its_work(llm: LLM) -> None:
    """Guards a child that inherits an engine half way through a step, or waits for an answer that the parent gets."""
    expected = answer(llm)
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, detokenize=False)
    session = llm.session(seed=3)
    session.extend("one two three")
    forked = 0
    for output in llm.stream({"prompt_token_ids": prompt(30, llm.model_config.vocab_size, seed=1)}, params):
        if forked < 20 and not output.finished:
            forked += 1
            others = threading.Thread(target=answer, args=(llm, forked))
            others.start()

            def work() -> None:
                assert answer(llm) == expected
                assert len(session.generate(max_tokens=3, ignore_eos=True).token_ids) == 3
                assert llm._engine.num_requests == 1, "the session"

            in_fork(work)
            others.join()
    assert forked == 20
    assert list(output.outputs[0].token_ids[:12]) == expected
    session.close()


def test_a_stream_in_the_child_of_a_fork_says_so(llm: LLM) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    stream = llm.stream({"prompt_token_ids": [5, 6, 7]}, params)
    forked = threading.Event()

    def work() -> None:
        with pytest.raises(EngineClosedError, match="forked"):
            list(stream)

    with held(llm._engine, forked.is_set, after=3):  # it is not over before the fork
        next(stream)
        in_fork(work)
        forked.set()
        assert list(stream)[-1].finished


def test_two_engines_at_once(llm: LLM, tiny_gemma3_dir: Path) -> None:
    """In two threads, each with a pool of its own."""
    expected = [answer(llm, seed) for seed in range(5)]
    with LLM(str(tiny_gemma3_dir), backend="cpu", threads=3, max_model_len=128) as other:
        results: dict[int, list[list[int]]] = {}

        def work(index: int, engine: LLM) -> None:
            results[index] = [answer(engine, seed) for seed in range(5)]

        threads = [threading.Thread(target=work, args=item) for item in enumerate((llm, other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert results == {0: expected, 1: expected}
