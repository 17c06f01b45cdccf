"""Sessions for asyncio: see `octavo.session`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from octavo.coordinators.session import SessionCoordinator
from octavo.core.errors import EngineClosedError
from octavo.core.outputs import CompletionOutput, SelectResult
from octavo.core.params import SamplingParams
from octavo.frontend import Frontend, Prompt
from octavo.session import BaseBranch, Call, Door, Link, Verb, sampling

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
        call = self._call(verb)
        async with self._undone(call):
            return await asyncio.wrap_future(self._link.door.ask(self._link.coordinator, call))

    async def _answer(self, verb: Verb[Future[Answer]]) -> Answer:
        """Begin a task and wait for it."""
        call = self._call(verb)
        async with self._undone(call):
            begun = await asyncio.wrap_future(self._link.door.ask(self._link.coordinator, call))
            return await asyncio.wrap_future(begun)

    @asynccontextmanager
    async def _undone(self, call: Call[Any]) -> AsyncIterator[None]:
        """A caller that goes away meanwhile takes back what it asked for, and waits until that is done."""
        try:
            yield
        except asyncio.CancelledError:
            with suppress(EngineClosedError):
                await asyncio.shield(asyncio.wrap_future(self._taking_back([call])))
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
