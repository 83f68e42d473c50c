"""A folder with one artifact and all that it needs: it loads where pocketlm is not installed.

model.pocket, tokenizer.model    as the stages made them, compared with what these recorded
bundle.py                        the code that evaluates (`pocketlm.submission.bundle`)
config.json                      architecture, settings of evaluation, SHA-256 of the two files
requirements.txt, README.md      packages and their versions; how to load it, in two lines
"""

import hashlib
import json
from pathlib import Path

from model.artifact.format import read_artifact
from model.data.shards import MANIFEST, Manifest
from model.runtime.errors import InputError
from model.runtime.files import SIDECAR, write_bytes
from model.runtime.provenance import recorded, require_recorded
from pocketlm.params.params import Params
from pocketlm.params.paths import ARTIFACT, ARTIFACTS, CONSTRAINTS, TOKENIZER, TOKENS
from pocketlm.submission.bundle import NAME, bundle, settings_of
from pocketlm.submission.folder import scoring_requirements
from pocketlm.workflow.closure import STANDALONE

README = """# A language model of {bytes:,} bytes

It needs Python 3.11 or later and what `pip install -r requirements.txt` installs. In this folder:

```python
from bundle import load
scorer = load()
```

`scorer.score("Any text.").bpb` is its bits per byte, `scorer.losses("Any text.")` are the nats of
each token; `scorer.score("Any text.", "ttt")` adapts to the text as it is read. Model and tokenizer
are `scorer.model` and `scorer.tokenizer`.

From the command line: `python {bundle} --artifact {artifact} --tokenizer {tokenizer} --text FILE`.
`config.json` has the architecture, the settings of evaluation, and the SHA-256 of both files.
"""


def export(place: Path, params: Params, seed: int) -> None:
    """Write the folder of a seed's artifact; the current directory is that of the packages.

    Raises InputError if artifact or tokenizer are absent or not what their stages wrote, or if
    `place` holds other files than an earlier export.
    """
    source = ARTIFACTS / "quantize" / f"seed{seed}"
    made = recorded(source / SIDECAR, f"quantize@{seed}", [source / ARTIFACT])
    made |= recorded(TOKENS.parent / SIDECAR, "tokenize", [TOKENS / MANIFEST])
    require_recorded(made)
    tokenizer = Manifest.load(TOKENS, ()).tokenizer
    files = {
        ARTIFACT: (source / ARTIFACT).read_bytes(),
        TOKENIZER: tokenizer.read_bytes(),
    }
    architecture, _ = read_artifact(source / ARTIFACT)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    config = {"model": architecture, **settings_of(params), "sha256": hashes}
    names = {"bundle": NAME, "artifact": ARTIFACT, "tokenizer": TOKENIZER}
    readme = README.format(bytes=len(files[ARTIFACT]), **names)
    contents = {
        **files,
        NAME: bundle(settings_of(params), (STANDALONE,)),
        "config.json": f"{json.dumps(config, indent=2)}\n".encode(),
        "requirements.txt": scoring_requirements(CONSTRAINTS).encode(),
        "README.md": readme.encode(),
    }
    _require_own(place, {*contents, "__pycache__"})  # Python makes it where bundle.py is imported
    for name, written in contents.items():
        write_bytes(place / name, written)


def _require_own(place: Path, names: set[str]) -> None:
    """Raise InputError unless a folder is absent or holds nothing but files of these names."""
    if place.exists() and not place.is_dir():
        raise InputError(f"{place}: not a folder", "name a new folder")
    if place.is_dir() and (others := {file.name for file in place.iterdir()} - names):
        raise InputError(
            f"{place}: holds other files ({', '.join(sorted(others)[:3])})", "name a new folder"
        )
