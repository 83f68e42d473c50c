"""`python -m pocketlm` is the command `pocketlm`."""

from pocketlm.cli import app

app(prog_name="pocketlm")
