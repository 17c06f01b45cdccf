"""The page in a browser: `pip install playwright`, and a Chromium on the path. Skipped where one is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import Running

pytestmark = pytest.mark.slow


@pytest.fixture
def page(server: Running) -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        # Playwright's own scripts need eval, which the page forbids.
        shown = browser.new_context(bypass_csp=True, viewport={"width": 390, "height": 800}).new_page()
        problems: list[str] = []
        shown.on("pageerror", lambda error: problems.append(str(error)))
        shown.on("console", lambda message: message.type == "error" and problems.append(message.text))
        shown.goto(server.url + "/")
        yield shown
        browser.close()
        assert problems == []


def test_a_chat_by_keyboard(page: Any) -> None:
    page.evaluate("sessionStorage.setItem('octavo', JSON.stringify({ max_tokens: 12, seed: 1 }))")
    page.fill("#chat-text", "hello <b>there</b>")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".messages .assistant")
    page.wait_for_function(
        "document.querySelector('.stop').disabled && document.querySelector('.assistant .text').textContent"
    )
    assert page.inner_text(".messages .user .text") == "hello <b>there</b>"  # no markup
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it fits a phone"


def test_a_document_with_its_margins(page: Any) -> None:
    page.click("nav >> text=Document")
    # Enough segments that notes are left to judge: when all are judged, the answer comes by itself.
    page.fill(".text", "The whale is white. The sea is old. " * 8)
    page.fill(".question", "Who is old?")
    page.fill(".segment", "90")
    page.check(".review")
    page.click(".document button:has-text('Read') >> nth=0")
    page.wait_for_selector(".note .buttons", timeout=60_000)
    page.click(".note .buttons button:has-text('Reject') >> nth=0")
    page.wait_for_selector(".note.dropped:has-text('by you')")
    page.click(".note .buttons button:has-text('Edit') >> nth=1")
    page.fill(".note textarea", "The sea is.")
    page.click(".note button:has-text('Save')")
    page.wait_for_selector(".note.kept:has-text('The sea is.')")
    page.wait_for_function("/Judge/.test(document.querySelector('.progress').textContent)")
    page.click(".answer-now")
    page.wait_for_function("/^Done/.test(document.querySelector('.progress').textContent)", timeout=60_000)


def test_trees_of_samples_and_beams(page: Any) -> None:
    page.click("nav >> text=Tree")
    for how in ("samples", "beams"):
        page.select_option(".how", how)
        page.click("button:has-text('Grow')")
        page.wait_for_function("document.querySelectorAll('[role=treeitem]').length > 2", timeout=60_000)
        page.wait_for_selector(".tree .stop:disabled")


def test_the_strip(page: Any) -> None:
    page.wait_for_selector("#strip:has-text('KV blocks')")
    assert "running" in page.inner_text("#strip")
