"""Blocks of a report in a terminal; figures are for pages."""

from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from pocketlm.report.blocks import Block, Heading, Link, Paragraph, Table, clean

TEXT = 12  # characters that a column of text has at least, if its text is as long
GAP = 2  # columns of the terminal between two of a table


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
                _show_table(block, console)


def _show_table(table: Table, console: Console) -> None:
    """Print the columns for which there is room, from the left, and name the others."""
    widths = _widths(table, console.width)
    grid = Grid(box=None, pad_edge=False, header_style="dim")
    for name, numeric, width in zip(table.header, table.numeric, widths, strict=False):
        justify: Literal["left", "right"] = "right" if numeric else "left"
        grid.add_column(_text(name), justify=justify, width=width, overflow="fold")
    for row in table.rows:
        grid.add_row(*map(_text, row[: len(widths)]))
    console.print(grid)
    if left_out := table.header[len(widths) :]:
        console.print(_text(f"no room for: {'; '.join(left_out)}"), style="dim", highlight=False)


def _widths(table: Table, available: int) -> list[int]:
    """Widths of the columns for which there is room.

    Numbers stay whole; text and headers are broken where they must be, headers first.
    """
    least, full = list[int](), list[int]()
    for name, numeric, *cells in zip(table.header, table.numeric, *table.rows, strict=True):
        longest = max((_text(cell).cell_len for cell in cells), default=0)
        words = max(map(len, name.split()), default=0)
        least.append(max(longest if numeric else min(longest, TEXT), words))
        full.append(max(longest, len(name)))
    shown = 1
    while shown < len(least) and sum(least[: shown + 1]) + GAP * shown <= available:
        shown += 1
    widths = least[:shown]
    for place in sorted(range(shown), key=lambda place: table.numeric[place]):
        room = available - sum(widths) - GAP * (shown - 1)
        widths[place] += max(0, min(room, full[place] - widths[place]))
    return widths


def _text(text: str) -> Text:
    """Text in which nothing is markup, without the marks of code."""
    return Text(clean(text.replace("`", "")))
