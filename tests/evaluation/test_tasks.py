"""Examples of the tasks: made again from their key, as long as asked for, and with an answer that follows from the
document."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from octavo import InvalidRequestError
from octavo.evaluation.scores import METRICS
from octavo.evaluation.tasks import NUM_COMMON, TASKS, Example, ExampleKey, least_tokens, make_example
from octavo.evaluation.words import ADJECTIVES, NOUNS, PEOPLE, PLACES, distinct_words, prose
from octavo.text.tokenizer import Tokenizer

SOURCE = Path(__file__).parents[2] / "src"
LARGEST_PIECE = 80  # tokens of a pair of UUIDs, in any tokenizer here


def count_tokens(text: str) -> int:
    """Words, digits and marks: much like a model's."""
    return len(re.findall(r"[A-Za-z]+|\d|[^\w\s]", text))


def example(task: str, *, seed: int = 0, sample: int = 0, length: int = 2000, depth: float = 0.5) -> Example:
    return make_example(ExampleKey(task, seed, sample, length, depth), count_tokens)


# --- solvers: they know a task, and of an example nothing but document and question ---


def solve_needle(document: str, question: str) -> set[str]:
    numbers = dict(re.findall(r"The secret number of the (\w+) is (\d+)\.", document))
    return {numbers[re.findall(r"secret number of the (\w+)", question)[0]]}


def solve_kv(document: str, question: str) -> set[str]:
    return {json.loads(document)[re.findall(r'"(.*?)"', question)[0]]}


def solve_vt(document: str, question: str) -> set[str]:
    values: dict[str, str] = {}
    for name, what in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", document):
        values[name] = values.get(what, what)  # only of what stood before
    value = re.findall(r"\d{5}", question)[0]
    return {name for name, what in values.items() if what == value}


def solve_cwe(document: str, _: str) -> set[str]:
    counts = Counter(re.findall(r"^\d+\. (\S+)$", document, re.MULTILINE)).most_common(NUM_COMMON + 1)
    assert counts[NUM_COMMON - 1][1] > counts[NUM_COMMON][1] if len(counts) > NUM_COMMON else True
    return {word for word, _ in counts[:NUM_COMMON]}


def solve_babi(document: str, question: str) -> set[str]:
    where = dict(re.findall(r"(\w+) (?:went|moved|walked) to the (\w+)\.", document))  # of several the last
    return {where[re.findall(r"Where is (\w+) now", question)[0]]}


SOLVERS: dict[str, Callable[[str, str], set[str]]] = {
    "niah_single": solve_needle,
    "niah_multikey": solve_needle,
    "kv_retrieval": solve_kv,
    "vt": solve_vt,
    "cwe": solve_cwe,
    "babi": solve_babi,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [400, 5000])
def test_the_answer_follows_from_the_document(task: str, length: int) -> None:
    for sample in range(12):
        made = example(task, sample=sample, length=length, depth=sample / 11)
        answers = SOLVERS[task](made.document, made.question)
        assert answers == set(made.answers)
        score = METRICS[made.metric]
        assert score(" and ".join(answers), made.answers, made.choices) == 1
        assert score("I do not know.", made.answers, made.choices) == 0
        assert not made.choices or answers <= set(made.choices)
        assert score(made.question, made.answers, made.choices) == 0, "the question gives nothing away"


def test_nothing_but_the_needle_holds_the_answer() -> None:
    """Guards a distractor, or noise, that a right answer could be copied from by chance."""
    for task in ("niah_single", "niah_multikey", "kv_retrieval"):
        for sample in range(20):
            made = example(task, sample=sample)
            assert made.document.count(made.answers[0]) == 1
    for sample in range(20):
        made = example("vt", sample=sample)
        others = set(re.findall(r"VAR (\w+) =", made.document)) - set(made.answers)
        assert len(others) == len(made.answers) == 5
        assert not any(answer in made.document.replace(f"VAR {answer}", "") for answer in made.answers)


def test_prose_is_noise() -> None:
    """It names nobody and no place, and holds no number."""
    text = " ".join(islice(prose(Random(1)), 3000))
    assert not re.search(r"\d", text)
    assert not set(re.findall(r"\w+", text.lower())) & {word.lower() for word in (*PEOPLE, *PLACES)}


def test_words() -> None:
    for words in (NOUNS, ADJECTIVES, PEOPLE, PLACES):
        assert len(set(words)) == len(words)
    assert not set(NOUNS) & {*PLACES, *map(str.lower, PEOPLE)}
    many = list(islice(distinct_words(NOUNS[:5]), 2000))
    assert len(set(many)) == 2000 and many[:5] == list(NOUNS[:5]) and many[5] == f"{ADJECTIVES[0]}-{NOUNS[0]}"


@pytest.mark.parametrize("task", TASKS)
def test_the_same_key_gives_the_same_example(task: str) -> None:
    assert example(task, seed=3, sample=2) == example(task, seed=3, sample=2)
    documents = {example(task, seed=seed, sample=sample).document for seed in range(3) for sample in range(3)}
    assert len(documents) == 9


def test_another_process_makes_the_same_examples() -> None:
    """Guards an order that is a hash's."""
    code = (
        "import hashlib; from octavo.evaluation.tasks import *\n"
        "made = [make_example(ExampleKey(task, 1, 2, 900, 0.5), lambda text: len(text) // 4) for task in TASKS]\n"
        "print(hashlib.sha256(repr(made).encode()).hexdigest())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_asks_the_same_at_every_length_and_depth(task: str) -> None:
    made = [example(task, sample=4, length=length, depth=depth) for length in (500, 3000) for depth in (0.0, 0.7)]
    assert len({(one.question, one.answers) for one in made}) == 1


@pytest.mark.parametrize("task", TASKS)
def test_lengths(task: str) -> None:
    """Never more than asked for, and less by no more than one piece of filler would take."""
    for length in (400, 1000, 2500, 9000):
        for sample in range(5):
            made = example(task, sample=sample, length=length, depth=0.25)
            assert made.num_tokens == count_tokens(made.document)
            assert length - LARGEST_PIECE <= made.num_tokens <= length
    key = ExampleKey(task, 0, 0, 2000, 0.5)
    least = least_tokens(key, count_tokens)
    assert make_example(key._replace(length=least), count_tokens).num_tokens == least
    with pytest.raises(InvalidRequestError, match=f"lengths: {task} needs at least {least} tokens, not {least - 1}"):
        make_example(key._replace(length=least - 1), count_tokens)


@pytest.mark.parametrize("task", TASKS)
def test_lengths_in_the_tokens_of_a_model(task: str, smollm2_tokenizer: Tokenizer) -> None:
    def tokens(text: str) -> int:
        return len(smollm2_tokenizer.encode(text, add_special_tokens=False))

    calls = 0

    def counted(text: str) -> int:
        nonlocal calls
        calls += 1
        return tokens(text)

    for length in (1500, 6000):
        made = make_example(ExampleKey(task, 0, 1, length, 0.5), counted)
        assert length - LARGEST_PIECE <= tokens(made.document) == made.num_tokens <= length
    assert calls < 30, "it does not feel its way"


def test_depths() -> None:
    """Where a needle stands, of a document in sentences or in pairs."""
    for depth in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0):
        for sample in range(3):
            single = example("niah_single", sample=sample, depth=depth)
            assert single.depth == depth
            sentences = single.document.split(". ")
            (at,) = (number for number, sentence in enumerate(sentences) if "secret" in sentence)
            assert at == round(depth * (len(sentences) - 1))
            multi = example("niah_multikey", sample=sample, depth=depth)
            sentences = multi.document.split(". ")
            (at,) = (number for number, sentence in enumerate(sentences) if multi.answers[0] in sentence)
            assert abs(at - depth * (len(sentences) - 1)) <= 4, "distractors stand anywhere"
            pairs = example("kv_retrieval", sample=sample, depth=depth)
            values = list(json.loads(pairs.document).values())
            assert values.index(pairs.answers[0]) == round(depth * (len(values) - 1))
    for task in ("vt", "cwe", "babi"):
        low, high = (example(task, depth=depth) for depth in (0.0, 1.0))
        assert low == high and low.depth is None, "nothing stands at one place"


def test_hops_stand_in_order_and_apart() -> None:
    """Variable tracking asks for more than one place of the document."""
    made = example("vt", length=4000)
    places = [made.document.index(f"VAR {name} =") for name in made.answers]
    assert places == sorted(places) and places[-1] - places[0] > len(made.document) / 10
