"""`octavo cache explain`: what is said, for people and for machines, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from octavo import LLM

from .conftest import Invoke
from .test_bad_input import assert_refused

README = Path(__file__).parents[2] / "README.md"
SHARED = "the quick brown fox jumps over the lazy dog, and then "
RAW = ("cache", "explain", "--raw")
PROMPT, EARLIER = SHARED + "the other one comes back", SHARED + "nothing happens for a while"


def test_a_difference_is_named(invoke: Invoke, tiny_llama_dir: Path) -> None:
    """Position and both tokens as the tokenizer has them; the earlier prompt by its number."""
    code, out, err = invoke(*RAW, PROMPT, "--after", "hello", "--after", EARLIER, "-m", tiny_llama_dir)
    assert (code, err) == (0, "")
    with LLM(str(tiny_llama_dir)) as llm:
        ours, theirs = llm.tokenizer.encode(PROMPT), llm.tokenizer.encode(EARLIER)
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        tokens = [llm.tokenizer.decode([ids[at]]) for ids in (ours, theirs)]
        hello = len(llm.tokenizer.encode("hello"))
    assert at > 16
    assert out.splitlines() == [
        f"earlier prompt 1: {hello} tokens, 0 from the cache, 0 blocks evicted",
        f"earlier prompt 2: {len(theirs)} tokens, 0 from the cache, 0 blocks evicted",
        f"prompt: {len(ours)} tokens, {at} from the cache",
        f"Token {at} is {ours[at]}; earlier prompt 2 had {theirs[at]} there.",
        f"first difference: position {at}, {tokens[0]!r} here, {tokens[1]!r} in earlier prompt 2",
    ]


def test_json_is_what_the_library_says(invoke: Invoke, tiny_llama_dir: Path) -> None:
    code, out, err = invoke(*RAW, "--json", EARLIER, "--after", EARLIER, "--model", tiny_llama_dir)
    assert (code, err) == (0, "")
    report = json.loads(out)
    with LLM(str(tiny_llama_dir)) as llm:
        tokens = len(llm.tokenizer.encode(EARLIER))
    assert report["earlier"] == [{"num_tokens": tokens, "num_cached_tokens": 0, "evicted_blocks": 0}]
    assert report["num_cached_tokens"] == min(tokens // 16 * 16, tokens - 1)
    assert report["first_difference"] is report["token"] is None
    assert report["earlier_request_id"] == "earlier prompt 1"


@pytest.mark.usefixtures("smollm2_path")
def test_the_readmes_example_hits(invoke: Invoke) -> None:
    """As it stands there, with the default model: the prompts share what the chat template puts before them."""
    lines = README.read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if "octavo cache explain" in line and line.startswith("$ ")]
    arguments = shlex.split(line)[2:]
    code, out, err = invoke(*arguments)
    assert (code, err) == (0, "")
    hit = re.search(r"^prompt: (\d+) tokens, (\d+) from the cache$", out, re.MULTILINE)
    assert hit is not None and int(hit[2]) >= 16
    assert re.search(
        r"^first difference: position \d+, ' lakes' here, ' rivers' in earlier prompt 1$", out, re.MULTILINE
    )


def test_prompts_are_taken_as_run_takes_them(invoke: Invoke, tiny_llama_dir: Path) -> None:
    """Guards an explanation of another prompt than the one that is answered."""
    for further in ((), ("--system", "be brief"), ("--raw",)):
        common = ("-m", tiny_llama_dir, *further, "--json")
        told = json.loads(invoke("cache", "explain", "hello there", "--after", "hello", *common).out)
        limit = ("--temperature", 0, "--max-tokens", 1)
        run = [json.loads(invoke("run", text, *common, *limit).out) for text in ("hello there", "hello")]
        assert [one["prompt_tokens"] for one in run] == [told["num_tokens"], told["earlier"][0]["num_tokens"]]


def test_evictions_are_told(invoke: Invoke, tiny_llama_dir: Path) -> None:
    """In a pool of four blocks the second prompt takes what the first left."""
    with LLM(str(tiny_llama_dir), max_model_len=64) as llm:
        block = llm.memory_plan.kv_bytes // llm._engine.kv.num_blocks
    room = ("--max-model-len", 64, "--kv-cache-memory-bytes", 4 * block, "-m", tiny_llama_dir)
    first, second = "the quick brown fox jumps over the lazy dog", "x" * 60
    code, out, err = invoke(*RAW, first, "--after", first, "--after", second, *room)
    assert (code, err) == (0, "")
    assert "blocks evicted" in out.splitlines()[1] and not out.splitlines()[1].endswith(" 0 blocks evicted")
    assert "was computed by earlier prompt 1 and evicted" in out and "(capacity)" in out


def test_nothing_before_and_no_cache(invoke: Invoke, tiny_llama_dir: Path) -> None:
    assert "Nothing that begins like this is cached." in invoke(*RAW, PROMPT, "-m", tiny_llama_dir).out
    off = invoke(*RAW, PROMPT, "--after", PROMPT, "-m", tiny_llama_dir, "--no-enable-prefix-caching")
    assert off.code == 0 and "Prefix caching is off." in off.out


def test_without_a_subcommand_it_helps(invoke: Invoke) -> None:
    code, out, err = invoke("cache")
    assert (code, out) == (2, "")
    assert "octavo cache" in err and "explain" in err
    help_ = invoke("cache", "explain", "--help")
    assert help_.code == 0 and "--after EARLIER" in help_.out and "--block-size" in help_.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", ""], "prompt: is empty"),
        (["explain", "x", "--after", ""], "--after: is empty"),
        (["explain", "\udcff"], "prompt: is not valid UTF-8 at character 0"),
        (["explain", "x", "--after", "\udcff"], "--after: is not valid UTF-8"),
        (["explain", "x", "--max-num-seqs", "0"], "max_num_seqs: must be"),
        (["explain", "x", "--raw", "--system", "y"], "--system: has no effect with --raw"),
        (["explain", "x", "--system", "\udcff"], "--system: is not valid UTF-8"),
    ],
)
def test_bad_input_is_refused(invoke: Invoke, arguments: list[str], message: str) -> None:
    assert_refused(invoke("cache", *arguments), message)


def test_bad_usage_and_prompts_that_do_not_fit(invoke: Invoke, tiny_llama_dir: Path) -> None:
    for arguments in (["forget"], ["explain"], ["explain", "a", "b"], ["explain", "a", "--after"]):
        code, out, err = invoke("cache", *arguments)
        assert (code, out) == (2, "") and "error:" in err
    small = ("-m", tiny_llama_dir, "--max-model-len", 16)
    assert_refused(invoke("cache", "explain", "x", "--after", PROMPT, *small), "prompt: has", "max_model_len=16")
    assert_refused(invoke(*RAW, PROMPT, *small), "prompt: has", "max_model_len=16")
