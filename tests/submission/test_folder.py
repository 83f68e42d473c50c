"""The folder of a submission: one source of numbers, refused while the audit fails."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from model.runtime.distributed import Group
from model.runtime.errors import InputError
from model.runtime.files import read_json, write_bytes, write_json
from model.runtime.run_log import read_log
from pocketlm.params.params import Params
from pocketlm.params.presets import render
from pocketlm.submission.config import SubmissionConfig
from pocketlm.submission.folder import write_folder
from steps.common import StageRun
from steps.report import main as make_report
from tests.helpers.presets import preset
from tests.helpers.report_inputs import write_seed
from tests.helpers.sidecars import write_sidecar

ROOT = Path(__file__).parents[2]
CODE = b"# code\n" * 10_000
CHECKS = ("bytes", "causality", "score before update")
LOG = re.compile(r"seed(\d+)_(\w+)\.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    """A directory in which all stages and the audit have run, of which every test has a copy."""
    place, params = tmp_path_factory.mktemp("finished"), preset("demo")
    for name in ("pyproject.toml", "constraints.txt"):
        write_bytes(place / name, (ROOT / name).read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("steps.report.code_bytes", lambda params: (len(CODE), 60_000))
        Path("params.yaml").write_text(render(params))
        for seed in params.seeds:
            write_seed(Path("."), seed)
        make_report(StageRun("report", None, params, Group(0, 1, torch.device("cpu"))))
        write_audit([])
    return place, params


@pytest.fixture
def params(
    finished: tuple[Path, Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Params:
    """Parameters of a directory, the current one, in which all stages and the audit have run."""
    place, params = finished
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pocketlm.submission.folder.bundle", lambda settings: CODE)
    return params


def write_audit(failed: list[str]) -> None:
    checks: list[dict[str, Any]] = [
        {"name": name, "seed": seed, "passed": name not in failed, "problems": [], "evidence": "e"}
        for name in CHECKS
        for seed in (0, 1, 2)
    ]
    write_json("artifacts/audit/audit.json", {"failed": failed, "checks": checks})
    Path("artifacts/audit/audit.md").write_text("# Audit\n")
    write_sidecar(Path("."), "audit", "audit.json", "audit.md")


def despite(params: Params) -> Params:
    changed = dataclasses.replace(params.submission, despite_audit=True)
    return dataclasses.replace(params, submission=changed)


def test_numbers_of_readme_json_and_logs_are_the_same(params: Params) -> None:
    folder = write_folder(params)
    values = read_json(folder / "submission.json")
    readme = (folder / "README.md").read_text()
    assert folder == Path("records", f"{values['date']}_demo")
    assert values["seeds"] == [0, 1, 2]
    for seed, result in values["seed_results"].items():
        ends: dict[str, Any] = {
            stage: read_log(folder / f"logs/seed{seed}_{stage}.jsonl", "end")[-1]["metrics"]
            for stage in ("train", "quantize", "ttt_eval")
        }
        assert result["val_loss"] == ends["ttt_eval"]["loss"]
        assert result["val_bpb"] == ends["ttt_eval"]["bpb"]
        assert result["artifact_bytes"] == ends["quantize"]["artifact_bytes"]
        assert result["train_seconds"] == ends["train"]["seconds"]
        assert result["eval_seconds"] == ends["ttt_eval"]["seconds"]["ttt"]
        row = next(line for line in readme.splitlines() if line.startswith(f"| {seed} |"))
        assert f"{result['val_loss']:.8f}" in row
        assert f"{result['artifact_bytes']:,}" in row
    assert f"{values['val_bpb']:.4f} ± {values['val_bpb_std']:.4f}" in readme
    assert f"{values['bytes_total']:,}" in readme
    assert values["bytes_code"] == len((folder / "bundle.py").read_bytes())
    assert values["bytes_code_scoring"] < values["bytes_code"]
    assert values["compliance"]["audit"] == dict.fromkeys(CHECKS, True)
    assert "FAIL" not in readme


def test_has_the_logs_of_all_stages_and_seeds(params: Params) -> None:
    folder = write_folder(params)
    names = [file.name for file in (folder / "logs").iterdir()]
    assert len(names) == 3 * 4
    for name in names:
        seed, stage = LOG.fullmatch(name).groups()  # type: ignore[union-attr]
        original = Path("logs", stage, f"seed{seed}.jsonl")
        assert (folder / "logs" / name).read_bytes() == original.read_bytes()


def test_requirements_are_pinned_and_begin_with_what_scores(params: Params) -> None:
    lines = (write_folder(params) / "requirements.txt").read_text().splitlines()
    assert lines[1].startswith("torch==")
    assert all("==" in line for line in lines if not line.startswith("#"))
    assert {"pydantic", "safetensors", "pyarrow"} <= {line.split("==")[0] for line in lines}
    assert len(lines) == len(set(lines))


def test_is_refused_while_a_check_fails_unless_told_otherwise(params: Params) -> None:
    write_audit(["causality"])
    with pytest.raises(InputError, match="audit: causality: failed") as error:
        write_folder(params)
    assert "submission.despite_audit" in error.value.repair
    assert not list(Path("records").glob("*"))
    folder = write_folder(despite(params))
    readme = (folder / "README.md").read_text().splitlines()
    assert readme[2].startswith("THE AUDIT FAILS: causality.")
    assert read_json(folder / "submission.json")["compliance"]["audit"]["causality"] is False


@pytest.mark.parametrize("file", ["artifacts/report/summary.json", "artifacts/audit/audit.json"])
def test_edited_results_are_refused(params: Params, file: str) -> None:
    path = Path(file)
    path.write_text(path.read_text().replace("true", "false").replace("1.", "0.", 1))
    with pytest.raises(InputError, match=re.escape(file)):
        write_folder(params)


def test_a_report_that_counted_other_code_is_refused(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketlm.submission.folder.bundle", lambda settings: CODE + b"x")
    with pytest.raises(InputError, match="bytes of code"):
        write_folder(params)


def test_is_written_again_as_a_whole(params: Params) -> None:
    folder = write_folder(params)
    (folder / "stale.txt").write_text("of an earlier time")
    assert write_folder(params) == folder
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in Path("records").iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["", "../x", "a b", ".hidden", "x" * 100])
def test_a_name_must_be_that_of_a_folder(name: str) -> None:
    values = dataclasses.asdict(preset("demo").submission)
    with pytest.raises(ValueError, match="no name of a folder"):
        SubmissionConfig(**{**values, "name": name})


def test_json_is_plain(params: Params) -> None:
    text = (write_folder(params) / "submission.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["track"] == params.submission.track
