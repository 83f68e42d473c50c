"""Which preset the results were made with, and where their parameters differ from it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pocketlm.params.presets import compose, presets


def nearest_preset(used: Mapping[str, Any]) -> dict[str, Any] | None:
    """The preset from which the fewest values differ; None if there are no presets here.

    used: recorded parameters by section and key; what is not recorded is not compared. Returns the
    preset's name and `changes`: key, value in the preset, value used.
    """
    values = _flat(used)
    found = []
    for name in presets():
        known = _flat(asdict(compose(name)))
        changes = [
            {"key": key, "preset": known.get(key), "used": value}
            for key, value in values.items()
            if known.get(key) != value
        ]
        found.append({"name": name, "changes": changes})
    return min(found, key=lambda preset: len(preset["changes"]), default=None)


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Values by `section.key`, or by the key of what is no section."""
    return {
        f"{section}.{key}" if key else section: value
        for section, values in sections.items()
        for key, value in (values if isinstance(values, Mapping) else {"": values}).items()
    }
