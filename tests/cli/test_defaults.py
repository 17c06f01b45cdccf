"""How `run` and `chat` sample when nobody says: as the model's files recommend, and never round in circles."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, BeamSearchParams, RepetitionDetectionParams, SamplingParams
from octavo.core.repetition import repeats

from .conftest import Invoke, Result
from .test_bad_input import assert_refused
from .test_run import parsed, sampling_params

README = Path(__file__).parents[2] / "README.md"
NOTHING_SAID = {"temperature": 0.7, "top_p": 0.95, "top_k": 0, "min_p": 0.05, "repetition_penalty": 1.0}


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, whose advice may be changed."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def recommend(model: Path, **values: Any) -> None:
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def ask(invoke: Invoke, command: str, model: Path, *arguments: object) -> Result:
    """The message "hello", as each command takes it."""
    if command == "run":
        return invoke("run", "--model", model, *arguments, "hello")
    return invoke("chat", "--model", model, *arguments, stdin=b"hello\n")


def asked(invoke: Invoke, model: Path, *arguments: object, command: str = "run") -> dict[str, Any]:
    result = ask(invoke, command, model, "--json", "--max-tokens", 16, *arguments)
    assert (result.code, result.err) == (0, ""), result
    return dict(json.loads(result.out))


@pytest.mark.parametrize("command", ["run", "chat"])
@pytest.mark.parametrize(
    ("recommended", "flags", "changed"),
    [
        ({}, [], {}),
        ({"top_k": 20, "temperature": 0.3}, [], {"top_k": 20, "temperature": 0.3}),
        ({"top_p": 0.5, "min_p": 0.2, "repetition_penalty": 1.1}, [], {"top_p": 0.5, "min_p": 0.2,
          "repetition_penalty": 1.1}),
        ({"temperature": 0.3}, ["--temperature", "0.9", "--top-p", "1"], {"temperature": 0.9, "top_p": 1.0}),
        ({"do_sample": False}, [], {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0}),
        ({"do_sample": False, "top_k": 7}, ["--temperature", "1"], {"temperature": 1.0}),
        ({"top_p": 0.5}, ["--temperature", "0"], {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0}),
    ],
)  # fmt: skip
def test_flag_over_model_over_default(
    invoke: Invoke, model: Path, command: str, recommended: dict[str, Any], flags: list[str], changed: dict[str, Any]
) -> None:
    recommend(model, **recommended)
    answer = asked(invoke, model, *flags, command=command)
    assert answer["sampling"] == NOTHING_SAID | changed
    assert (answer["seed"] is None) == (answer["sampling"]["temperature"] == 0)
    with LLM(str(model)) as llm:
        prompt = llm.chat_prompt([{"role": "user", "content": "hello"}])
        params = SamplingParams(**answer["sampling"], max_tokens=16, seed=answer["seed"])
        assert llm.generate(prompt, params)[0].outputs[0].token_ids == answer["token_ids"]


def test_gguf_files_recommend_too(smollm2_path: Path) -> None:
    """The real file says nothing; what one says is in tests/loading/test_generation_config.py."""
    with LLM(str(smollm2_path), max_model_len=64) as llm:
        assert llm.generation_config == {}


def test_every_answer_is_drawn_anew_and_can_be_repeated(invoke: Invoke, model: Path) -> None:
    first, second = asked(invoke, model), asked(invoke, model)
    assert first["seed"] != second["seed"] and first["token_ids"] != second["token_ids"]
    again = asked(invoke, model, "--seed", first["seed"])
    assert again["token_ids"] == first["token_ids"] and again["seed"] == first["seed"]
    lines = invoke("chat", "--model", model, "--json", "--max-tokens", 4, stdin=b"hello\n/clear\nhello\n").out
    assert len({json.loads(line)["seed"] for line in lines.splitlines()}) == 2


def test_a_beam_search_takes_what_concerns_it(invoke: Invoke, model: Path) -> None:
    recommend(model, temperature=0.3, top_k=3, repetition_penalty=1.5)
    answer = asked(invoke, model, "--beam-width", 3, "--raw")
    assert answer["sampling"] is None and answer["seed"] is None
    with LLM(str(model)) as llm:
        params = BeamSearchParams(beam_width=3, max_tokens=16, repetition_penalty=1.5)
        assert llm.beam_search("hello", params)[0].outputs[0].token_ids == answer["token_ids"]


@pytest.mark.parametrize("command", ["run", "chat"])
@pytest.mark.parametrize(
    "flags", [["--top-p", "0.5"], ["--top-k", "5"], ["--min-p", "0.1"], ["--seed", "1"], ["--n", "3"]]
)
def test_flags_without_effect_at_temperature_0(invoke: Invoke, model: Path, command: str, flags: list[str]) -> None:
    """Before the model is loaded where the temperature is a flag, and after where it is the model's own."""
    if command == "chat" and flags[0] == "--n":
        return
    for temperature in ("0", "0.000001"):
        result = ask(invoke, command, Path("/nowhere.gguf"), "--temperature", temperature, *flags)
        assert_refused(result, f"{flags[0]}: ", "at temperature 0")
    recommend(model, do_sample=False)
    result = ask(invoke, command, model, *flags)
    assert_refused(result, f"{flags[0]}: ", "at temperature 0, which the model's files ask for")


def test_advice_that_cannot_be_used_is_told(invoke: Invoke, model: Path) -> None:
    recommend(model, top_p=7, temperature=0.2)
    result = invoke("run", "--model", model, "hello", "--json", "--max-tokens", 2)
    assert result.code == 0 and json.loads(result.out)["sampling"] == NOTHING_SAID | {"temperature": 0.2}
    assert result.err.count("\n") == 1 and "generation_config.json: top_p: must be more than 0" in result.err


# --- loops ---

LOOP = ("--temperature", "0", "--ignore-eos", "--logit-bias", '{"40": 1000}')
NOTE = "octavo: the answer ends here: it repeats itself; --no-repetition-detection lets it go on\n"


@pytest.mark.parametrize("command", ["run", "chat"])
@pytest.mark.parametrize("further", [[], ["--temperature", "1"], ["--json"]])
def test_a_loop_ends_the_answer(invoke: Invoke, model: Path, command: str, further: list[str]) -> None:
    """Guards an answer that repeats itself up to the end of the context: it ends, says so, and has its tokens."""
    result = ask(invoke, command, model, *LOOP, *further)
    assert (result.code, result.err) == (0, NOTE)
    if further == ["--json"]:
        answer = json.loads(result.out)
        assert (answer["finish_reason"], answer["stop_reason"]) == ("repetition", "repetition_detected")
        assert answer["token_ids"] == [40] * 64
    off = ask(invoke, command, model, "--max-model-len", 200, *LOOP, "--no-repetition-detection", "--json")
    assert json.loads(off.out)["finish_reason"] == "length" and "repeats" not in off.err


def test_loops_of_samples_and_beams(invoke: Invoke, model: Path) -> None:
    samples = invoke("run", "--model", model, "hello", "--json", "--n", 2, *LOOP[2:])
    assert [one["finish_reason"] for one in json.loads(samples.out)["outputs"]] == ["repetition"] * 2
    beams = invoke("run", "--model", model, "hello", "--json", "--beam-width", 2, *LOOP)
    assert json.loads(beams.out)["finish_reason"] == "repetition" and samples.err == beams.err == NOTE


def test_what_is_no_loop(invoke: Invoke, model: Path) -> None:
    """Neither 63 tokens of one kind, nor a greedy answer of this model, are taken for one."""
    defaults = sampling_params(parsed())
    assert isinstance(defaults.repetition_detection, RepetitionDetectionParams)
    assert not repeats([40] * 63, defaults.repetition_detection)
    assert SamplingParams().repetition_detection is None


# --- what is written about it ---


def test_the_table_in_the_readme_is_what_the_code_does() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    told = {name: (library.strip(), line.strip()) for name, library, line in rows}
    library, line = SamplingParams(), sampling_params(parsed())
    assert set(told) == {*NOTHING_SAID, "max_tokens", "repetition_detection", "seed", "num_return_sequences"}
    for name, value in NOTHING_SAID.items():
        assert told[name] == (f"{getattr(library, name):g}", f"the model's, else {value:g}")
        assert getattr(line, name) == value
    assert told["max_tokens"] == (str(library.max_tokens), "up to the model's context") and line.max_tokens is None
    found = line.repetition_detection
    assert isinstance(found, RepetitionDetectionParams) and found.min_count == 4
    sizes = f"{found.min_pattern_size} to {found.max_pattern_size} tokens four times in a row"
    assert told["repetition_detection"] == ("off", sizes)
