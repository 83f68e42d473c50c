"""`pocketlm COMMAND …`: a module a subcommand, named like it.

Each has a function `main` whose parameters are the command line, which calls what the other rooms
offer as plain functions, imported when it runs, so that `--help` does not wait for torch. An
InputError is shown as `error: problem` and `repair: what to do`, and ends with status 1.
"""

import typer

from model.runtime.errors import user_errors
from pocketlm.cli import (
    ablation,
    accept,
    audit,
    compare,
    doctor,
    estimate,
    export,
    generate,
    preset,
    readme,
    score,
    submission,
    sweep,
)

app = typer.Typer(
    help="Models, presets, sweeps and results; stages are run by Snakemake or DVC.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    *(generate, score, export, compare, estimate, audit, doctor),
    *(preset, sweep, ablation, accept, readme, submission),
)
for command in COMMANDS:
    name = command.__name__.rpartition(".")[2]
    app.command(name)(user_errors(status=1)(command.main))
