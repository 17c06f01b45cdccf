"""`octavo run`: prompts from everywhere, streaming, JSON, flags."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, EngineConfig, RepetitionDetectionParams, SamplingParams, StructuredOutputsParams
from octavo.cli.answering import harmless
from octavo.cli.engine_args import add_engine_arguments, engine_config
from octavo.cli.sampling_args import add_sampling_arguments, sampling_params
from octavo.core.errors import ConfigError
from octavo.core.speculation import SpeculativeConfig

from .conftest import Invoke

SOURCE = Path(__file__).parents[2] / "src"
ENV = {**os.environ, "PYTHONPATH": str(SOURCE), "OPENBLAS_NUM_THREADS": "1"}
GREEDY = SamplingParams(temperature=0, max_tokens=12)
LIMIT = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama_dir)) as llm:
        yield llm


def chat_text(llm: LLM, content: str, system: str | None = None) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    return llm.chat([*messages, {"role": "user", "content": content}], GREEDY)[0].outputs[0].text


# --- the answer ---


@pytest.mark.usefixtures("smollm2_path")
def test_the_real_model_answers(invoke: Invoke) -> None:
    """Guards the README's first command: alias, template, no limit needed."""
    arguments = ("--backend", "reference", "--max-model-len", 512, "--temperature", 0)
    code, out, err = invoke("run", "What is the capital of France?", *arguments)
    assert (code, out, err) == (0, "The capital of France is Paris.\n", "")


def test_the_prompt_is_a_users_message(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path) -> None:
    expected = chat_text(tiny, "hello")
    assert invoke("run", "--model", tiny_llama_dir, "hello", *LIMIT) == (0, expected + "\n", "")
    assert invoke("run", "-hf", tiny_llama_dir, "-p", "hello", *LIMIT) == (0, expected + "\n", "")
    assert invoke("run", "-m", tiny_llama_dir, *LIMIT, "--", "hello") == (0, expected + "\n", "")


def test_raw_continues_the_prompt(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path) -> None:
    expected = tiny.generate("hello", GREEDY)[0].outputs[0].text
    assert expected != chat_text(tiny, "hello")
    assert invoke("run", "--model", tiny_llama_dir, "--raw", "hello", *LIMIT).out == expected + "\n"


def test_system_message(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path) -> None:
    expected = chat_text(tiny, "hello", "be brief")
    assert expected != chat_text(tiny, "hello")
    assert invoke("run", "--model", tiny_llama_dir, "--system", "be brief", "hello", *LIMIT).out == expected + "\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "content"),
    [
        ([], b"from a pipe\n", "from a pipe"),
        ([], "naïve\r\n🙂\r\n".encode(), "naïve\r\n🙂"),
        (["Sum up:"], b"line 1\nline 2\n", "Sum up:\n\nline 1\nline 2"),
        (["hello"], b"", "hello"),
        ([""], b"only the pipe", "only the pipe"),
    ],
)
def test_prompt_from_argument_and_pipe(
    invoke: Invoke, tiny: LLM, tiny_llama_dir: Path, arguments: list[str], stdin: bytes, content: str
) -> None:
    code, out, _ = invoke("run", "--model", tiny_llama_dir, "--json", *LIMIT, *arguments, stdin=stdin)
    answer = json.loads(out)
    assert code == 0 and answer["text"] == chat_text(tiny, content)
    assert answer["prompt_tokens"] == len(tiny.chat_prompt([{"role": "user", "content": content}])["prompt_token_ids"])


def test_the_answer_comes_in_pieces(invoke: Invoke, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards an answer that is printed all at once at the end, or held back in a buffer."""
    pieces: list[str] = []

    class Stdout:
        pending = ""

        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> None:
            self.pending += text

        def flush(self) -> None:
            pieces.append(self.pending)
            self.pending = ""

    whole = invoke("run", "--model", tiny_llama_dir, "hello", *LIMIT).out
    monkeypatch.setattr(sys, "stdout", Stdout())
    assert invoke("run", "--model", tiny_llama_dir, "hello", *LIMIT).code == 0
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 6


def test_speed_is_told_when_asked_for(invoke: Invoke, tiny_llama_dir: Path) -> None:
    """On stderr, so that the answer can be piped on; the memory plan as well."""
    code, out, err = invoke("run", "--model", tiny_llama_dir, "hello", *LIMIT, "-v")
    assert code == 0
    backend, plan, sampling, speed = err.splitlines()
    assert sampling == "octavo: sampling: temperature 0, top_p 1, top_k 0, min_p 0, repetition_penalty 1"
    assert backend.startswith("octavo: backend ")
    assert plan.startswith("octavo: memory plan: weights")
    assert " prompt tokens (" in speed and "12 generated tokens (" in speed and "first token after" in speed
    assert out == invoke("run", "--model", tiny_llama_dir, "hello", *LIMIT).out


def test_guesses_are_told_when_asked_for(invoke: Invoke, tiny_llama_dir: Path) -> None:
    flags = ("--model", tiny_llama_dir, "one two one two one two", *LIMIT, "--allowed-token-ids", "65,66,67")
    guessing = ("--speculative-config", '{"method": "suffix", "adaptive": false}')
    code, out, err = invoke("run", *flags, *guessing, "-v")
    assert code == 0 and err.splitlines()[-1].endswith(" guessed tokens accepted")
    assert out == invoke("run", *flags).out == invoke("run", *flags, *guessing, "--no-speculative-decoding").out
    code, _, err = invoke("run", *flags, "--speculative-config", '{"method": "magic"}')
    assert code == 2 and "speculative_config.method: must be one of ngram, suffix, draft_model, draft_head, not" in err


# --- JSON ---


def test_json(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path) -> None:
    code, out, err = invoke("run", "--model", tiny_llama_dir, "hello", "--json", *LIMIT)
    assert (code, err, out.count("\n")) == (0, "", 1)
    answer = json.loads(out)
    assert answer["text"] == chat_text(tiny, "hello")
    assert tiny.tokenizer.decode(answer["token_ids"]) == answer["text"]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("length", None)
    assert (answer["completion_tokens"], answer["seed"]) == (12, None), "nothing is drawn"
    assert (answer["model"], answer["system_fingerprint"]) == (str(tiny_llama_dir), tiny.system_fingerprint)
    assert answer["request_id"]
    assert "logprobs" not in answer and "prompt_logprobs" not in answer and "outputs" not in answer
    t = answer["timings"]
    assert 0 <= t["queue_s"] <= t["ttft_s"] <= t["e2e_s"]
    assert t["decode_tokens_per_s"] == pytest.approx(1 / t["tpot_s"])
    assert t["tpot_s"] == pytest.approx((t["e2e_s"] - t["ttft_s"]) / 11)
    assert t["prefill_tokens_per_s"] >= answer["prompt_tokens"] / t["ttft_s"]


def test_json_with_log_probabilities(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path) -> None:
    arguments = ("--json", *LIMIT, "--logprobs", 2, "--prompt-logprobs", 1, "--raw")
    answer = json.loads(invoke("run", "--model", tiny_llama_dir, "hello there", *arguments).out)
    assert [row["token_id"] for row in answer["logprobs"]] == answer["token_ids"]
    assert [row["token"] for row in answer["logprobs"]] == [tiny.tokenizer.decode([i]) for i in answer["token_ids"]]
    for row in answer["logprobs"]:
        assert [entry["rank"] for entry in row["top_logprobs"]] == [1, 2]
        assert row["logprob"] == row["top_logprobs"][0]["logprob"] < 0
    assert answer["cumulative_logprob"] == pytest.approx(sum(row["logprob"] for row in answer["logprobs"]))
    assert answer["prompt_logprobs"][0] is None and len(answer["prompt_logprobs"]) == answer["prompt_tokens"]
    assert "".join(row["token"] for row in answer["prompt_logprobs"][1:]) in "hello there"


def test_several_outputs(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path) -> None:
    arguments = ("run", "--model", tiny_llama_dir, "hello", *LIMIT, "--n", 3, "--temperature", 1, "--seed", 5)
    answer = json.loads(invoke(*arguments, "--json").out)
    assert [output["index"] for output in answer["outputs"]] == [0, 1, 2]
    assert answer["completion_tokens"] == sum(len(output["token_ids"]) for output in answer["outputs"])
    assert "text" not in answer
    parts = invoke(*arguments).out.split("=== output ")
    assert [part[:7] for part in parts[1:]] == ["1 of 3 ", "2 of 3 ", "3 of 3 "]
    for part, output in zip(parts[1:], answer["outputs"], strict=True):
        assert part.removeprefix(part[:7]).removeprefix("===\n").rstrip("\n") == output["text"].rstrip("\n")


# --- flags ---


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_sampling_arguments(parser)
    add_engine_arguments(parser, leave_out=["seed"])
    return parser.parse_args(arguments)


SAMPLING: dict[str, tuple[list[str], Any]] = {
    "n": (["--n", "3"], 3),
    "presence_penalty": (["--presence-penalty", "-0.5"], -0.5),
    "frequency_penalty": (["--frequency-penalty", "0.5"], 0.5),
    "repetition_penalty": (["--repetition-penalty", "1.1"], 1.1),
    "temperature": (["--temperature", "0.7"], 0.7),
    "top_p": (["--top-p", ".9"], 0.9),
    "top_k": (["--top-k", "-1"], -1),
    "min_p": (["--min-p", "0.1"], 0.1),
    "seed": (["--seed", "18446744073709551615"], 2**64 - 1),
    "stop": (["--stop", "a, b", "--stop", "c"], ("a, b", "c")),
    "stop_token_ids": (["--stop-token-ids", "5,6", "--stop-token-ids", "7"], (5, 6, 7)),
    "ignore_eos": (["--ignore-eos"], True),
    "max_tokens": (["--max-tokens", "9"], 9),
    "min_tokens": (["--min-tokens", "4"], 4),
    "logprobs": (["--logprobs", "0"], 0),
    "prompt_logprobs": (["--prompt-logprobs", "2"], 2),
    "skip_special_tokens": (["--no-skip-special-tokens"], False),
    "spaces_between_special_tokens": (["--no-spaces-between-special-tokens"], False),
    "include_stop_str_in_output": (["--include-stop-str-in-output"], True),
    "logit_bias": (["--logit-bias", '{"5": -1.5, "6": 2}'], {5: -1.5, 6: 2.0}),
    "allowed_token_ids": (["--allowed-token-ids", "7,5"], (5, 7)),
    "bad_words": (["--bad-words", "x y"], ("x y",)),
    "skip_reading_prefix_cache": (["--skip-reading-prefix-cache"], True),
    "speculative_decoding": (["--no-speculative-decoding"], False),
    "repetition_detection": (
        ["--repetition-detection", '{"max_pattern_size": 5, "min_count": 3}'],
        RepetitionDetectionParams(5, 0, 3),
    ),
    "structured_outputs": (["--structured-outputs", '{"regex": "a+"}'], StructuredOutputsParams(regex="a+")),
}


def test_every_sampling_parameter_has_a_flag() -> None:
    """Guards a new parameter that the command line forgets, and one that is accepted and dropped."""
    arguments = [argument for given, _ in SAMPLING.values() for argument in given]
    got = sampling_params(parsed(*arguments))
    assert {name: getattr(got, name) for name in SAMPLING} == {name: value for name, (_, value) in SAMPLING.items()}
    apart = {"detokenize", "output_kind"}  # the first excludes stop strings; the second is the command's own
    assert set(SAMPLING) == {field.name for field in fields(SamplingParams)} - apart
    assert sampling_params(parsed("--no-detokenize")).detokenize is False


def test_every_engine_setting_has_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flag over variable over default."""
    values = {"backend": "cpu", "scheduling_policy": "priority", "kv_cache_dtype": "float16", "model": "x",
              "compute_dtype": "float64", "max_num_seqs": 16, "block_size": 32, "instruction_set": "avx2",
              "enable_prefix_caching": True, "cascade_attention": False, "pin_threads": True,
              "kv_offload_dir": "/x", "speculative_config": SpeculativeConfig(method="ngram")}  # fmt: skip
    given = {field.name: values.get(field.name, 1000) for field in fields(EngineConfig) if field.name != "seed"}
    told = {name: str(value) for name, value in given.items()} | {"speculative_config": '{"method": "ngram"}'}
    arguments = [text for name, value in told.items() for text in ("--" + name.replace("_", "-"), value)]
    monkeypatch.setenv("OCTAVO_BLOCK_SIZE", "64")
    monkeypatch.setenv("OCTAVO_BACKEND", "auto")
    monkeypatch.setenv("OCTAVO_SEED", "9")
    got = engine_config(parsed(*arguments))
    assert {name: getattr(got, name) for name in given} == given
    assert got.seed == 9
    assert engine_config(parsed()).block_size == 64
    assert engine_config(parsed("--no-enable-prefix-caching")).enable_prefix_caching is False
    assert engine_config(parsed("--enable-prefix-caching")).enable_prefix_caching is True
    with pytest.raises(ConfigError, match="true or false"):
        engine_config(parsed("--cascade-attention", "perhaps"))
    monkeypatch.delenv("OCTAVO_BLOCK_SIZE")
    assert engine_config(parsed()).block_size == 16


def test_flags_reach_the_model(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path) -> None:
    free = tiny.chat([{"role": "user", "content": "hello"}], GREEDY)[0].outputs[0]
    base = ("run", "--model", tiny_llama_dir, "hello", "--json")
    stopped = json.loads(invoke(*base, *LIMIT, "--stop-token-ids", free.token_ids[4]).out)
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", free.token_ids[4])
    stop = free.text[5:8]
    by_text = json.loads(invoke(*base, *LIMIT, "--stop", stop).out)
    assert (by_text["finish_reason"], by_text["stop_reason"]) == ("stop", stop)
    assert by_text["text"] == free.text[: free.text.index(stop)]
    only = json.loads(invoke(*base, *LIMIT, "--allowed-token-ids", "40,41").out)
    assert set(only["token_ids"]) <= {40, 41}
    short = json.loads(invoke(*base, "--max-model-len", 60, "--ignore-eos").out)
    assert short["prompt_tokens"] + short["completion_tokens"] == 60


def test_help_names_every_flag(invoke: Invoke) -> None:
    for command in ("run", "chat"):
        code, out, err = invoke(command, "--help")
        assert (code, err) == (0, "")
        for name in ("--model", "-hf", "--temperature", "--max-num-seqs", "--system", "--json"):
            assert name in out
        assert "remote" not in out


# --- processes ---

ENDLESS = ("--ignore-eos", "--no-repetition-detection")


def program(tiny: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "octavo", "run", "--model", str(tiny), *arguments]


def test_a_pipe_in_and_a_reader_that_goes_away(tiny_llama_dir: Path) -> None:
    """`echo hi | octavo run | head -c 1` ends without a word."""
    child = subprocess.Popen(
        program(tiny_llama_dir, *ENDLESS), env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin and child.stdout and child.stderr
    fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, 4096)  # it cannot write all before we have gone
    child.stdin.write(b"hi\n")
    child.stdin.close()
    assert len(child.stdout.read(1)) == 1
    child.stdout.close()
    assert child.wait() == 141
    assert child.stderr.read() == b""
    child.stderr.close()


def test_a_folder_for_blocks(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    """What was in memory when the program ended is there for the next one, and nothing of the engine outlives its end:
    the extension tells of what does."""
    for hit in (0, 176):
        done = subprocess.run(
            [*program(tiny_gemma3_dir, "again " * 30, "--raw", "--max-tokens", "2", "--temperature", "0", "--json"),
             "--kv-offload-dir", str(tmp_path / "kv")],
            env=ENV, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=120,
        )  # fmt: skip
        assert done.stderr == b""
        assert json.loads(done.stdout)["cached_tokens"] == hit


def test_interrupting_an_answer(tiny_llama_dir: Path) -> None:
    """Ctrl-C ends with 130, a line end after what was printed, and no traceback."""
    child = subprocess.Popen(
        program(tiny_llama_dir, "hi", *ENDLESS), env=ENV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout
    fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, 4096)  # it cannot be done before it is interrupted
    first = child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    rest, err = child.communicate()
    assert (child.returncode, err) == (130, b"")
    assert (first + rest).endswith(b"\n")


def test_on_a_terminal(tiny_llama_dir: Path) -> None:
    """Speed on stderr; control characters that the model writes are shown and not obeyed."""
    master, slave = pty.openpty()
    escape = 3 + 256 - 68 + 27  # byte-level BPE: printable bytes come first, control characters behind them
    child = subprocess.Popen(
        program(tiny_llama_dir, "hi", "--max-tokens", "5", "--allowed-token-ids", str(escape)),
        env=ENV, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while select.select([master], [], [], 30)[0]:
        try:
            data = os.read(master, 4096)
        except OSError:  # Linux reports the end of a pty so
            break
        shown += data
    os.close(master)
    assert child.wait(30) == 0
    answer = shown[shown.index(b"\\x1b") :]
    assert answer.startswith(b"\\x1b" * 5)
    assert b"5 generated tokens" in answer
    assert b"\x1b[31m" not in answer


def test_control_characters_are_made_visible() -> None:
    assert harmless("a\tb\n\x1b[2J\r\x00\x9b é🙂") == "a\tb\n\\x1b[2J\\r\\x00\\x9b é🙂"
