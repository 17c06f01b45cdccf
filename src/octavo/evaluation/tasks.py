"""Synthetic tasks with long documents: what RULER (Hsieh et al., 2024), Lost in the Middle (Liu et al., 2023) and bAbI
(Weston et al., 2015) ask, in words of our own.

An example is a pure function of (task, seed, sample, length, depth) and of how the model tokenises. A sample asks the
same at every length and depth: only what stands around it grows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from string import ascii_uppercase
from typing import NamedTuple
from uuid import UUID

from octavo.core.errors import InvalidRequestError
from octavo.evaluation.words import NOUNS, PEOPLE, PLACES, distinct_words, noise, prose

NUM_KEYS = 4  # of niah_multikey, the asked one among them
NUM_CHAINS, NUM_HOPS = 2, 4  # of vt: chains of variables, and how often the value is passed on in each
NUM_COMMON = 10  # of cwe
NUM_PEOPLE, NUM_MOVES = 4, 3  # of babi: each person goes somewhere so many times

# How often the common and the other words of cwe stand there, for short and for long documents, as in RULER.
_LONG = 4096
_SHORT_COUNTS, _LONG_COUNTS = (6, 1), (30, 3)

CountTokens = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Example:
    """A document, a question about it, and what a right answer holds."""

    task: str
    sample: int
    length: int  # tokens asked for
    num_tokens: int  # of the document: as many as whole sentences, pairs or words allow, never more than `length`
    depth: float | None  # where what is asked for stands: 0 is the beginning, 1 the end; None: in several places
    document: str
    question: str
    answers: tuple[str, ...]  # strings that are expected in the answer
    choices: tuple[str, ...]  # all that could be meant, of metrics that ask for it
    metric: str  # of scores.METRICS
    max_tokens: int  # that an answer takes at most


class Draft(NamedTuple):
    """An example with so much filler, whatever its length."""

    document: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


class ExampleKey(NamedTuple):
    """Which example it is."""

    task: str  # of TASKS
    seed: int
    sample: int  # counts from 0
    length: int  # tokens of the document, at most
    depth: float  # from 0 to 1; without effect on tasks that ask for what stands in several places


class Shape(NamedTuple):
    """What a draft depends on."""

    key: ExampleKey
    filler: int  # sentences, pairs or words besides those that the task needs

    def random(self, what: str = "") -> Random:
        """Draws of their own for each `what`, which length and depth do not change."""
        return Random(f"{self.key.task}/{self.key.seed}/{self.key.sample}/{what}")


@dataclass(frozen=True, slots=True)
class Task:
    """How the examples of one kind are made."""

    name: str
    summary: str
    metric: str  # of scores.METRICS
    max_tokens: int  # of an answer
    has_depth: bool
    draft: Callable[[Shape], Draft]


def make_example(key: ExampleKey, count_tokens: CountTokens) -> Example:
    """The example with as much filler as fits. Raises InvalidRequestError (field ``lengths``) where not even the least
    does."""
    task = TASKS[key.task]
    draft, fits = task.draft(Shape(key, 0)), 0
    num_tokens = count_tokens(draft.document)
    if num_tokens > key.length:
        raise InvalidRequestError("lengths", f"{task.name} needs at least {num_tokens} tokens, not {key.length}")
    too_many, each = None, 24.0  # tokens of a piece of filler: a guess, which every try makes better
    while too_many is None or too_many - fits > 1:
        number = fits + max(int((key.length - num_tokens) / each), 1)
        if too_many is not None:
            number = min(number, too_many - 1)
        tried = task.draft(Shape(key, number))
        tokens = count_tokens(tried.document)
        each = max((tokens - num_tokens) / (number - fits), 1.0)
        if tokens > key.length:
            too_many = number
        else:
            draft, fits, num_tokens = tried, number, tokens
    return Example(
        task=task.name,
        sample=key.sample,
        length=key.length,
        num_tokens=num_tokens,
        depth=key.depth if task.has_depth else None,
        metric=task.metric,
        max_tokens=task.max_tokens,
        **draft._asdict(),
    )


def least_tokens(key: ExampleKey, count_tokens: CountTokens) -> int:
    """Tokens of the example's document without filler."""
    return count_tokens(TASKS[key.task].draft(Shape(key, 0)).document)


def _woven(filler: Sequence[str], placed: Sequence[tuple[float, str]]) -> str:
    """Sentences with others put between them, each at its depth."""
    sentences = list(filler)
    for depth, sentence in sorted(placed, reverse=True):
        sentences.insert(round(depth * len(filler)), sentence)
    return " ".join(sentences)


# --- needles ---


def _needles(shape: Shape, num_keys: int, filler: Sequence[str]) -> Draft:
    random = shape.random()
    keys = random.sample(NOUNS, num_keys)
    numbers = [str(number) for number in random.sample(range(10**6, 10**7), num_keys)]
    depths = [shape.key.depth, *(random.random() for _ in keys[1:])]
    needles = [f"The secret number of the {key} is {number}." for key, number in zip(keys, numbers, strict=True)]
    question = f"What is the secret number of the {keys[0]}? Answer with the number alone."
    return Draft(_woven(filler, list(zip(depths, needles, strict=True))), question, (numbers[0],))


def _niah_single(shape: Shape) -> Draft:
    return _needles(shape, 1, list(islice(noise(), shape.filler)))


def _niah_multikey(shape: Shape) -> Draft:
    return _needles(shape, NUM_KEYS, list(islice(prose(shape.random("filler")), shape.filler)))


# --- key-value retrieval ---


def _kv_retrieval(shape: Shape) -> Draft:
    random = shape.random()

    def uuid() -> str:
        return str(UUID(int=random.getrandbits(128), version=4))

    key, value = uuid(), uuid()
    pairs = [(uuid(), uuid()) for _ in range(shape.filler)]
    pairs.insert(round(shape.key.depth * shape.filler), (key, value))
    question = f'What is the value of the key "{key}" in the JSON object? Answer with the value alone.'
    return Draft(json.dumps(dict(pairs), indent=0), question, (value,))


# --- variable tracking ---


def _variable_tracking(shape: Shape) -> Draft:
    random = shape.random()
    names: list[str] = []
    while len(names) < NUM_CHAINS * (NUM_HOPS + 1):
        name = "".join(random.choices(ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    values = random.sample(range(10**4, 10**5), NUM_CHAINS)
    placed = []
    chains = [names[number::NUM_CHAINS] for number in range(NUM_CHAINS)]
    for value, chain in zip(values, chains, strict=True):
        set_to = [str(value), *(f"VAR {name}" for name in chain[:-1])]
        depths = sorted(random.random() for _ in chain)
        placed += [(at, f"VAR {name} = {what}.") for at, name, what in zip(depths, chain, set_to, strict=True)]
    question = (
        f"Which {NUM_HOPS + 1} variables have the value {values[0]}, given to them directly or by way of other "
        "variables? Answer with their names alone."
    )
    return Draft(_woven(list(islice(noise(), shape.filler)), placed), question, tuple(chains[0]))


# --- common words ---


def _common_words(shape: Shape) -> Draft:
    random = shape.random()
    nouns = random.sample(NOUNS, len(NOUNS))
    common, others = nouns[:NUM_COMMON], list(islice(distinct_words(nouns[NUM_COMMON:]), shape.filler))
    often, seldom = _LONG_COUNTS if shape.key.length >= _LONG else _SHORT_COUNTS
    words = common * often + others * seldom
    shape.random("order").shuffle(words)
    document = "\n".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    question = (
        f"Which {NUM_COMMON} words stand in the numbered list most often? Answer with these words alone, separated by "
        "commas."
    )
    return Draft(document, question, tuple(common), (*common, *others))


# --- facts ---


def _babi(shape: Shape) -> Draft:
    random = shape.random()
    people = random.sample(PEOPLE, NUM_PEOPLE)
    order = people * NUM_MOVES
    random.shuffle(order)
    depths = sorted(random.random() for _ in order)
    where: dict[str, str] = {}
    placed = []
    for at, person in zip(depths, order, strict=True):
        where[person] = random.choice([place for place in PLACES if place != where.get(person)])
        how = random.choice(("went", "moved", "walked"))
        placed.append((at, f"{person} {how} to the {where[person]}."))
    question = f"Where is {people[0]} now? Answer with the name of the place alone."
    filler = list(islice(prose(shape.random("filler")), shape.filler))
    return Draft(_woven(filler, placed), question, (where[people[0]],), tuple(PLACES))


TASKS = {
    task.name: task
    for task in (
        Task("niah_single", "find a number in repeated noise", "match_all", 48, True, _niah_single),
        Task("niah_multikey", f"find one of {NUM_KEYS} numbers in prose", "match_all", 48, True, _niah_multikey),
        Task("kv_retrieval", "find the value of a key among UUIDs", "match_all", 80, True, _kv_retrieval),
        Task("vt", f"track a value through {NUM_HOPS} variables", "match_all", 64, False, _variable_tracking),
        Task("cwe", f"find the {NUM_COMMON} words that are most common", "f1", 120, False, _common_words),
        Task("babi", "say where a person went last", "exact", 24, False, _babi),
    )
}
