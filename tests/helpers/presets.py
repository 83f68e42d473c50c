"""The presets of conf/, each composed once for all tests of a worker: that takes .2 s."""

from functools import cache
from pathlib import Path

from pocketlm.params.params import Params
from pocketlm.params.presets import compose

CONF = Path(__file__).parents[2] / "conf"


@cache
def preset(name: str, *changes: str) -> Params:
    """`compose` of a preset and changes of the form `key=value`; the lists in it are shared."""
    return compose(name, list(changes), CONF)
