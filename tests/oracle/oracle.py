"""transformers as the oracle: greedy answers in float32 on a GGUF file's dequantised weights, and their files."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_TOKENS = 64
NUM_COLUMNS = 8
SEED = 20_261_123
FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt and its greedy continuation, the end token ignored."""

    prompt_token_ids: list[int]
    token_ids: list[int]  # [NUM_TOKENS]
    gaps: list[float]  # [NUM_TOKENS] best logit minus second best
    peaks: list[float]  # [NUM_TOKENS] greatest |logit| of the row
    columns: list[int]  # token ids whose logits are recorded
    logits: list[list[float]]  # [NUM_TOKENS][len(columns)]


def load_model(path: Path) -> Any:
    """transformers' model of a GGUF file, its weights dequantised to float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def all_logits(model: Any, token_ids: list[int], first: int = 0) -> NDArray[np.floating]:
    """Logits of the rows from `first` on, [len(token_ids) - first, vocab], in one pass without a cache."""
    import torch

    with torch.no_grad():
        output = model(torch.tensor([token_ids]), use_cache=False, logits_to_keep=len(token_ids) - first)
    return output.logits[0].numpy()


def answer(model: Any, prompt_token_ids: list[int], columns: list[int]) -> Answer:
    """Greedy decoding with transformers' KV cache."""
    import torch

    tokens, gaps, peaks, logits = [], [], [], []
    given, cache = torch.tensor([prompt_token_ids]), None
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            output = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, row = output.past_key_values, output.logits[0, -1].numpy()
        second, best = np.partition(row, -2)[-2:]
        tokens.append(int(row.argmax()))
        gaps.append(float(best - second))
        peaks.append(float(np.abs(row).max()))
        logits.append([float(value) for value in row[columns]])
        given = torch.tensor([[tokens[-1]]])
    return Answer(prompt_token_ids, tokens, gaps, peaks, columns, logits)


def make(model_path: Path, prompts: list[tuple[str, int | None]], out: Path, script: str) -> None:
    """Answer all prompts and write the file."""
    import torch

    torch.set_num_threads(1)
    tokenizer, model = load_tokenizer(model_path), load_model(model_path)
    random = np.random.default_rng(SEED)
    answers = []
    for number, (text, length) in enumerate(prompts, 1):
        token_ids = tokenizer(text).input_ids[:length]
        columns = sorted(int(i) for i in random.integers(0, model.config.vocab_size, NUM_COLUMNS))
        answers.append(answer(model, token_ids, columns))
        print(f"{number}/{len(prompts)}: {len(token_ids)} tokens", file=sys.stderr, flush=True)
    made_with = {name: version(name) for name in ("transformers", "torch", "gguf", "numpy", "tokenizers")}
    made_with |= {"python": platform.python_version(), "machine": platform.machine()}
    head = {"script": script, "model": model_path.name, "seed": SEED, "dtype": "float32", "made_with": made_with}
    write(out, head, answers)


def write(path: Path, head: dict[str, Any], answers: list[Answer]) -> None:
    """One answer a line; floats with seven digits."""

    def line(one: Answer) -> str:
        fields = asdict(one)
        fields["gaps"] = [_rounded(value) for value in one.gaps]
        fields["peaks"] = [_rounded(value) for value in one.peaks]
        fields["logits"] = [[_rounded(value) for value in row] for row in one.logits]
        return json.dumps(fields, separators=(",", ":"))

    lines = ",\n".join(line(one) for one in answers)
    path.write_text(f'{json.dumps(head)[:-1]},\n"answers": [\n{lines}\n]}}\n')


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")


def read(path: Path) -> tuple[dict[str, Any], list[Answer]]:
    content = json.loads(path.read_text())
    answers = [Answer(**fields) for fields in content.pop("answers")]
    return content, answers
