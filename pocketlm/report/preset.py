"""Which preset the results were made with, and where their parameters differ from it."""

from dataclasses import asdict
from typing import Any

from pocketlm.params.params import flat
from pocketlm.params.presets import compose, presets


def nearest_preset(used: dict[str, Any]) -> dict[str, Any] | None:
    """The preset from which the fewest values differ; None if there are no presets here.

    used: recorded parameters by section and key; what is not recorded is not compared. Returns the
    preset's name and `changes`: key, value in the preset, value used.
    """
    values = flat(used)
    found = []
    for name in presets():
        known = flat(asdict(compose(name)))
        changes = [
            {"key": key, "preset": known.get(key), "used": value}
            for key, value in values.items()
            if known.get(key) != value
        ]
        found.append({"name": name, "changes": changes})
    return min(found, key=lambda preset: len(preset["changes"]), default=None)
