"""Who may find whose KV."""

from __future__ import annotations

from typing import NamedTuple


class Namespace(NamedTuple):
    """A part of the prefix cache: sequences find what was computed in an equal one, and nothing else."""

    salt: str | None = None  # the user's: requests with different ones share nothing
    adapter: str | None = None  # weights that were added to the model's
    document: str | None = None  # computed alone, as nobody's prefix
    request_id: str | None = None  # not None: of this request alone

    @property
    def is_private(self) -> bool:
        """Whether it ends with a request. Nothing of it is kept outside of memory, or explained to others."""
        return self.request_id is not None

    def private_to(self, request_id: str) -> Namespace:
        return self._replace(request_id=request_id)

    @property
    def shared(self) -> Namespace:
        """What a private one goes over to when its request ends."""
        return self._replace(request_id=None)


SHARED = Namespace()
