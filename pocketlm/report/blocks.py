"""The pieces a report is made of, and their form in Markdown and in HTML.

Text may contain `code` between backticks and nothing else: whatever else has a meaning in Markdown
or HTML is escaped here, because names, devices and parameters come from files that may be anyone's.
The form in HTML is the template `page.html.j2`: one page that asks for nothing else.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from pocketlm.report.excerpts import Excerpt

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

TEMPLATE = "page.html.j2"
BEGIN = 12  # tokens of a document that a table shows
MOST_NATS = 9  # losses from here on have the deepest color
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
NUMBER = re.compile(r"[^\w`]*\d")  # how a cell with a number begins
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
    """Rows of text; the first column is a label, columns of numbers are right-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers in most cells that hold anything."""
        columns = ([row[place] for row in self.rows] for place in range(1, len(self.header)))
        return [False, *map(_mostly_numbers, columns)]


@dataclass(frozen=True)
class Figure:
    """An SVG file beside the report; title: what it shows, for readers who cannot see it."""

    file: str
    title: str
    caption: str


@dataclass(frozen=True)
class Bar:
    """How much is used of what is allowed; share: 1 is all of it, more is too much."""

    label: str
    text: str
    share: float


@dataclass(frozen=True)
class Bars:
    """Budgets, a bar for each."""

    rows: Sequence[Bar]


@dataclass(frozen=True)
class Quote:
    """Text that is shown letter by letter, backticks included."""

    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks that a page shows on request; title: what is clicked on."""

    title: str
    blocks: "Sequence[Block]"


@dataclass(frozen=True)
class Documents:
    """Documents to browse, each token colored by its loss before and after TTT.

    Markdown has a table of them; a page without JavaScript shows the first.
    """

    excerpts: Sequence[Excerpt]


Block = Heading | Paragraph | Table | Figure | Bars | Quote | Fold | Documents


def to_markdown(blocks: Sequence[Block]) -> str:
    """Render blocks as plain Markdown that refers to its figures by relative paths."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], title: str, figures: Mapping[str, str]) -> str:
    """Render blocks as one HTML page that contains its figures: SVG text by file name."""
    return _template().render(blocks=blocks, title=clean(title), figures=figures)


@cache
def _template() -> "Template":
    """The page, with what it needs of this module; whatever it shows is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        keep_trailing_newline=True,
        loader=FileSystemLoader(Path(__file__).parent),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {
        "clean": clean,
        "inline": _inline_html,
        "kind": lambda block: type(block).__name__,
        "parts": _parts,
        "quote": quote,
        "level": lambda loss: min(MOST_NATS, max(0, int(loss))),
        "hundredths": lambda losses: [round(100 * loss) for loss in losses],
    }
    return environment.get_template(TEMPLATE)


def clean(text: str) -> str:
    """Text on one line, without characters that are not printed."""
    return UNPRINTABLE.sub("\ufffd", re.sub(r"\s+", " ", text))


def label(text: str) -> str:
    """Text in a figure, where a $ does not begin a formula."""
    return clean(text).replace("$", r"\$")


def short_commit(commit: str | None) -> str:
    """Shortened hash, or several after commas, keeping the mark of uncommitted changes."""
    if commit is None:
        return "unknown"
    parts = (one.partition("+") for one in commit.split(", "))
    return ", ".join(name[:10] + mark + rest for name, mark, rest in parts)


def _mostly_numbers(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell not in ("", "-")]
    return 2 * sum(bool(NUMBER.match(cell)) for cell in filled) > len(filled)


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
            return _not_first(whole)
        case Figure(file, title, caption):
            return f"![{_inline_markdown(title)}]({quote(file)})\n\n{_inline_markdown(caption)}"
        case Table(header, rows) as table:
            cells = [[_inline_markdown(cell, in_table=True) for cell in row] for row in rows]
            names = [_inline_markdown(cell, in_table=True) for cell in header]
            rule = ["---:" if numeric else "---" for numeric in table.numeric]
            return "\n".join(f"| {' | '.join(row)} |" for row in [names, rule, *cells])
        case Bars(rows):
            used = [[bar.label, bar.text, f"{100 * bar.share:.1f} %"] for bar in rows]
            return _markdown(Table(["budget", "used", "share"], used))
        case Quote(text):
            return f"> {_not_first(MARKS.sub(_as_entities, clean(text)))}"
        case Fold(title, blocks):
            return "\n\n".join(_markdown(block) for block in [Paragraph(title), *blocks])
        case Documents(excerpts):
            header = ["document", "tokens", "nats/token, sliding", "with TTT", "begins"]
            return _markdown(Table(header, [_row_of(excerpt) for excerpt in excerpts]))


def _row_of(excerpt: Excerpt) -> list[str]:
    """A document in a table, its backticks as apostrophes."""
    means = (excerpt.mean(losses) for losses in (excerpt.before, excerpt.after))
    begin = "".join(excerpt.marks[:BEGIN]).replace("`", "'")
    losses = [f"{mean:.3f}" for mean in means]
    return [str(excerpt.number), f"{excerpt.length:,}", *losses, f"{begin}…"]


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
            pieces[place] = MARKS.sub(_as_entities, piece)
    return "".join(pieces)


def _as_entities(found: re.Match[str]) -> str:
    """Characters that are shown and mean nothing."""
    return "".join(f"&#{ord(character)};" for character in found[0])


def _not_first(text: str) -> str:
    """Text of a paragraph, which does not begin something else."""
    return FIRST.sub(_as_entities, text)


def _inline_html(text: str) -> "Markup":
    from markupsafe import Markup, escape

    pieces = [escape(piece) for piece in _code_and_text(text)]
    pieces[1::2] = [Markup("<code>{}</code>").format(piece) for piece in pieces[1::2]]
    return Markup("").join(pieces)
