"""Read params.yaml; every mistake is told with its key, its reason and its repair.

The Snakefile loads the file first, so mistakes show in `snakemake -n`. pydantic checks types and
bounds of the sections, which are dataclasses (`model.runtime.settings`). The values are handed over
as JSON: there, strict types do not ask for instances of the dataclasses.
"""

import dataclasses
import difflib
import json
import reprlib
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent

from model.runtime.errors import InputError, reading
from model.runtime.settings import ImpossibleValue, Settings
from pocketlm.params.params import Params
from pocketlm.params.paths import BASELINES, TOKENIZERS
from pocketlm.params.renamed import RENAMED

Section = TypeVar("Section", bound=Settings)
LARGEST_FILE, DEEPEST = 1 << 20, 20  # [bytes] and levels of a file of settings
CORRECT = "correct it; `pocketlm preset demo --output FILE` writes one to compare with"


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check a parameter file; raises InputError with file, key, reason and repair."""
    return check_params(read_yaml(path, "write it from a preset: pocketlm preset demo"), str(path))


def read_yaml(path: str | Path, otherwise: str) -> Any:
    """Read a YAML 1.2 file like DVC (3e-4 is a number); raises InputError if it is not one.

    Aliases are refused: a few lines of them stand for more than any memory holds.
    otherwise: the repair if there is no such file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file", otherwise)
    with reading(path, CORRECT):
        if (size := Path(path).stat().st_size) > LARGEST_FILE:
            raise InputError(f"{path}: {size} bytes are no file of settings", otherwise)
        reader = YAML(typ="safe", pure=True)
        reader.Composer = _Composer
        try:
            return reader.load(Path(path).read_text(encoding="utf-8"))
        except (YAMLError, UnicodeDecodeError) as error:
            problem = f"{path}: not valid YAML: {error}"
            raise InputError(problem, "correct the line named") from error


class _Composer(Composer):
    """Refuses aliases (`*name`), and more levels than settings have."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        if isinstance(event, AliasEvent):
            why = "aliases are not read here; write the value"
            raise ComposerError(None, None, why, event.start_mark)
        if self.depth > DEEPEST:
            raise ComposerError(None, None, "too many levels", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def check_params(values: Any, name: str) -> Params:
    """Validate a mapping read from `name`; raises InputError."""
    if not isinstance(values, dict):
        raise InputError(f"{name}: not a mapping of sections", "pocketlm preset demo")
    with reading(name, CORRECT):  # keys that are lists, names of files that cannot be names
        params = checked(Params, values, name)
        _check_files(params, name)
    return params


def checked(section: type[Section], values: Any, name: str) -> Section:
    """A section with these values, read from `name`; raises InputError that lists all mistakes."""
    try:
        return TypeAdapter(section).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise InputError(*_explain(section, error, name)) from error


def _check_files(params: Params, name: str) -> None:
    """Refuse parameters that name files which do not exist, or which DVC would not watch."""
    named = [("tokenizer.model", params.tokenizer.model, TOKENIZERS)]
    if params.report.baseline not in ("no_ttt", "none"):
        named.append(("report.baseline", params.report.baseline, BASELINES))
    for key, file, folder in named:
        if file is None:
            continue
        if not Path(file).is_file():
            raise InputError(f"{name}: {key}: {file}: no such file", f"correct {key}")
        if Path(file).absolute().parent != folder.absolute():
            raise InputError(
                f"{name}: {key}: {file} does not lie in {folder}/, where its changes are noticed",
                f"copy it to {folder}/ and name the copy",
            )


def _explain(section: type[Settings], error: ValidationError, name: str) -> tuple[str, str]:
    """Turn pydantic's list of errors into one problem and one repair."""
    problems, repairs = [], []
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        key = ".".join(path)
        cause = (item.get("ctx") or {}).get("error")
        if isinstance(cause, ImpossibleValue):
            key = ".".join([*path, cause.key])
            reason, repair = cause.reason, cause.repair
        elif item["type"] == "unexpected_keyword_argument":
            reason, repair = _unknown(section, path)
        elif item["type"] == "missing":
            reason = "missing"
            repair = f"add {key} (see conf/record.yaml for a value)"
        else:
            reason = f"{item['msg'].lower()}, but it is {reprlib.repr(item['input'])}"
            repair = f"correct {key}"
        problems.append(f"{name}: {key}: {reason}")
        repairs.append(repair)
    return "\n".join(problems), "; ".join(repairs)


def _unknown(section: type[Settings], path: list[str]) -> tuple[str, str]:
    """Reason and repair of the unknown key at `path`: its new name, the nearest, or all there are.

    A misspelt old name leads to the new one, too.
    """
    *parents, name = path
    renamed = RENAMED if section is Params else {}
    if new := renamed.get(".".join(path)):
        return f"was renamed to {new}", f"write {new} instead"
    for part in parents:
        section = get_type_hints(section)[part]
    known = [field.name for field in dataclasses.fields(section)]
    keys = {old.split(".")[-1]: new for old, new in renamed.items() if _parents(old) == parents}
    keys |= {one: ".".join([*parents, one]) for one in known}
    if near := difflib.get_close_matches(name, keys, n=1):
        return "unknown key", f"did you mean {keys[near[0]]}?"
    return "unknown key", f"remove it; known keys: {', '.join(known)}"


def _parents(key: str) -> list[str]:
    return key.split(".")[:-1]
