"""What `run` and `chat` share: loading a model, asking it, and telling what came of it."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import InvalidRequestError, ModelNotFoundError, OctavoError
from octavo.core.params import OutputKind, SamplingParams

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.core.outputs import CompletionOutput, Logprob, RequestOutput
    from octavo.frontend import Prompt
    from octavo.llm import LLM


log = logging.getLogger(__name__)


class Answerer:
    """Asks one model, one question at a time.

    The engine has its own thread, so Ctrl-C is answered at once and never breaks into the engine's bookkeeping.
    """

    def __init__(self, llm: LLM, model: str) -> None:
        self.llm = llm
        self.model = model

    def ask(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams,
        on_text: Callable[[str], None] | None = None,
    ) -> RequestOutput:
        """The finished answer; `on_text` gets the text of its first output as it comes.

        Ctrl-C ends the request and raises AnswerInterrupted.
        """
        outputs: list[RequestOutput] = []
        kind = OutputKind.FINAL_ONLY if params.num_outputs > 1 else OutputKind.DELTA
        try:
            with closing(self.llm.stream(prompt, params.but(output_kind=kind))) as answer:
                for output in answer:
                    outputs.append(output)
                    if on_text is not None:
                        on_text(output.outputs[0].text)
        except KeyboardInterrupt:
            raise AnswerInterrupted(_combined(outputs, "abort") if outputs else None) from None
        return _combined(outputs)

    def prompt_of(self, text: str, system: str | None = None, *, raw: bool = False) -> Prompt:
        """A text as the user's message in the model's chat template; as it is where there is none, or with `raw`.

        Raises InvalidRequestError for a system message without a template.
        """
        if raw or (self.llm.tokenizer.chat_template is None and system is None):
            return text
        before = [] if system is None else [{"role": "system", "content": system}]
        return self.llm.chat_prompt([*before, {"role": "user", "content": text}])

    def close(self) -> None:
        self.llm.close()


class AnswerInterrupted(KeyboardInterrupt):
    """Ctrl-C came while a question was being answered. `output` is what there was by then, None when nothing."""

    def __init__(self, output: RequestOutput | None) -> None:
        super().__init__()
        self.output = output


def _combined(deltas: list[RequestOutput], finish_reason: str | None = None) -> RequestOutput:
    """The state after all `deltas` of one request."""
    last = deltas[-1]
    if len(last.outputs) > 1:
        return last  # final and whole: several outputs are not streamed
    parts = [delta.outputs[0] for delta in deltas]
    whole = replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        logprobs=None if parts[-1].logprobs is None else [row for part in parts for row in part.logprobs or ()],
        finish_reason=parts[-1].finish_reason or finish_reason,
    )
    return replace(last, outputs=[whole], prompt_logprobs=deltas[0].prompt_logprobs)


@contextmanager
def open_model(config: EngineConfig, verbose: int, *, chats: bool = True) -> Iterator[Answerer]:
    """The model, loaded; a spinner on a terminal while it loads. `chats`: a chat template may be needed at once."""
    from octavo.hub import resolve_model

    gc.disable()  # what comes into being here are a hundred thousand objects, and they stay: nothing to look through
    try:
        resolve_model(config.model)  # with its own progress bars, when it has to be fetched
        if chats:  # it starts while the model loads
            from octavo.text.template_process import processes

            processes.prepare()
        from octavo.llm import LLM

        with spinner(f"loading {config.model}", shown=not verbose):
            answerer = Answerer(LLM(**asdict(config)), config.model)
    except OSError as error:
        if isinstance(error, OctavoError) or error.filename is None:
            raise
        raise ModelNotFoundError(f"{error.filename}: cannot be read: {error.strerror}") from error
    finally:
        gc.freeze()
        gc.enable()
    try:
        yield answerer
    finally:
        answerer.close()


def spinner(text: str, *, shown: bool = True) -> Any:
    """Shows on stderr that something is going on, when that is a terminal."""
    if not (shown and is_terminal(sys.stderr)):
        return nullcontext()
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(text))


def is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def check_unicode(field: str, text: str) -> str:
    """Command line arguments that are not valid UTF-8 reach Python as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(field, f"is not valid UTF-8 at character {error.start}") from None
    return text


def check_system(text: str | None, *, raw: bool) -> None:
    """Of --system. Raises InvalidRequestError."""
    if text is None:
        return
    check_unicode("--system", text)
    if raw:
        raise InvalidRequestError("--system", "has no effect with --raw")


# --- output ---


def tell_repetition(output: RequestOutput) -> None:
    """On stderr, that an answer ends before the model would have ended it."""
    if any(completion.finish_reason == "repetition" for completion in output.outputs):
        sys.stderr.write("octavo: the answer ends here: it repeats itself; --no-repetition-detection lets it go on\n")
        sys.stderr.flush()


def log_sampling(params: SamplingParams | BeamSearchParams) -> None:
    """With -v: what was decided, by flags, the model's files or default."""
    if isinstance(params, SamplingParams):
        log.info("sampling: %s", ", ".join(f"{name} {value:g}" for name, value in _sampling_json(params).items()))


class TextWriter:
    """Writes an answer to stdout as it comes."""

    def __init__(self) -> None:
        self._terminal = is_terminal(sys.stdout)
        self._last = ""

    @property
    def started(self) -> bool:
        """Whether there is text on the line."""
        return self._last != ""

    def write(self, text: str) -> None:
        if text:
            sys.stdout.write(harmless(text) if self._terminal else text)
            sys.stdout.flush()
            self._last = text[-1]

    def end_line(self) -> None:
        """What comes next begins on a line of its own."""
        if self._last != "\n":
            sys.stdout.write("\n")
        sys.stdout.flush()
        self._last = ""


def harmless(text: str) -> str:
    """Control characters shown, not obeyed: an answer must not be able to drive the terminal."""
    return "".join(c if c in "\n\t" or not _is_control(c) else repr(c)[1:-1] for c in text)


def _is_control(c: str) -> bool:
    return c < " " or "\x7f" <= c <= "\x9f"


def speed_line(output: RequestOutput) -> str:
    """Speed figures for people, on one line."""
    times = timings(output)
    parts = [
        f"{len(output.prompt_token_ids)} prompt tokens{_rate(times['prefill_tokens_per_s'])}",
        f"{output.metrics.num_generated_tokens} generated tokens{_rate(times['decode_tokens_per_s'])}",
    ]
    if times["ttft_s"] is not None:
        parts.append(f"first token after {times['ttft_s']:.2f} s")
    if drafted := output.metrics.num_draft_tokens:
        parts.append(f"{output.metrics.num_accepted_tokens} of {drafted} guessed tokens accepted")
    return "; ".join(parts)


def _rate(tokens_per_s: float | None) -> str:
    return "" if tokens_per_s is None else f" ({tokens_per_s:.1f} tok/s)"


def timings(output: RequestOutput) -> dict[str, float | None]:
    """Seconds and tokens per second; None where there was nothing to measure."""
    m = output.metrics
    prefilled = len(output.prompt_token_ids) - output.num_cached_tokens
    later = m.num_generated_tokens - len(output.outputs)  # the first tokens come out of the prompt's last row
    decode_s = _between(m.first_token_time, m.finished_time)
    return {
        "queue_s": _between(m.arrival_time, m.first_scheduled_time),
        "ttft_s": _between(m.arrival_time, m.first_token_time),
        "tpot_s": decode_s / (later / len(output.outputs)) if decode_s and later > 0 else None,
        "e2e_s": _between(m.arrival_time, m.finished_time),
        "prefill_tokens_per_s": _per_second(prefilled, _between(m.first_scheduled_time, m.first_token_time)),
        "decode_tokens_per_s": _per_second(later, decode_s),
    }


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _per_second(count: int, seconds: float | None) -> float | None:
    return count / seconds if seconds and count > 0 else None


def to_json(output: RequestOutput, model: str, params: SamplingParams | BeamSearchParams) -> dict[str, Any]:
    """An answer for machines. One output stands in the object itself, several in a list under "outputs". Where tokens
    were drawn, "seed" and "sampling" are what it takes to draw them again."""
    draws = isinstance(params, SamplingParams) and not params.greedy
    completions = [_completion_json(completion) for completion in output.outputs]
    several = {"outputs": [{"index": index, **c} for index, c in enumerate(completions)]}
    result = {
        "request_id": output.request_id,
        "model": model,
        **(completions[0] if len(completions) == 1 else several),
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
        "completion_tokens": output.metrics.num_generated_tokens,
        "seed": output.seed if draws else None,
        "sampling": _sampling_json(params) if isinstance(params, SamplingParams) else None,
        "timings": timings(output),
        "system_fingerprint": output.system_fingerprint,
    }
    if output.prompt_logprobs is not None:
        pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        result["prompt_logprobs"] = [None if row is None else _logprobs_json(token, row) for token, row in pairs]
    return result


def _sampling_json(params: SamplingParams) -> dict[str, float]:
    return {name: getattr(params, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}


def _completion_json(completion: CompletionOutput) -> dict[str, Any]:
    result: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.cumulative_logprob is not None:
        result["cumulative_logprob"] = completion.cumulative_logprob
    if completion.score is not None:
        result["score"] = completion.score
    if completion.logprobs is not None:
        pairs = zip(completion.token_ids, completion.logprobs, strict=True)
        result["logprobs"] = [_logprobs_json(token_id, row) for token_id, row in pairs]
    return result


def _logprobs_json(token_id: int, row: dict[int, Logprob]) -> dict[str, Any]:
    best = sorted(row.items(), key=lambda item: item[1].rank)
    return {**_logprob_json(token_id, row[token_id]), "top_logprobs": [_logprob_json(*item) for item in best]}


def _logprob_json(token_id: int, entry: Logprob) -> dict[str, Any]:
    spelt = {"token": entry.decoded_token, "bytes": entry.bytes}
    return {"token_id": token_id, **spelt, "logprob": entry.logprob, "rank": entry.rank}
