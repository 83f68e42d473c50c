"""Ablations: files, stages that runs share, and a real one on the miniature."""

import dataclasses
import json
import os
import re
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest

from model.runtime.errors import InputError
from model.runtime.provenance import write_provenance
from pocketlm.params.load import load_params
from pocketlm.params.paths import STEPS
from pocketlm.params.presets import render
from pocketlm.workflow.ablation import (
    Design,
    Variants,
    check_options,
    jobs,
    lines,
    read_ablation,
    results,
)
from pocketlm.workflow.shared_stages import Job, run_jobs
from tests.helpers.checkout import BIN, Checkout
from tests.helpers.presets import preset

ROOT = Path(__file__).parents[2]
FACTORS = """
runs: 4
seeds: [0, 1]
confirm: [0, 1]
always: {train.validation_documents: 3}
factors:
  rate: {train.matrix_lr: [0.02, 0.03]}
  MLP: {model.mlp_width: [64, 96], model.output_gate: [false, true]}
"""
VARIANTS = """
seeds: [0, 1]
baseline: plain
always: {train.validation_documents: 3}
variants:
  plain: {}
  damped: {quantize.damping: 0.02}
  damped, slow: {quantize.damping: 0.02, ttt.lr: 1.0e-4}
  slow: {ttt.lr: 1.0e-4}
  short: {train.budget_seconds: 9.0, quantize.budget_bytes: 15000000}
"""
KEYS = ("budget_seconds", "matrix_lr", "mlp_width", "damping", "lr")
# Stands for a stage: holds its GPUs alone, needs what it reads, notes that it ran.
STAGE = f"""
import json, os, pathlib, sys, time
stage, seed = sys.argv[1:]
text = pathlib.Path("params.yaml").read_text()
said = " ".join([stage, seed, *(line.split("#")[0].strip() for line in text.splitlines()
                 if line.strip().startswith({tuple(f"{key}:" for key in KEYS)!r}))])
gpus = os.environ.get("CUDA_VISIBLE_DEVICES", str(os.getpid()))
lock = pathlib.Path(os.environ["NOTES"], "gpu" + gpus)
lock.mkdir()
time.sleep(0.02)
for before in {{"tokenize": [], "train": [], "quantize": ["train"]}}.get(stage, ["quantize"]):
    pathlib.Path("artifacts", before, "seed" + seed, "provenance.json").read_text()
if stage != "tokenize":
    tokens = pathlib.Path("artifacts/tokenize/provenance.json").read_text()
    assert (tokens == "marked") == ("case_ops: true" in text)
waits = os.environ.get("WAITS", "none |").split("|")
ends = time.monotonic() + 120
while all(word in said for word in waits[0].split(",")):
    notes = [note.read_text() for note in lock.parent.glob("*.note")]
    if any(all(word in note for word in waits[1].split(",")) for note in notes):
        break
    if time.monotonic() > ends:
        sys.exit("waited in vain")
    time.sleep(0.02)
lock.rmdir()
(lock.parent / f"{{time.time_ns()}}-{{os.getpid()}}.note").write_text(said)
failing = os.environ.get("FAILS")
if failing and all(word in said for word in failing.split(",")):
    sys.exit("no")
place = pathlib.Path("artifacts", stage, "" if stage == "tokenize" else "seed" + seed)
place.mkdir(parents=True)
(place / "metrics.json").write_text(json.dumps({{"loss": 1.5, "bpb": 1.25}}))
details = {{"fineweb_bpb": {{"sliding": 1.2, "ttt": 1.1}}, "train": {{"tokens": 1234}}}}
(place / "details.json").write_text(json.dumps(details))
(place / "provenance.json").write_text("marked" if stage == "tokenize" else "")
"""


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    params = preset("demo")
    (tmp_path / "params.yaml").write_text(render(params))
    (tmp_path / "artifacts/tokenize").mkdir(parents=True)
    made_by = {name: dataclasses.asdict(getattr(params, name)) for name in ("data", "tokenizer")}
    sidecar = tmp_path / "artifacts/tokenize/provenance.json"
    write_provenance(sidecar, "tokenize", made_by, [], [])
    for name in ("dvc.yaml", "steps", "model", "pocketlm"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def notes(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stages, whose programs are STAGE, note that they ran."""
    (experiment / "stage.py").write_text(STAGE)
    place = experiment / "notes"
    place.mkdir()
    monkeypatch.setenv("NOTES", str(place))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words = [str(BIN / "python"), str(experiment / "stage.py")]
    monkeypatch.setattr(
        "pocketlm.workflow.shared_stages.command",
        lambda stage, seed, processes: [*words, stage, str(seed)],
    )
    return place


def ran(notes: Path) -> list[str]:
    """What ran since the last call: stages and seeds in the order in which they ended."""
    files = sorted(notes.glob("*.note"))
    found = [" ".join(file.read_text().split()[:2]) for file in files]
    for file in files:
        file.unlink()
    return found


def planned(text: str) -> list[Job]:
    path = Path("file.yaml")
    path.write_text(text)
    return jobs(path, read_ablation(path).named)


@pytest.mark.parametrize(
    ("name", "base"), [("best", "best"), ("hyperparameters", "best"), ("demo", "demo")]
)
def test_every_run_of_a_committed_design_is_valid(name: str, base: str, experiment: Path) -> None:
    """And its low levels are those of the preset."""
    params = preset(base)
    (experiment / "params.yaml").write_text(render(params))
    path = ROOT / f"conf/ablation/{name}.yaml"
    file = read_ablation(path)
    assert isinstance(file, Design)
    found = jobs(path, file.named)
    trained = {task.digest for job in found for task in job.tasks if task.stage == "train"}
    assert len(trained) == file.runs == len(file.levels)
    for factor in file.factors.values():
        for key, (low, high) in factor.items():
            section, setting = key.split(".")
            assert getattr(getattr(params, section), setting) == low != high


@pytest.mark.parametrize(
    ("name", "trainings"), [("recipe", 16), ("schedules", 10), ("sizes", 8), ("ttt", 1)]
)
def test_every_variant_of_a_committed_file_is_valid_and_another(
    name: str, trainings: int, experiment: Path
) -> None:
    """Those that differ in TTT share training and quantization with the preset."""
    params = preset("best")
    (experiment / "params.yaml").write_text(render(params))
    path = ROOT / f"conf/ablation/{name}.yaml"
    file = read_ablation(path)
    assert isinstance(file, Variants)
    found = [
        [task.digest for task in job.tasks if task.stage in STEPS] for job in jobs(path, file.named)
    ]
    assert len({last for *_, last in found}) == len(file.variants)
    assert len({first for first, *_ in found}) == trainings
    if trainings == 1:
        assert len({tuple(before) for *before, _ in found}) == 1


@pytest.mark.parametrize(
    ("text", "old", "new", "words"),
    [
        (FACTORS, "runs: 4", "runs: 6", "no power of two"),
        (FACTORS, "runs: 4", "runs: many", "runs: input should be a valid integer"),
        (FACTORS, "seeds: [0, 1]", "seeds: []", "seeds: list should have at least 1"),
        (FACTORS, "[0.02, 0.03]", "[0.02]", "at least 2 items"),
        (FACTORS, "rate:", "rate: {}\n  other:", "at least 1"),
        (FACTORS, "train.matrix_lr", "data.source", "must be the same for all runs"),
        (FACTORS, "train.matrix_lr", "execution.device", "must be the same for all runs"),
        (FACTORS, "train.matrix_lr", "train.budget_seconds", "must be the same for all runs"),
        (FACTORS, "train.matrix_lr", "train.matrix_lrr", "did you mean train.matrix_lr?"),
        (FACTORS, "train.matrix_lr", "model.mlp_width", "model.mlp_width: is set twice"),
        (FACTORS, "{train.validation", "{train.matrix_lr: 1, train.validation", "is set twice"),
        (FACTORS, "runs: 4", "runs: 4\nother: 1", "other: extra inputs"),
        (FACTORS, "factors:", "factors:\n  a: {ttt.lr: [1, 2]}\n  b: {ttt.rank: [1, 2]}", "leave"),
        (FACTORS, "factors:", "variants: {}\nfactors:", "factors, variants: both"),
        (FACTORS, FACTORS, "seeds: [0]", "factors, variants: neither"),
        (FACTORS, FACTORS, "[0]", "factors, variants: neither"),
        (VARIANTS, "baseline: plain", "baseline: other", "baseline: other: no such name"),
        (VARIANTS, "baseline: plain", "", "baseline: field required"),
        (VARIANTS, "baseline: plain", "baseline: plain\nruns: 4", "runs: extra inputs"),
        (VARIANTS, "baseline: plain", "baseline: plain\nseeds_of: {a: [1]}", "seeds_of: a: no su"),
        (VARIANTS, "baseline: plain", "baseline: plain\nagainst: {slow: a}", "against: a: no su"),
        (VARIANTS, "baseline: plain", "baseline: plain\nagainst: {a: slow}", "against: a: no su"),
        (VARIANTS, "baseline: plain", "baseline: plain\nagainst: {slow: slow}", "slow: is itself"),
        (VARIANTS, "baseline: plain", "baseline: plain\nagainst: {plain: slow}", "is the baseline"),
        (VARIANTS, "quantize.damping", "evaluate.offset", "variants: damped: evaluate.offset: m"),
        (VARIANTS, "quantize.damping", "execution.processes", "must be the same for all runs"),
        (VARIANTS, "quantize.damping", "train.validation_documents", "must be the same"),
        (VARIANTS, "3}", "3, ttt.lr: 1.0}", "variants: damped, slow: ttt.lr: is set twice"),
        (VARIANTS, "train.budget_seconds: 9.0", "train.budget: 9.0", "short"),
        (VARIANTS, "  damped: {", "  plain: {", "plain"),
    ],
)
def test_bad_files_are_refused_before_anything_runs(
    experiment: Path, text: str, old: str, new: str, words: str
) -> None:
    with pytest.raises(InputError) as refused:
        planned(text.replace(old, new))
    assert words in refused.value.problem + refused.value.repair
    assert "file.yaml" in refused.value.problem


def test_options_that_do_not_suit_the_file_are_refused(experiment: Path) -> None:
    path = Path("file.yaml")
    for text, confirm, chosen, words in (
        (FACTORS, True, ["MPL"], "MPL: no such name"),
        (VARIANTS, False, ["dampd"], "dampd: no such name"),
        (VARIANTS, False, ["damped", "slow"], "are several variants"),
        (VARIANTS, True, [], "has no factors"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            check_options(read_ablation(path), path, confirm, chosen, [], so_far=False)
    path.write_text(FACTORS)
    for confirm, only, words in (
        (True, [], "--so-far.*--confirm"),
        (False, ["run 1"], "--so-far.*--only"),
        (False, ["run 4"], "run 4: no such name"),
    ):
        with pytest.raises(InputError, match=words):
            check_options(read_ablation(path), path, confirm, [], only, so_far="so-far" in words)


def test_the_baseline_is_all_low_and_the_best_has_what_was_chosen(experiment: Path) -> None:
    base, *_ = planned(FACTORS)
    path = Path("file.yaml")
    file = read_ablation(path)
    assert isinstance(file, Design)
    before, best = jobs(path, file.confirmed(["MLP"]))
    for job, rate, width, gate in ((base, 0.02, 64, False), (before, 0.02, 64, False)):
        assert job.params.train.matrix_lr == rate
        assert (job.params.model.mlp_width, job.params.model.output_gate) == (width, gate)
    assert (best.params.train.matrix_lr, best.params.model.mlp_width) == (0.02, 96)
    assert best.params.model.output_gate
    assert before.params.train.validation_documents == 3


def test_variants_share_the_stages_that_read_the_same(
    notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing runs again, neither in the next call nor with a variant more."""
    found = planned(VARIANTS)
    assert run_jobs(found, at_once=3) == found
    once = {"train": 2, "quantize": 3, "evaluate": 3, "ttt_eval": 5}
    expected = {f"{stage} {seed}": once[stage] for stage in STEPS for seed in (0, 1)}
    assert Counter(ran(notes)) == expected
    said = capsys.readouterr().out.splitlines()
    assert len(said) == sum(expected.values())
    trained = r"/26 plain and 3 others: train of seed 1: \d+ s, 1.5000 nats"
    assert any(re.search(trained, line) for line in said)
    assert next(line for line in said if "damped, slow: ttt_eval of seed 1" in line).endswith(
        "1.2500 bpb, 1.1000 weighted to FineWeb's lengths"
    )
    assert run_jobs(planned(VARIANTS))
    assert ran(notes) == []
    path = Path("file.yaml")
    assert lines(read_ablation(path), planned(VARIANTS))[-1] == "to run: nothing"
    more = planned(VARIANTS.replace("variants:", "variants:\n  slower: {ttt.lr: 5.0e-5}"))
    assert run_jobs(more) == more
    assert ran(notes) == ["ttt_eval 0", "ttt_eval 1"]


def test_a_run_with_another_tokenizer_makes_its_own_tokens(
    notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once for all that have it; what lies here stays as it is, whatever params.yaml says now."""
    text = """
seeds: [0, 1]
baseline: plain
variants:
  plain: {}
  marks: {tokenizer.case_ops: true}
  marks, slow: {tokenizer.case_ops: true, ttt.lr: 1.0e-4}
"""
    before = Path("artifacts/tokenize/provenance.json").read_bytes()
    found = planned(text)
    path = Path("file.yaml")
    left = lines(read_ablation(path), found)[-1]
    assert "4 trainings" in left
    assert "1 tokenize" in left
    assert run_jobs(found, at_once=3) == found
    counted = Counter(ran(notes))
    assert counted.pop("tokenize None") == 1
    once = {"train": 2, "quantize": 2, "evaluate": 2, "ttt_eval": 3}
    assert counted == {f"{stage} {seed}": once[stage] for stage in STEPS for seed in (0, 1)}
    assert "marks and 1 other: tokenize: " in (said := capsys.readouterr().out)
    assert "1,234 tokens to train on" in said
    assert Path("artifacts/tokenize/provenance.json").read_bytes() == before
    assert run_jobs(planned(text))
    assert ran(notes) == []
    params = preset("demo", "tokenizer.training_megabytes=9")
    Path("params.yaml").write_text(render(params))
    stale, *_ = planned(text)
    assert stale.tasks[0].stage == "tokenize"


def test_a_seed_of_one_variant_alone_costs_that_variant_alone(notes: Path) -> None:
    text = VARIANTS.replace("seeds: [0, 1]", "seeds: [0]\nseeds_of: {plain: [0, 1, 2]}")
    run_jobs(planned(text))
    assert Counter(ran(notes))["ttt_eval 0"] == 5
    run_jobs(planned(text))
    assert ran(notes) == []


def test_what_is_not_read_does_not_count_and_what_is_does(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, how runs are executed, tokens and code."""

    def digests() -> list[str]:
        return [task.digest for task in planned(VARIANTS)[0].tasks[:4]]

    before = digests()
    params = experiment / "params.yaml"
    text = params.read_text()
    for old, new, changed in (
        ("  chunk: 16 ", "  chunk: 8 ", ["ttt_eval"]),
        ("sliding_stride: 64", "sliding_stride: 32", ["evaluate"]),
        ("damping: 0.01", "damping: 0.03", ["quantize", "evaluate", "ttt_eval"]),
        ("  width: 128 ", "  width: 64 ", list(STEPS)),
        ("compile: false", "compile: true", list(STEPS)),
        ("confidence: 0.95", "confidence: 0.9", []),
    ):
        assert old in text
        params.write_text(text.replace(old, new))
        pairs = zip(STEPS, before, digests(), strict=True)
        assert [stage for stage, one, other in pairs if one != other] == changed
    params.write_text(text)
    assert digests() == before
    sidecar = experiment / "artifacts/tokenize/provenance.json"
    of_these, made_by = sidecar.read_bytes(), json.loads(sidecar.read_text())["params"]
    write_provenance(sidecar, "tokenize", made_by, [experiment / "dvc.yaml"], [])
    assert not set(before) & set(digests())
    sidecar.write_bytes(of_these)
    (experiment / "steps").unlink()
    (experiment / "steps").mkdir()
    for file in (ROOT / "steps").glob("*.py"):
        (experiment / "steps" / file.name).write_bytes(file.read_bytes())
    assert digests() == before
    with (experiment / "steps/ttt_eval.py").open("a") as program:
        program.write("# other\n")
    assert [one == other for one, other in zip(before, digests(), strict=True)] == [1, 1, 1, 0]


def test_as_many_run_at_once_as_gpus_suffice_for_each_on_its_own(
    notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What fails takes along what reads it, says where to look, and runs again, alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    two = "execution.processes: 2, train.tokens_per_microbatch: 512, "
    text = FACTORS.replace("always: {", f"always: {{{two}")
    monkeypatch.setenv("FAILS", "quantize 1,matrix_lr: 0.03,mlp_width: 96")
    found = planned(text)
    done = run_jobs(found)
    assert [job.name for job in found if job not in done] == ["run 3"]
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if "failed; see" in line)
    assert "run 3: quantize of seed 1 failed" in line
    assert Path(line.split("see ")[1]).read_text() == "no\n"
    assert said.count("not run, as a stage before it has failed") == 2
    assert Counter(ran(notes)) == {
        f"{stage} {seed}": 3 if seed and "eval" in stage else 4
        for stage in STEPS
        for seed in (0, 1)
    }
    monkeypatch.delenv("FAILS")
    assert len(run_jobs(planned(text))) == 4
    assert ran(notes)[:1] == ["quantize 1"]
    assert ran(notes) == []


def test_trainings_go_first_and_no_gpu_waits_for_one(
    notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that ends only after another variant's last stage holds up nothing else."""
    text = VARIANTS.replace("seeds: [0, 1]", "seeds: [0]")
    run_jobs(planned(text), at_once=1)
    assert [one.split()[0] for one in ran(notes)] == [
        stage for stage, count in zip(STEPS, (2, 3, 3, 5), strict=True) for _ in range(count)
    ]
    other = text.replace("short:", "short: {train.budget_seconds: 8.0}\n  shorter:")
    other = other.replace("  plain: {}", "  plain: {train.matrix_lr: 0.01}")
    monkeypatch.setenv("WAITS", "train,matrix_lr: 0.01|ttt_eval,budget_seconds: 8.0")
    found = planned(other)
    assert run_jobs(found, at_once=2) == found


def test_what_is_interrupted_goes_on(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM ends the stages that are going on; the next call runs these and what is left."""
    text = VARIANTS.replace("seeds: [0, 1]", "seeds: [0]")
    monkeypatch.setenv("WAITS", "train,budget_seconds: 9.0|never")

    def interrupt() -> None:
        while sum("quantize" in note.read_text() for note in notes.glob("*.note")) < 2:
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit):
        run_jobs(planned(text), at_once=2)
    for lock in notes.glob("gpu*"):
        lock.rmdir()
    before = ran(notes)
    assert before[0] == "train 0"
    monkeypatch.delenv("WAITS")
    found = planned(text)
    assert run_jobs(found, at_once=1) == found
    after = ran(notes)
    assert after.count("train 0") == 1
    # One may have been ended after its note and before its sidecar.
    assert len(before) + len(after) in (13, 14)


def test_without_any_result_there_is_nothing_to_compare() -> None:
    with pytest.raises(InputError, match="no run has succeeded"):
        results([])


@pytest.mark.campaign
@pytest.mark.workflow
def test_an_ablation_of_the_miniature(checkout: Checkout) -> None:
    """From the command line: design, confirmation, files; nothing runs a second time."""
    (checkout.path / "file.yaml").write_text(FACTORS)
    pocketlm = [str(BIN / "python"), "-m", "pocketlm", "ablation", "file.yaml"]
    assert "8 trainings of 12 steps" in checkout.run(*pocketlm, "--dry-run")
    ran = checkout.steps_run_by(*pocketlm, "--confirm", "--choose", "MLP", "--jobs", "2")
    # Four runs: baseline and best are among them, with the same seeds.
    assert ran == sorted(f"{stage}@{seed}" for stage in STEPS for seed in (0, 1) for _ in range(4))
    recipe = json.loads((checkout.path / "artifacts/ablation/recipe.json").read_text())
    assert {row["name"] for row in recipe["ablation"]} == {"rate", "MLP"}
    assert recipe["best_trained_bpb"] > 0
    assert recipe["best_total_bytes"] < 16_000_000
    assert recipe["tokens_per_s_per_gpu_recurrent"] is None
    text = (checkout.path / "artifacts/ablation/recipe.md").read_text()
    assert "The baseline and the best" in text
    assert checkout.steps_run_by(*pocketlm) == []
    assert (checkout.path / "artifacts/ablation/recipe.svg").exists()
    assert load_params(checkout.path / "params.yaml").train.validation_documents == 4


@pytest.mark.campaign
@pytest.mark.workflow
def test_variants_of_the_miniature(checkout: Checkout) -> None:
    """Results of shared stages are verified and read as any; TTT's need no training."""
    text = """
seeds: [0]
baseline: plain
variants:
  plain: {}
  damped: {quantize.damping: 0.05}
  slow: {ttt.lr: 1.0e-4}
  steep: {train.matrix_lr: 0.05}
  other pieces: {tokenizer.vocabulary: 310, model.vocabulary: 310}
"""
    (checkout.path / "file.yaml").write_text(text)
    pocketlm = [str(BIN / "python"), "-m", "pocketlm", "ablation", "file.yaml"]
    two = ("--only", "plain", "--only", "slow")
    assert "1 training of 12 steps" in checkout.run(*pocketlm, *two, "--dry-run")
    ran = checkout.steps_run_by(*pocketlm, *two, "--jobs", "2")
    assert ran == ["evaluate@0", "quantize@0", "train@0", "ttt_eval@0", "ttt_eval@0"]
    assert "2 of 5 runs" in (checkout.path / "artifacts/ablation/recipe.md").read_text()
    ran = checkout.steps_run_by(*pocketlm, "--jobs", "2")
    counts = zip(STEPS, (2, 3, 3, 3), strict=True)
    stages = [f"{stage}@0" for stage, count in counts for _ in range(count)]
    assert ran == sorted(["tokenize", *stages])
    recipe = json.loads((checkout.path / "artifacts/ablation/recipe.json").read_text())
    rows = {row["name"]: row for row in recipe["ablation"]}
    assert {name: row["seeds"] for name, row in rows.items()} == {
        "damped": "same trainings",
        "slow": "same trainings",
        "steep": "not included",
        "other pieces": "not included",
    }
    assert rows["slow"]["trained_bpb"] == rows["slow"]["gap"] == rows["slow"]["bytes"] == 0
    assert rows["damped"]["gap"] != 0 != rows["steep"]["trained_bpb"]
    (checkout.path / "file.yaml").write_text(text + "  not yet: {ttt.lr: 2.0e-4}\n")
    assert checkout.steps_run_by(*pocketlm, "--so-far") == []
    again = json.loads((checkout.path / "artifacts/ablation/recipe.json").read_text())
    assert again.pop("sources") == [recipe.pop("sources")[0] | {"runs": "5 of 6"}]
    assert again == recipe
    (checkout.path / "other.yaml").write_text(text.replace("  damped", "  more damped"))
    earlier = ("--earlier", "artifacts/ablation/recipe.json")
    assert checkout.steps_run_by(*pocketlm[:-1], "other.yaml", "--so-far", *earlier) == []
    both = (checkout.path / "artifacts/ablation/recipe.md").read_text()
    assert both.index("## other.yaml\n\n5 of 5 runs") < both.index("## file.yaml\n\n5 of 6 runs")
    assert both.count("| more damped |") == both.count("| damped |") == 2
    for table in (checkout.path / ".work/ablation").glob("ttt_eval-*/**/losses.parquet"):
        table.write_bytes(table.read_bytes()[:-1] + b"?")
    assert "is not what ttt_eval@0 wrote" in checkout.run(*pocketlm, succeeds=False)
