"""Sessions for asyncio: see `octavo.session`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from octavo.core.errors import EngineClosedError
from octavo.core.outputs import CompletionOutput, SelectResult
from octavo.core.params import SamplingParams
from octavo.core.session_calls import ROOT, Call, Drop, Extend, Verb
from octavo.core.values import exact_bool
from octavo.frontend import Prompt
from octavo.session import BaseBranch, SessionClient, sampling


class AsyncBranch(BaseBranch):
    """`octavo.session.Branch`, awaitable. Branches that are awaited together run in one batch; what is appended is
    computed at once, while the caller does other things. Cancelling a task leaves its branch as it was before.
    """

    def __init__(self, client: SessionClient, branch: int = ROOT, token_ids: Sequence[int] = ()) -> None:
        super().__init__(client, branch, token_ids)
        self._leaving = False  # whether a caller who was cancelled still holds the branch

    async def extend(self, prompt: Prompt) -> None:
        async with self._turn() as calls:
            verb = await asyncio.to_thread(self._extending, prompt)
            await self._do(verb, calls)
            self._extended(verb.token_ids)

    async def generate(self, sampling_params: SamplingParams | None = None, **fields: Any) -> CompletionOutput:
        params = sampling(sampling_params, fields)
        async with self._turn() as calls:
            verb = await asyncio.to_thread(self._generating, params)
            generated = await asyncio.wrap_future(await self._do(verb, calls))
            self._extended(generated.token_ids)
            return self._client.frontend.name_completion(generated.output)

    async def select(self, choices: Sequence[Prompt], *, by: str = "mean", extend: bool = False) -> SelectResult:
        extend = exact_bool("extend", extend)
        async with self._turn() as calls:
            verb, result = await asyncio.to_thread(self._selecting, choices, by)
            selected = result(await asyncio.wrap_future(await self._do(verb, calls)))
            if extend:
                token_ids = selected.best.token_ids
                await self._do(Extend(tuple(token_ids)), calls)
                self._extended(token_ids)
            return selected

    async def fork(self, n: int = 1) -> list[AsyncBranch]:
        async with self._turn() as calls:
            branches = await self._do(self._forking(n), calls)
            return [AsyncBranch(self._client, branch, self._token_ids) for branch in branches]

    async def truncate(self, num_tokens: int) -> None:
        async with self._turn() as calls:
            verb = self._truncating(num_tokens)
            await self._do(verb, calls)
            self._truncated(verb.num_tokens)

    async def drop(self) -> None:
        await asyncio.wrap_future(self._client.ask([self._client.call(self._branch, Drop())]))

    async def _do(self, verb: Verb, calls: list[Call]) -> Any:
        return self._answer(await asyncio.wrap_future(self._client.ask([self._call(verb, calls)])))

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[list[Call]]:
        """The branch to itself, for the calls that are put into the list. A caller that goes away meanwhile takes them
        back and waits until that is done, and so does whoever comes next."""
        if self._undoing is not None:
            await asyncio.shield(asyncio.wait([asyncio.wrap_future(self._undoing)]))
        while self._leaving:
            await asyncio.sleep(0.001)
        with self._alone() as calls:
            try:
                yield calls
            except asyncio.CancelledError:
                if not calls:
                    raise
                self._leaving = True
                try:
                    with suppress(EngineClosedError):
                        self._undoing = self._client.take_back(calls)
                        await asyncio.shield(asyncio.wrap_future(self._undoing))
                finally:
                    self._leaving = False
                raise


class AsyncSession(AsyncBranch):
    """Made by `AsyncLLM.session`. See `octavo.session.Session`."""

    async def close(self) -> None:
        self._client.close()

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
