"""Sessions for asyncio: see `octavo.session`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from octavo.coordinators.session import BranchState, SessionCoordinator
from octavo.core.errors import EngineClosedError
from octavo.core.outputs import CompletionOutput, SelectResult
from octavo.core.params import SamplingParams
from octavo.core.values import exact_bool
from octavo.frontend import Frontend, Prompt
from octavo.session import BaseBranch, Call, Door, Link, Verb, sampling

Answer = TypeVar("Answer")


class AsyncBranch(BaseBranch):
    """`octavo.session.Branch`, awaitable. Branches that are awaited together run in one batch; what is appended is
    computed at once, while the caller does other things. Cancelling a task leaves its branch as it was before.
    """

    def __init__(self, link: Link, state: BranchState) -> None:
        super().__init__(link, state)
        self._leaving = False  # whether a caller who was cancelled still holds the branch

    async def extend(self, prompt: Prompt) -> None:
        async with self._turn() as calls:
            await self._do(await asyncio.to_thread(self._extending, prompt), calls)

    async def generate(self, sampling_params: SamplingParams | None = None, **fields: Any) -> CompletionOutput:
        params = sampling(sampling_params, fields)
        async with self._turn() as calls:
            verb = await asyncio.to_thread(self._generating, params)
            output = await asyncio.wrap_future(await self._do(verb, calls))
            return self._link.frontend.name_completion(output)

    async def select(self, choices: Sequence[Prompt], *, by: str = "mean", extend: bool = False) -> SelectResult:
        extend = exact_bool("extend", extend)
        async with self._turn() as calls:
            verb, result = await asyncio.to_thread(self._selecting, choices, by)
            selected = result(await asyncio.wrap_future(await self._do(verb, calls)))
            if extend:
                await self._do(self._appending(selected.best), calls)
            return selected

    async def fork(self, n: int = 1) -> list[AsyncBranch]:
        async with self._turn() as calls:
            return [AsyncBranch(self._link, state) for state in await self._do(self._forking(n), calls)]

    async def truncate(self, num_tokens: int) -> None:
        async with self._turn() as calls:
            await self._do(self._truncating(num_tokens), calls)

    async def drop(self) -> None:
        await self._do(self._dropping, [])

    async def _do(self, verb: Verb[Answer], calls: list[Call[Any]]) -> Answer:
        call = self._call(verb)
        calls.append(call)
        return await asyncio.wrap_future(self._link.door.ask(self._link.coordinator, call))

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[list[Call[Any]]]:
        """The branch to itself, for the calls that are put into the list. A caller that goes away meanwhile takes them
        back and waits until that is done, and so does whoever comes next."""
        if self._undoing is not None:
            await asyncio.shield(asyncio.wait([asyncio.wrap_future(self._undoing)]))
        while self._leaving:
            await asyncio.sleep(0.001)
        with self._alone():
            calls: list[Call[Any]] = []
            try:
                yield calls
            except asyncio.CancelledError:
                if not calls:
                    raise
                self._leaving = True
                try:
                    with suppress(EngineClosedError):
                        await asyncio.shield(asyncio.wrap_future(self._taking_back(calls)))
                finally:
                    self._leaving = False
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
