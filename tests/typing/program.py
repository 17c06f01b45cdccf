"""What a user writes. It is never run: mypy reads it, strictly, and finds nothing."""

from __future__ import annotations

from octavo import (
    LLM,
    AsyncLLM,
    Branch,
    InvalidRequestError,
    Logprob,
    RequestFailedError,
    RequestOutput,
    SamplingParams,
    SelectResult,
)


def ask(llm: LLM) -> list[str]:
    try:
        outputs: list[RequestOutput] = llm.generate(["a", {"prompt_token_ids": [1]}], SamplingParams(n=2, stop="x"))
    except InvalidRequestError as error:
        return [error.field]
    row: dict[int, Logprob] = (outputs[0].outputs[0].logprobs or [{}])[0]
    with llm.session(seed=1) as s:
        branches: list[Branch] = s.fork(2)
        found: SelectResult = s.select(["x", "y"])
        return [found.best.text, *map(str, row), *(one.text for one in s.generate_all(branches, max_tokens=3))]


async def ask_async(llm: AsyncLLM) -> int:
    count = 0
    params = SamplingParams(output_kind="delta", repetition_detection={"max_pattern_size": 9, "min_count": 3})
    try:
        async for output in llm.generate("x", params):
            count += len(output.outputs[0].token_ids)
    except RequestFailedError:
        return -1
    return count
