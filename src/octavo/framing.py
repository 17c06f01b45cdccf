"""Texts put into the model's chat template once, as one message of the user's, with holes for what comes later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from octavo.core.errors import InvalidRequestError
from octavo.frontend import Frontend

MARKS = "\ue000\ue001"  # of a hole; no text of a user's that is put into a template may hold them


def hole(name: str) -> str:
    """Stands in a text for what is put there when the template has been put around it."""
    return f"{MARKS[0]}{name}{MARKS[1]}"


class Framing:
    """Args:
    apply_chat_template: None: if the model has one, or one is given.
    system: a system message.
    chat_template, variables: as in `LLM.chat`.

    Raises InvalidRequestError naming what has no effect without a template.
    """

    def __init__(
        self,
        frontend: Frontend,
        apply_chat_template: bool | None,
        system: str | None,
        chat_template: Any,
        variables: Mapping[str, Any] | None,
    ) -> None:
        self._frontend = frontend
        self._system = system
        self._variables = variables
        self._template: Any = None
        applied = apply_chat_template
        if applied is None:
            applied = chat_template is not None or frontend.templates.has("default")
        if applied:
            self._template = frontend.templates.choose(chat_template, None)
        elif chat_template is not None or variables is not None or system is not None:
            name = "chat_template" if chat_template is not None else "chat_template_kwargs"
            name = name if system is None else "prompts.system"
            raise InvalidRequestError(name, "has no effect without a chat template")

    def written(self, text: str) -> str:
        """As the chat template writes it, if there is one."""
        if self._template is None:
            return text
        messages = [{"role": "user", "content": text}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system})
        try:
            written: str = self._template.render(messages, chat_template_kwargs=self._variables)
        except InvalidRequestError as error:
            field = "chat_template" if error.field.startswith("messages") else error.field
            raise InvalidRequestError(field, error.problem) from None
        return written

    def parted(self, text: str, mark: str) -> tuple[str, str]:
        """What stands before and behind a hole that is in the text once."""
        before, found, after = text.partition(mark)
        if not found or mark in after:
            raise InvalidRequestError("chat_template", "does not write a message's text once, as it is")
        return before, after

    def start(self, text: str) -> list[int]:
        """Tokens of a prompt's beginning."""
        codec = self._frontend.codec
        if self._template is not None:  # it writes special tokens itself
            return codec.encode(text, add_special_tokens=False)
        return codec.encode_open(text) if text else codec.encode("")


def check_no_marks(field: str, text: str) -> None:
    """Raises InvalidRequestError."""
    if any(mark in text for mark in MARKS):
        raise InvalidRequestError(field, "must not hold U+E000 or U+E001")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Which of several parameters of the same kind is at fault."""
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{name}.{error.field}", error.problem) from None
