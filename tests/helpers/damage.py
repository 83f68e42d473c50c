"""Damaged inputs for tests of what reads them."""

from collections.abc import Iterator
from typing import Any

WRONG: list[Any] = [None, True, -1, 1.5, "x", "../../x", [], {}, [1], {"a": 1}, 10**400]


def wrong_values(value: Any) -> Iterator[Any]:
    """Copies of nested JSON in which one entry is of another type or absurd."""
    yield from WRONG
    entries = value.items() if isinstance(value, dict) else ()
    for key, entry in enumerate(value) if isinstance(value, list) else entries:
        for wrong in wrong_values(entry):
            copy = value.copy()
            copy[key] = wrong
            yield copy
