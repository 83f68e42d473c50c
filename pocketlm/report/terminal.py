"""Blocks of a report in a terminal; figures are for pages."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from pocketlm.report.blocks import Block, Heading, Link, Paragraph, Table, clean


def show(blocks: Sequence[Block], console: Console) -> None:
    """Print blocks but figures."""
    for number, block in enumerate(blocks):
        match block:
            case Heading(_, text):
                if number:
                    console.print()
                console.print(_text(text), style="bold", highlight=False)
            case Paragraph(text):
                parts = [text] if isinstance(text, str) else text
                words = "".join(part.text if isinstance(part, Link) else part for part in parts)
                console.print(_text(words), highlight=False)
            case Table():
                console.print(_grid(block))


def _grid(table: Table) -> Grid:
    grid = Grid(box=None, pad_edge=False, header_style="dim")
    for name, numeric in zip(table.header, table.numeric, strict=True):
        grid.add_column(_text(name), justify="right" if numeric else "left")
    for row in table.rows:
        grid.add_row(*map(_text, row))
    return grid


def _text(text: str) -> Text:
    """Text in which nothing is markup, without the marks of code."""
    return Text(clean(text.replace("`", "")))
