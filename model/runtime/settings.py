"""What every section of params.yaml has in common: fields that explain themselves, and old files.

A section is a frozen dataclass of the standard library that stands beside the technique which reads
it (`model/*/config.py`). `setting` describes a field; `pocketlm.params` hands the sections to
pydantic, which checks types and bounds, and writes the comments of params.yaml and its JSON Schema.
Nothing here knows of pydantic, so `model` runs without it.

Checkpoints and artifacts carry the section they were made with. A field that is added later says
with `off` which value means what was done before it existed: files without the key get that value,
and files in which the field is off do not mention it, so that they stay the same and older versions
read them.
"""

import copy
import dataclasses
import operator
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from model.runtime.errors import InputError

NO_OFF: Any = object()  # a field that was there from the first version on
BOUNDS = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}


def setting(reason: str, unit: str = "", *, off: Any = NO_OFF, **bounds: float) -> Any:
    """A field of a section.

    reason: what it does, one line; unit: of its values; off: the value by which files are read that
    were made before the field existed; bounds: ge, gt, le, lt of a number, max_length of a list.
    """
    description = f"[{unit}] {reason}" if unit else reason
    metadata = {"description": description, **bounds}
    return dataclasses.field(metadata=metadata if off is NO_OFF else {**metadata, "off": off})


class ImpossibleValue(ValueError):
    """A value that cannot work together with others; `key` is relative to the section."""

    def __init__(self, key: str, reason: str, repair: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason, self.repair = key, reason, repair


def require(condition: bool, key: str, reason: str, repair: str) -> None:
    """Raise ImpossibleValue unless the condition holds."""
    if not condition:
        raise ImpossibleValue(key, reason, repair)


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON file has the type of a field; True is no 1, infinity no number."""
    if isinstance(kind, types.UnionType):
        return any(_has_type(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return isinstance(value, list) and all(_has_type(one, item) for one in value)
    if kind is float and type(value) in (int, float):
        return bool(abs(value) <= sys.float_info.max)
    return type(value) is kind


def _within(value: Any, bounds: Mapping[str, Any]) -> bool:
    """Whether a value of the right type keeps the bounds of its field."""
    if isinstance(value, list):
        return len(value) <= bounds.get("max_length", len(value))
    held = {name: bound for name, bound in bounds.items() if name in BOUNDS and value is not None}
    return all(BOUNDS[name](value, bound) for name, bound in held.items())


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of the sections: no unknown keys, no silent conversion of types, finite numbers."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], source: str | Path) -> Self:
        """The section as a file of this or an older version has it.

        source: the file, for the error. Raises InputError for a key that is missing and has no
        declared off, for unknown keys, for values of another type or out of bounds, and for those
        that cannot work together.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - fields.keys()):
            raise InputError(
                f"{source}: {', '.join(unknown)[:200]}: unknown here, the file was made by a newer "
                "version of pocketlm",
                "update pocketlm, or make the file again with this version",
            )
        off = {
            name: copy.deepcopy(field.metadata["off"])
            for name, field in fields.items()
            if "off" in field.metadata
        }
        if missing := [name for name in fields if name not in values and name not in off]:
            raise InputError(
                f"{source}: {', '.join(missing)}: missing, and no value is declared for files "
                "without it",
                "make the file again with this version of pocketlm",
            )
        kinds = get_type_hints(cls)
        for name, value in values.items():
            if not (_has_type(value, kinds[name]) and _within(value, fields[name].metadata)):
                raise InputError(
                    f"{source}: {name}: {str(value)[:100]} is impossible",
                    "fetch the file again, or make it again with this version of pocketlm",
                )
        try:
            return cls(**{**off, **values})
        except ImpossibleValue as error:
            raise InputError(f"{source}: {error}", error.repair) from error

    def to_stored(self) -> dict[str, Any]:
        """Plain values for a file, in the order of the fields, without those that are off."""
        values = dataclasses.asdict(self)
        return {
            field.name: values[field.name]
            for field in dataclasses.fields(self)
            if field.metadata.get("off", NO_OFF) != values[field.name]
        }
