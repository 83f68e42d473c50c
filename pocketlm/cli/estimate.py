"""`pocketlm estimate`."""

from typing import Annotated

from typer import Option


def main(
    preset: Annotated[
        str | None, Option(metavar="NAME", help="a file of conf/; default: params.yaml")
    ] = None,
    gpus: Annotated[
        int | None, Option(min=0, max=1024, help="per stage; 0: this machine's CPUs")
    ] = None,
) -> None:
    """Say what a run will cost: bytes, memory, seconds, device hours."""
    from pathlib import Path

    from model.runtime.threads import limit_spinning

    limit_spinning()  # as for every stage, whose speed is measured

    from rich.console import Console

    from pocketlm.params.load import load_params
    from pocketlm.params.presets import compose
    from pocketlm.report.terminal import show
    from pocketlm.workflow.estimate import estimate
    from pocketlm.workflow.gpus import visible_gpus

    in_force = load_params() if Path("params.yaml").exists() or preset is None else None
    params = load_params() if preset is None else compose(preset)
    available = min(len(visible_gpus()), params.execution.processes)
    show(estimate(params, available if gpus is None else gpus, in_force), Console())
