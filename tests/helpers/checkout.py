"""Working copies of the repository in which tests run the whole workflow on a miniature.

Which steps really ran is recorded by `sitecustomize` in the steps' own processes, so nothing is
believed of what an engine prints.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SNAKEMAKE = ["snakemake", "report", "--cores", "2", "--resources", "gpu=2"]
ENGINES = {"snakemake": SNAKEMAKE, "dvc": ["dvc", "repro", "report"]}
ACCEPT = [str(BIN / "python"), "-m", "pocketlm", "accept"]
# Of long rows `make test` sees one engine, the quicker where several runs follow each other, and
# `make test-all` both.
second_engine_in_campaign = pytest.mark.parametrize(
    "engine", ["snakemake", pytest.param("dvc", marks=pytest.mark.campaign)], indirect=True
)
TTT = ["ttt_eval@0", "ttt_eval@1"]
REPORT = ["report"]
EVALUATE = ["evaluate@0", "evaluate@1"]
FROM_QUANTIZE = [*EVALUATE, "quantize@0", "quantize@1", *REPORT, *TTT]
FROM_TRAIN = sorted([*FROM_QUANTIZE, "train@0", "train@1"])

# Runs in every Python process of a checkout: notes which step it is, and dies in some if told to.
SITECUSTOMIZE = """
import os, signal, sys
words = [word for word in sys.orig_argv[1:] if word != "-u"]
if words[:1] == ["-m"] and os.environ.get("RANK", "0") == "0":
    module = words[1]
    seed = "@" + words[words.index("--seed") + 1] if "--seed" in words else ""
    if module.startswith("steps."):
        step = module.removeprefix("steps.") + seed
        with open(os.environ["RECORD"], "a") as file:
            file.write(step + "\\n")
        if step in os.environ.get("DIE_IN", "").split():
            replace = os.replace
            def replace_and_die(source, target, **options):
                replace(source, target, **options)
                if "artifacts" in str(target):
                    os.kill(os.getpid(), signal.SIGKILL)
            os.replace = replace_and_die
"""


class Checkout:
    """A working copy of the repository in a temporary directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path.parent / f"{path.name}.steps"
        recorder = path.parent / f"{path.name}.recorder"
        recorder.mkdir(exist_ok=True)
        (recorder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{recorder}{os.pathsep}{path}",
            "RECORD": str(self.record),
            "OMP_NUM_THREADS": "1",
            "DVC_SITE_CACHE_DIR": str(path.parent / f"{path.name}.dvc"),
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@example.invalid",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@example.invalid",
        }

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.path,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, succeeds: bool = True, **environment: str) -> str:
        """Run a command and return what it printed."""
        process = self.start(*command, **environment)
        output = process.communicate()[0]
        assert (process.returncode == 0) == succeeds, f"{' '.join(command)}\n{output}"
        return output

    def steps_run_by(self, *command: str, succeeds: bool = True, **environment: str) -> list[str]:
        """Run a command and return the steps that it started, sorted."""
        self.record.write_text("")
        self.run(*command, succeeds=succeeds, **environment)
        return sorted(self.record.read_text().split())

    def commit(self, message: str = "change") -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "-m", message)

    def set(self, key: str, value: object) -> None:
        """Change one value of params.yaml as a person would."""
        section, _, name = key.rpartition(".")
        path = self.path / "params.yaml"
        text = path.read_text()
        start = text.index(f"\n{section}:") if section else 0
        entry = rf"^( *{name}:)[^#\n]*(#[^\n]*)?(\n *- [^\n]*)*"  # a list has lines of its own
        found = re.compile(entry, re.MULTILINE).search(text, start)
        assert found, key
        line = f"{found[1]} {value} {found[2] or ''}"
        path.write_text(text[: found.start()] + line + text[found.end() :])

    def append(self, file: str, text: str) -> None:
        with (self.path / file).open("a") as opened:
            opened.write(text)

    def shuffle_times(self) -> None:
        """Give every file a random time, as a clone or a checkout may."""
        generator = random.Random(0)
        for path in sorted(self.path.rglob("*")):
            if path.is_file() and ".git" not in path.parts and ".dvc" not in path.parts:
                when = time.time() - generator.uniform(0, 1e6)
                os.utime(path, (when, when))

    def results(self) -> dict[str, bytes]:
        """Content of every output and of dvc.lock."""
        folders = (self.path / "artifacts", self.path / "logs")
        files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
        return {str(file): file.read_bytes() for file in [*files, self.path / "dvc.lock"]}

    def copy(self, path: Path) -> "Checkout":
        shutil.copytree(self.path, path, symlinks=True)
        return Checkout(path)


def write_texts(directory: Path) -> None:
    """Some hundred documents of varied length."""
    directory.mkdir()
    generator = random.Random(1)
    words = ["sea", "keeps", "its", "colors", "when", "evening", "falls", "nobody", "counts"]
    with (directory / "all.jsonl").open("w") as file:
        for length in range(20, 320):
            text = " ".join(generator.choices(words, k=length))
            file.write(json.dumps({"text": text}) + "\n")


def make_checkout(path: Path) -> None:
    """Copy the files that git tracks and choose the miniature experiment; nothing is run."""
    listing = ["git", "ls-files", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path / name)
    shutil.copy(ROOT / "tests/miniature.yaml", path / "conf/miniature.yaml")
    write_texts(path / "texts")
    checkout = Checkout(path)
    checkout.run("git", "init", "-q", "-b", "main")
    checkout.run(str(BIN / "python"), "-m", "pocketlm", "preset", "miniature", "--force")
    checkout.commit("miniature")
