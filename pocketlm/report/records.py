"""Published results as data: the schema of `records/*.json`."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.runtime.errors import InputError
from model.runtime.files import read_json

LARGEST = 10**15  # of any figure; what is larger is a damaged number, and breaks its formats
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
PROBLEMS = 5  # that one message names
Model = TypeVar("Model", bound=BaseModel)


class Record(BaseModel):
    """A part of a published record: immutable, finite numbers, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RecordedScore(Record):
    """A loss in nats per token and the same in bits per byte."""

    loss: Positive
    bpb: Positive


class Scored(Record):
    """The text that was scored."""

    tokens: Count
    bytes: Count


class PublishedRun(Record):
    """One seed; what was not published is None."""

    final: RecordedScore
    seed: int | None = None
    printed: RecordedScore | None = None
    pre_quant: RecordedScore | None = None
    quantized: RecordedScore | None = None
    steps: Count | None = None
    total_bytes: Count | None = None
    peak_memory_mib: Positive | None = None
    tokens_per_second: Positive | None = None
    seconds: dict[str, Positive] = {}


class PublishedRecord(Record):
    """A published result of several seeds on one validation text."""

    name: str
    date: str
    note: str
    hardware: str
    scored: Scored
    runs: Annotated[list[PublishedRun], Field(min_length=1)]

    @property
    def losses(self) -> list[float]:
        """Final loss of each run, nats per token."""
        return [run.final.loss for run in self.runs]


def load_record(path: str | Path) -> PublishedRecord:
    """Read a published result; raises InputError naming file and key."""
    values = read_json(
        path, "set report.baseline to a file like those in records/, to no_ttt or to none"
    )
    return check(PublishedRecord, values, path, "see records/README.md for the schema")


def check(schema: type[Model], values: Any, path: str | Path, repair: str) -> Model:
    """Validate `values`, read from `path`; raises InputError that names file and keys."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{path}: {'.'.join(map(str, item['loc']))[:200] or 'top level'}: "
            f"{item['msg'].lower()[:200]}"
            for item in error.errors()[:PROBLEMS]
        ]
        raise InputError("\n".join(problems), repair) from error
