"""What a request to /v1/messages holds, as a conversation: blocks as messages, and tools and choices in Anthropic's
forms as those of chats."""

from __future__ import annotations

from typing import Any

from octavo.core.errors import shown
from octavo.server.errors import invalid
from octavo.server.fields import is_one_of
from octavo.server.messages import (
    Choice,
    Named,
    Tool,
    ToolUse,
    Transcript,
    filled,
    known_fields,
    listed,
    tool_of,
    tool_use,
)
from octavo.server.settings import Limits

# Of each kind of block. What is cached is found without cache_control; what the other keys may be is in _NEUTRAL.
_TEXT_KEYS = frozenset(["type", "text", "cache_control", "citations"])
_USE_KEYS = frozenset(["type", "id", "name", "input", "cache_control", "caller"])
_RESULT_KEYS = frozenset(["type", "tool_use_id", "content", "is_error", "cache_control"])
_TOOL_KEYS = frozenset(["type", "name", "description", "input_schema", "strict", "cache_control"]) | {
    "allowed_callers",
    "defer_loading",
    "eager_input_streaming",
    "input_examples",
}
# Keys that are taken with these values, which ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],),
    "caller": ({"type": "direct"},),
    "citations": ([],),
    "defer_loading": (False,),
    "eager_input_streaming": (False, True),  # it always comes as it is written
    "input_examples": ([],),
}
_ROLES = ("user", "assistant", "system")
_CHOICES = {"auto": None, "any": "required", "none": "none"}


class Turns(Transcript):
    """Of blocks. What one side says in a row is one message."""

    def __init__(self, system: object, value: object, limits: Limits) -> None:
        """Raises ApiError."""
        super().__init__()
        self._limits = limits
        if system not in (None, "", []):
            self._add("system", "system", _texts("system", system))
        for number, one in enumerate(listed("messages", value, limits.max_messages)):
            self._take(f"messages[{number}]", one)
        self._put_together()

    @property
    def going_on(self) -> bool:
        """Whether the answer goes on in the last message, which is the assistant's then."""
        return self.messages[-1]["role"] == "assistant"

    def _take(self, field: str, value: object) -> None:
        message = known_fields(field, value, ("role", "content"), "an object with role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in _ROLES:
            raise invalid(f"{field}.role", f"must be {', '.join(_ROLES)}, not {shown(role)}")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not content:
            raise invalid(f"{field}.content", f"must be a string or a list of blocks, not empty, not {shown(content)}")
        if role == "system":
            self._add(field, role, _texts(f"{field}.content", content))
            return
        for number, block in enumerate(content):
            self._block(f"{field}.content[{number}]", field, role, block)
        if len(self.messages[-1].get("tool_calls", ())) > self._limits.max_tool_calls:
            raise invalid(f"{field}.content", f"may have at most {self._limits.max_tool_calls} tool_use blocks")

    def _turn(self, name: str, role: str) -> int:
        """Number of the message of this side that is being written."""
        if not self.messages or self.messages[-1]["role"] != role:
            self._add(name, role, [])
        return len(self.messages) - 1

    def _block(self, field: str, name: str, role: str, block: object) -> None:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            self._texts[self._turn(name, role)].append(_text(field, block))
        elif kind == "tool_use" and role == "assistant":
            call = _tool_use(field, block)
            self.messages[self._turn(name, role)].setdefault("tool_calls", []).append(call)
        elif kind == "tool_result" and role == "user":
            identity, texts = _tool_result(field, block)
            self._add(name, "tool", texts, tool_call_id=identity)
        else:
            allowed = f"text or {'tool_use' if role == 'assistant' else 'tool_result'}"
            problem = f"must be {allowed} in a message of role {role}: other blocks are not supported"
            wrong = block if kind is None else kind
            raise invalid(f"{field}.type" if kind is not None else field, f"{problem}, not {shown(wrong)}")


def _known(field: str, value: object, allowed: frozenset[str], kind: str) -> dict[str, Any]:
    found = known_fields(field, value, allowed, kind)
    check_cache_control(f"{field}.cache_control", found.get("cache_control"))
    for name, values in _NEUTRAL.items():
        if name in found and not is_one_of(found[name], values):
            raise invalid(f"{field}.{name}", f"is not supported: only {shown(values[0])} is, not {shown(found[name])}")
    return found


def check_cache_control(field: str, value: object) -> None:
    """It is taken, and changes nothing: all that is computed is kept while there is room. Raises ApiError."""
    if value is not None and (not isinstance(value, dict) or value.get("type") != "ephemeral"):
        raise invalid(field, f'must be {{"type": "ephemeral"}}, not {shown(value)}')


def _text(field: str, block: object) -> str:
    known = _known(field, block, _TEXT_KEYS, "a text block")
    if known.get("type") != "text":
        raise invalid(f"{field}.type", f"must be text: other blocks are not supported, not {shown(known.get('type'))}")
    if not isinstance(known.get("text"), str):
        raise invalid(f"{field}.text", f"must be a string, not {shown(known.get('text'))}")
    return str(known["text"])


def _texts(field: str, value: object) -> list[str]:
    """Of a string, or of text blocks."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise invalid(field, f"must be a string or a list of text blocks, not {shown(value)}")
    return [_text(f"{field}[{number}]", one) for number, one in enumerate(value)]


def _tool_use(field: str, block: object) -> dict[str, Any]:
    known = _known(field, block, _USE_KEYS, "a block")
    if not isinstance(known.get("input"), dict):
        raise invalid(f"{field}.input", f"must be an object, not {shown(known.get('input'))}")
    function = {"name": filled(field, known, "name"), "arguments": known["input"]}
    return {"id": filled(field, known, "id"), "type": "function", "function": function}


def _tool_result(field: str, block: object) -> tuple[str, list[str]]:
    """The id of its call, and its texts: templates know no errors, so of one the text says that it is."""
    known = _known(field, block, _RESULT_KEYS, "a block")
    is_error = known.get("is_error", False)
    if not isinstance(is_error, bool):
        raise invalid(f"{field}.is_error", f"must be true or false, not {shown(is_error)}")
    texts = _texts(f"{field}.content", known.get("content", "")) or [""]
    if is_error:
        texts[0] = f"Error: {texts[0]}"
    return filled(field, known, "tool_use_id"), texts


def use_of(tools: object, choice: object, limits: Limits) -> ToolUse:
    """What a request says of calls. Raises ApiError."""
    found = []
    if tools not in (None, []):  # the client's way to say that there are none
        found = [_tool(f"tools[{number}]", one) for number, one in enumerate(listed("tools", tools, limits.max_tools))]
    chosen, single = _choice(choice)
    return tool_use(found, chosen, False if single and found else None, "tool_choice.disable_parallel_tool_use")


def _tool(field: str, value: object) -> Tool:
    given = _known(field, value, _TOOL_KEYS, "a tool")
    if given.get("type", "custom") != "custom":
        problem = "must be custom: tools that the server or the model know by themselves are not supported"
        raise invalid(f"{field}.type", f"{problem}, not {shown(given['type'])}")
    if "input_schema" not in given:
        raise invalid(f"{field}.input_schema", "is missing")
    return tool_of(field, given, "input_schema")


def _choice(value: object) -> tuple[Choice | None, bool]:
    """And whether one call is allowed at most."""
    if value is None:
        return None, False
    allowed = frozenset(["type", "name", "disable_parallel_tool_use"])
    given = known_fields("tool_choice", value, allowed, 'an object such as {"type": "auto"}')
    kind, name, single = given.get("type"), given.get("name"), given.get("disable_parallel_tool_use", False)
    if not isinstance(single, bool):
        raise invalid("tool_choice.disable_parallel_tool_use", f"must be true or false, not {shown(single)}")
    if kind == "tool":
        if not isinstance(name, str):
            raise invalid("tool_choice.name", f"must be the name of a tool, not {shown(name)}")
        return Named(name), single
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise invalid("tool_choice.type", f"must be auto, any, tool or none, not {shown(kind)}")
    if name is not None:
        raise invalid("tool_choice.name", "is for the type tool alone")
    return _CHOICES[kind], single  # type: ignore[return-value]
