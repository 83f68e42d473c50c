"""Report: tables, significance test and figures of all seeds, from the other stages' files.

The code that is shipped is counted here; with an artifact above the budget, the report fails.
"""

from pathlib import Path

from model.runtime.files import write_bytes
from pocketlm.params.paths import SUMMARY
from pocketlm.report.blocks import to_html, to_markdown
from pocketlm.report.document import TITLE, headline, report
from pocketlm.report.figures import draw
from pocketlm.report.plots import plot_tables
from pocketlm.report.results import read_seed, result_files
from pocketlm.report.summary import headline_metrics, summarize
from pocketlm.submission.bundle import code_bytes
from steps.common import StageRun, run

KEYS = ("seeds", "model.sequence_length", "evaluate", "ops", "ttt", "report")


def main(stage: StageRun) -> None:
    """Read the results of every seed; write report, summary, headline, figures and plots."""
    stage.open_log(KEYS)
    root, seeds = Path("."), stage.params.seeds
    results = [read_seed(root, seed) for seed in seeds]
    summary = summarize(results, stage.params, *code_bytes(stage.params))
    output = stage.output
    drawings, blocks = draw(results, summary), report(summary, results[0].excerpts)
    texts = {
        **drawings,
        **plot_tables(results, summary),
        "report.md": to_markdown(blocks),
        "report.html": to_html(blocks, TITLE, drawings),
        "headline.txt": headline(summary, str(output / "report.md")),
    }
    for name, text in texts.items():
        write_bytes(output / name, text.encode())
    inputs = [file for seed in seeds for file in result_files(root, seed)]
    outputs = [output / name for name in texts]
    stage.publish(headline_metrics(summary), summary, KEYS, inputs, outputs, SUMMARY.name)


if __name__ == "__main__":
    run("report", main, seeded=False)
