"""Write params.yaml from a preset: `pocketlm preset NAME [KEY=VALUE ...]`.

A preset is a Hydra config in conf/; the others inherit from `record`. Overrides use Hydra's syntax.
Every value is written with its unit and reason, taken from the settings (model/*/config.py). A
params.yaml that differs from every preset has been edited by hand and is replaced only with
--force.
"""

import dataclasses
import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq

from model.runtime.errors import InputError
from model.runtime.files import write_bytes
from model.runtime.settings import Settings
from pocketlm.params.json_schema import MODELINE, PATH, schema_text
from pocketlm.params.load import check_params, load_params
from pocketlm.params.params import Params

CONF = Path("conf")
COMMENT_COLUMN = 42


def presets(directory: Path = CONF) -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def compose(name: str, overrides: list[str] | None = None, directory: Path = CONF) -> Params:
    """Compose and check a preset; raises InputError for an unknown name, key or bad value."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    if name not in presets(directory):
        raise InputError(
            f"preset {name}: no such file {directory}/{name}.yaml",
            f"choose one of {', '.join(presets(directory))}",
        )
    try:
        with initialize_config_dir(str(directory.resolve()), version_base=None):
            config = hydra_compose(name, overrides or [])
    except HydraException as error:
        raise InputError(f"preset {name}: {error}", "correct the override") from error
    return check_params(OmegaConf.to_container(config, resolve=True), f"preset {name}")


def render(params: Params) -> str:
    """Text of a params.yaml with these values, each with its unit and reason."""
    lines = [
        MODELINE,
        "# The experiment in force: edit by hand, or write another with",
        "# `pocketlm preset NAME` (docs/workflow.md); settings: model/*/config.py.",
        *_lines(params, ""),
    ]
    return _as_dvc_writes("\n".join(lines) + "\n")


def _as_dvc_writes(text: str) -> str:
    """The same YAML in the style of `dvc exp run -S`, which then changes no other line."""
    editor = YAML()
    editor.default_flow_style = False
    values = editor.load(text)
    _use_blocks(values)
    written = StringIO()
    editor.dump(values, written)
    return written.getvalue()


def _use_blocks(value: Any) -> None:
    """Let every list within `value` that is not empty be written an item a line."""
    if isinstance(value, CommentedSeq) and value:
        value.fa.set_block_style()
    for one in value.values() if isinstance(value, dict) else value:
        if isinstance(one, dict | CommentedSeq):
            _use_blocks(one)


def _lines(section: Settings, indent: str) -> list[str]:
    lines: list[str] = []
    for field in dataclasses.fields(section):
        key, value = field.name, getattr(section, field.name)
        if isinstance(value, Settings):
            lines += [f"{indent}{key}: # {type(value).__doc__}", *_lines(value, indent + "  ")]
        else:
            entry, comment = f"{indent}{key}: {_scalar(value)}", field.metadata["description"]
            if len(entry) < 2 * COMMENT_COLUMN:
                lines.append(f"{entry:<{COMMENT_COLUMN}} # {comment}")
            else:  # it is broken into lines
                lines += [f"{indent}# {comment}", entry]
    return lines


def _scalar(value: Any) -> str:
    """A value as YAML 1.1 and 1.2 both read it (1e-10 without a point would be a text in 1.1)."""
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, float) and math.isfinite(value):
        mantissa, _, exponent = repr(value).partition("e")
        point = "" if "." in mantissa else ".0"
        return f"{mantissa}{point}e{int(exponent)}" if exponent else mantissa
    if isinstance(value, str) and value.replace("_", "").isalnum() and not value[0].isdigit():
        return value
    return json.dumps(value, ensure_ascii=False)


def is_preset(path: Path) -> bool:
    """Whether the file has the values of some preset, in whatever style."""
    try:
        values = load_params(path)
    except InputError:
        return False
    return any(values == compose(name) for name in presets())


def write_preset(name: str, overrides: list[str], output: Path, force: bool = False) -> None:
    """Write a preset to `output`, and the schema it names.

    Raises InputError if the file was edited, unless `force`.
    """
    text = render(compose(name, overrides))
    if output.exists() and not force and not is_preset(output):
        raise InputError(
            f"{output}: edited by hand since it was written from a preset",
            "keep it (git commit), or replace it with --force",
        )
    write_bytes(output, text.encode())
    write_bytes(PATH, schema_text().encode())
