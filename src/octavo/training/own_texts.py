"""Texts that a model writes by itself, and its hidden states of them: all that a head learns from.

A chat model is given nothing but the beginning of a user's turn, writes what a user may ask, and then answers it
(Magpie; Xu et al., 2024). Another model writes on from the beginning of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from octavo.core.errors import ConfigError, InvalidRequestError
from octavo.core.params import SamplingParams

if TYPE_CHECKING:
    from octavo.core.plan import StepPlan, StepResult
    from octavo.llm import LLM

_MARK = "1f0e6c5b"  # where a user's words would stand
_TEMPERATURES = (0.0, 0.5, 1.0)  # of answers, in turn: guesses are asked for at all of them
_ROUND = 64  # texts that are written at once


def write_texts(llm: LLM, num_tokens: int, max_tokens: int, seed: int) -> Iterator[tuple[list[int], int]]:
    """Texts of at least `num_tokens` tokens together, as token ids of prompt and answer, of at most `max_tokens` each,
    and the number of tokens that are the prompt's.

    Raises ConfigError where so short texts have no room for an answer."""
    beginning = _beginning_of_user_turn(llm)
    number = written = 0
    while written < num_tokens:
        questions = _questions(llm, beginning, max(max_tokens // 4, 1), seed + number)
        asked = [prompt for prompt in questions if len(prompt) < max_tokens]
        if not asked:
            shortest = min(map(len, questions), default=0)
            raise ConfigError(
                f"texts of {max_tokens} tokens are too short: what stands before an answer has {shortest}"
            )
        params = []
        for index, prompt in enumerate(asked):
            room = max_tokens - len(prompt)
            temperature = _TEMPERATURES[index % len(_TEMPERATURES)]
            params.append(SamplingParams(temperature=temperature, seed=seed + number + index, max_tokens=room))
        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in asked]
        for prompt, output in zip(asked, llm.generate(prompts, params, use_tqdm=False), strict=True):
            token_ids = prompt + list(output.outputs[0].token_ids)
            written += len(token_ids)
            yield token_ids, len(prompt)
        number += _ROUND


def _questions(llm: LLM, beginning: str | None, max_tokens: int, seed: int) -> list[list[int]]:
    """Prompts that end where an answer begins."""
    if beginning is None:  # no chat model: any token begins a text
        before = llm.tokenizer.encode("")
        vocab_size = min(llm.tokenizer.vocab_size, llm.model_config.vocab_size)
        first = np.random.default_rng(seed).integers(0, vocab_size, _ROUND).tolist()
        return [[*before, token_id] for token_id in first]
    token_ids = llm.tokenizer.encode(beginning, add_special_tokens=False)
    params = [SamplingParams(temperature=1, top_p=0.95, seed=seed + i, max_tokens=max_tokens) for i in range(_ROUND)]
    turns = llm.generate([{"prompt_token_ids": token_ids}] * _ROUND, params, use_tqdm=False)
    prompts = []
    for turn in turns:
        with suppress(InvalidRequestError):  # what it wrote may spell a special token
            text = turn.outputs[0].text.strip() or "?"
            prompt = llm._frontend.chat_prompt(_ask(text), None, {"add_generation_prompt": True})
            prompts.append(list(prompt["prompt_token_ids"]))
    return prompts


def _ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _beginning_of_user_turn(llm: LLM) -> str | None:
    """What a chat template writes before a user's words; None for a model that has none."""
    try:
        text = str(llm._frontend.chat_prompt(_ask(_MARK), None, {"add_generation_prompt": True})["prompt"])
    except Exception:
        return None
    return text[: text.index(_MARK)] if _MARK in text else None


def hidden_states(llm: LLM, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float16]]:
    """After the final norm, [tokens, hidden_size] of each text."""
    found: dict[str, list[NDArray[np.floating]]] = {}

    def listen(plan: StepPlan, result: StepResult) -> None:
        for grant, one in zip(plan.grants, result.results, strict=True):
            rows = found.setdefault(grant.request_id, [])
            rows[grant.start :] = [row.hidden[0] for row in one.rows if row.hidden]

    llm._engine.step_listeners.append(listen)
    try:
        prompts: list[Any] = [{"prompt_token_ids": list(text)} for text in texts]
        outputs = llm.embed(prompts, use_tqdm=False)
    finally:
        llm._engine.step_listeners.remove(listen)
    return [np.array(found[output.request_id], np.float16) for output in outputs]
