"""What the files of the repository promise each other."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pocketlm.cli import app
from pocketlm.params.presets import presets
from pocketlm.workflow.gpus import claim_gpus
from pocketlm.workflow.scheduler import GOALS
from pocketlm.workflow.stages import nodes, stages, upstream

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
    if page.is_file()
]
COMMANDS = vars(typer.main.get_command(app))["commands"]
BANNED = {"brotli", "constriction", "dvc", "hydra", "matplotlib", "pandas", "pyarrow", "pydantic"}
BANNED |= {"rich", "safetensors", "scipy", "sentencepiece", "snakemake", "typer", "zstandard"}
STEPS = ["tokenize", "train", "quantize", "evaluate", "ttt_eval", "report", "audit"]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_stages_are_rules_and_stand_in_the_order_of_the_data_flow() -> None:
    """A stage that runs for each seed has a rule for one seed, and one for all."""
    rules = set(re.findall(r"^rule (\w+):", (ROOT / "Snakefile").read_text(), re.MULTILINE))
    assert list(stages()) == STEPS
    assert rules == {
        *STEPS,
        *GOALS,
        *(f"{name}_seed" for name in STEPS if "matrix" in stages()[name]),
    }
    for position, stage in enumerate(STEPS):
        assert set(upstream(stage)) <= set(STEPS[:position]), stage


def test_every_stage_is_started_by_the_launcher() -> None:
    """Only so its inputs are compared after the run, and a failure loses nothing.

    A command holds no value of params.yaml: a shell reads it before the values are checked.
    """
    for name, stage in stages().items():
        assert stage["cmd"] == f"python -m pocketlm.workflow.launch -m steps.{name}"


def test_every_step_is_a_module_that_is_started_as_one() -> None:
    """Started by path, steps/tokenize.py would hide the standard library's tokenize."""
    for name, stage in stages().items():
        assert (ROOT / f"steps/{name}.py").is_file()
        assert re.search(rf"-m steps\.{name}\b", stage["cmd"])
    started = re.compile(r"python\S* +steps/|torchrun[^\n]* steps/")
    files = [*PAGES, ROOT / "dvc.yaml", ROOT / "Snakefile", ROOT / "Makefile"]
    assert not [file.name for file in files if started.search(file.read_text())]


def test_how_a_run_is_executed_is_no_cache_key() -> None:
    """Else what eight processes have trained could not be evaluated by one."""
    for name, stage in stages().items():
        assert not [key for key in stage["params"] if key.split(".")[0] == "execution"], name


def test_the_report_reads_every_seed_and_no_stage_another_one() -> None:
    graph = nodes([0, 7])
    assert all(graph["report"].reads(one) for t, one in graph.items() if "@" in t)
    assert graph["quantize@7"].reads(graph["train@7"])
    assert not graph["quantize@7"].reads(graph["train@0"])
    assert not graph["ttt_eval@0"].reads(graph["train@0"])


def test_steps_side_by_side_get_gpus_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    first = claim_gpus(1, tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    second = claim_gpus(2, tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,6"
    for file in (*first, *second):
        file.close()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert len(claim_gpus(2, tmp_path)) == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert claim_gpus(2, tmp_path) == claim_gpus(0, tmp_path) == []


def commands(page: Path) -> list[str]:
    """Lines of the shell blocks of a page."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [
        line.split(" #")[0].strip().removeprefix("$ ")
        for block in blocks
        for line in block.splitlines()
    ]
    return [line for line in lines if line]


def check_command(words: list[str]) -> None:
    """A line `pocketlm …`, or a placeholder in capitals of its first words, can be parsed."""
    subcommand = COMMANDS[words[0]]
    values = subcommand.make_context(words[0], words[1:]).params
    if words[0] == "preset":
        assert values["name"] in [*presets(ROOT / "conf"), "NAME"], words


def test_commands_that_files_and_messages_name_exist() -> None:
    """Not only in shell blocks: `pocketlm …` in backquotes or after a repair, in any file."""
    listing = ["git", "ls-files", "*.py", "*.md", "*.yaml", "Makefile", ".dvc/config"]
    names = subprocess.run(listing, capture_output=True, check=True, text=True).stdout.split()
    texts = "\n".join(Path(name).read_text() for name in names)
    assert {"preset", "sweep", "readme", "accept"} <= set(COMMANDS)
    quoted = re.findall(r"""[`"']pocketlm ([a-z][^`"'{\n]*)[`"']""", texts)
    assert len(quoted) > 5
    for command in quoted:
        assert command.split()[0] in COMMANDS, command
    assert "python -m pocketlm.params." + "presets" not in texts
    assert "python -m pocketlm." + "report" not in texts
    assert "python -m pocketlm.workflow." + "sweep" not in texts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(page):
        words = shlex.split(line)
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        if words[0] == "snakemake" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in STEPS, line
        for module in re.findall(r"-m ([\w.]+)", line):
            if module.split(".")[0] in ("steps", "pocketlm", "benchmarks", "model"):
                path = ROOT / module.replace(".", "/")
                assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), line
        if words[0] == "pocketlm":
            check_command(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_constraints_pin_every_requirement_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert not [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", pin)]
    pinned = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    wanted = {canonicalize_name(Requirement(line).name) for line in lines}
    assert not wanted - pinned - {"pocketlm"}


def test_model_imports_with_torch_alone() -> None:
    """No module of model/ loads another package when it is imported.

    But for triton, which comes with torch for CUDA: kernels are in modules of their own.
    """
    program = (
        "import sys, importlib, pkgutil, torch, torch._dynamo, numpy\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in BANNED: raise ImportError(name + ' is not needed')\n"
        f"BANNED = {BANNED!r}\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import model\n"
        "for module in pkgutil.walk_packages(model.__path__, 'model.'):\n"
        "    try: importlib.import_module(module.name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        if error.name != 'triton': raise\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_dvc_and_snakemake_profiles_agree_with_the_design() -> None:
    config = (ROOT / ".dvc/config").read_text()
    for line in ("analytics = false", "check_update = false", 'type = "reflink,copy"'):
        assert line in config
    for profile in sorted((ROOT / "profiles").glob("*/config.yaml")):
        settings = yaml.safe_load(profile.read_text())
        assert settings["rerun-triggers"] == ["mtime"]
        assert settings["max-checksum-file-size"] == 0


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "lab-notes.md"], ids=lambda p: p.name
)
def test_paths_named_on_a_page_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:model|pocketlm|steps|benchmarks|tests|conf)/[\w/.]*)`", page.read_text()
    )
    assert not [path for path in named if not (ROOT / path).exists()]
