"""Chat templates: messages -> prompt text, with the Jinja template that comes with a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from octavo.core.errors import InvalidRequestError, ModelFormatError

if TYPE_CHECKING:
    from jinja2 import nodes

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

# Contents of messages to try a template with.
_PROBES = ("\ue000first\ue001", "\ue000second\ue001")


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
        self._knows_parts = "text" in source  # the key of a part that holds it
        self._forms: dict[str, tuple[bool, bool]] = {}  # by role: see _form
        try:
            self._template = self._environment.from_string(source)
            self._asks_for_null = _asks_for_null(self._environment.parse(source))
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
        """The prompt for `messages`, each ``{"role": str, "content": str}`` or with a list of text parts. These are
        passed as they are to a template that goes through them, and joined by newlines for one that does not; one that
        knows parts alone gets a string as a part. Other keys and any role are passed to the template.

        A key whose value is null is as one that is not there, in messages, their parts and tool calls, tools and
        documents; only arguments of a call and what a tool's schema says are data. Of ``content`` a template may ask
        whether it is none, and then finds it so.

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
        chat = [self._message(index, message) for index, message in enumerate(_as_list("messages", messages))]
        if not chat:
            raise InvalidRequestError("messages", "at least one message is needed")
        variables = {**self._special_tokens, **self._arguments({**kwargs, **(chat_template_kwargs or {})})}
        final = None
        if continue_final_message:
            final = _mark_end(chat[-1])
        variables["messages"] = chat
        variables["tools"] = None if tools is None else _objects("tools", tools, "function")
        variables["documents"] = None if documents is None else _objects("documents", documents)
        variables["add_generation_prompt"] = add_generation_prompt
        text = self._run(variables)
        return text if final is None else _cut(text, final)

    def _arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        for key in kwargs:
            if not isinstance(key, str) or key in _RESERVED or key in self._special_tokens or key.startswith("_"):
                raise InvalidRequestError(f"chat_template_kwargs.{key}", "this name is reserved")
        return {key: _plain(f"chat_template_kwargs.{key}", value) for key, value in kwargs.items()}

    def _message(self, index: int, message: Any) -> dict[str, Any]:
        field = f"messages[{index}]"
        if not isinstance(message, Mapping):
            found = type(message).__name__
            raise InvalidRequestError(field, f"expected an object with role and content, found {found}")
        plain = _without_nulls(_plain(field, message))
        role = plain.get("role")
        if not isinstance(role, str) or not role:
            raise InvalidRequestError(f"{field}.role", "missing" if role is None else "expected a non-empty string")
        if isinstance(plain.get("tool_calls"), list):
            plain["tool_calls"] = [_without_nulls(call, "function") for call in plain["tool_calls"]]
        content = plain.get("content")
        if content is None:
            if not plain.get("tool_calls"):
                raise InvalidRequestError(f"{field}.content", "missing")
            if self._asks_for_null:
                plain["content"] = None
        elif isinstance(content, list):
            parts = [_part(f"{field}.content[{n}]", part) for n, part in enumerate(content)]
            takes_parts = self._form(role)[1]
            plain["content"] = parts if takes_parts else "\n".join(part["text"] for part in parts)
        elif not isinstance(content, str):
            found = type(content).__name__
            raise InvalidRequestError(f"{field}.content", f"expected a string or a list of text parts, found {found}")
        elif self._form(role) == (False, True):
            plain["content"] = [{"type": "text", "text": content}]
        return plain

    def _form(self, role: str) -> tuple[bool, bool]:
        """Whether the template writes the content of such messages where it is a string, and where it is a list of
        parts. Found by trying."""
        if not self._knows_parts:
            return True, False
        form = self._forms.get(role)
        if form is None:
            parts = [{"type": "text", "text": probe} for probe in _PROBES]
            form = self._forms[role] = self._writes(role, "".join(_PROBES)), self._writes(role, parts)
        return form

    def _writes(self, role: str, content: Any) -> bool:
        from octavo.text.sandbox import LimitExceededError

        chat = [{"role": role, "content": content}]
        if role == "system":
            chat.append({"role": "user", "content": ""})
        elif role != "user":
            chat.insert(0, {"role": "user", "content": ""})
        variables = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": False}
        try:
            text = self._written({**self._special_tokens, **variables})
        except LimitExceededError as error:  # the messages would fare no better
            raise InvalidRequestError("messages", f"the chat template failed: {_reason(error)}") from None
        except Exception:  # it does not take such a message
            return False
        # A list written as such, in the form of Python or JSON, has its strings in quotes, or these characters escaped.
        return all(probe in text and f'"{probe}' not in text for probe in _PROBES)

    def _budget(self, given: int) -> Budget:
        """Room for a rendering, by the weight of what it is given."""
        from octavo.text.sandbox import Budget

        return Budget(self._time_limit, value_limit=4 * _MIB + 4 * given, total_limit=128 * _MIB + 256 * given)

    def _run(self, variables: dict[str, Any]) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self._written(variables)
        except TemplateError as error:
            raise InvalidRequestError("messages", f"the chat template refused them: {error.message}") from None
        except Exception as error:  # whatever a template does wrong concerns this request only
            raise InvalidRequestError("messages", f"the chat template failed: {_reason(error)}") from None

    def _written(self, variables: dict[str, Any]) -> str:
        """What the template writes, within its limits. Raises whatever it raises."""
        from octavo.text.sandbox import Budget

        given = Budget(self._time_limit, 1 << 62, 1 << 62).weigh(variables)
        budget = self._environment.budget = self._budget(given)
        pieces = []
        length = 0
        for piece in self._template.generate(variables):
            budget.tick()
            length += len(piece)
            budget.foresee(length)
            pieces.append(piece)
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


def _part(field: str, part: Any) -> dict[str, Any]:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InvalidRequestError(field, 'only parts {"type": "text", "text": "..."} are supported')
    return _without_nulls(part)


def _objects(field: str, values: Any, *inner: str) -> list[Any]:
    return [_without_nulls(_plain(field, value), *inner) for value in _as_list(field, values)]


def _without_nulls(value: Any, *inner: str) -> Any:
    """An object without its keys of value null, and so the objects in it under the keys `inner`."""
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(item) if key in inner else item for key, item in value.items() if item is not None}


def _asks_for_null(tree: nodes.Template) -> bool:
    """Whether a template tests that some ``content`` is none."""
    from jinja2 import nodes

    for test in tree.find_all(nodes.Test):
        asked = test.node
        named = isinstance(asked, nodes.Getattr) and asked.attr == "content"
        keyed = isinstance(asked, nodes.Getitem) and asked.arg == nodes.Const("content")
        if test.name == "none" and (named or keyed):
            return True
    return False


def _mark_end(message: dict[str, Any]) -> str:
    """Mark where the content of the final message ends; the text that does."""
    content = message.get("content")
    if isinstance(content, list) and content:
        content[-1]["text"], final = content[-1]["text"] + _CONTINUE_MARK + " ", content[-1]["text"]
    elif isinstance(content, str):
        message["content"], final = content + _CONTINUE_MARK + " ", content
    else:
        raise InvalidRequestError("continue_final_message", "the final message has no content to continue")
    return final


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
