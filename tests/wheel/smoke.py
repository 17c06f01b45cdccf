"""Answers of the Octavo that is installed, as one JSON object: tokens, log-probabilities to the bit, and the files of
all modules that were imported.

``python smoke.py INSTRUCTION_SET`` needs the model smollm2, and neither pytest nor a checkout.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from octavo import LLM, BeamSearchParams, CompletionOutput, SamplingParams

PROMPTS = ["The capital of France is", "Once upon a time, in a village by the sea,"]


def answers(instruction_set: str) -> dict[str, Any]:
    """What generate, beam_search and a session answer; floats as they are, which JSON keeps exactly."""
    with LLM("smollm2", instruction_set=instruction_set, max_model_len=256) as llm:
        sampled = llm.generate(PROMPTS, SamplingParams(n=2, seed=7, max_tokens=12, logprobs=2, prompt_logprobs=1))
        (found,) = llm.beam_search(PROMPTS[0], BeamSearchParams(beam_width=3, max_tokens=8))
        with llm.session(seed=7) as session:
            session.extend("Question: Is a whale a fish or a mammal?\nAnswer: A whale is a")
            selected = session.select([" fish", " mammal"])
            branches = session.fork(2)
            branches[0].extend(" mammal because")
            generated = session.generate_all(branches, max_tokens=8)
        return {
            "generate": [[_completion(one) for one in output.outputs] for output in sampled],
            "prompt_logprobs": [_logprobs(output.prompt_logprobs) for output in sampled],
            "beam_search": [_completion(one) for one in found.outputs],
            "select": [choice.logprobs for choice in selected.choices],
            "best": selected.best.text,
            "session": [_completion(one) for one in generated],
        }


def _completion(output: CompletionOutput) -> dict[str, Any]:
    return {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "cumulative_logprob": output.cumulative_logprob,
        "logprobs": _logprobs(output.logprobs),
        "score": output.score,
    }


def _logprobs(rows: Any) -> Any:
    if rows is None:
        return None
    return [row and {str(token): one.logprob for token, one in row.items()} for row in rows]


if __name__ == "__main__":
    result = answers(sys.argv[1])
    files = {getattr(module, "__file__", None) for module in sys.modules.values()} - {None, __file__}
    print(json.dumps({"answers": result, "files": sorted(files)}))
