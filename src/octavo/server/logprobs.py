"""Log-probabilities in OpenAI's two forms, that of completions and that of chats, and in vLLM's for prompts."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import Any

from octavo.core.outputs import Logprob

_LOWEST = -9999.0  # for minus infinity, which JSON has not; OpenAI's and vLLM's

Row = dict[int, Logprob]  # token id -> of one position: the token that stands there, and the best ones


def _value(entry: Logprob) -> float:
    return max(entry.logprob, _LOWEST)


def name_of(entry: Logprob) -> str:
    """A token as text."""
    return spelt_name(entry.decoded_token or "", bytes(entry.bytes or ()))


def spelt_name(text: str, spelt: bytes) -> str:
    """A token as text; of one that is a part of a character its bytes, as OpenAI writes them, so that two of these are
    not taken for one."""
    try:
        spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)
    return text


def _best(row: Row) -> list[Logprob]:
    return sorted(row.values(), key=lambda entry: entry.rank)


class CompletionLogprobs:
    """Of one output of /v1/completions, piece by piece: it counts where in the text each token begins.

    Args:
        start: characters before the first token.
        skipped: token ids that are not in the text.
    """

    def __init__(self, start: int = 0, skipped: Collection[int] = ()) -> None:
        self._offset = start
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def of(self, token_ids: Sequence[int], rows: Sequence[Row]) -> dict[str, Any]:
        """`rows`: one a token."""
        found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, row in zip(token_ids, rows, strict=True):
            self._append(found, token_id, row)
        return found

    def _append(self, found: dict[str, list[Any]], token_id: int, row: Row) -> None:
        found["text_offset"].append(self._offset)
        entry = row[token_id]
        self._advance(token_id, bytes(entry.bytes or ()))
        found["tokens"].append(name_of(entry))
        found["token_logprobs"].append(_value(entry))
        best: dict[str, float] = {}
        for one in _best(row):
            best.setdefault(name_of(one), _value(one))
        found["top_logprobs"].append(best)

    def first(self, token_id: int, text: str, spelt: bytes) -> dict[str, Any]:
        """Of a prompt's first token, which nothing is before that could make it probable."""
        offset, name = self._offset, spelt_name(text, spelt)
        self._advance(token_id, spelt)
        return {"text_offset": [offset], "token_logprobs": [None], "tokens": [name], "top_logprobs": [None]}

    def _advance(self, token_id: int, spelt: bytes) -> None:
        if token_id not in self._skipped:
            self._offset += len(self._decoder.decode(spelt))


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several of a completion's as one."""
    names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
    return {name: [item for part in parts for item in part[name]] for name in names}


def chat_logprobs(token_ids: Sequence[int], rows: Sequence[Row], top: int) -> dict[str, Any]:
    """Of a chat's output: each token, and the `top` best in its place."""
    content = []
    for token_id, row in zip(token_ids, rows, strict=True):
        best = [_chat_entry(entry) for entry in _best(row) if entry.rank <= top]
        content.append({**_chat_entry(row[token_id]), "top_logprobs": best[:top]})
    return {"content": content, "refusal": None}


def _chat_entry(entry: Logprob) -> dict[str, Any]:
    return {"token": name_of(entry), "logprob": _value(entry), "bytes": entry.bytes}


def prompt_logprobs(rows: Sequence[Row | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's form: one a token, None for the first."""
    if rows is None:
        return None
    return [
        None
        if row is None
        else {
            str(token_id): {"logprob": _value(one), "rank": one.rank, "decoded_token": one.decoded_token}
            for token_id, one in row.items()
        }
        for row in rows
    ]


def plain_logprobs(rows: Sequence[Row] | None) -> list[list[dict[str, Any]]] | None:
    """Octavo's own form: one list a token, the best first, each with its id."""
    if rows is None:
        return None
    return [
        [
            {
                "token_id": token_id,
                "token": name_of(one),
                "logprob": _value(one),
                "rank": one.rank,
                "bytes": one.bytes,
            }
            for token_id, one in sorted(row.items(), key=lambda item: item[1].rank)
        ]
        for row in rows
    ]
