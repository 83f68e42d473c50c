"""The whole workflow on a miniature, by both engines: what must run after each thing a user does.

A checkout that has been run once is shared; every test works on a copy of it. Which steps really
ran is recorded by `sitecustomize` in the steps' own processes, so nothing is believed of what an
engine prints. The rows are those of the table in docs/workflow.md.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers.shared import made_once

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SNAKEMAKE = ["snakemake", "report", "--cores", "2", "--resources", "gpu=2"]
ENGINES = {"snakemake": SNAKEMAKE, "dvc": ["dvc", "repro"]}
ACCEPT = [str(BIN / "python"), "-m", "pocketlm", "accept"]
# Of long rows `make test` sees one engine, the quicker where several runs follow each other, and
# `make test-all` both.
second_engine_in_campaign = pytest.mark.parametrize(
    "engine", ["snakemake", pytest.param("dvc", marks=pytest.mark.campaign)], indirect=True
)
snakemake_in_campaign = pytest.mark.parametrize(
    "engine", [pytest.param("snakemake", marks=pytest.mark.campaign), "dvc"], indirect=True
)
TTT = ["ttt_eval@0", "ttt_eval@1"]
REPORT = ["report"]
EVALUATE = ["evaluate@0", "evaluate@1"]
FROM_QUANTIZE = [*EVALUATE, "quantize@0", "quantize@1", *REPORT, *TTT]
FROM_TRAIN = sorted([*FROM_QUANTIZE, "train@0", "train@1"])

# Runs in every Python process of a checkout: notes which step it is, and dies in one if told to.
SITECUSTOMIZE = """
import os, signal, sys
words = [word for word in sys.orig_argv[1:] if word != "-u"]
if words[:1] == ["-m"] and os.environ.get("RANK", "0") == "0":
    module = words[1]
    seed = "@" + words[words.index("--seed") + 1] if "--seed" in words else ""
    if module.startswith("steps."):
        step = module.removeprefix("steps.") + seed
        with open(os.environ["RECORD"], "a") as file:
            file.write(step + "\\n")
        if step == os.environ.get("DIE_IN"):
            replace = os.replace
            def replace_and_die(source, target, **options):
                replace(source, target, **options)
                if "artifacts" in str(target):
                    os.kill(os.getpid(), signal.SIGKILL)
            os.replace = replace_and_die
"""

OTHER_CALIBRATION = """

_sampling_noise = sampling_noise


def sampling_noise(seed, *rest):
    return _sampling_noise(seed + 1, *rest)
"""

HALF_THE_RATE = """

_multiplier = Schedule.multiplier
Schedule.multiplier = lambda self, *given: 0.5 * _multiplier(self, *given)
"""

pytestmark = [pytest.mark.workflow, pytest.mark.timeout(600)]


class Checkout:
    """A working copy of the repository in a temporary directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path.parent / f"{path.name}.steps"
        recorder = path.parent / f"{path.name}.recorder"
        recorder.mkdir(exist_ok=True)
        (recorder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{recorder}{os.pathsep}{path}",
            "RECORD": str(self.record),
            "OMP_NUM_THREADS": "1",
            "DVC_SITE_CACHE_DIR": str(path.parent / f"{path.name}.dvc"),
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@example.invalid",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@example.invalid",
        }

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.path,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, succeeds: bool = True, **environment: str) -> str:
        """Run a command and return what it printed."""
        process = self.start(*command, **environment)
        output = process.communicate()[0]
        assert (process.returncode == 0) == succeeds, f"{' '.join(command)}\n{output}"
        return output

    def steps_run_by(self, *command: str, succeeds: bool = True, **environment: str) -> list[str]:
        """Run a command and return the steps that it started, sorted."""
        self.record.write_text("")
        self.run(*command, succeeds=succeeds, **environment)
        return sorted(self.record.read_text().split())

    def commit(self, message: str = "change") -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "-m", message)

    def set(self, key: str, value: object) -> None:
        """Change one value of params.yaml as a person would."""
        section, _, name = key.rpartition(".")
        path = self.path / "params.yaml"
        text = path.read_text()
        start = text.index(f"\n{section}:") if section else 0
        pattern = re.compile(rf"^(\s*{name}:) [^#]*", re.MULTILINE)
        path.write_text(text[:start] + pattern.sub(rf"\1 {value} ", text[start:], count=1))

    def append(self, file: str, text: str) -> None:
        with (self.path / file).open("a") as opened:
            opened.write(text)

    def shuffle_times(self) -> None:
        """Give every file a random time, as a clone or a checkout may."""
        generator = random.Random(0)
        for path in sorted(self.path.rglob("*")):
            if path.is_file() and ".git" not in path.parts and ".dvc" not in path.parts:
                when = time.time() - generator.uniform(0, 1e6)
                os.utime(path, (when, when))

    def results(self) -> dict[str, bytes]:
        """Content of every output and of dvc.lock."""
        folders = (self.path / "artifacts", self.path / "logs")
        files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
        kept = [file for file in files if file.name != ".snakemake_timestamp"]
        return {str(file): file.read_bytes() for file in [*kept, self.path / "dvc.lock"]}

    def copy(self, path: Path) -> "Checkout":
        shutil.copytree(self.path, path, symlinks=True)
        return Checkout(path)


def write_texts(directory: Path) -> None:
    """Some hundred documents of varied length."""
    directory.mkdir()
    generator = random.Random(1)
    words = ["sea", "keeps", "its", "colors", "when", "evening", "falls", "nobody", "counts"]
    with (directory / "all.jsonl").open("w") as file:
        for length in range(20, 320):
            text = " ".join(generator.choices(words, k=length))
            file.write(json.dumps({"text": text}) + "\n")


def make_checkout(path: Path) -> None:
    """Copy the files that git tracks and choose the miniature experiment; nothing is run."""
    listing = ["git", "ls-files", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path / name)
    shutil.copy(ROOT / "tests/miniature.yaml", path / "conf/miniature.yaml")
    write_texts(path / "texts")
    checkout = Checkout(path)
    checkout.run("git", "init", "-q", "-b", "main")
    checkout.run(str(BIN / "python"), "-m", "pocketlm", "preset", "miniature", "--force")
    checkout.commit("miniature")


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which nothing has been run."""
    place = made_once(tmp_path_factory, "fresh", lambda place: make_checkout(place / "checkout"))
    return Checkout(place / "checkout")


@pytest.fixture(scope="session")
def finished(fresh: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which Snakemake has run everything, committed and pushed to a local remote."""

    def make(place: Path) -> None:
        checkout = fresh.copy(place / "checkout")
        ran = checkout.steps_run_by(*SNAKEMAKE)
        assert ran == sorted(["tokenize", *FROM_TRAIN])
        checkout.run("dvc", "remote", "add", "--default", "storage", str(place / "remote"))
        checkout.commit("results")
        checkout.run("dvc", "push", "-q")

    return Checkout(made_once(tmp_path_factory, "finished", make) / "checkout")


@pytest.fixture
def checkout(finished: Checkout, tmp_path: Path) -> Checkout:
    return finished.copy(tmp_path / "checkout")


@pytest.fixture
def clone(finished: Checkout, tmp_path: Path) -> Checkout:
    """A clone with its data pulled and meaningless file times."""
    path = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(finished.path), str(path)], check=True)
    cloned = Checkout(path)
    cloned.run("dvc", "pull", "-q")
    cloned.shuffle_times()
    return cloned


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> list[str]:
    """The command that brings the report up to date, by either engine."""
    return ENGINES[request.param]


def test_row_1_snakemake_then_dvc(checkout: Checkout) -> None:
    before = checkout.results()
    assert checkout.steps_run_by(*ENGINES["dvc"]) == []
    assert checkout.results() == before


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


@second_engine_in_campaign
def test_row_3_a_train_value_and_back(checkout: Checkout, engine: list[str]) -> None:
    before = checkout.results()
    checkout.set("train.matrix_lr", "0.02")
    assert checkout.steps_run_by(*engine) == FROM_TRAIN
    checkout.run("git", "checkout", "-q", "params.yaml")
    assert checkout.steps_run_by(*engine) == []
    assert checkout.results() == before


@second_engine_in_campaign
def test_row_4_another_seed(checkout: Checkout, engine: list[str]) -> None:
    checkout.set("seeds", "[0, 1, 7]")
    expected = ["evaluate@7", "quantize@7", "report", "train@7", "ttt_eval@7"]
    assert checkout.steps_run_by(*engine) == expected


def test_row_5_clone_and_pull(clone: Checkout, engine: list[str]) -> None:
    assert clone.steps_run_by(*engine) == []
    shutil.rmtree(clone.path / "artifacts/ttt_eval")
    assert clone.steps_run_by(*engine) == []
    assert clone.run("git", "status", "--porcelain") == ""


def test_clone_without_pull_says_so(finished: Checkout, tmp_path: Path) -> None:
    path = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(finished.path), str(path)], check=True)
    assert "`dvc pull` fetches them" in Checkout(path).run("snakemake", "-n")


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


def test_row_8_edit_test_time_training(checkout: Checkout, engine: list[str]) -> None:
    checkout.append("model/ttt/loop.py", "# edited\n")
    assert checkout.steps_run_by(*engine) == sorted([*TTT, *REPORT])


@second_engine_in_campaign
def test_row_8_edit_quantization_then_the_report(checkout: Checkout, engine: list[str]) -> None:
    checkout.append("model/quantization/calibration_text.py", OTHER_CALIBRATION)
    assert checkout.steps_run_by(*engine) == FROM_QUANTIZE
    checkout.append("pocketlm/report/summary.py", "# edited\n")
    assert checkout.steps_run_by(*engine) == REPORT


@pytest.mark.campaign  # what a changed value of train runs, row 3, by the same way
def test_row_8_edit_the_model(checkout: Checkout, engine: list[str]) -> None:
    checkout.append("model/network/gpt.py", "# edited\n")
    assert checkout.steps_run_by(*engine) == FROM_TRAIN


@snakemake_in_campaign
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


@second_engine_in_campaign
def test_row_9_a_step_dies(checkout: Checkout, engine: list[str]) -> None:
    checkout.set("ttt.lr", "5e-4")
    first = checkout.steps_run_by(*engine, succeeds=False, DIE_IN="ttt_eval@1")
    assert "ttt_eval@1" in first
    assert "ttt_eval@1" in checkout.run("dvc", "status")
    second = checkout.steps_run_by(*engine)
    assert sorted([*first, *second]) == sorted([*TTT, "ttt_eval@1", *REPORT])
    assert "up to date" in checkout.run("dvc", "status")


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(("snakemake", "snakemake"), marks=pytest.mark.campaign),
        ("dvc", "dvc"),
        ("snakemake", "dvc"),
    ],
    ids="-".join,
)
def test_row_10_two_runs_at_once(checkout: Checkout, pair: tuple[str, str]) -> None:
    checkout.set("ttt.lr", "5e-4")
    runs = [checkout.start(*ENGINES[name]) for name in pair]
    outputs = [run.communicate()[0] for run in runs]
    clear = ("cannot be locked", "is busy", "Unable to acquire lock", "waiting for it")
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0 or any(message in output for message in clear), output
    assert any(run.returncode == 0 for run in runs), outputs
    assert not set(checkout.steps_run_by(*SNAKEMAKE)) - {*TTT, *REPORT}
    assert "up to date" in checkout.run("dvc", "status")
    assert checkout.steps_run_by(*ENGINES["dvc"]) == []


@second_engine_in_campaign
def test_row_11_a_value_of_the_evaluation(checkout: Checkout, engine: list[str]) -> None:
    checkout.set("evaluate.documents", "3")
    assert checkout.steps_run_by(*engine) == sorted([*EVALUATE, *TTT, *REPORT])


def test_row_12_how_a_run_is_executed(checkout: Checkout, engine: list[str]) -> None:
    """What one process has trained is evaluated by two, without training again."""
    changes = {"processes": 2, "log_every": 3, "save_every_seconds": 5.0, "ttt_documents": 2}
    for key, value in changes.items():
        checkout.set(f"execution.{key}", value)
    assert checkout.steps_run_by(*engine) == []


def test_row_13_accept_an_edit_that_changes_nothing(checkout: Checkout, engine: list[str]) -> None:
    checkout.append("model/training/trainer.py", "# edited\n")
    said = checkout.run(*ACCEPT, "train")
    for seed in (0, 1):
        assert f"train@{seed}: equal: losses of the first 4 optimizer steps" in said
    assert checkout.steps_run_by(*engine) == REPORT  # which counts the code that is shipped
    assert "up to date" in checkout.run("dvc", "status")


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
    stale = set(json.loads(checkout.run("dvc", "status", "--json")))
    assert stale == {"train@0", "quantize@0", *EVALUATE[:1], *TTT[:1], *REPORT}
    changed = {name for name, content in checkout.results().items() if content != before[name]}
    assert changed == {str(checkout.path / "dvc.lock")}


def test_what_changes_results_is_not_accepted(checkout: Checkout) -> None:
    before = checkout.results()
    checkout.append("model/training/schedule.py", HALF_THE_RATE)
    checkout.append("model/ttt/loop.py", "def ttt_losses(model, *rest):\n    return []\n")
    said = checkout.run(*ACCEPT, "train@1", succeeds=False)
    assert "error: train@1: other results than those stored: loss of step 2: " in said
    assert "in logs/train/seed1.jsonl" in said
    assert "its program failed" in checkout.run(*ACCEPT, "ttt_eval", succeeds=False)
    checkout.set("train.ema_decay", "0.5")  # shows only after the steps that are compared
    said = checkout.run(*ACCEPT, "train", succeeds=False)
    assert "train@0: not only code was changed: train.ema_decay is 0.5, was 0.997" in said
    assert "train@7: no such stage" in checkout.run(*ACCEPT, "train@7", succeeds=False)
    assert checkout.results() == before


def test_a_killed_run_can_be_continued(checkout: Checkout) -> None:
    """The lock that a killed Snakemake leaves is explained, and --unlock frees it."""
    checkout.set("ttt.lr", "5e-4")
    checkout.record.write_text("")
    process = checkout.start(*SNAKEMAKE)
    while "ttt_eval" not in checkout.record.read_text():
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # ends when the steps it had started have ended
    assert "snakemake --unlock" in checkout.run(*SNAKEMAKE, succeeds=False)
    checkout.run("snakemake", "--unlock")
    assert not set(checkout.steps_run_by(*SNAKEMAKE)) - {*TTT, *REPORT}
    assert "up to date" in checkout.run("dvc", "status")


def test_force_runs_a_step_again(checkout: Checkout) -> None:
    forced = ["--forcerun", "report", "--config", "force=1"]
    assert checkout.steps_run_by(*SNAKEMAKE, *forced) == REPORT


def test_nothing_to_do_is_quick(checkout: Checkout) -> None:
    checkout.run("snakemake", "-n")
    started = time.monotonic()
    assert "Nothing to be done" in checkout.run("snakemake", "-n")
    assert time.monotonic() - started < 5


def test_bad_parameters_stop_the_dry_run(checkout: Checkout) -> None:
    checkout.append("params.yaml", "  atention: auto\n")
    output = checkout.run("snakemake", "-n", succeeds=False)
    assert "params.yaml: ops.atention: unknown key" in output
    assert "did you mean ops.attention?" in output
    assert "Traceback" not in output


def test_experiment_keeps_hand_edits(checkout: Checkout) -> None:
    """`dvc exp run -S` changes the parameters in force, and a preset is not one of them."""
    checkout.set("report.significance", "0.02")
    ran = checkout.steps_run_by("dvc", "exp", "run", "-S", "ttt.lr=5e-4")
    assert ran == sorted([*TTT, *REPORT])
    values = yaml.safe_load((checkout.path / "params.yaml").read_text())
    assert (values["ttt"]["lr"], values["report"]["significance"]) == (5e-4, 0.02)
    assert values["train"]["steps"] == 12
    assert "ttt.lr" in checkout.run("dvc", "params", "diff")
    checkout.run("dvc", "exp", "run", "-S", "preset=h100", succeeds=False)
    assert yaml.safe_load((checkout.path / "params.yaml").read_text()) == values


def test_metrics_and_plots_show(checkout: Checkout, tmp_path: Path) -> None:
    shown = json.loads(checkout.run("dvc", "metrics", "show", "--json"))
    files = shown[""]["data"]
    assert "loss" in files["artifacts/ttt_eval/seed1/metrics.json"]["data"]
    page = tmp_path / "plots"
    checkout.run("dvc", "plots", "show", "--out", str(page))
    assert "train_seed1_curve_csv" in (page / "index.html").read_text()


def test_html_report_embeds_the_figures(checkout: Checkout, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    checkout.run("snakemake", "--report", str(page))
    text = page.read_text()
    for name in ("report.html", "loss_curves.svg", "ttt_gain.svg", "artifact_bytes.svg"):
        assert name in text
    assert "What test-time training gains by position" in text
