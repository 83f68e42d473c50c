"""`pocketlm export`: the folder loads where nothing of the project is, and scores as it does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from pocketlm.params.load import load_params
from pocketlm.submission.bundle import settings_of
from pocketlm.submission.standalone import Scorer, load
from tests.cli.conftest import Call
from tests.cli.test_generate import ARTIFACT, TOKENIZER
from tests.cli.test_score import TEXTS

FILES = {
    "README.md",
    "bundle.py",
    "config.json",
    "model.pocket",
    "requirements.txt",
    "tokenizer.model",
}
# -I leaves out the current directory; the two lines of README.md take its place.
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
{lines}
import numpy, torch
torch.set_num_threads(1)
for mode in ("plain", "sliding", "ttt"):
    numpy.save(mode, scorer.losses(sys.argv[2], mode))
print(json.dumps([scorer.score(sys.argv[2], mode).bpb for mode in ("sliding", "ttt")]))
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in ("model", "pocketlm", "steps"):
        assert type(module.__spec__.loader).__name__ == "Bundle", name
"""


def test_it_loads_anywhere_in_two_lines(place: Path, call: Call, tmp_path: Path) -> None:
    done = call("export", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
    readme = (tmp_path / "out/README.md").read_text()
    lines = readme.split("```python\n")[1].split("```")[0]
    assert len(lines.splitlines()) == 2
    run = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM.format(lines=lines), tmp_path / "out", TEXTS[0]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    pair = load(Path(ARTIFACT), Path(TOKENIZER))
    scorer = Scorer(*pair, settings_of(load_params()))
    for mode in ("plain", "sliding", "ttt"):
        assert np.array_equal(np.load(tmp_path / f"{mode}.npy"), scorer.losses(TEXTS[0], mode))
    scores = [scorer.score(TEXTS[0], mode) for mode in ("sliding", "ttt")]
    assert json.loads(run.stdout) == [score.bpb for score in scores]
    assert scores[0].bytes == len(pair[1].normalize(TEXTS[0]).encode())
    assert call("generate", tmp_path / "out/model.pocket", "--tokens", 3).exit_code == 0
    assert (tmp_path / "out/__pycache__").is_dir()
    assert call("export", tmp_path / "out").exit_code == 0  # also where it was in use


def test_nothing_of_the_user_is_overwritten(place: Path, call: Call) -> None:
    assert call("export", "out").exit_code == 0
    first = {file: file.read_bytes() for file in Path("out").iterdir()}
    assert call("export", "out").exit_code == 0  # an earlier export
    assert first == {file: file.read_bytes() for file in Path("out").iterdir()}
    Path("out/mine.txt").write_text("mine")
    Path("file").write_text("mine")
    for target, problem in {"out": "holds other files (mine.txt)", "file": "not a folder"}.items():
        refused = call("export", target)
        assert refused.exit_code == 1
        assert refused.stderr == f"error: {target}: {problem}\n  repair: name a new folder\n"
    assert Path("out/mine.txt").read_text() == Path("file").read_text() == "mine"


def test_only_what_the_stages_wrote_is_exported(place: Path, call: Call) -> None:
    assert call("export", "out", "--seed", 7).exit_code == 1
    for file in (ARTIFACT, TOKENIZER, "artifacts/tokenize/tokens/manifest.json"):
        content = Path(file).read_bytes()
        Path(file).write_bytes(content + b" ")
        done = call("export", "out")
        assert done.exit_code == 1
        assert done.stderr.startswith(f"error: {file}: ")
        Path(file).write_bytes(content)
    assert not Path("out").exists()
