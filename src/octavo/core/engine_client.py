"""An engine as the doors see it: it runs on a thread of this process, or in a process of its own."""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from concurrent.futures import Future

    from octavo.core.margins import MarginsSpec
    from octavo.core.outputs import CacheExplanation
    from octavo.core.pooling import PoolingSpec
    from octavo.core.request import RequestSpec, SessionSpec

Deliver = Callable[[Any], None]  # gets outputs, or an Exception, after which nothing more comes


class EngineClient(Protocol):
    """Methods may be called from any thread, and by finalizers, which run at any moment in any. All of them raise
    EngineClosedError once it is closed."""

    def check_open(self) -> None: ...

    def add(self, requests: Sequence[RequestSpec | MarginsSpec | PoolingSpec], deliver: Deliver) -> None:
        """Queue requests, all before the next step. Each one's outputs go to `deliver`, the last one finished; or an
        error, after which nothing more comes of it. It is called in a thread of the engine's."""
        ...

    def add_session(self, session: SessionSpec, ended: Deliver) -> None:
        """The same of a session, whose only output is the last."""
        ...

    def run(self, requests: Sequence[RequestSpec | MarginsSpec | PoolingSpec]) -> Generator[Any, None, None]:
        """Add requests and yield their outputs as they come, until all are finished. Closing the generator ends those
        that are not."""
        ...

    def abort(self, request_ids: Iterable[str], owner: Deliver | None = None) -> None:
        """End requests that have not ended. With `owner`: only those that deliver to it, and not others with these ids.
        Does not wait for it; what is asked later comes after it."""
        ...

    def call(self, request_id: str, calls: Sequence[Any]) -> Future[list[Any]]:
        """See `Engine.call`."""
        ...

    def take_back(self, request_id: str, calls: Sequence[Any]) -> Future[None]:
        """See `Engine.take_back`."""
        ...

    def forget(self, request_id: str, call: Any) -> None:
        """Call it, and wait for nothing: what it is about is gone. Raises nothing."""
        ...

    def explain_cache(self, token_ids: Sequence[int], salt: str | None) -> Future[CacheExplanation]: ...

    def reset_prefix_cache(self) -> Future[int]: ...

    def cache_order(
        self, prefix: Sequence[int], parts: Sequence[Sequence[int]], salt: str | None
    ) -> Future[list[int]]: ...

    def close(self) -> None: ...


def run(
    client: EngineClient, requests: Sequence[RequestSpec | MarginsSpec | PoolingSpec]
) -> Generator[Any, None, None]:
    """`EngineClient.run`, by means of `add` and `abort`. Raises InvalidRequestError if a request is refused."""
    outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    deliver = outputs.put
    left = {request.request_id for request in requests}
    try:
        client.add(requests, deliver)
        while left:
            output = outputs.get()
            if isinstance(output, Exception):
                raise output
            if output.finished:
                left.discard(output.request_id)
            yield output
    finally:
        if left:
            client.abort(left, deliver)
