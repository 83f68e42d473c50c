"""A Slurm of two nodes on this host, for tests: as root, where slurm-wlm and munge are installed.

Each slurmd runs in a PID namespace of its own, so that process ids of one node mean nothing on the
other, as on a cluster; they share the file system. GPUs are counted, but none is real.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.helpers.checkout import Checkout
from tests.helpers.namespaces import APART, can_be_apart
from tests.helpers.waiting import wait_until

ETC = Path("/etc/slurm")
PROGRAMS = ("slurmctld", "slurmd", "munged", "unshare", "runuser")
needs_slurm = pytest.mark.skipif(
    os.geteuid() != 0
    or not all(map(shutil.which, PROGRAMS))
    or not can_be_apart()
    or (ETC / "slurm.conf").exists()
    or find_spec("snakemake_executor_plugin_slurm") is None,
    reason="needs root, namespaces, Debian's slurm-wlm not in use, and pocketlm[slurm]",
)
NODES = ("node1", "node2")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
MinJobAge=300
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=30
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=5
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {size}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} {size}
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""
SIZE = "CPUs=2 RealMemory=64000 Gres=gpu:2 State=UNKNOWN"


class Cluster:
    """Slurm in the folder `place`, whose commands find it by way of /etc/slurm.

    The variable SLURM_CONF would not do: Snakemake's jobs drop it.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.controller: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        for name in ("state", *NODES):
            (self.place / name).mkdir(parents=True)
        start_munge()
        probes = [socket.socket() for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        host, ports = socket.gethostname().partition(".")[0], [p.getsockname()[1] for p in probes]
        for probe in probes:
            probe.close()
        text = CONFIGURATION.format(host=host, place=self.place, ports=ports, size=SIZE)
        ETC.mkdir(exist_ok=True)
        (ETC / "slurm.conf").write_text(text)
        gpus = [self.place / f"gpu{number}" for number in range(2)]
        for gpu in gpus:  # a device like /dev/null
            os.mknod(gpu, 0o666 | 0o020000, os.makedev(1, 3))
        lines = f"NodeName=node[1-2] Name=gpu File={self.place}/gpu[0-1]\n"
        (ETC / "gres.conf").write_text(lines)
        self.start_controller()
        for name in NODES:
            self.nodes.append(self._start([*APART, "slurmd", "-D", "-N", name], name))
        self.wait_for_nodes()

    def _start(self, words: list[str], name: str) -> subprocess.Popen[bytes]:
        with (self.place / f"{name}.out").open("ab") as out:
            return subprocess.Popen(words, stdout=out, stderr=out)

    def start_controller(self) -> None:
        self.controller = self._start(["slurmctld", "-D"], "slurmctld")

    def stop_controller(self) -> None:
        assert self.controller is not None
        self.controller.terminate()
        self.controller.wait(timeout=60)

    def wait_for_nodes(self) -> None:
        """Wait until both nodes are free; after a start of the controller they may take 90 s."""

        def are_idle() -> bool:
            states = self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()
            return states == ["idle", "idle"]

        wait_until(are_idle, failure=lambda: (self.place / "slurmctld.log").read_text()[-3000:])

    def run(self, *words: str, check: bool = True) -> str:
        run = subprocess.run(words, capture_output=True, text=True)
        assert run.returncode == 0 or not check, f"{words}: {run.stderr}"
        return run.stdout

    def jobs(self, state: str = "RUNNING") -> list[str]:
        """Ids of the jobs in a state; none if the controller does not answer."""
        return self.run("squeue", "-h", "-t", state, "-o", "%i", check=False).split()

    def cancel_all(self) -> None:
        """Cancel what runs and waits; returns once both nodes are free again."""
        if self.controller is None or self.controller.poll() is not None:
            self.start_controller()
        self.run("scancel", "--user=root", check=False)
        self.wait_for_nodes()

    def stop(self) -> None:
        if self.controller and self.controller.poll() is None:
            self.run("scancel", "--state=RUNNING", "--user=root", check=False)
            self.stop_controller()
        for node in self.nodes:
            for child in psutil.Process(node.pid).children():  # unshare waits for it
                child.kill()
            node.wait(timeout=30)
        for name in ("slurm.conf", "gres.conf"):
            (ETC / name).unlink(missing_ok=True)

    def checkout(self, checkout: Checkout) -> Checkout:
        """`checkout` with a profile for small nodes and quick looks; its time limits stay."""
        path = checkout.path / "profiles/slurm/config.yaml"
        text = path.read_text()
        changes = {
            "tokenize: 4": "tokenize: 1",
            ": 8\n": ": 1\n",
            "mem_mb: 32000": "mem_mb: 8000",
            "status-checks: 10": "status-checks: 2",
            "per-second: 0.2": "per-second: 1",
            "latency-wait: 60": "latency-wait: 10",
        }
        for old, new in changes.items():
            assert old in text, old
            text = text.replace(old, new)
        path.write_text(text)
        return checkout


def start_munge() -> None:
    """Start munged unless it runs; it stays, as other programs may use it."""
    if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
        return
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    if not Path("/etc/munge/munge.key").exists():
        subprocess.run(["mungekey", "--create"], check=True)
    subprocess.run(["runuser", "-u", "munge", "--", "munged", "--force"], check=True)


@contextmanager
def running(place: Path) -> Iterator[Cluster]:
    """A Slurm that runs during the block."""
    cluster = Cluster(place)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
