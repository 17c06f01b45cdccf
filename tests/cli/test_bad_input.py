"""Whatever is wrong with the input: exit code 2, one clear line on stderr, nothing on stdout, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from octavo.formats import GGUFFile

from .conftest import Invoke, Result

SOURCE = Path(__file__).parents[2] / "src"


def assert_refused(result: Result, *parts: str, lines: int = 1) -> None:
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.count("\n") == lines, result.err
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err


# --- prompts and parameters ---


@pytest.mark.parametrize("command", ["run", "chat"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "nan"], "temperature: must be at least 0 and finite, not nan"),
        (["--temperature", "inf"], "temperature: must be at least 0 and finite, not inf"),
        (["--temperature", "-1"], "temperature: must be at least 0 and finite, not -1.0"),
        (["--temperature", "1e999"], "temperature:"),
        (["--temperature", "hot"], "--temperature: must be a number, not 'hot'"),
        (["--top-p", "0"], "top_p: must be more than 0 and at most 1"),
        (["--top-p", "nan"], "top_p:"),
        (["--top-k", "-2"], "top_k: must be between -1 and"),
        (["--top-k", "1.5"], "--top-k: must be an integer, not '1.5'"),
        (["--min-p", "1.1"], "min_p:"),
        (["--repetition-penalty", "0"], "repetition_penalty: must be at least 0.001"),
        (["--presence-penalty", "nan"], "presence_penalty:"),
        (["--frequency-penalty", "3"], "frequency_penalty:"),
        (["--max-tokens", "0"], "max_tokens: must be between 1"),
        (["--max-tokens", "-5"], "max_tokens:"),
        (["--max-tokens", "9" * 5000], "--max-tokens: must be an integer"),
        (["--min-tokens", "5", "--max-tokens", "3"], "min_tokens: 5 is more than max_tokens=3"),
        (["--min-tokens", "5000"], "min_tokens:"),
        (["--seed", "-1"], "seed:"),
        (["--seed", str(2**64)], "seed:"),
        (["--logprobs", "-1"], "logprobs:"),
        (["--json", "--logprobs", "21"], "logprobs: must be at most max_logprobs=20"),
        (["--logprobs", "2"], "--logprobs: is shown with --json only"),
        (["--prompt-logprobs", "0"], "--prompt-logprobs: is shown with --json only"),
        (["--kv-offload-bytes", "1000000"], "kv_offload_bytes: needs kv_offload_dir"),
        (["--prompt-logprobs", "x"], "--prompt-logprobs:"),
        (["--stop", ""], "stop: an empty string is not allowed"),
        (["--stop", "x" * 5000], "stop:"),
        (["--stop", "\udcff"], "stop: lone surrogate"),
        (["--bad-words", "\udcff"], "bad_words: lone surrogate"),
        (["--stop-token-ids", "99999999"], "stop_token_ids: token ids must be integers from 0 to"),
        (["--stop-token-ids", "-1"], "stop_token_ids:"),
        (["--stop-token-ids", "1,,2"], "--stop-token-ids: must be an integer, not ''"),
        (["--allowed-token-ids", "99999999"], "allowed_token_ids:"),
        (["--logit-bias", "{"], "--logit-bias: is not valid JSON"),
        (["--logit-bias", "[" * 100_000], "--logit-bias: is not valid JSON"),
        (["--logit-bias", "[5]"], "--logit-bias: must be a JSON object"),
        (["--logit-bias", '{"x": 1}'], "logit_bias: a token id must be"),
        (["--logit-bias", '{"5": NaN}'], "logit_bias: of token 5 must be at least"),
        (["--logit-bias", '{"99999999": 1}'], "logit_bias:"),
        (["--no-detokenize", "--stop", "x"], "stop: stop strings need detokenize=True"),
        (["--system", "\udcff"], "--system: is not valid UTF-8"),
        (["--trust-remote-code"], "code from a model directory is never run"),
        (["--max-num-seqs", "0"], "max_num_seqs: must be at least 1"),
        (["--max-num-seqs", "many"], "--max-num-seqs: must be an integer, not 'many'"),
        (["--max-model-len", "99999"], "max_model_len: must be at most 4096"),
        (["--block-size", "17"], "block_size: must be one of 1, 16, 32, 64"),
        (["--backend", "abacus"], "backend: must be one of auto, cpu, reference"),
        (["--kv-cache-memory-bytes", "1000"], "kv_cache_memory_bytes: 1000 B"),
        (["--kv-cache-memory-bytes", str(2**62)], "the model does not fit: memory plan"),
    ],
)
def test_parameters(invoke: Invoke, tiny_llama_dir: Path, command: str, arguments: list[str], message: str) -> None:
    prompt = ["hello"] if command == "run" else []
    assert_refused(invoke(command, "--model", tiny_llama_dir, *arguments, *prompt, stdin=b"hello\n"), message)


@pytest.mark.parametrize("command", ["run", "chat"])
@pytest.mark.parametrize("arguments", [["--temprature", "1"], ["--temperature"], ["-x"], ["a", "b"], ["--json=5"]])
def test_usage(invoke: Invoke, tiny_llama_dir: Path, command: str, arguments: list[str]) -> None:
    """Unknown or incomplete flags: a short usage line and the error."""
    result = invoke(command, "--model", tiny_llama_dir, *arguments)
    assert_refused(result, f"usage: octavo {command} [-h]", "error:", lines=2)


def test_n_is_for_run_only(invoke: Invoke, tiny_llama_dir: Path) -> None:
    assert_refused(invoke("chat", "--model", tiny_llama_dir, "--n", 2), "--n", lines=2)
    for n in (0, -1, 1025):
        assert_refused(invoke("run", "--model", tiny_llama_dir, "--n", n, "x"), "n: must be between 1 and 1024")


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ([], b"", "prompt: is empty"),
        ([""], b"", "prompt: is empty"),
        ([" \n"], b"\n", "prompt: is empty"),
        (["--raw", ""], b"", "prompt: is empty"),
        (["\udcff"], b"", "prompt: is not valid UTF-8 at character 0"),
        (["a\ud800"], b"", "prompt: is not valid UTF-8 at character 1"),
        (["hi"], b"ab\xff", "stdin: is not valid UTF-8 at byte 2"),
        (["x" * 5000], b"", "prompt: has 5"),
        ([], b"x" * 5000, "prompt: has 5"),
        (["--max-model-len", "20", "hello hello hello hello"], b"", "with max_model_len=20 at most 19"),
        (["a", "--prompt", "b"], b"", "prompt: is given twice"),
        (["a", "--raw", "--system", "b"], b"", "--system: has no effect with --raw"),
        (["a", "--no-detokenize"], b"", "--no-detokenize: leaves token ids, which are shown with --json only"),
    ],
)
def test_prompts(invoke: Invoke, tiny_llama_dir: Path, arguments: list[str], stdin: bytes, message: str) -> None:
    assert_refused(invoke("run", "--model", tiny_llama_dir, *arguments, stdin=stdin), message)


def test_no_prompt_at_a_terminal(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path) -> None:
    """Guards a program that sits and waits for a person who waits for it."""
    monkeypatch.setattr("io.TextIOWrapper", _Terminal)
    assert_refused(invoke("run", "--model", tiny_llama_dir), "prompt: is missing; give one as an argument")


class _Terminal:
    def __init__(self, _: object) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_a_conversation_without_text(invoke: Invoke, tiny_llama_dir: Path) -> None:
    result = invoke("chat", "--model", tiny_llama_dir, "--json", "--no-detokenize", stdin=b"hi\n")
    assert_refused(result, "--no-detokenize: a conversation goes on from the text of its answers")


def test_a_line_that_is_not_utf_8_in_chat(invoke: Invoke, tiny_llama_dir: Path) -> None:
    result = invoke("chat", "--model", tiny_llama_dir, stdin=b"\xff\n")
    assert_refused(result, "stdin: is not valid UTF-8 at byte 0 of a line")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("OCTAVO_MAX_NUM_SEQS", "abc", "OCTAVO_MAX_NUM_SEQS: must be an integer, not 'abc'"),
        ("OCTAVO_MAX_NUM_SEQS", "0", "OCTAVO_MAX_NUM_SEQS: must be at least 1, not 0"),
        ("OCTAVO_MAX_MODEL_LEN", "1e3", "OCTAVO_MAX_MODEL_LEN:"),
        ("OCTAVO_BACKEND", "abacus", "OCTAVO_BACKEND: must be one of"),
        ("OCTAVO_SEED", "-1", "OCTAVO_SEED: must be at least 0"),
        ("OCTAVO_MODEL", "smolm2", "Did you mean smollm2?"),
        ("OCTAVO_LOG_LEVEL", "loud", "OCTAVO_LOG_LEVEL: must be one of debug, info, warning, error, critical"),
    ],
)
def test_variables(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    monkeypatch.setenv(variable, value)
    assert_refused(invoke("run", "hi"), message)


@pytest.mark.parametrize("command", ["models", "run"])
def test_an_unknown_variable_is_told(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path, command: str
) -> None:
    """Whatever the command: a misspelt OCTAVO_HOME matters to those that need no engine."""
    monkeypatch.setattr("octavo.config._told", set())
    monkeypatch.setenv("OCTAVO_MAX_NUM_SEQ", "4")
    rest = ["hi", "--model", tiny_llama_dir, "--max-tokens", 1] if command == "run" else []
    result = invoke(command, *rest)
    assert result.code == 0
    hint = "no such variable is known, and it has no effect; did you mean OCTAVO_MAX_NUM_SEQS?"
    assert result.err == f"octavo: OCTAVO_MAX_NUM_SEQ: {hint}\n"


@pytest.mark.parametrize(
    "name", ["--threads=1", "--instruction-set=avx2", "--pin-threads=true", "--cascade-attention=off"]
)
def test_flags_of_another_backend(invoke: Invoke, tiny_llama_dir: Path, name: str) -> None:
    result = invoke("run", "--model", tiny_llama_dir, "--backend", "reference", name, "hi")
    assert_refused(result, f"{name.partition('=')[0]}: has no effect with the reference backend")


# --- model files ---


def missing(folder: Path) -> Path:
    return folder / "nothing.gguf"


def empty(folder: Path) -> Path:
    return write(folder / "m.gguf", b"")


def wrong_magic(folder: Path) -> Path:
    return write(folder / "m.gguf", b"GGML" + bytes(100))


def text_file(folder: Path) -> Path:
    return write(folder / "model.txt", b"hello")


def empty_folder(folder: Path) -> Path:
    return folder


def folder_without_weights(folder: Path) -> Path:
    write(folder / "config.json", json.dumps({"model_type": "llama"}).encode())
    return folder


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("command", ["run", "chat"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "does not exist"),
        (empty, "m.gguf"),
        (wrong_magic, "magic"),
        (text_file, "is not a model"),
        (empty_folder, "is a folder without a config.json"),
        (folder_without_weights, "safetensors"),
    ],
)
def test_model_paths(invoke: Invoke, tmp_path: Path, command: str, make: Callable[[Path], Path], message: str) -> None:
    prompt = ["hello"] if command == "run" else []
    assert_refused(invoke(command, "--model", make(tmp_path), *prompt), message, str(tmp_path))


@pytest.mark.parametrize("name", ["", "\udcff", "a\nb", "/\udcff/x.gguf"])
def test_model_names(invoke: Invoke, name: str) -> None:
    result = invoke("run", "--model", name, "hi")
    assert result.code == 2 and result.out == "" and result.err.startswith("octavo: error: ")
    assert "Traceback" not in result.err


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


LONG = "a" * 5000


@pytest.mark.parametrize(
    "arguments",
    [
        [LONG], ["--" + LONG], ["pull", LONG], ["pull", LONG + "/" + LONG], ["run", "--model", LONG, "x"],
        ["run", "--" + LONG, "x"], ["models", LONG], ["cache", LONG], ["bench", LONG], ["run", "--backend", LONG, "x"],
        ["run", "--seed", "9" * 5000, "x"], ["run", "--block-size", "9" * 5000, "x"],
    ],
    ids=lambda arguments: " ".join(word[:12] for word in arguments),
)  # fmt: skip
def test_what_is_long_is_told_in_short(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "octavo: error: " in result.err or "error:" in result.err
    assert len(result.err) < 1500


def test_unknown_architecture(invoke: Invoke, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "abacus"}))
    assert_refused(invoke("run", "--model", folder, "hi"), "'abacus' is not supported; supported: ", "llama", "gemma3")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_part(invoke: Invoke, folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert_refused(invoke("run", "--model", folder, "hi"), Path(name).suffix)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_part(invoke: Invoke, folder: Path, name: str, share: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * share)])
    assert_refused(invoke("run", "--model", folder, "hi"), name)


def test_code_in_the_model_folder_is_never_run(invoke: Invoke, folder: Path) -> None:
    """A folder with auto_map loads by its model_type or not at all; its Python files are not imported."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text("raise SystemExit('code ran')\n")
    result = invoke("run", "--model", folder, "hi", "--max-tokens", 2)
    assert (result.code, result.err) == (0, "")


def sections(path: Path) -> dict[str, int]:
    """Byte offsets inside each part of the header of a GGUF file, and of its data."""
    with GGUFFile(path) as file:
        data_start = path.stat().st_size - sum(-(-tensor.nbytes // 32) * 32 for tensor in file.tensors.values())
    head = path.read_bytes()[:data_start]
    assert head.rindex(b"_norm.weight") > data_start - 100, "the header ends with the last tensor's entry"
    return {
        "magic": 2,
        "version": 6,
        "tensor count": 12,
        "metadata count": 20,
        "first key's length": 28,
        "first key": 36,
        "a value": head.index(b"llama.context_length") + 22,
        "length of an array": head.index(b"tokenizer.ggml.tokens") + 21 + 4 + 4 + 4,
        "a string of an array": head.index(b"tokenizer.ggml.tokens") + 5000,
        "merges": head.index(b"tokenizer.ggml.merges") + 5000,
        "first tensor's name": head.index(b"blk.0.") + 3,
        "a tensor's shape": head.index(b"blk.0.ffn_down.weight") + 21 + 8,
        "a tensor's offset": head.index(b"blk.10.ffn_down.weight") + 22 + 4 + 16 + 4 + 3,
        "padding": data_start - 1,
        "data": data_start + 1000,
        "end": path.stat().st_size - 1,
    }


def test_gguf_truncated_in_every_section(invoke: Invoke, smollm2_path: Path, tmp_path: Path) -> None:
    cuts = sections(smollm2_path)
    data_start = cuts["padding"] + 1
    head = smollm2_path.read_bytes()[:data_start]
    path = tmp_path / "m.gguf"
    for section, size in cuts.items():
        path.write_bytes(head[:size])
        os.truncate(path, size)  # data is a hole: its values do not matter here
        result = invoke("run", "--model", path, "hi")
        assert result.code == 2, (section, result)
        assert_refused(result, str(path))


def test_gguf_of_unknown_architecture(invoke: Invoke, smollm2_path: Path, tmp_path: Path) -> None:
    head = bytearray(smollm2_path.read_bytes())
    at = head.index(b"general.architecture") + 20 + 4 + 8
    assert head[at : at + 5] == b"llama"
    head[at : at + 5] = b"abacu"
    path = write(tmp_path / "m.gguf", bytes(head))
    assert_refused(invoke("run", "--model", path, "hi"), "'abacu'", "llama", "gemma3")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything: take its rights away for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["m.gguf", "m.bin", "folder", "config.json", "model.safetensors", "tokenizer.json"])
def test_unreadable_model(invoke: Invoke, name: str, folder: Path, tmp_path: Path) -> None:
    for parent in tmp_path.parents:
        if parent.owner() == tmp_path.owner() and len(parent.parts) > 2:
            parent.chmod(0o755)
    tmp_path.chmod(0o755)
    path = write(tmp_path / name, b"GGUF") if name.startswith("m.") else folder
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
    (path / name if name.count(".") and path is folder else path).chmod(0)
    with as_nobody():
        result = invoke("run", "--model", path, "hi")
    folder.chmod(0o755)
    assert_refused(result, str(path))


# --- a process ---


def test_arguments_that_are_not_utf_8() -> None:
    """Bytes as the shell gives them."""
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    for arguments in ([b"caf\xe9"], [b"--model", b"\xff\xfe"], [b"--stop", b"\xff", b"hi", b"--model", b"./\xff"]):
        done = subprocess.run(
            [sys.executable, "-m", "octavo", "run", *arguments], env=env, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.startswith(b"octavo: error: ") and done.stderr.count(b"\n") == 1


def test_a_token_that_the_model_does_not_know(invoke: Invoke, tiny_sentencepiece_dir: Path) -> None:
    for flags, field in ((["--raw"], "prompt"), ([], "messages")):
        result = invoke("run", *flags, "--model", tiny_sentencepiece_dir, "hello<pad>")
        assert_refused(result, f"{field}: holds '<pad>', token ")
