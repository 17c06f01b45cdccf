"""Structured outputs through the library's doors: what comes out looks as asked, with everything else that is asked."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from octavo import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    InvalidRequestError,
    MarginsParams,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from octavo.core.grammar import GrammarState
from octavo.text import grammars
from tests.conftest import _save_model, _save_tokenizer, _special_ids

SETTINGS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 1024}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", 3, None]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
COMPACT = {"json": SCHEMA, "disable_any_whitespace": True}
KINDS: list[dict[str, Any]] = [
    COMPACT,
    {"regex": r"[0-9]{3}-[a-f]{2,4}\.?"},
    {"choice": ["Paris", "London", "Réunion", "Lon", "日本"]},
    {"grammar": 'root ::= "yes" | "no" "!" [0-9]'},
    {"grammar": 'start: /[a-c]{1,9}/ "."'},
]


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        yield llm


def params_of(structured: dict[str, Any], **given: Any) -> SamplingParams:
    return SamplingParams(**{"structured_outputs": structured, "max_tokens": 200, "seed": 3, **given})


def check(text: str, structured: dict[str, Any]) -> None:
    if "json" in structured:
        found = json.loads(text)
        assert list(found) == ["name", "age", "tags"] and len(found["name"]) <= 4 and 0 <= found["age"] <= 120
        assert len(found["tags"]) <= 2 and all(one in ("a", "bé", 3, None) for one in found["tags"])
    elif "regex" in structured:
        assert re.fullmatch(structured["regex"], text)
    elif "choice" in structured:
        assert text in structured["choice"]
    elif "root" in structured["grammar"]:
        assert re.fullmatch(r"yes|no![0-9]", text)
    else:
        assert re.fullmatch(r"[a-c]{1,9}\.", text)


def facts(output: RequestOutput) -> list[Any]:
    assert output.error is None, output.error
    return [(one.token_ids, one.text, one.finish_reason, one.cumulative_logprob) for one in output.outputs]


@pytest.mark.parametrize("structured", KINDS, ids=lambda one: next(iter(one)))
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_outputs_look_as_asked(tiny: LLM, structured: dict[str, Any], temperature: float) -> None:
    given = params_of(structured, temperature=temperature, n=4 if temperature else 1, logprobs=2)
    (output,) = tiny.generate("A whale", given, use_tqdm=False)
    assert output.error is None
    for one in output.outputs:
        assert one.finish_reason == "stop" and one.stop_reason is None
        check(one.text, structured)
        assert one.logprobs is not None and len(one.logprobs) == len(one.token_ids)


def test_any_json_object(tiny: LLM) -> None:
    outputs = tiny.generate(["A"] * 4, params_of({"json_object": True}, max_tokens=400), use_tqdm=False)
    for number, output in enumerate(outputs):
        if output.outputs[0].finish_reason == "stop":
            assert isinstance(json.loads(output.outputs[0].text), dict), number


def test_backends_agree(tiny: LLM, tiny_dir: Path) -> None:
    with LLM(str(tiny_dir), backend="reference", **SETTINGS) as reference:
        for structured in KINDS:
            (ours,) = tiny.generate("A whale", params_of(structured, temperature=0.0), use_tqdm=False)
            (theirs,) = reference.generate("A whale", params_of(structured, temperature=0.0), use_tqdm=False)
            assert facts(ours)[0][1] == facts(theirs)[0][1]


def test_the_best_that_is_allowed_is_chosen(tiny: LLM) -> None:
    """Greedy, beside the log-probabilities of every token: the best of those that some choice goes on with."""
    choices = ["Paris", "London", "Lon"]
    (output,) = tiny.generate("A", params_of({"choice": choices}, temperature=0.0, logprobs=0), use_tqdm=False)
    text, encode = "", tiny.tokenizer
    for token_id in output.outputs[0].token_ids:
        piece = encode.token_bytes(token_id).decode()
        assert any(choice.startswith(text + piece) for choice in choices)
        text += piece
    (free,) = tiny.generate("A", SamplingParams(temperature=0.0, max_tokens=1, logprobs=20), use_tqdm=False)
    allowed = {
        n
        for n in range(encode.vocab_size)
        if any(c.encode().startswith(encode.token_bytes(n) or b"?") for c in choices)
    }
    ranked = sorted(free.outputs[0].logprobs[0].items(), key=lambda item: item[1].rank)
    best = [token_id for token_id, _ in ranked if token_id in allowed]
    if best:
        assert output.outputs[0].token_ids[0] == best[0]


def test_beside_others_and_in_a_pool_too_small(tiny: LLM, tiny_dir: Path) -> None:
    rng = random.Random(1)
    asked = [
        (
            f"A {'whale ' * rng.randint(1, 60)}{number}",
            params_of(KINDS[number % len(KINDS)], seed=number, n=1 + number % 3, presence_penalty=0.5 * (number % 2)),
        )
        for number in range(20)
    ]
    expected = [facts(tiny.generate(prompt, params, use_tqdm=False)[0]) for prompt, params in asked]
    small = SETTINGS | {"kv_cache_memory_bytes": 1 << 19, "max_model_len": 512}
    with LLM(str(tiny_dir), **small) as llm:
        prompts, params = zip(*asked, strict=True)
        outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
        assert [facts(output) for output in outputs] == expected
        assert llm._loop.ask(lambda engine: engine.kv.num_blocks - engine.kv.num_available).result() == 0
    for (_, one), output in zip(asked, outputs, strict=True):
        for completion in output.outputs:
            check(completion.text, KINDS[int(one.seed or 0) % len(KINDS)])


@pytest.mark.parametrize("structured", KINDS, ids=lambda one: next(iter(one)))
def test_beams(tiny: LLM, structured: dict[str, Any]) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=200, structured_outputs=structured)
    (output,) = tiny.beam_search("A whale", params)
    assert output.error is None and output.outputs
    found = [one for one in output.outputs if one.finish_reason == "stop"]
    assert found and len({tuple(one.token_ids) for one in found}) == len(found)  # a text may have several spellings
    for one in found:
        check(one.text, structured)
        assert one.token_ids[-1] in tiny.tokenizer.eos_token_ids


def test_beams_find_the_best_of_all(tiny: LLM) -> None:
    """With more beams than there are texts each is found, with the log-probability that it has by itself."""
    choices = ["a", "b", "c"]
    params = BeamSearchParams(beam_width=8, max_tokens=20, structured_outputs={"choice": choices}, length_penalty=0.0)
    (output,) = tiny.beam_search("A", params)
    found = {one.text: one for one in output.outputs if one.finish_reason == "stop"}
    assert set(found) == set(choices)
    for text, one in found.items():
        with tiny.session() as session:
            session.extend("A")
            choice = {"prompt_token_ids": one.token_ids}
            total = session.select([choice]).choices[0].logprobs
        assert sum(total) == pytest.approx(one.score, abs=1e-4), text
    assert [one.score for one in output.outputs] == sorted((one.score for one in output.outputs), reverse=True)


def test_stop_strings_and_limits(tiny: LLM) -> None:
    given = params_of({"regex": "a{50}"}, stop="aaaa")
    (output,) = tiny.generate("A", given, use_tqdm=False)
    assert output.outputs[0].stop_reason == "aaaa"
    (output,) = tiny.generate("A", params_of({"regex": "(ab){50}"}, max_tokens=5), use_tqdm=False)
    assert output.outputs[0].finish_reason == "length" and len(output.outputs[0].token_ids) == 5
    (output,) = tiny.generate("A", params_of({"choice": ["ab"]}, min_tokens=50), use_tqdm=False)
    assert output.outputs[0].text == "ab" and output.outputs[0].finish_reason == "stop"
    (output,) = tiny.generate("A", params_of({"regex": "a+"}, min_tokens=30, max_tokens=60), use_tqdm=False)
    assert set(output.outputs[0].text) == {"a"} and len(output.outputs[0].token_ids) >= 30
    (output,) = tiny.generate("A", params_of({"choice": ["ab"]}, ignore_eos=True), use_tqdm=False)
    assert output.outputs[0].text == "ab"


def test_a_model_with_rows_behind_its_tokens_and_no_end_token(tmp_path: Path) -> None:
    """An output ends where nothing can follow; no row that has no token is drawn in place of an end."""
    from transformers import LlamaConfig, LlamaForCausalLM

    num_tokens = _save_tokenizer(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    _save_model(LlamaForCausalLM, LlamaConfig(vocab_size=num_tokens + 48, **sizes, **heads, **_special_ids()), tmp_path)
    for path in tmp_path.glob("*.json"):
        told = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in told.items() if not name.startswith("eos_token")}))
    with LLM(str(tmp_path), **SETTINGS | {"max_model_len": 256}) as llm:
        assert llm.tokenizer.eos_token_ids == () and llm.model_config.vocab_size > llm.tokenizer.vocab_size
        given = [params_of({"regex": "a+b*"}, seed=seed, max_tokens=30) for seed in range(8)]
        for output in llm.generate(["A"] * 8, given, use_tqdm=False):
            assert output.outputs[0].finish_reason == "length" and len(output.outputs[0].token_ids) == 30
            assert max(output.outputs[0].token_ids) < num_tokens
        (ends,) = llm.generate("A", params_of({"regex": "a{3}b"}), use_tqdm=False)
        assert (ends.outputs[0].text, ends.outputs[0].finish_reason) == ("aaab", "stop")
        params = BeamSearchParams(beam_width=4, max_tokens=30, structured_outputs={"choice": ["ab", "ac", "d"]})
        (found,) = llm.beam_search("A", params)
        assert found.error is None and {one.finish_reason for one in found.outputs} == {"stop"}
        assert {one.text for one in found.outputs} == {"ab", "ac", "d"}


def test_nothing_is_left_with_other_parameters(tiny: LLM) -> None:
    """The request ends with an error that says so; others go on."""
    never = params_of({"choice": ["ab"]}, allowed_token_ids=tiny.tokenizer.encode_inside("z"))
    bad, good = tiny.generate(["A", "A"], [never, params_of({"choice": ["ab"]})], use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error" and "structured_outputs" in (bad.error or "")
    assert good.outputs[0].text == "ab"


def test_a_grammar_that_meets_a_limit_ends_its_request_alone(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, matcher: Any) -> None:
            self.matcher = matcher

        def __getattr__(self, name: str) -> Any:
            return getattr(self.matcher, name)

        def deep_copy(self) -> Broken:
            return Broken(self.matcher.deep_copy())

        def compute_bitmask(self) -> bytes:
            return bytes(len(self.matcher.compute_bitmask()))

        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "Parser Error: too complex\nmore"

    made = GrammarState.__init__
    broken = {"choice": ["xyz"]}
    state = type(tiny._frontend.tokens.grammars).state

    def spoilt(self: Any, params: Any) -> GrammarState:
        found = state(self, params)
        if params.choice == ("xyz",):
            made(found, Broken(found._matcher))
        return found

    monkeypatch.setattr(grammars.Grammars, "state", spoilt)
    bad, good = tiny.generate(["A", "A"], [params_of(broken), params_of({"choice": ["ab"]})], use_tqdm=False)
    assert bad.error == "structured_outputs: Parser Error: too complex" and good.outputs[0].text == "ab"


class Panic(BaseException):
    """As PyO3 raises it: no Exception."""


class Panics:
    """A matcher that panics at its third token."""

    def __init__(self, matcher: Any, num_tokens: int = 0) -> None:
        self.matcher = matcher
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self.matcher, name)

    def deep_copy(self) -> Panics:
        return Panics(self.matcher.deep_copy(), self.num_tokens)

    def consume_tokens(self, token_ids: list[int]) -> bool:
        self.num_tokens += len(token_ids)
        return self.matcher.consume_tokens(token_ids)

    def compute_bitmask(self) -> bytes:
        if self.num_tokens >= 2:
            raise Panic("index out of bounds")
        return self.matcher.compute_bitmask()

    def validate_tokens(self, token_ids: list[int]) -> int:
        """Of guesses."""
        Panics.asked += 1
        raise Panic("index out of bounds")

    asked = 0


def test_a_panic_over_guesses_ends_nothing(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are looked at on the engine's thread, while a step is made."""
    made = grammars.Grammars.state

    def spoilt(self: Any, params: Any) -> GrammarState:
        state = made(self, params)
        state._matcher = Panics(state._matcher, -1000)
        return state

    given = [params_of({"regex": "(xy){6}"}), SamplingParams(max_tokens=20, seed=1, ignore_eos=True)]
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        expected = [one.outputs[0].token_ids for one in llm.generate(["xyxyxy"] * 2, given, use_tqdm=False)]
    monkeypatch.setattr(grammars.Grammars, "state", spoilt)
    monkeypatch.setattr(Panics, "asked", 0)
    config = {"method": "ngram", "adaptive": False, "prompt_lookup_min": 1}
    with LLM(str(tiny_dir), **SETTINGS, speculative_config=config) as llm:
        outputs = llm.generate(["xyxyxy"] * 2, given, use_tqdm=False)
        assert [one.error for one in outputs] == [None, None]
        assert [one.outputs[0].token_ids for one in outputs] == expected
    assert Panics.asked > 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_panic_ends_its_request_alone(tiny_dir: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = grammars.Grammars.state

    def spoilt(self: Any, params: Any) -> GrammarState:
        state = made(self, params)
        if params.regex == "[xyz]{9}":
            state._matcher = Panics(state._matcher)
        return state

    monkeypatch.setattr(grammars.Grammars, "state", spoilt)
    broken, fine = {"regex": "[xyz]{9}"}, {"regex": "[abc]{9}"}
    with LLM(str(tiny_dir), backend=backend, **SETTINGS) as llm:
        given = [params_of(broken, n=2), params_of(fine), SamplingParams(max_tokens=20, ignore_eos=True)]
        bad, *good = llm.generate(["A"] * 3, given, use_tqdm=False)
        assert bad.error == "structured_outputs: Panic: index out of bounds"
        assert [one.error for one in good] == [None, None] and re.fullmatch("[abc]{9}", good[0].outputs[0].text)
        assert len(good[1].outputs[0].token_ids) == 20
        (searched,) = llm.beam_search("A", BeamSearchParams(beam_width=3, max_tokens=9, structured_outputs=broken))
        assert searched.error is None or "no beam can go on" in searched.error
        assert searched.error == "no beam can go on: structured_outputs: Panic: index out of bounds"
        assert llm._loop.ask(lambda engine: engine.kv.num_blocks - engine.kv.num_available).result() == 0


def test_a_grammar_that_panics_is_refused(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def panics(params: Any) -> str:
        raise Panic("index out of bounds")

    monkeypatch.setattr(grammars, "_source", panics)
    with pytest.raises(InvalidRequestError) as caught:
        tiny.generate("A", params_of({"regex": "q{3}"}), use_tqdm=False)
    assert caught.value.field == "structured_outputs.regex"


# --- sessions, asyncio, threads, forks ---


def test_sessions(tiny: LLM) -> None:
    with tiny.session(seed=1) as session:
        session.extend("The number is ")
        said = session.generate(regex=r"\d{3}\.", max_tokens=50)
        assert re.fullmatch(r"\d{3}\.", said.text) and session.text.endswith(said.text)
        a, b = session.fork(2)
        texts = [one.text for one in session.generate_all([a, b], choice=["Yes", "No"], max_tokens=50)]
        assert set(texts) <= {"Yes", "No"} and a.text.endswith(texts[0])
        free = a.generate(max_tokens=5)
        assert len(free.token_ids) == 5
        a.truncate(3)
        assert a.generate(choice=["x"], max_tokens=5).text == "x"
        assert json.loads(b.generate(json=SCHEMA, max_tokens=300).text)
        with pytest.raises(InvalidRequestError, match="both given"):
            b.generate(regex="a", structured_outputs={"regex": "a"})
        with pytest.raises(InvalidRequestError) as caught:
            b.generate(regex="(")
        assert caught.value.field == "structured_outputs.regex"


async def test_async(tiny: LLM, tiny_dir: Path) -> None:
    expected = [facts(tiny.generate("A", params_of(one), use_tqdm=False)[0]) for one in KINDS]
    async with AsyncLLM(str(tiny_dir), **SETTINGS) as llm:
        for one, wanted in zip(KINDS, expected, strict=True):
            outputs = [output async for output in llm.generate("A", params_of(one))]
            assert facts(outputs[-1]) == wanted


def test_many_threads_one_grammar(tiny: LLM) -> None:
    expected = facts(tiny.generate("A", params_of(COMPACT), use_tqdm=False)[0])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: facts(tiny.generate("A", params_of(COMPACT), use_tqdm=False)[0]), range(16)))
    assert found == [expected] * 16


def test_after_a_fork(tiny: LLM) -> None:
    import os

    expected = facts(tiny.generate("A", params_of(COMPACT), use_tqdm=False)[0])
    child = os.fork()
    if not child:
        status = 1
        try:
            status = int(facts(tiny.generate("A", params_of(COMPACT), use_tqdm=False)[0]) != expected)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert facts(tiny.generate("A", params_of(COMPACT), use_tqdm=False)[0]) == expected


def test_a_grammar_that_is_new_after_a_fork(tiny: LLM) -> None:
    """The threads that compile are the parent's."""
    import os

    assert tiny.generate("A", params_of({"regex": "x{3}"}), use_tqdm=False)[0].outputs[0].text == "xxx"
    child = os.fork()
    if not child:
        status = 1
        try:
            (output,) = tiny.generate("A", params_of({"regex": "y{3}"}), use_tqdm=False)
            status = int(output.outputs[0].text != "yyy")
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_mask_that_is_computed_while_the_process_forks() -> None:
    import os
    import signal

    class Slow:
        """Does not get on before the fork waits for it."""

        def compute_bitmask(self) -> bytes:
            begun.set()
            assert go_on.wait(30)
            return b"\x01"

        def is_error(self) -> bool:
            return False

    begun, go_on = threading.Event(), threading.Event()
    state = GrammarState(Slow())  # type: ignore[arg-type]
    mask = state.mask()
    assert begun.wait(30)
    threading.Timer(0.05, go_on.set).start()
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if mask.bits() == b"\x01" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_fork_whatever_was_imported_first() -> None:
    """concurrent.futures locks its executors for a fork, in the order of imports."""
    code = """if True:
        import os, signal
        from octavo.core.grammar import GrammarState
        import concurrent.futures.thread

        class Matcher:
            def compute_bitmask(self):
                return b"x"

            def is_error(self):
                return False

        assert GrammarState(Matcher()).mask().bits() == b"x"
        signal.alarm(20)
        child = os.fork()
        if not child:
            os._exit(0 if GrammarState(Matcher()).mask().bits() == b"x" else 1)
        assert os.waitpid(child, 0)[1] == 0
        """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_margins_with_an_answer_that_looks_like_something(tiny: LLM) -> None:
    params = MarginsParams(
        answer=params_of({"choice": ["Yes", "No"]}, seed=None),
        margin=SamplingParams(max_tokens=5),
        seed=1,
        segment_tokens=90,
    )
    assert tiny.margins("The whale is white. " * 20, "Is it?", params).text in ("Yes", "No")


# --- what is refused ---


@pytest.mark.parametrize(
    ("given", "field", "problem"),
    [
        ({}, "structured_outputs", "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "structured_outputs", "exactly one of .* not regex, choice"),
        ({"json_object": False}, "structured_outputs", "exactly one"),
        ({"regexp": "a"}, "structured_outputs", "'regexp' is not a field"),
        ("a", "structured_outputs", "must be StructuredOutputsParams or a mapping"),
        ({"regex": ""}, "structured_outputs.regex", "is empty"),
        ({"regex": 5}, "structured_outputs.regex", "must be a string"),
        ({"regex": "a\udc00"}, "structured_outputs.regex", "lone surrogate"),
        ({"regex": "a" * (1 << 21)}, "structured_outputs.regex", "at most"),
        ({"choice": []}, "structured_outputs.choice", "from 1 to"),
        ({"choice": "ab"}, "structured_outputs.choice", "must be a list"),
        ({"choice": ["a", ""]}, r"structured_outputs.choice\[1\]", "is empty"),
        ({"json": "{"}, "structured_outputs.json", "is not JSON"),
        ({"json": "5"}, "structured_outputs.json", "must be a JSON schema"),
        ({"json": {"a": object()}}, "structured_outputs.json", "."),
        ({"json": "[" * 100_000}, "structured_outputs.json", "."),
        ({"regex": "a", "disable_any_whitespace": True}, "structured_outputs.disable_any_whitespace", "no effect"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_values(given: Any, field: str, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        SamplingParams(structured_outputs=given)
    assert re.fullmatch(field, re.sub(r"\.json[.\[].*", ".json", caught.value.field))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"regex": "("}, "regex parse error"),
        ({"regex": "(?=a)b"}, "."),
        ({"regex": r"[^\x00-\U0010FFFF]"}, "admits no output"),
        ({"json": {"enum": []}}, "Unsatisfiable"),
        ({"json": {"$ref": "#"}}, "admits no output"),
        ({"json": {"type": "strong"}}, "."),
        ({"json": {"unevaluatedProperties": 5, "type": "object"}}, "."),
        ({"grammar": "start: x"}, "unknown name"),
        ({"grammar": 'root ::= "a'}, "."),
        ({"json": "false"}, "."),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_refused_before_it_runs(tiny: LLM, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        tiny.generate("A", params_of(given), use_tqdm=False)
    assert caught.value.field.startswith("structured_outputs.") and "<state>" not in str(caught.value)


def test_a_deadline(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes too long is refused, and others are not held up by it."""
    released = threading.Event()
    compile_ = grammars.Grammars._compile

    def slow(self: Any, params: StructuredOutputsParams, field: str) -> Any:
        if params.choice == ("slow",):
            released.wait(60)
        return compile_(self, params, field)

    monkeypatch.setattr(grammars.Grammars, "_compile", slow)
    monkeypatch.setattr(grammars, "_DEADLINE", 0.05)
    with pytest.raises(InvalidRequestError, match=r"takes more than 0\.05 s"):
        tiny.generate("A", params_of({"choice": ["slow"]}), use_tqdm=False)
    monkeypatch.setattr(grammars, "_DEADLINE", 60.0)
    assert tiny.generate("A", params_of({"choice": ["quick"]}), use_tqdm=False)[0].outputs[0].text == "quick"
    released.set()


def test_a_mask_that_takes_too_much_is_none(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all rows of the step would wait for it. At once, or when it comes to it: then its request ends alone."""
    ambiguous = params_of({"grammar": "start: e+\ne: e e | /[a-z ]/ | e e e"}, ignore_eos=True)
    monkeypatch.setattr(grammars, "_MAX_ITEMS", 20)
    with pytest.raises(InvalidRequestError, match="Too many items"):
        tiny.generate("A", ambiguous, use_tqdm=False)
    monkeypatch.setattr(grammars, "_MAX_ITEMS", 300)
    (output,) = tiny.generate("A", ambiguous, use_tqdm=False)
    assert "Too many items" in (output.error or "") and output.outputs[0].finish_reason == "error"
    assert len(output.outputs[0].token_ids) > 1
    assert tiny.generate("A", params_of({"choice": ["fine"]}), use_tqdm=False)[0].outputs[0].text == "fine"


def test_many_new_grammars_at_once_wait_for_their_turn(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are compiled at once; only where no turn comes in time is one refused."""
    turns = tiny._frontend.tokens.grammars._turns
    for _ in range(grammars._MAX_COMPILING):  # what other tests have given up goes on until its limits end it
        assert turns.acquire(timeout=60)
    turns.release(grammars._MAX_COMPILING)
    source, all_in, go_on = grammars._source, threading.Semaphore(0), threading.Event()

    def slow(params: StructuredOutputsParams) -> str:
        all_in.release()
        assert go_on.wait(60)
        return source(params)

    monkeypatch.setattr(grammars, "_source", slow)
    monkeypatch.setattr(grammars, "_DEADLINE", 60.0)
    monkeypatch.setattr(grammars, "_TURN", 0.0)
    texts = [f"new {number % 8}" for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        given = [params_of({"choice": [text]}) for text in texts]
        answers = [pool.submit(tiny.generate, "A", one, use_tqdm=False) for one in given[:4]]
        for _ in range(4):
            assert all_in.acquire(timeout=60)
        with pytest.raises(InvalidRequestError, match="too many grammars"):
            tiny.generate("A", params_of({"choice": ["one more"]}), use_tqdm=False)
        monkeypatch.setattr(grammars, "_TURN", 60.0)
        answers += [pool.submit(tiny.generate, "A", one, use_tqdm=False) for one in given[4:]]
        go_on.set()
        assert [answer.result()[0].outputs[0].text for answer in answers] == texts


def test_without_the_package(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequestError, match=r"pip install octavo\[structured\]"):
        tiny.generate("A", params_of({"choice": ["never asked before"]}), use_tqdm=False)


def test_parameters_are_values() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    one, other = (SamplingParams(structured_outputs={"json": schema}) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    schema["type"] = "array"
    assert one == other != SamplingParams(structured_outputs={"json": schema})
    assert one.but(temperature=0.5).structured_outputs == one.structured_outputs
