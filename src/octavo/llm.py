"""The library's front door: `LLM`."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from octavo.base_llm import BaseLLM, chat_options
from octavo.core.beam_params import BeamSearchParams
from octavo.core.errors import InvalidRequestError, RequestFailedError
from octavo.core.params import OutputKind, SamplingParams
from octavo.core.values import exact_bool, exact_list, exact_record, is_a

if TYPE_CHECKING:
    from pathlib import Path

    from octavo.ask import AskResult, AskRun
    from octavo.core.ask_params import AskParams
    from octavo.core.margins_params import MarginsParams
    from octavo.core.outputs import CacheExplanation, RequestOutput
    from octavo.core.pooling import EmbeddingRequestOutput, PoolingParams
    from octavo.frontend import Messages, Prompt, Request
    from octavo.margins import MarginsResult, MarginsRun
    from octavo.session import Session


class LLM(BaseLLM):
    """A model, loaded and ready to answer.

    Args:
        model: an alias (``smollm2``), a Hugging Face name, a .gguf file or a model folder. Fetched on first use.
        **config: any setting of `EngineConfig`. An unknown one raises ConfigError.

    Methods may be called from several threads; the steps of all their requests run together in one batch, on the
    engine's own thread. A process that forks can use the LLM on both sides.

    Raises ModelNotFoundError, DownloadError, ModelFormatError, UnsupportedModelError, OutOfMemoryError or ConfigError.
    """

    # --- generating ---

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Answer prompts, all in one batch as far as places and memory go.

        Args:
            prompts: a string, ``{"prompt": ...}`` or ``{"prompt_token_ids": [...]}``, or a list of these.
            sampling_params: one for all prompts, or one each. Default: SamplingParams().
            use_tqdm: show progress on stderr; None: when there are several prompts and stderr is a terminal.
            priority: lower is served first (with scheduling_policy="priority"); one for all, or one each.

        Returns the finished outputs in the order of the prompts. A request that failed inside the engine has
        finish_reason "error" and says why in `error`; the others are not affected.

        Raises InvalidRequestError naming the field at fault, of a list which of its elements (``prompts[5]``), and then
        no request was added.
        """
        listed, names = _list_of_prompts(prompts)
        return self._generate(listed, names, sampling_params, use_tqdm, priority)

    def _generate(
        self,
        listed: Sequence[Prompt],
        names: Sequence[str],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool | None,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        given = SamplingParams() if sampling_params is None else sampling_params
        params = _one_each("sampling_params", given, SamplingParams, len(listed))
        priorities = _one_each("priority", priority, int, len(listed))
        requests = []
        for number, (prompt, one, order, name) in enumerate(zip(listed, params, priorities, names, strict=True)):
            with _naming_element("sampling_params", given, number, SamplingParams):
                params_here = exact_record("sampling_params", one, SamplingParams).but(
                    output_kind=OutputKind.FINAL_ONLY
                )
                requests.append(self._frontend.make(prompt, params_here, priority=order, name=name))
        return self._run(requests, use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams | Sequence[BeamSearchParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """The most probable continuations of prompts, as transformers' `generate` finds them; all prompts in one batch.

        Args:
            params: one for all prompts, or one each. Default: BeamSearchParams().
            prompts, use_tqdm, priority: as in `generate`.

        Returns one output a prompt; its `outputs` are the hypotheses, best `score` first. `token_ids` are those
        generated, without the prompt's. Errors are those of `generate`.
        """
        listed, names = _list_of_prompts(prompts)
        given = BeamSearchParams() if params is None else params
        each = _one_each("params", given, BeamSearchParams, len(listed))
        priorities = _one_each("priority", priority, int, len(listed))
        requests = []
        for number, (prompt, one, order, name) in enumerate(zip(listed, each, priorities, names, strict=True)):
            with _naming_element("params", given, number, BeamSearchParams):
                params_here = exact_record("params", one, BeamSearchParams).but(output_kind=OutputKind.FINAL_ONLY)
                requests.append(self._frontend.make_beams(prompt, params_here, priority=order, name=name))
        return self._run(requests, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        priority: int | Sequence[int] = 0,
    ) -> list[EmbeddingRequestOutput]:
        """Each prompt as one vector, pooled of the model's hidden states after its final norm; all in one batch.

        Args:
            pooling_params: one for all prompts, or one each. Default: PoolingParams(), the mean, of length 1.
            prompts, use_tqdm, priority: as in `generate`.

        Raises InvalidRequestError naming the field at fault, RequestFailedError if a request failed inside the engine.
        """
        from octavo.core.pooling import PoolingParams

        listed, names = _list_of_prompts(prompts)
        given = PoolingParams() if pooling_params is None else pooling_params
        each = _one_each("pooling_params", given, PoolingParams, len(listed))
        priorities = _one_each("priority", priority, int, len(listed))
        specs = [
            self._pooling_spec(prompt, one, order, name)
            for prompt, one, order, name in zip(listed, each, priorities, names, strict=True)
        ]
        found = {}
        with _progress(len(specs), use_tqdm) as advance:
            for output in self._loop.run(specs):
                found[output.request_id] = output
                advance()
        return [self._embedding(spec, found[spec.request_id]) for spec in specs]

    def _run(self, requests: Sequence[Request], use_tqdm: bool | None) -> list[RequestOutput]:
        ids = [request.spec.request_id for request in requests]
        readers = {request.spec.request_id: self._frontend.reader(request) for request in requests}
        finished: dict[str, RequestOutput] = {}
        with _progress(len(ids), use_tqdm) as advance:
            for output in self._loop.run([request.spec for request in requests]):
                if output.finished:
                    finished[output.request_id] = readers[output.request_id](output)
                    advance()
        return [finished[request_id] for request_id in ids]

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | BeamSearchParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> Generator[RequestOutput, None, None]:
        """Answer one prompt, yielding as tokens come; `output_kind` says whether all so far or only what is new. Of a
        beam search comes first what all outputs that are still possible begin with, and at its end all of them.

        The request is checked at once (InvalidRequestError) and starts with the first `next`. Closing the iterator
        early ends the request and frees its blocks. Iterating raises RequestFailedError if the request failed inside
        the engine, EngineClosedError if the LLM was closed.
        """
        given = SamplingParams() if sampling_params is None else sampling_params
        if is_a(given, BeamSearchParams):
            search = exact_record("sampling_params", given, BeamSearchParams)
            request = self._frontend.make_beams(prompt, search, request_id, priority)
        else:
            params = exact_record("sampling_params", given, SamplingParams)
            request = self._frontend.make(prompt, params, request_id, priority)
        self._loop.check_open()
        return self._stream(request)

    def _stream(self, request: Request) -> Generator[RequestOutput, None, None]:
        read = self._frontend.reader(request)
        for output in self._loop.run([request.spec]):
            if output.error is not None:
                raise RequestFailedError(output.error)
            yield read(output)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        priority: int | Sequence[int] = 0,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> list[RequestOutput]:
        """Answer conversations: lists of ``{"role": ..., "content": ...}``, through the model's chat template.

        Args:
            use_tqdm, priority: as in `generate`.
            chat_template: a Jinja template, or the name of one that the model has. Default: "tool_use" where the model
                has one of that name and there are tools, else "default".
            tools: what the model may call, as JSON schemas; for the template.
            documents: what the answer may rest on, for templates that know of it.
            chat_template_kwargs, **variables: further variables of the template.

        Raises InvalidRequestError if the model has no chat template or the messages do not fit it, RequestFailedError
        if so many templates are at work that none of their processes is free for a minute.
        """
        if not is_a(messages, Sequence):
            raise InvalidRequestError("messages", f"expected a list, found {type(messages).__name__}")
        given: Sequence[Any] = exact_list("messages", messages, "must be a list of messages, or of such lists")
        several = bool(given) and is_a(given[0], (list, tuple))
        conversations = given if several else [given]
        names = [f"messages[{number}]" if several else "messages" for number in range(len(conversations))]
        options = chat_options(add_generation_prompt, continue_final_message, tools, documents, variables)
        prompts = [
            self._frontend.chat_prompt(conversation, chat_template, options, chat_template_kwargs, name)
            for conversation, name in zip(conversations, names, strict=True)
        ]
        return self._generate(prompts, names, sampling_params, use_tqdm, priority)

    # --- long documents ---

    def margins(
        self,
        document: str,
        question: str | Sequence[str],
        params: MarginsParams | None = None,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> MarginsResult:
        """Read a document in segments, note in the margin of each what helps to answer the question, and answer it with
        the notes that are relevant behind the document (Writing in the Margins).

        Args:
            question: or several, which are answered side by side over one reading of the document.
            params: default MarginsParams().
            chat_template, chat_template_kwargs: as in `chat`.
            priority, cache_salt: as for a prompt of `generate`.

        What was read stays in the prefix cache: another question about the same document reads nothing of it again.

        Raises InvalidRequestError naming the field at fault, of a document that does not fit the model's context with
        the arithmetic; RequestFailedError if the request failed inside the engine.
        """
        return self.stream_margins(
            document,
            question,
            params,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            priority=priority,
            cache_salt=cache_salt,
        ).result()

    def stream_margins(
        self,
        document: str,
        question: str | Sequence[str],
        params: MarginsParams | None = None,
        request_id: str | None = None,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> MarginsRun:
        """`margins`, as an iterator of what happens: segments read, margins written and decided, text of the answer.
        While it runs, margins can be accepted, rejected and edited, and reading can be stopped."""
        from octavo.margins import MarginsRun

        request = self._margins_request(
            document,
            question,
            params,
            request_id=request_id,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            priority=priority,
            cache_salt=cache_salt,
        )
        self._loop.check_open()
        return MarginsRun(self._loop, self._frontend, request)

    def ask(
        self,
        question: str,
        docs: str | Path | None = None,
        params: AskParams | None = None,
        *,
        documents: Sequence[Mapping[str, str]] | None = None,
        index_path: str | Path | None = None,
        update_index: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AskResult:
        """Answer a question from documents, with citations that are checked to exist: from the passages that fit it
        best (retrieval-augmented generation), or with `AskParams(margins=...)` by reading documents in the margins way.

        Args:
            docs: a folder, whose text, Markdown, HTML, PDF, DOCX and EPUB files are indexed in a file of its own there,
                or one such file.
            params: default AskParams().
            documents: in place of `docs`: a list of ``{"id": ..., "title": ..., "text": ...}``.
            index_path: where the folder's index is, if not in the folder.
            update_index: look first for files that are new, have changed or are gone.
            chat_template, chat_template_kwargs: as in `chat`.
            priority, cache_salt: as for a prompt of `generate`.

        Raises DocumentError for documents that cannot be read and an index that cannot be used, InvalidRequestError
        naming the field at fault, RequestFailedError if a request failed inside the engine.
        """
        return self.stream_ask(
            question,
            docs,
            params,
            documents=documents,
            index_path=index_path,
            update_index=update_index,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            priority=priority,
            cache_salt=cache_salt,
        ).result()

    def stream_ask(
        self,
        question: str,
        docs: str | Path | None = None,
        params: AskParams | None = None,
        request_id: str | None = None,
        *,
        documents: Sequence[Mapping[str, str]] | None = None,
        index_path: str | Path | None = None,
        update_index: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AskRun:
        """`ask`, as an iterator of what happens: files indexed, passages found, documents read, text of the answer."""
        from octavo.ask import AskRun
        from octavo.ask_request import AskOptions

        self._loop.check_open()
        return AskRun(
            self._loop,
            self._frontend,
            question,
            params,
            docs=docs,
            documents=documents,
            index_path=index_path,
            update_index=update_index,
            request_id=request_id,
            options=AskOptions(chat_template, chat_template_kwargs, priority, cache_salt),
        )

    def session(self, *, seed: int | None = None, priority: int = 0, cache_salt: str | None = None) -> Session:
        """A session: text that branches, on which you call the verbs one by one. See `octavo.session.Branch`.

        Args:
            seed: of its draws; None draws one, which `Session.seed` reports.
            priority, cache_salt: as for a prompt of `generate`.

        Use it in a ``with`` statement, or close it. Raises InvalidRequestError.
        """
        from octavo.session import Session

        return Session(self._begin_session(seed, priority, cache_salt))

    # --- the prefix cache ---

    def explain_cache(self, prompt: Prompt) -> CacheExplanation:
        """How many tokens of a prompt are cached now, the first token that differs and from which request, and when
        and why something that used to be there was evicted. Raises InvalidRequestError."""
        token_ids, salt = self._frontend.cache_key(prompt)
        return self._loop.explain_cache(token_ids, salt).result()

    def reset_prefix_cache(self) -> int:
        """Forget all cached KV; running requests keep what they have. Returns the number of blocks forgotten."""
        return self._loop.reset_prefix_cache().result()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _list_of_prompts(prompts: Any) -> tuple[list[Any], list[str]]:
    """The prompts, and what errors call them."""
    if is_a(prompts, (str, Mapping)):
        return [prompts], ["prompt"]
    if is_a(prompts, Sequence) and not is_a(prompts, bytes):
        listed = exact_list("prompts", prompts)
        return listed, [f"prompts[{number}]" for number in range(len(listed))]
    raise InvalidRequestError("prompts", f"must be a prompt or a list of prompts, not {type(prompts).__name__}")


def _one_each(name: str, value: Any, kind: type, count: int) -> list[Any]:
    if is_a(value, kind):
        return [value] * count
    wanted = f"must be one {kind.__name__} for all prompts or one for each of the {count}"
    if not is_a(value, Sequence) or is_a(value, str):
        raise InvalidRequestError(name, f"{wanted}, not {type(value).__name__}")
    values = exact_list(name, value, wanted)
    if len(values) != count:
        raise InvalidRequestError(name, f"{wanted}, not {len(values)} of them")
    for number, one in enumerate(values):
        if not is_a(one, kind):
            raise InvalidRequestError(f"{name}[{number}]", f"must be a {kind.__name__}, not {type(one).__name__}")
    return values


@contextmanager
def _naming_element(name: str, given: Any, number: int, kind: type) -> Iterator[None]:
    """Of parameters given as a list, the element at fault is named: ``sampling_params[5].stop_token_ids``."""
    try:
        yield
    except InvalidRequestError as error:
        if is_a(given, kind) or error.field not in {field.name for field in fields(kind)}:
            raise
        raise InvalidRequestError(f"{name}[{number}].{error.field}", error.problem) from None


class _progress:  # noqa: N801 - used like a function
    """A bar of finished prompts on stderr, or nothing; None: a bar if there are several and stderr is a terminal."""

    def __init__(self, total: int, use_tqdm: bool | None) -> None:
        self._bar: Any = None
        if use_tqdm is None:
            use_tqdm = total > 1 and sys.stderr is not None and sys.stderr.isatty()
        if exact_bool("use_tqdm", use_tqdm, "must be true, false or None"):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Any:
        if self._bar is not None:
            self._bar.start()
        return self._advance

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
