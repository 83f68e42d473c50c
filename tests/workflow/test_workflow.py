"""The whole workflow on a miniature, by both engines: what must run after each thing a user does.

The rows are those of the table in docs/workflow.md.
"""

import json
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from model.runtime.files import read_json
from tests.helpers.checkout import (
    ACCEPT,
    BIN,
    ENGINES,
    EVALUATE,
    FROM_QUANTIZE,
    FROM_TRAIN,
    REPORT,
    SNAKEMAKE,
    TTT,
    Checkout,
    second_engine_in_campaign,
)
from tests.helpers.waiting import wait_until

OTHER_CALIBRATION = """

_sampling_noise = sampling_noise


def sampling_noise(seed, *rest):
    return _sampling_noise(seed + 1, *rest)
"""

HALF_THE_RATE = """

_multiplier = Schedule.multiplier
Schedule.multiplier = lambda self, *given: 0.5 * _multiplier(self, *given)
"""

pytestmark = pytest.mark.workflow


def test_row_1_snakemake_then_dvc(checkout: Checkout) -> None:
    before = checkout.results()
    assert checkout.steps_run_by(*ENGINES["dvc"]) == []
    assert checkout.results() == before


@pytest.mark.campaign
def test_row_1_dvc_then_snakemake(fresh: Checkout, tmp_path: Path) -> None:
    checkout = fresh.copy(tmp_path / "checkout")
    assert checkout.steps_run_by(*ENGINES["dvc"]) == sorted(["tokenize", *FROM_TRAIN])
    before = checkout.results()
    assert checkout.steps_run_by(*SNAKEMAKE) == []
    assert checkout.results() == before


@second_engine_in_campaign
def test_row_2_a_ttt_value(checkout: Checkout, engine: list[str]) -> None:
    checkout.set("ttt.lr", "5e-4")
    assert checkout.steps_run_by(*engine) == sorted([*TTT, *REPORT])
    checkout.set("ops.adapters", "reference")
    assert checkout.steps_run_by(*engine) == sorted([*TTT, *REPORT])


@pytest.mark.campaign
def test_row_3_a_train_value_and_back(checkout: Checkout, engine: list[str]) -> None:
    before = checkout.results()
    checkout.set("train.matrix_lr", "0.02")
    assert checkout.steps_run_by(*engine) == FROM_TRAIN
    checkout.run("git", "checkout", "-q", "params.yaml")
    assert checkout.steps_run_by(*engine) == []
    assert checkout.results() == before


@pytest.mark.campaign
def test_row_4_another_seed(checkout: Checkout, engine: list[str]) -> None:
    checkout.set("seeds", "[0, 1, 7]")
    expected = ["evaluate@7", "quantize@7", "report", "train@7", "ttt_eval@7"]
    assert checkout.steps_run_by(*engine) == expected


def test_row_5_clone_and_pull(clone: Checkout, engine: list[str]) -> None:
    assert clone.steps_run_by(*engine) == []
    shutil.rmtree(clone.path / "artifacts/ttt_eval")
    assert clone.steps_run_by(*engine) == []
    assert clone.run("git", "status", "--porcelain") == ""


@pytest.mark.campaign
def test_clone_without_pull_fetches_what_is_asked_for(finished: Checkout, tmp_path: Path) -> None:
    path = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(finished.path), str(path)], check=True)
    cloned = Checkout(path)
    assert cloned.steps_run_by(*SNAKEMAKE) == []
    assert (path / "artifacts/report/headline.txt").exists()
    assert not (path / "artifacts/train/seed0/model.safetensors").exists()


@pytest.mark.campaign
def test_row_6_clone_and_a_ttt_value(clone: Checkout, engine: list[str]) -> None:
    clone.set("ttt.lr", "5e-4")
    assert clone.steps_run_by(*engine) == sorted([*TTT, *REPORT])


def test_row_7_another_branch_and_back(checkout: Checkout, engine: list[str]) -> None:
    before = checkout.results()
    checkout.run("git", "switch", "-q", "-c", "other")
    checkout.run("git", "rm", "-q", "dvc.lock")
    checkout.set("train.matrix_lr", "0.02")
    checkout.append("model/runtime/files.py", "# other\n")
    checkout.commit()
    shutil.rmtree(checkout.path / "artifacts")
    checkout.run("git", "switch", "-q", "main")
    checkout.run("dvc", "checkout", "-q")
    checkout.shuffle_times()
    assert checkout.steps_run_by(*engine) == []
    assert checkout.results() == before


@second_engine_in_campaign
def test_row_8_edit_test_time_training(checkout: Checkout, engine: list[str]) -> None:
    checkout.append("model/ttt/loop.py", "# edited\n")
    assert checkout.steps_run_by(*engine) == sorted([*TTT, *REPORT])


@pytest.mark.campaign
def test_row_8_edit_quantization_then_the_report(checkout: Checkout, engine: list[str]) -> None:
    checkout.append("model/quantization/calibration_text.py", OTHER_CALIBRATION)
    assert checkout.steps_run_by(*engine) == FROM_QUANTIZE
    checkout.append("pocketlm/report/summary.py", "# edited\n")
    assert checkout.steps_run_by(*engine) == REPORT


@pytest.mark.campaign
@pytest.mark.parametrize("engine", ["snakemake"], indirect=True)  # of DVC row 3 is the same
def test_row_8_edit_the_model(checkout: Checkout, engine: list[str]) -> None:
    checkout.append("model/network/gpt.py", "# edited\n")
    assert checkout.steps_run_by(*engine) == FROM_TRAIN


@pytest.mark.campaign
def test_row_8_given_files(checkout: Checkout, engine: list[str]) -> None:
    """A baseline and a tokenizer are noticed; what else lies in records/ is not."""
    record = checkout.path / "records/own.json"
    shutil.copy(checkout.path / "records/2026-03-25_baseline.json", record)
    assert checkout.steps_run_by(*engine) == REPORT
    record.write_text(record.read_text().replace("}", " }"))
    checkout.append("records/demo/report.md", "edited\n")
    checkout.append("records/README.md", "edited\n")
    assert checkout.steps_run_by(*engine) == REPORT
    checkout.append("records/README.md", "edited\n")
    assert checkout.steps_run_by(*engine) == []
    tokens = checkout.path / "artifacts/tokenize/tokens"
    shutil.copy(tokens / "tokenizer.model", checkout.path / "tokenizers/own.model")
    assert checkout.steps_run_by(*engine) == ["tokenize"]
    checkout.set("tokenizer.model", "tokenizers/own.model")
    assert checkout.steps_run_by(*engine) == ["tokenize"]


@pytest.mark.campaign
def test_row_9_a_step_dies(checkout: Checkout, engine: list[str]) -> None:
    checkout.set("ttt.lr", "5e-4")
    first = checkout.steps_run_by(*engine, succeeds=False, DIE_IN="ttt_eval@1")
    assert "ttt_eval@1" in first
    assert "ttt_eval@1" in checkout.run("dvc", "status")
    second = checkout.steps_run_by(*engine)
    assert sorted([*first, *second]) == sorted([*TTT, "ttt_eval@1", *REPORT])
    assert "up to date" in checkout.run("dvc", "status", "--with-deps", "report")


@pytest.mark.campaign
def test_row_10_two_runs_at_once(checkout: Checkout, engine: list[str]) -> None:
    """Of the same engine; of both: test_bridge.py."""
    checkout.set("ttt.lr", "5e-4")
    runs = [checkout.start(*engine) for _ in range(2)]
    outputs = [run.communicate()[0] for run in runs]
    clear = ("cannot be locked", "is busy", "Unable to acquire lock", "waiting for it")
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0 or any(message in output for message in clear), output
    assert any(run.returncode == 0 for run in runs), outputs
    assert not set(checkout.steps_run_by(*SNAKEMAKE)) - {*TTT, *REPORT}
    assert "up to date" in checkout.run("dvc", "status", "--with-deps", "report")
    assert checkout.steps_run_by(*ENGINES["dvc"]) == []


@pytest.mark.campaign
def test_row_11_a_value_of_the_evaluation(checkout: Checkout, engine: list[str]) -> None:
    checkout.set("evaluate.documents", "3")
    assert checkout.steps_run_by(*engine) == sorted([*EVALUATE, *TTT, *REPORT])


@second_engine_in_campaign
def test_row_12_how_a_run_is_executed(checkout: Checkout, engine: list[str]) -> None:
    """What one process has trained is evaluated by two, without training again."""
    changes = {"processes": 2, "log_every": 3, "save_every_seconds": 5.0, "ttt_documents": 2}
    for key, value in changes.items():
        checkout.set(f"execution.{key}", value)
    assert checkout.steps_run_by(*engine) == []


@pytest.mark.campaign
def test_row_13_accept_an_edit_that_changes_nothing(checkout: Checkout, engine: list[str]) -> None:
    checkout.append("model/training/trainer.py", "# edited\n")
    said = checkout.run(*ACCEPT, "train")
    for seed in (0, 1):
        assert f"train@{seed}: equal: losses of the first 4 optimizer steps" in said
    assert checkout.steps_run_by(*engine) == REPORT  # which counts the code that is shipped
    assert "up to date" in checkout.run("dvc", "status", "--with-deps", "report")


@pytest.mark.campaign
def test_every_stage_can_be_accepted(checkout: Checkout) -> None:
    before = checkout.results()
    for file in ("data/packing", "data/shards", "quantization/gptq", "ttt/loop", "artifact/format"):
        checkout.append(f"model/{file}.py", "# edited\n")
    accepted = [
        "tokenize",
        *(f"{name}@1" for name in ("train", "quantize", "evaluate", "ttt_eval")),
    ]
    for stage in accepted:
        assert f"{stage}: equal: " in checkout.run(*ACCEPT, stage)
    stale = set(json.loads(checkout.run("dvc", "status", "--json", "--with-deps", "report")))
    assert stale == {"train@0", "quantize@0", *EVALUATE[:1], *TTT[:1], *REPORT}
    changed = {name for name, content in checkout.results().items() if content != before[name]}
    assert changed == {str(checkout.path / "dvc.lock")}


@pytest.mark.campaign
def test_what_changes_results_is_not_accepted(checkout: Checkout) -> None:
    before = checkout.results()
    checkout.append("model/training/schedule.py", HALF_THE_RATE)
    checkout.append("model/ttt/loop.py", "def ttt_losses(model, *rest):\n    return []\n")
    said = checkout.run(*ACCEPT, "train@1", succeeds=False)
    assert "error: train@1: other results than those stored: loss of step 2: " in said
    assert "in logs/train/seed1.jsonl" in said
    assert "its program failed" in checkout.run(*ACCEPT, "ttt_eval", succeeds=False)
    checkout.set("train.ema_window", "0.5")  # shows only after the steps that are compared
    said = checkout.run(*ACCEPT, "train", succeeds=False)
    assert "train@0: not only code was changed: train.ema_window is 0.5, was 0.047" in said
    assert "train@7: no such stage" in checkout.run(*ACCEPT, "train@7", succeeds=False)
    assert checkout.results() == before


@pytest.mark.campaign
def test_a_killed_run_can_be_continued(checkout: Checkout) -> None:
    """Nothing that a killed Snakemake leaves must be removed by hand."""
    checkout.set("ttt.lr", "5e-4")
    checkout.record.write_text("")
    process = checkout.start(*SNAKEMAKE)
    wait_until(lambda: "ttt_eval" in checkout.record.read_text())
    process.send_signal(signal.SIGKILL)
    process.communicate()  # ends when the steps it had started have ended
    assert not set(checkout.steps_run_by(*SNAKEMAKE)) - {*TTT, *REPORT}
    assert "up to date" in checkout.run("dvc", "status", "--with-deps", "report")


@pytest.mark.campaign
def test_force_runs_a_step_again(checkout: Checkout) -> None:
    assert checkout.steps_run_by(*SNAKEMAKE, "--forcerun", "report") == REPORT
    assert checkout.steps_run_by("dvc", "repro", "-f", "-s", "report") == REPORT


def test_a_plan_does_without_what_is_slow_to_import(checkout: Checkout) -> None:
    said = checkout.run("python", "-X", "importtime", "-m", "snakemake", "-n")
    assert "Nothing to be done" in said
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", said, re.MULTILINE))
    assert "dvc" in imported
    assert not imported & {"torch", "matplotlib", "sentencepiece"}


def test_bad_parameters_stop_the_dry_run(checkout: Checkout) -> None:
    checkout.append("params.yaml", "  atention: auto\n")
    output = checkout.run("snakemake", "-n", succeeds=False)
    assert "params.yaml: ops.atention: unknown key" in output
    assert "did you mean ops.attention?" in output
    assert "Traceback" not in output


@pytest.mark.campaign
def test_experiment_keeps_hand_edits(checkout: Checkout) -> None:
    """`dvc exp run -S` changes the parameters in force, and a preset is not one of them."""
    checkout.set("report.significance", "0.02")
    ran = checkout.steps_run_by("dvc", "exp", "run", "-S", "ttt.lr=5e-4", "report")
    assert ran == sorted([*TTT, *REPORT])
    values = yaml.safe_load((checkout.path / "params.yaml").read_text())
    assert (values["ttt"]["lr"], values["report"]["significance"]) == (5e-4, 0.02)
    assert values["train"]["steps"] == 12
    assert "ttt.lr" in checkout.run("dvc", "params", "diff")
    checkout.run("dvc", "exp", "run", "-S", "preset=h100", succeeds=False)
    assert yaml.safe_load((checkout.path / "params.yaml").read_text()) == values


EXPERIMENTS = ["dvc", "exp", "show", "--only-changed", "--drop", ".*/", "--no-pager"]
WIDTH = 120  # columns of a terminal, into which the tables of DVC must fit


def test_metrics_fit_a_terminal(checkout: Checkout) -> None:
    shown = json.loads(checkout.run("dvc", "metrics", "show", "--json"))
    files = {path: file["data"] for path, file in shown[""]["data"].items()}
    assert set(files["artifacts/ttt_eval/seed1/metrics.json"]) == {"loss", "bpb", "device_s"}
    assert all(len(metrics) <= 4 for metrics in files.values())
    assert max(map(len, checkout.run("dvc", "metrics", "show").splitlines())) <= WIDTH
    path = checkout.path / "artifacts/report/metrics.json"  # as an experiment would leave it
    path.write_text(json.dumps({key: 1.1 * value for key, value in read_json(path).items()}))
    table = checkout.run(*EXPERIMENTS, COLUMNS=str(WIDTH)).splitlines()
    assert {"ttt_loss", "ttt_bpb", "gain", "size"} <= set("".join(table).split())
    assert max(map(len, table)) <= WIDTH


def references(page: str) -> list[str]:
    """The files and addresses that elements of an HTML page refer to."""
    found = list[str]()

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            names = ("src", "href", "data", "srcset")
            found.extend(value or "" for name, value in attrs if name in names)

    Parser().feed(page)
    return found


def test_plots_ask_for_nothing_from_the_network(checkout: Checkout, tmp_path: Path) -> None:
    checkout.run(str(BIN / "python"), "-m", "pocketlm.workflow.plots_page")
    page = tmp_path / "plots"
    checkout.run("dvc", "plots", "show", "--out", str(page))
    text = (page / "index.html").read_text()
    for name in ("train_seed1_curve_csv", "report_losses_csv", "report_gain_csv"):
        assert name in text
    assert "vegaEmbed" in text
    assert not references(text)
    running = ".work/train/seed0/curve.csv"
    checkout.run("dvc", "plots", "show", running, "-x", "step", "-y", "loss", "--out", str(page))
    assert "curve_csv" in (page / "index.html").read_text()


def test_html_report_embeds_the_figures(checkout: Checkout, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    checkout.run("snakemake", "--report", str(page))
    text = page.read_text()
    for name in ("report.html", "loss_curves.svg", "ttt_gain.svg", "artifact_bytes.svg"):
        assert name in text
    assert "What test-time training gains by position" in text
    headline = (checkout.path / "artifacts/report/headline.txt").read_text()
    for line in headline.splitlines()[1:5]:  # the page opens with the scores
        assert json.dumps(line)[1:-1] in text
