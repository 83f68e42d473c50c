"""A stage depends on the code that can change its result, and on no other."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pocketlm.workflow.closure import NO_RESULT, closure, code_deps, imports, is_code, update
from pocketlm.workflow.stages import stages

ROOT = Path(__file__).parents[2]
STAGES: dict[str, dict[str, list[str]]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PROGRAM = '''"""A stage."""
from typing import TYPE_CHECKING

import model.plain
from pocketlm.params.load import load_params

if TYPE_CHECKING:
    from model.types import Type
else:
    from model import instead


def main():
    from model.rooms.inside import function

    return find("model.named"), Kernel("mlp", "one", "f"), Kernel("adapters", "two", "f")
'''


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_lists_the_code_of_a_stage(stage: str) -> None:
    """Neither more nor less; to put it right: python -m pocketlm.workflow.closure."""
    listed = [dep for dep in STAGES[stage]["deps"] if is_code(dep)]
    wanted = code_deps(stage)
    lines = "".join(f"      - {dep}\n" for dep in wanted)
    assert listed == wanted, (
        f"dvc.yaml: {stage}: missing {sorted(set(wanted) - set(listed))}, too wide "
        f"{sorted(set(listed) - set(wanted))}; run `python -m pocketlm.workflow.closure`, "
        f"or list\n{lines}"
    )


def test_a_stage_is_spared_edits_of_what_it_does_not_run() -> None:
    """The rows of docs/workflow.md that begin with an edit, for every file of the folders.

    The audit runs what evaluates, but not what trains or quantizes.
    """
    found = {stage: {file.as_posix() for file in closure(stage)} for stage in STAGES}

    def readers(*places: str) -> set[str]:
        return {s for s, files in found.items() if any(f.startswith(places) for f in files)}

    assert readers("pocketlm/cli", "pocketlm/workflow/launch", "pocketlm/workflow/plan") == set()
    assert readers("pocketlm/report/summary") == {"report"}
    assert readers("pocketlm/audit") == {"audit"}
    assert readers("steps/ttt_eval") == {"ttt_eval"}
    assert readers("model/ttt", "model/kernels/low_rank") == {"ttt_eval", "audit"}
    evaluating = {"evaluate", "ttt_eval", "audit"}
    beside = ("model/kernels/cached_attention_triton", "model/kernels/query_subset_attention")
    assert readers(*beside) == {"quantize", "ttt_eval", "audit"}
    assert readers("model/quantization", "steps/quantize") == {"quantize"}
    assert readers("model/training", "steps/train") == {"train"}
    assert readers("model/artifact/format") == {"quantize", *evaluating}
    assert readers("model/network/gpt") == {"train", "quantize", *evaluating}


def test_every_exemption_is_a_place_that_some_stage_imports() -> None:
    imported = {
        file.as_posix()
        for stage in STAGES
        for one in closure(stage)
        for file in imports(one, {"ops"})
    }
    for place in NO_RESULT:
        assert any(file == place or file.startswith(f"{place}/") for file in imported), place


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project of one stage."""
    files = {
        "steps/stage.py": PROGRAM,
        "model/__init__.py": '"""Only words."""\n',
        "model/plain.py": "import model.deeper\n",
        "model/deeper.py": "import model.plain\n",
        "model/types.py": "Type = int\n",
        "model/instead.py": "Type = float\n",
        "model/named.py": "def function(): ...\n",
        "model/rooms/__init__.py": "VALUE = 1\n",
        "model/rooms/inside.py": "def function(): ...\n",
        "model/kernels/one.py": "def f(): ...\n",
        "model/kernels/two.py": "def f(): ...\n",
        "pocketlm/params/load.py": "import model.types\n",
        "dvc.yaml": "stages:\n"
        "  stage: # one\n"
        "    cmd: python -m steps.stage\n"
        "    deps:\n"
        "      - model # all\n"
        "      - texts # given\n"
        "    params:\n"
        "      - ops.mlp\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    stages.cache_clear()
    yield tmp_path
    stages.cache_clear()


def test_what_is_imported_counts_and_what_is_not_does_not(project: Path) -> None:
    rooms = ["model/rooms/__init__.py", "model/rooms/inside.py"]
    files = ["deeper.py", "instead.py", "kernels/one.py", "named.py", "plain.py"]
    wanted = {"steps/stage.py", *rooms, *(f"model/{file}" for file in files)}
    assert {file.as_posix() for file in closure("stage")} == wanted
    folded = [f"model/{file}" for file in files] + ["model/rooms"]
    assert code_deps("stage") == ["steps/stage.py", *folded]


def test_a_folder_is_named_where_all_of_it_counts(project: Path) -> None:
    (project / "model/types.py").unlink()
    (project / "model/kernels/two.py").unlink()
    shutil.rmtree(project / "pocketlm")
    assert code_deps("stage") == ["steps/stage.py", "model"]


def test_updating_keeps_all_but_the_code(project: Path) -> None:
    assert update() == ["stage"]
    text = (project / "dvc.yaml").read_text()
    assert text.startswith("stages:\n  stage: # one\n")
    assert "      - model/rooms\n      - texts # given\n    params:\n" in text
    assert "- model #" not in text
    assert update() == []


def test_a_template_counts_where_its_name_stands(project: Path) -> None:
    (project / "model/plain.py").write_text('TEMPLATE, OTHER = "page.html.j2", "absent.j2"\n')
    (project / "model/page.html.j2").write_text("{# no Python #}")
    (project / "model/unnamed.html.j2").write_text("")
    templates = [file.name for file in closure("stage") if file.suffix == ".j2"]
    assert templates == ["page.html.j2"]
    assert "model/page.html.j2" in code_deps("stage")
    update()
    assert "- model/page.html.j2\n" in (project / "dvc.yaml").read_text()
