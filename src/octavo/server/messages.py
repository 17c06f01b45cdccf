"""Messages and tools of a conversation: checked, and put as chat templates expect them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

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


def conversation(value: object, limits: Limits) -> list[dict[str, Any]]:
    """Messages as templates expect them: known keys, no nulls, and arguments of tool calls as objects, whatever the
    client sent. Contents are checked where the template is used. Raises ApiError."""
    if not isinstance(value, list):
        raise invalid("messages", f"must be a list, not {shown(value)}")
    if not 1 <= len(value) <= limits.max_messages:
        raise invalid("messages", f"must be 1 to {limits.max_messages}, not {len(value)}")
    return [_message(f"messages[{number}]", one, limits) for number, one in enumerate(value)]


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
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # as OpenAI has it; templates take objects
        arguments = _decoded(f"{field}.function.arguments", arguments, limits)
    if not isinstance(arguments, dict):
        problem = f"must be a JSON object, or one as text, not {shown(arguments)}"
        raise invalid(f"{field}.function.arguments", problem)
    return {**value, "type": "function", "function": {**function, "arguments": arguments}}


def _decoded(field: str, text: str, limits: Limits) -> Any:
    if not text.strip():
        return {}
    try:
        return parse_json(text.encode(), limits)
    except (ApiError, UnicodeEncodeError) as error:
        problem = error.message if isinstance(error, ApiError) else "lone surrogate"
        raise invalid(field, problem.replace("the body", "the text")) from None


def tools_of(value: object, limits: Limits) -> list[dict[str, Any]] | None:
    """Tools as templates expect them. Raises ApiError."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise invalid("tools", f"must be a list, not {shown(value)}")
    if not 1 <= len(value) <= limits.max_tools:
        raise invalid("tools", f"must be 1 to {limits.max_tools}, not {len(value)}")
    return [_tool(f"tools[{number}]", one) for number, one in enumerate(value)]


def _tool(field: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(value.get("function"), dict):
        raise invalid(field, 'must be {"type": "function", "function": {"name": ..., "parameters": ...}}')
    if unknown := value.keys() - _TOOL_KEYS:
        raise unknown_field(field, unknown, _TOOL_KEYS)
    function = {key: item for key, item in value["function"].items() if item is not None}
    if unknown := function.keys() - _FUNCTION_KEYS:
        raise unknown_field(f"{field}.function", unknown, _FUNCTION_KEYS)
    name = function.get("name")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise invalid(f"{field}.function.name", f"must be 1 to 64 of A-Z a-z 0-9 _ -, not {shown(name)}")
    if not isinstance(function.get("description", ""), str):
        raise invalid(f"{field}.function.description", "must be a string")
    if not isinstance(function.get("parameters", {}), dict):
        raise invalid(f"{field}.function.parameters", "must be a JSON schema, which is an object")
    if function.pop("strict", False) not in (False,):
        raise invalid(f"{field}.function.strict", "is not supported yet")
    return {"type": "function", "function": function}


def tools_for(tools: Sequence[dict[str, Any]] | None, choice: object) -> list[dict[str, Any]] | None:
    """Those that the template is told of: none with tool_choice "none". Raises ApiError."""
    if choice not in (None, "none") and not tools:
        raise invalid("tool_choice", "has no effect without tools")
    return None if not tools or choice == "none" else list(tools)


def tools_demanded(tools: Sequence[dict[str, Any]] | None, choice: object) -> list[dict[str, Any]]:
    """Those of which one must be called; none: the model may choose. Raises ApiError."""
    if choice in (None, "none", "auto") and not isinstance(choice, bool):
        return []
    if choice == "required":
        return list(tools or ())
    name = None
    if isinstance(choice, dict) and choice.keys() == {"type", "function"} and choice["type"] == "function":
        function = choice["function"]
        name = function["name"] if isinstance(function, dict) and function.keys() == {"name"} else None
    if not isinstance(name, str):
        allowed = 'must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
        raise invalid("tool_choice", f"{allowed}, not {shown(choice)}")
    found = [tool for tool in tools or () if tool["function"]["name"] == name]
    if not found:
        raise invalid("tool_choice", f"{shown(name)} is none of the tools")
    return found
