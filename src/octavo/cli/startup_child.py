"""One start of `octavo run` with its phases timed: ``python -m octavo.cli.startup_child FD run …``.

Writes one JSON object to the file descriptor FD: moments in seconds of the system's monotonic clock, which the parent
reads too, so that the time before this line counts as well.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()

import functools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.core.plan import StepPlan, StepResult
    from octavo.loading.loaded_model import LoadedModel

SPANS: dict[str, tuple[float, float]] = {}  # name -> (beginning of the first call, end of the last)


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its time added to the span `name`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            SPANS[name] = (SPANS.get(name, (began, 0.0))[0], time.monotonic())

    return wrapper


def main(file_descriptor: int, arguments: list[str]) -> int:
    from octavo import build
    from octavo.cli.main import main as command_line
    from octavo.loading.weights import FileWeights

    imported = time.monotonic()
    prompt_tokens = 0
    build.open_weights = timed("index", build.open_weights)
    # From the loader being made until everything is packed, beside what `second_half` times.
    FileWeights.__init__ = timed("weights", FileWeights.__init__)  # type: ignore[method-assign]
    FileWeights.finish = timed("weights", FileWeights.finish)  # type: ignore[method-assign]

    def second_half() -> None:
        """Imports what `build_engine` imports while weights are packed, and times what it then does."""
        from octavo import wiring

        wiring.make_tokenizer = timed("tokenizer", wiring.make_tokenizer)
        wire = wiring.wire

        def wire_and_listen(*args: Any) -> Any:
            built = wire(*args)
            built.engine.step_listeners.append(first_step)
            return built

        wiring.wire = wire_and_listen  # type: ignore[assignment]

    def first_step(plan: StepPlan, result: StepResult) -> None:
        nonlocal prompt_tokens
        if not prompt_tokens:
            prompt_tokens, now = plan.num_tokens, time.monotonic()
            SPANS["first_step"] = (now - sum(result.timings.values()), now)

    loading = build.loading

    @contextmanager
    def loading_and_timing(config: EngineConfig) -> Iterator[LoadedModel]:
        with loading(config) as loaded:
            timed("later_imports", second_half)()
            yield loaded

    build.loading = loading_and_timing
    code = command_line(arguments)
    report = {"started": STARTED, "imported": imported, "spans": SPANS, "prompt_tokens": prompt_tokens}
    with os.fdopen(file_descriptor, "w") as out:
        json.dump(report, out)
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
