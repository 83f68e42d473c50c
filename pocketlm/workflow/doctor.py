"""What is installed here, what would run and how, and what would stop `snakemake report`.

Every topic is a generator of facts. An InputError, or a package that cannot be imported, ends it
with an obstacle, as it would end the workflow; the topics after it are looked at all the same.
"""

import dataclasses
import os
import platform
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from model.runtime.errors import InputError, reading
from pocketlm.params.load import load_params
from pocketlm.params.params import Params
from pocketlm.workflow.gpus import driver, visible_gpus
from pocketlm.workflow.memory import host_memory, require_memory
from pocketlm.workflow.preconditions import check_checkout

OPTIONAL = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4")  # they make GPUs faster
SETUP = "`make setup`"


@dataclass(frozen=True)
class Fact:
    """Something seen here; repair: what to do if it would stop the report, else empty."""

    name: str
    value: str
    repair: str = ""


def topics() -> Iterator[tuple[str, list[Fact]]]:
    """Look at everything; yields a topic's name and facts as soon as they are known."""
    params: list[Params] = []

    def settings() -> Iterator[Fact]:
        params.append(load_params())
        yield Fact("params.yaml", f"valid; seeds {', '.join(map(str, params[0].seeds))}")

    yield "machine", _found(_machine())
    yield "software", _found(_software())
    yield "checkout", _found(_checkout())
    yield "settings", _found(settings())
    for one in params:
        yield "GPUs and kernels", _found(_kernels(one))
        yield "stages", _found(_stages(one))


def _found(facts: Iterator[Fact]) -> list[Fact]:
    found = []
    try:
        for fact in facts:
            found.append(fact)
    except InputError as error:
        found.append(Fact("obstacle", error.problem, error.repair))
    except ImportError as error:
        found.append(Fact("obstacle", f"cannot be imported: {error}", SETUP))
    return found


def _machine() -> Iterator[Fact]:
    yield Fact("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    there = hasattr(os, "sched_getaffinity")  # on Linux
    yield Fact("cores", str(len(os.sched_getaffinity(0)) if there else os.cpu_count()))
    if memory := host_memory():
        yield Fact("memory", f"{memory / 1e9:.1f} GB")
    yield Fact("free disk space", f"{shutil.disk_usage('.').free / 1e9:.1f} GB")


def _software() -> Iterator[Fact]:
    """Python and the packages that pyproject.toml asks for, and those that are optional."""
    with reading("pyproject.toml", "restore it: `git checkout pyproject.toml`"):
        project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    yield _version("python", f"python{project['requires-python']}", platform.python_version())
    for line in project["dependencies"]:
        yield _version(Requirement(line).name, line)
    for name in OPTIONAL:
        yield Fact(name, _installed(name) or "absent; not needed")


def _version(name: str, requirement: str, found: str | None = None) -> Fact:
    needs, version = Requirement(requirement).specifier, found or _installed(name)
    if version is None:
        return Fact(name, "absent", SETUP)
    fits = needs.contains(version, prereleases=True)
    return Fact(
        name, version if fits else f"{version}, but {needs} is needed", "" if fits else SETUP
    )


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _checkout() -> Iterator[Fact]:
    from model.runtime.run_log import environment

    check_checkout()
    yield Fact("folder", str(Path.cwd()))
    yield Fact("commit", environment()["commit"] or "none")


def _kernels(params: Params) -> Iterator[Fact]:
    """The devices that torch uses, and which implementation of each operation runs there."""
    import torch

    from model.kernels import dispatch
    from model.kernels.tested_versions import untested_versions
    from model.runtime.distributed import require_gpus

    there = torch.cuda.is_available()
    for number in range(torch.cuda.device_count() if there else 0):
        about = torch.cuda.get_device_properties(number)
        memory = f"{about.total_memory / 1e9:.1f} GB"
        yield Fact(
            f"GPU {number}", f"{about.name}, {memory}, capability {about.major}.{about.minor}"
        )
    if visible_gpus():
        yield Fact("driver", f"{driver()}; torch is built for CUDA {torch.version.cuda}")
    if not there:
        yield Fact("GPU", "none that torch can use; stages run on the CPU")
    require_gpus(params.execution.processes // params.execution.nodes, params.execution.device)
    device = torch.device("cuda" if there else "cpu")
    choice = dispatch.configure(device=device, **dataclasses.asdict(params.ops))
    for key, why in choice.reasons.items():
        yield Fact(key, f"{getattr(choice, key)} ({why})")
    tested = "the kernels were tested on these versions of torch and triton"
    yield Fact("versions", untested_versions() or tested)


def _stages(params: Params) -> Iterator[Fact]:
    """Which stages are stale, and whether they could run."""
    from pocketlm.workflow import dvc_repo
    from pocketlm.workflow.plan import explain, make_plan

    plan = make_plan(params.seeds, {"report"}, dvc_repo.inspect())
    yield Fact("DVC remote", "set" if dvc_repo.has_remote() else "none")
    yield Fact("stale", explain(plan) or "nothing: the report is up to date")
    if plan.fetched:
        yield Fact("to be restored", ", ".join(plan.fetched))
    require_memory(params, {plan.graph[target].stage: None for target in plan.reasons})
    if "tokenize" in plan.reasons and params.data.source != "fineweb":
        from model.data.sources import open_corpus

        yield Fact("text", f"{open_corpus(params.data).megabytes:.1f} MB")
