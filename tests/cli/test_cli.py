"""The command `pocketlm`: arguments in any order, exit statuses, errors without a traceback."""

import subprocess
import sys
import tomllib
from importlib import import_module
from itertools import chain, permutations
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pocketlm.cli import COMMANDS, app
from pocketlm.params.load import load_params

ROOT = Path(__file__).parents[2]


def call(*words: str, **options: Any) -> Result:
    return CliRunner().invoke(app, list(words), **options)


pytestmark = pytest.mark.usefixtures("experiment")


WORDS = (["demo"], ["ttt.lr=3e-3"], ["seeds=[5, 6]"], ["--force"], ["--output", "other.yaml"])
ORDERS = [
    words
    for words in permutations(WORDS)
    if words.index(WORDS[0]) < min(words.index(WORDS[1]), words.index(WORDS[2]))
]


@pytest.mark.parametrize("number", range(0, len(ORDERS), 5))
def test_options_and_overrides_stand_in_any_order(number: int, experiment: Path) -> None:
    """The first word that is no option is the preset, wherever options stand."""
    (experiment / "other.yaml").write_text("edited: by hand\n")
    done = call("preset", *chain(*ORDERS[number]))
    assert done.exit_code == 0, done.output
    params = load_params("other.yaml")
    assert (params.ttt.lr, params.seeds) == (3e-3, [5, 6])


def test_presets_are_listed(experiment: Path) -> None:
    assert call("preset", "--list").output.split() == ["best", "demo", "h100", "record"]


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("sc", {"score"}),
        ("preset de", {"demo"}),
        ("preset --fo", {"--force"}),
        ("accept t", {"tokenize", "train", "ttt_eval"}),
    ],
)
def test_shells_complete_commands_options_and_names(
    experiment: Path, typed: str, found: set[str]
) -> None:
    (experiment / "dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    words = {"_POCKETLM_COMPLETE": "complete_bash", "COMP_WORDS": f"pocketlm {typed}"}
    words["COMP_CWORD"] = str(len(typed.split()))
    done = CliRunner().invoke(app, env=words, prog_name="pocketlm")
    assert set(done.output.split()) == found


def test_a_file_edited_by_hand_is_replaced_only_by_force(experiment: Path) -> None:
    file = experiment / "params.yaml"
    assert call("preset", "demo").exit_code == 0
    preset = file.read_text()
    assert call("preset", "h100").exit_code == 0  # what equals a preset may go
    file.write_text(preset.replace("\n- 2\n", "\n- 7\n", 1))
    edited = file.read_text()
    refused = call("preset", "demo")
    assert refused.exit_code == 1
    assert "edited by hand" in refused.stderr
    assert "--force" in refused.stderr
    assert file.read_text() == edited != preset
    assert call("preset", "demo", "--force").exit_code == 0
    assert file.read_text() == preset


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("preset", "h200"), "error: preset h200: no such file conf/h200.yaml"),
        (("preset", "demo", "ttt.lrr=1"), "error: preset demo:"),
        (("sweep", "absent.yaml"), "error: absent.yaml: no such file"),
        (("readme", "--record", "records/x"), "error: artifacts/report/summary.json: no such"),
    ],
)
def test_mistakes_are_two_lines_and_status_1(words: tuple[str, ...], problem: str) -> None:
    command = [sys.executable, "-m", "pocketlm", *words]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(problem)
    assert "\n  repair: " in done.stderr
    assert "Traceback" not in done.stderr


def test_usage_errors_have_a_status_of_their_own() -> None:
    assert call("preset").exit_code == 2
    assert call("publish").exit_code == 2


def test_the_installed_command_is_this_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["scripts"]["pocketlm"].split(":")
    assert getattr(import_module(module), name) is app


def test_each_command_has_one_line_of_help() -> None:
    shown = call("--help", env={"COLUMNS": "80", "TERM": "dumb"}).output
    for command in COMMANDS:
        assert command.main.__doc__ in shown


def test_help_loads_no_torch() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from pocketlm.cli import app\n"
        "shown = CliRunner().invoke(app, ['preset', '--help']).output\n"
        "assert '--force' in shown and 'torch' not in sys.modules"
    )
    environment = {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
