"""Write params.yaml from a preset: `python -m pocketlm.params.presets NAME [key=value ...]`.

A preset is a Hydra config in conf/; the others inherit from `record`. Overrides use Hydra's syntax.
Every value is written with its unit and reason, taken from the schema. A params.yaml that differs
from every preset has been edited by hand and is replaced only with --force.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from model.runtime.errors import InputError
from model.runtime.files import write_bytes
from pocketlm.params.schema import Params, check_params

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
        "# The experiment in force: edit by hand, or write another with",
        "# `python -m pocketlm.params.presets NAME` (docs/workflow.md); schema: pocketlm/params.",
        *_lines(params, ""),
    ]
    return "\n".join(lines) + "\n"


def _lines(section: BaseModel, indent: str) -> list[str]:
    lines: list[str] = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            lines += [f"{indent}{key}: # {type(value).__doc__}", *_lines(value, indent + "  ")]
        else:
            entry = f"{indent}{key}: {_scalar(value)}"
            lines.append(f"{entry:<{COMMENT_COLUMN}} # {field.description}")
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
    """Whether the file is exactly what some preset renders to."""
    text = path.read_text(encoding="utf-8")
    return any(text == render(compose(name)) for name in presets())


def main() -> None:
    """Parse the command line and write params.yaml."""
    parser = argparse.ArgumentParser(prog="python -m pocketlm.params.presets", description=__doc__)
    parser.add_argument("name", help=f"one of {', '.join(presets())}")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. ttt.lr=3e-4")
    parser.add_argument("--force", action="store_true", help="replace a hand-edited params.yaml")
    parser.add_argument("--output", type=Path, default=Path("params.yaml"))
    arguments = parser.parse_args()
    try:
        text = render(compose(arguments.name, arguments.overrides))
        if arguments.output.exists() and not arguments.force and not is_preset(arguments.output):
            raise InputError(
                f"{arguments.output}: edited by hand since it was written from a preset",
                "keep it (git commit), or replace it with --force",
            )
        write_bytes(arguments.output, text.encode())
        print(f"{arguments.output}: preset {' '.join([arguments.name, *arguments.overrides])}")
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
