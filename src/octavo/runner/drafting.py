"""What guesses on behalf of a model runner, at the end of a step, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from octavo.core.plan import BlockCopy, BlockLoad, Grant, GrantResult, StepPlan, accepted_drafts
from octavo.core.want import Counts, Draw, History, Sample
from octavo.ops.protocol import Array, KVLayer

ROUND = "draft_round"  # seconds that a token more of each sequence took
READ = "draft_read"  # seconds a token that was read before the first guess


class Drafter(Protocol):
    """Guesses what follows the tokens of a step; see `draft_model` and `draft_head`."""

    timings: dict[str, float]  # of the last step: ROUND and READ, where there was any

    @property
    def layers(self) -> list[KVLayer]:
        """What it keeps in blocks, beside the model."""
        ...

    def prepare(self, copies: Sequence[BlockCopy], loads: Sequence[BlockLoad]) -> None:
        """A step begins with these; what it keeps was copied and loaded with the model's."""
        ...

    def guess(self, plan: StepPlan, results: tuple[GrantResult, ...], x: Array) -> tuple[GrantResult, ...]:
        """The results, with guesses for the grants that want some. `x`: the states of all rows after the last layer,
        [T, hidden]."""
        ...


class Asked(NamedTuple):
    """A sequence to be guessed for."""

    number: int  # of its grant
    grant: Grant
    row: int  # of the batch, that drew its last token
    position: int  # of that token, which the model has not read yet
    token_id: int
    draw: Draw  # of the token after that
    most: int  # tokens to guess


def asked_of(plan: StepPlan, results: Sequence[GrantResult]) -> list[Asked]:
    """All for which guesses are wanted."""
    found, first = [], 0
    for number, (grant, result) in enumerate(zip(plan.grants, results, strict=True)):
        if grant.num_lookahead and (one := _asked(number, first, grant, result)) is not None:
            found.append(one)
        first += grant.num_tokens
    return found


def _asked(number: int, first_row: int, grant: Grant, result: GrantResult) -> Asked | None:
    drawn = [row for row in result.rows if row.draws]
    wants = [wanted.want for wanted in grant.wants if isinstance(wanted.want, Sample)]
    if result.error is not None or not drawn or len(wants) != len(drawn):
        return None
    accepted = accepted_drafts(grant, result.rows)
    behind = accepted[-1] + 1 if accepted else 0  # rows behind that of the last token before the drafts
    last = len(drawn) - 1 - grant.num_drafts + behind
    token_id = drawn[last].draws[0].token_id
    row = first_row + grant.num_tokens - 1 - grant.num_drafts + behind
    draw = after(wants[last].draws[0], token_id)
    return Asked(number, grant, row, grant.first_draft + len(accepted), token_id, draw, grant.num_lookahead)


def after(draw: Draw, token_id: int) -> Draw:
    """The draw of the next row, when this one gave a token. What takes all tokens before it to tell, words that may not
    be completed and the mask of a grammar, is left out: a guess may be wrong."""
    history = draw.history
    if history is None or (history.counts is None and not history.token_ids):
        return draw if history is None else draw._replace(history=None)
    counts = history.counts
    if counts is not None:
        output = dict(counts.output)
        output[token_id] = output.get(token_id, 0) + 1
        counts = Counts(counts.prompt, tuple(output.items()))
    token_ids = (*history.token_ids, token_id) if history.token_ids else ()
    return draw._replace(history=History((), token_ids, counts, None))
