"""An engine that waits for a test, so that no result hangs on which thread is faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from octavo.core.outputs import RequestOutput
from octavo.engine import Engine


@contextmanager
def held(engine: Engine, until: Callable[[], bool], *, after: int = 0) -> Iterator[None]:
    """The engine takes `after` steps, and then commands only, until `until()` holds; from then on it goes on."""
    step, left, is_free = engine.step, after, False

    def waiting() -> list[RequestOutput]:
        nonlocal left, is_free
        is_free = is_free or until()
        if is_free or left > 0:
            left -= 1
            return step()
        time.sleep(0.001)
        return []

    engine.step = waiting  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.step = step  # type: ignore[method-assign]
