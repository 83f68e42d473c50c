"""Rows of an earlier recipe.json that stay beside those of new runs.

Machines are lent by the half hour, and twenty variants take days: `pocketlm ablation --earlier`
keeps what was measured before, each row with the commit at which it was, but what is measured anew.
Figures of the whole file that the new runs do not have are kept, too.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from model.runtime.errors import reading
from model.runtime.files import read_json
from pocketlm.report.blocks import short_commit
from pocketlm.report.effects import Effect

REPAIR = "name the recipe.json of an ablation"
ROWS = ("ablation", "runs", "earlier_runs")


@dataclass(frozen=True)
class Earlier:
    """What is kept: effects, each with its row of the file; rows of runs; other figures."""

    effects: list[tuple[Effect, dict[str, Any]]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def described(self) -> dict[str, str]:
        """What each sets, unless the file is too old to say it, and where it was measured."""
        return {one.name: "; ".join(_described(row)) for one, row in self.effects}

    def beside(self, effects: Collection[str], runs: Collection[str]) -> "Earlier":
        """What stays beside new effects and runs of these names."""
        return replace(
            self,
            effects=[pair for pair in self.effects if pair[0].name not in effects],
            runs=[row for row in self.runs if row["name"] not in runs],
        )

    def added_to(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """The content of a recipe.json with these rows and figures."""
        new = {key: value for key, value in recipe.items() if value is not None}
        rows = [*recipe["ablation"], *(row for _, row in self.effects)]
        kept = {"earlier_runs": self.runs} if self.runs else {}
        return {**recipe, **self.figures, **new, **kept, "ablation": rows}


class _Origin(BaseModel):
    """What the row of an effect says of where it is from."""

    commit: str
    settings: str = ""


def _described(row: Mapping[str, Any]) -> list[str]:
    settings = [row["settings"]] if "settings" in row else []
    return [*settings, f"measured at commit {short_commit(row['commit'])}"]


def read_earlier(path: Path) -> Earlier:
    """What a recipe.json has; raises InputError if it is none."""
    keys = [one.name for one in fields(Effect)]
    content = read_json(path, REPAIR)
    with reading(path, REPAIR):
        commit = {"commit": content["commit"]}
        rows = [commit | row for row in content["ablation"]]
        for row in rows:
            _Origin.model_validate(row)
        effects = TypeAdapter(list[Effect]).validate_python(
            [{key: row[key] for key in keys} for row in rows]
        )
        return Earlier(
            list(zip(effects, rows, strict=True)),
            [commit | row for row in (*content["runs"], *content.get("earlier_runs", []))],
            {key: value for key, value in content.items() if key not in ROWS},
        )
