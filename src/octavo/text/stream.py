"""Incremental detokenisation with stop strings.

After every token the stream is an immutable `_State` that points to the state before it. Forking therefore shares
everything, rolling back follows the pointers, and both are exact by construction.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet


class StopMatcher:
    """Finds the first of several stop strings to be completed in a text that comes piece by piece (Aho & Corasick,
    1975).

    Of strings completed by the same character the longest is found, so the outcome depends on the text alone and not
    on how it is cut into tokens. (vLLM looks for each string in list order in what a step added; where only one string
    occurs the two agree.)
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]  # characters of the partial match a node stands for
        self._found: list[str | None] = [None]  # the longest stop string that ends at a node
        for string in stop:
            if string:
                self._insert(string)
        self._link()

    def _insert(self, string: str) -> None:
        node = 0
        for char in string:
            child = self._next[node].get(char)
            if child is None:
                child = self._next[node][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._found.append(None)
            node = child
        self._found[node] = string

    def _link(self) -> None:
        """Breadth first, so that a node's link (its longest proper suffix that is a node) is known before its
        children's.
        """
        self._fail = [0] * len(self._next)
        queue = list(self._next[0].values())
        for node in queue:
            for char, child in self._next[node].items():
                queue.append(child)
                self._fail[child] = self.step(self._fail[node], char)
            if self._found[node] is None:
                self._found[node] = self._found[self._fail[node]]

    def step(self, node: int, char: str) -> int:
        """The node after `char`: the longest suffix of the text so far that begins a stop string."""
        while char not in self._next[node]:
            if node == 0:
                return 0
            node = self._fail[node]
        return self._next[node][char]

    def depth(self, node: int) -> int:
        """Characters at the end of the text that may still become a stop string."""
        return self._depth[node]

    def feed(self, node: int, text: str) -> tuple[int, str | None, int]:
        """Read `text` from `node`: (node after, stop string found, characters of `text` read)."""
        root = self._next[0]
        for read, char in enumerate(text, 1):
            if node == 0 and char not in root:
                continue
            node = self.step(node, char)
            found = self._found[node]
            if found is not None:
                return node, found, read
        return node, None, len(text)


class _State:
    """The stream after one token. Never changed once made."""

    __slots__ = ("length", "node", "parent", "pending", "released", "stop_reason", "strip", "tokens")

    def __init__(
        self,
        parent: _State | None,
        pending: bytes,
        strip: bool,
        length: int,
        released: int,
        node: int,
        stop_reason: str | None,
    ) -> None:
        self.parent = parent
        self.tokens: int = 0 if parent is None else parent.tokens + 1  # taken in; `finish` counts as one
        self.pending = pending  # bytes of a character not yet complete
        self.strip = strip  # nothing was decoded yet, and one leading space is to be dropped
        self.length = length  # characters decoded
        self.released = released  # characters of them that may be shown
        self.node = node  # of the stop matcher
        self.stop_reason = stop_reason


class IncrementalText:
    """Implements `octavo.core.protocols.TextStream`.

    Concatenated, the text is `decode(prompt + output)` after `decode(prompt)`; where the prompt ends inside a
    character, that whole character counts as output. Each token costs time in its own length, not in that of the text.
    Not thread-safe.
    """

    def __init__(
        self,
        *,
        token_bytes: Callable[[int], bytes],
        skipped: AbstractSet[int],
        strip_leading_space: bool,
        prompt_token_ids: Sequence[int],
        stop: StopMatcher | None,
        include_stop: bool,
        stop_after: int = 0,
        stop_tokens: AbstractSet[int] = frozenset(),
    ) -> None:
        """`skipped`: tokens without text. `stop_after`: first tokens in whose text no stop string ends.
        `strip_leading_space`: the first character of the whole text is dropped if a space. `stop_tokens`: of those
        skipped, such as are stop strings themselves; after the first `stop_after` tokens they have text.
        """
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._stop = stop
        self._include_stop = include_stop
        self._stop_after = stop_after
        self._stop_tokens = stop_tokens
        strip = strip_leading_space and not any(map(self._bytes_of, prompt_token_ids))
        self._state = _State(None, self._unfinished(prompt_token_ids), strip, 0, 0, 0, None)
        self._text = ""  # decoded text, of which the last characters may still be in `_pieces`
        self._pieces: list[str] = []
        self._finished = False

    def _bytes_of(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped else self._token_bytes(token_id)

    def _unfinished(self, prompt_token_ids: Sequence[int]) -> bytes:
        """The bytes of a character that the prompt begins and does not end."""
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = self._bytes_of(token_id) + tail
            # A character is at most 4 bytes: with 4 at hand, or a first byte (not 10xxxxxx), what precedes does not
            # matter.
            if len(tail) >= 4 or any(byte & 0xC0 != 0x80 for byte in tail):
                break
        _, read = codecs.utf_8_decode(tail, "replace", False)
        return tail[read:]

    @property
    def text(self) -> str:
        """All text released so far: never ends in half a character, nor in a possible beginning of a stop string."""
        return self._decoded()[: self._state.released]

    def text_after(self, start: int) -> str:
        """`text` from this character on. Whoever asks after each token for what is new pays for that alone."""
        state = self._state
        at, pieces = state.length, []
        for piece in reversed(self._pieces):
            if at <= start:
                break
            at -= len(piece)
            pieces.append(piece)
        if at > start:  # the pieces begin behind it
            return self._decoded()[start : state.released]
        return "".join(reversed(pieces))[start - at : max(state.released - at, 0)]

    @property
    def stop_reason(self) -> str | None:
        """The stop string that was found, or None. Once set, `text` is final and further tokens are ignored."""
        return self._state.stop_reason

    @property
    def finished(self) -> bool:
        """Whether `finish` was called (and not undone by `rollback`)."""
        return self._finished

    def _decoded(self) -> str:
        if self._pieces:
            self._text += "".join(self._pieces)
            self._pieces.clear()
        return self._text

    def fork(self) -> IncrementalText:
        """An independent copy; costs no more for a long text than for a short one (both share the text)."""
        self._decoded()
        copy = object.__new__(IncrementalText)
        copy.__dict__.update(self.__dict__)
        copy._pieces = []
        return copy

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take in tokens. Raises RuntimeError after `finish`."""
        if self._finished:
            raise RuntimeError("the text stream is finished")
        for token_id in token_ids:
            stops = token_id in self._stop_tokens and self._state.tokens >= self._stop_after
            data = self._token_bytes(token_id) if stops else self._bytes_of(token_id)
            self._state = self._after(data, final=False)

    def finish(self) -> None:
        """End of output: release what was held back (incomplete UTF-8 becomes U+FFFD). May be called again."""
        if self._finished:
            return
        self._finished = True
        state = self._after(b"", final=True)
        if state.stop_reason is None:
            state.released = state.length
        self._state = state

    def rollback(self, num_tokens: int) -> None:
        """Undo the last `num_tokens` tokens, and `finish` if it was called. Raises ValueError for more than were taken
        in.
        """
        state: _State | None = self._state
        for _ in range(num_tokens + self._finished):
            state = state.parent if state is not None else None
        if state is None or num_tokens < 0:
            raise ValueError(f"cannot roll back {num_tokens} tokens: fewer were taken in")
        self._finished = False
        self._state = state
        self._text = self._decoded()[: state.length]

    def _after(self, data: bytes, final: bool) -> _State:
        """The state after `data` is appended to the text."""
        state = self._state
        if state.stop_reason is not None:
            return _State(state, b"", False, state.length, state.released, state.node, state.stop_reason)
        strip = state.strip
        if strip and data:
            strip = False
            data = data.removeprefix(b" ")
        data = state.pending + data
        piece, read = codecs.utf_8_decode(data, "replace", final)
        node, found, kept = state.node, None, len(piece)
        if self._stop is not None and state.tokens < self._stop_after:
            for char in piece:  # may begin a stop string that ends later
                node = self._stop.step(node, char)
        elif self._stop is not None:
            node, found, kept = self._stop.feed(node, piece)
            piece = piece[:kept]
        length = released = state.length + kept
        if found is not None:
            released -= 0 if self._include_stop else len(found)
        elif self._stop is not None:
            released -= self._stop.depth(node)
        if piece:
            self._pieces.append(piece)
        return _State(state, data[read:], strip, length, released, node, found)
