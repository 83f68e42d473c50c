"""Text of anyone in the pages: shown as it is, and nothing else."""

import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pocketlm.report.blocks import (
    Bar,
    Bars,
    Documents,
    Figure,
    Fold,
    Heading,
    Link,
    Paragraph,
    Quote,
    Table,
    clean,
    to_html,
    to_markdown,
)
from pocketlm.report.excerpts import Excerpt
from pocketlm.report.figures import artifact_bytes, tensors
from pocketlm.report.sweep_page import Point, write_page

HOSTILE = [
    "<script>alert(1)</script>",
    "<!-- end of results -->",
    "![x](https://evil.example/x.png)",
    "[x](javascript:alert(1))",
    "[x]: https://evil.example",
    "[x][y]",
    "<https://evil.example>",
    "https://evil.example www.evil.example a@evil.example",
    "a | b \\| c",
    "first\n\nsecond\r\n# third",
    "`code` ``two`` ```three",
    "` <b> `",
    "&lt;b&gt; &#60; & <",
    "**bold** _x_ ~~gone~~ $\\frac{1}{2}$ $\\nonsense{$",
    "# heading",
    "1. item",
    "---",
    "\x1b[31mred\x1b[0m \x00 \u202e \ud800 \u2028",
    "=cmd()",
    "\\",
]
PIECES = st.sampled_from(
    [*HOSTILE, *"<>&[]()!`*_~|\\#-=+ \n\t\"'$@:/.1a", "https://", "www.", "<a "]
)
TEXTS = st.one_of(st.text(max_size=20), st.lists(PIECES, max_size=8).map("".join))
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
PLAIN = {"text", "code_inline"}


def shown(markdown: str) -> list[str]:
    """The text of each heading, paragraph and cell, which must hold text and code alone."""
    found = []
    for token in PARSER.parse(markdown):
        assert token.type not in ("html_block", "fence", "code_block", "hr"), markdown
        if token.type == "inline":
            assert token.children is not None
            assert {child.type for child in token.children} <= PLAIN, markdown
            found.append("".join(child.content for child in token.children))
    return found


def as_shown(text: str) -> str:
    """What a reader sees of a text, less the marks of code and spaces."""
    return re.sub(r"[\s`]", "", clean(text))


@settings(max_examples=100)
@given(TEXTS, TEXTS)
def test_markdown_shows_any_text_as_it_is(first, second):
    markdown = to_markdown(
        [
            Heading(2, first),
            Paragraph(second),
            Table([first, second], [[second, first]]),
            Quote(first),
            Fold(second, [Paragraph(first)]),
        ]
    )
    one, two = (as_shown(text) for text in (first, second))
    expected = [one, two, one, two, two, one, one, two, one]
    found = [as_shown(text) for text in shown(markdown)]
    assert [text for text in found if text] == [text for text in expected if text]
    assert "://" not in re.sub(r"`[^`]+`", "", markdown)


@settings(max_examples=100)
@given(TEXTS)
def test_a_value_in_code_leaves_it_only_as_text(value):
    for markdown in (
        to_markdown([Paragraph(f"made at `{value}`, as said")]),
        to_markdown([Table(["commit", "n"], [[f"`{value}`", "1"], ["a", "2"]])]),
    ):
        texts = shown(markdown)
        assert len(texts) in (1, 6)


def excerpt(*texts: str) -> Excerpt:
    """A document of these marks."""
    count = len(texts)
    losses = [[0.5 * index for index in range(count)], [2.0] * count]
    return Excerpt(3, 1000, 1, list(texts), [1] * count, *losses)


@settings(max_examples=50)
@given(TEXTS)
def test_markdown_of_bars_and_documents_is_a_table(value):
    page = to_markdown([Bars([Bar(value, value, 1.5)]), Documents([excerpt(value, " a", value)])])
    texts = shown(page)
    assert len(texts) == 6 + 10
    assert as_shown(texts[3]) == as_shown(texts[4]) == as_shown(value)
    assert texts[5] == "150.0 %"
    begin = as_shown(f"{value} a{value}…".replace("`", "'"))
    assert [as_shown(text) for text in texts[11:]] == ["3", "1,000", "0.500", "2.000", begin]


@settings(max_examples=100)
@given(TEXTS)
def test_html_shows_any_text_as_it_is(value):
    marks = [value, " word", "</script><script>"]
    page = to_html(
        [
            Bars([Bar(value, value, 0.5)]),
            Quote(value),
            Fold(value, [Paragraph(value)]),
            Documents([excerpt(*marks), excerpt("other")]),
            Heading(1, value),
            Paragraph([value, Link(value, "a/b.md")]),
            Table([value], [[f"`{value}`"]]),
            Figure("x.svg", value, value),
        ],
        value,
        {"x.svg": "<svg></svg>"},
    )
    body = page[page.index("<body>") : page.index("</html>")]
    tree = ElementTree.fromstring(body)  # tags are as they should be, nothing besides
    tags = {
        "body",
        "h1",
        "p",
        "a",
        "table",
        "tr",
        "th",
        "td",
        "code",
        "figure",
        "svg",
        "figcaption",
        *("blockquote", "details", "div", "form", "h3", "input", "label", "option", "output"),
        *("script", "section", "select", "span", "summary"),
    }
    assert {element.tag for element in tree.iter()} <= tags
    data, program = tree.iter("script")
    assert json.loads(data.text or "")[0]["marks"] == [clean(mark) for mark in marks]
    assert "addEventListener" in (program.text or "")
    panes = [one for one in tree.iter("div") if one.get("class") == "pane"]
    assert ["".join(pane.itertext()) for pane in panes] == ["".join(map(clean, marks))] * 2
    (quoted,) = tree.iter("blockquote")
    assert "".join(quoted.itertext()) == clean(value)
    title = "".join(next(tree.iter("h1")).itertext())
    assert title.replace("`", "") == clean(value).replace("`", "")
    page.encode()


def test_links_are_those_that_are_meant():
    markdown = to_markdown([Paragraph(["see ", Link("a]b", "x y/(z).md"), "."])])
    inline = PARSER.parse(markdown)[1].children or []
    (link,) = [token for token in inline if token.type == "link_open"]
    assert link.attrs["href"] == "x%20y/%28z%29.md"


@pytest.mark.parametrize("name", HOSTILE)
def test_figures_of_any_names_are_well_formed(name):
    summary = {
        "parts": [{"part": name, "bytes": 10.0}],
        "runs": [{"total_bytes": 10}],
        "size": {"budget_bytes": 100},
    }
    tensor = {"tensor": name, "layer": None, "bits_per_weight": 4.0, "relative_error": 1e-3}
    for figure in (artifact_bytes(summary), tensors({"tensors": [tensor]})):
        text = io.StringIO()
        figure.savefig(text, format="svg")
        tree = ElementTree.fromstring(text.getvalue())
        tags = {element.tag.split("}")[-1] for element in tree.iter()}
        assert not tags & {"script", "a", "image", "foreignObject"}


def test_the_page_of_a_sweep_holds_any_names(tmp_path: Path):
    points = [Point(name, {name: name}, 2.0, 4.0) for name in HOSTILE[:12]]
    write_page(tmp_path, points, "<title> $\\nonsense{$ \x00")
    rows = len(points) + 1
    texts = shown((tmp_path / "sweep.md").read_text())
    assert len(texts) == rows * (len(points) + 4)
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == rows
    ElementTree.parse(tmp_path / "sweep.svg")
