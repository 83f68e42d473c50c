"""Sections of the parameters: files that are older or newer than the program."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest

from model.network.config import ModelConfig
from model.runtime.errors import InputError
from model.runtime.settings import Settings, require, setting
from tests.helpers.models import record_params


@dataclass(frozen=True)
class Example(Settings):
    """A section, two fields of which came later."""

    width: int = setting("from the first version on", "values", ge=1)
    lanes: int | None = setting("a technique that came later; null = off", off=None, ge=1)
    order: list[int] = setting("another one; [] = off", off=[], max_length=9)

    def __post_init__(self) -> None:
        require(self.width != 13, "width", "is 13", "choose another number")


def test_a_key_that_came_later_is_off_in_an_older_file() -> None:
    assert Example.from_stored({"width": 4}, "old") == Example(4, None, [])
    first, second = (Example.from_stored({"width": 4}, "old") for _ in range(2))
    assert first.order is not second.order


def test_a_file_does_not_mention_what_is_off() -> None:
    assert Example(4, None, []).to_stored() == {"width": 4}
    both = Example(4, 2, [0, 0, 1])
    assert both.to_stored() == {"width": 4, "lanes": 2, "order": [0, 0, 1]}
    assert Example.from_stored(both.to_stored(), "file") == both


IMPOSSIBLE: dict[str, list[Any]] = {
    "width": [True, "4", 4.0, None, 0, -1, [], {}, math.inf],
    "lanes": [False, "2", 0, 1.5, [1]],
    "order": [None, 1, "ab", [1.0], [True], [[1]], {}, [0] * 10],
}


@pytest.mark.parametrize(
    ("values", "problem", "repair"),
    [
        ({"lanes": 2}, "old.file: width: missing", "make the file again"),
        ({"width": 4, "depth": 2}, "old.file: depth: unknown.*newer version of pocketlm", "update"),
        ({"width": 13}, "old.file: width: is 13", "choose another number"),
        *(
            ({"width": 4, key: value}, f"old.file: {key}: .* is impossible", "make it again")
            for key, values in IMPOSSIBLE.items()
            for value in values
        ),
    ],
)
def test_what_cannot_be_read_is_named_with_file_and_key(
    values: dict[str, Any], problem: str, repair: str
) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        Example.from_stored(values, "old.file")
    assert repair in caught.value.repair


def test_the_architecture_survives_a_file_in_its_order() -> None:
    config = record_params(skips=False)
    stored = config.to_stored()
    assert ModelConfig.from_stored(dict(sorted(stored.items())), "file") == config
    assert list(ModelConfig.from_stored(dict(sorted(stored.items())), "f").to_stored()) == list(
        stored
    )
    assert replace(config, skips=True) != config
