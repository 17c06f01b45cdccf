"""Writing in the Margins beside what it meets: other types of KV, windows, files, priority, forks of the process,
callers who go away. Each answer is that of the same request alone."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, BeamSearchParams, EngineClosedError, ReviewBegun, SamplingParams
from octavo.core.events import EventKind
from tests.heads import save_random_head
from tests.pace import held
from tests.test_margins import SETTINGS, a_document, facts, reading

DOCUMENTS = [a_document(seed, 14) for seed in range(3)]
QUESTIONS: list[Any] = ["What is the whale?", ["Who is old?", "Where is the sea?"], "Is it far?"]
KINDS = ["score", "text", "merged"]


def ask(llm: LLM, number: int, **given: Any) -> Any:
    return facts(llm.margins(DOCUMENTS[number], QUESTIONS[number], reading(classification=KINDS[number]), **given))


def together(*works: Callable[[], None]) -> None:
    """Each on a thread of its own; what one raises is raised."""
    failed: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def check_home(llm: LLM) -> None:
    llm._loop.ask(lambda engine: None).result()
    assert llm._engine.num_requests == 0 and llm._engine.kv.num_available == llm._engine.kv.num_blocks


def gave_way(llm: LLM) -> int:
    """How often somebody lost blocks to others."""
    return len(llm._engine.events.of(EventKind.PREEMPTED)) + len(llm._engine.events.of(EventKind.EVICTED))


def scarce(llm: LLM, num_tokens: int) -> dict[str, Any]:
    """Settings of an engine that holds so many tokens, and no longer request."""
    blocks = num_tokens // llm.config.block_size + 1
    return {"max_model_len": num_tokens, "kv_cache_memory_bytes": blocks * llm.memory_plan.block_bytes}


@contextmanager
def occupied(llm: LLM, num_tokens: int) -> Iterator[None]:
    """An idle session holds KV of so many tokens until others need the room: so somebody gives way, whoever is fast."""
    with llm.session() as session:
        session.extend({"prompt_token_ids": [7 + number % 40 for number in range(num_tokens)]})
        yield


@pytest.fixture(params=["llama", "gemma3"])
def folder(request: pytest.FixtureRequest, tiny_dir: Path, tiny_gemma3_dir: Path) -> Path:
    """Gemma 3's layers see a window of 16 tokens but for one."""
    return tiny_dir if request.param == "llama" else tiny_gemma3_dir


@pytest.mark.parametrize("kv_cache_dtype", ["float16", "int8", "float32"])
def test_types_of_kv_windows_of_layers_beams_and_samples(folder: Path, kv_cache_dtype: str) -> None:
    """In a pool that holds one context, beside a search, samples and a session."""
    settings = SETTINGS | {"kv_cache_dtype": kv_cache_dtype, "max_model_len": 1024}
    search = BeamSearchParams(beam_width=3, max_tokens=8)
    drawn = SamplingParams(n=3, max_tokens=12, seed=3, ignore_eos=True)
    with LLM(str(folder), **settings) as llm:
        alone = [ask(llm, number) for number in range(3)]
        beams = [output.token_ids for output in llm.beam_search("The whale", search)[0].outputs]
        samples = [output.token_ids for output in llm.generate("The sea", drawn)[0].outputs]
        settings |= scarce(llm, 1024)
    with LLM(str(folder), **settings) as llm:
        got: dict[Any, Any] = {}

        def read(number: int) -> None:
            got[number] = ask(llm, number)

        def search_and_draw() -> None:
            found, outputs = llm.beam_search("The whale", search)[0], llm.generate("The sea", drawn)[0]
            got["beams"] = [output.token_ids for output in found.outputs]
            got["samples"] = [output.token_ids for output in outputs.outputs]

        readers = [lambda number=number: read(number) for number in range(3)]
        with held(llm._engine, lambda: llm._engine.num_requests >= 4):
            together(*readers, search_and_draw)  # type: ignore[arg-type]
        assert [got[number] for number in range(3)] == alone
        assert (got["beams"], got["samples"]) == (beams, samples)
        assert gave_way(llm), "the pool was large enough for all"
        check_home(llm)


def test_blocks_in_files_and_restarts(tiny_dir: Path, tmp_path: Path) -> None:
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        alone = [ask(llm, number) for number in range(3)]
        settings = SETTINGS | scarce(llm, 1200) | {"kv_offload_dir": str(tmp_path / "kv")}
    for _ in range(3):
        with LLM(str(tiny_dir), **settings) as llm:
            got: dict[int, Any] = {}
            works = [lambda number=number: got.update({number: ask(llm, number)}) for number in range(3)]  # noqa: B023
            together(*works)  # type: ignore[arg-type]
            assert [got[number] for number in range(3)] == alone
            check_home(llm)


def test_priority(tiny_dir: Path) -> None:
    """An unimportant reading gives way to whoever comes, and ends as it would have alone."""
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        alone = ask(llm, 1)
        settings = SETTINGS | scarce(llm, 1400) | {"scheduling_policy": "priority"}
    with LLM(str(tiny_dir), **settings) as llm:
        got: list[Any] = []
        urgent = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)

        def press() -> None:
            for number in range(6):
                llm.generate(["sea " * 150 + str(number)] * 2, urgent, priority=-1)

        together(lambda: got.append(ask(llm, 1, priority=5)), press)
        assert got == [alone]
        check_home(llm)


@pytest.mark.parametrize("seed", range(4))
def test_callers_who_go_away(tiny_dir: Path, seed: int) -> None:
    """At any event of their readings; the others hear nothing of it, and no block is lost."""
    rng = random.Random(seed)
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        alone = [ask(llm, number) for number in range(3)]
        settings = SETTINGS | scarce(llm, 1200)
    with LLM(str(tiny_dir), **settings) as llm:
        got: dict[int, Any] = {}
        counts = [[rng.randint(0, 30) for _ in range(5)] for _ in range(2)]

        def leave(events: list[int]) -> None:
            for number, count in enumerate(events):
                params = reading(classification=KINDS[number % 3], review=number % 2 == 1)
                with llm.stream_margins(DOCUMENTS[number % 3], ["Who?", "Where?"], params) as run:
                    for _, event in zip(range(count), run, strict=False):
                        if isinstance(event, ReviewBegun):
                            break  # nobody judges: it would wait for ever

        works: list[Callable[[], None]] = [lambda events=events: leave(events) for events in counts]  # type: ignore[misc]
        works += [lambda number=number: got.update({number: ask(llm, number)}) for number in range(3)]  # type: ignore[misc]
        together(*works)
        assert [got[number] for number in range(3)] == alone
        check_home(llm)


@pytest.mark.parametrize("method", ["suffix", "draft_model", "draft_head"])
def test_guessed_tokens(folder: Path, method: str, tmp_path: Path) -> None:
    """Notes, verdicts and answers are those drawn token by token: in a pool too small, from files, with callers who
    leave."""
    config = {"method": method, "num_speculative_tokens": 4, "adaptive": False}
    config |= {"model": str(folder)} if method == "draft_model" else {}
    if method == "draft_head":
        config["model"] = str(save_random_head(tmp_path / "head.safetensors", folder))
    plain = SETTINGS | {"max_model_len": 1024}
    with LLM(str(folder), **plain) as llm:
        alone = [ask(llm, number) for number in range(3)]
    with LLM(str(folder), **plain, speculative_config=config) as llm:
        settings = SETTINGS | scarce(llm, 1024) | {"kv_offload_dir": str(tmp_path / "kv"), "speculative_config": config}
    with LLM(str(folder), **settings) as llm:
        got: dict[int, Any] = {}

        def leave() -> None:
            for count in (3, 9, 17):
                with llm.stream_margins(DOCUMENTS[0], "Who?", reading()) as run:
                    for _ in zip(range(count), run, strict=False):
                        pass

        works: list[Callable[[], None]] = [
            lambda number=number: got.update({number: ask(llm, number)}) for number in range(3)
        ]  # type: ignore[misc]
        with occupied(llm, 600):
            together(leave, *works)
        assert [got[number] for number in range(3)] == alone
        assert gave_way(llm)
        stats = llm.speculation_stats
        assert stats is not None and stats.num_draft_tokens > 20
        # What a random model writes does not repeat, and a random head knows nothing.
        assert method != "draft_model" or stats.num_accepted_tokens > 20
        check_home(llm)


@pytest.fixture
def llm(tiny_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        yield llm


def test_a_fork_of_the_process(llm: LLM, tiny_dir: Path) -> None:
    """The reading goes on in the parent, and is ended in the child, which can begin others. A second engine beside it
    is not touched."""
    with LLM(str(tiny_dir), **SETTINGS) as other:
        alone, elsewhere = ask(llm, 0), ask(other, 1)
        forked: list[int] = []
        with held(llm._engine, lambda: bool(forked), after=20):
            run = llm.stream_margins(DOCUMENTS[0], QUESTIONS[0], reading(classification=KINDS[0]))
            for _ in range(3):
                next(run)
            child = os.fork()
            forked.append(child)
        if child == 0:
            code = 1
            try:
                with pytest.raises(EngineClosedError):
                    run.result()
                if ask(llm, 0) == alone and ask(other, 1) == elsewhere:
                    check_home(llm)
                    code = 0
            finally:
                os._exit(code)
        assert facts(run.result()) == alone
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        check_home(llm)


def test_an_engine_that_closes(tiny_dir: Path) -> None:
    for events in (1, 4, 9):
        llm = LLM(str(tiny_dir), **SETTINGS)
        run = llm.stream_margins(DOCUMENTS[0], QUESTIONS[0], reading(review=True))
        for _ in range(events):
            next(run)
        llm.close()
        with pytest.raises(EngineClosedError):
            run.result()
        with pytest.raises(EngineClosedError):
            run.stop_reading()
