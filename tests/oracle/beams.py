"""transformers' beam search as the oracle: float32 on a GGUF file's dequantised weights; and its file."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.oracle.oracle import load_model, load_tokenizer
from tests.oracle.prompts import smollm2_prompts

# Prompts of 25 to 500 tokens, by their place in `smollm2_prompts`: lists, languages, code, prose, chats, long texts.
PROMPTS = (7, 10, 11, 13, 16, 21, 22, 23, 24, 26, 28, 29, 30, 33, 34, 35, 37, 38, 40, 41, 42, 44, 45)
LONGEST = 500
END_TOKEN_IDS = (0, 2)  # every one that smollm2's file names
GRID = ((4, 64), (8, 64), (4, 256), (8, 256))  # width and new tokens, each with all of PROMPTS


@dataclass(frozen=True, slots=True)
class Search:
    """One prompt's beam search with transformers' defaults: length_penalty 1, early_stopping False."""

    number: int  # of the prompt in `smollm2_prompts`
    width: int
    max_tokens: int
    prompt_token_ids: list[int]
    token_ids: list[list[int]]  # [width], best first; generated tokens, the end token included
    scores: list[float]  # [width], sequences_scores


def search(model: Any, prompt_token_ids: list[int], end_token_ids: list[int], **settings: Any) -> Any:
    """All hypotheses of `generate`, best first, as (generated token ids, score)."""
    import torch

    given = torch.tensor([prompt_token_ids])
    pad = model.config.vocab_size - 1  # not 0: that one is taken for none and replaced by the end token
    with torch.no_grad():
        output = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            eos_token_id=end_token_ids or None,
            pad_token_id=pad,
            num_return_sequences=settings["num_beams"],
            **settings,
        )
    if settings["num_beams"] > 1:
        scores = output.sequences_scores.tolist()
    else:  # greedy decoding, without a score of its own
        steps = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)[0]
        scores = [float(steps.sum() / len(steps) ** settings.get("length_penalty", 1.0))]
    hypotheses = []
    for row, score in zip(output.sequences.tolist(), scores, strict=True):
        generated = row[len(prompt_token_ids) :]
        ends = [place for place, token_id in enumerate(generated) if token_id in end_token_ids]
        hypotheses.append((generated[: ends[0] + 1] if ends else generated, score))
    return hypotheses


def make(model_path: Path, out: Path, script: str) -> None:
    """Run the searches that the file does not have yet, and write it after each."""
    import torch

    torch.set_num_threads(1)
    tokenizer, model = load_tokenizer(model_path), load_model(model_path)
    made_with = {name: version(name) for name in ("transformers", "torch", "gguf", "tokenizers")}
    made_with |= {"python": platform.python_version(), "machine": platform.machine()}
    head = {"script": script, "model": model_path.name, "dtype": "float32", "made_with": made_with}
    searches = read(out)[1] if out.exists() else []
    done = {(one.width, one.max_tokens, one.number) for one in searches}
    prompts = smollm2_prompts()
    for width, max_tokens in GRID:
        for number in PROMPTS:
            if (width, max_tokens, number) in done:
                continue
            text, length = prompts[number]
            token_ids = tokenizer(text).input_ids[: min(length or LONGEST, LONGEST)]
            found = search(model, token_ids, list(END_TOKEN_IDS), num_beams=width, max_new_tokens=max_tokens)
            hypotheses, scores = [one for one, _ in found], [score for _, score in found]
            searches.append(Search(number, width, max_tokens, token_ids, hypotheses, scores))
            print(f"width {width}, {max_tokens} tokens, prompt {number}", file=sys.stderr, flush=True)
            write(out, head, searches)


def write(path: Path, head: dict[str, Any], searches: list[Search]) -> None:
    """One search a line. Prompts stand once; of a hypothesis what it does not share with the one before."""
    prompts = {one.number: one.prompt_token_ids for one in searches}
    lines = []
    for one in searches:
        hypotheses, before = [], []
        for token_ids in one.token_ids:
            shared = _shared(before, token_ids)
            hypotheses.append([shared, *token_ids[shared:]])
            before = token_ids
        scores = [float(f"{score:.8g}") for score in one.scores]
        lines.append(json.dumps([one.number, one.width, one.max_tokens, scores, hypotheses], separators=(",", ":")))
    prompts_json = ",\n".join(f'"{n}": {json.dumps(p, separators=(",", ":"))}' for n, p in prompts.items())
    content = ",\n".join(lines)
    path.write_text(f'{json.dumps(head)[:-1]},\n"prompts": {{\n{prompts_json}\n}},\n"searches": [\n{content}\n]}}\n')


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def read(path: Path) -> tuple[dict[str, Any], list[Search]]:
    content = json.loads(path.read_text())
    prompts = content.pop("prompts")
    searches = []
    for number, width, max_tokens, scores, hypotheses in content.pop("searches"):
        token_ids: list[list[int]] = []
        for shared, *rest in hypotheses:
            token_ids.append([*(token_ids[-1][:shared] if token_ids else []), *rest])
        searches.append(Search(number, width, max_tokens, prompts[str(number)], token_ids, scores))
    return content, searches
