"""Processes in a namespace of their own, as in another container or on another host."""

import subprocess

APART = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def can_be_apart() -> bool:
    """Whether this user may make namespaces here, which not every container allows."""
    return subprocess.run([*APART, "true"], capture_output=True).returncode == 0
