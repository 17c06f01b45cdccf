"""Chat templates: messages -> prompt text, with the Jinja template that comes with a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from octavo.core.errors import InvalidRequestError, ModelFormatError
from octavo.core.values import MAX_CHARACTERS, JsonRoom, exact_dict, exact_json, exact_list, exact_str, is_a
from octavo.text.template_process import Allowance, LimitExceededError, guests, processes

DEFAULT_TIME_LIMIT = 5.0  # seconds of processor time
MAX_SOURCE = 128 << 10  # characters of a template; the longest that models are known to have are a quarter of it
MAX_ROLES = 32  # of messages that a template is tried with, in one conversation
MAX_ROLE = 128  # characters

_MAX_DEPTH = 64  # of messages, tools and template arguments
_MIB = 1 << 20

# What a template has at its disposal: enough for text that is copied a few times, at up to four bytes for a character.
_MEMORY = 192 * _MIB
_MEMORY_PER_CHARACTER = 32  # bytes
_MEMORY_PER_VALUE = 128  # bytes; an object with one key counts as three, and takes up to 250

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
    `raise_exception`, `strftime_now`, a `tojson` that leaves HTML alone), in a process of its own with limits of time
    and memory (see `octavo.text.template_process`).
    """

    def __init__(
        self,
        source: str,
        *,
        path: object = "chat template",
        time_limit: float = DEFAULT_TIME_LIMIT,
        now: Callable[[], datetime] = datetime.now,
        from_request: bool = False,
        max_characters: int = MAX_CHARACTERS,
        **special_tokens: str,
    ) -> None:
        """`special_tokens`: variables such as ``bos_token`` and ``eos_token``. `time_limit`: seconds of processor time
        that compiling and one request may take together. `path` is for error messages. `from_request`: it is no
        model's, and has to do with fewer processes, which it shares with none of a model's.

        Raises ModelFormatError (field ``chat_template``) for a template that is not valid, RequestFailedError where no
        process can be started, or none is free for a minute.
        """
        if len(source) > MAX_SOURCE:
            raise ModelFormatError(path, "chat_template", f"longer than {MAX_SOURCE} characters")
        self._source = source
        self._time_limit = time_limit
        self._now = now
        self._processes = guests if from_request else processes
        self._max_characters = max_characters
        self._special_tokens = special_tokens
        self._knows_parts = "text" in source  # the key of a part that holds it
        self._forms: dict[str, tuple[bool, bool]] = {}  # by role: see _form; at most MAX_ROLES
        allowance = Allowance(time_limit)
        try:
            reply = self._ask(None, allowance)
        except LimitExceededError as error:
            raise ModelFormatError(path, "chat_template", f"cannot be compiled: {error}") from None
        if "error" in reply:
            raise ModelFormatError(path, "chat_template", reply["message"])
        self._asks_for_null: bool = reply["asks_for_null"]
        self._compiling = time_limit - allowance.left  # seconds that it took

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

        All that is given may hold `octavo.core.values.MAX_ITEMS` values and `max_characters` characters, a role
        `MAX_ROLE`. A template that may know parts is tried with each role, at most `MAX_ROLES` of them.

        Raises InvalidRequestError naming ``messages`` (also where the template refuses them or exceeds its limits),
        ``tools``, ``documents``, ``chat_template_kwargs.<key>`` (a reserved name, or no JSON value) or
        ``continue_final_message``; RequestFailedError as the constructor does.
        """
        request = self._begin()
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError("continue_final_message", "cannot be used together with add_generation_prompt")
        chat = [self._message(index, message, request) for index, message in enumerate(_as_list("messages", messages))]
        if not chat:
            raise InvalidRequestError("messages", "at least one message is needed")
        more = exact_dict("chat_template_kwargs", chat_template_kwargs or {})
        variables = {**self._special_tokens, **self._arguments({**kwargs, **more}, request)}
        final = None
        if continue_final_message:
            final = _mark_end(chat[-1])
        variables["messages"] = chat
        variables["tools"] = None if tools is None else _objects("tools", tools, request, "function")
        variables["documents"] = None if documents is None else _objects("documents", documents, request)
        variables["add_generation_prompt"] = add_generation_prompt
        text = self._run(variables, request)
        return text if final is None else _cut(text, final)

    def _begin(self) -> _Request:
        return _Request(Allowance(self._time_limit, used=self._compiling), self._max_characters)

    def _arguments(self, kwargs: dict[Any, Any], request: _Request) -> dict[str, Any]:
        plain = {}
        for given, value in kwargs.items():
            key = exact_str("chat_template_kwargs", given, "every name must be a string")
            request.plain("chat_template_kwargs", key)  # its characters count as well
            if key in _RESERVED or key in self._special_tokens or key.startswith("_"):
                raise InvalidRequestError(f"chat_template_kwargs.{key}", "this name is reserved")
            plain[key] = request.plain(f"chat_template_kwargs.{key}", value)
        return plain

    def _message(self, index: int, message: Any, request: _Request) -> dict[str, Any]:
        field = f"messages[{index}]"
        if not is_a(message, Mapping):
            found = type(message).__name__
            raise InvalidRequestError(field, f"expected an object with role and content, found {found}")
        plain = _without_nulls(request.plain(field, message))
        role = plain.get("role")
        if not isinstance(role, str) or not role:
            raise InvalidRequestError(f"{field}.role", "missing" if role is None else "expected a non-empty string")
        if len(role) > MAX_ROLE:
            raise InvalidRequestError(f"{field}.role", f"longer than {MAX_ROLE} characters")
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
            takes_parts = self._form(role, request)[1]
            plain["content"] = parts if takes_parts else "\n".join(part["text"] for part in parts)
        elif not isinstance(content, str):
            found = type(content).__name__
            raise InvalidRequestError(f"{field}.content", f"expected a string or a list of text parts, found {found}")
        elif self._form(role, request) == (False, True):
            plain["content"] = [{"type": "text", "text": content}]
        return plain

    def _form(self, role: str, request: _Request) -> tuple[bool, bool]:
        """Whether the template writes the content of such messages where it is a string, and where it is a list of
        parts. Found by trying."""
        if not self._knows_parts:
            return True, False
        form = request.forms.get(role)
        if form is None:
            if len(request.forms) == MAX_ROLES:
                raise InvalidRequestError("messages", f"may have at most {MAX_ROLES} different roles")
            form = self._forms.get(role)
            if form is None:
                parts = [{"type": "text", "text": probe} for probe in _PROBES]
                form = self._writes(role, "".join(_PROBES), request), self._writes(role, parts, request)
                if len(self._forms) >= MAX_ROLES:
                    self._forms = {}
                self._forms[role] = form
            request.forms[role] = form
        return form

    def _writes(self, role: str, content: Any, request: _Request) -> bool:
        chat = [{"role": role, "content": content}]
        if role == "system":
            chat.append({"role": "user", "content": ""})
        elif role != "user":
            chat.insert(0, {"role": "user", "content": ""})
        variables = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": False}
        try:
            reply = self._ask({**self._special_tokens, **variables}, request.allowance)
        except LimitExceededError as error:  # the messages would fare no better
            raise InvalidRequestError("messages", f"the chat template failed: {error}") from None
        if "error" in reply:  # it does not take such a message
            return False
        text = reply["text"]
        # A list written as such, in the form of Python or JSON, has its strings in quotes, or these characters escaped.
        return all(probe in text and f'"{probe}' not in text for probe in _PROBES)

    def _run(self, variables: dict[str, Any], request: _Request) -> str:
        try:
            reply = self._ask(variables, request.allowance)
        except LimitExceededError as error:
            raise InvalidRequestError("messages", f"the chat template failed: {error}") from None
        if "error" in reply:
            what = "refused them" if reply["error"] == "refused" else "failed"
            raise InvalidRequestError("messages", f"the chat template {what}: {reply['message']}")
        return reply["text"]

    def _ask(self, variables: dict[str, Any] | None, allowance: Allowance) -> dict[str, Any]:
        """What the template writes, or why it does not; with None what is known of it when it is compiled. Raises
        LimitExceededError, RequestFailedError."""
        characters, values = _weight(variables)
        request = {
            "source": self._source,
            "variables": variables,
            "now": self._now().isoformat(),
            "characters": 4 * _MIB + 4 * characters,
            "memory": _MEMORY + _MEMORY_PER_CHARACTER * characters + _MEMORY_PER_VALUE * values,
        }
        reply = self._processes.ask(request, allowance)
        if reply.get("error") == "limit":
            raise LimitExceededError(reply["message"])
        return reply


class _Request:
    """What one request has used."""

    def __init__(self, allowance: Allowance, max_characters: int) -> None:
        self.allowance = allowance
        self.forms: dict[str, tuple[bool, bool]] = {}  # of its roles
        self._room = JsonRoom(max_characters)

    def plain(self, field: str, value: Any) -> Any:
        """The template must not meet an object with methods of its own."""
        return exact_json(field, value, _MAX_DEPTH, self._room)


def _weight(value: Any) -> tuple[int, int]:
    """The characters of plain values, digits of integers among them, and the number of values, keys among them."""
    characters, values, waiting = 0, 0, [value]
    while waiting:
        part = waiting.pop()
        values += 1
        if isinstance(part, str):
            characters += len(part)
        elif isinstance(part, int):
            characters += part.bit_length() // 3
        elif isinstance(part, list):
            waiting.extend(part)
        elif isinstance(part, dict):
            waiting.extend(part)
            waiting.extend(part.values())
    return characters, values


def _as_list(field: str, value: Any) -> list:
    if not is_a(value, Sequence):  # a generator would be empty the second time
        raise InvalidRequestError(field, f"expected a list, found {type(value).__name__}")
    return exact_list(field, value, "expected a list")


def _part(field: str, part: Any) -> dict[str, Any]:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InvalidRequestError(field, 'only parts {"type": "text", "text": "..."} are supported')
    return _without_nulls(part)


def _objects(field: str, values: Any, request: _Request, *inner: str) -> list[Any]:
    return [_without_nulls(request.plain(field, value), *inner) for value in _as_list(field, values)]


def _without_nulls(value: Any, *inner: str) -> Any:
    """An object without its keys of value null, and so the objects in it under the keys `inner`."""
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(item) if key in inner else item for key, item in value.items() if item is not None}


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


def _cut(text: str, final: str) -> str:
    """`text` up to the end of the final message."""
    end = text.rfind(_CONTINUE_MARK)
    if end < 0 or final.strip() not in text:
        raise InvalidRequestError(
            "continue_final_message", "the chat template does not write the final message as it is"
        )
    kept = text[:end]
    return kept if text.startswith(" ", end + len(_CONTINUE_MARK)) else kept.rstrip()
