"""Sessions for asyncio: see `octavo.session`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from octavo.coordinators.session import SessionCoordinator
from octavo.core.outputs import CompletionOutput, SelectResult
from octavo.core.params import SamplingParams
from octavo.frontend import Frontend, Prompt
from octavo.session import BaseBranch, Door, Link, Verb, sampling

Answer = TypeVar("Answer")


class AsyncBranch(BaseBranch):
    """`octavo.session.Branch`, awaitable. Branches that are awaited together run in one batch; what is appended is
    computed at once, while the caller does other things. Cancelling a task leaves its branch as it was before.
    """

    async def extend(self, prompt: Prompt) -> None:
        with self._alone():
            await self._do(await asyncio.to_thread(self._extending, prompt))

    async def generate(self, sampling_params: SamplingParams | None = None, **fields: Any) -> CompletionOutput:
        params = sampling(sampling_params, fields)
        with self._alone():
            output = await self._answer(await asyncio.to_thread(self._generating, params))
            return self._link.frontend.name_completion(output)

    async def select(self, choices: Sequence[Prompt], *, by: str = "mean", extend: bool = False) -> SelectResult:
        with self._alone():
            verb, result = await asyncio.to_thread(self._selecting, choices, by)
            selected = result(await self._answer(verb))
            if extend:
                await self._do(self._appending(selected.best))
            return selected

    async def fork(self, n: int = 1) -> list[AsyncBranch]:
        with self._alone():
            return [AsyncBranch(self._link, state) for state in await self._do(self._forking(n))]

    async def truncate(self, num_tokens: int) -> None:
        with self._alone():
            await self._do(self._truncating(num_tokens))

    async def drop(self) -> None:
        await self._do(self._dropping)

    async def _do(self, verb: Verb[Answer]) -> Answer:
        return await asyncio.wrap_future(self._link.door.ask(self._link.coordinator, verb))

    async def _answer(self, verb: Callable[[], Future[Answer]]) -> Answer:
        """Begin a task and wait for it; a caller that goes away ends it."""
        begun: list[Future[Answer]] = []

        def begin() -> Future[Answer]:
            begun.append(verb())
            return begun[0]

        def cancel() -> None:  # after `begin`: the engine's thread takes its commands in order
            for future in begun:
                self._cancelling(future)()

        try:
            return await asyncio.wrap_future(await self._do(begin))
        except asyncio.CancelledError:
            self._link.door.post(self._link.coordinator, cancel)
            raise


class AsyncSession(AsyncBranch):
    """Made by `AsyncLLM.session`. See `octavo.session.Session`."""

    def __init__(self, door: Door, frontend: Frontend, coordinator: SessionCoordinator) -> None:
        super().__init__(Link(door, frontend, coordinator), coordinator.root)

    async def close(self) -> None:
        self._link.door.end_session(self._link.coordinator)

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
