"""Which chat template writes a conversation: a model may have several, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.core.errors import InvalidRequestError, ModelFormatError, shown
from octavo.core.values import MAX_CHARACTERS, exact_str
from octavo.text.chat_template import ChatTemplate


class NamedTemplates:
    """The chat templates of one model, each compiled when it is first asked for. Safe to share by threads."""

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str], max_characters: int = MAX_CHARACTERS
    ) -> None:
        """`sources`: by name; a model's only one is called "default". `max_characters`: of one conversation."""
        self._max_characters = max_characters
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, ChatTemplate] = {}

    def has(self, name: object) -> bool:
        """Whether a template of the model is called so."""
        return type(name) is str and name in self._sources

    def choose(self, asked: Any, tools: Any) -> ChatTemplate:
        """The template called `asked`, or `asked` itself if it is one; with None the model's own for conversations with
        or without tools, as transformers chooses: "tool_use" where there is one and tools are given, else "default".

        Raises InvalidRequestError naming ``chat_template`` (also where `asked` is a template that is not valid), or
        ``messages`` for a model without one; ModelFormatError for one of the model's own that is not valid.
        """
        names = ", ".join(map(repr, sorted(self._sources))) or "none"
        if asked is None:
            if not self._sources:
                raise InvalidRequestError("messages", "this model has no chat template; give one, or a plain prompt")
            asked = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
            if asked not in self._sources:
                raise InvalidRequestError("chat_template", f"this model has no default one; choose one of {names}")
        asked = exact_str("chat_template", asked)
        if asked not in self._sources:
            if not any(mark in asked for mark in ("{{", "{%", "{#")):
                problem = (
                    f"{shown(asked)} is neither a Jinja template nor the name of one that this model has ({names})"
                )
                raise InvalidRequestError("chat_template", problem)
            try:
                return self._compile(asked, from_request=True)
            except ModelFormatError as error:
                raise InvalidRequestError("chat_template", error.problem) from None
        if asked not in self._compiled:
            self._compiled[asked] = self._compile(self._sources[asked])
        return self._compiled[asked]

    def _compile(self, source: str, from_request: bool = False) -> ChatTemplate:
        arguments: dict[str, Any] = {"from_request": from_request, "max_characters": self._max_characters}
        return ChatTemplate(source, **(arguments | self._special_tokens))
