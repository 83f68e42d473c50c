"""Several nodes for one stage, without Slurm: what is asked of it, and what nodes compare."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.runtime.distributed import require_gpus
from model.runtime.errors import InputError
from model.runtime.lock import held, holder
from pocketlm.workflow import nodes, scheduler
from pocketlm.workflow.gpus import claim_gpus
from pocketlm.workflow.nodes import NOTE, meet, srun

ROOT = Path(__file__).parents[2]


def allocation(monkeypatch: pytest.MonkeyPatch, place: Path, answer: str) -> None:
    """Let this be a job of Slurm whose `squeue` answers so."""
    (place / "squeue").write_text(f"#!/bin/sh\necho {answer}\n")
    (place / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")


@pytest.mark.parametrize(("job", "answer"), [(False, ""), (True, "1")])
def test_too_few_nodes_are_said_before_anything_starts(tmp_path, monkeypatch, job, answer) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        allocation(monkeypatch, tmp_path, answer)
    with pytest.raises(InputError, match=r"execution\.nodes: 2 nodes, but") as caught:
        srun(2, 4, tmp_path, [sys.executable, "-m", "steps.train"])
    assert ("job 7 of Slurm has 1" in caught.value.problem) == job
    assert not (tmp_path / NOTE).exists()


@pytest.mark.parametrize("answer", ["2", "slurm_load_jobs error"])
def test_a_node_that_does_not_see_the_checkout_or_has_other_packages_is_named(
    tmp_path, monkeypatch, answer
) -> None:
    allocation(monkeypatch, tmp_path, answer)
    words = srun(2, 4, tmp_path, [sys.executable, "-m", "steps.train"])
    assert words[0] == "srun"
    assert words[words.index("pocketlm.workflow.torchrun") + 1] == "4"
    reference = words[words.index("--nodes") + 1]
    assert meet(reference)["nodes"] == 2
    monkeypatch.setattr(nodes, "PATIENCE", 0)
    monkeypatch.setenv("SLURMD_NODENAME", "node9")
    for wrong in (f"{tmp_path}/absent.json#1", reference.replace("#", "#0")):
        with pytest.raises(InputError, match=r"node9: .* is not what the launcher has written"):
            meet(wrong)
    note = json.loads((tmp_path / NOTE).read_text())
    note["packages"]["torch"] = "1.0"
    (tmp_path / NOTE).write_text(json.dumps(note))
    with pytest.raises(InputError, match=r"node9: torch is .*, but 1\.0 where"):
        meet(reference)


@pytest.mark.campaign
def test_a_lone_node_says_for_whom_it_waits(tmp_path, monkeypatch) -> None:
    allocation(monkeypatch, tmp_path, "2")
    words = srun(2, 2, tmp_path, [sys.executable, "-m", "steps.train", "--seed", "0"])
    program = (
        "from pocketlm.workflow import nodes, torchrun; torchrun.MEETING = nodes.MEETING = 3; "
    )
    started = [sys.executable, "-c", f"{program} torchrun.main()"]
    done = subprocess.run(
        [*started, *words[words.index("pocketlm.workflow.torchrun") + 1 :]],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "steps.train: " in done.stderr
    assert "waited 3 s at" in done.stderr
    assert "for 2 nodes, and not all came" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("elsewhere", "shared", "expected"),
    [
        (False, (2, 1, "cuda"), {"gpu": 2}),
        (True, (2, 1, "auto"), {"nodes": 1}),
        (True, (8, 1, "cuda"), {"nodes": 1, "gres": "gpu:8"}),
        (
            True,
            (16, 2, "cuda"),
            {"nodes": 2, "gres": "gpu:8", "mpi": "srun", "tasks": 2, "tasks_per_gpu": 0},
        ),
    ],
)
def test_a_stage_is_kept_together_on_its_nodes(monkeypatch, elsewhere, shared, expected) -> None:
    monkeypatch.setattr(scheduler, "is_elsewhere", lambda: elsewhere)
    assert scheduler.shares(*shared) == expected


def test_a_preset_for_gpus_is_not_trained_on_a_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require_gpus(8)
    with pytest.raises(InputError, match=r"execution\.device: cuda, but torch finds no GPU"):
        require_gpus(1, "cuda")


def test_slots_of_another_host_are_other_gpus(tmp_path, monkeypatch) -> None:
    for host in ("node1", "node2"):
        monkeypatch.setenv("SLURMD_NODENAME", host)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
        files = claim_gpus(2, tmp_path)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert [Path(file.name).parent.name for file in files] == [host] * 2


FAILS_ONCE = """#!/bin/sh
[ -e {place}/answers ] && echo 7 && exit
touch {place}/answers
echo 'sbatch: error: Batch job submission failed: {reason}' >&2
exit 1
"""


def cluster_command(
    name: str, place: Path, *words: str, given: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command of profiles/slurm/bin, beside which those of `place` stand for Slurm's."""
    for command in place.iterdir():
        command.chmod(0o755)
    own = ROOT / "profiles/slurm/bin"
    return subprocess.run(
        [name, *words],
        cwd=place.parent,
        env=os.environ | {"PATH": f"{own}:{place}:{os.environ['PATH']}"},
        input=given,
        capture_output=True,
        text=True,
    )


def test_commands_of_the_profile_outlast_the_controller_and_its_memory(tmp_path) -> None:
    place = tmp_path / "slurm"
    place.mkdir()
    (place / "sleep").write_text("#!/bin/sh\n")
    away = "Unable to contact slurm controller (connect failure)"
    (place / "sbatch").write_text(FAILS_ONCE.format(place=place, reason=away))
    submitted = cluster_command("sbatch", place, "--parsable", "--job-name", "call", "-t", "5")
    assert (submitted.returncode, submitted.stdout, submitted.stderr) == (0, "7\n", "")
    asked = ["--format=%i|%T", "--states=all", "--noheader", "--name"]
    (place / "squeue").write_text("#!/bin/sh\necho '8|RUNNING'\n")
    forgotten = cluster_command("squeue", place, *asked, "call")
    assert forgotten.stdout.split() == ["8|RUNNING", "7|COMPLETED"]
    assert cluster_command("squeue", place, *asked, "other").stdout.split() == ["8|RUNNING"]
    (place / "sacct").write_text("#!/bin/sh\necho 'storage is disabled' >&2\nexit 1\n")
    words = ["-X", "--endtime", "now", "--name", "call"]
    assert cluster_command("sacct", place, *words).stdout == forgotten.stdout
    (place / "squeue").write_text("#!/bin/sh\nexit 3\n")
    assert cluster_command("squeue", place, *asked, "call").returncode == 3

    (place / "answers").unlink()
    (place / "sbatch").write_text(FAILS_ONCE.format(place=place, reason="Invalid partition"))
    refused = cluster_command("sbatch", place, "--job-name", "call")
    assert refused.returncode == 1
    assert "Invalid partition" in refused.stderr


PING = """#!/bin/sh
[ -e {place}/up ] && echo 'Slurmctld(primary) at here is UP' && exit
touch {place}/up
echo 'Slurmctld(primary) at here is DOWN'
"""


def test_a_step_waits_for_the_controller_and_gets_its_input(tmp_path) -> None:
    place = tmp_path / "slurm"
    place.mkdir()
    (place / "sleep").write_text(f"#!/bin/sh\necho waited >> {place}/slept\n")
    (place / "scontrol").write_text(PING.format(place=place))
    (place / "srun").write_text('#!/bin/sh\necho "$@"\ncat\nexit 5\n')
    step = cluster_command("srun", place, "-n1", "two words", given="a script\n")
    assert (step.returncode, step.stdout) == (5, "-n1 two words\na script\n")
    assert (place / "slept").read_text() == "waited\n"


def test_who_waits_is_told_who_holds_the_lock(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node3")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    wait = (
        "import model.runtime.lock as lock, pathlib\nwith lock.held(pathlib.Path('l'), 'wait'): 0"
    )
    with held(tmp_path / "l", ""):
        process = subprocess.Popen(
            [sys.executable, "-c", wait],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        said = process.stderr.readline()
    assert process.wait() == 0
    assert f"wait (node3, process {os.getpid()}, job 12 of Slurm, since " in said
    process.stderr.close()
    assert holder(tmp_path / "l") == ""
