"""The ways of asking, on a real engine with a tiny random model: what is asked, and what is counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, InvalidRequestError, SamplingParams
from octavo.evaluation.modes import MODES, ModeSettings, Outcome, measure
from octavo.evaluation.runner import EvalParams, Evaluation, Run
from octavo.evaluation.tasks import Example, ExampleKey, make_example

SHORT = ModeSettings(max_tokens=7, margin_tokens=6, segment_tokens=250, passages=2, passage_tokens=60)


@pytest.fixture(scope="module")
def llm(tiny_llama_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama_dir), max_model_len=2048) as llm:
        yield llm


def example(llm: LLM, task: str = "niah_single", length: int = 1000) -> Example:
    key = ExampleKey(task, seed=0, sample=1, length=length, depth=0.5)
    return make_example(key, lambda text: len(llm.tokenizer.encode(text, add_special_tokens=False)))


def without_time(outcome: Outcome) -> Outcome:
    """Nor what depends on it: which of two sequences computed what they have in common, and which reused it."""
    assert outcome.error is None and outcome.seconds is not None and outcome.seconds > 0
    assert outcome.computed_tokens is not None and outcome.reused_tokens is not None
    total = outcome.computed_tokens + outcome.reused_tokens
    return replace(outcome, seconds=None, computed_tokens=total, reused_tokens=None)


def test_full_is_the_document_in_a_prompt(llm: LLM) -> None:
    made = example(llm)
    outcome = measure(llm, "full", made, SHORT)
    question = f"Answer the question with the help of the document.\n\nQuestion: {made.question}"
    text = f"Here is a document.\n\n<document>\n{made.document}\n</document>\n\n{question}"
    prompt = llm.chat_prompt([{"role": "user", "content": text}])
    (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=7))
    assert outcome.text == output.outputs[0].text and outcome.score == 0
    assert outcome.prompt_tokens == len(output.prompt_token_ids) > 1000
    assert outcome.generated_tokens == len(output.outputs[0].token_ids)
    assert outcome.computed_tokens == outcome.prompt_tokens + outcome.generated_tokens - 1
    assert (outcome.reused_tokens, outcome.kept_margins) == (0, None)


def test_without_notes_margins_ask_what_full_asks(llm: LLM) -> None:
    """So that a difference between the two is the notes' doing."""
    made = example(llm, "babi")
    full = measure(llm, "full", made, SHORT)
    none = measure(llm, "margins", made, replace(SHORT, threshold=1e6))
    every = measure(llm, "margins", made, replace(SHORT, threshold=-1e6))
    assert (none.text, none.prompt_tokens, none.kept_margins) == (full.text, full.prompt_tokens, 0)
    assert every.kept_margins is not None and every.kept_margins >= 3
    assert every.prompt_tokens is not None and full.prompt_tokens is not None
    assert every.prompt_tokens > full.prompt_tokens


def test_what_margins_reuse(llm: LLM) -> None:
    """The document is computed once, and shared by each margin and the answer."""
    outcome = measure(llm, "margins", example(llm), SHORT)
    assert outcome.computed_tokens is not None and outcome.reused_tokens is not None
    segments = 4
    assert 1000 * (segments + 1) / 2 < outcome.reused_tokens
    assert outcome.generated_tokens is not None and outcome.generated_tokens > 7
    prompts = segments * 220 + segments * 180 + 300  # behind a segment, about a note, and behind the document
    assert 1000 < outcome.computed_tokens < 1000 + prompts + outcome.generated_tokens


def test_retrieved_reads_the_passages_that_fit(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the needle among them, and the words of no other mode's prompt missing but the document's."""
    made, results = example(llm, "niah_multikey", 1500), []

    def ask(*given: Any, **named: Any) -> Any:
        results.append(LLM.ask(llm, *given, **named))
        return results[-1]

    monkeypatch.setattr(llm, "ask", ask)
    outcome = measure(llm, "retrieved", made, SHORT)
    (result,) = results
    assert 0 < len(result.passages) <= 2 and any(made.answers[0] in passage.text for passage in result.passages)
    prompt = llm.tokenizer.decode(result.prompt_token_ids)
    assert prompt.count(made.question) == 1 and made.answers[0] in prompt and "Behind each statement" not in prompt
    assert outcome.text == result.text and outcome.prompt_tokens == len(result.prompt_token_ids) < 700
    assert outcome.generated_tokens is not None
    assert outcome.computed_tokens == outcome.prompt_tokens + outcome.generated_tokens - 1


@pytest.mark.parametrize("mode", MODES)
def test_every_measurement_begins_with_an_empty_cache(llm: LLM, mode: str) -> None:
    """Guards a mode that looks cheap since another one, or the same before, has read the document."""
    made = example(llm)
    first = without_time(measure(llm, mode, made, SHORT))
    for other in MODES:
        measure(llm, other, made, SHORT)
    assert without_time(measure(llm, mode, made, SHORT)) == first


@pytest.mark.parametrize("mode", MODES)
def test_what_cannot_be_run_says_why(llm: LLM, mode: str) -> None:
    outcome = measure(llm, mode, example(llm, length=3000), SHORT)
    if mode == "retrieved":
        assert outcome.error is None
        return
    assert outcome.error is not None and "2048" in outcome.error
    assert outcome == Outcome(error=outcome.error), "and has no figures"
    if mode == "margins":
        outcome = measure(llm, mode, example(llm, length=3000), replace(SHORT, windows=True))
        assert outcome.error is None and outcome.prompt_tokens is not None and outcome.prompt_tokens < 2000


def test_a_model_without_a_chat_template_is_told_that_it_is_its_turn(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with LLM(str(model), max_model_len=2048) as llm:
        made = example(llm)
        full, margins = (measure(llm, mode, made, replace(SHORT, threshold=1e6)) for mode in ("full", "margins"))
        question = f"Answer the question with the help of the document.\n\nQuestion: {made.question}\n\nAnswer:"
        prompt = f"Here is a document.\n\n<document>\n{made.document}\n</document>\n\n{question}"
        (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=7))
        assert full.text == margins.text == output.outputs[0].text
        assert full.prompt_tokens == margins.prompt_tokens == len(output.prompt_token_ids)


def evaluation(llm: LLM, **given: Any) -> list[Run]:
    settings = {"tasks": ("niah_single", "vt"), "modes": ("full", "margins"), "lengths": (700, 800), "samples": 2}
    return list(Evaluation(llm, EvalParams(**{**settings, "settings": SHORT, **given})))


def test_every_example_is_asked_in_every_mode(llm: LLM) -> None:
    runs = evaluation(llm)
    assert [(run.example.length, run.example.task, run.example.sample, run.mode) for run in runs] == [
        (length, task, sample, mode)
        for length in (700, 800)
        for task in ("niah_single", "vt")
        for sample, modes in ((0, ("full", "margins")), (1, ("margins", "full")))
        for mode in modes
    ]
    for one, other in zip(runs[::2], runs[1::2], strict=True):
        assert one.example == other.example
    assert [run.example.depth for run in runs[:4]] == [0, 0, 0.25, 0.25]


def test_the_same_seed_gives_the_same_answers(llm: LLM) -> None:
    """And other seeds other examples."""

    def facts(runs: list[Run]) -> list[Run]:
        return [run._replace(outcome=without_time(run.outcome)) for run in runs]

    one, same, other = (facts(evaluation(llm, lengths=(700,), seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert not {run.example.document for run in one} & {run.example.document for run in other}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"tasks": ("niah_single", "vtt")}, "tasks: 'vtt' is none of niah_single, "),
        ({"tasks": ()}, "tasks: is empty"),
        ({"modes": ("full", "full")}, "modes: 'full' is given twice"),
        ({"modes": ("rag",)}, "modes: 'rag' is none of full, margins, retrieved"),
        ({"lengths": (0,)}, "lengths: must be between 1 and"),
        ({"lengths": (100,)}, "lengths: vt needs at least"),
        ({"lengths": (700, 2048)}, "lengths: 2048 tokens and an answer do not fit max_model_len=2048"),
        ({"depths": (101,)}, "depths: must be between 0 and 100"),
        ({"samples": 0}, "samples: must be between 1 and 1000"),
        ({"seed": -1}, "seed: must be between 0"),
        ({"settings": ModeSettings(segment_tokens=0)}, "segment_tokens: must be between 1"),
        ({"settings": ModeSettings(max_tokens=0)}, "max_tokens: must be between 1"),
        ({"settings": ModeSettings(threshold=float("nan"))}, "threshold: must be at least"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(llm: LLM, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        evaluation(llm, **given)
    assert problem in str(refused.value)


def test_longer_than_the_context_is_for_those_that_can_read_it(llm: LLM) -> None:
    given: dict[str, Any] = {"tasks": ("niah_single",), "lengths": (2500,), "samples": 1}
    runs = evaluation(llm, **given, settings=replace(SHORT, windows=True))
    assert {run.mode: run.outcome.error is None for run in runs} == {"full": False, "margins": True}
