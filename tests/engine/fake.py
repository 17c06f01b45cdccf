"""An executor without a model that checks what a model could not: each KV slot read was written for that very token.

It keeps, for each slot, which tokens go up to the position that was stored there. A grant reads all positions up to its
end, as attention does; a wrong block, a missed copy on write or a lost copy shows as a slot that holds something else.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from octavo.core.outputs import OutputSoFar, RequestOutput
from octavo.core.params import SamplingParams
from octavo.core.plan import (
    DrawResult,
    Grant,
    GrantResult,
    RowResult,
    StepPlan,
    StepResult,
    TokenLogprob,
    TokenLogprobs,
    accepted_drafts,
)
from octavo.core.proposer import Proposer
from octavo.core.protocols import TextCodec
from octavo.core.request import RequestSpec
from octavo.core.want import Draw, Hidden, NextLogprobs, Sample, Score, TopK, Want
from octavo.engine import Engine, SchedulerConfig
from octavo.engine.scheduler import Scheduler
from octavo.kv_cache import KVCacheManager

VOCAB = 50


def next_token(token_ids: list[int], salt: object = 0) -> int:
    """What the fake model says after `token_ids`: a pure function of them."""
    digest = hashlib.blake2b(repr((token_ids, salt)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB


def logprob(seen: list[int], token_id: int) -> float:
    """Log-probability of a token after `seen`: also a pure function of them."""
    return -0.125 * next_token(seen, ("logprob", token_id))


def salt_of(draw: Draw, seen: list[int]) -> object:
    """What a draw depends on besides the tokens. Penalties look at what is output: that has to be told rightly."""
    counts = None if draw.history is None else draw.history.counts
    assert (counts is not None) == draw.params.has_penalties
    if counts is None:
        return draw.seed, draw.stream
    output = seen[draw.num_prompt_tokens :]
    assert dict(counts.output) == dict(Counter(output)), f"{counts.output} is counted, {output} was drawn"
    assert counts.prompt == frozenset(seen[: draw.num_prompt_tokens])
    return draw.seed, draw.stream, draw.num_prompt_tokens


class FakeTier:
    """Keeps blocks in memory. What is loaded comes after some ticks; some of it never comes, or is damaged."""

    def __init__(self, executor: FakeExecutor, ticks: Callable[[], int] = lambda: 0) -> None:
        self.blocks: dict[bytes, tuple[tuple[int, ...], bytes]] = {}
        self.loads = 0
        self.damaged: Callable[[], bool] = lambda: False
        self._executor = executor
        self._ticks = ticks
        self._coming: list[tuple[int, Future[bytes | None], bytes | None]] = []

    def save(self, key: bytes, token_ids: tuple[int, ...], block: int) -> None:
        self.blocks.setdefault(key, (token_ids, self._executor.read_block(block)))

    def has(self, key: bytes) -> bool:
        return key in self.blocks

    def load(
        self, key: bytes, token_ids: tuple[int, ...], compute_seconds: float | None
    ) -> Future[bytes | None] | None:
        if key not in self.blocks:
            return None
        kept, kv = self.blocks[key]
        assert kept == token_ids, "two prefixes have one name"
        future: Future[bytes | None] = Future()
        self.loads += 1
        if self.damaged():
            del self.blocks[key]
        self._coming.append((self._ticks(), future, kv if key in self.blocks else None))
        self.tick(0)
        return future

    def tick(self, by: int = 1) -> None:
        coming, self._coming = self._coming, []
        for left, future, kv in coming:
            if left <= by:
                future.set_result(kv)
            else:
                self._coming.append((left - by, future, kv))

    def keep(self, blocks: Sequence[tuple[bytes, tuple[int, ...], int]]) -> None:
        for block in blocks:
            self.save(*block)

    def clear(self) -> None:
        self.blocks.clear()

    def close(self) -> None: ...


@dataclass
class FakeExecutor:
    block_size: int
    sequences: Callable[[], dict[int, list[int]]] = dict  # the engine's: tokens by sequence id
    fail: Callable[[Grant], bool] = lambda grant: False
    fail_copies: bool = False
    fail_loads: bool = False
    plans: list[StepPlan] = field(default_factory=list)
    computed: int = 0  # tokens
    copied: int = 0  # blocks
    loaded: int = 0  # blocks
    closed: bool = False

    def __post_init__(self) -> None:
        self._slots: dict[tuple[int, int], int] = {}  # (block, offset) -> number of the tokens up to this position
        self._numbers: dict[tuple[int, int], int] = {}  # (number of what stands before, token) -> number

    def execute(self, plan: StepPlan) -> FakeExecutor:
        self._plan = plan
        return self

    def result(self) -> StepResult:
        plan = self._plan
        self.plans.append(plan)
        self._known = self.sequences()
        if plan.copies and self.fail_copies:
            raise RuntimeError("copying failed")
        for source, target in plan.copies:
            self.copied += 1
            for offset in range(self.block_size):
                self._slots.pop((target, offset), None)
                if (source, offset) in self._slots:
                    self._slots[target, offset] = self._slots[source, offset]
        if plan.loads and self.fail_loads:
            raise RuntimeError("loading failed")
        for block, kv, _ in plan.loads:
            self.loaded += 1
            for offset, held in enumerate(ast.literal_eval(kv.decode())):
                self._slots[block, offset] = held
        if any(self.fail(grant) for grant in plan.grants):
            raise RuntimeError("a row failed")
        for grant in plan.grants:
            self.computed += grant.num_tokens
            numbers = self._prefixes(self.seen(grant))
            for place in range(grant.start, grant.stop):
                is_node = grant.draft_parents and place >= grant.first_draft
                number = self._prefixes(self._above(grant, place)[1])[-1] if is_node else numbers[place]
                self._slots[self._slot(grant, place)] = number
        results = tuple(self._answer(grant) for grant in plan.grants)
        for grant, result in zip(plan.grants, results, strict=True):
            if grant.draft_parents:
                for depth, number in enumerate(accepted_drafts(grant, result.rows)):
                    source = self._slot(grant, grant.first_draft + number)
                    self._slots[self._slot(grant, grant.first_draft + depth)] = self._slots[source]
        return StepResult(results)

    def read_block(self, block: int) -> bytes:
        return repr([self._slots[block, offset] for offset in range(self.block_size)]).encode()

    def _slot(self, grant: Grant, position: int) -> tuple[int, int]:
        return grant.block_table[position // self.block_size], position % self.block_size

    def seen(self, grant: Grant) -> list[int]:
        """The tokens up to the end of a grant: those of its sequence, and the drafts behind them."""
        token_ids = self._known[grant.sequence_id][: grant.stop - grant.num_drafts] + list(grant.drafts)
        assert tuple(token_ids[grant.start :]) == grant.token_ids and len(token_ids) == grant.stop
        return token_ids

    def _above(self, grant: Grant, place: int) -> tuple[list[int], list[int]]:
        """What the row of a node of a draft tree sees: places of slots, and the tokens in them."""
        numbers = [place - grant.first_draft]
        while (parent := grant.draft_parents[numbers[0]]) >= 0:
            numbers.insert(0, parent)
        places = [*range(grant.first_draft), *(grant.first_draft + number for number in numbers)]
        known = self._known[grant.sequence_id][: grant.first_draft]
        return places, known + [grant.drafts[number] for number in numbers]

    def _prefixes(self, token_ids: list[int]) -> list[int]:
        """A number for the tokens up to each position: equal where these are, and only there."""
        number, numbers = 0, []
        for token_id in token_ids:
            number = self._numbers.setdefault((number, token_id), len(self._numbers) + 1)
            numbers.append(number)
        return numbers

    def _tokens(self, number: int | None) -> list[int]:
        """What has this number."""
        known = {number: pair for pair, number in self._numbers.items()}
        token_ids: list[int] = []
        while number:
            number, token_id = known[number]
            token_ids.append(token_id)
        return token_ids[::-1]

    def _answer(self, grant: Grant) -> GrantResult:
        token_ids = self.seen(grant)
        last = grant.first_draft if grant.draft_parents else grant.stop
        self._check(grant, list(range(last)), token_ids[:last])
        rows = []
        for start, stop, want in grant.wants:
            assert grant.start <= start < stop <= grant.stop
            for place in range(start, stop):
                if place < last:
                    rows.append(self.row(place, want, token_ids[: place + 1], place - start))
                    continue
                places, tokens = self._above(grant, place)
                self._check(grant, places, tokens)
                rows.append(self.row(len(tokens) - 1, want, tokens, place - start))
        return GrantResult(tuple(rows))

    def _check(self, grant: Grant, places: list[int], token_ids: list[int]) -> None:
        """What is read was computed for these very tokens."""
        for place, expected in zip(places, self._prefixes(token_ids), strict=True):
            held = self._slots.get(self._slot(grant, place))
            assert held == expected, (
                f"sequence {grant.sequence_id} reads what was computed after {self._tokens(held)} "
                f"at {place}, not what belongs to {token_ids}"
            )

    def row(self, position: int, want: Want, seen: list[int], index: int) -> RowResult:
        """What the row that follows these tokens says, of a want's row number `index`."""
        match want:
            case Sample(draws):
                return RowResult(
                    position, draws=tuple(DrawResult(next_token(seen, salt_of(draw, seen))) for draw in draws)
                )
            case TopK(k, _):
                return RowResult(
                    position, candidates=tuple((next_token(seen, rank), -float(rank)) for rank in range(k))
                )
            case Score(sets):
                return RowResult(
                    position, scores=tuple(max(logprob(seen, token_id) for token_id in one) for one in sets)
                )
            case Hidden(layers):
                return RowResult(position, hidden=tuple(layers))
            case NextLogprobs(token_ids):
                token_id = token_ids[index]
                return RowResult(position, logprobs=TokenLogprobs(TokenLogprob(token_id, logprob(seen, token_id), 1)))
        raise AssertionError(want)

    def close(self) -> None:
        self.closed = True


class Harness:
    """An engine over the fake executor, its pool checked after every step."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        caching: bool = True,
        ticks: Callable[[], int] | None = None,
        proposer: Proposer | None = None,
        codec: TextCodec | None = None,
        **config: object,
    ) -> None:
        """`ticks`: there is a tier, and its blocks come after so many steps."""
        defaults: dict[str, object] = {"max_num_seqs": 8, "max_num_batched_tokens": 32}
        self.executor = FakeExecutor(block_size, lambda: {one.id: one.token_ids for one in self.sequences()})
        self.now = 0.0
        self.tier = None if ticks is None else FakeTier(self.executor, ticks)
        self.kv = KVCacheManager(num_blocks, block_size, caching=caching, clock=lambda: self.now, tier=self.tier)
        self.engine = Engine(
            SchedulerConfig(**(defaults | config)), self.kv, self.executor, lambda: self.now, codec, proposer
        )  # type: ignore[arg-type]
        self.engine.scheduler.schedule = self._scheduled  # type: ignore[method-assign]
        self.outputs: dict[str, RequestOutput] = {}  # all of each request so far
        self._so_far: defaultdict[str, OutputSoFar] = defaultdict(OutputSoFar)

    def _scheduled(self) -> StepPlan:
        """Only requests that run are granted anything: none that gave way while the step was made."""
        plan = Scheduler.schedule(self.engine.scheduler)
        running = {entry.coordinator.request_id for entry in self.engine.scheduler._running}
        assert {grant.request_id for grant in plan.grants} <= running
        return plan

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int = 8,
        priority: int = 0,
        salt: str | None = None,
        **params: object,
    ) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
        request = RequestSpec(
            request_id,
            tuple(prompt),
            sampling,
            seed=sampling.seed or 0,
            max_tokens=max_tokens,
            priority=priority,
            cache_salt=salt,
            arrival_time=self.now,
        )
        self.engine.add_request(request)

    def sequences(self) -> list:
        return [sequence for c in self.engine.scheduler.coordinators() for sequence in c.sequences]

    def check(self) -> None:
        self.kv.check([sequence.block_table for sequence in self.sequences()])

    def step(self) -> list[RequestOutput]:
        if self.tier is not None:
            self.tier.tick()
        outputs = self.engine.step()
        self.now += 1.0
        self.check()
        self.take(outputs)
        return outputs

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.outputs[output.request_id] = self._so_far[output.request_id].merge(output)

    def run(self, most: int = 10_000) -> dict[str, RequestOutput]:
        for _ in range(most):
            if not self.engine.has_unfinished_requests:
                assert self.kv.num_available == self.kv.num_blocks
                return self.outputs
            self.step()
        raise AssertionError(f"not finished after {most} steps")

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        return self.outputs[request_id].outputs[index].token_ids


def expected(prompt: list[int], count: int, index: int = 0, seed: int = 0) -> list[int]:
    """What the fake model answers to a prompt, whatever the scheduler does."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(token_ids, (seed, (index,))))
    return token_ids[len(prompt) :]
