"""How much may wait. What does not fit is refused at once, and told when to come again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from octavo.server.errors import ApiError, retry_after

_WINDOW = 60.0  # seconds over which the rate of finishing requests is measured
_LONGEST = 120.0  # seconds that a client is told to wait at most
_UNKNOWN = 5.0  # seconds for a request while none has finished lately


class Admission:
    """Counts prompts that are in the engine, running or waiting, and their tokens. Of one event loop.

    Args:
        places: prompts that can run at once.
        room: tokens that KV memory holds.
        most_requests, most_tokens: what may wait beyond these.
        refused: told whenever something is, and why: "requests" or "tokens".
    """

    def __init__(
        self,
        places: int,
        room: int,
        most_requests: int,
        most_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        refused: Callable[[str], None] | None = None,
    ) -> None:
        self.places = places
        self.room = room
        self.most_requests = most_requests
        self.most_tokens = most_tokens
        self._clock = clock
        self._tell_refused = refused
        self.num_requests = 0
        self.num_tokens = 0
        self.num_refused = 0
        self._finished: deque[float] = deque(maxlen=256)  # when

    @contextmanager
    def admit(self, requests: int, tokens: int) -> Iterator[None]:
        """While the block runs, so many prompts with so many tokens together are in the engine. Raises ApiError (429)
        if as many wait already as may. One request may hold many prompts, and goes in as a whole where one would: it
        would else wait for an empty engine, which may never come."""
        if self.num_requests >= self.places + self.most_requests:
            raise self._refused("requests")
        if self.num_tokens >= self.room + self.most_tokens:
            raise self._refused("tokens")
        self.num_requests += requests
        self.num_tokens += tokens
        try:
            yield
        finally:
            self.num_requests -= requests
            self.num_tokens -= tokens
            now = self._clock()
            self._finished.extend([now] * min(requests, 256))

    @property
    def num_waiting(self) -> int:
        return max(0, self.num_requests - self.places)

    @property
    def seconds_per_request(self) -> float:
        """By what finished in the last minute."""
        now = self._clock()
        while self._finished and self._finished[0] < now - _WINDOW:
            self._finished.popleft()
        if len(self._finished) < 2:
            return _UNKNOWN
        return (now - self._finished[0]) / len(self._finished)

    def _refused(self, what: str) -> ApiError:
        self.num_refused += 1
        if self._tell_refused is not None:
            self._tell_refused(what)
        # When those that wait now will have found places: until then it would only be refused again, or wait itself.
        seconds = min(_LONGEST, self.seconds_per_request * max(1, self.num_waiting))
        problem = f"too many {what} are waiting: try it again in {max(1, round(seconds))} s"
        return ApiError(429, problem, headers=retry_after(seconds))
