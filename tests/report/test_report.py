"""The report from files as the steps write them, with answers computed here independently."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from model.evaluation.length_weights import FINEWEB_TOKENS, MOST
from model.runtime.distributed import Group
from model.runtime.errors import InputError
from model.runtime.files import SIDECAR, write_json
from pocketlm.params.load import load_params
from pocketlm.params.params import Params
from pocketlm.params.presets import render
from pocketlm.report import readme
from pocketlm.report.benchmark_goals import BARS
from pocketlm.report.blocks import Block, Heading, Paragraph, Table, to_html, to_markdown
from pocketlm.report.figures import WIDTH
from pocketlm.report.records import load_record
from pocketlm.report.results import STEPS, read_losses
from pocketlm.report.summary import beyond
from steps.common import StageRun
from steps.report import main
from tests.helpers.presets import preset
from tests.helpers.report_inputs import (
    PARTS,
    change_weights,
    edit_json,
    seal,
    token_losses,
    write_seed,
)

REPOSITORY = Path(__file__).parents[2]
BASELINE = "records/2026-03-25_baseline.json"
OUTPUTS = {
    "report.md",
    "report.html",
    "headline.txt",
    "metrics.json",
    "summary.json",
    "losses.csv",
    "gain.csv",
    "provenance.json",
    "loss_curves.svg",
    "ttt_gain.svg",
    "ttt_gain_by_length.svg",
    "tensors.svg",
    "artifact_bytes.svg",
}


CODE, SCORING = 90_000, 60_000  # bytes of the code, as if it had been counted


def parameters(**report: Any) -> Params:
    """The demo preset with some values of `report`, and `seeds`, replaced."""
    params, seeds = preset("demo"), report.pop("seeds", [0, 1, 2])
    changed = dataclasses.replace(params.report, **report)
    return dataclasses.replace(params, seeds=seeds, report=changed)


def make(params: Params) -> dict:
    """Run the step in the current directory; returns its metrics."""
    main(StageRun("report", None, params, Group(0, 1, torch.device("cpu"))))
    return json.loads(Path("artifacts/report/summary.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with the results of three seeds, and the token losses of each."""
    root = tmp_path_factory.mktemp("run")
    shutil.copytree(REPOSITORY / "records", root / "records")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        tables = [write_seed(Path("."), seed) for seed in (0, 1, 2)]
    return root, tables


@pytest.fixture
def drawn(finished, tmp_path, monkeypatch):
    """A copy of `finished` as the current directory; returns the tables."""
    root, tables = finished
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("steps.report.code_bytes", lambda params: (CODE, SCORING))
    return tables


@pytest.fixture
def run(drawn, monkeypatch):
    """The same; the figures are made, but not drawn, which takes longest of all."""
    monkeypatch.setattr("pocketlm.report.figures.svg", lambda figure: "<svg></svg>")
    return drawn


def test_numbers(run):
    metrics = make(parameters())
    for seed, table in enumerate(run):
        assert metrics["runs"][seed]["ttt"]["loss"] == pytest.approx(table["ttt"].mean(), abs=1e-6)
        bits = table["ttt"].astype("float64").sum() / math.log(2) / table["bytes"].sum()
        assert metrics["runs"][seed]["ttt"]["bpb"] == pytest.approx(bits)
    losses = [table["ttt"].astype("float64").mean() for table in run]
    assert metrics["ttt"]["loss"] == pytest.approx(np.mean(losses))
    assert metrics["ttt"]["loss_std"] == pytest.approx(np.std(losses, ddof=1))
    saved = pd.concat(run)
    gain = (saved["sliding"].astype("float64") - saved["ttt"]).mean()
    assert metrics["gain"]["over_sliding_loss"] == pytest.approx(gain)
    assert metrics["scored"] == {
        "documents": 200,
        "tokens": len(run[0]),
        "bytes": int(run[0]["bytes"].sum()),
    }
    assert metrics["size"]["total_bytes"] == sum(PARTS.values()) + 2000 + CODE
    assert {path.name for path in Path("artifacts/report").iterdir()} == OUTPUTS
    headline = Path("artifacts/report/headline.txt").read_text()
    assert f"p = {metrics['test']['p']:.6f}" in headline
    assert "report: artifacts/report/report.md" in headline
    for run_metrics in metrics["runs"]:
        for score in ("pre_quant", "quantized", "ttt"):
            assert f"{run_metrics[score]['bpb']:.4f}" in headline


def test_baseline_without_ttt_is_the_own_sliding_loss(run):
    metrics = make(parameters(margin=0.002))
    sliding = [table["sliding"].astype("float64").mean() for table in run]
    ttt = [table["ttt"].astype("float64").mean() for table in run]
    expected = stats.ttest_ind(
        np.array(sliding) - 0.002, ttt, equal_var=False, alternative="greater"
    ).pvalue
    assert metrics["test"]["p"] == pytest.approx(expected, rel=1e-6)
    report = Path("artifacts/report/report.md").read_text()
    assert "own quantized models without TTT" in report
    assert "by at least 0.002 nats" in report


def test_baseline_from_a_record(run):
    metrics = make(parameters(baseline=BASELINE, margin=0.005))
    published = load_record(BASELINE)
    ttt = [table["ttt"].astype("float64").mean() for table in run]
    expected = stats.ttest_ind(
        np.array(published.losses) - 0.005, ttt, equal_var=False, alternative="greater"
    ).pvalue
    assert metrics["test"]["p"] == pytest.approx(expected, rel=1e-6)
    report = Path("artifacts/report/report.md").read_text()
    assert "62,021,632 tokens" in report  # scored on other text, and the report says so
    assert "No claim: `records/2026-03-25_baseline.json` was scored on other text" in report


def test_published_p_in_the_report(run):
    """The published losses, written as this run's results, give the published p."""
    published = load_record("records/2026-04-04_varlen_fused_ttt.json")
    for seed, (item, table) in enumerate(zip(published.runs, run, strict=True)):
        table = table.copy()
        shift = item.final.loss - table["ttt"].astype("float64").mean()
        table["ttt"] = table["ttt"].astype("float64") + shift
        write_seed(Path("."), seed, table)
    same = {"tokens": len(run[0]), "bytes": int(run[0]["bytes"].sum())}
    edit_json(Path(BASELINE), scored=same)
    metrics = make(parameters(baseline=BASELINE, margin=0.005))
    assert round(metrics["test"]["p"], 6) == 0.002928
    assert "p = 0.002928" in Path("artifacts/report/report.md").read_text()
    assert "so the claim holds" in Path("artifacts/report/headline.txt").read_text()


def test_gain_by_position_is_that_of_the_table(run, monkeypatch):
    losses = read_losses(
        *(Path("artifacts", step, "seed0/losses.parquet") for step in ("evaluate", "ttt_eval"))
    )
    table = run[0].assign(gain=run[0]["sliding"].astype("float64") - run[0]["ttt"])
    by_position = table.groupby("position")["gain"].agg(["sum", "count"])
    assert losses.count[by_position.index].tolist() == by_position["count"].tolist()
    assert losses.count.sum() == len(table)
    np.testing.assert_allclose(losses.gain[by_position.index], by_position["sum"], atol=1e-9)
    far = table[table["position"] > 1000]
    assert beyond(losses.count)[1000] == pytest.approx(len(far) / len(table))
    assert beyond(losses.gain)[1000] == pytest.approx(far["gain"].sum() / table["gain"].sum())


def test_scores_weighted_to_the_lengths_of_fineweb(run):
    """As their definition says; where all documents gain the same, so does the weighted mean."""
    lengths = make(parameters())["lengths"]
    for seed, table in enumerate(run):
        of_one = table.groupby("document").agg({"bytes": "sum", "ttt": "sum"})
        scaled = of_one["bytes"] / 3.735  # bytes that a token of FineWeb's stands for
        classes = of_one.groupby(np.searchsorted(MOST[:-1], scaled))[["ttt", "bytes"]].sum()
        shares = np.array(FINEWEB_TOKENS)[classes.index]
        expected = np.average(classes["ttt"] / classes["bytes"] / math.log(2), weights=shares)
        assert lengths["runs"][seed]["ttt"]["bpb"] == pytest.approx(expected)
    assert lengths["covered"] == pytest.approx(sum(shares))
    shown = f"{lengths['ttt']['bpb']:.4f}"
    for file in ("headline.txt", "report.md"):
        (line,) = re.findall("the same, weighted.*", Path("artifacts/report", file).read_text())
        assert shown in line
    assert re.search(rf"weighted .*{shown}.*\+", Path("artifacts/report/report.md").read_text())


def test_the_tail_gives_more_than_its_share(run):
    for point in make(parameters())["tail"]:
        assert point["gain"] > point["tokens"]


def test_one_seed_without_a_test(run):
    metrics = make(parameters(seeds=[1], baseline="none"))
    assert metrics["test"] is None
    assert metrics["ttt"]["loss_std"] is None
    assert "One seed would allow none" in Path("artifacts/report/report.md").read_text()


def test_documents_left_out_of_training_are_said(run):
    make(parameters())
    assert "not trained on" not in Path("artifacts/report/report.md").read_text()
    edit_json(TRAIN / "details.json", dropped_documents=1234)
    seal(TRAIN)
    make(parameters())
    assert "1,234 documents of the training files stood among the held-out ones and were not" in (
        Path("artifacts/report/report.md").read_text()
    )


def test_code_that_outgrew_its_reserve_fails(run):
    params, reserve, budget = parameters(), 200_000, 16_000_000
    room = budget - CODE
    quantize = Path("artifacts/quantize/seed1")
    edit_json(quantize / "details.json", artifact_bytes=room)
    seal(quantize)
    assert make(params)["size"] == {
        "artifact_bytes": room,
        "code_bytes": CODE,
        "code_reserve_bytes": reserve,
        "total_bytes": budget,
        "budget_bytes": budget,
        "scoring_code_bytes": SCORING,
    }
    page = Path("artifacts/report/report.md").read_text()
    for count in (CODE, SCORING, reserve, room):
        assert f"{count:,}" in page
    edit_json(quantize / "details.json", artifact_bytes=room + 100)
    seal(quantize)
    with pytest.raises(InputError, match=f"seed 1: {room + 100:,} bytes") as error:
        make(params)
    assert f"{CODE:,} of code are 100 more than quantize.budget_bytes" in error.value.problem
    assert f"quantize.code_reserve_bytes to {CODE:,}" in error.value.repair


def test_over_budget_of_time_is_said_aloud(run):
    make(parameters(train_budget_seconds=500.0))
    for name in ("report.md", "headline.txt"):
        text = Path("artifacts/report", name).read_text()
        assert "OVER BUDGET: train (training clock) took up to 599.9 s; 500 s" in text
    assert "Every budget" not in Path("artifacts/report/report.md").read_text()


def test_ttt_that_harms_is_reported_not_shared_out(run):
    for seed, table in enumerate(run):
        write_seed(Path("."), seed, table.assign(ttt=table["sliding"] + np.float32(0.01)))
    metrics = make(parameters())
    assert metrics["tail"] == []
    assert metrics["gain"]["over_sliding_loss"] == pytest.approx(-0.01, abs=1e-5)
    assert "claim is not made" in Path("artifacts/report/headline.txt").read_text()


def test_the_same_inputs_give_the_same_bytes(drawn):
    make(parameters())
    kept = OUTPUTS - {"provenance.json"}  # which holds the time
    first = {name: Path("artifacts/report", name).read_bytes() for name in kept}
    make(parameters())
    assert first == {name: Path("artifacts/report", name).read_bytes() for name in kept}


def test_figures_and_html_are_well_formed(drawn):
    make(parameters())
    for figure in Path("artifacts/report").glob("*.svg"):
        assert float(ElementTree.parse(figure).getroot().attrib["viewBox"].split()[2]) == 72 * WIDTH
        assert f"]({figure.name})" in Path("artifacts/report/report.md").read_text()
    html = Path("artifacts/report/report.html").read_text()
    assert html.count("<svg") == 5
    assert "src=" not in html


def test_short_documents(tmp_path, monkeypatch):
    """One-token documents leave figures without an axis to speak of; they must still be drawn."""
    monkeypatch.setattr("steps.report.code_bytes", lambda params: (CODE, SCORING))
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        write_seed(Path("."), seed, token_losses(seed, documents=5, longest=1))
    assert make(parameters(seeds=[0, 1], baseline="none"))["scored"]["documents"] == 5


def test_one_seed_for_a_test_fails_early():
    with pytest.raises(InputError, match="one seed") as error:
        preset("demo", "seeds=[0]")
    assert "report.baseline to none" in error.value.repair


def test_missing_baseline_fails_early_and_late(run):
    with pytest.raises(InputError, match=r"absent\.json: no such file"):
        preset("demo", "report.baseline=records/absent.json")
    with pytest.raises(InputError, match=r"absent\.json: no such file") as error:
        make(parameters(baseline="records/absent.json"))
    assert "report.baseline" in error.value.repair


def seal_what_is_complete(place: Path) -> None:
    made = json.loads((place / SIDECAR).read_text())["outputs"]
    if all(Path(file).exists() for file in made):
        seal(place)


TRAIN = Path("artifacts/train/seed1")
EVALUATE = Path("artifacts/evaluate/seed1")
TTT = Path("artifacts/ttt_eval/seed1")


def _edit_losses(place: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    table = pd.read_parquet(place / "losses.parquet")
    change(table).to_parquet(place / "losses.parquet")


def _without(place: Path, column: str) -> None:
    _edit_losses(place, lambda table: table.drop(columns=column))


def _with_nan() -> None:
    _edit_losses(TTT, lambda table: table.assign(ttt=table["ttt"].where(table.index != 5)))


def _with_other_tokens() -> None:
    _edit_losses(EVALUATE, lambda table: table.assign(token=table["token"][::-1].to_numpy()))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda: edit_json(TRAIN / "details.json", steps=None), "train/seed1.*steps: field requ"),
        (lambda: edit_json(TTT / "details.json", loss=math.nan), "ttt_eval/seed1.*loss.*finite"),
        (lambda: edit_json(TTT / "details.json", loss="low"), "ttt_eval/seed1.*loss.*number"),
        (lambda: edit_json(TTT / "details.json", loss=1.0), r"says 1\.0 nats for ttt"),
        (lambda: edit_json(TTT / "details.json", tokens=3), "counts 3 tokens"),
        (
            lambda: edit_json(EVALUATE / "details.json", plain={"loss": 1.0, "bpb": 1.0}),
            r"evaluate/seed1: details\.json says 1\.0 nats for plain",
        ),
        (_with_other_tokens, "ttt_eval/seed1.*its rows are not those of .*evaluate/seed1"),
        (
            lambda: _edit_losses(TTT, lambda table: table.iloc[:-1]),
            "ttt_eval/seed1.*its rows are not those of .*evaluate/seed1",
        ),
        (lambda: (TTT / "details.json").write_text("{"), "ttt_eval/seed1.*not valid JSON"),
        (lambda: (TTT / "losses.parquet").unlink(), "losses.parquet: no such file"),
        (
            lambda: (TTT / "losses.parquet").write_text("x"),
            "losses.parquet: cannot be read",
        ),
        (lambda: _without(EVALUATE, "sliding"), r"lacks the columns \['sliding'\]"),
        (lambda: _without(TTT, "bytes"), r"lacks the columns \['bytes'\]"),
        (_with_nan, "losses.parquet: ttt: a loss is not finite"),
        (lambda: (TRAIN / "curve.csv").write_text("step,loss\n1,2\n"), "curve.csv: lacks"),
        (lambda: (TRAIN / "curve.csv").unlink(), "curve.csv"),
        (lambda: Path("logs/train/seed1.jsonl").unlink(), "logs/train/seed1.jsonl: no such"),
        (lambda: Path("logs/train/seed1.jsonl").write_text(""), "did not finish"),
        (lambda: change_weights(Path("."), 1), "seed 1 read another version"),
        (lambda: write_seed(Path("."), 1, token_losses(1, 100)), "seed 1 was scored on"),
    ],
)
def test_spoilt_input_is_named(run, spoil, problem):
    spoil()
    for step in STEPS:  # as if the stages themselves had made it so
        seal_what_is_complete(Path("artifacts", step, "seed1"))
    with pytest.raises(InputError, match=problem):
        make(parameters())
    assert not Path("artifacts/report/summary.json").exists()


def test_command_line_shows_the_error_without_a_traceback(run, tmp_path):
    (tmp_path / "params.yaml").write_text(render(parameters()))
    (TRAIN / "details.json").unlink()
    command = [sys.executable, "-m", "steps.report"]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()  # the folder is no repository, which is said before
    assert "error: artifacts/train/seed1/details.json: no such file" in lines
    assert "Traceback" not in done.stderr
    assert load_params(tmp_path / "params.yaml") == parameters()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"runs": []}, "runs: "),
        ({"run": []}, "run: extra"),
        ({"runs": [{"final": {"loss": "1.9", "bpb": 1.1}}]}, r"runs\.0\.final\.loss"),
        ({"runs": [{"final": {"loss": math.nan, "bpb": 1.1}}]}, r"runs\.0\.final\.loss"),
        ({"runs": [{"seed": 1}]}, r"runs\.0\.final: field required"),
    ],
)
def test_malformed_record(tmp_path, change, problem):
    values = json.loads((REPOSITORY / BASELINE).read_text())
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**values, **change}))
    with pytest.raises(InputError, match=problem) as error:
        load_record(path)
    assert "records/README.md" in error.value.repair


def test_published_losses_and_bits_per_byte_agree():
    for path in sorted((REPOSITORY / "records").glob("*.json")):
        record = load_record(path)
        bits_per_nat_token = record.scored.tokens / record.scored.bytes / math.log(2)
        for item in record.runs:
            assert item.final.bpb == pytest.approx(item.final.loss * bits_per_nat_token, rel=3e-6)


def test_blocks_render_alike():
    blocks: list[Block] = [
        Heading(2, "A & B"),
        Paragraph("see `x < y`"),
        Table(["", "n"], [["one", "1"], ["two", "2"]]),
    ]
    assert to_markdown(blocks) == (
        "## A & B\n\nsee `x < y`\n\n|  | n |\n| --- | ---: |\n| one | 1 |\n| two | 2 |\n"
    )
    html = to_html(blocks, "t", {})
    assert "<h2>A &amp; B</h2>" in html
    assert "<code>x &lt; y</code>" in html
    assert html.count("<td>") == html.count('<td class="number">') == 2


def test_columns_of_numbers_are_aligned_right():
    rows = [
        ["1 M", "+0.5 ± 0.1", "≥ 1,200", "settings D", "`27733b`", "-", "540 (a)", "`a.b` 3"],
        ["2 M", "-0.5", "minutes", "36 M", "`aa`", "-", "-", "`c` 2"],
        ["3 M", "0.25 …", "≈ 3", "best", "`bb`", "", "minutes", "as named"],
    ]
    table = Table([*"abcdefgh"], rows)
    assert [place for place, numeric in enumerate(table.numeric) if numeric] == [1, 2]
    assert "| --- | ---: | ---: | --- | --- | --- | --- | --- |" in to_markdown([table])


def test_record_and_readme_table(run, monkeypatch):
    metrics = make(parameters())
    place = "# Title\n<!-- results: nothing -->\nstale table\n<!-- end of results -->\nmore\n"
    Path("README.md").write_text(place)
    readme.update_readme(Path("records/demo"))
    assert json.loads(Path("records/demo/summary.json").read_text()) == metrics
    text = Path("README.md").read_text()
    assert text.startswith("# Title\n<!-- results: records/demo/summary.json -->\n")
    assert text.endswith("<!-- end of results -->\nmore\n")
    assert "stale table" not in text
    assert f"| quantized, with TTT | {metrics['ttt']['loss']:.4f} ±" in text
    assert readme.render(text) == text
    edit_json(Path("records/demo/summary.json"), ttt={**metrics["ttt"], "loss": 9.0})
    assert "| 9.0000 ±" in readme.render(text)


def test_the_readme_shows_the_benchmarks_that_are_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "records/demo", "records/demo")
    places = "<!-- {0}: records/{1} -->\nstale\n<!-- end of {0} -->\n"
    text = places.format("results", "demo/summary.json") + places.format("benchmarks", "benchmarks")
    assert "No figures are recorded yet." in readme.render(text)
    origin = {"device": "NVIDIA H100", "commit": "0123456789abcdef"}
    train = {"tokens_per_s_per_gpu": 1.5e6, "peak_memory_mib": 21_000.4, "cold_start_s": None}
    write_json(Path("records/benchmarks/train.json"), origin | train)
    write_json(
        Path("records/benchmarks/ttt.json"),
        origin | {"best_nats": 1.99, "published_window_nats": 2},
    )
    Path("records/benchmarks/sweep.md").touch()
    rendered = readme.render(text)
    assert len({(bar.file, bar.figure) for bar in BARS}) == len(BARS) == 30
    for row in (
        "| training: tokens/s | 1,170,000 | ≥ 1,450,000 | 1,500,000 | yes |",
        "| training: peak memory, MiB | 22,987 | ≤ 20,000 | 21,000 | no |",
        "| training: start with a cold cache, s | minutes | ≤ 60 | - | - |",
        "| TTT best minus window at 2e-4, nats | - | ≤ -0.005 | -0.0100 | yes |",
        "| TTT cached minus window, nats | - | ≤ 0 | - | - |",
    ):
        assert row in rendered
    assert "quantiz" not in rendered[rendered.index("| figure |") :]
    assert "[train](records/benchmarks/train.json) on NVIDIA H100, commit `0123456789`" in rendered
    assert "[sweep](records/benchmarks/sweep.md)" in rendered
    assert "stale" not in rendered
    assert readme.render(rendered) == rendered


def test_readme_without_a_place_for_the_table():
    with pytest.raises(InputError, match=r"README\.md"):
        readme.render("# Title\n")


def test_recording_without_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"artifacts/report/summary\.json"):
        readme.record(Path("records/demo"))


def test_the_readme_shows_what_its_record_says(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    if not list(Path("records").glob("*/summary.json")):
        pytest.skip("no result is recorded yet")
    text = Path("README.md").read_text(encoding="utf-8")
    assert readme.render(text) == text


def test_commits_that_differ_are_mentioned(run):
    seal(TRAIN, commit="f" * 40 + "+changes")
    metrics = make(parameters())
    assert sorted(
        origin["seeds"] for origin in metrics["origins"] if origin["step"] == "train"
    ) == [
        [0, 2],
        [1],
    ]
    report = Path("artifacts/report/report.md").read_text()
    assert "`ffffffffff+changes`" in report
    assert re.search(r"made at 2 different commits", report)
