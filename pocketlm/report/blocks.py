"""The pieces a report is made of, and their form in Markdown and in HTML.

Text may contain `code` between backticks and nothing else of Markdown.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 54rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
th { border-bottom-color: #888 }
figure { margin: 1.5rem 0 } figure svg { max-width: 100%; height: auto }
figcaption { color: #555 } code { background: #f3f3f3; padding: .1rem .3rem }
"""


@dataclass(frozen=True)
class Heading:
    """A title (level 1) or the name of a section (level 2)."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A few sentences."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column is a label, all others are right-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """An SVG file beside the report; title: what it shows, for readers who cannot see it."""

    file: str
    title: str
    caption: str


Block = Heading | Paragraph | Table | Figure


def to_markdown(blocks: Sequence[Block]) -> str:
    """Render blocks as plain Markdown that refers to its figures by relative paths."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], title: str, figures: Mapping[str, str]) -> str:
    """Render blocks as one HTML page that contains its figures: SVG text by file name."""
    body = "\n".join(_html(block, figures) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Figure(file, title, caption):
            return f"![{title}]({file})\n\n{caption}"
        case Table(header, rows):
            rule = ["---", *["---:"] * (len(header) - 1)]
            return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def _html(block: Block, figures: Mapping[str, str]) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Figure(file, _, caption):
            drawing = figures[file][figures[file].index("<svg") :]  # without the XML prologue
            return f"<figure>{drawing}<figcaption>{_inline(caption)}</figcaption></figure>"
        case Table(header, rows):
            lines = [_row("th", header), *(_row("td", row) for row in rows)]
            return "<table>\n" + "\n".join(lines) + "\n</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells) + "</tr>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
