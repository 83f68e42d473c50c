"""Keep the README's result table equal to a recorded result.

    python -m workflow.readme                        render the table again
    python -m workflow.readme --record records/demo  record artifacts/report there, then render it

The README holds the table between a line `<!-- results: records/NAME/metrics.json -->`, which says
where its numbers come from, and the next `<!-- end of results -->`.
"""

import argparse
import re
from pathlib import Path

from model.errors import InputError
from model.files import read_json, write_bytes
from model.run_log import step_errors
from workflow.report.blocks import to_markdown
from workflow.report.document import result_table

README = Path("README.md")
REPORT = Path("artifacts/report")
RECORDED = ("metrics.json", "report.md", "loss_curves.svg", "ttt_gain.svg", "artifact_bytes.svg")
TABLE = re.compile(r"<!-- results: (\S+) -->\n.*?<!-- end of results -->", re.DOTALL)


def record(directory: Path) -> None:
    """Copy the current report to `directory`; raises InputError if there is none."""
    for name in RECORDED:
        if not (REPORT / name).is_file():
            raise InputError(f"{REPORT / name}: no such file", "run `make report` first")
    for name in RECORDED:
        write_bytes(directory / name, (REPORT / name).read_bytes())


def render(readme: str, source: str | None = None) -> str:
    """Return the README's text with its table rendered anew.

    source: metrics.json to render; None keeps the one the README names. Raises InputError if the
    README has no place for the table, or the metrics cannot be read.
    """
    found = TABLE.search(readme)
    if found is None:
        raise InputError(
            f"{README}: has no place for the result table",
            "add the lines `<!-- results: records/demo/metrics.json -->` and "
            "`<!-- end of results -->`",
        )
    source = source or found[1]
    table = to_markdown(result_table(read_json(source)))
    section = f"<!-- results: {source} -->\n\n{table}\n<!-- end of results -->"
    return readme[: found.start()] + section + readme[found.end() :]


def main() -> None:
    """Record if asked to, and rewrite the README."""
    parser = argparse.ArgumentParser(prog="python -m workflow.readme")
    parser.add_argument("--record", type=Path, help="directory to copy the current report to")
    directory = parser.parse_args().record
    with step_errors():
        if directory is not None:
            record(directory)
        source = None if directory is None else (directory / "metrics.json").as_posix()
        text = render(README.read_text(encoding="utf-8"), source)
        write_bytes(README, text.encode())


if __name__ == "__main__":
    main()
