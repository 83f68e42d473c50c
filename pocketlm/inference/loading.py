"""Artifact, tokenizer and settings of a command, wherever it is called.

The tokenizer lies beside the artifact in an exported folder, and where the stage tokenize put it in
a checkout. Settings are those of params.yaml if it is here, else of the preset `record`.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from model.data.tokenizer import Tokenizer
from model.evaluation.config import EvaluateConfig
from model.kernels.config import OpsConfig
from model.network.gpt import GPT
from model.runtime.config import ExecutionConfig
from model.runtime.distributed import Group
from model.runtime.errors import InputError
from model.runtime.settings import Settings
from model.ttt.config import TTTConfig
from pocketlm.params.load import checked, read_yaml
from pocketlm.params.paths import ARTIFACTS, TOKENIZER, TOKENS
from pocketlm.submission.standalone import load

OWN = Path("params.yaml")
PRESET = Path(__file__).parents[2] / "conf/record.yaml"


@dataclass(frozen=True)
class ScoringSettings(Settings):
    """The sections of params.yaml on which scores depend."""

    evaluate: EvaluateConfig
    ttt: TTTConfig
    ops: OpsConfig
    execution: ExecutionConfig


def load_pair(artifact: Path, tokenizer: Path | None, group: Group) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer, verified; tokenizer: a file, or None to find it.

    Raises InputError if one is absent or damaged, or if they do not fit each other.
    """
    return load(artifact, tokenizer or _found(artifact), group.device)


def _found(artifact: Path) -> Path:
    """The tokenizer beside an artifact, or of the checkout it lies in."""
    place = artifact.absolute().parent
    roots = (folder for folder in place.parents if folder.name == ARTIFACTS.name)
    candidates = [place / TOKENIZER, *(root.parent / TOKENS / TOKENIZER for root in roots)]
    for file in (*candidates, TOKENS / TOKENIZER):
        if file.exists():
            return file
    raise InputError(
        f"{artifact}: there is no {TOKENIZER} beside it, nor {TOKENS / TOKENIZER}",
        "name the tokenizer of this artifact: --tokenizer FILE",
    )


def scoring_settings() -> ScoringSettings:
    """Read and check the settings; raises InputError with file, key, reason and repair."""
    path = OWN if OWN.exists() else PRESET
    if path is PRESET:
        print(f"note: no {OWN} here; settings are those of {PRESET.name}", file=sys.stderr)
    values = read_yaml(path, "write params.yaml from a preset: pocketlm preset demo")
    names = {field.name for field in fields(ScoringSettings)}
    sections = values.items() if isinstance(values, dict) else ()
    return checked(ScoringSettings, {k: v for k, v in sections if k in names}, str(path))
