"""Several nodes for one stage: srun starts a torchrun on each, inside an allocation of Slurm.

Before its torchrun begins, each node compares with a note of the launcher what would else fail late
or never: that it sees this checkout, and has the same packages. The torchruns meet at a port of the
launcher's node; if not all have come in time, those that did say so.
"""

import os
import socket
import subprocess
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

from model.runtime.errors import InputError
from model.runtime.files import read_json, write_json
from model.runtime.lock import host_name

NOTE = "nodes.json"  # in `Node.work`
PACKAGES = ("torch", "numpy")  # which must be the same on all nodes
MEETING = 300  # [s] in which all nodes must have come
PATIENCE = (
    60  # [s] that a node may go on when another has ended; for what a network file shows late
)


def srun(nodes: int, processes: int, work: Path, words: list[str]) -> list[str]:
    """The command line that runs `python WORDS` in so many processes, shared by so many nodes.

    work: the stage's scratch directory. Raises InputError without an allocation of so many nodes.
    """
    _require_allocation(nodes)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    note = {
        "id": uuid.uuid4().hex,
        "nodes": nodes,
        "endpoint": f"{socket.gethostname()}:{port}",
        "packages": _packages(),
    }
    write_json(work / NOTE, note)
    launcher = [
        "pocketlm.workflow.torchrun",
        str(processes),
        "--nodes",
        f"{work / NOTE}#{note['id']}",
    ]
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    # A step beside the one in which this may run; all CPUs of the allocation; none goes on alone.
    options += ["--overlap", "--cpu-bind=none", f"--wait={PATIENCE}"]
    return ["srun", *options, words[0], "-m", *launcher, *words[1:]]


def _require_allocation(nodes: int) -> None:
    job = os.environ.get("SLURM_JOB_ID")
    there = 0
    if job:
        asked = ["squeue", "--noheader", "--format=%D", "--jobs", job]
        run = subprocess.run(asked, capture_output=True, text=True, check=False)
        said = run.stdout.strip()
        there = int(said) if said.isdigit() else nodes  # no answer: srun will say it
    if there < nodes:
        place = f"job {job} of Slurm has {there}" if job else "this is no job of Slurm"
        raise InputError(
            f"execution.nodes: {nodes} nodes, but {place}",
            "`snakemake report --workflow-profile profiles/slurm` asks for them, by hand "
            f"`salloc --nodes {nodes}`; or set execution.nodes to 1 in params.yaml",
        )


def _packages() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def meet(reference: str) -> dict[str, Any]:
    """What the launcher has noted, once this node has been compared with it.

    reference: path and id of the note. Raises InputError if this node does not see it, or differs.
    """
    path, _, wanted = reference.partition("#")
    until = time.monotonic() + PATIENCE
    while (note := _read(Path(path))).get("id") != wanted:
        if time.monotonic() > until:
            raise InputError(
                f"{host_name()}: {Path(path).absolute()} is not what the launcher has written",
                "all nodes must see this directory: put the checkout on a file system they share",
            )
        time.sleep(1)
    for name, version in _packages().items():
        if note["packages"][name] != version:
            raise InputError(
                f"{host_name()}: {name} is {version}, but {note['packages'][name]} where the stage "
                "was started",
                "use one environment on all nodes: .venv of a checkout that they share",
            )
    return note


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except InputError:
        return {}


def missed(program: str, note: dict[str, Any]) -> InputError:
    """The error of a node that has waited in vain for others."""
    return InputError(
        f"{program}: {host_name()} waited {MEETING} s at {note['endpoint']} for {note['nodes']} "
        "nodes, and not all came",
        "see what other nodes say; if nothing, they cannot reach that port: name the network "
        "between them by NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, or open it in the firewall",
    )
