"""YES or NO in what a model writes."""

from __future__ import annotations

import random

import pytest

from octavo.coordinators.verdict import merged_margin, verdict_of


@pytest.mark.parametrize(
    ("text", "early", "final"),
    [
        ("YES#because", True, True),
        ("yes.", True, True),
        ("YES", None, True),
        ("NO", None, False),
        ("NOT sure#", None, None),
        ("The wall, no doubt, helps#x", None, None),
        ("It does: YES", None, True),
        ("NOTHING", None, None),
        ("The answer is NO#x", False, False),
        ("  \n Yes, it does", True, True),
        ("maybe\nYES", None, None),
        ("", None, None),
        ("#YES", None, None),
        ("**YES**#", True, True),
        ("No\n", False, False),
    ],
)
def test_verdict_of(text: str, early: bool | None, final: bool | None) -> None:
    assert verdict_of(text, final=False) is early
    assert verdict_of(text, final=True) is final


def test_an_early_verdict_is_the_final_one() -> None:
    """Whatever follows."""
    rng = random.Random(0)
    words = ["YES", "NO", "yes", "Nothing", "#", "\n", " ", ".", "x", "T", "*"]
    for _ in range(3000):
        text = ""
        known = None
        for _ in range(8):
            text += rng.choice(words)
            said = verdict_of(text, final=False)
            assert known is None or said is known, text
            known = said
        assert known is None or verdict_of(text, final=True) is known


@pytest.mark.parametrize(
    ("text", "margin"),
    [("YES#what it says", "what it says"), ("Yes: a\nb", "a\nb"), ("YES", ""), ("YES. 5#6", "5#6"), (" yes # x ", "x")],
)
def test_merged_margin(text: str, margin: str) -> None:
    assert merged_margin(text) == margin
