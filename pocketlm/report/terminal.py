"""Blocks of a report in a terminal; figures are for pages."""

from collections.abc import Sequence
from itertools import islice
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
    """Print the columns for which there is room, from the left, and name the others.

    Numbers stay whole; text and headers are broken where they must be.
    """
    rows = [[_text(cell) for cell in row] for row in table.rows]
    least, full = list[int](), list[int]()
    for name, numeric, *cells in zip(map(_text, table.header), table.numeric, *rows, strict=True):
        longest = max((cell.cell_len for cell in cells), default=0)
        words = max(map(len, name.plain.split()), default=0)
        least.append(max(longest if numeric else min(longest, TEXT), words))
        full.append(max(longest, name.cell_len))
    shown = 1
    while shown < len(least) and sum(least[: shown + 1]) + GAP * shown <= console.width:
        shown += 1
    room = console.width - sum(least[:shown]) - GAP * (shown - 1)
    grid = Grid(box=None, pad_edge=False, header_style="dim")
    columns = zip(table.header, table.numeric, least, full, strict=True)
    for name, numeric, width, whole in islice(columns, shown):
        more = max(0, min(room, whole - width))
        room -= more
        justify: Literal["left", "right"] = "right" if numeric else "left"
        grid.add_column(_text(name), justify=justify, width=width + more, overflow="fold")
    for row in rows:
        grid.add_row(*row[:shown])
    console.print(grid)
    if left_out := table.header[shown:]:
        console.print(_text(f"no room for: {'; '.join(left_out)}"), style="dim", highlight=False)


def _text(text: str) -> Text:
    """Text in which nothing is markup, without the marks of code."""
    return Text(clean(text.replace("`", "")))
