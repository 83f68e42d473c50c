"""Every command of docs/tutorial.md, in its order, on a miniature in the place of the demo."""

import re
import shutil
from pathlib import Path

import pytest

from tests.helpers.checkout import ROOT, Checkout, make_checkout

TUTORIAL = ROOT / "docs/tutorial.md"
WALK = re.compile(r"^## (\d)\. .*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What a walk must print or leave, besides ending well.
SHOWN = {
    "1": "with TTT",
    "2": "ttt_eval, seeds 0, 1: ttt.lr",
    "3": "longer-chunks",
    "4": "front",
    "5": "",
}


@pytest.mark.campaign
@pytest.mark.workflow
def test_every_command_of_the_tutorial(tmp_path: Path) -> None:
    make_checkout(tmp_path / "clone")
    checkout = Checkout(tmp_path / "clone")
    shutil.move(checkout.path / "conf/miniature.yaml", checkout.path / "conf/demo.yaml")
    for section in ("tokenizer", "model"):  # these pages have more characters than 300 pieces
        edit = f"/^{section}:/,/vocabulary:/ s/vocabulary: 300/vocabulary: 640/"
        checkout.run("sed", "-i", edit, "conf/demo.yaml")
    checkout.commit("a demo of seconds")
    walks = {walk[1]: walk[0] for walk in WALK.finditer(TUTORIAL.read_text())}
    assert walks.keys() == SHOWN.keys()
    for number, walk in walks.items():
        commands = "".join(COMMANDS.findall(walk))
        said = checkout.run("bash", "-euo", "pipefail", "-c", commands)
        assert SHOWN[number] in said, said
    program = "".join(PYTHON.findall(walks["5"]))
    exported = Checkout(checkout.path / "exported")
    exported.run("python", "-I", "-c", f"import sys; sys.path.insert(0, '.')\n{program}")
