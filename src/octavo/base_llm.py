"""What `LLM` and `AsyncLLM` have in common: an engine on its thread, and what its model says."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

# Here, and not where it is used, twenty frames further down: Python 3.11 keeps frames in chunks of 16 KiB, and at the
# end of one each call maps and unmaps the next. NumPy makes thousands of calls while it is imported: they took 30 ms.
import numpy  # noqa: F401

from octavo.build import build_engine
from octavo.config import EngineConfig
from octavo.core.errors import InvalidRequestError, RequestFailedError

if TYPE_CHECKING:
    from octavo.core.engine_client import EngineClient
    from octavo.core.margins_params import MarginsParams
    from octavo.core.outputs import CacheStats
    from octavo.core.pooling import EmbeddingRequestOutput, PoolingOutput, PoolingParams, PoolingSpec
    from octavo.core.proposer import SpeculationStats
    from octavo.frontend import ChatPrompt, Messages, Prompt
    from octavo.margins_request import MarginsRequest
    from octavo.session import SessionClient

log = logging.getLogger(__name__)


class BaseLLM:
    """See `octavo.llm.LLM`."""

    def __init__(self, model: str | None = None, **config: Any) -> None:
        self.config = EngineConfig.resolve({"model": model, **config})
        for name in self.config.without_effect(config):
            if config[name] not in (None, EngineConfig.__dataclass_fields__[name].default):
                log.warning("%s: has no effect with the %s backend", name, self.config.backend)
        self._open()

    def _open(self) -> None:
        """Build what `config` says."""
        built = build_engine(self.config)
        self._frontend = built.frontend
        self._engine = built.engine
        self._loop: EngineClient = built.start()
        # One that is forgotten, not closed, must not leave its thread and its memory behind.
        self._finalizer = weakref.finalize(self, self._loop.close)
        self.tokenizer = built.tokenizer
        self.model_config = built.model_config
        self.memory_plan = built.memory_plan
        self.max_model_len = built.max_model_len
        self.hidden_size: int | None = built.model_config.hidden_size
        self.system_fingerprint = built.system_fingerprint
        self._generation_config = built.generation_config

    @property
    def generation_config(self) -> dict[str, Any]:
        """What the model's files recommend for sampling, as fields of SamplingParams: those of temperature, top_p,
        top_k, min_p and repetition_penalty that generation_config.json tells, or general.sampling.* in a GGUF file.
        The command line follows it; in Python ``SamplingParams(**llm.generation_config, max_tokens=200)`` does.

        A value that cannot be used is left out, with a warning. Raises ModelFormatError for a file that is not JSON.
        """
        return self._generation_config()

    @property
    def cache_stats(self) -> CacheStats:
        """Counters since the start: tokens computed, looked up, found and shared by forks, blocks inserted, evicted and
        copied."""
        return replace(self._engine.kv.stats)

    @property
    def speculation_stats(self) -> SpeculationStats | None:
        """Counters since the start of what was guessed and came true; None without speculative_config."""
        proposer = self._engine.proposer
        return None if proposer is None else proposer.stats.copy()

    def chat_prompt(
        self,
        messages: Messages,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ChatPrompt:
        """The prompt that a chat template makes of a conversation, text and token ids; `chat` says which template.

        `options`: add_generation_prompt, continue_final_message, tools, documents, and variables of the template, which
        `chat_template_kwargs` may hold as well.
        Not for an event loop: a long one takes a while.
        """
        return self._frontend.chat_prompt(messages, chat_template, options, chat_template_kwargs)

    def _margins_request(
        self, document: str, question: str | Sequence[str], params: MarginsParams | None, **options: Any
    ) -> MarginsRequest:
        from octavo.core.margins_params import MarginsParams
        from octavo.margins_request import make_margins

        return make_margins(
            self._frontend, document, question, MarginsParams() if params is None else params, **options
        )

    def _pooling_spec(
        self, prompt: Prompt, params: PoolingParams, priority: int, name: str, request_id: str | None = None
    ) -> PoolingSpec:
        from octavo.core.pooling import checked_dimensions

        spec = self._frontend.make_pooling(prompt, params, request_id, priority, name)
        checked_dimensions(spec.params, self.hidden_size)
        return spec

    def _embedding(self, spec: PoolingSpec, output: PoolingOutput) -> EmbeddingRequestOutput:
        from octavo.core.pooling import EmbeddingOutput, EmbeddingRequestOutput, pooled

        if output.error is not None:
            raise RequestFailedError(output.error)
        found = EmbeddingOutput(pooled(output.embedding, spec.params))
        return EmbeddingRequestOutput(spec.request_id, found, list(spec.prompt_token_ids), metrics=output.metrics)

    def _begin_session(self, seed: int | None, priority: int, cache_salt: str | None) -> SessionClient:
        from octavo.session import SessionClient

        return SessionClient(self, self._loop, self._frontend, self._frontend.make_session(seed, priority, cache_salt))

    def close(self) -> None:
        """End all requests, with EngineClosedError for whoever waits for them, and free the engine. Idempotent."""
        self._finalizer()


def chat_options(
    add_generation_prompt: bool,
    continue_final_message: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> dict[str, Any]:
    """Those of ChatTemplate.render that `chat` has names for, and variables of the template. Raises InvalidRequestError
    for what one of the doors has as an argument, and this one has not."""
    for name in ("prompt", "request_id", "sampling_params", "use_tqdm"):
        if name in variables:
            raise InvalidRequestError(name, "is no argument here, and as a variable belongs in chat_template_kwargs")
    options = {
        **variables,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }
    return options | {name: given for name, given in (("tools", tools), ("documents", documents)) if given is not None}
