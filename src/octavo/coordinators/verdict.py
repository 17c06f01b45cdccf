"""Whether a model says YES or NO in what it writes."""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W_]+")
_VERDICT_END = re.compile(r"#|\n")
_VERDICTS = {"YES": True, "NO": False}


def verdict_of(text: str, final: bool) -> bool | None:
    """What a text says by its beginning, up to "#" or the end of the line: by the first word of it, if that is YES or
    NO, else by the last. None: not known yet, and if it is `final`, it says neither."""
    text = text.lstrip()
    end = _VERDICT_END.search(text)
    head = text if end is None else text[: end.start()]
    words = list(_WORD.finditer(head))
    ended = final or end is not None
    if not words:
        return None
    if ended or words[0].end() < len(head):  # else "NO" may become "NOT"
        said = _VERDICTS.get(words[0][0].upper())
        if said is not None:
            return said
    return _VERDICTS.get(words[-1][0].upper()) if ended else None


def merged_margin(text: str) -> str:
    """What follows the verdict in an answer such as "YES#..."."""
    text = text.lstrip()
    end = _VERDICT_END.search(text)
    words = list(_WORD.finditer(text, 0, len(text) if end is None else end.start()))
    first = next((word for word in words[:1] if word[0].upper() in _VERDICTS), words[-1] if words else None)
    return (text if first is None else text[first.end() :]).lstrip(" \t\r\n#.:,;*-").strip()
