"""What a traced bundle does that it must not, and which check names it. No torch in the bundles."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from model.data.shards import Manifest
from model.data.tokenizer import Tokenizer
from pocketlm.audit.checks import Check, failed
from pocketlm.audit.isolation import TracedBundle, isolation
from pocketlm.audit.rounding import Rounding
from tests.helpers.corpora import small_tokenizer

DOCUMENTS = [np.array([1, 300, 301], np.uint16), np.array([1, 302], np.uint16)]
LOSSES = [np.array([1.0, 2.0, 3.0], np.float32), np.array([4.0, 5.0], np.float32)]
HONEST = """
import sys, numpy
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert words["--mode"] == "ttt"
for option in ("--artifact", "--tokenizer", "--tokens"):
    Path(words[option]).read_bytes()
numpy.save(words["--losses"], numpy.arange(1, 6, dtype=numpy.float32))
"""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tokens with a tokenizer and a training shard."""
    place = tmp_path_factory.mktemp("tokens")
    small_tokenizer(place / "tokenizer.model")
    (place / "train_000000.bin").write_bytes(b"text")
    return place


def checks_of(
    tmp_path: Path, tokens: Path, code: str, expected: Sequence[np.ndarray] = LOSSES
) -> list[Check]:
    """Trace a bundle that does what is asked, and `code` before."""
    (tmp_path / "bundle.py").write_text(code + HONEST)
    (tmp_path / "model.pocket").write_bytes(b"weights")
    splits: dict = {"train": [], "validation": []}
    manifest = Manifest(tokens, {}, 320, "tokenizer.model", "", splits)
    files = tmp_path / "bundle.py", tmp_path / "model.pocket"
    tokenizer = Tokenizer(tokens / "tokenizer.model")
    with TracedBundle(*files, manifest, DOCUMENTS, tokenizer) as traced:
        return isolation(traced, expected, Rounding(1e-3, 1e-5))


def test_an_honest_bundle_passes(tmp_path: Path, tokens: Path) -> None:
    checks = checks_of(tmp_path, tokens, "")
    assert [check.name for check in checks] == ["network", "files", "bundle"]
    assert not failed(checks), checks
    assert "model.pocket, tokenizer.model" in checks[1].evidence


def test_temporary_files_of_compilers_are_no_extra_files(tmp_path: Path, tokens: Path) -> None:
    code = (
        "import subprocess, tempfile\n"
        "made = tempfile.mkdtemp() + '/a.o'\n"
        "subprocess.run(['ld', '--version'], stdout=open(made + '.log', 'w'))\n"
        "import os, shutil\n"
        "os.link(made + '.log', made)\n"  # written under a name that the trace has not seen
        "open(made).read()\n"
    )
    assert not failed(checks_of(tmp_path, tokens, code))


PLANTS = {
    "network call": (
        "import socket\ntry: socket.create_connection(('127.0.0.1', 9), 0.1)\n"
        "except OSError: pass\n",
        {"network"},
        "socket.connect",
    ),
    "name looked up": (
        "import socket\ntry: socket.getaddrinfo('localhost', 80)\nexcept OSError: pass\n",
        {"network"},
        "getaddrinfo",
    ),
    "download by another program": (
        "import subprocess\ntry: subprocess.run(['/usr/bin/curl', '--version'])\n"
        "except OSError: pass\n",
        {"network"},
        "curl",
    ),
    "shell": ("import os\nos.system('true')\n", {"network"}, "true"),
    "training shard": (
        "open('{tokens}/train_000000.bin', 'rb').read()\n",
        {"files"},
        "train_000000.bin",
    ),
    "training shard, mapped": (
        "import numpy\nnumpy.memmap('{tokens}/train_000000.bin', 'u1', 'r')\n",
        {"files"},
        "train_000000.bin",
    ),
    "extra file": (
        "from pathlib import Path\nPath('{tokens}/../ngrams.bin').exists()\n"
        "try: open('ngrams.bin')\nexcept OSError: pass\n",
        {"files"},
        "ngrams.bin",
    ),
    "extra file that it needs": ("open('ngrams.bin')\n", {"files", "bundle"}, "ngrams.bin"),
    "code that is not counted": (
        "import os\nos.open('{root}/pocketlm/cli/__init__.py', os.O_RDONLY)\n",
        {"files"},
        "pocketlm/cli",
    ),
    "crash": ("raise SystemExit('no such kernel')\n", {"bundle"}, "no such kernel"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_a_bundle_must_not_do_is_named(tmp_path: Path, tokens: Path, plant: str) -> None:
    code, names, said = PLANTS[plant]
    root = Path(__file__).parents[2]
    code = code.replace("{tokens}", str(tokens)).replace("{root}", str(root))
    checks = checks_of(tmp_path, tokens, code)
    assert set(failed(checks)) == names, checks
    assert said in " ".join(problem for check in checks for problem in check.problems)


def test_other_losses_than_those_of_the_package_are_named(tmp_path: Path, tokens: Path) -> None:
    checks = checks_of(tmp_path, tokens, "", [LOSSES[0], LOSSES[1] + np.float32(0.01)])
    assert failed(checks) == ["bundle"]
