"""The pieces a report is made of, and their form in Markdown and in HTML.

Text may contain `code` between backticks and nothing else: whatever else has a meaning in Markdown
or HTML is escaped here, because names, devices and parameters come from files that may be anyone's.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

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


# Control characters, which terminals and XML do not stand, marks that reverse the direction of
# writing, and halves of surrogate pairs.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
# What means something in Markdown: HTML, entities, links, code, emphasis, cells, formulas, titles;
# addresses become links by themselves.
MARKS = re.compile(
    r"[<`\\\[\]*~|$#]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|:(?=//)|@|(?i:(?<=www)\.)"
)
FIRST = re.compile(r"^\s*(?:[>+=-]|\d+[.)])")  # what begins a quotation, a line, a list


@dataclass(frozen=True)
class Link:
    """A reference to a file of the repository."""

    text: str
    address: str


@dataclass(frozen=True)
class Heading:
    """A title (level 1) or the name of a section (level 2)."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A few sentences; in parts if it has links."""

    text: str | Sequence[str | Link]


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
        f"<title>{html.escape(clean(title))}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def clean(text: str) -> str:
    """Text on one line, without characters that are not printed."""
    return UNPRINTABLE.sub("\ufffd", re.sub(r"\s+", " ", text))


def label(text: str) -> str:
    """Text in a figure, where a $ does not begin a formula."""
    return clean(text).replace("$", r"\$")


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_inline_markdown(text)}"
        case Paragraph(text):
            whole = "".join(
                f"[{_inline_markdown(part.text)}]({quote(part.address)})"
                if isinstance(part, Link)
                else _inline_markdown(part)
                for part in _parts(text)
            )
            return FIRST.sub(lambda found: _entities(found[0]), whole)
        case Figure(file, title, caption):
            return f"![{_inline_markdown(title)}]({quote(file)})\n\n{_inline_markdown(caption)}"
        case Table(header, rows):
            cells = [[_inline_markdown(cell, in_table=True) for cell in row] for row in rows]
            names = [_inline_markdown(cell, in_table=True) for cell in header]
            rule = ["---", *["---:"] * (len(header) - 1)]
            return "\n".join(f"| {' | '.join(row)} |" for row in [names, rule, *cells])


def _parts(text: str | Sequence[str | Link]) -> Sequence[str | Link]:
    return [text] if isinstance(text, str) else text


def _code_and_text(text: str) -> list[str]:
    """Text, code, text, code, …, text."""
    return re.split(r"`([^`]+)`", clean(text))


def _inline_markdown(text: str, in_table: bool = False) -> str:
    pieces = _code_and_text(text)
    for place, piece in enumerate(pieces):
        code = place % 2 == 1
        # A cell ends at its | even within code, and a backslash before it is not always one.
        if code and not (in_table and ("|" in piece or "\\" in piece)):
            pieces[place] = f"`{piece}`"
        else:
            pieces[place] = MARKS.sub(lambda found: _entities(found[0]), piece)
    return "".join(pieces)


def _entities(text: str) -> str:
    """Characters that are shown and mean nothing."""
    return "".join(f"&#{ord(character)};" for character in text)


def _html(block: Block, figures: Mapping[str, str]) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline_html(text)}</h{level}>"
        case Paragraph(text):
            whole = "".join(
                f'<a href="{quote(part.address)}">{_inline_html(part.text)}</a>'
                if isinstance(part, Link)
                else _inline_html(part)
                for part in _parts(text)
            )
            return f"<p>{whole}</p>"
        case Figure(file, _, caption):
            drawing = figures[file][figures[file].index("<svg") :]  # without the XML prologue
            return f"<figure>{drawing}<figcaption>{_inline_html(caption)}</figcaption></figure>"
        case Table(header, rows):
            lines = [_row("th", header), *(_row("td", row) for row in rows)]
            return "<table>\n" + "\n".join(lines) + "\n</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_inline_html(cell)}</{tag}>" for cell in cells) + "</tr>"


def _inline_html(text: str) -> str:
    pieces = [html.escape(piece) for piece in _code_and_text(text)]
    pieces[1::2] = [f"<code>{piece}</code>" for piece in pieces[1::2]]
    return "".join(pieces)
