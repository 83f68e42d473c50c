"""The page in a real browser: it fits, asks for nothing, complains of nothing, and can be used."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pocketlm.report.blocks import (
    Bar,
    Bars,
    Block,
    Documents,
    Figure,
    Fold,
    Heading,
    Paragraph,
    Quote,
    Table,
    to_html,
)
from pocketlm.report.excerpts import END, Excerpt
from tests.helpers.browser import CHROMIUM, Page, browser
from tests.report.test_blocks import HOSTILE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
WIDTHS = (390, 1280)
FIRST = 5001  # position at which the second document begins
LONG = "W" * 300
LONGEST = [LONG, "word " * 60, "x_" * 200, f"`{LONG}`"]
CLICK = "document.querySelectorAll('.pane')[1].children[3].click()"


def excerpt(number: int, marks: list[str], first: int = 1) -> Excerpt:
    count = len(marks)
    return Excerpt(
        number,
        2 * count + first - 1,
        first,
        marks,
        [2] * count,
        [0.1 * index for index in range(count)],
        [0.05 * index for index in range(count)],
    )


def blocks() -> list[Block]:
    """Every kind of block, with text that is too long for a line or may be anyone's."""
    texts = [*LONGEST, *HOSTILE]
    many = [f" word{index}" for index in range(400)]
    return [
        Heading(1, LONG),
        *(Paragraph(text) for text in texts),
        Table(["", *["a long header"] * 14], [[text, *["1,234,567"] * 14] for text in texts]),
        Bars([Bar(LONG, LONG, 1.7), Bar("bytes", "1 of 2", 0.5)]),
        Figure("x.svg", LONG, LONG),
        *(Quote(text) for text in texts),
        Fold(LONG, [Table([LONG] * 4, [[LONG] * 4])]),
        Documents([excerpt(7, [*texts, END]), excerpt(8, many, FIRST)]),
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    figure = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2000 200"></svg>'
    path.write_text(to_html(blocks(), "<title>", {"x.svg": figure}), errors="strict")
    return path


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_asks_for_nothing(page: Path, tab: Page, width: int) -> None:
    tab.open(page, width)
    tab.evaluate("document.querySelector('details').open = true")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.querySelector('.scroll').scrollWidth") > width
    assert tab.complaints() == []
    assert tab.requests() == [page.resolve().as_uri()]


def test_documents_are_browsed_and_searched(page: Path, tab: Page) -> None:
    tab.open(page, 390)
    shown = "document.querySelectorAll('.pane')[1].textContent"
    assert tab.evaluate(shown) == tab.evaluate("document.querySelectorAll('.pane')[0].textContent")
    assert LONG in tab.evaluate(shown)
    tab.evaluate(
        "(() => { const choice = document.querySelector('select'); choice.value = 1;"
        "choice.dispatchEvent(new Event('change')) })()"
    )
    assert tab.evaluate(shown).startswith(" word0 word1")
    wanted = ((1, 0), (FIRST, 0), (FIRST + 1, 0), (FIRST + 2, 1), (FIRST + 699, 349), (10**6, 399))
    for position, mark in wanted:
        tab.evaluate(
            f"(() => {{ const place = document.querySelector('input'); place.value = {position};"
            "place.dispatchEvent(new Event('input')) })()"
        )
        here = "[...document.querySelectorAll('.here')]"
        assert tab.evaluate(f"{here}.map(mark => mark.textContent)") == [f" word{mark}"] * 2
        inside = (
            f"{here}.every(mark => {{ const [a, b] = [mark, mark.parentNode].map(one =>"
            "one.getBoundingClientRect()); return a.top >= b.top && a.bottom <= b.bottom })"
        )
        assert tab.evaluate(inside), position
        said = tab.evaluate("document.querySelector('output').textContent")
        losses = f"{0.1 * mark:.2f} nats before, {0.05 * mark:.2f} with TTT"
        assert said == f"tokens {FIRST + 2 * mark} to {FIRST + 2 * mark + 1}: {losses}"
    tab.evaluate(CLICK)
    assert tab.evaluate("document.querySelector('input').value") == str(FIRST + 6)
    assert tab.complaints() == []


def test_without_scripts_the_first_document_is_text(page: Path, tab: Page) -> None:
    tab.open(page, 390, scripts=False)
    document = tab.call("DOM.getDocument", depth=-1)["root"]["nodeId"]
    (pane, _) = tab.call("DOM.querySelectorAll", nodeId=document, selector=".pane")["nodeIds"]
    text = tab.call("DOM.getOuterHTML", nodeId=pane)["outerHTML"]
    assert LONG in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    form = tab.call("DOM.querySelector", nodeId=document, selector="form[hidden]")
    assert form["nodeId"]
