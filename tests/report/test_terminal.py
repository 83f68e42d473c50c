"""Tables in a terminal: as many whole columns as there is room for, and the others named."""

import io
import re

import pytest
from rich.console import Console

from pocketlm.report.blocks import Table
from pocketlm.report.terminal import show

TABLE = Table(
    ["name", "settings", "gain, bpb", "trained, bpb", "bytes"],
    [
        ["a technique", "`train.context_schedule` from nothing to a half", "+0.0080", "-0.5", "-1"],
        [
            "[red]",
            "`a_name_without_any_place_to_break_it`",
            "-0.0101",
            "+0.0087 ± 0.0018",
            "+1,608",
        ],
    ],
)
NUMBERS = [["+0.0080", "-0.0101"], ["-0.5", "+0.0087 ± 0.0018"], ["-1", "+1,608"]]


def printed(table: Table, width: int) -> str:
    file = io.StringIO()
    show([table], Console(width=width, file=file))
    return file.getvalue()


@pytest.mark.parametrize("width", range(14, 130))
def test_columns_are_whole_or_named_as_left_out(width: int) -> None:
    text = printed(TABLE, width)
    assert max(map(len, text.splitlines())) <= width
    shown, _, left_out = " ".join(text.split()).partition("no room for: ")
    names = left_out.split("; ") if left_out else []
    assert names == list(TABLE.header[len(TABLE.header) - len(names) :])
    for name, numbers in zip(TABLE.header[2:], NUMBERS, strict=True):
        for number in numbers:
            pattern = rf"(?<!\S){re.escape(number)}(?!\S)"
            assert (re.search(pattern, shown) is not None) == (name not in names)


def test_with_enough_room_each_row_is_a_line() -> None:
    lines = printed(TABLE, 200).splitlines()
    assert len(lines) == 3
    assert "train.context_schedule from nothing to a half" in lines[1]
    assert "[red]" in lines[2]


def test_a_table_without_rows_has_its_header() -> None:
    assert printed(Table(["one", "two"], []), 40).split() == ["one", "two"]
