"""`pocketlm COMMAND …`: a module a subcommand, named like it.

Each has a function `main` whose parameters are the command line, which calls what the other rooms
offer as plain functions, imported when it runs, so that `--help` does not wait for torch. An
InputError is shown as `error: problem` and `repair: what to do`, and ends with status 1.
"""

import typer

from model.runtime.errors import user_errors
from pocketlm.cli import accept, preset, readme, submission, sweep

app = typer.Typer(
    help="Presets, sweeps and recorded results; steps are run by Snakemake or DVC.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (preset, sweep, accept, readme, submission):
    name = command.__name__.rpartition(".")[2]
    app.command(name)(user_errors(status=1)(command.main))
