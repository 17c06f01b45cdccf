"""Messages and tools of a conversation: checked, and put as chat templates expect them.

Forms here are those of OpenAI's chats; what other routes take is made of the same parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from octavo.core.errors import shown
from octavo.server.errors import ApiError, invalid, unknown_field
from octavo.server.json_body import parse_json
from octavo.server.settings import Limits

# "developer" is OpenAI's newer word for "system", which templates know.
ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {"developer": "system"}
_KEYS = frozenset(["role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"])
_TOOL_KEYS = frozenset(["type", "function"])
_FUNCTION_KEYS = frozenset(["name", "description", "parameters", "strict"])
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def messages_of(value: object, limits: Limits) -> list[dict[str, Any]]:
    """Messages as templates expect them: known keys, no nulls, and arguments of tool calls as objects, whatever the
    client sent. Contents are checked where the template is used. Raises ApiError."""
    messages = listed("messages", value, limits.max_messages)
    return [_message(f"messages[{number}]", one, limits) for number, one in enumerate(messages)]


def listed(field: str, value: object, most: int) -> list[Any]:
    """A list that is not empty. Raises ApiError."""
    if not isinstance(value, list):
        raise invalid(field, f"must be a list, not {shown(value)}")
    if not 1 <= len(value) <= most:
        raise invalid(field, f"must be 1 to {most}, not {len(value)}")
    return value


def known_fields(field: str, value: object, allowed: Iterable[str], kind: str) -> dict[str, Any]:
    """An object without its nulls, whose keys are all allowed. Raises ApiError."""
    if not isinstance(value, dict):
        raise invalid(field, f"must be {kind}, not {shown(value)}")
    found = {key: item for key, item in value.items() if item is not None}
    if unknown := found.keys() - set(allowed):
        raise unknown_field(field, unknown, allowed)
    return found


def _message(field: str, value: object, limits: Limits) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(field, f"must be an object with role and content, not {shown(value)}")
    message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        problem = "is missing" if role is None else f"must be one of {', '.join(ROLES)}, not {shown(role)}"
        raise invalid(f"{field}.role", problem)
    message["role"] = ROLES[role]
    if unknown := message.keys() - _KEYS:
        raise unknown_field(field, unknown, _KEYS)
    for key in ("name", "tool_call_id", "reasoning_content"):
        if key in message and not isinstance(message[key], str):
            raise invalid(f"{field}.{key}", f"must be a string, not {shown(message[key])}")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(f"{field}.tool_calls", role, message["tool_calls"], limits)
        if not message["tool_calls"]:
            del message["tool_calls"]
    return message


def _tool_calls(field: str, role: str, value: object, limits: Limits) -> list[dict[str, Any]]:
    if role != "assistant":
        raise invalid(field, f"is for messages of the assistant, not of {role}")
    if not isinstance(value, list) or len(value) > limits.max_tool_calls:
        raise invalid(field, f"must be a list of at most {limits.max_tool_calls} calls")
    return [_tool_call(f"{field}[{number}]", one, limits) for number, one in enumerate(value)]


def _tool_call(field: str, value: object, limits: Limits) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(function, dict) or value.get("type", "function") != "function":
        raise invalid(field, 'must be {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}')
    if not isinstance(function.get("name"), str):
        raise invalid(f"{field}.function.name", "must be a string")
    arguments = decoded(f"{field}.function.arguments", function.get("arguments"), limits)
    return {**value, "type": "function", "function": {**function, "arguments": arguments}}


def decoded(field: str, value: object, limits: Limits) -> dict[str, Any]:
    """Arguments of a call, which OpenAI has as text, and templates as an object. Raises ApiError."""
    if isinstance(value, str):
        try:
            value = parse_json(value.encode(), limits) if value.strip() else {}
        except (ApiError, UnicodeEncodeError) as error:
            problem = error.message if isinstance(error, ApiError) else "lone surrogate"
            raise invalid(field, problem.replace("the body", "the text")) from None
    if not isinstance(value, dict):
        raise invalid(field, f"must be a JSON object, or one as text, not {shown(value)}")
    return value


def filled(field: str, given: dict[str, Any], key: str) -> str:
    """A string that must be there. Raises ApiError."""
    value = given.get(key)
    if not isinstance(value, str) or not value:
        raise invalid(f"{field}.{key}", f"must be a string, not empty, not {shown(value)}")
    return value


class Transcript:
    """Messages of a conversation that a request has in another form, and what it calls each."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.names: list[str] = []
        self._texts: list[list[str]] = []  # of each message: put together at the end, since one may have very many

    def _add(self, name: str, role: str, texts: list[str], **more: Any) -> None:
        self.messages.append({"role": role, "content": None, **more})
        self.names.append(name)
        self._texts.append(texts)

    def _put_together(self) -> None:
        for message, texts in zip(self.messages, self._texts, strict=True):
            message["content"] = _content(texts) if texts else None


def _content(texts: Sequence[str]) -> str | list[dict[str, str]]:
    """One text, or several as parts."""
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


# --- tools ---


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    field: str  # what the request calls it
    function: dict[str, Any]  # name, description, parameters: as templates expect it
    strict: bool  # the arguments must fit the parameters

    @property
    def name(self) -> str:
        return str(self.function["name"])


class Named(NamedTuple):
    """The one tool that must be called."""

    name: str


Choice = Literal["none", "auto", "required"] | Named


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says of calls."""

    tools: tuple[Tool, ...] = ()  # that the chat template is told of
    demanded: tuple[Tool, ...] = ()  # of which one must be called; none: the model may choose
    several: bool = True  # calls may follow each other
    several_name: str = "parallel_tool_calls"  # what the request calls the field that says so

    @property
    def told(self) -> list[dict[str, Any]] | None:
        """As templates expect them."""
        return [{"type": "function", "function": tool.function} for tool in self.tools] or None

    @property
    def names(self) -> list[str]:
        return [tool.name for tool in self.tools]


def tools_of(value: object, limits: Limits) -> list[Tool] | None:
    """Raises ApiError."""
    if value is None:
        return None
    return [_tool(f"tools[{number}]", one) for number, one in enumerate(listed("tools", value, limits.max_tools))]


def _tool(field: str, value: object) -> Tool:
    if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(value.get("function"), dict):
        raise invalid(field, 'must be {"type": "function", "function": {"name": ..., "parameters": ...}}')
    if unknown := value.keys() - _TOOL_KEYS:
        raise unknown_field(field, unknown, _TOOL_KEYS)
    name = f"{field}.function"
    function = known_fields(name, value["function"], _FUNCTION_KEYS, "an object")
    return tool_of(name, function)


def tool_of(field: str, given: dict[str, Any], schema: str = "parameters") -> Tool:
    """Of its name, description, schema and strict, the schema under that key. Raises ApiError."""
    name, strict = given.get("name"), given.get("strict", False)
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise invalid(f"{field}.name", f"must be 1 to 64 of A-Z a-z 0-9 _ -, not {shown(name)}")
    if not isinstance(given.get("description", ""), str):
        raise invalid(f"{field}.description", "must be a string")
    if not isinstance(given.get(schema, {}), dict):
        raise invalid(f"{field}.{schema}", "must be a JSON schema, which is an object")
    if not isinstance(strict, bool):
        raise invalid(f"{field}.strict", f"must be true or false, not {shown(strict)}")
    function = {"name": name}
    for key, source in (("description", "description"), ("parameters", schema)):
        if source in given:
            function[key] = given[source]
    return Tool(field, function, strict)


def choice_of(value: object) -> Choice | None:
    """Raises ApiError."""
    if value is None or (isinstance(value, str) and value in ("none", "auto", "required")):
        return value  # type: ignore[return-value]
    name = None
    if isinstance(value, dict) and value.keys() == {"type", "function"} and value["type"] == "function":
        function = value["function"]
        name = function["name"] if isinstance(function, dict) and function.keys() == {"name"} else None
    if not isinstance(name, str):
        allowed = 'must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
        raise invalid("tool_choice", f"{allowed}, not {shown(value)}")
    return Named(name)


def tool_use(
    tools: Sequence[Tool] | None, choice: Choice | None, parallel: bool | None, name: str = "parallel_tool_calls"
) -> ToolUse:
    """What a request says of calls: by its tools, tool_choice and parallel_tool_calls, which it calls `name`. Raises
    ApiError."""
    if not tools:
        if choice not in (None, "none"):
            raise invalid("tool_choice", "has no effect without tools")
        if parallel is not None:
            raise invalid(name, "has no effect without tools")
        return ToolUse()
    if choice == "none":
        return ToolUse()
    demanded: Sequence[Tool] = tools if choice == "required" else ()
    if isinstance(choice, Named):
        demanded = [tool for tool in tools if tool.name == choice.name]
        if not demanded:
            raise invalid("tool_choice", f"{shown(choice.name)} is none of the tools")
    return ToolUse(tuple(tools), tuple(demanded), parallel is not False, name)
