"""Guesses from texts: what a sequence holds already, and what earlier requests got.

Both kinds look for the end of the text where it stood before, and guess that it goes on as it did there. `NGram` is
prompt lookup (Saxena, 2023; vLLM's ``ngram``): a suffix of a few tokens, the earliest place. `Suffix` is suffix
decoding (Oliaro et al., 2024) over suffix automata instead of trees: the longest suffix there is, the likeliest
continuation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf

from octavo._C import SuffixAutomaton
from octavo.core.namespace import Namespace
from octavo.core.proposer import Asked
from octavo.core.sequence import Sequence
from octavo.core.speculation import SpeculativeConfig
from octavo.speculation.drafter import NO_GUESS, Guess

_MAX_NAMESPACES = 64  # whose past outputs are kept; the one used longest ago goes first
_LEAST_CHANCE = 0.02  # guesses less likely than this are not made
# By kind (`SuffixAutomaton.kind_of`): longer suffixes and continuations without an alternative are likelier.
_FIRST_RATES = [length * share for length in (0.1, 0.15, 0.35, 0.6, 0.8, 0.9) for share in (0.4, 0.7, 1.0)]
_NUM_KINDS = len(_FIRST_RATES)


class OwnText:
    """A sequence's tokens in an automaton, which follows them when somebody looks. Attached to the sequence."""

    __slots__ = ("_automaton", "_num_indexed", "_num_tokens", "_shared")

    def __init__(self, num_tokens: int) -> None:
        self._automaton = SuffixAutomaton()
        self._num_indexed = 0
        self._num_tokens = num_tokens  # that the sequence has
        self._shared = False  # whether a fork may have the same automaton

    def fork(self) -> OwnText:
        copy = OwnText(self._num_tokens)
        copy._automaton, copy._num_indexed = self._automaton, self._num_indexed
        copy._shared = self._shared = True
        return copy

    def advance(self, token_ids: SequenceOf[int]) -> None:
        self._num_tokens += len(token_ids)

    def rollback(self, num_tokens: int) -> None:
        self._num_tokens -= num_tokens
        if self._num_indexed > self._num_tokens:  # an automaton forgets nothing: it is made anew
            self._automaton, self._num_indexed, self._shared = SuffixAutomaton(), 0, False

    def index(self, token_ids: list[int]) -> SuffixAutomaton:
        """With all tokens of the sequence, which are these."""
        if self._num_indexed < len(token_ids):
            if self._shared:
                self._automaton, self._shared = self._automaton.copy(), False
            self._automaton.extend(token_ids[self._num_indexed :])
            self._num_indexed = len(token_ids)
        return self._automaton


def text_of(sequence: Sequence) -> SuffixAutomaton:
    """A sequence's text, indexed from now on."""
    own = sequence.attached(OwnText)
    if own is None:
        own = OwnText(sequence.num_tokens)
        sequence.attach(own)
    return own.index(sequence.token_ids)


class NGram:
    """The Drafter of prompt lookup."""

    first_rates: SequenceOf[float] = _FIRST_RATES

    def __init__(self, config: SpeculativeConfig) -> None:
        self._least, self._most = config.lookup

    def guess(self, asked: Asked, max_tokens: int, rates: list[float]) -> Guess:
        length, token_ids = text_of(asked.sequence).earliest(self._most, max_tokens)
        if length < self._least:
            return NO_GUESS
        kinds: list[int] = []
        chances: list[float] = []
        chance = 1.0
        for number in range(len(token_ids)):
            kind = SuffixAutomaton.kind_of(length + number, 1, 1)
            chance *= rates[kind]
            kinds.append(kind)
            chances.append(chance)
        return Guess(token_ids, list(range(-1, len(token_ids) - 1)), kinds, chances)

    def sweep(self) -> None: ...


class _Past:
    """Outputs of one namespace, in two generations: when the newer one is full, the older one goes."""

    def __init__(self) -> None:
        self.generations: tuple[SuffixAutomaton, ...] = (SuffixAutomaton(),)
        self.num_outputs = 0  # of the newest
        self.number = 0  # of generations that there were

    def add(self, token_ids: SequenceOf[int], max_tokens: int, max_outputs: int) -> None:
        newest = self.generations[0]
        is_full = newest.num_tokens + len(token_ids) > max_tokens or self.num_outputs >= max_outputs
        if is_full and newest.num_tokens:
            self.generations = (SuffixAutomaton(), newest)
            self.num_outputs = 0
            self.number += 1
        self.generations[0].extend([*token_ids[-max_tokens:], -1])
        self.num_outputs += 1

    @property
    def num_tokens(self) -> int:
        return sum(one.num_tokens for one in self.generations)


class _Following:
    """Where a sequence's end stands in the past outputs of its namespace."""

    __slots__ = ("matches", "namespace", "num_followed", "num_prompt_tokens", "number", "sequence")

    def __init__(self, asked: Asked) -> None:
        self.sequence = asked.sequence
        self.namespace = asked.namespace
        self.num_prompt_tokens = asked.sequence.num_tokens  # and what was drawn before it was followed
        self.number = -1
        self.matches: list[tuple[int, int]] = []
        self.num_followed = 0


class Suffix:
    """The Drafter of suffix decoding."""

    first_rates: SequenceOf[float] = (*_FIRST_RATES, *_FIRST_RATES)  # in its own text, and in the past

    def __init__(self, config: SpeculativeConfig) -> None:
        self._min_share = config.suffix_decoding_min_token_prob
        self._branches = config.max_branches
        self._max_outputs = config.suffix_decoding_max_cached_requests
        self._max_tokens = config.max_cached_tokens
        self._past: OrderedDict[Namespace, _Past] = OrderedDict()
        self._following: dict[int, _Following] = {}  # by sequence id

    def guess(self, asked: Asked, max_tokens: int, rates: list[float]) -> Guess:
        own = text_of(asked.sequence)
        found, match, first_kind = own, own.own(), 0
        if self._max_outputs:
            for past, at in self._past_matches(asked):
                if at[1] > match[1]:
                    found, match, first_kind = past, at, _NUM_KINDS
        if not match[1]:
            return NO_GUESS
        of_kinds = rates[first_kind : first_kind + _NUM_KINDS]
        token_ids, parents, kinds, chances = found.guess(
            match, max_tokens, of_kinds, _LEAST_CHANCE, self._min_share, self._branches
        )
        if first_kind:
            kinds = [first_kind + kind for kind in kinds]
        return Guess(token_ids, parents, kinds, chances)

    def _past_matches(self, asked: Asked) -> list[tuple[SuffixAutomaton, tuple[int, int]]]:
        """In each generation of its namespace's past."""
        sequence = asked.sequence
        following = self._following.get(sequence.id)
        if following is None:
            following = self._following[sequence.id] = _Following(asked)
        past = self._past.get(asked.namespace)
        if past is None:
            return []
        self._past.move_to_end(asked.namespace)
        # A state stays what it is while its automaton grows, but for suffixes that a newer one took over: the match
        # is then shorter than it might be, until it is lost and found anew.
        token_ids = sequence.token_ids
        if following.number != past.number or following.num_followed > len(token_ids):
            following.number = past.number
            following.matches = [(0, 0)] * len(past.generations)
            following.num_followed = max(len(token_ids) - 64, 0)
        new = token_ids[following.num_followed :]
        pairs = zip(past.generations, following.matches, strict=True)
        following.matches = [automaton.follow(match, new) for automaton, match in pairs]
        following.num_followed = len(token_ids)
        return list(zip(past.generations, following.matches, strict=True))

    def sweep(self) -> None:
        ended = [n for n, following in self._following.items() if following.sequence.dropped]
        for sequence_id in ended:
            following = self._following.pop(sequence_id)
            output = following.sequence.token_ids[following.num_prompt_tokens :]
            if output and not following.namespace.is_private:
                self._remember(following.namespace, output)

    def _remember(self, namespace: Namespace, output: list[int]) -> None:
        past = self._past.setdefault(namespace, _Past())
        self._past.move_to_end(namespace)
        # Two generations together stay within the bounds, or nearly so: a generation holds one output at least.
        past.add(output, max(self._max_tokens // 2, 1), max(self._max_outputs // 2, 1))
        while len(self._past) > 1 and (
            len(self._past) > _MAX_NAMESPACES or sum(p.num_tokens for p in self._past.values()) > self._max_tokens
        ):
            self._past.popitem(last=False)
