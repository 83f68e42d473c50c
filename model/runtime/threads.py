"""How threads of one process wait for each other."""

import os


def limit_spinning() -> None:
    """Let threads spin for some microseconds before they sleep; call before torch is imported.

    libgomp spins for some milliseconds, which on cores that other programs use as well made an
    evaluation up to fifty times as long; sleeping at once makes two threads no faster than one
    (docs/lab-notes.md). OpenMP reads this once. What the environment says goes first.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
