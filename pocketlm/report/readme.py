"""Keep the README's tables equal to recorded results.

    pocketlm readme                        render the tables again
    pocketlm readme --record records/demo  record artifacts/report, then render

The README holds the results between a line `<!-- results: records/NAME/summary.json -->`, which
says where the numbers come from, and the next `<!-- end of results -->`; likewise the figures of
the benchmarks between `<!-- benchmarks: records/benchmarks -->` and its end.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from model.runtime.errors import InputError, reading
from model.runtime.files import read_json, write_bytes
from pocketlm.params.paths import REPORT, SUMMARY
from pocketlm.report.benchmark_goals import benchmark_table
from pocketlm.report.blocks import Block, to_markdown
from pocketlm.report.compare_runs import RECORD_AGAIN
from pocketlm.report.document import result_table

README = Path("README.md")
FIGURES = ("loss_curves", "ttt_gain", "ttt_gain_by_length", "tensors", "artifact_bytes")
RECORDED = (SUMMARY.name, "report.md", *(f"{figure}.svg" for figure in FIGURES))


def record(directory: Path) -> None:
    """Copy the current report to `directory`; raises InputError if there is none."""
    for name in RECORDED:
        if not (REPORT / name).is_file():
            raise InputError(f"{REPORT / name}: no such file", "run `make report` first")
    for name in RECORDED:
        write_bytes(directory / name, (REPORT / name).read_bytes())


def render(readme: str, source: str | None = None) -> str:
    """Return the README's text with its tables rendered anew.

    source: summary.json to render; None keeps the one the README names. Raises InputError if the
    README has no place for the result table, or a file cannot be read.
    """
    if not _place("results").search(readme):
        raise InputError(
            f"{README}: has no place for the result table",
            "add the lines `<!-- results: records/demo/summary.json -->` and "
            "`<!-- end of results -->`",
        )
    readme = _fill(readme, "results", _recorded_table, source)
    return _fill(readme, "benchmarks", lambda directory: benchmark_table(Path(directory)))


def _recorded_table(file: str) -> Sequence[Block]:
    summary = read_json(file, RECORD_AGAIN)
    with reading(file, RECORD_AGAIN):
        return result_table(summary)


def _place(name: str) -> re.Pattern[str]:
    return re.compile(rf"<!-- {name}: (\S+) -->\n.*?<!-- end of {name} -->", re.DOTALL)


def _fill(
    readme: str, name: str, blocks: Callable[[str], Sequence[Block]], source: str | None = None
) -> str:
    """Put the blocks of `source`, or of what the README names, in the place called `name`."""

    def section(found: re.Match[str]) -> str:
        origin = source or found[1]
        table = to_markdown(blocks(origin))
        return f"<!-- {name}: {origin} -->\n\n{table}\n<!-- end of {name} -->"

    return _place(name).sub(section, readme)


def update_readme(directory: Path | None = None) -> None:
    """Rewrite the README's tables; with a directory, record the current report there before."""
    if directory is not None:
        record(directory)
    source = None if directory is None else (directory / SUMMARY.name).as_posix()
    with reading(README, "restore it: git checkout README.md"):
        text = README.read_text(encoding="utf-8")
    write_bytes(README, render(text, source).encode())
