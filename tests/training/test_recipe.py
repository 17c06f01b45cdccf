"""A head that was trained on a model's own texts guesses better than one that was not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import LLM, ConfigError, SamplingParams
from octavo.cli import train_head as command
from octavo.training.own_texts import hidden_states, write_texts
from octavo.training.recipe import Recipe, train_head
from tests.cli.conftest import Invoke, invoke

__all__ = ["invoke"]  # the fixture

SETTINGS: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 32}
RECIPE = Recipe(tokens=10_000, text_tokens=90, steps=250, draft_vocab=200, places=2, seed=1)


def test_it_learns(tiny_dir: Path, tmp_path: Path) -> None:
    told: list[str] = []
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        before = train_head(llm, RECIPE._replace(steps=1), told.append)
        found = train_head(llm, RECIPE, told.append)
        params = SamplingParams(temperature=0.7, seed=1, max_tokens=60, ignore_eos=True, logprobs=1)
        (expected,) = llm.generate(["hello there"], params)
    assert found.agreement[0] > before.agreement[0] + 0.05 and len(found.agreement) == 2
    assert len(found.token_ids) == 200 and (np.diff(found.token_ids) > 0).all()
    assert any("tokens and their states" in line for line in told)
    accepted = []
    for number, one in enumerate((before, found)):
        path = tmp_path / f"{number}.safetensors"
        one.save(path)
        config = {"method": "draft_head", "model": str(path), "adaptive": False}
        with LLM(str(tiny_dir), **SETTINGS, speculative_config=config) as llm:
            (answer,) = llm.generate(["hello there"], params)
            assert answer.outputs[0].token_ids == expected.outputs[0].token_ids
            params_of_many = [params.but(seed=seed) for seed in range(20)]
            llm.generate(["hello there"] * 20, params_of_many)
            assert llm.speculation_stats is not None
            accepted.append(llm.speculation_stats.num_accepted_tokens)
    assert accepted[1] > accepted[0]


def test_texts_and_states(tiny_dir: Path) -> None:
    """States are those of each token in its place, however the texts are cut into steps."""
    with LLM(str(tiny_dir), **SETTINGS, max_num_batched_tokens=32) as llm:
        texts = list(write_texts(llm, 500, 40, 3))
        assert sum(len(one) for one, _ in texts) >= 500
        assert all(0 < count < len(one) <= 40 for one, count in texts)
        assert texts == list(write_texts(llm, 500, 40, 3)) != list(write_texts(llm, 500, 40, 4))
        together = hidden_states(llm, [one for one, _ in texts[:6]])
        assert [len(one) for one in together] == [len(one) for one, _ in texts[:6]]
        for (text, _), states in zip(texts, together, strict=False):
            (alone,) = hidden_states(llm, [text])
            assert (alone == states).all()
        assert not llm._engine.step_listeners


def test_a_chat_model_asks_itself(smollm2_path: Path) -> None:
    with LLM(str(smollm2_path), max_model_len=256, max_num_seqs=32) as llm:
        texts = []
        for text, num_prompt in write_texts(llm, 1, 64, 0):
            texts.append((llm.tokenizer.decode(text[:num_prompt], skip_special_tokens=False), len(text)))
    assert texts and all(prompt.count("<|im_start|>user\n") == 1 for prompt, _ in texts)
    assert all(prompt.endswith("<|im_start|>assistant\n") and length <= 64 for prompt, length in texts)


def test_the_command(tiny_dir: Path, tmp_path: Path, invoke: Invoke) -> None:
    path = tmp_path / "head.safetensors"
    flags = ("--tokens", "1000", "--text-tokens", "32", "--minutes", "0.001", "--draft-vocab", "50", "--places", "2")
    code, out, err = invoke("train-head", "-v", str(tiny_dir), "--output", str(path), "--max-model-len", "64", *flags)
    assert code == 0, err
    assert "of its first, second, … guesses" in out and "tokens and their states" in err
    guessing = ("--speculative-config", f'{{"method": "draft_head", "model": "{path}", "adaptive": false}}')
    flags = ("run", "--model", str(tiny_dir), "--max-tokens", "20", "--seed", "1", "--raw", "hello")
    assert invoke(*flags, *guessing).out == invoke(*flags).out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "5"], "--tokens: must be at least 1000, not 5"),
        (["--text-tokens", "1"], "--text-tokens: must be at least 16"),
        (["--minutes", "0"], "--minutes: must be more than 0"),
        (["--minutes", "nan"], "--minutes: must be more than 0"),
        (["--cell-size", "0"], "--cell-size: must be at least 1"),
        (["--seed", "-1"], "--seed: must be from 0"),
        (["--output", "/nowhere/at/all"], "--output: /nowhere/at/all cannot be written"),
    ],
)
def test_bad_flags(tmp_path: Path, invoke: Invoke, flags: list[str], message: str) -> None:
    code, _, err = invoke("train-head", "smollm2", "--output", str(tmp_path / "x"), *flags)
    assert code == 2 and message in err and not list(tmp_path.iterdir())
    code, _, err = invoke("train-head", "smollm2")
    assert code == 2 and "--output" in err


def test_without_torch(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, _, err = invoke("train-head", "smollm2", "--output", str(tmp_path / "x"))
    assert code == 2 and "pip install torch" in err


def test_texts_without_room_for_an_answer(smollm2_path: Path) -> None:
    with LLM(str(smollm2_path), max_model_len=256) as llm, pytest.raises(ConfigError, match="16 tokens are too short"):
        list(write_texts(llm, 100, 16, 0))


def test_a_model_that_begins_with_nothing(tiny_dir: Path, tmp_path: Path) -> None:
    """Neither a chat template nor a token that texts begin with."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    (folder / "tokenizer_config.json").write_text("{}")
    with LLM(str(folder), **SETTINGS) as llm:
        texts = list(write_texts(llm, 500, 40, 3))
    assert sum(len(one) for one, _ in texts) >= 500 and all(count == 1 for _, count in texts)


def test_more_places_than_answers_have(tiny_dir: Path) -> None:
    with LLM(str(tiny_dir), **SETTINGS) as llm:
        for places in (47, 500):
            with pytest.raises(ConfigError, match=f"places: {places} are more than"):
                train_head(llm, RECIPE._replace(tokens=1000, text_tokens=48, places=places), print)
