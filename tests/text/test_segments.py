"""Segments of a long text: nothing is lost, none is too long, and they end where sentences do."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from octavo.text import segments
from octavo.text.directory import tokenizer_from_directory
from octavo.text.segments import split
from octavo.text.tokenizer import Tokenizer

PROSE = (
    "The whale is white. It swims far, e.g. under the ice! Dr. Ahab said: \u201cThere she blows.\u201d "
    "Is it 3.14 miles? Yes\u2026 perhaps.\n\nA heading\n\nJ. Smith went on. Then came the end of it all.\n"
)
ODD = [
    "x",
    " ",
    "\n\n\n",
    "a " * 200,
    "x" * 500,
    "\u6d77\u3002\u9be8\uff01" * 30,
    "\U0001f433\U0001f30a" * 40,
    "na\u00efve caf\u00e9 e\u0301 " * 20,
    "tab\tand\r\nlines\r\n" * 20,
    "word.word.word." * 20,
    PROSE * 4,
]


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tiny_llama_dir: Path, tiny_sentencepiece_dir: Path) -> Tokenizer:
    return tokenizer_from_directory(tiny_llama_dir if request.param == "byte-level" else tiny_sentencepiece_dir)


def check(tokenizer: Tokenizer, text: str, most: int, before: list[int]) -> list[segments.TextSegment]:
    parts = split(tokenizer, before, text, most)
    assert "".join(text[part.start : part.stop] for part in parts) == text
    assert [a.stop for a in parts[:-1]] == [b.start for b in parts[1:]]
    assert all(part.token_ids for part in parts)
    return parts


@pytest.mark.parametrize("text", ODD, ids=lambda text: repr(text[:12]))
@pytest.mark.parametrize("most", [1, 2, 7, 40, 10_000])
def test_nothing_is_lost(tokenizer: Tokenizer, text: str, most: int) -> None:
    """W5: the tokens are those of the whole text, also where it stands behind others."""
    before = tokenizer.encode_open("Read this:\n")
    parts = check(tokenizer, text, most, before)
    joined = [token_id for part in parts for token_id in part.token_ids]
    if segments._starts(tokenizer, joined, text) is not None:
        assert joined == tokenizer.encode_following(before, text)
    # A character of several tokens is never cut.
    assert all(len(part.token_ids) <= max(most, 8) for part in parts)
    if most >= len(joined):
        assert len(parts) == 1


def test_no_text(tokenizer: Tokenizer) -> None:
    assert split(tokenizer, [], "", 5) == []
    with pytest.raises(ValueError, match="at least 1 token"):
        split(tokenizer, [], "x", 0)


def test_random_texts(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    pieces = [
        "The",
        " sea",
        ".",
        "! ",
        "?\n",
        "\n\n",
        "\u3002",
        "\u00e9",
        "\U0001f433",
        " ",
        "e.g.",
        "A.",
        "\u201d",
        "x" * 9,
    ]
    for _ in range(300):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 60)))
        check(tokenizer, text, rng.randint(1, 50), [])


def test_the_first_segments_do_not_depend_on_what_follows(tokenizer: Tokenizer) -> None:
    text = PROSE * 6
    whole = split(tokenizer, [], text, 120)
    cut = split(tokenizer, [], text[: whole[3].stop + 150], 120)
    assert cut[:3] == whole[:3] and len(whole) > 5


@pytest.fixture(scope="module")
def letters(tiny_llama_dir: Path) -> Tokenizer:
    return tokenizer_from_directory(tiny_llama_dir)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("One two. Three four. Five.", ["One two.", " Three four.", " Five."]),
        ("Is it? Yes! No\u2026 Well.", ["Is it?", " Yes!", " No\u2026", " Well."]),
        ("He said \u201cstop.\u201d Then he went.", ["He said \u201cstop.\u201d", " Then he went."]),
        ("It is 3.14 of e.g. Dr. A. Smith. So.", ["It is 3.14 of e.g. Dr. A. Smith.", " So."]),
        ("A heading\n\nText follows. End.", ["A heading\n\n", "Text follows.", " End."]),
        ("\u6d77\u3002\u9be8\u3002", ["\u6d77\u3002", "\u9be8\u3002"]),
    ],
)
def test_where_sentences_end(letters: Tokenizer, text: str, ends: list[str]) -> None:
    cuts = sorted({end for _, end in segments._sentence_ends(text)} | {len(text)})
    found = [text[a:b].strip() for a, b in zip([0, *cuts], cuts, strict=False) if text[a:b].strip()]
    assert found == [end.strip() for end in ends]
    longest = max(len(letters.encode(end)) for end in ends)
    parts = check(letters, text, longest, [])
    borders = {0}
    for end in ends:
        borders.add(max(borders) + len(end))
    assert {len(text[: part.start].rstrip()) for part in parts} <= {len(text[:border].rstrip()) for border in borders}


def test_ends_of_lines_and_words_where_no_sentence_ends(letters: Tokenizer) -> None:
    lines = "".join(f"row {number}, of a table\n" for number in range(20))
    parts = check(letters, lines, 60, [])
    assert all(lines[part.stop - 1] == "\n" for part in parts)
    words = "harpoon " * 60
    parts = check(letters, words, 60, [])
    assert all(words[part.stop - 1] == "n" or words[part.stop : part.stop + 1] in (" ", "") for part in parts)
    early = "End. " + "harpoon " * 60
    parts = check(letters, early, 60, [])
    assert len(parts[0].token_ids) > 30, "a sentence that ends early makes no short segment"


@pytest.mark.parametrize(
    "text",
    ["." * 300_000, "?!" * 150_000, "\n" * 300_000, "\n  " * 100_000, "\u3002" * 300_000, "." * 9 + " " * 300_000],
)
def test_in_time_of_the_texts_length(text: str) -> None:
    """Runs that a pattern could look at again from each of their characters: that would take minutes."""
    assert len(list(segments._sentence_ends(text))) < 3


def test_a_mark_that_tokenizers_write_for_a_space(tokenizer: Tokenizer) -> None:
    """Guards against a whole document taken word by word for one character."""
    text = PROSE + "a\u2581b. " + PROSE
    assert all(len(part.token_ids) <= 40 for part in check(tokenizer, text, 40, []))


class Lowering:
    """A tokenizer that writes texts anew, so that its tokens do not spell them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.token_bytes = tokenizer.token_bytes

    def encode_following(self, before: list[int], text: str, *, plain: bool = False) -> list[int]:
        return self._tokenizer.encode_following(before, text.lower(), plain=plain)


def test_a_tokenizer_that_writes_anew(letters: Tokenizer) -> None:
    lowering = Lowering(letters)
    text = PROSE * 3
    assert segments._starts(lowering, lowering.encode_following([], text), text) is None  # type: ignore[arg-type]
    parts = check(lowering, text, 80, [])  # type: ignore[arg-type]
    assert len(parts) > 4 and all(len(part.token_ids) <= 80 for part in parts)
    words = "Whale" * 300  # no space anywhere
    assert all(len(part.token_ids) <= 80 for part in check(lowering, words, 80, []))  # type: ignore[arg-type]
    assert all(text[: part.stop].rstrip()[-1] in ".!?\u2026\u201dg" for part in parts)
