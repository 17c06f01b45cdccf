"""Chat templates: messages -> prompt text, with the Jinja template that comes with a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from octavo.core.errors import InvalidRequestError, ModelFormatError

if TYPE_CHECKING:
    from octavo.text.sandbox import Budget

DEFAULT_TIME_LIMIT = 5.0  # seconds

_MAX_SOURCE = 1 << 20  # characters of a template
_MAX_DEPTH = 64  # of messages, tools and template arguments
_MIB = 1 << 20

# Names that belong to the engine or to the template language: a request must not give them another meaning.
# fmt: off
_RESERVED = frozenset([
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template",
    "conversation", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "raise_exception", "strftime_now", "namespace", "range", "dict",
    "cycler", "joiner", "lipsum", "loop", "caller", "self", "super", "varargs", "kwargs", "context", "environment",
])
# fmt: on

# Marks where the final message ends, to cut there. The space shows whether the template trimmed what it wrote.
_CONTINUE_MARK = "\ue000continue here\ue001"


class ChatTemplate:
    """A compiled chat template. Safe to share by threads.

    The template runs in an immutable sandbox set up as in transformers (trim_blocks, lstrip_blocks, break and continue,
    `raise_exception`, `strftime_now`, a `tojson` that leaves HTML alone), under a time limit and a limit of memory
    (see `octavo.text.sandbox`).
    """

    def __init__(
        self,
        source: str,
        *,
        path: object = "chat template",
        time_limit: float = DEFAULT_TIME_LIMIT,
        now: Callable[[], datetime] = datetime.now,
        **special_tokens: str,
    ) -> None:
        """`special_tokens`: variables such as ``bos_token`` and ``eos_token``. `time_limit`: seconds a rendering may
        take. `path` is for error messages. Raises ModelFormatError (field ``chat_template``) for a template that is
        not valid.
        """
        from jinja2.exceptions import TemplateSyntaxError

        from octavo.text.sandbox import TemplateEnvironment

        if len(source) > _MAX_SOURCE:
            raise ModelFormatError(path, "chat_template", f"longer than {_MAX_SOURCE} characters")
        self._time_limit = time_limit
        self._special_tokens = special_tokens
        self._environment = TemplateEnvironment(now)
        self._environment.budget = self._budget(0)
        try:
            self._template = self._environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ModelFormatError(path, "chat_template", f"line {error.lineno}: {error.message}") from None
        except Exception as error:  # constant parts are computed here, and may fail in any way
            raise ModelFormatError(path, "chat_template", _reason(error)) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages`, each ``{"role": str, "content": str}`` or with a list of text parts, which are
        joined by newlines. Other keys and any role are passed to the template.

        `add_generation_prompt`: end with the opening of the assistant's turn; on unless the final message is
        continued. `continue_final_message`: end inside the final message instead, for the model to carry it on.
        `chat_template_kwargs` and `kwargs` are variables for the template; what a request brings belongs in the former,
        where it cannot be taken for an argument of this method.

        Raises InvalidRequestError naming ``messages`` (also where the template refuses them or exceeds its limits),
        ``chat_template_kwargs.<key>`` (a reserved name, or no JSON value) or ``continue_final_message``.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError("continue_final_message", "cannot be used together with add_generation_prompt")
        chat = [_message(index, message) for index, message in enumerate(_as_list("messages", messages))]
        if not chat:
            raise InvalidRequestError("messages", "at least one message is needed")
        variables = {**self._special_tokens, **self._arguments({**kwargs, **(chat_template_kwargs or {})})}
        final = None
        if continue_final_message:
            final = chat[-1]["content"]
            if not isinstance(final, str):
                raise InvalidRequestError("continue_final_message", "the final message has no content to continue")
            chat[-1]["content"] = final + _CONTINUE_MARK + " "
        variables["messages"] = chat
        variables["tools"] = None if tools is None else _plain("tools", _as_list("tools", tools))
        variables["documents"] = None if documents is None else _plain("documents", _as_list("documents", documents))
        variables["add_generation_prompt"] = add_generation_prompt
        text = self._run(variables)
        return text if final is None else _cut(text, final)

    def _arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        for key in kwargs:
            if not isinstance(key, str) or key in _RESERVED or key in self._special_tokens or key.startswith("_"):
                raise InvalidRequestError(f"chat_template_kwargs.{key}", "this name is reserved")
        return {key: _plain(f"chat_template_kwargs.{key}", value) for key, value in kwargs.items()}

    def _budget(self, given: int) -> Budget:
        """Room for a rendering, by the weight of what it is given."""
        from octavo.text.sandbox import Budget

        return Budget(self._time_limit, value_limit=4 * _MIB + 4 * given, total_limit=128 * _MIB + 256 * given)

    def _run(self, variables: dict[str, Any]) -> str:
        from jinja2.exceptions import TemplateError

        from octavo.text.sandbox import Budget

        given = Budget(self._time_limit, 1 << 62, 1 << 62).weigh(variables)
        budget = self._environment.budget = self._budget(given)
        pieces = []
        length = 0
        try:
            for piece in self._template.generate(variables):
                budget.tick()
                length += len(piece)
                budget.foresee(length)
                pieces.append(piece)
        except TemplateError as error:
            raise InvalidRequestError("messages", f"the chat template refused them: {error.message}") from None
        except Exception as error:  # whatever a template does wrong concerns this request only
            raise InvalidRequestError("messages", f"the chat template failed: {_reason(error)}") from None
        return "".join(pieces)


def _reason(error: Exception) -> str:
    from octavo.text.sandbox import LimitExceededError

    if isinstance(error, LimitExceededError):
        return str(error)
    return f"{type(error).__name__}: {str(error)[:500]}"


def _as_list(field: str, value: Any) -> list:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise InvalidRequestError(field, f"expected a list, found {type(value).__name__}")
    return list(value)


def _message(index: int, message: Any) -> dict[str, Any]:
    field = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise InvalidRequestError(field, f"expected an object with role and content, found {type(message).__name__}")
    plain = _plain(field, message)
    role = plain.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(f"{field}.role", "missing" if role is None else "expected a non-empty string")
    content = plain.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(f"{field}.content[{n}]", part) for n, part in enumerate(content))
    if content is None and not plain.get("tool_calls"):
        raise InvalidRequestError(f"{field}.content", "missing")
    if content is not None and not isinstance(content, str):
        message = f"expected a string or a list of text parts, found {type(content).__name__}"
        raise InvalidRequestError(f"{field}.content", message)
    plain["content"] = content
    return plain


def _part(field: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InvalidRequestError(field, 'only parts {"type": "text", "text": "..."} are supported')
    return part["text"]


def _plain(field: str, value: Any, depth: int = 0) -> Any:
    """`value` rebuilt from JSON's types alone: the template must not meet an object with methods of its own."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth >= _MAX_DEPTH:
        raise InvalidRequestError(field, f"nested more than {_MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InvalidRequestError(field, "every key must be a string")
        return {str(key): _plain(field, item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(field, item, depth + 1) for item in value]
    for base in (str, bool, int, float):
        if isinstance(value, base):  # a subclass, such as an enumeration's
            return base.__str__(value) if base is str else base(value)
    raise InvalidRequestError(field, f"{type(value).__name__} is not a JSON value")


def _cut(text: str, final: str) -> str:
    """`text` up to the end of the final message."""
    end = text.rfind(_CONTINUE_MARK)
    if end < 0 or final.strip() not in text:
        raise InvalidRequestError(
            "continue_final_message", "the chat template does not write the final message as it is"
        )
    kept = text[:end]
    return kept if text.startswith(" ", end + len(_CONTINUE_MARK)) else kept.rstrip()
