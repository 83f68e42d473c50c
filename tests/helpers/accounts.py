"""Commands run by a user who is not root, owns nothing and has no name."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USER = 54321
# Reading stays allowed where the system lets us: Python and the temporary files may be root's.
AS_USER = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
READING = [f"--{kind}=-all,+dac_read_search" for kind in ("inh-caps", "ambient-caps")]


def give_away(place: Path) -> None:
    """Make that user the owner of a folder and all in it; skips the test where that cannot be."""
    if os.getuid() != 0:
        pytest.skip("only root can give files to another user")
    for path in (place, *place.rglob("*")):
        os.chown(path, USER, USER, follow_symlinks=False)


def run_unnamed(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a user id without a name; skips the test where that cannot be."""
    prefix = _prefix()
    if prefix is None:
        pytest.skip("needs root, setpriv, and a Python that others can read")
    return subprocess.run([*prefix, *command], capture_output=True, text=True, **options)  # type: ignore[call-overload]


@cache
def _prefix() -> list[str] | None:
    """What lets a command run as that user, or None."""
    if os.getuid() != 0 or not shutil.which("setpriv"):
        return None
    for prefix in ([*AS_USER, *READING], AS_USER):
        probe = [*prefix, sys.executable, "-c", "import pytest, pocketlm.workflow"]
        if subprocess.run(probe, cwd=ROOT, capture_output=True).returncode == 0:
            return prefix
    return None
