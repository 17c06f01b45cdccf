"""A model against transformers: the same file, its weights dequantised to float32, the same token ids.

The `reference` backend in float32 must agree with it up to rounding, logits and greedy tokens; what the `cpu` backend
makes of int8 activations, keys and values is measured beside it. The text is that of Python's own help topics.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from octavo.cli import machine
from octavo.cli.check import Check, Status, judged
from octavo.cli.driver import EngineDriver, completions
from octavo.cli.logits import LoadedModel, Rows
from octavo.config import EngineConfig
from octavo.core.errors import ConfigError, OutOfMemoryError
from octavo.core.params import SamplingParams
from octavo.loading.memory import available_memory, size

if TYPE_CHECKING:
    from octavo.ops import ModelConfig

PART = "transformers"
LOGITS_TOLERANCE = 1e-4  # of the row's greatest |logit|
_TEXT_TOKENS = 512
_LOGITS_BYTES = 256 << 20  # most for the logits of one text on one backend
_TEXT_CHARS = 16_384
_PROMPTS = ((40, 8), (100, 40), (200, 120))  # (first token of the text, tokens): prompts of greedy answers

Logits = Callable[[Sequence[int]], Rows]


class SkippedError(Exception):
    """Something that is needed is not there; the message says what."""


def verify(
    config: EngineConfig, path: Path, model: ModelConfig, num_tokens: int, tell: Callable[[str], None]
) -> list[Check]:
    """Logits and greedy tokens against transformers, `num_tokens` for each prompt; `tell` hears what is being done."""
    context = model.max_position
    num_tokens = min(num_tokens, context // 4)
    reference = EngineConfig(
        model=config.model, backend="reference", max_model_len=min(context, _TEXT_TOKENS), max_num_seqs=4
    )
    tell("greedy answers of the reference backend")
    try:
        _check_room("float32 weights of the reference backend", path, 1)
        text, prompts, answers = _greedy(reference, num_tokens, model.vocab_size)
        # Every text of this part: the prose, and each prompt with its answer but for the last token.
        texts = [text, *(prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True))]
        tell("logits of the reference backend")
        ours = _logits_of(reference, path, model, texts)
    except (SkippedError, OutOfMemoryError) as reason:
        return [Check(PART, name, Status.SKIPPED, str(reason)) for name in ("logits", "greedy tokens", "cpu backend")]
    tell("transformers")
    theirs: list[Rows] | None
    try:
        theirs = _with_transformers(path, texts)
    except SkippedError as reason:
        theirs = None
        checks = [Check(PART, name, Status.SKIPPED, str(reason)) for name in ("logits", "greedy tokens")]
    else:
        starts = [len(prompt) - 1 for prompt in prompts]
        checks = [_compare_logits(ours, theirs), _compare_greedy(answers, starts, ours[1:], theirs[1:])]
    tell("logits of the cpu backend")
    oracle, name = (ours[0], "the reference backend") if theirs is None else (theirs[0], "transformers")
    return [*checks, _compare_cpu(replace(config, backend="cpu"), path, model, text, oracle, name)]


# --- our side ---


def _greedy(
    config: EngineConfig, num_tokens: int, vocab_size: int
) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Token ids of the text, of the prompts taken from it, and of their greedy answers."""
    from pydoc_data.topics import topics

    with EngineDriver(config) as driver:
        prose = "\n\n".join(topics[name] for name in sorted(topics))[:_TEXT_CHARS]
        most = min(driver.built.max_model_len, _LOGITS_BYTES // (4 * vocab_size))
        text = driver.built.tokenizer.encode(prose)[:most]
        room = driver.built.max_model_len - num_tokens
        prompts = [text[first : first + min(count, room)] for first, count in _PROMPTS]
        prompts = [prompt for prompt in prompts if prompt] or [text[:1]]
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        answers = driver.run([(prompt, params) for prompt in prompts])
        return text, prompts, [completions(answer)[0].token_ids for answer in answers]


def _logits_of(config: EngineConfig, path: Path, model: ModelConfig, texts: Sequence[Sequence[int]]) -> list[Rows]:
    loaded = LoadedModel(path, model, machine.make_ops(config, model))
    return [loaded.logits(text) for text in texts]


def _check_room(what: str, path: Path, copies: int) -> None:
    """Raises SkippedError if float32 values of all weights, so many times, are more than the memory there is."""
    from octavo.formats import open_weights

    with open_weights(path) as file:
        needed = 4 * copies * sum(tensor.size for tensor in file.tensors.values())
    if needed > available_memory():
        raise SkippedError(f"{what} need {size(needed)}, and {size(available_memory())} are available")


# --- transformers' side ---


def _with_transformers(path: Path, texts: Sequence[Sequence[int]]) -> list[Rows]:
    """Logits of all texts. Raises SkippedError if transformers is not installed or does not load the model."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # for progress bars that disable_progress_bar does not reach
    try:
        import torch
        import transformers
    except ImportError as error:
        raise SkippedError(
            f"transformers is not installed ({error}); `pip install torch transformers accelerate gguf`"
        ) from None
    _check_room("float32 weights of transformers, while they are loaded,", path, 2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **options
        ).eval()
    except Exception as error:  # whatever a third party's loader raises, it is no fault of the model's
        raise SkippedError(f"transformers {transformers.__version__} does not load it: {_first_line(error)}") from None
    rows = []
    with torch.no_grad():
        for text in texts:
            rows.append(model(torch.tensor([list(text)]), use_cache=False).logits[0].float().numpy())
    return rows


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


# --- comparing ---


def _compare_logits(ours: Sequence[Rows], theirs: Sequence[Rows]) -> Check:
    """The greatest |difference| of a row, as a share of its greatest |logit|."""
    shares = np.concatenate([row_deltas(a, b) / np.abs(b).max(axis=1) for a, b in zip(ours, theirs, strict=True)])
    worst = float(np.max(shares)) if np.isfinite(shares).all() else float("nan")
    passed = worst <= LOGITS_TOLERANCE
    limit = f"(limit {LOGITS_TOLERANCE:.0e})"
    detail = f"{len(shares)} rows; greatest difference {worst:.1e} of the row's greatest logit {limit}"
    return judged(PART, "logits", passed, detail, rows=len(shares), worst=worst, limit=LOGITS_TOLERANCE)


def _compare_greedy(
    answers: Sequence[Sequence[int]], starts: Sequence[int], ours: Sequence[Rows], theirs: Sequence[Rows]
) -> Check:
    """Teacher forcing: each of our tokens must be the best of transformers' row, unless its best two are closer than
    twice what the rows differ by."""
    total = 0
    excused: list[str] = []
    wrong: list[str] = []
    for answer, start, our_rows, their_rows in zip(answers, starts, ours, theirs, strict=True):
        deltas = row_deltas(our_rows, their_rows)
        for step, token_id in enumerate(answer):
            total += 1
            row = their_rows[start + step]
            if token_id == int(row.argmax()):
                continue
            second, best = np.partition(row, -2)[-2:]
            gap, delta = float(best - second), float(deltas[start + step])
            note = f"step {step}: {token_id} for {int(row.argmax())}, gap {gap:.2e}, difference {delta:.2e}"
            (excused if gap < 2 * delta else wrong).append(note)
    detail = f"{total} tokens, {len(wrong)} differ, {len(excused)} excused as ties"
    detail += "".join(f"; {note}" for note in (*wrong[:3], *excused[:3]))
    return judged(PART, "greedy tokens", not wrong, detail, tokens=total, wrong=wrong, excused=excused)


def _compare_cpu(
    config: EngineConfig, path: Path, model: ModelConfig, text: Sequence[int], oracle: Rows, name: str
) -> Check:
    """How far the cpu backend is from an oracle on one text; no limit, but a value that is no number fails."""
    title = "cpu backend"
    try:
        (ours,) = _logits_of(config, path, model, [text])
    except ConfigError as error:
        return Check(PART, title, Status.SKIPPED, str(error))
    figures = distance(ours, oracle, text)
    finite = all(np.isfinite(value) for value in figures.values())
    detail = (
        f"against {name} on {len(text)} tokens: KL {figures['mean_kl']:.1e} mean and {figures['max_kl']:.1e} at most, "
        f"the same best token in {figures['top1_agreement']:.1%} of rows, perplexity {figures['perplexity']:.3f} "
        f"to {figures['oracle_perplexity']:.3f}, ratio {figures['perplexity_ratio']:.5f}"
    )
    return Check(PART, title, Status.INFO if finite else Status.FAILED, detail, {"oracle": name, **figures})


def row_deltas(ours: Rows, theirs: Rows) -> NDArray[np.float32]:
    """[rows]: the greatest |difference| in each; infinite where one side is no number."""
    deltas = np.abs(ours - theirs).max(axis=1)
    return np.where(np.isfinite(deltas), deltas, np.inf)


def distance(ours: Rows, oracle: Rows, token_ids: Sequence[int]) -> dict[str, float]:
    """KL(oracle, ours) in nats by row, share of rows with the same best token, perplexities of the text."""
    p, q = _log_softmax(oracle), _log_softmax(ours)
    kl = np.sum(np.exp(p) * (p - q), axis=1)
    following = np.asarray(token_ids[1:])
    steps = np.arange(len(following))
    perplexities = [float(np.exp(-rows[steps, following].mean())) if len(steps) else float("inf") for rows in (q, p)]
    return {
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "top1_agreement": float((ours.argmax(axis=1) == oracle.argmax(axis=1)).mean()),
        "perplexity": perplexities[0],
        "oracle_perplexity": perplexities[1],
        "perplexity_ratio": perplexities[0] / perplexities[1] if len(steps) else 1.0,
    }


def _log_softmax(rows: Rows) -> NDArray[np.float64]:
    shifted = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
