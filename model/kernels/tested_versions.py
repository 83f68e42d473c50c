"""Versions of torch and Triton with which the CUDA kernels were run and measured on GPUs.

Kernels are compiled by whichever Triton is installed, and torch's compiler decides what reaches
them; both have broken right code before (docs/lab-notes.md). What runs with other versions is
therefore said in the log. docs/acceleration.md tells what was tested with which.
"""

from importlib import metadata

TESTED = (("2.11", "3.6"),)  # major and minor version of torch and of triton, by pairs


def untested_versions() -> str | None:
    """Say which installed versions the kernels were never run with on a GPU; None if they were."""
    torch, triton = _installed("torch"), _installed("triton")
    if (_minor(torch), _minor(triton)) in TESTED:
        return None
    tested = " or ".join(f"torch {torch} with triton {triton}" for torch, triton in TESTED)
    return f"torch {torch} with triton {triton}, but the kernels were tested on {tested}"


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _minor(version: str) -> str:
    """`2.11` of `2.11.0+cu130`."""
    return ".".join(version.split("+")[0].split(".")[:2])
