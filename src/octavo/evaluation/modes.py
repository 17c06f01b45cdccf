"""The ways in which a model is asked about a document, and what each took.

Every mode gets the same document, question and limit, takes the most probable token always, and begins with an empty
prefix cache: what is told as reused is what the mode itself computed once and used again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from octavo.core.ask_params import AskParams, AskPrompts
from octavo.core.errors import EngineClosedError, OctavoError, RequestFailedError
from octavo.core.margins_params import MarginsParams, MarginsPrompts
from octavo.core.params import SamplingParams
from octavo.core.prompts import filled
from octavo.evaluation.scores import METRICS

if TYPE_CHECKING:
    from octavo.core.outputs import CompletionOutput
    from octavo.evaluation.tasks import Example
    from octavo.frontend import Prompt
    from octavo.llm import LLM


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeSettings:
    """What modes differ in, besides the document and the question."""

    max_tokens: int | None = None  # of an answer; None: as many as the task says
    segment_tokens: int = 512  # margins: most tokens of a segment
    margin_tokens: int = 100  # margins: most tokens of a note
    threshold: float = 0.0  # margins: a note is kept if log p(YES) - log p(NO) is more than this
    windows: bool = False  # margins: read what is longer than the context in parts
    passages: int = 4  # retrieved: most passages that are put before the question
    passage_tokens: int = 128  # retrieved: most tokens of a passage


class _Answer(NamedTuple):
    output: CompletionOutput
    prompt_tokens: int  # of the prompt behind which the answer was written
    generated_tokens: int  # of the answer, and of margins
    kept_margins: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one mode made of one example. Where it could not run, `error` says why and all else is None."""

    text: str | None = None
    finish_reason: str | None = None
    score: float | None = None  # from 0 to 1
    seconds: float | None = None  # from the question to the end of the answer, tokenising included
    computed_tokens: int | None = None  # positions that the model computed: of prompts and of what it wrote
    reused_tokens: int | None = None  # of prompts, that it did not have to: cached, or shared by a fork
    generated_tokens: int | None = None  # that it wrote: the answer, and margins
    prompt_tokens: int | None = None  # of the prompt behind which the answer stands
    kept_margins: int | None = None  # margins alone: notes that are in that prompt
    error: str | None = None


def measure(llm: LLM, mode: str, example: Example, settings: ModeSettings) -> Outcome:
    """Ask once. What cannot be run, such as a document that is longer than the context, is an outcome too."""
    max_tokens = example.max_tokens if settings.max_tokens is None else settings.max_tokens
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    llm.reset_prefix_cache()
    before = llm.cache_stats
    began = perf_counter()
    try:
        answer = MODES[mode](llm, example, settings, sampling)
    except EngineClosedError:
        raise
    except OctavoError as error:
        return Outcome(error=str(error))
    seconds = perf_counter() - began
    after = llm.cache_stats
    text = answer.output.text
    return Outcome(
        text=text,
        finish_reason=answer.output.finish_reason,
        score=METRICS[example.metric](text, example.answers, example.choices),
        seconds=seconds,
        computed_tokens=after.computed_tokens - before.computed_tokens,
        reused_tokens=after.hit_tokens - before.hit_tokens + after.forked_tokens - before.forked_tokens,
        generated_tokens=answer.generated_tokens,
        prompt_tokens=answer.prompt_tokens,
        kept_margins=answer.kept_margins,
    )


def warm_up(llm: LLM) -> None:
    """What the first request of all takes longer for belongs to no example."""
    llm.generate(_prompt(llm, "Hello."), SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)


def _cue(llm: LLM) -> str:
    """What tells a model without a chat template that it is its turn."""
    return "\n\nAnswer:" if llm.tokenizer.chat_template is None else ""


def _prompts(llm: LLM) -> MarginsPrompts:
    """The words around document and question, with margins and in full. The verdict's have a cue of their own."""
    prompts, cue = MarginsPrompts(), _cue(llm)
    names = ("extract", "answer", "answer_without", "answer_alone", "answer_alone_without")
    return replace(prompts, **{name: getattr(prompts, name) + cue for name in names})


def _prompt(llm: LLM, text: str) -> Prompt:
    """A text as the user's message in the model's chat template; as it is where there is none."""
    if llm.tokenizer.chat_template is None:
        return text
    return llm.chat_prompt([{"role": "user", "content": text}])


def _full(llm: LLM, example: Example, settings: ModeSettings, sampling: SamplingParams) -> _Answer:
    prompts = _prompts(llm)
    document = filled(prompts.document, document=example.document)
    prompt = _prompt(llm, document + filled(prompts.answer_without, question=example.question))
    (output,) = llm.generate(prompt, sampling, use_tqdm=False)
    if output.error is not None:
        raise RequestFailedError(output.error)
    return _Answer(output.outputs[0], len(output.prompt_token_ids), output.metrics.num_generated_tokens)


def _margins(llm: LLM, example: Example, settings: ModeSettings, sampling: SamplingParams) -> _Answer:
    params = MarginsParams(
        segment_tokens=settings.segment_tokens,
        margin=SamplingParams(temperature=0.0, max_tokens=settings.margin_tokens),
        answer=sampling,
        threshold=settings.threshold,
        windows=settings.windows,
        prompts=_prompts(llm),
        seed=0,
    )
    result = llm.margins(example.document, example.question, params)
    answer = result.answer
    return _Answer(answer.output, len(answer.prompt_token_ids), result.metrics.num_generated_tokens, len(answer.kept))


def _retrieved(llm: LLM, example: Example, settings: ModeSettings, sampling: SamplingParams) -> _Answer:
    """Without the citations that `ask` asks for by itself: no other mode is to write any."""
    answer = "Here are passages from a document.\n\n{passages}Answer the question with the help of these passages.\n\n"
    params = AskParams(
        num_passages=settings.passages,
        passage_tokens=settings.passage_tokens,
        answer=sampling,
        prompts=AskPrompts(passage="[{number}] {text}\n\n", answer=answer + "Question: {question}" + _cue(llm)),
        seed=0,
    )
    documents = [{"id": "document", "title": "", "text": example.document}]
    result = llm.ask(example.question, documents=documents, params=params)
    return _Answer(result.output, len(result.prompt_token_ids), result.metrics.num_generated_tokens)


MODES: dict[str, Callable[[LLM, Example, ModeSettings, SamplingParams], _Answer]] = {
    "full": _full,
    "margins": _margins,
    "retrieved": _retrieved,
}
