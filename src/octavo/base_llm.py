"""What `LLM` and `AsyncLLM` have in common: an engine on its thread, and what its model says."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

# Here, and not where it is used, twenty frames further down: Python 3.11 keeps frames in chunks of 16 KiB, and at the
# end of one each call maps and unmaps the next. NumPy makes thousands of calls while it is imported: they took 30 ms.
import numpy  # noqa: F401

from octavo.build import build_engine
from octavo.config import EngineConfig
from octavo.core.outputs import CacheStats

if TYPE_CHECKING:
    from octavo.frontend import ChatPrompt, Messages
    from octavo.session import SessionClient


class BaseLLM:
    """See `octavo.llm.LLM`."""

    def __init__(self, model: str | None = None, **config: Any) -> None:
        self.config = EngineConfig.resolve({"model": model, **config})
        built = build_engine(self.config)
        self._frontend = built.frontend
        self._engine = built.engine
        self._loop = built.start()
        # One that is forgotten, not closed, must not leave its thread and its memory behind.
        self._finalizer = weakref.finalize(self, self._loop.close)
        self.tokenizer = built.tokenizer
        self.model_config = built.model_config
        self.memory_plan = built.memory_plan
        self.max_model_len = built.max_model_len
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
        """Counters since the start: tokens looked up and found, blocks inserted, evicted and copied."""
        return replace(self._engine.kv.stats)

    def chat_prompt(self, messages: Messages, *, chat_template: str | None = None, **options: Any) -> ChatPrompt:
        """The prompt that a chat template makes of a conversation, text and token ids; `chat` says which template.

        `options`: add_generation_prompt, continue_final_message, tools, documents, and variables of the template.
        Not for an event loop: a long one takes a while.
        """
        return self._frontend.chat_prompt(messages, chat_template, options)

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
) -> dict[str, Any]:
    """Those of ChatTemplate.render that `chat` has names for."""
    options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    return options | {name: given for name, given in (("tools", tools), ("documents", documents)) if given is not None}
