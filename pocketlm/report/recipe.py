"""recipe.json: what ablations have measured, of one file of factors or variants or of several.

Machines are lent by the half hour, and twenty variants take days. So a new ablation stands beside
earlier ones (`pocketlm ablation --earlier`): what it measures anew takes the place of the rows of
that name and file, and the rest stays, each row with the commit at which it was measured. Page and
figure (`ablation_page`) are made of this file's content alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from model.runtime.errors import reading
from model.runtime.files import read_json
from pocketlm.report.effects import Effect

REPAIR = "name the recipe.json of an ablation"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a row is from: the ablation's file, and the commits of its trainings."""

    file: str
    commit: str


@dataclass(frozen=True, kw_only=True)
class Row(Effect, Origin):
    """An effect, and what the factor or variant sets."""

    settings: str


@dataclass(frozen=True, kw_only=True)
class Reached(Origin):
    """What a run has reached, means over its seeds; None: not known.

    train_seconds: of the clock; gap_nats: loss per token after quantization minus before, and
    predicted_gap_nats; quantize_seconds: of the whole stage; ttt_bpb: of the documents to report,
    weighted to FineWeb's lengths.
    """

    name: str
    train_seconds: float
    trained_bpb: float
    train_steps: float | None = None
    parameters: int | None = None
    bits_per_weight: float | None = None
    quantized_bpb: float | None = None
    gap_nats: float | None = None
    predicted_gap_nats: float | None = None
    quantize_seconds: float | None = None
    ttt_bpb: float | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """The last ablation of a file.

    runs: how many of how many were done; always: values of all runs; to_choose, to_report: numbers
    of documents that decide and that the figures are of, 0 if all are for both.
    """

    file: str
    runs: str
    always: str
    device: str
    commit: str
    to_choose: int
    to_report: int


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A score of the baseline and of the best, means over seeds, and the interval of the gain."""

    score: str
    baseline: float
    best: float
    gain: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best beside the baseline: the figures of the file; None: not measured.

    device, versions, commit: of the best's training, of its first seed; *_trained_bpb: of the
    averaged weights; *_ttt_bpb: weighted to FineWeb's lengths; seeds: numbers of them.
    """

    device: str | None
    versions: Mapping[str, Any]
    commit: str | None
    baseline: str | None = None
    best: str | None = None
    baseline_seeds: int | None = None
    best_seeds: int | None = None
    baseline_trained_bpb: float | None = None
    best_trained_bpb: float | None = None
    baseline_ttt_bpb: float | None = None
    best_ttt_bpb: float | None = None
    best_total_bytes: int | None = None
    tokens_per_s_per_gpu: float | None = None
    tokens_per_s_per_gpu_recurrent: float | None = None
    evaluation_seconds_8_gpus: float | None = None
    comparison: Sequence[Compared] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe(Best):
    """The content of a recipe.json."""

    sources: Sequence[Source]
    ablation: Sequence[Row]
    runs: Sequence[Reached]

    def content(self) -> dict[str, Any]:
        """What the file holds; every effect with its verdict."""
        rows = [asdict(row) | {"verdict": row.verdict} for row in self.ablation]
        return asdict(self) | {"ablation": rows}

    def beside(self, earlier: "Recipe") -> "Recipe":
        """This one with what stays of an earlier one.

        Without a best, that of before stays; with one, figures that it lacks do.
        """
        names = [one.name for one in fields(Best)]
        mine, theirs = ({name: getattr(one, name) for name in names} for one in (self, earlier))
        known = {name: value for name, value in mine.items() if value is not None}
        files = {one.file for one in self.sources}
        return replace(
            self,
            **(theirs | known if self.best else theirs),
            sources=[*self.sources, *(one for one in earlier.sources if one.file not in files)],
            ablation=_beside(self.ablation, earlier.ablation),
            runs=_beside(self.runs, earlier.runs),
        )


Named = TypeVar("Named", bound=Row | Reached)


def _beside(new: Sequence[Named], earlier: Sequence[Named]) -> list[Named]:
    """New rows, and those earlier ones that are not measured anew."""
    measured = {(row.file, row.name) for row in new}
    return [*new, *(row for row in earlier if (row.file, row.name) not in measured)]


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.json; raises InputError if it is none."""
    content = read_json(path, REPAIR)
    with reading(path, REPAIR):
        return TypeAdapter(Recipe).validate_python(content)
