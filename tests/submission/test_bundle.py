"""The bundle: one file that scores an artifact where nothing of the project is installed."""

import ast
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from model.artifact.format import load_artifact
from model.data.loader import documents_in
from model.data.shards import BOS, ShardWriter
from model.runtime.distributed import Group
from pocketlm.params.params import Params
from pocketlm.submission.bundle import DOCUMENTED, bundle, minified, settings_of
from pocketlm.submission.standalone import execution_of, losses_of
from pocketlm.workflow.closure import STANDALONE, shipped
from tests.helpers.corpora import sentences, small_tokenizer
from tests.helpers.presets import preset
from tests.steps.test_evaluations import VOCABULARY, write_artifact

PRESETS = ("best", "demo", "h100", "record")
MODES = ("plain", "sliding", "ttt")
# What an empty virtual environment is given; what these need comes with them.
INSTALLED = ("torch", "numpy", "sentencepiece", "constriction", "brotli", "zstandard")
# Runs bundle.py with several command lines where packages of these names cannot be imported, and
# fails if it has taken a module of the project from elsewhere.
IN_AN_EMPTY_ENVIRONMENT = """
import importlib.abc, inspect, json, runpy, sys
blocked, lines = json.loads(sys.argv[1])
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
for line in lines:
    sys.argv = ["bundle.py", *line]
    runpy.run_path("bundle.py", run_name="__main__")
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in ("model", "pocketlm", "steps"):
        assert type(module.__spec__.loader).__name__ == "Bundle", name
assert "def ttt_losses" in inspect.getsource(sys.modules["model.ttt.loop"].ttt_losses)
"""


@pytest.fixture(scope="module")
def params() -> Params:
    changes = [f"model.vocabulary={VOCABULARY}", f"tokenizer.vocabulary={VOCABULARY}"]
    changes += ["model.layers=2", "model.width=32", "model.heads=2", "model.kv_heads=1"]
    changes += ["model.head_width=16", "model.mlp_width=64", "model.value_layers=[1]", "ttt.rank=2"]
    return preset("demo", *changes)


@pytest.fixture(scope="module")
def place(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle, an artifact, a tokenizer, text, and the text as a shard."""
    place = tmp_path_factory.mktemp("bundle")
    (place / "bundle.py").write_bytes(bundle(settings_of(params)))
    write_artifact(place / "model.pocket", params)
    tokenizer = small_tokenizer(place / "tokenizer.model", VOCABULARY)
    texts = [" ".join(sentences(count, seed=count)) for count in (1, 3, 2)]
    lines = [json.dumps({"text": text}) for text in texts]
    (place / "texts.jsonl").write_text("\n".join(lines))
    with ShardWriter(place, "validation", 20000) as writer:
        for pieces in tokenizer.encode(texts):
            tokens = np.array([BOS, *pieces], np.uint16)
            writer.write(tokens, tokenizer.sizes(tokens))
    return place


def installed_with(names: tuple[str, ...]) -> set[str]:
    """Those packages, and what they need."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        found.add(name)
        needs = [Requirement(text) for text in metadata.requires(name) or []]
        extra = {"extra": ""}
        needed = [need.name for need in needs if not need.marker or need.marker.evaluate(extra)]
        waiting |= set(map(canonicalize_name, needed)) - found
    return found


def test_scores_in_an_empty_environment_as_in_the_package(place: Path, params: Params) -> None:
    given = ["--artifact", "model.pocket", "--tokenizer", "tokenizer.model"]
    given += ["--batch-tokens", "4096"]
    shard, texts = ["--tokens", "validation_000000.bin"], ["--text", "texts.jsonl"]
    lines = [[*given, *shard, "--mode", mode, "--losses", f"{mode}.npy"] for mode in MODES]
    lines.append([*given, *texts, "--mode", "plain", "--losses", "texts.npy", "--documents", "2"])
    allowed = installed_with(INSTALLED)
    blocked = [
        name
        for name, packages in metadata.packages_distributions().items()
        if not allowed & set(map(canonicalize_name, packages)) and name not in ("model", "steps")
    ]
    assert {"pydantic", "hydra", "pandas", "safetensors"} <= set(blocked)
    done = subprocess.run(
        [sys.executable, "-I", "-c", IN_AN_EMPTY_ENVIRONMENT, json.dumps([blocked, lines])],
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    torch.set_num_threads(1)
    model = load_artifact(place / "model.pocket")
    documents = documents_in([place / "validation_000000.bin"])
    group, execution = Group(0, 1, torch.device("cpu")), execution_of(4096)
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    for mode, said in zip(MODES, printed, strict=False):
        losses = losses_of(mode, model, documents, settings_of(params), execution, group)
        assert np.array_equal(np.load(place / f"{mode}.npy"), np.concatenate(losses)), mode
        assert said["tokens"] == sum(document.size for document in documents)
    two = sum(document.size for document in documents[:2])
    assert np.array_equal(np.load(place / "texts.npy"), np.load(place / "plain.npy")[:two])


def test_runs_the_programs_of_the_stages(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "bundle.py", "-m", "steps.train", "--help"],
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert "--seed" in done.stdout, done.stderr


def test_same_code_and_settings_give_the_same_bytes(params: Params) -> None:
    settings = settings_of(params)
    whole = bundle(settings)
    assert whole == bundle(settings)
    assert len(bundle(settings, (STANDALONE,))) < len(whole)


@pytest.mark.parametrize("name", PRESETS)
def test_fits_into_the_reserve_of_every_preset(name: str) -> None:
    params = preset(name)
    assert len(bundle(settings_of(params))) < params.quantize.code_reserve_bytes


def test_minified_code_is_the_same_but_for_comments_and_docstrings() -> None:
    source = (
        '"""Doc."""\n# why\ndef f(x: int = 1) -> str:\n    """Doc."""\nclass A:\n    y: int = 2\n'
    )
    assert minified(source) == "def f(x: int = 1) -> str:\n pass\nclass A:\n y: int = 2\n"
    for file in shipped():
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        assert ast.dump(ast.parse(minified(file.read_text()))) == ast.dump(tree), file
