"""What can be asked of a session: messages from whoever holds its branches to the engine's side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from octavo.core.outputs import CompletionOutput
    from octavo.core.request import RequestSpec

ROOT = 0  # the branch that a session begins with


@dataclass(frozen=True, slots=True)
class Extend:
    """Append tokens. They are computed from the next step on, whether or not something is asked of them."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Truncate:
    """Keep the first tokens."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class Fork:
    """New branches that begin as this one. The answer is their ids."""

    count: int


@dataclass(frozen=True, slots=True)
class Generate:
    """Continue the branch, whose tokens are the prompt of `request`: they are left out there. The answer is
    Generated."""

    request: RequestSpec


@dataclass(frozen=True, slots=True)
class Select:
    """Log-probability of each token of each choice, as continuations. The answer is a row for each."""

    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """End the branch, and what it is at work on. Idempotent."""


Verb = Extend | Truncate | Fork | Generate | Select | Drop


class Call(NamedTuple):
    """A verb, asked of a branch by its id. `number` names the call, so that it can be taken back."""

    number: int
    branch: int
    verb: Verb


class Generated(NamedTuple):
    output: CompletionOutput
    token_ids: list[int]  # by which the branch has grown
