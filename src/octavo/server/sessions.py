"""Sessions that clients hold over HTTP: each with a lease, behind which it ends, since clients may never come back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from octavo.core.errors import EngineClosedError, InvalidRequestError, shown
from octavo.server.errors import ApiError, invalid, retry_after

if TYPE_CHECKING:
    from octavo.async_session import AsyncBranch, AsyncSession


class HeldSession:
    """A session of one client.

    Attributes:
        key: digest of the API key that opened it: to others it does not exist.
        lease: seconds that it stays open while nobody uses it.
        branches: by their numbers, of which 0 is what the session began with.
    """

    def __init__(self, identity: str, model: str, key: bytes | None, session: AsyncSession, lease: float) -> None:
        self.id = identity
        self.model = model
        self.key = key
        self.lease = lease
        self.session = session
        self.branches: dict[int, AsyncBranch] = {0: session}
        self.num_calls = 0  # under way
        self.num_forking = 0  # branches that calls under way will add
        self.ends_at = 0.0  # on the loop's clock, while there is no call
        self.timer: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> str | None:
        """How it ended by itself; None: it has not."""
        return self.session._client.ended

    def branch(self, number: object, name: str = "branch") -> AsyncBranch:
        """Raises ApiError."""
        if isinstance(number, bool) or not isinstance(number, int):
            raise invalid(name, f"must be the number of a branch, not {shown(number)}")
        if number not in self.branches:
            raise invalid(name, f"{shown(number)} is none of this session's, or was dropped")
        return self.branches[number]


class Sessions:
    """All that are open. Of one event loop.

    Args:
        most: that may be open at a time.
        most_per_key: of one API key, or of all clients where there are no keys.
    """

    def __init__(self, most: int, most_per_key: int) -> None:
        self.most = most
        self.most_per_key = most_per_key
        self._held: dict[str, HeldSession] = {}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def num_branches(self) -> int:
        return sum(len(held.branches) for held in self._held.values())

    def check_room(self, identity: str, key: bytes | None) -> None:
        """Raises ApiError if a client with this key may open no other one, or this one is open."""
        self._forget_ended()
        if identity in self._held:
            raise invalid("request_id", "is that of another session that is open")
        _check_room("", list(self._held.values()), self.most)
        _check_room(" of this key", self.of(key), self.most_per_key)

    def add(self, held: HeldSession) -> None:
        self._held[held.id] = held
        self._begin_lease(held)

    def of(self, key: bytes | None) -> list[HeldSession]:
        """Those that a client with this key has open."""
        self._forget_ended()
        return [held for held in self._held.values() if held.key == key]

    def find(self, identity: str, key: bytes | None) -> HeldSession:
        """Raises ApiError (404)."""
        held = self._held.get(identity)
        if held is None or held.key != key:
            raise ApiError(404, "no such session is open: its lease may have ended", "id")
        if (problem := held.ended) is not None:
            self.close(held)
            raise ApiError(404, f"the session {problem}", "id")
        return held

    def _forget_ended(self) -> None:
        """Of sessions that ended by themselves, with their engine for one: they hold no place for their leases."""
        for held in [one for one in self._held.values() if one.ended is not None]:
            self.close(held)

    @contextmanager
    def used(self, held: HeldSession) -> Iterator[None]:
        """A call on it: the lease begins anew behind it. A session that ended by itself, with its engine for one, is
        gone then. Raises ApiError (404) for such a one."""
        held.num_calls += 1
        _stop(held)
        try:
            yield
        except EngineClosedError:
            if held.id in self._held:
                raise
            raise ApiError(404, "the session was closed meanwhile", "id") from None
        except InvalidRequestError as error:
            if error.field != "session":
                raise
            self.close(held)
            raise ApiError(404, f"the session {error.problem}", "id") from None
        finally:
            held.num_calls -= 1
            if not held.num_calls and held.id in self._held:
                self._begin_lease(held)

    def close(self, held: HeldSession) -> None:
        """End it, and what is under way on it. Idempotent."""
        _stop(held)
        if self._held.get(held.id) is held:
            del self._held[held.id]
        held.session._client.close()

    def close_all(self) -> None:
        for held in list(self._held.values()):
            self.close(held)

    def _begin_lease(self, held: HeldSession) -> None:
        loop = asyncio.get_running_loop()
        held.ends_at = loop.time() + held.lease
        held.timer = loop.call_at(held.ends_at, self.close, held)


def _check_room(whose: str, found: list[HeldSession], most: int) -> None:
    if len(found) < most:
        return
    now = asyncio.get_running_loop().time()
    idle = [one.ends_at - now if not one.num_calls else one.lease for one in found]
    problem = f"{most} sessions{whose} are open, which is as many as may be: close some, or wait for a lease to end"
    raise ApiError(429, problem, headers=retry_after(min(idle)))


def _stop(held: HeldSession) -> None:
    if held.timer is not None:
        held.timer.cancel()
        held.timer = None
