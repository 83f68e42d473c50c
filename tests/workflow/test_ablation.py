"""Ablations: files, plans, and a real one on the miniature."""

import json
from pathlib import Path

import pytest

from model.runtime.errors import InputError
from pocketlm.params.load import load_params
from pocketlm.params.presets import compose, render
from pocketlm.workflow.ablation import confirm_jobs, design_jobs, read_ablation, run_jobs
from tests.helpers.checkout import BIN, Checkout

ROOT = Path(__file__).parents[2]
FILE = """
runs: 4
seeds: [0, 1]
confirm: [0, 1]
always: {train.validation_documents: 3}
factors:
  rate: {train.matrix_lr: [0.02, 0.03]}
  MLP: {model.mlp_width: [64, 96], model.output_gate: [false, true]}
"""


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text(render(compose("demo", directory=ROOT / "conf")))
    (tmp_path / "file.yaml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pocketlm.workflow.ablation._version", lambda: "")
    return tmp_path


@pytest.mark.parametrize(("name", "preset"), [("best", "best"), ("demo", "demo")])
def test_every_run_of_a_committed_ablation_is_valid(
    name: str, preset: str, experiment: Path
) -> None:
    """And its low levels are those of the preset."""
    params = compose(preset, directory=ROOT / "conf")
    (experiment / "params.yaml").write_text(render(params))
    path = ROOT / f"conf/ablation/{name}.yaml"
    file = read_ablation(path)
    planned, levels = design_jobs(path, file)
    assert len({job.folder for job in planned}) == len(planned) == file.runs == len(levels)
    for factor in file.factors.values():
        for key, (low, high) in factor.items():
            section, setting = key.split(".")
            assert getattr(getattr(params, section), setting) == low != high


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("runs: 4", "runs: 6", "no power of two"),
        ("runs: 4", "runs: many", "runs: input should be a valid integer"),
        ("seeds: [0, 1]", "seeds: []", "seeds: list should have at least 1"),
        ("[0.02, 0.03]", "[0.02]", "at least 2 items"),
        ("rate:", "rate: {}\n  other:", "at least 1"),
        ("train.matrix_lr", "data.source", "must be the same for all runs"),
        ("train.matrix_lr", "model.vocabulary", "must be the same for all runs"),
        ("train.matrix_lr", "train.validation_documents", "is set twice"),
        ("train.matrix_lr", "train.matrix_lrr", "did you mean train.matrix_lr?"),
        ("runs: 4", "runs: 4\nother: 1", "other: extra inputs"),
        ("factors:", "factors:\n  a: {ttt.lr: [1, 2]}\n  b: {ttt.rank: [1, 2]}", "leave nothing"),
    ],
)
def test_bad_files_are_refused_before_anything_runs(
    experiment: Path, old: str, new: str, words: str
) -> None:
    (experiment / "file.yaml").write_text(FILE.replace(old, new))
    with pytest.raises(InputError) as refused:
        design_jobs(Path("file.yaml"), read_ablation(Path("file.yaml")))
    assert words in refused.value.problem + refused.value.repair
    assert "file.yaml" in refused.value.problem


def test_the_baseline_is_all_low_and_the_best_has_what_was_chosen(experiment: Path) -> None:
    path = Path("file.yaml")
    file = read_ablation(path)
    (base, *_), _ = design_jobs(path, file)
    before, best = confirm_jobs(path, file, ["MLP"])
    for job, rate, width, gate in ((base, 0.02, 64, False), (before, 0.02, 64, False)):
        assert job.params.train.matrix_lr == rate
        assert (job.params.model.mlp_width, job.params.model.output_gate) == (width, gate)
    assert (best.params.train.matrix_lr, best.params.model.mlp_width) == (0.02, 96)
    assert best.params.model.output_gate
    assert before.params.train.validation_documents == 3
    with pytest.raises(InputError, match="no such factor"):
        confirm_jobs(path, file, ["MPL"])


def test_as_many_run_at_once_as_gpus_suffice_for_each_on_its_own(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails is left out; what is done is not run again."""
    stage = (
        "import os, pathlib, sys, time\n"
        "stage, seed, gpus = sys.argv[1], sys.argv[2], os.environ['CUDA_VISIBLE_DEVICES']\n"
        "place = pathlib.Path('artifacts', stage, 'seed' + seed)\n"
        "place.mkdir(parents=True)\n"
        "lock = pathlib.Path(os.environ['LOCKS'], gpus)\n"
        "lock.mkdir()\n"  # fails if another run holds these GPUs
        "time.sleep(0.05)\n"
        "lock.rmdir()\n"
        "text = pathlib.Path('params.yaml').read_text()\n"
        "sys.exit(stage == 'quantize' and 'matrix_lr: 0.03' in text and 'mlp_width: 96' in text)\n"
    )
    (experiment / "stage.py").write_text(stage)
    publish = "pathlib.Path(place, 'provenance.json').write_text('')\n"
    (experiment / "stage.py").write_text(stage.replace("text =", f"{publish}text ="))
    locks = experiment / "locks"
    locks.mkdir()
    monkeypatch.setenv("LOCKS", str(locks))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    monkeypatch.setattr(
        "pocketlm.workflow.ablation.command",
        lambda stage, seed, processes: [
            str(BIN / "python"),
            str(experiment / "stage.py"),
            stage,
            str(seed),
        ],
    )
    path = Path("file.yaml")
    path.write_text(
        FILE.replace(
            "always: {", "always: {execution.processes: 2, train.tokens_per_microbatch: 512, "
        )
    )
    planned, _ = design_jobs(path, read_ablation(path))
    done = run_jobs(planned)
    assert [job.name for job in planned if job not in done] == ["run 3"]
    times = {job.name: (job.folder / "output.txt").stat().st_mtime_ns for job in done}
    assert run_jobs(planned[:3]) == done
    assert times == {job.name: (job.folder / "output.txt").stat().st_mtime_ns for job in done}


@pytest.mark.campaign
@pytest.mark.workflow
def test_an_ablation_of_the_miniature(checkout: Checkout) -> None:
    """From the command line: design, confirmation, files; nothing runs a second time."""
    (checkout.path / "file.yaml").write_text(FILE)
    pocketlm = [str(BIN / "python"), "-m", "pocketlm", "ablation", "file.yaml"]
    assert "8 trainings of 12 steps" in checkout.run(*pocketlm, "--dry-run")
    ran = checkout.steps_run_by(*pocketlm, "--confirm", "--choose", "MLP", "--jobs", "2")
    runs = 4  # all there are: baseline and best are among them, with the same seeds
    assert ran == sorted(
        f"{stage}@{seed}"
        for stage in ("train", "quantize", "evaluate", "ttt_eval")
        for seed in (0, 1)
        for _ in range(runs)
    )
    recipe = json.loads((checkout.path / "artifacts/ablation/recipe.json").read_text())
    assert {row["name"] for row in recipe["ablation"]} == {"rate", "MLP"}
    assert recipe["best_trained_bpb"] > 0
    assert recipe["best_total_bytes"] < 16_000_000
    assert recipe["tokens_per_s_per_gpu_recurrent"] is None
    text = (checkout.path / "artifacts/ablation/recipe.md").read_text()
    assert "confirmed" in text
    assert checkout.steps_run_by(*pocketlm) == []
    assert (checkout.path / "artifacts/ablation/recipe.svg").exists()
    assert load_params(checkout.path / "params.yaml").train.validation_documents == 4
